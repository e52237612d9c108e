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

#include "attention_relation_head.h"
#include "attention_relation_symmetric.h"

namespace pyd::PYD_ISA {
namespace {

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

// Calls f<V, S>() for the job's dtype.
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

// Calls f<V, S, vectors>() for the job's dtype and block.
template <class Function>
PYD_INLINE auto with_vectors(const RelationJob& job, Function f) {
  return with_types(job, [&]<class V, class S>() {
    const int vectors = one_sweep_of<V>(job) ? block_vectors<V>(job) : gemm_vectors;
    if constexpr (V::width > 1) {
      if (gemm_vectors != 2 && vectors == 2) return f.template operator()<V, S, 2>();
      if (vectors == 1) return f.template operator()<V, S, 1>();
    }
    return f.template operator()<V, S, gemm_vectors>();
  });
}

bool one_sweep(const RelationJob& job) {
  return with_types(job, [&]<class V, class S>() { return one_sweep_of<V>(job); });
}

// Calls f<V, S, vectors>() for a symmetric job.
template <class Function>
PYD_INLINE auto with_symmetric_vectors(const RelationJob& job, Function f) {
  return with_types(job, [&]<class V, class S>() {
    if constexpr (gemm_vectors == 4 && V::width > 1)
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
