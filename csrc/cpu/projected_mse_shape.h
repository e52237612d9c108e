// SPDX-License-Identifier: Apache-2.0
// How a projected_mse job is laid out: blocks and chunks of rows, strides, scratch memory.
#pragma once

#include "gemm.h"
#include "projected_mse.h"
#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

constexpr int64_t most_chunks = 64;
constexpr int64_t accumulators_limit = 512 << 10;  // bytes of dP that stay in the second-level cache beside a block
constexpr int64_t block_rows = 96, large_block_rows = 192;

// The sizes that everything is laid out by.
template <class V, class S>
struct Shape {
  using F = typename V::scalar;
  using Pairs = typename ProductOf<V, S>::Type;
  static constexpr bool may_pair = ProductOf<V, S>::pairs;
  static constexpr int64_t lanes = gemm_vectors * V::width;  // columns of a panel

  const ProjectedMseJob& job;
  const int64_t k, m;   // features of source and target
  const int64_t depth;  // k, and the ones that meet the bias
  const bool pairs;     // y = a P as products of bf16 pairs, which are exact
  const int64_t words;  // their number in a row
  const int64_t k_padded, m_padded, depth_padded;
  const int64_t source_row, tile_row, gradient_row, word_row;  // strides in the scratch memory
  const bool back;                                             // the gradient of the source is wanted
  const bool collects;                                         // something is summed over all rows
  int64_t rows;                                                // in a block
  int64_t blocks_of_chunk;

  explicit Shape(const ProjectedMseJob& job_)
      : job(job_),
        k(job_.source.size),
        m(job_.target.size),
        depth(k + (job_.bias != nullptr)),
        pairs(may_pair && job_.projection_dtype == Dtype::bf16),
        words((depth + 1) / 2),
        k_padded(round_up(k, V::width)),
        m_padded(round_up(m, V::width)),
        depth_padded(round_up(depth, V::width)),
        source_row(spread(depth)),
        tile_row(spread(m_padded)),
        gradient_row(spread(k_padded)),
        word_row(spread(words)),
        back(job_.grad_source.data != nullptr),
        collects(job_.gram || job_.grad_projection || job_.grad_bias) {
    rows = collects && depth * m_padded * int64_t(sizeof(F)) > accumulators_limit ? large_block_rows : block_rows;
    const int64_t blocks = (job.count + rows - 1) / rows;
    blocks_of_chunk = larger(1, (blocks + most_chunks - 1) / most_chunks);
  }

  int64_t chunks() const { return (job.count + rows * blocks_of_chunk - 1) / (rows * blocks_of_chunk); }

  int64_t position(int64_t row) const { return job.rows == nullptr ? row : job.rows[row]; }

  // First and last + 1 row of dP that is wanted; the bias is the last.
  int64_t first_row() const { return job.grad_projection ? 0 : k; }
  int64_t last_row() const { return job.grad_bias ? depth : k; }

 private:
  // An odd number of cache lines, so that rows do not meet in one set of the cache.
  static int64_t spread(int64_t n) {
    constexpr int64_t line = 64 / sizeof(F);
    return ((n + line - 1) / line | 1) * line;
  }
};

// Takes buffers one behind the other, each on a cache line.
struct Arena {
  char* const memory;
  size_t bytes = 0;

  explicit Arena(void* memory_) : memory(static_cast<char*>(memory_)) {}
  template <class T>
  T* take(int64_t count) {
    T* taken = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + bytes);
    bytes += static_cast<size_t>(round_up(count * int64_t(sizeof(T)), 64));
    return taken;
  }
};

// Calls f(offset, how many) for every vector of n elements, the last one perhaps not whole.
template <class V, class Function>
PYD_INLINE void vectors_of(int64_t n, Function f) {
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) f(i, int64_t{V::width});
  if (i < n) f(i, n - i);
}

template <class V, class S>
PYD_INLINE V load(const S* p, int64_t n) {
  return n == V::width ? V::load(p) : V::load_part(p, n, 0);
}
template <class V, class S>
PYD_INLINE void store(V x, S* p, int64_t n) {
  n == V::width ? x.store(p) : x.store_part(p, n);
}

// Row `position` of a matrix of S.
template <class S>
PYD_INLINE S* row_of(const Matrix& matrix, int64_t position) {
  return static_cast<S*>(matrix.data) + position * matrix.stride;
}

// The rows that a block will read, fetched a few cache lines at a time between the products of the block before it:
// read all at once, they would leave the arithmetic waiting for memory.
template <class V, class S>
struct Ahead {
  const Shape<V, S>& s;
  int64_t row, end;
  int64_t line = 0;

  PYD_INLINE void fetch(int64_t lines) {
    const int64_t of_target = lines_of(s.m), of_row = of_target + lines_of(s.k);
    for (; lines > 0 && row < end; --lines) {
      const int64_t at = s.position(row);
      const S* from = line < of_target ? row_of<S>(s.job.target, at) : row_of<S>(s.job.source, at);
      const int64_t offset = line < of_target ? line : line - of_target;
      __builtin_prefetch(reinterpret_cast<const char*>(from) + 64 * offset, 0, 2);
      if (++line == of_row) {
        line = 0;
        ++row;
      }
    }
  }
  int64_t lines() const { return (end - row) * (lines_of(s.m) + lines_of(s.k)); }

 private:
  static int64_t lines_of(int64_t n) { return (n * int64_t(sizeof(S)) + 63) / 64; }
};

// C[rows, columns] (+)= A^T B for A [depth, rows] and B [depth, columns], in small pieces with `ahead` between them.
template <class M, class V, class S>
void transposed_product(int64_t rows, int64_t columns, int64_t depth, const typename M::Word* a, int64_t a_row,
                        const typename M::Word* b, int64_t b_row, typename V::scalar* c, int64_t c_row, bool accumulate,
                        Ahead<V, S>& ahead) {
  constexpr int64_t lanes = Shape<V, S>::lanes;
  const int64_t pieces = round_up(columns, lanes) / lanes * ((rows + gemm_rows - 1) / gemm_rows);
  const int64_t lines = ahead.lines() / larger(pieces, 1) + 1;
  for (int64_t j = 0; j < columns; j += lanes)
    for (int64_t r = 0; r < rows; r += gemm_rows) {
      gemm<M>(smaller(gemm_rows, rows - r), smaller(lanes, columns - j), depth, a + r, 1, a_row, b + j, b_row,
              c + r * c_row + j, c_row, accumulate);
      ahead.fetch(lines);
    }
}

// Row i of the projection, with the bias as its last.
template <class P>
PYD_INLINE const P* projection_row(const ProjectedMseJob& job, int64_t i) {
  return i < job.source.size ? static_cast<const P*>(job.projection) + i * job.target.size
                             : static_cast<const P*>(job.bias);
}

// Panels [m, lanes] of the transposed projection.
template <class P, class V, class S>
void pack_backward(const Shape<V, S>& s, typename V::scalar* panels) {
  using F = typename V::scalar;
  for (int64_t p = 0; p < s.k; p += s.lanes) {
    F* out = panels + p * s.m;
    for (int64_t c = 0; c < s.lanes; ++c)
      for (int64_t j = 0; j < s.m; ++j)
        out[j * s.lanes + c] = p + c < s.k ? F(widen(projection_row<P>(s.job, p + c)[j])) : F(0);
  }
}

// Source row r as numbers, the ones that meet the bias, and zeros to a whole vector.
template <class V, class S>
PYD_INLINE void widen_source(const Shape<V, S>& s, const S* in, typename V::scalar* out) {
  vectors_of<V>(s.k, [&](int64_t i, int64_t n) PYD_INLINE_LAMBDA { store(load<V>(in + i, n), out + i, n); });
  for (int64_t i = s.k; i < s.depth_padded; ++i) out[i] = i < s.depth ? 1 : 0;
}

// The gradient of a block's source rows, from numbers to where the tensor keeps them.
template <class V, class S>
void write_source_gradient(const Shape<V, S>& s, int64_t begin, int64_t count, const typename V::scalar* rows,
                           double factor) {
  const V scale = V::all(static_cast<typename V::scalar>(factor));
  for (int64_t r = 0; r < count; ++r) {
    S* out = row_of<S>(s.job.grad_source, s.position(begin + r));
    const typename V::scalar* in = rows + r * s.gradient_row;
    vectors_of<V>(s.k, [&](int64_t i, int64_t n) PYD_INLINE_LAMBDA { store(V::load(in + i) * scale, out + i, n); });
  }
}

}  // namespace
}  // namespace pyd::PYD_ISA
