// SPDX-License-Identifier: Apache-2.0
// Products of small matrices by one warp, operands in shared memory, and the asynchronous copies that bring them there.
//
// A warp's result is [16, 8 n] in the layout of mma.sync, whatever computes it: lane l has of each tile of 8 columns
// the elements (l / 4, 2 (l % 4)), the one to its right, and the two that lie 8 rows below them. Products of half
// precision run on tensor cores with sums in fp32, products of fp32 on the ordinary units without loss.
#pragma once

#include "device.cuh"

namespace pyd {

// Asynchronous copy of 16 bytes to shared memory; of these `given` are read, the others become zero.
__device__ __forceinline__ void copy_16(void* to, const void* from, int given) {
#ifdef PYD_SIMT_HOST
  simt::copy_async(to, from, 16, given);
#else
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(given));
#endif
}

// The same of 4 bytes.
__device__ __forceinline__ void copy_4(void* to, const void* from, int given) {
#ifdef PYD_SIMT_HOST
  simt::copy_async(to, from, 4, given);
#else
  asm volatile(
      "cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
      "l"(from), "r"(given));
#endif
}

// The thread's copies have landed; the other threads see them after a barrier.
__device__ __forceinline__ void wait_for_copies() {
#ifdef PYD_SIMT_HOST
  simt::commit_copies();
  simt::wait_copies(0);
#else
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Four 8 x 8 matrices of 16-bit numbers: lane l says where row l % 8 of matrix l / 8 begins, and gets of each matrix
// two neighbours of row l / 4 (Transposed: of column l / 4).
template <bool Transposed>
__device__ __forceinline__ void load_matrices(unsigned (&out)[4], const void* row) {
#ifdef PYD_SIMT_HOST
  simt::load_matrices(out, row, Transposed);
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
#endif
}

// c += a b on the tensor cores, [16, 16] [16, 8].
template <class S>
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef PYD_SIMT_HOST
  simt::multiply_add<S>(c, a, b0, b1);
#else
  if constexpr (std::is_same_v<S, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Two numbers in half precision, and what of each they leave over.
template <class S>
__device__ __forceinline__ void split(float x, float y, unsigned& leading, unsigned& rest) {
  Vector<S, 2> high, low;
  narrow(x, high.lanes[0]);
  narrow(y, high.lanes[1]);
  narrow(x - widen(high.lanes[0]), low.lanes[0]);
  narrow(y - widen(high.lanes[1]), low.lanes[1]);
  memcpy(&leading, &high, sizeof(leading));
  memcpy(&rest, &low, sizeof(rest));
}

// The power of two at or below x >= 0, and its inverse, as far as both are normal numbers.
__device__ __forceinline__ void power_of_two(float x, float& power, float& inverse) {
  unsigned bits;
  memcpy(&bits, &x, sizeof(bits));
  const unsigned exponent = min(max(bits >> 23 & 255u, 1u), 253u);
  const unsigned both[2] = {exponent << 23, (254 - exponent) << 23};
  memcpy(&power, &both[0], sizeof(power));
  memcpy(&inverse, &both[1], sizeof(inverse));
}

// Elements from one row of a tile in shared memory to the next: rows begin at multiples of 16 bytes, and eight of them
// in a column lie in different banks.
template <class S>
__host__ __device__ constexpr int pitch_of(int columns) {
  return columns + vector_bytes / static_cast<int>(sizeof(S));
}

// c += x y^T for the warp's 16 rows of x [16, depth] and y [8 n, depth]; depth a multiple of 16, n even.
template <class S, int N>
__device__ __forceinline__ void add_product_nt(float (&c)[N][4], const S* x, int pitch_x, const S* y, int pitch_y,
                                               int depth) {
  const int lane = threadIdx.x % warp_size;
  if constexpr (sizeof(S) == 2) {
    const S* const from_x = x + lane % 16 * pitch_x + lane / 16 * 8;
    const S* const from_y = y + (lane / 16 * 8 + lane % 8) * pitch_y + lane / 8 % 2 * 8;
    for (int k = 0; k < depth; k += 16) {
      unsigned a[4];
      load_matrices<false>(a, from_x + k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        unsigned b[4];
        load_matrices<false>(b, from_y + n * 8 * pitch_y + k);
        multiply_add<S>(c[n], a, b[0], b[1]);
        multiply_add<S>(c[n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const float* const from_x = x + lane / 4 * pitch_x;
    const float* const from_y = y + lane % 4 * 2 * pitch_y;
    for (int k = 0; k < depth; k += 4) {
      const Vector<float, 4> upper = load<4>(from_x + k), lower = load<4>(from_x + 8 * pitch_x + k);
#pragma unroll
      for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Vector<float, 4> other = load<4>(from_y + (n * 8 + e) * pitch_y + k);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            c[n][e] = fmaf(upper.lanes[i], other.lanes[i], c[n][e]);
            c[n][2 + e] = fmaf(lower.lanes[i], other.lanes[i], c[n][2 + e]);
          }
        }
      }
    }
  }
}

// c += (upper, lower)^T y for one row of y, of which a lane has its columns.
template <int N>
__device__ __forceinline__ void add_outer_product(float (&c)[N][4], float upper, float lower, const float* y) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Vector<float, 2> other = load<2>(y + n * 8);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      c[n][e] = fmaf(upper, other.lanes[e], c[n][e]);
      c[n][2 + e] = fmaf(lower, other.lanes[e], c[n][2 + e]);
    }
  }
}

// c += x y for the warp's 16 rows of x [16, depth] and y [depth, 8 n]; depth a multiple of 16, n even.
template <class S, int N>
__device__ __forceinline__ void add_product_nn(float (&c)[N][4], const S* x, int pitch_x, const S* y, int pitch_y,
                                               int depth) {
  const int lane = threadIdx.x % warp_size;
  if constexpr (sizeof(S) == 2) {
    const S* const from_x = x + lane % 16 * pitch_x + lane / 16 * 8;
    const S* const from_y = y + lane % 16 * pitch_y + lane / 16 * 8;
    for (int k = 0; k < depth; k += 16) {
      unsigned a[4];
      load_matrices<false>(a, from_x + k);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        unsigned b[4];
        load_matrices<true>(b, from_y + k * pitch_y + n * 8);
        multiply_add<S>(c[n], a, b[0], b[1]);
        multiply_add<S>(c[n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const float* const from_x = x + lane / 4 * pitch_x;
    const float* const from_y = y + lane % 4 * 2;
    for (int k = 0; k < depth; ++k) add_outer_product(c, from_x[k], from_x[8 * pitch_x + k], from_y + k * pitch_y);
  }
}

// c += x^T y for 16 columns of x [depth, 16] and y [depth, 8 n]; depth a multiple of 16, n even.
template <class S, int N>
__device__ __forceinline__ void add_product_tn(float (&c)[N][4], const S* x, int pitch_x, const S* y, int pitch_y,
                                               int depth) {
  const int lane = threadIdx.x % warp_size;
  if constexpr (sizeof(S) == 2) {
    const S* const from_x = x + (lane / 16 * 8 + lane % 8) * pitch_x + lane / 8 % 2 * 8;
    const S* const from_y = y + lane % 16 * pitch_y + lane / 16 * 8;
    for (int k = 0; k < depth; k += 16) {
      unsigned a[4];
      load_matrices<true>(a, from_x + k * pitch_x);
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        unsigned b[4];
        load_matrices<true>(b, from_y + k * pitch_y + n * 8);
        multiply_add<S>(c[n], a, b[0], b[1]);
        multiply_add<S>(c[n + 1], a, b[2], b[3]);
      }
    }
  } else {
    const float* const from_x = x + lane / 4;
    const float* const from_y = y + lane % 4 * 2;
    for (int k = 0; k < depth; ++k)
      add_outer_product(c, from_x[k * pitch_x], from_x[k * pitch_x + 8], from_y + k * pitch_y);
  }
}

// Shared memory of a warp for the next functions; none where registers suffice.
template <class S, int N>
constexpr int spread_bytes = sizeof(S) == 2 ? 0 : 16 * pitch_of<float>(8 * N) * static_cast<int>(sizeof(float));

// c += g y on the tensor cores, g [16, 8 n] as the sum of two numbers in half precision; load(b, n, m) gets two tiles
// of 16 rows and 8 columns of y, from row 8 n and column 8 m on.
template <class S, int N, int M, class Load>
__device__ __forceinline__ void add_split_product(float (&c)[M][4], const float (&g)[N][4], Load&& load) {
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    unsigned leading[4], rest[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) split<S>(g[n + i / 2][i % 2 * 2], g[n + i / 2][i % 2 * 2 + 1], leading[i], rest[i]);
#pragma unroll
    for (int m = 0; m < M; m += 2) {
      unsigned b[4];
      load(b, n, m);
      multiply_add<S>(c[m], rest, b[0], b[1]);
      multiply_add<S>(c[m + 1], rest, b[2], b[3]);
      multiply_add<S>(c[m], leading, b[0], b[1]);
      multiply_add<S>(c[m + 1], leading, b[2], b[3]);
    }
  }
}

// Whole rows of g, of which a lane has a part, for the lanes of its warp.
template <int N>
__device__ __forceinline__ void spread_rows(const float (&g)[N][4], float* spread) {
  constexpr int pitch = pitch_of<float>(8 * N);
  const int lane = threadIdx.x % warp_size, row = lane / 4, column = lane % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) spread[(row + i / 2 * 8) * pitch + n * 8 + column + i % 2] = g[n][i];
  }
  __syncwarp();
}

// c += g y for the warp's own g [16, 8 n] and y [8 n, 8 m] in shared memory; n and m even. In half precision g enters
// as the sum of two numbers.
template <class S, int N, int M>
__device__ __forceinline__ void add_product_nn(float (&c)[M][4], const float (&g)[N][4], const S* y, int pitch_y,
                                               float* spread) {
  const int lane = threadIdx.x % warp_size;
  if constexpr (sizeof(S) == 2) {
    const S* const from_y = y + lane % 16 * pitch_y + lane / 16 * 8;
    add_split_product<S>(
        c, g, [&](unsigned (&b)[4], int n, int m) { load_matrices<true>(b, from_y + n * 8 * pitch_y + m * 8); });
  } else {
    constexpr int pitch = pitch_of<float>(8 * N);
    spread_rows(g, spread);
    const float* const row = spread + lane / 4 * pitch;
    for (int k = 0; k < 8 * N; ++k) add_outer_product(c, row[k], row[8 * pitch + k], y + k * pitch_y + lane % 4 * 2);
  }
}

// c += d y^T on the tensor cores, row by row times `scale`, for the warp's 16 rows of d [16, Depth] and y [8 n, Depth],
// both in shared memory; n even, Depth a multiple of 16. d is the sum of two numbers in half precision, the second of
// which lies `rest` behind the first. Only the first `columns` of y's rows, at least, are multiplied.
template <class S, int Depth, int N>
__device__ __forceinline__ void add_split_product_nt(float (&c)[N][4], const S* d, int rest, int pitch_d,
                                                     const float (&scale)[2], const S* y, int pitch_y, int columns) {
  constexpr int steps = Depth / 16;
  const int lane = threadIdx.x % warp_size;
  const S* const from_d = d + lane % 16 * pitch_d + lane / 16 * 8;
  const S* const from_y = y + (lane / 16 * 8 + lane % 8) * pitch_y + lane / 8 % 2 * 8;
  unsigned leading[steps][4], remaining[steps][4];
#pragma unroll
  for (int k = 0; k < steps; ++k) {
    load_matrices<false>(leading[k], from_d + 16 * k);
    load_matrices<false>(remaining[k], from_d + rest + 16 * k);
  }
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    if (n * 8 >= columns) continue;
    float sum[2][4] = {};
#pragma unroll
    for (int k = 0; k < steps; ++k) {
      unsigned b[4];
      load_matrices<false>(b, from_y + n * 8 * pitch_y + 16 * k);
      multiply_add<S>(sum[0], remaining[k], b[0], b[1]);
      multiply_add<S>(sum[1], remaining[k], b[2], b[3]);
      multiply_add<S>(sum[0], leading[k], b[0], b[1]);
      multiply_add<S>(sum[1], leading[k], b[2], b[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      c[n][i] = fmaf(scale[i / 2], sum[0][i], c[n][i]);
      c[n + 1][i] = fmaf(scale[i / 2], sum[1][i], c[n + 1][i]);
    }
  }
}

// c += x^T d on the tensor cores, column by column times `scale`, for 16 columns of x [Depth, 16] and d [Depth, 8 n] as
// above.
template <class S, int Depth, int N>
__device__ __forceinline__ void add_split_product_tn(float (&c)[N][4], const S* x, int pitch_x, const S* d, int rest,
                                                     int pitch_d, const float (&scale)[N][2]) {
  const int lane = threadIdx.x % warp_size;
  const S* const from_x = x + (lane / 16 * 8 + lane % 8) * pitch_x + lane / 8 % 2 * 8;
  const S* const from_d = d + lane % 16 * pitch_d + lane / 16 * 8;
  float sum[N][4] = {};
#pragma unroll
  for (int k = 0; k < Depth; k += 16) {
    unsigned a[4];
    load_matrices<true>(a, from_x + k * pitch_x);
#pragma unroll
    for (int part = 1; part >= 0; --part) {
#pragma unroll
      for (int n = 0; n < N; n += 2) {
        unsigned b[4];
        load_matrices<true>(b, from_d + part * rest + k * pitch_d + n * 8);
        multiply_add<S>(sum[n], a, b[0], b[1]);
        multiply_add<S>(sum[n + 1], a, b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = fmaf(scale[n][i % 2], sum[n][i], c[n][i]);
  }
}

}  // namespace pyd
