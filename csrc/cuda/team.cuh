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
// the results. `slots` is shared memory that nothing else uses between two barriers.
template <class Combine, class T, int N>
__device__ __forceinline__ void reduce(const Team& team, T (&x)[N], T* slots) {
  reduce_within_warp<Combine>(team.lanes, min(team.size, warp_size), x);
  if (team.size <= warp_size) return;
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

// Where a row's 16-byte vectors lie: `head` single elements stand before them, the rest after.
struct Span {
  int size, head, vectors;
};

// Vectors need an address that is a multiple of their size, in every tensor that is walked at the same time.
template <class S>
__device__ __forceinline__ Span span_of(int size, const S* a, const S* b, const S* c) {
  constexpr int width = vector_bytes / sizeof(S);
  const unsigned at = reinterpret_cast<uintptr_t>(a) % vector_bytes;
  const bool together =
      reinterpret_cast<uintptr_t>(b) % vector_bytes == at && reinterpret_cast<uintptr_t>(c) % vector_bytes == at;
  // With fewer elements than threads in a warp, vectors would leave most threads without work.
  if (!together || size <= warp_size) return {size, 0, 0};
  const int head = (vector_bytes - at) % vector_bytes / sizeof(S);
  return {size, head, (size - head) / width};
}

// Calls body(Width<n>, i) for elements i .. i + n - 1 of a row, the same ones in the same thread every time.
template <class S, class Body>
__device__ __forceinline__ void walk(const Team& team, const Span& span, Body&& body) {
  constexpr int width = vector_bytes / sizeof(S);
  for (int v = team.rank; v < span.vectors; v += team.size) body(Width<width>(), span.head + v * width);
  const int single = span.size - span.vectors * width;
  for (int k = team.rank; k < single; k += team.size) body(Width<1>(), k < span.head ? k : k + span.vectors * width);
}

}  // namespace pyd
