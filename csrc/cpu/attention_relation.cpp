// SPDX-License-Identifier: Apache-2.0
// Attention-relation KL on the CPU: value and gradient without an N x N matrix. Compiled once per instruction set.
//
// For one relation head of one sequence, with scores t_ij = a_i b_j / sqrt(d) of the teacher and s_ij of the student,
// p_i = softmax(t_i), q_i = softmax(s_i) (Wang et al. 2020, arXiv 2002.10957, equations 6 and 9; 2021, arXiv
// 2012.15828),
//   KL_i = A_i / Zt_i + log(Zs_i / Zt_i),   A_i = sum_j e^t_ij (t_ij - s_ij),   Z = row sums of exponentials,
//   G_ij = w_i (q_ij - p_ij),   dL/da_i = sum_j G_ij b_j / sqrt(d),   dL/db_j = sum_i G_ij a_i / sqrt(d),
// and a self relation (a = b) receives both.
//
// Tokens that the mask rules out are never read: a sequence is a list of positions, and everything below counts along
// that list. A block of queries meets all keys at once. Scores are stored with the block's queries in the lanes,
// [keys, lanes], so that softmax runs down the columns without a sum across lanes, and keys are read row by row where
// they lie, one number broadcast at a time. Both tiles stay in the second-level cache: four matrix products, one sweep.
// Scores are in units of log 2.
//
// A sequence so long that one row of tiles, or the gradient of its keys, leaves the second-level cache is done in
// several sweeps, with scores computed anew.

#include "attention_relation.h"

#include "gemm.h"
#include "simd.h"
#include "transpose.h"

namespace pyd::PYD_ISA {
namespace {

constexpr double log2e = 1.4426950408889634, ln2 = 0.6931471805599453;
constexpr int64_t tiles_limit = 1024 << 10;   // bytes of a block's two tiles in a one-sweep job
constexpr int64_t partial_limit = 704 << 10;  // bytes of a partial sum there
constexpr int64_t keys_limit = 192 << 10;     // bytes of keys that are copied as a whole
constexpr int64_t key_block = 256;            // keys that are copied at a time where there are more

PYD_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
PYD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
PYD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Scores are products of what is stored: exact pairs where bf16 has an instruction for them.
template <class V, class S>
struct ScoreProduct {
  using Type = Multiply<V>;
  static constexpr bool pairs = false;
};
#if defined(__AVX512BF16__)
template <>
struct ScoreProduct<Floats, bf16> {
  using Type = MultiplyPairs;
  static constexpr bool pairs = true;
};
#endif

// Rows of numbers, `stride` apart.
template <class T>
struct RowsOf {
  const T* data;
  int64_t stride;
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// The features of one relation head: a range of the concatenated heads, for the tokens of one sequence.
template <class S>
struct Source {
  const S* base;
  int64_t head_size, head_stride, token_stride, first, size;
  const int32_t* tokens;
  int64_t first_offset;     // of the first feature from its token
  bool whole, consecutive;  // inside one head; tokens without a gap

  Source(const Heads& heads, const Sequence& sequence, int64_t relation_head, int64_t size_)
      : base(static_cast<const S*>(heads.data) + sequence.batch * heads.batch_stride),
        head_size(heads.head_size),
        head_stride(heads.head_stride),
        token_stride(heads.token_stride),
        first(relation_head * size_),
        size(size_),
        tokens(sequence.tokens),
        first_offset(first / head_size * head_stride + first % head_size),
        whole(first / head_size == (first + size_ - 1) / head_size),
        consecutive(sequence.tokens[sequence.count - 1] - sequence.tokens[0] == sequence.count - 1) {}

  // f(pointer to consecutive features, which of the relation head's features is first, how many)
  template <class Function>
  PYD_INLINE void pieces(int64_t row, Function f) const {
    if (whole) return f(direct(row), int64_t{0}, size);
    const S* token = base + tokens[row] * token_stride;
    for (int64_t done = 0; done < size;) {
      const int64_t head = (first + done) / head_size, offset = (first + done) % head_size;
      const int64_t count = smaller(head_size - offset, size - done);
      f(token + head * head_stride + offset, done, count);
      done += count;
    }
  }
  PYD_INLINE const S* direct(int64_t row) const { return base + tokens[row] * token_stride + first_offset; }
};

// Rows [begin, begin + count) as numbers to calculate with; columns past `size` are zero up to `padded`. Points into
// the tensor where that will do, else into `buffer`. Rows that will be read often are better brought together
// (`gather`) than read pages apart.
template <class V, class S>
RowsOf<typename V::scalar> numbers(const Source<S>& source, int64_t begin, int64_t count, int64_t padded, bool gather,
                                   typename V::scalar* buffer) {
  using F = typename V::scalar;
  if constexpr (same<S, F>)
    if (source.whole && source.consecutive && padded == source.size && !(gather && source.token_stride != source.size))
      return {source.direct(begin), source.token_stride};
  for (int64_t r = 0; r < count; ++r) {
    F* out = buffer + r * padded;
    source.pieces(begin + r, [&](const S* in, int64_t at, int64_t n) PYD_INLINE_LAMBDA {
      int64_t i = 0;
      for (; i + V::width <= n; i += V::width) V::load(in + i).store(out + at + i);
      if (i < n) V::load_part(in + i, n - i, 0).store_part(out + at + i, n - i);
    });
    for (int64_t c = source.size; c < padded; ++c) out[c] = 0;
  }
  return {buffer, padded};
}

// The same as operands of score products.
template <class V, class S>
RowsOf<typename ScoreProduct<V, S>::Type::Word> operands(const Source<S>& source, int64_t begin, int64_t count,
                                                         bool gather, typename ScoreProduct<V, S>::Type::Word* buffer) {
  using Word = typename ScoreProduct<V, S>::Type::Word;
  if constexpr (ScoreProduct<V, S>::pairs) {
    if (source.whole && source.consecutive && source.size % 2 == 0 && source.token_stride % 2 == 0 &&
        !(gather && source.token_stride != source.size))
      return {reinterpret_cast<const Word*>(source.direct(begin)), source.token_stride / 2};
    const int64_t words = (source.size + 1) / 2;
    for (int64_t r = 0; r < count; ++r) {
      S* out = reinterpret_cast<S*>(buffer + r * words);
      source.pieces(begin + r, [&](const S* in, int64_t at, int64_t n)
                                   PYD_INLINE_LAMBDA { __builtin_memcpy(out + at, in, n * sizeof(S)); });
      if (source.size % 2 == 1) out[source.size] = S{};
    }
    return {buffer, words};
  } else {
    return numbers<V>(source, begin, count, source.size, gather, buffer);
  }
}

// Rows of a gradient, from numbers to where the tensor keeps them.
template <class V, class S>
void write(const Source<S>& target, int64_t begin, int64_t count, const typename V::scalar* rows, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const typename V::scalar* in = rows + r * stride;
    target.pieces(begin + r, [&](const S* to, int64_t at, int64_t n) PYD_INLINE_LAMBDA {
      S* out = const_cast<S*>(to);
      int64_t i = 0;
      for (; i + V::width <= n; i += V::width) V::load(in + at + i).store(out + i);
      if (i < n) V::load_part(in + at + i, n - i, 0).store_part(out + i, n - i);
    });
  }
}

// The next job's rows, which lie pages apart where the processor does not foresee them: brought near while this job
// is busy with exponentials.
struct Ahead {
  static constexpr int sources = 4;
  const char* row[sources] = {};
  int64_t stride[sources] = {}, bytes[sources] = {};
  int64_t rows = 0;

  template <class S>
  void add(int i, const Source<S>& source) {
    row[i] = reinterpret_cast<const char*>(source.direct(0));
    stride[i] = source.token_stride * int64_t(sizeof(S));
    bytes[i] = source.size * int64_t(sizeof(S));
  }
  // One row of each source.
  PYD_INLINE void fetch() {
    if (rows == 0) return;
    --rows;
    for (int i = 0; i < sources; ++i) {
      for (int64_t b = 0; b < bytes[i]; b += 64) __builtin_prefetch(row[i] + b, 0, 2);
      row[i] += stride[i];
    }
  }
};

template <class S>
Ahead ahead_of(const RelationJob* job) {
  Ahead ahead;
  if (job == nullptr) return ahead;
  const auto source = [&](const Heads& heads, const RelationSide& side) {
    return Source<S>(heads, job->sequence, job->relation_head, side.size);
  };
  ahead.add(0, source(job->teacher.a, job->teacher));
  ahead.add(1, source(job->student.a, job->student));
  if (!job->self) {
    ahead.add(2, source(job->teacher.b, job->teacher));
    ahead.add(3, source(job->student.b, job->student));
  }
  ahead.rows = job->sequence.count;
  return ahead;
}

// Down the columns of a tile [end - begin, lanes]. Key j is `begin` + row; where `masked`, lane l counts it only if
// j <= query + l.
template <class V, int vectors, bool masked>
__attribute__((noinline)) void maxima(const typename V::scalar* tile, int64_t begin, int64_t end, int64_t query,
                                      typename V::scalar* top_of_lane) {
  using F = typename V::scalar;
  constexpr int lanes = vectors * V::width;
  F rows[lanes];
  for (int l = 0; l < lanes; ++l) rows[l] = static_cast<F>(query + l) + F(0.5);
  V top[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) top[v] = V::load(top_of_lane + v * V::width);
  for (int64_t j = begin; j < end; ++j, tile += lanes)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V x = V::load(tile + v * V::width);
      if constexpr (masked) x = where_positive(V::load(rows + v * V::width) - V::all(static_cast<F>(j)), x, top[v]);
      top[v] = max(x, top[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) top[v].store(top_of_lane + v * V::width);
}

// Exponentials over the scores, relative to `top`, their largest; `sums` [3, lanes] collects Zt, Zs and A (in units of
// log 2).
template <class V, int vectors, bool masked, bool scaled>
__attribute__((noinline)) void exponentials(typename V::scalar* teacher, typename V::scalar* student, int64_t begin,
                                            int64_t end, int64_t query, typename V::scalar factor_t,
                                            typename V::scalar factor_s, const typename V::scalar* top_t,
                                            const typename V::scalar* top_s, typename V::scalar* sums, Ahead& ahead) {
  using F = typename V::scalar;
  constexpr int lanes = vectors * V::width;
  const V scale_t = V::all(factor_t), scale_s = V::all(factor_s), zero = V::all(0);
  F rows[lanes];
  for (int l = 0; l < lanes; ++l) rows[l] = static_cast<F>(query + l) + F(0.5);
  V zt[vectors], zs[vectors], a[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    zt[v] = V::load(sums + v * V::width);
    zs[v] = V::load(sums + lanes + v * V::width);
    a[v] = V::load(sums + 2 * lanes + v * V::width);
  }
  for (int64_t j = begin; j < end; ++j, teacher += lanes, student += lanes) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      // The largest is exactly 0, which a scale before the difference would spoil.
      V t = V::load(teacher + v * V::width) - V::load(top_t + v * V::width);
      V s = V::load(student + v * V::width) - V::load(top_s + v * V::width);
      if constexpr (scaled) {
        t = t * scale_t;
        s = s * scale_s;
      }
      V et = exp2(t), es = exp2(s);
      if constexpr (masked) {
        const V seen = V::load(rows + v * V::width) - V::all(static_cast<F>(j));
        et = where_positive(seen, et, zero);
        es = where_positive(seen, es, zero);
      }
      zt[v] = zt[v] + et;
      zs[v] = zs[v] + es;
      a[v] = fma(et, t - s, a[v]);
      et.store(teacher + v * V::width);
      es.store(student + v * V::width);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    zt[v].store(sums + v * V::width);
    zs[v].store(sums + lanes + v * V::width);
    a[v].store(sums + 2 * lanes + v * V::width);
  }
}

// G over the student's exponentials.
template <class V, int vectors>
__attribute__((noinline)) void differences(const typename V::scalar* teacher, typename V::scalar* student, int64_t keys,
                                           const typename V::scalar* factor_t, const typename V::scalar* factor_s) {
  constexpr int lanes = vectors * V::width;
  V ct[vectors], cs[vectors];
#pragma GCC unroll 4
  for (int v = 0; v < vectors; ++v) {
    ct[v] = V::load(factor_t + v * V::width);
    cs[v] = V::load(factor_s + v * V::width);
  }
  for (int64_t j = 0; j < keys; ++j, teacher += lanes, student += lanes)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
      fnma(ct[v], V::load(teacher + v * V::width), cs[v] * V::load(student + v * V::width))
          .store(student + v * V::width);
}

PYD_INLINE Doubles log_of_ratio(Doubles over, Doubles under) { return log(over / under); }
// The quotient's own rounding is put back, for a KL near 0 is the small difference of two logarithms.
PYD_INLINE Floats log_of_ratio(Floats over, Floats under) {
  const Floats ratio = over / under;
  return log(ratio) + fnma(ratio, under, over) / over;
}

// Vectors in a block of a one-sweep job: fewer where there are more keys, so that the tiles stay in the cache.
template <class V>
int block_vectors(const RelationJob& job) {
  int vectors = gemm_vectors;
  while (vectors > 1 && job.sequence.count * vectors * V::width * 2 * int64_t(sizeof(typename V::scalar)) > tiles_limit)
    vectors /= 2;
  return vectors;
}

template <class V>
bool one_sweep_of(const RelationJob& job) {
  const int64_t n = job.sequence.count, size = sizeof(typename V::scalar);
  return n * V::width * 2 * size <= tiles_limit && n * round_up(job.student.size, V::width) * size <= partial_limit;
}

template <class V>
bool symmetric_of(const RelationJob& job);

// What one relation head of one sequence needs, in a thread's scratch memory.
template <class V, class S, int vectors>
struct Head {
  using F = typename V::scalar;
  using Product = typename ScoreProduct<V, S>::Type;
  using Word = typename Product::Word;
  static constexpr bool pairs = ScoreProduct<V, S>::pairs;
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
    spans(begin, end, query, [&](int64_t low, int64_t high, bool masked) {
      const int64_t at = (row + low - begin) * lanes;
      const auto run = masked ? exponentials<V, vectors, true, pairs> : exponentials<V, vectors, false, pairs>;
      run(teacher_tile + at, student_tile + at, low, high, query, teacher_unit, student_unit, top_t, top_s, sums,
          ahead);
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

// One block of queries: value of its rows, their grad_a written, and its part of the gradient of the keys, added to
// `total` where that is not null, else put to `partial` [n, padded]. A self relation has the part of the block's own
// rows behind it.
template <class V, class S, int vectors>
double block_of(Head<V, S, vectors>& h, int64_t block, typename V::scalar* total, typename V::scalar* partial) {
  using F = typename V::scalar;
  using Plain = Multiply<V>;
  const RelationJob& job = h.job;
  constexpr int64_t lanes = vectors * V::width;
  const int64_t i = block * lanes, count = smaller(lanes, h.n - i), keys = job.causal ? i + count : h.n;
  const RowsOf<F> queries = h.load_queries(i, count);
  for (int64_t j = 0; j < keys; j += h.keys_at_once) h.scores(j, smaller(h.keys_at_once, keys - j), j);
  h.clear_sums();
  h.find_tops(0, keys, i, 0);
  h.exponentiate(0, keys, i, 0);
  const double value = h.finish_rows(i, count);
  if (job.grad_a.data == nullptr) return value;

  differences<V, vectors>(h.teacher_tile, h.student_tile, keys, h.factor_t, h.factor_s);
  for (int64_t j = 0; j < keys; j += h.keys_at_once) {
    const RowsOf<F> rows = h.load_keys(j, smaller(h.keys_at_once, keys - j));
    gemm<Plain>(h.student_size, lanes, smaller(h.keys_at_once, keys - j), rows.data, 1, rows.stride,
                h.student_tile + j * lanes, lanes, h.grad_columns, lanes, j > 0);
  }
  gemm<Plain>(keys, h.padded, count, h.student_tile, lanes, 1, queries.data, queries.stride,
              total != nullptr ? total : partial, h.padded, total != nullptr && (job.causal || block > 0));
  h.turn_gradient(count);
  if (!job.self)
    write<V>(h.target(job.grad_a), i, count, h.grad_rows, h.padded);
  else if (total != nullptr)
    add_up<V>(total + i * h.padded, h.grad_rows, count * h.padded);
  else
    __builtin_memcpy(partial + h.n * h.padded, h.grad_rows, count * h.padded * sizeof(F));
  return value;
}

template <class V, class S>
void write_keys_of(const RelationJob& job, const typename V::scalar* total) {
  write<V>(Source<S>(job.grad_b, job.sequence, job.relation_head, job.student.size), 0, job.sequence.count, total,
           round_up(job.student.size, V::width));
}

// Causal blocks leave keys out: what they add to has to be there.
template <class V, class S, int vectors>
void clear_total(const Head<V, S, vectors>& h, typename V::scalar* total) {
  if (h.job.causal && h.job.grad_b.data != nullptr)
    __builtin_memset(total, 0, h.n * h.padded * sizeof(typename V::scalar));
}

template <class V, class S, int vectors>
double whole_of(const RelationJob& job, const RelationJob* next, typename V::scalar* total, void* scratch) {
  Head<V, S, vectors> h(job, scratch);
  double value = 0;
  h.ahead = ahead_of<S>(next);
  clear_total(h, total);
  for (int64_t block = 0; block * h.lanes < h.n; ++block) value += block_of(h, block, total, nullptr);
  if (job.grad_b.data != nullptr) write_keys_of<V, S>(job, total);
  return value;
}

template <class V, class S, int vectors>
double block_statistics_of(const RelationJob& job, int64_t block, void* statistics, void* scratch) {
  using F = typename V::scalar;
  Head<V, S, vectors> h(job, scratch);
  constexpr int64_t lanes = vectors * V::width;
  const int64_t begin = block * lanes, count = smaller(lanes, h.n - begin), keys = job.causal ? begin + count : h.n;
  h.load_queries(begin, count);
  h.clear_sums();
  for (int64_t j = 0; j < keys; j += h.keys_at_once) {
    const int64_t end = smaller(keys, j + h.keys_at_once);
    h.scores(j, end - j, 0);
    h.raise_tops(j, end, begin, 0);
    h.exponentiate(j, end, begin, 0);
  }
  const double total = h.finish_rows(begin, count);
  F* out = static_cast<F*>(statistics) + block * 4 * lanes;
  __builtin_memcpy(out, h.top_t, lanes * sizeof(F));
  __builtin_memcpy(out + lanes, h.top_s, lanes * sizeof(F));
  __builtin_memcpy(out + 2 * lanes, h.factor_t, lanes * sizeof(F));
  __builtin_memcpy(out + 3 * lanes, h.factor_s, lanes * sizeof(F));
  return total;
}

template <class V, class S, int vectors>
void block_gradient_of(const RelationJob& job, int64_t block, const void* statistics, void* scratch) {
  using F = typename V::scalar;
  using Plain = Multiply<V>;
  Head<V, S, vectors> h(job, scratch);
  constexpr int64_t lanes = vectors * V::width;
  const int64_t begin = block * lanes, count = smaller(lanes, h.n - begin);
  // G of one tile, from the scores of keys [low, high) and the statistics of a block of queries.
  const auto tile_gradient = [&](int64_t queries_block, int64_t low, int64_t high) {
    const F* in = static_cast<const F*>(statistics) + queries_block * 4 * lanes;
    __builtin_memcpy(h.top_t, in, lanes * sizeof(F));
    __builtin_memcpy(h.top_s, in + lanes, lanes * sizeof(F));
    h.exponentiate(low, high, queries_block * lanes, 0);
    differences<V, vectors>(h.teacher_tile, h.student_tile, high - low, in + 2 * lanes, in + 3 * lanes);
  };

  h.clear_sums();
  h.load_queries(begin, count);
  const int64_t keys = job.causal ? begin + count : h.n;
  for (int64_t j = 0; j < keys; j += h.keys_at_once) {
    const int64_t end = smaller(keys, j + h.keys_at_once);
    h.scores(j, end - j, 0);
    tile_gradient(block, j, end);
    const RowsOf<F> rows = h.load_keys(j, end - j);
    gemm<Plain>(h.student_size, lanes, end - j, rows.data, 1, rows.stride, h.student_tile, lanes, h.grad_columns, lanes,
                j > 0);
  }
  h.turn_gradient(count);
  // The keys' part follows in the same place where both belong to one tensor.
  F* key_gradient = h.grad_rows;
  if (!job.self) write<V>(h.target(job.grad_a), begin, count, h.grad_rows, h.padded);

  h.cached_words = h.cached_rows = -1;
  bool more = job.self;
  for (int64_t other = job.causal ? block : 0; other * lanes < h.n; ++other) {
    const int64_t first = other * lanes, queries_count = smaller(lanes, h.n - first);
    const RowsOf<F> queries = h.load_queries(first, queries_count);
    h.scores(begin, count, 0);
    tile_gradient(other, begin, begin + count);
    gemm<Plain>(count, h.padded, queries_count, h.student_tile, lanes, 1, queries.data, queries.stride, key_gradient,
                h.padded, more);
    more = true;
  }
  write<V>(h.target(job.grad_b), begin, count, key_gradient, h.padded);
}

// ---- self relations: scores are symmetric, and so is everything that is made of them ----
//
// Exponentials that are not shifted by their row's maximum are symmetric too. Of both tiles only the part on and below
// the block diagonal is computed, and kept for the whole head; its sums serve rows and columns. With
// H_ij = G_ij + G_ji the gradient is one product, dL/da_i = sum_j H_ij a_j.
//
// The sums are taken relative to a whole power of 2 near the diagonal's exponential, which costs no rounding.

constexpr double symmetric_bound = 60;           // largest score, in units of log 2, that needs no shift
constexpr int64_t symmetric_tiles = 1536 << 10;  // bytes of both tiles
constexpr int64_t symmetric_keys = 256 << 10;    // bytes of the copied keys

// Vectors in a block of a symmetric job: small blocks waste less on the diagonal, large ones multiply faster.
template <class V>
constexpr int symmetric_vectors(int64_t n) {
  return gemm_vectors == 4 && n <= 192 ? 2 : gemm_vectors;
}

// Rows of the tiles of all blocks.
int64_t symmetric_rows(int64_t n, int64_t lanes) {
  const int64_t blocks = (n + lanes - 1) / lanes;
  return blocks * n - lanes * blocks * (blocks - 1) / 2;
}

template <class V>
bool symmetric_of(const RelationJob& job) {
  const int64_t n = job.sequence.count, size = sizeof(typename V::scalar), lanes = symmetric_vectors<V>(n) * V::width;
  return job.self && !job.causal && n >= 32 && one_sweep_of<V>(job) &&
         symmetric_rows(n, lanes) * lanes * 2 * size <= symmetric_tiles &&
         n * (job.student.size + job.teacher.size) * size <= symmetric_keys;
}

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
    zt[v] = V::load(b.sum_t + at);
    zs[v] = V::load(b.sum_s + at);
    a[v] = V::load(b.sum_a + at);
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
    zt[v].store(b.sum_t + at);
    zs[v].store(b.sum_s + at);
    a[v].store(b.sum_a + at);
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
    symmetric_exponentials<V, vectors, false, h.pairs>(b, h.teacher_tile, h.student_tile, i, i + count, i,
                                                       h.teacher_unit, h.student_unit, h.ahead);
    symmetric_exponentials<V, vectors, true, h.pairs>(b, h.teacher_tile + count * lanes, h.student_tile + count * lanes,
                                                      i + count, n, i, h.teacher_unit, h.student_unit, h.ahead);
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

// Calls f<V, S, vectors>() for the job's dtype and block.
template <class Function>
PYD_INLINE auto with_vectors(const RelationJob& job, Function f) {
  const auto choose = [&]<class V, class S>(V, S) {
    const int vectors = one_sweep_of<V>(job) ? block_vectors<V>(job) : gemm_vectors;
    if constexpr (gemm_vectors == 4)
      if (vectors == 4) return f.template operator()<V, S, 4>();
    if (vectors == 2) return f.template operator()<V, S, 2>();
    return f.template operator()<V, S, 1>();
  };
  switch (job.dtype) {
    case Dtype::bf16:
      return choose(Floats{}, bf16{});
    case Dtype::f16:
      return choose(Floats{}, f16{});
    case Dtype::f64:
      return choose(Doubles{}, double{});
    default:
      return choose(Floats{}, float{});
  }
}

// Calls f<V, S>() where the block does not matter.
template <class Function>
PYD_INLINE auto with_types(const RelationJob& job, Function f) {
  switch (job.dtype) {
    case Dtype::bf16:
      return f.template operator()<Floats, bf16>();
    case Dtype::f16:
      return f.template operator()<Floats, f16>();
    case Dtype::f64:
      return f.template operator()<Doubles, double>();
    default:
      return f.template operator()<Floats, float>();
  }
}

bool one_sweep(const RelationJob& job) {
  return with_types(job, [&]<class V, class S>() { return one_sweep_of<V>(job); });
}

// Calls f<V, S, vectors>() for a symmetric job.
template <class Function>
PYD_INLINE auto with_symmetric_vectors(const RelationJob& job, Function f) {
  return with_types(job, [&]<class V, class S>() {
    if constexpr (gemm_vectors == 4)
      if (symmetric_vectors<V>(job.sequence.count) == 2) return f.template operator()<V, S, 2>();
    return f.template operator()<V, S, gemm_vectors>();
  });
}

bool symmetric(const RelationJob& job) {
  return with_types(job, [&]<class V, class S>() { return symmetric_of<V>(job); });
}

size_t scratch_bytes(const RelationJob& job) {
  size_t bytes =
      with_vectors(job, [&]<class V, class S, int vectors>() { return Head<V, S, vectors>(job, nullptr).bytes; });
  if (symmetric(job)) {
    const size_t more = with_symmetric_vectors(job, [&]<class V, class S, int vectors>() {
      return Head<V, S, vectors>(job, nullptr).bytes + SymmetricBuffers<V, vectors>(job.sequence.count, nullptr).bytes;
    });
    if (more > bytes) bytes = more;
  }
  return bytes;
}

size_t partial_bytes(const RelationJob& job) {
  return with_vectors(job, [&]<class V, class S, int vectors>() {
    constexpr int64_t lanes = vectors * V::width;
    return static_cast<size_t>((job.sequence.count + lanes) * round_up(job.student.size, V::width)) *
           sizeof(typename V::scalar);
  });
}

double whole(const RelationJob& job, const RelationJob* next, void* total, void* scratch) {
  if (symmetric(job)) {
    double value;
    const bool done = with_symmetric_vectors(job, [&]<class V, class S, int vectors>() {
      return symmetric_whole_of<V, S, vectors>(job, next, static_cast<typename V::scalar*>(total), scratch, value);
    });
    if (done) return value;
  }
  return with_vectors(job, [&]<class V, class S, int vectors>() {
    return whole_of<V, S, vectors>(job, next, static_cast<typename V::scalar*>(total), scratch);
  });
}

double part(const RelationJob& job, int64_t block, void* total, void* partial, void* scratch) {
  return with_vectors(job, [&]<class V, class S, int vectors>() {
    using F = typename V::scalar;
    Head<V, S, vectors> head(job, scratch);
    if (block > 0) return block_of(head, block, static_cast<F*>(nullptr), static_cast<F*>(partial));
    clear_total(head, static_cast<F*>(total));
    return block_of(head, block, static_cast<F*>(total), static_cast<F*>(nullptr));
  });
}

void add(const RelationJob& job, int64_t block, void* total_, const void* partial_) {
  with_vectors(job, [&]<class V, class S, int vectors>() {
    using F = typename V::scalar;
    constexpr int64_t lanes = vectors * V::width;
    const int64_t n = job.sequence.count, padded = round_up(job.student.size, V::width), i = block * lanes;
    const int64_t count = smaller(lanes, n - i), keys = job.causal ? i + count : n;
    F* total = static_cast<F*>(total_);
    const F* partial = static_cast<const F*>(partial_);
    add_up<V>(total, partial, keys * padded);
    if (job.self) add_up<V>(total + i * padded, partial + n * padded, count * padded);
  });
}

void write_keys(const RelationJob& job, const void* total) {
  with_types(job, [&]<class V, class S>() { write_keys_of<V, S>(job, static_cast<const typename V::scalar*>(total)); });
}

int64_t parts(const RelationJob& job) {
  return with_vectors(job, [&]<class V, class S, int vectors>() {
    constexpr int64_t lanes = vectors * V::width;
    return (job.sequence.count + lanes - 1) / lanes;
  });
}

int64_t blocks(const RelationJob& job) {
  return with_types(job, [&]<class V, class S>() {
    constexpr int64_t lanes = gemm_vectors * V::width;
    return (job.sequence.count + lanes - 1) / lanes;
  });
}

size_t statistics_bytes(const RelationJob& job) {
  return with_types(job, [&]<class V, class S>() {
    return static_cast<size_t>(blocks(job) * 4 * gemm_vectors * V::width) * sizeof(typename V::scalar);
  });
}

double block_statistics(const RelationJob& job, int64_t block, void* statistics, void* scratch) {
  return with_types(job, [&]<class V, class S>() {
    return block_statistics_of<V, S, gemm_vectors>(job, block, statistics, scratch);
  });
}

void block_gradient(const RelationJob& job, int64_t block, const void* statistics, void* scratch) {
  with_types(job, [&]<class V, class S>() { block_gradient_of<V, S, gemm_vectors>(job, block, statistics, scratch); });
}

}  // namespace

extern const AttentionRelationKernel attention_relation = {
    one_sweep,  symmetric, scratch_bytes,    partial_bytes,    whole,         parts, part, add,
    write_keys, blocks,    statistics_bytes, block_statistics, block_gradient};

}  // namespace pyd::PYD_ISA
