// SPDX-License-Identifier: Apache-2.0
// Threads that work on one row together: how they reduce, and how they walk over the row.
#pragma once

#include "device.cuh"

namespace pyd {

// A power of two of neighbours within a warp, or all the warps of a block.
struct Team {
  int size, rank;
  unsigned lanes;  // of the team's threads in this warp, as the warp's collectives want them
};

__device__ __forceinline__ Team team_of(int size) {
  if (size > warp_size) return {size, static_cast<int>(threadIdx.x), 0xffffffffu};
  const int lane = threadIdx.x % warp_size, rank = lane & (size - 1);
  return {size, rank, (0xffffffffu >> (warp_size - size)) << (lane - rank)};
}

struct Sum {
  template <class T>
  static __device__ __forceinline__ T identity() {
    return 0;
  }
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Maximum {
  template <class T>
  static __device__ __forceinline__ T identity() {
    return -INFINITY;
  }
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Every thread gets the same bits: at each step two neighbours add the same two numbers.
template <class Combine, class T, int N>
__device__ __forceinline__ void reduce_within_warp(unsigned lanes, int width, T (&x)[N]) {
  for (int step = width / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < N; ++k) x[k] = Combine()(x[k], __shfl_xor_sync(lanes, x[k], step));
  }
}

// Shared memory that one reduction of N values of type T takes, for teams of more than one warp.
template <class T, int N>
constexpr int reduction_bytes = warp_size * N * sizeof(T);

// Each of N values combined over the team, in an order that depends on nothing but the team's size; every thread gets
// the results. A barrier of the team: what its threads read and wrote before is done. `slots` is shared memory for this
// one reduction.
template <class Combine, class T, int N>
__device__ __forceinline__ void reduce(const Team& team, T (&x)[N], T* slots) {
  reduce_within_warp<Combine>(team.lanes, min(team.size, warp_size), x);
  if (team.size <= warp_size) {
    __syncwarp(team.lanes);
    return;
  }
  const int lane = threadIdx.x % warp_size, warp = threadIdx.x / warp_size;
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < N; ++k) slots[k * warp_size + warp] = x[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; ++k)
    x[k] = lane < team.size / warp_size ? slots[k * warp_size + lane] : Combine::template identity<T>();
  reduce_within_warp<Combine>(0xffffffffu, warp_size, x);
}

template <int N>
struct Width {
  static constexpr int value = N;
};

// A row cut into pieces of 16 bytes: `head` single elements stand before the first, the rest after the last.
struct Pieces {
  int size, head, count;
};

// Cut from the first element on, wherever that lies in memory. The same elements fall to the same thread in every
// layout, so that sums have the same bits. With fewer elements than a warp has threads, pieces would leave most without
// work.
template <class S>
__device__ __forceinline__ Pieces pieces_of(int size) {
  constexpr int width = vector_bytes / sizeof(S);
  return {size, 0, size <= warp_size ? 0 : size / width};
}

// Cut where `out` allows 16-byte stores.
template <class S>
__device__ __forceinline__ Pieces pieces_of(int size, const S* out) {
  constexpr int width = vector_bytes / sizeof(S);
  const int head = (vector_bytes - phase_of(out)) % vector_bytes / static_cast<int>(sizeof(S));
  return {size, head, size <= warp_size ? 0 : (size - head) / width};
}

// Calls body(Width<n>, i) for elements i .. i + n - 1 of a row.
template <class S, class Body>
__device__ __forceinline__ void walk(const Team& team, const Pieces& pieces, Body&& body) {
  constexpr int width = vector_bytes / sizeof(S);
  for (int v = team.rank; v < pieces.count; v += team.size) body(Width<width>(), pieces.head + v * width);
  const int single = pieces.size - pieces.count * width;
  for (int k = team.rank; k < single; k += team.size) body(Width<1>(), k < pieces.head ? k : k + pieces.count * width);
}

}  // namespace pyd
