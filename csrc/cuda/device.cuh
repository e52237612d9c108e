// SPDX-License-Identifier: Apache-2.0
// What all CUDA sources of ours stand on: launches, shared memory, storage types, 16-byte loads and stores. With
// PYD_SIMT_HOST the same sources are compiled by a C++ compiler and run on the CPU (tests/simt).
#pragma once

#ifdef PYD_SIMT_HOST
#include "simt.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define PYD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
// The block's dynamic shared memory, 16-byte aligned, as `unsigned char* name`.
#define PYD_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

#include <cstdint>

namespace pyd {

constexpr int warp_size = 32;
constexpr int vector_bytes = 16;  // the widest load and store

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

// N neighbouring elements, moved by one instruction where they fill 16 bytes.
template <class S, int N>
struct alignas(N * sizeof(S)) Vector {
  S lanes[N];
};

template <int N, class S>
__device__ __forceinline__ Vector<S, N> load(const S* p) {
  return *reinterpret_cast<const Vector<S, N>*>(p);
}

template <class S, int N>
__device__ __forceinline__ void store(const Vector<S, N>& x, S* p) {
  *reinterpret_cast<Vector<S, N>*>(p) = x;
}

// The same where the address may not be a multiple of the vector's size: element by element then.
template <int N, class S>
__device__ __forceinline__ Vector<S, N> load(const S* p, bool aligned) {
  if (aligned) return load<N>(p);
  Vector<S, N> x;
#pragma unroll
  for (int i = 0; i < N; ++i) x.lanes[i] = p[i];
  return x;
}

template <class S, int N>
__device__ __forceinline__ void store(const Vector<S, N>& x, S* p, bool aligned) {
  if (aligned) return store(x, p);
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = x.lanes[i];
}

// What the gradient is still to be multiplied by after the forward: 1 unless it is in fp16, which has no room below for
// a gradient divided by many rows. That factor is left to backward, where the incoming gradient (which a loss scaler
// makes large) meets it first; a power of two, so that nothing is rounded twice.
__device__ __forceinline__ double left_to_backward(double denominator, bool half_precision) {
  return half_precision ? ldexp(1.0, -ilogb(denominator)) : 1;
}

// How far behind a multiple of 16 bytes something lies.
__device__ __forceinline__ int phase_of(const void* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % vector_bytes);
}

template <class S, int N>
__device__ __forceinline__ void widen(const Vector<S, N>& x, float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = widen(x.lanes[i]);
}

template <class S, int N>
__device__ __forceinline__ void narrow(const float (&x)[N], Vector<S, N>& out) {
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(x[i], out.lanes[i]);
}

}  // namespace pyd
