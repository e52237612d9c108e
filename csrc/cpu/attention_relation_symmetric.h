// SPDX-License-Identifier: Apache-2.0
// Self relations by symmetry.
//
// Exponentials that are not shifted by their row's maximum are symmetric too. Of both tiles only the part on and below
// the block diagonal is computed, and kept for the whole head; its sums serve rows and columns. With
// H_ij = G_ij + G_ji the gradient is one product, dL/da_i = sum_j H_ij a_j.
//
// The sums are taken relative to a whole power of 2 near the diagonal's exponential, which costs no rounding.
#pragma once

#include "attention_relation_head.h"

namespace pyd::PYD_ISA {
namespace {

constexpr double symmetric_bound = 60;  // largest score, in units of log 2, that needs no shift

// Beside a Head's memory, what a symmetric job needs of its own; n rounded up to whole blocks where it says [n].
template <class V, int vectors>
struct SymmetricBuffers {
  using F = typename V::scalar;
  static constexpr int lanes = vectors * V::width;
  F *teacher_tiles, *student_tiles;
  F *near_t, *near_s;        // [n] whole numbers near the diagonal's scores
  F *sum_t, *sum_s, *sum_a;  // [n] sums over the lanes' keys
  F* key_sums;               // [n, 3, width] the same over the keys' lanes, not yet summed across
  F *factor_t, *factor_s;    // [n]
  size_t bytes;

  SymmetricBuffers(int64_t n, void* memory) {
    char* at = static_cast<char*>(memory);
    const auto take = [&](F*& pointer, int64_t count) {
      pointer = reinterpret_cast<F*>(at);
      at += round_up(count * int64_t(sizeof(F)), 64);
    };
    const int64_t rows = symmetric_rows(n, lanes), whole = round_up(n, lanes);
    take(teacher_tiles, rows * lanes);
    take(student_tiles, rows * lanes);
    take(near_t, whole);
    take(near_s, whole);
    take(sum_t, whole);
    take(sum_s, whole);
    take(sum_a, whole);
    take(factor_t, whole);
    take(factor_s, whole);
    take(key_sums, whole * 3 * V::width);
    bytes = static_cast<size_t>(at - static_cast<char*>(memory));
  }
};

// Exponentials of the scores of keys [begin, end) with one block of queries, and their sums by lane; below the diagonal
// block also by key.
template <class V, int vectors, bool below, bool scaled>
__attribute__((noinline)) void symmetric_exponentials(const SymmetricBuffers<V, vectors>& b,
                                                      typename V::scalar* teacher, typename V::scalar* student,
                                                      int64_t begin, int64_t end, int64_t query,
                                                      typename V::scalar unit_t, typename V::scalar unit_s,
                                                      Ahead& ahead) {
  constexpr int lanes = vectors * V::width;
  V near[vectors], zt[vectors], zs[vectors], a[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = query + v * V::width;
    near[v] = V::load(b.near_t + at) - V::load(b.near_s + at);
    zt[v] = zs[v] = a[v] = V::all(0);
  }
  for (int64_t j = begin; j < end; ++j, teacher += lanes, student += lanes) {
    ahead.fetch();
    const V near_key = V::all(b.near_t[j] - b.near_s[j]);
    V key_t = V::all(0), key_s = V::all(0), key_a = V::all(0);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V t = V::load(teacher + v * V::width), s = V::load(student + v * V::width);
      if constexpr (scaled) {
        t = t * V::all(unit_t);
        s = s * V::all(unit_s);
      }
      const V et = exp2(t), es = exp2(s), difference = t - s;
      zt[v] = zt[v] + et;
      zs[v] = zs[v] + es;
      a[v] = fma(et, difference - near[v], a[v]);
      if constexpr (below) {
        key_t = key_t + et;
        key_s = key_s + es;
        key_a = fma(et, difference - near_key, key_a);
      }
      et.store(teacher + v * V::width);
      es.store(student + v * V::width);
    }
    if constexpr (below) {
      typename V::scalar* sums = b.key_sums + j * 3 * V::width;
      (V::load(sums) + key_t).store(sums);
      (V::load(sums + V::width) + key_s).store(sums + V::width);
      (V::load(sums + 2 * V::width) + key_a).store(sums + 2 * V::width);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = query + v * V::width;
    (V::load(b.sum_t + at) + zt[v]).store(b.sum_t + at);
    (V::load(b.sum_s + at) + zs[v]).store(b.sum_s + at);
    (V::load(b.sum_a + at) + a[v]).store(b.sum_a + at);
  }
}

// H over the student's exponentials.
template <class V, int vectors>
__attribute__((noinline)) void symmetric_differences(const SymmetricBuffers<V, vectors>& b,
                                                     const typename V::scalar* teacher, typename V::scalar* student,
                                                     int64_t begin, int64_t end, int64_t query) {
  constexpr int lanes = vectors * V::width;
  V ct[vectors], cs[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    ct[v] = V::load(b.factor_t + query + v * V::width);
    cs[v] = V::load(b.factor_s + query + v * V::width);
  }
  for (int64_t j = begin; j < end; ++j, teacher += lanes, student += lanes) {
    const V key_t = V::all(b.factor_t[j]), key_s = V::all(b.factor_s[j]);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      fnma(ct[v] + key_t, V::load(teacher + v * V::width), (cs[v] + key_s) * V::load(student + v * V::width))
          .store(student + v * V::width);
  }
}

// Whole numbers near the diagonal's scores; returns whether all scores may be exponentiated unshifted.
template <class V, class S>
bool near_diagonal(const Source<S>& source, int64_t n, double unit, typename V::scalar* near) {
  for (int64_t i = 0; i < n; ++i) {
    V squares = V::all(0);
    source.pieces(i, [&](const S* in, int64_t, int64_t count) PYD_INLINE_LAMBDA {
      int64_t c = 0;
      for (; c + V::width <= count; c += V::width) squares = fma(V::load(in + c), V::load(in + c), squares);
      if (c < count) {
        const V x = V::load_part(in + c, count - c, 0);
        squares = fma(x, x, squares);
      }
    });
    const double score = sum(squares) * unit;
    if (!(score <= symmetric_bound)) return false;  // NaN neither
    near[i] = static_cast<typename V::scalar>(__builtin_rint(score));
  }
  return true;
}

// The job by symmetry, or false where scores are too large for it.
template <class V, class S, int vectors>
bool symmetric_whole_of(const RelationJob& job, const RelationJob* next, typename V::scalar* total, void* scratch,
                        double& value) {
  using F = typename V::scalar;
  using Plain = Multiply<V>;
  constexpr int64_t lanes = vectors * V::width;
  Head<V, S, vectors> h(job, scratch);
  const int64_t n = h.n;
  const SymmetricBuffers<V, vectors> b(n, static_cast<char*>(scratch) + h.bytes);
  if (!near_diagonal<V>(h.teacher_a, n, h.teacher_unit, b.near_t) ||
      !near_diagonal<V>(h.student_a, n, h.student_unit, b.near_s))
    return false;
  const int64_t whole = round_up(n, lanes);
  for (int64_t i = n; i < whole; ++i) b.near_t[i] = b.near_s[i] = 0;
  F* const zero[] = {b.sum_t, b.sum_s, b.sum_a, b.factor_t, b.factor_s};
  for (F* sums : zero) __builtin_memset(sums, 0, whole * sizeof(F));
  __builtin_memset(b.key_sums, 0, whole * 3 * V::width * sizeof(F));
  h.keys_at_once = n;
  h.gather_keys = true;
  h.load_words(0, n);
  h.ahead = ahead_of<S>(next);

  // f(first query, queries, rows of the block's tiles): block after block.
  const auto each_block = [&](auto f) {
    for (int64_t i = 0, row = 0; i < n; row += n - i, i += lanes) f(i, smaller(lanes, n - i), row);
  };
  each_block([&](int64_t i, int64_t count, int64_t row) {
    h.teacher_tile = b.teacher_tiles + row * lanes;
    h.student_tile = b.student_tiles + row * lanes;
    h.load_queries(i, count);
    h.scores(i, n - i, 0);
    const auto run = [&](auto function, int64_t begin, int64_t end) {
      for (int64_t low = begin; low < end; low += sum_length)
        function(b, h.teacher_tile + (low - i) * lanes, h.student_tile + (low - i) * lanes, low,
                 smaller(end, low + sum_length), i, h.teacher_unit, h.student_unit, h.ahead);
    };
    run(symmetric_exponentials<V, vectors, false, h.pairs>, i, i + count);
    run(symmetric_exponentials<V, vectors, true, h.pairs>, i + count, n);
  });

  value = 0;
  for (int64_t i = 0; i < n; i += V::width) {
    F parts[3][V::width];
    for (int64_t l = 0; l < V::width; ++l)
      for (int k = 0; k < 3; ++k)
        parts[k][l] = i + l < n ? sum(V::load(b.key_sums + ((i + l) * 3 + k) * V::width)) : F(0);
    const V zt = V::load(b.sum_t + i) + V::load(parts[0]), zs = V::load(b.sum_s + i) + V::load(parts[1]);
    const V a = V::load(b.sum_a + i) + V::load(parts[2]);
    // Relative to the powers of 2 near the diagonal, whose logarithm A has left out.
    const V over = zs * exp2(V::all(0) - V::load(b.near_s + i)), under = zt * exp2(V::all(0) - V::load(b.near_t + i));
    const V kl = fma(a / zt, V::all(static_cast<F>(ln2)), log_of_ratio(over, under));
    F values[V::width], sums_t[V::width], sums_s[V::width];
    where_positive(V::all(0) - kl, V::all(0), kl).store(values);  // NaN stays
    zt.store(sums_t);
    zs.store(sums_s);
    for (int64_t l = 0; l < V::width && i + l < n; ++l) {
      const double weight = h.weight_of_row(i + l);
      b.factor_t[i + l] = static_cast<F>(weight / sums_t[l]);
      b.factor_s[i + l] = static_cast<F>(weight / sums_s[l]);
      value += values[l];
      if (job.row_loss != nullptr) static_cast<F*>(job.row_loss)[job.sequence.tokens[i + l]] = values[l];
    }
  }
  if (job.grad_a.data == nullptr) return true;

  __builtin_memset(total, 0, n * h.padded * sizeof(F));
  each_block([&](int64_t i, int64_t count, int64_t row) {
    F* tile = b.student_tiles + row * lanes;
    symmetric_differences<V, vectors>(b, b.teacher_tiles + row * lanes, tile, i, n, i);
    const RowsOf<F> keys = h.load_keys(i, n - i);
    gemm<Plain>(h.student_size, lanes, n - i, keys.data, 1, keys.stride, tile, lanes, h.grad_columns, lanes, false);
    h.turn_gradient(count);
    add_up<V>(total + i * h.padded, h.grad_rows, count * h.padded);
    const RowsOf<F> queries = numbers<V>(h.student_a, i, count, h.padded, false, h.query_rows);
    gemm<Plain>(n - i - count, h.padded, count, tile + count * lanes, lanes, 1, queries.data, queries.stride,
                total + (i + count) * h.padded, h.padded, true);
  });
  write_keys_of<V, S>(job, total);
  return true;
}

}  // namespace
}  // namespace pyd::PYD_ISA
