// SPDX-License-Identifier: Apache-2.0
// The rows of a relation head: read as operands of products, written as gradients, and fetched before they are needed.
#pragma once

#include "attention_relation_shape.h"
#include "gemm.h"
#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

// Rows of numbers, `stride` apart.
template <class T>
struct RowsOf {
  const T* data;
  int64_t stride;
};

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
RowsOf<typename ProductOf<V, S>::Type::Word> operands(const Source<S>& source, int64_t begin, int64_t count,
                                                      bool gather, typename ProductOf<V, S>::Type::Word* buffer) {
  using Word = typename ProductOf<V, S>::Type::Word;
  if constexpr (ProductOf<V, S>::pairs) {
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

}  // namespace
}  // namespace pyd::PYD_ISA
