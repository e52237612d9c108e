// SPDX-License-Identifier: Apache-2.0
// Blocks of rows of projected_mse by Gram matrices (method="gram"): two large products instead of three where the
// source has few features.
//
// With X the source rows and a column of ones, T the target rows, P the projection with the bias as its last row, and
//   A = X^T X,   C = X^T T,   M = P P^T,
//   sum |X P - T|^2 = <P, A P> - 2 <P, C> + |T|^2,   dP = 2 (A P - C),   dX = 2 (X M - T P^T):
// differences of large numbers, so the smaller the residual is beside |T|^2, the fewer digits are left of it.
#pragma once

#include "gemm.h"
#include "projected_mse_shape.h"
#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

// Two rows as pairs, the second of which may not be there: n of them, then (1, 1) up to `ones`, then zeros.
template <class S, class Word>
void interleave(const S* first, const S* second, int64_t n, int64_t ones, int64_t padded, Word* out) {
  if (second != nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] = {first[i], second[i]};
  else
    for (int64_t i = 0; i < n; ++i) out[i] = {first[i], S{}};
  S one{};
  narrow(1.0f, one);
  for (int64_t i = n; i < ones; ++i) out[i] = {one, second != nullptr ? one : S{}};
  for (int64_t i = ones; i < padded; ++i) out[i] = Word{};
}

// One thread's blocks, in its scratch memory.
template <class V, class S>
struct Gram {
  using F = typename V::scalar;
  using Plain = Multiply<V>;
  using Pairs = typename Shape<V, S>::Pairs;
  using Word = typename Pairs::Word;
  static constexpr bool may_pair = Shape<V, S>::may_pair;

  struct Packed {
    F* rows;                                    // P [depth, m_padded]
    F *backward = nullptr, *product = nullptr;  // panels [m, lanes] of P^T, [depth, lanes] of -M
    Word* backward_words = nullptr;             // pairs along m of the first
    size_t bytes;

    Packed(const Shape<V, S>& s, void* memory) {
      Arena arena(memory);
      rows = arena.template take<F>(s.depth * s.m_padded);
      if (s.back) {
        const int64_t columns = round_up(s.k, s.lanes);
        backward = arena.template take<F>(columns * s.m);
        product = arena.template take<F>(columns * s.depth);
        if (s.pairs) backward_words = arena.template take<Word>(columns * pairs_of(s.m));
      }
      bytes = arena.bytes;
    }
  };

  template <class P>
  static void pack(const Shape<V, S>& s, const Packed& packed) {
    for (int64_t i = 0; i < s.depth; ++i)
      for (int64_t j = 0; j < s.m_padded; ++j)
        packed.rows[i * s.m_padded + j] = j < s.m ? F(widen(projection_row<P>(s.job, i)[j])) : F(0);
    if (!s.back) return;
    pack_backward<P>(s, packed.backward);
    for (int64_t p = 0; p < s.k; p += s.lanes) {
      F* product = packed.product + p * s.depth;
      gemm<Plain>(s.depth, s.lanes, s.m, packed.rows, s.m_padded, 1, packed.backward + p * s.m, s.lanes, product,
                  s.lanes, false);
      for (int64_t i = 0; i < s.depth * s.lanes; ++i) product[i] = -product[i];
      if constexpr (may_pair && same<P, bf16>)
        for (int64_t c = 0; c < s.lanes; ++c)
          for (int64_t w = 0; w < pairs_of(s.m); ++w) {
            const P* row = p + c < s.k ? projection_row<P>(s.job, p + c) : nullptr;
            packed.backward_words[p * pairs_of(s.m) + w * s.lanes + c] = {
                row != nullptr ? row[2 * w] : P{}, row != nullptr && 2 * w + 1 < s.m ? row[2 * w + 1] : P{}};
          }
    }
  }

  const Shape<V, S> s;
  const ProjectedMseJob& job;
  const bool widens;  // whether target rows are needed as numbers
  F *source, *target, *gradient;
  Word *target_words, *source_pairs, *target_pairs;
  size_t bytes;

  Gram(const ProjectedMseJob& job_, void* memory) : s(job_), job(job_), widens(!may_pair || (s.back && !s.pairs)) {
    Arena arena(memory);
    source = arena.template take<F>(s.rows * s.source_row);
    target = arena.template take<F>(widens ? s.rows * s.tile_row : 0);
    gradient = arena.template take<F>(s.back ? s.rows * s.gradient_row : 0);
    target_words = arena.template take<Word>(s.back && s.pairs ? s.rows * pairs_of(s.m) : 0);
    source_pairs = arena.template take<Word>(may_pair ? pairs_of(s.rows) * s.source_row : 0);
    target_pairs = arena.template take<Word>(may_pair ? pairs_of(s.rows) * s.tile_row : 0);
    bytes = arena.bytes;
  }

  double block(int64_t begin, int64_t count, const Packed& packed, F* partial, bool more, Ahead<V, S> ahead) {
    const double squares = load_rows(begin, count);
    if (s.back) {
      for (int64_t p = 0; p < s.k; p += s.lanes) {
        const int64_t columns = smaller(s.lanes, s.k_padded - p);
        if constexpr (may_pair) {
          if (s.pairs)
            gemm<Pairs>(count, columns, pairs_of(s.m), target_words, pairs_of(s.m), 1,
                        packed.backward_words + p * pairs_of(s.m), s.lanes, gradient + p, s.gradient_row, false);
        }
        if (!s.pairs)
          gemm<Plain>(count, columns, s.m, target, s.tile_row, 1, packed.backward + p * s.m, s.lanes, gradient + p,
                      s.gradient_row, false);
        gemm<Plain>(count, columns, s.depth, source, s.source_row, 1, packed.product + p * s.depth, s.lanes,
                    gradient + p, s.gradient_row, true);
      }
      write_source_gradient(s, begin, count, gradient, -job.scale);
    }
    const auto add_products = [&]<class M>(int64_t depth, const typename M::Word* a, const typename M::Word* b) {
      transposed_product<M>(s.depth, s.m_padded, depth, a, s.source_row, b, s.tile_row, partial, s.m_padded, more,
                            ahead);
      gemm<M>(s.depth, s.depth_padded, depth, a, 1, s.source_row, a, s.source_row, partial + s.depth * s.m_padded,
              s.depth_padded, more);
    };
    if constexpr (may_pair)
      add_products.template operator()<Pairs>(pairs_of(count), source_pairs, target_pairs);
    else
      add_products.template operator()<Plain>(count, source, target);
    return squares;
  }

  // Numbers that are summed over all rows: C, then A.
  static int64_t partial_size(const Shape<V, S>& s) { return s.depth * (s.m_padded + s.depth_padded); }

  // From the sums: dP in the place of C, and what is still to be added to the sum of squares.
  static double finish(const Shape<V, S>& s, const Packed& packed, F* total) {
    const int64_t size = s.depth * s.m_padded;
    double value = 0;
    for (int64_t i = 0; i < size; ++i) {
      value -= double(packed.rows[i]) * double(total[i]);
      total[i] = -total[i];
    }
    gemm<Plain>(s.depth, s.m_padded, s.depth, total + size, s.depth_padded, 1, packed.rows, s.m_padded, total,
                s.m_padded, true);
    for (int64_t i = 0; i < size; ++i) value += double(packed.rows[i]) * double(total[i]);
    return value;
  }

 private:
  static int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

  // The rows as the products read them; returns the sum of squares of the target's.
  double load_rows(int64_t begin, int64_t count) {
    double total = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = s.position(begin + r);
      const S* in = row_of<S>(job.target, at);
      widen_source(s, static_cast<const S*>(row_of<S>(job.source, at)), source + r * s.source_row);
      F* out = widens ? target + r * s.tile_row : nullptr;
      V squares = V::all(0);
      vectors_of<V>(s.m, [&](int64_t j, int64_t n) PYD_INLINE_LAMBDA {
        const V x = load<V>(in + j, n);
        squares = fma(x, x, squares);
        if (out != nullptr) x.store(out + j);
      });
      total += sum(squares);
      if constexpr (may_pair) {
        if (s.back && s.pairs) {
          S* words = reinterpret_cast<S*>(target_words + r * pairs_of(s.m));
          words[2 * pairs_of(s.m) - 1] = S{};  // where the last pair is only half a pair
          __builtin_memcpy(words, in, s.m * sizeof(S));
        }
        if (r % 2 == 1) continue;
        const bool two = r + 1 < count;
        const int64_t next = two ? s.position(begin + r + 1) : 0;
        interleave(static_cast<const S*>(row_of<S>(job.source, at)),
                   static_cast<const S*>(two ? row_of<S>(job.source, next) : nullptr), s.k, s.depth, s.depth_padded,
                   source_pairs + r / 2 * s.source_row);
        interleave(in, static_cast<const S*>(two ? row_of<S>(job.target, next) : nullptr), s.m, s.m, s.m_padded,
                   target_pairs + r / 2 * s.tile_row);
      }
    }
    return total;
  }
};

}  // namespace
}  // namespace pyd::PYD_ISA
