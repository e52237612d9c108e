// SPDX-License-Identifier: Apache-2.0
// Small matrix products for the CPU kernels, torch-free, compiled once per instruction set: C (+)= A B with A read one
// number at a time (any strides, so a transposed A costs nothing) and B and C a vector at a time.
#pragma once

#include "simd.h"

namespace pyd::PYD_ISA {

// How numbers are multiplied and added: `Word` is what A and B hold, V what C holds.
template <class V>
struct Multiply {
  using Vector = V;
  using Word = typename V::scalar;
  using Operand = V;
  static PYD_INLINE Operand broadcast(const Word* p) { return V::all(*p); }
  static PYD_INLINE Operand load(const Word* p) { return V::load(p); }
  static PYD_INLINE V add(V sum, Operand a, Operand b) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)
// Two bf16 that are neighbours along the depth: products are exact, sums in fp32. The depth is counted in pairs.
struct MultiplyPairs {
  using Vector = Floats;
  struct Word {
    bf16 first, second;
  };
  using Operand = __m512i;
  static PYD_INLINE Operand broadcast(const Word* p) { return _mm512_set1_epi32(__builtin_bit_cast(int32_t, *p)); }
  static PYD_INLINE Operand load(const Word* p) { return _mm512_loadu_si512(p); }
  static PYD_INLINE Floats add(Floats sum, Operand a, Operand b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
  }
};
#endif

// How what is stored as S is multiplied in the vectors V: exact pairs where bf16 has an instruction for them.
template <class V, class S>
struct ProductOf {
  using Type = Multiply<V>;
  static constexpr bool pairs = false;
};
#if defined(__AVX512BF16__)
template <>
struct ProductOf<Floats, bf16> {
  using Type = MultiplyPairs;
  static constexpr bool pairs = true;
};
#endif

#if defined(__AVX512F__)
constexpr int gemm_vectors = 4;  // 24 sums, 4 vectors of B and one number of A: 29 of 32 registers
#else
constexpr int gemm_vectors = 2;  // 12 sums, 2 and 1: 15 of 16
#endif
constexpr int gemm_rows = 6;

template <class M, int rows, int vectors>
__attribute__((noinline)) void gemm_tile(int64_t depth, const typename M::Word* a, int64_t a_row, int64_t a_depth,
                                         const typename M::Word* b, int64_t b_row, typename M::Vector::scalar* c,
                                         int64_t c_row, bool accumulate) {
  using V = typename M::Vector;
  V sums[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = V::all(0);
  for (int64_t k = 0; k < depth; ++k) {
    typename M::Operand right[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) right[v] = M::load(b + k * b_row + v * V::width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const typename M::Operand left = M::broadcast(a + r * a_row + k * a_depth);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] = M::add(sums[r][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      typename V::scalar* at = c + r * c_row + v * V::width;
      (accumulate ? V::load(at) + sums[r][v] : sums[r][v]).store(at);
    }
}

PYD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
PYD_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class M, int vectors>
void gemm_columns(int64_t rows, int64_t depth, const typename M::Word* a, int64_t a_row, int64_t a_depth,
                  const typename M::Word* b, int64_t b_row, typename M::Vector::scalar* c, int64_t c_row,
                  bool accumulate) {
  int64_t r = 0;
  for (; r + gemm_rows <= rows; r += gemm_rows) {
    // Rows of A may lie pages apart, where the processor does not foresee the next.
    if (a_depth == 1)
      for (int64_t next = r + gemm_rows; next < smaller(rows, r + 2 * gemm_rows); ++next)
        for (int64_t k = 0; k < depth; k += 64 / sizeof(*a)) __builtin_prefetch(a + next * a_row + k, 0, 3);
    gemm_tile<M, gemm_rows, vectors>(depth, a + r * a_row, a_row, a_depth, b, b_row, c + r * c_row, c_row, accumulate);
  }
  a += r * a_row;
  c += r * c_row;
  switch (rows - r) {
    case 1:
      return gemm_tile<M, 1, vectors>(depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate);
    case 2:
      return gemm_tile<M, 2, vectors>(depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate);
    case 3:
      return gemm_tile<M, 3, vectors>(depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate);
    case 4:
      return gemm_tile<M, 4, vectors>(depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate);
    case 5:
      return gemm_tile<M, 5, vectors>(depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate);
  }
}

// C[rows, columns] (+)= A[rows, depth] B[depth, columns]. Element (r, k) of A is a[r * a_row + k * a_depth]; rows of B
// and C lie b_row and c_row apart. `columns` is a multiple of the vector width. The order of every sum is that
// of k; what C holds is added last, so that a product gives the same bits whether it is added here or later.
template <class M>
void gemm(int64_t rows, int64_t columns, int64_t depth, const typename M::Word* a, int64_t a_row, int64_t a_depth,
          const typename M::Word* b, int64_t b_row, typename M::Vector::scalar* c, int64_t c_row, bool accumulate) {
  constexpr int width = M::Vector::width;
  int64_t j = 0;
  for (; j + gemm_vectors * width <= columns; j += gemm_vectors * width)
    gemm_columns<M, gemm_vectors>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, accumulate);
  if constexpr (gemm_vectors == 4) {
    if (columns - j == 3 * width)
      return gemm_columns<M, 3>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, accumulate);
    if (columns - j == 2 * width)
      return gemm_columns<M, 2>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, accumulate);
  }
  if (columns - j == width) gemm_columns<M, 1>(rows, depth, a, a_row, a_depth, b + j, b_row, c + j, c_row, accumulate);
}

}  // namespace pyd::PYD_ISA
