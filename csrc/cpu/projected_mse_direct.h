// SPDX-License-Identifier: Apache-2.0
// Blocks of rows of projected_mse by the definition: projected, subtracted, and multiplied back (method="direct").
#pragma once

#include "gemm.h"
#include "projected_mse_shape.h"
#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

constexpr double shortest = 1e-12;  // length of a row below which it has no direction

// Lengths as factors: 1 / |row|, and 0 for a row without a direction.
PYD_INLINE double inverse_length(double squares) {
  const double length = __builtin_sqrt(squares);
  return length <= shortest ? 0 : 1 / length;  // NaN stays
}

// One thread's blocks, in its scratch memory.
template <class V, class S>
struct Direct {
  using F = typename V::scalar;
  using Plain = Multiply<V>;
  using Pairs = typename Shape<V, S>::Pairs;
  using Word = typename Pairs::Word;

  // The projection: panels [depth, lanes] for y = a P, and of its transpose for d P^T.
  struct Packed {
    F *forward = nullptr, *backward = nullptr;
    Word* forward_words = nullptr;
    size_t bytes;

    Packed(const Shape<V, S>& s, void* memory) {
      Arena arena(memory);
      const int64_t columns = round_up(s.m, s.lanes);
      if (s.pairs)
        forward_words = arena.template take<Word>(columns * s.words);
      else
        forward = arena.template take<F>(columns * s.depth);
      if (s.back) backward = arena.template take<F>(round_up(s.k, s.lanes) * s.m);
      bytes = arena.bytes;
    }
  };

  template <class P>
  static void pack(const Shape<V, S>& s, const Packed& packed) {
    const auto row = [&](int64_t i) { return projection_row<P>(s.job, i); };
    for (int64_t p = 0; p < s.m; p += s.lanes) {
      const int64_t columns = smaller(s.lanes, s.m - p);
      if constexpr (Shape<V, S>::may_pair && same<P, bf16>) {
        Word* out = packed.forward_words + p * s.words;
        for (int64_t w = 0; w < s.words; ++w, out += s.lanes)
          for (int64_t c = 0; c < s.lanes; ++c) {
            out[c].first = c < columns ? row(2 * w)[p + c] : bf16{};
            out[c].second = c < columns && 2 * w + 1 < s.depth ? row(2 * w + 1)[p + c] : bf16{};
          }
      } else {
        F* out = packed.forward + p * s.depth;
        for (int64_t i = 0; i < s.depth; ++i, out += s.lanes)
          for (int64_t c = 0; c < s.lanes; ++c) out[c] = c < columns ? F(widen(row(i)[p + c])) : F(0);
      }
    }
    if (s.back) pack_backward<P>(s, packed.backward);
  }

  const Shape<V, S> s;
  const ProjectedMseJob& job;
  F *source, *tile, *gradient;
  Word* words;
  size_t bytes;

  Direct(const ProjectedMseJob& job_, void* memory) : s(job_), job(job_) {
    Arena arena(memory);
    source = arena.template take<F>(s.rows * s.source_row);
    tile = arena.template take<F>(s.rows * s.tile_row);
    gradient = arena.template take<F>(s.back ? s.rows * s.gradient_row : 0);
    words = arena.template take<Word>(s.pairs ? s.rows * s.word_row : 0);
    bytes = arena.bytes;
  }

  // Source rows as numbers, and as pairs, with their column of ones.
  void load_source(int64_t begin, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const S* in = row_of<S>(job.source, s.position(begin + r));
      widen_source(s, in, source + r * s.source_row);
      if constexpr (Shape<V, S>::may_pair) {
        if (!s.pairs) continue;
        S* bits = reinterpret_cast<S*>(words + r * s.word_row);
        bits[2 * s.words - 1] = S{};  // where the last pair is only half a pair
        __builtin_memcpy(bits, in, s.k * sizeof(S));
        if (job.bias != nullptr) narrow(1.0f, bits[s.k]);
      }
    }
  }

  void project(int64_t count, const Packed& packed) {
    for (int64_t p = 0; p < s.m; p += s.lanes) {
      const int64_t columns = smaller(s.lanes, s.m_padded - p);
      if (s.pairs) {
        gemm<Pairs>(count, columns, s.words, words, s.word_row, 1, packed.forward_words + p * s.words, s.lanes,
                    tile + p, s.tile_row, false);
      } else {
        gemm<Plain>(count, columns, s.depth, source, s.source_row, 1, packed.forward + p * s.depth, s.lanes, tile + p,
                    s.tile_row, false);
      }
    }
  }

  // The difference of row r in the place of its projection; returns its sum of squares.
  double difference(F* y, const S* target, F weight, S* grad_target) {
    V squares = V::all(0);
    const V factor = V::all(weight), back = V::all(static_cast<F>(-job.scale));
    vectors_of<V>(s.m, [&](int64_t j, int64_t n) PYD_INLINE_LAMBDA {
      const V d = V::load(y + j) - load<V>(target + j, n);
      squares = fma(d, d, squares);
      const V weighted = d * factor;
      weighted.store(y + j);
      if (grad_target != nullptr) store(weighted * back, grad_target + j, n);
    });
    return sum(squares);
  }

  // The same of rows scaled to unit length.
  double unit_difference(F* y, const S* target, F weight, S* grad_target) {
    V source_squares = V::all(0), target_squares = V::all(0);
    vectors_of<V>(s.m, [&](int64_t j, int64_t n) PYD_INLINE_LAMBDA {
      const V a = V::load(y + j), b = load<V>(target + j, n);
      source_squares = fma(a, a, source_squares);
      target_squares = fma(b, b, target_squares);
    });
    const double source_unit = inverse_length(sum(source_squares)), target_unit = inverse_length(sum(target_squares));
    const V a_unit = V::all(static_cast<F>(source_unit)), b_unit = V::all(static_cast<F>(target_unit));
    V squares = V::all(0), source_dot = V::all(0), target_dot = V::all(0);
    vectors_of<V>(s.m, [&](int64_t j, int64_t n) PYD_INLINE_LAMBDA {
      const V a = V::load(y + j) * a_unit, b = load<V>(target + j, n) * b_unit, d = a - b;
      squares = fma(d, d, squares);
      source_dot = fma(d, a, source_dot);
      target_dot = fma(d, b, target_dot);
    });
    const V along_a = V::all(static_cast<F>(sum(source_dot))), along_b = V::all(static_cast<F>(sum(target_dot)));
    const V to_a = V::all(static_cast<F>(weight * source_unit));
    const V to_b = V::all(static_cast<F>(-job.scale * weight * target_unit));
    vectors_of<V>(s.m, [&](int64_t j, int64_t n) PYD_INLINE_LAMBDA {
      const V a = V::load(y + j) * a_unit, b = load<V>(target + j, n) * b_unit, d = a - b;
      (fnma(along_a, a, d) * to_a).store(y + j);
      if (grad_target != nullptr) store(fnma(along_b, b, d) * to_b, grad_target + j, n);
    });
    return sum(squares);
  }

  double block(int64_t begin, int64_t count, const Packed& packed, F* partial, bool more, Ahead<V, S> ahead) {
    load_source(begin, count);
    project(count, packed);
    double value = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = s.position(begin + r);
      const F weight = job.row_weights == nullptr ? F(1) : static_cast<const F*>(job.row_weights)[at];
      S* grad_target = job.grad_target.data == nullptr ? nullptr : row_of<S>(job.grad_target, at);
      F* y = tile + r * s.tile_row;
      const S* target = row_of<S>(job.target, at);
      const double squares =
          job.normalize ? unit_difference(y, target, weight, grad_target) : difference(y, target, weight, grad_target);
      if (job.row_loss != nullptr) static_cast<F*>(job.row_loss)[at] = static_cast<F>(squares / double(s.m));
      value += squares;
    }
    if (s.back) {
      for (int64_t p = 0; p < s.k; p += s.lanes)
        gemm<Plain>(count, smaller(s.lanes, s.k_padded - p), s.m, tile, s.tile_row, 1, packed.backward + p * s.m,
                    s.lanes, gradient + p, s.gradient_row, false);
      write_source_gradient(s, begin, count, gradient, job.scale);
    }
    if (s.collects) {
      const int64_t first = s.first_row();
      transposed_product<Plain>(s.last_row() - first, s.m_padded, count, source + first, s.source_row, tile, s.tile_row,
                                partial + first * s.m_padded, s.m_padded, more, ahead);
    }
    return value;
  }

  // Numbers that are summed over all rows: dP.
  static int64_t partial_size(const Shape<V, S>& s) { return s.collects ? s.depth * s.m_padded : 0; }

  // What is still to be added to the sum of squares: nothing. dP is complete.
  static double finish(const Shape<V, S>&, const Packed&, F*) { return 0; }
};

}  // namespace
}  // namespace pyd::PYD_ISA
