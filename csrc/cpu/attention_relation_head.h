// SPDX-License-Identifier: Apache-2.0
// One relation head of one sequence in a thread's scratch memory, and the steps that every way of doing it is made of.
#pragma once

#include "attention_relation_rows.h"
#include "attention_relation_shape.h"
#include "attention_relation_tiles.h"
#include "gemm.h"
#include "transpose.h"

namespace pyd::PYD_ISA {
namespace {

constexpr double log2e = 1.4426950408889634, ln2 = 0.6931471805599453;

// What one relation head of one sequence needs, in a thread's scratch memory.
template <class V, class S, int vectors>
struct Head {
  using F = typename V::scalar;
  using Product = typename ProductOf<V, S>::Type;
  using Word = typename Product::Word;
  static constexpr bool pairs = ProductOf<V, S>::pairs;
  static constexpr int lanes = vectors * V::width;

  const RelationJob& job;
  const int64_t n, teacher_size, student_size, padded;  // padded: student_size up to whole vectors
  const Source<S> teacher_a, teacher_b, student_a, student_b;
  const F teacher_unit, student_unit;  // scores to units of log 2
  int64_t keys_at_once;
  bool gather_keys;
  // Buffers: tiles; the block's queries transposed, and the student's as rows; keys; gradient of the queries.
  F *teacher_tile, *student_tile, *query_rows, *key_rows, *grad_columns, *grad_rows;
  Word *teacher_panel, *student_panel, *word_rows, *teacher_keys, *student_keys;
  F *top_t, *top_s, *sums, *factor_t, *factor_s;  // [lanes], sums [3, lanes]
  int64_t cached_words = -1, cached_rows = -1;    // first key in the buffers, and how many
  int64_t cached_word_count = 0, cached_row_count = 0;
  size_t bytes;

  Ahead ahead;  // nothing, unless set

  Head(const RelationJob& job_, void* memory)
      : job(job_),
        n(job_.sequence.count),
        teacher_size(job_.teacher.size),
        student_size(job_.student.size),
        padded(round_up(job_.student.size, V::width)),
        teacher_a(job_.teacher.a, job_.sequence, job_.relation_head, teacher_size),
        teacher_b(job_.teacher.b, job_.sequence, job_.relation_head, teacher_size),
        student_a(job_.student.a, job_.sequence, job_.relation_head, student_size),
        student_b(job_.student.b, job_.sequence, job_.relation_head, student_size),
        teacher_unit(static_cast<F>(job_.teacher.scale * log2e)),
        student_unit(static_cast<F>(job_.student.scale * log2e)) {
    const bool single = one_sweep_of<V>(job);
    const bool fits = n * (teacher_size + student_size) * int64_t(sizeof(F)) <= keys_limit;
    keys_at_once = single && fits ? n : smaller(n, key_block);
    gather_keys = keys_at_once == n;
    const int64_t tile_keys = single ? n : larger(keys_at_once, lanes);
    const int64_t longest = symmetric_of<V>(job) ? n : larger(keys_at_once, lanes);
    char* at = static_cast<char*>(memory);
    const auto take = [&]<class T>(T*& pointer, int64_t count) {
      pointer = reinterpret_cast<T*>(at);
      at += round_up(count * int64_t(sizeof(T)), 64);
    };
    take(teacher_tile, tile_keys * lanes);
    take(student_tile, tile_keys * lanes);
    take(query_rows, lanes * padded);
    take(key_rows, longest * student_size);
    take(grad_columns, student_size * lanes);
    take(grad_rows, lanes * padded);
    take(teacher_panel, teacher_size * lanes);
    take(student_panel, student_size * lanes);
    take(word_rows, lanes * larger(teacher_size, student_size));
    take(teacher_keys, longest * teacher_size);
    take(student_keys, longest * student_size);
    take(top_t, lanes);
    take(top_s, lanes);
    take(sums, 3 * lanes);
    take(factor_t, lanes);
    take(factor_s, lanes);
    bytes = static_cast<size_t>(at - static_cast<char*>(memory));
  }

  // The block's queries as panels [depth, lanes], and the student's as rows for the gradient of the keys.
  RowsOf<F> load_queries(int64_t begin, int64_t count) {
    const auto panel = [&](const Source<S>& source, F unit, Word* out) {
      const RowsOf<Word> rows = operands<V>(source, begin, count, false, word_rows);
      const int64_t depth = pairs ? (source.size + 1) / 2 : source.size;
      transpose(rows.data, rows.stride, count, depth, out, lanes, lanes);
      if constexpr (!pairs)
        for (int64_t i = 0; i < depth * lanes; i += V::width) (V::load(out + i) * V::all(unit)).store(out + i);
    };
    panel(teacher_a, teacher_unit, teacher_panel);
    panel(student_a, student_unit, student_panel);
    return numbers<V>(student_a, begin, count, padded, false, query_rows);
  }

  RowsOf<F> load_keys(int64_t begin, int64_t count) {
    if constexpr (!pairs) {
      load_words(begin, count);
      return {student_words.data + (begin - cached_words) * student_words.stride, student_words.stride};
    } else {
      if (cached_rows < 0 || begin < cached_rows || begin + count > cached_rows + cached_row_count) {
        student_rows = numbers<V>(student_b, begin, count, student_size, gather_keys, key_rows);
        cached_rows = begin;
        cached_row_count = count;
      }
      return {student_rows.data + (begin - cached_rows) * student_rows.stride, student_rows.stride};
    }
  }

  void load_words(int64_t begin, int64_t count) {
    if (cached_words >= 0 && begin >= cached_words && begin + count <= cached_words + cached_word_count) return;
    teacher_words = operands<V>(teacher_b, begin, count, gather_keys, teacher_keys);
    student_words = operands<V>(student_b, begin, count, gather_keys, student_keys);
    cached_words = begin;
    cached_word_count = count;
  }

  // Scores of keys [begin, begin + count) with the block's queries, in the rows of both tiles from `row` on.
  void scores(int64_t begin, int64_t count, int64_t row) {
    load_words(begin, count);
    const auto product = [&](const RowsOf<Word>& keys, int64_t size, const Word* panel, F* tile) {
      const int64_t depth = pairs ? (size + 1) / 2 : size;
      gemm<Product>(count, lanes, depth, keys.data + (begin - cached_words) * keys.stride, keys.stride, 1, panel, lanes,
                    tile + row * lanes, lanes, false);
    };
    product(teacher_words, teacher_size, teacher_panel, teacher_tile);
    product(student_words, student_size, student_panel, student_tile);
  }

  // f(first row, last row + 1, whether causality masks some of it): the keys [begin, end) that a block sees, whose
  // first query is `query`.
  template <class Function>
  void spans(int64_t begin, int64_t end, int64_t query, Function f) const {
    const int64_t open = job.causal ? larger(begin, smaller(end, query + 1)) : end;
    if (begin < open) f(begin, open, false);
    if (open < end) f(open, end, true);
  }

  void clear_sums() {
    for (int64_t i = 0; i < 3 * lanes; ++i) sums[i] = 0;
    for (int64_t i = 0; i < lanes; ++i) top_t[i] = top_s[i] = -static_cast<F>(__builtin_inf());
  }

  void find_tops(int64_t begin, int64_t end, int64_t query, int64_t row) {
    spans(begin, end, query, [&](int64_t low, int64_t high, bool masked) {
      const int64_t at = (row + low - begin) * lanes;
      const auto run = masked ? maxima<V, vectors, true> : maxima<V, vectors, false>;
      run(teacher_tile + at, low, high, query, top_t);
      run(student_tile + at, low, high, query, top_s);
    });
  }

  // The same where sums are there already, which are taken along.
  void raise_tops(int64_t begin, int64_t end, int64_t query, int64_t row) {
    F old_t[lanes], old_s[lanes];
    __builtin_memcpy(old_t, top_t, sizeof(old_t));
    __builtin_memcpy(old_s, top_s, sizeof(old_s));
    find_tops(begin, end, query, row);
    for (int64_t l = 0; l < lanes; ++l) {
      if (sums[l] == 0) continue;  // nothing yet
      const double by_t = (double(old_t[l]) - top_t[l]) * (pairs ? teacher_unit : 1);
      const double by_s = (double(old_s[l]) - top_s[l]) * (pairs ? student_unit : 1);
      const double factor = __builtin_exp2(by_t);
      sums[2 * lanes + l] = static_cast<F>(factor * (sums[2 * lanes + l] + sums[l] * (by_t - by_s)));
      sums[l] = static_cast<F>(factor * sums[l]);
      sums[lanes + l] = static_cast<F>(__builtin_exp2(by_s) * sums[lanes + l]);
    }
  }

  void exponentiate(int64_t begin, int64_t end, int64_t query, int64_t row) {
    spans(begin, end, query, [&](int64_t first, int64_t last, bool masked) {
      const auto run = masked ? exponentials<V, vectors, true, pairs> : exponentials<V, vectors, false, pairs>;
      for (int64_t low = first; low < last; low += sum_length) {
        const int64_t at = (row + low - begin) * lanes;
        run(teacher_tile + at, student_tile + at, low, smaller(last, low + sum_length), query, teacher_unit,
            student_unit, top_t, top_s, sums, ahead);
      }
    });
  }

  // Factor of a query row in the gradient of the scores before their scale.
  double weight_of_row(int64_t row) const {
    const double weight = job.sequence.weight * job.student.scale;
    if (job.row_weights == nullptr) return weight;
    return weight * static_cast<const F*>(job.row_weights)[job.sequence.tokens[row]];
  }

  // From the sums: the rows' values, returned summed, and the factors of p and q in G (0 in lanes without a query).
  double finish_rows(int64_t begin, int64_t count) {
    double total = 0;
    F values[lanes];
    for (int v = 0; v < vectors; ++v) {
      const V zt = V::load(sums + v * V::width), zs = V::load(sums + lanes + v * V::width);
      const V a = V::load(sums + 2 * lanes + v * V::width);
      const V value = fma(a / zt, V::all(static_cast<F>(ln2)), log_of_ratio(zs, zt));
      where_positive(V::all(0) - value, V::all(0), value).store(values + v * V::width);  // NaN stays
    }
    for (int64_t l = 0; l < lanes; ++l) {
      if (l >= count) {
        factor_t[l] = factor_s[l] = 0;
        continue;
      }
      const double weight = weight_of_row(begin + l);
      factor_t[l] = static_cast<F>(weight / sums[l]);
      factor_s[l] = static_cast<F>(weight / sums[lanes + l]);
      total += values[l];
      if (job.row_loss != nullptr) static_cast<F*>(job.row_loss)[job.sequence.tokens[begin + l]] = values[l];
    }
    return total;
  }

  // grad_columns [student_size, lanes] as rows [lanes, padded].
  void turn_gradient(int64_t count) { transpose(grad_columns, lanes, student_size, count, grad_rows, padded, padded); }

  Source<S> target(const Heads& gradient) const {
    return Source<S>(gradient, job.sequence, job.relation_head, student_size);
  }

 private:
  RowsOf<Word> teacher_words, student_words;
  RowsOf<F> student_rows;
};

template <class V>
void add_up(typename V::scalar* total, const typename V::scalar* partial, int64_t count) {
  for (int64_t k = 0; k < count; k += V::width) (V::load(total + k) + V::load(partial + k)).store(total + k);
}

template <class V, class S>
void write_keys_of(const RelationJob& job, const typename V::scalar* total) {
  write<V>(Source<S>(job.grad_b, job.sequence, job.relation_head, job.student.size), 0, job.sequence.count, total,
           round_up(job.student.size, V::width));
}

}  // namespace
}  // namespace pyd::PYD_ISA
