// SPDX-License-Identifier: Apache-2.0
// Projected mean squared error on the CPU: value and gradients without the projected tensor or the difference in
// memory. Compiled once per instruction set.
//
// With source rows a [k], target rows b [m], projection P and bias c (hidden states of TinyBERT, Jiao et al. 2019,
// arXiv 1909.10351, equation 8),
//   y = a P + c,   d = y - b,   L = sum d^2,   dL/da = 2 d P^T,   dL/db = -2 d,   dL/dP = 2 sum a^T d,   dL/dc = 2 sum
//   d.
// Normalised, d = y / |y| - b / |b|, and what arrives at y is (d - (d . y / |y|) y / |y|) / |y|; likewise at b.
//
// A block of rows passes through three matrix products while its difference lies in the second-level cache: y = a P,
// then, once d stands in its place, da = d P^T and dP += a^T d. The bias is one more row of P, met by a column of ones
// beside a, so its gradient is one more row of dP. Rows that are masked out are never read: a block is a list of rows.

#include "projected_mse.h"

#include "gemm.h"
#include "simd.h"
#include "transpose.h"

namespace pyd::PYD_ISA {
namespace {

constexpr double shortest = 1e-12;  // length of a row below which it has no direction
constexpr int64_t most_chunks = 64;
constexpr int64_t accumulators_limit = 512 << 10;  // bytes of dP that stay in the second-level cache beside a block
constexpr int64_t block_rows = 96, large_block_rows = 192;

PYD_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
PYD_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// y = a P is made of exact pairs where bf16 has an instruction for them.
template <class V, class S>
struct ProjectionProduct {
  using Type = Multiply<V>;
  static constexpr bool pairs = false;
};
#if defined(__AVX512BF16__)
template <>
struct ProjectionProduct<Floats, bf16> {
  using Type = MultiplyPairs;
  static constexpr bool pairs = true;
};
#endif

// The sizes that everything is laid out by.
template <class V, class S>
struct Shape {
  using F = typename V::scalar;
  using Pairs = typename ProjectionProduct<V, S>::Type;
  static constexpr bool may_pair = ProjectionProduct<V, S>::pairs;
  static constexpr int64_t lanes = gemm_vectors * V::width;  // columns of a panel

  const ProjectedMseJob& job;
  const int64_t k, m;   // features of source and target
  const int64_t depth;  // k, and the ones that meet the bias
  const bool pairs;     // y = a P as products of bf16 pairs, which are exact
  const int64_t words;  // their number in a row
  const int64_t k_padded, m_padded;
  const int64_t source_row, tile_row, gradient_row, word_row;  // strides in the scratch memory
  const bool back;                                             // the gradient of the source is wanted
  const bool collects;                                         // those of projection or bias are
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
        source_row(spread(depth)),
        tile_row(spread(m_padded)),
        gradient_row(spread(k_padded)),
        word_row(spread(words)),
        back(job_.grad_source.data != nullptr),
        collects(job_.grad_projection || job_.grad_bias) {
    rows = collects && depth * m_padded * int64_t(sizeof(F)) > accumulators_limit ? large_block_rows : block_rows;
    const int64_t blocks = (job.count + rows - 1) / rows;
    blocks_of_chunk = larger(1, (blocks + most_chunks - 1) / most_chunks);
  }

  int64_t chunks() const { return (job.count + rows * blocks_of_chunk - 1) / (rows * blocks_of_chunk); }

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
  char* at;
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += round_up(count * int64_t(sizeof(T)), 64);
    return taken;
  }
  size_t bytes() const { return reinterpret_cast<size_t>(at); }  // of one that began at null
};

// The projection: panels of `lanes` columns [depth, lanes] for y = a P, and of its transpose [m, lanes] for d P^T.
template <class V, class S>
struct Packed {
  using F = typename V::scalar;
  using Word = typename Shape<V, S>::Pairs::Word;
  F* forward = nullptr;
  Word* forward_words = nullptr;
  F* backward = nullptr;
  size_t bytes;

  Packed(const Shape<V, S>& s, void* memory) {
    Arena arena{static_cast<char*>(memory)};
    const auto panels = [&](int64_t columns) { return round_up(columns, s.lanes); };
    if (s.pairs)
      forward_words = arena.template take<Word>(panels(s.m) * s.words);
    else
      forward = arena.template take<F>(panels(s.m) * s.depth);
    if (s.back) backward = arena.template take<F>(panels(s.k) * s.m);
    bytes = arena.bytes();
  }
};

template <class V, class S, class P>
void pack_of(const Shape<V, S>& s, void* memory) {
  using F = typename V::scalar;
  const Packed<V, S> packed(s, memory);
  const P* projection = static_cast<const P*>(s.job.projection);
  const P* bias = static_cast<const P*>(s.job.bias);
  const auto row = [&](int64_t i) { return i < s.k ? projection + i * s.m : bias; };
  for (int64_t p = 0; p < s.m; p += s.lanes) {
    const int64_t columns = smaller(s.lanes, s.m - p);
    if constexpr (Shape<V, S>::may_pair && same<P, bf16>) {
      auto* out = packed.forward_words + p * s.words;
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
  if (!s.back) return;
  for (int64_t p = 0; p < s.k; p += s.lanes) {
    F* out = packed.backward + p * s.m;
    const int64_t columns = smaller(s.lanes, s.k - p);
    for (int64_t c = 0; c < s.lanes; ++c)
      for (int64_t j = 0; j < s.m; ++j) out[j * s.lanes + c] = c < columns ? F(widen(row(p + c)[j])) : F(0);
  }
}

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

// Lengths as factors: 1 / |row|, and 0 for a row without a direction.
PYD_INLINE double inverse_length(double squares) {
  const double length = __builtin_sqrt(squares);
  return length <= shortest ? 0 : 1 / length;  // NaN stays
}

template <class V, class S>
struct Blocks {
  using F = typename V::scalar;
  using Plain = Multiply<V>;
  using Pairs = typename Shape<V, S>::Pairs;
  using Word = typename Pairs::Word;

  const Shape<V, S> s;
  const ProjectedMseJob& job;
  F *source, *tile, *gradient;
  Word* words;
  size_t bytes;

  Blocks(const ProjectedMseJob& job_, void* memory) : s(job_), job(job_) {
    Arena arena{static_cast<char*>(memory)};
    source = arena.template take<F>(s.rows * s.source_row);
    tile = arena.template take<F>(s.rows * s.tile_row);
    gradient = arena.template take<F>(s.back ? s.rows * s.gradient_row : 0);
    words = arena.template take<Word>(s.pairs ? s.rows * s.word_row : 0);
    bytes = arena.bytes();
  }

  int64_t position(int64_t row) const { return job.rows == nullptr ? row : job.rows[row]; }
  static S* row_of(const Matrix& matrix, int64_t position) {
    return static_cast<S*>(matrix.data) + position * matrix.stride;
  }

  // Source rows as numbers, and as pairs, with their column of ones.
  void load_source(int64_t begin, int64_t count) {
    for (int64_t r = 0; r < count; ++r) {
      const S* in = row_of(job.source, position(begin + r));
      F* out = source + r * s.source_row;
      vectors_of<V>(s.k, [&](int64_t i, int64_t n) PYD_INLINE_LAMBDA { store(load<V>(in + i, n), out + i, n); });
      if (job.bias != nullptr) out[s.k] = 1;
      if constexpr (Shape<V, S>::may_pair) {
        if (!s.pairs) continue;
        S* bits = reinterpret_cast<S*>(words + r * s.word_row);
        bits[2 * s.words - 1] = S{};  // where the last pair is only half a pair
        __builtin_memcpy(bits, in, s.k * sizeof(S));
        if (job.bias != nullptr) narrow(1.0f, bits[s.k]);
      }
    }
  }

  void project(int64_t count, const Packed<V, S>& packed) {
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

  double block(int64_t begin, int64_t count, const Packed<V, S>& packed, F* partial, bool more) {
    load_source(begin, count);
    project(count, packed);
    double value = 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = position(begin + r);
      const F weight = job.row_weights == nullptr ? F(1) : static_cast<const F*>(job.row_weights)[at];
      S* grad_target = job.grad_target.data == nullptr ? nullptr : row_of(job.grad_target, at);
      F* y = tile + r * s.tile_row;
      const S* target = row_of(job.target, at);
      const double squares =
          job.normalize ? unit_difference(y, target, weight, grad_target) : difference(y, target, weight, grad_target);
      if (job.row_loss != nullptr) static_cast<F*>(job.row_loss)[at] = static_cast<F>(squares / double(s.m));
      value += squares;
    }
    if (s.back) {
      for (int64_t p = 0; p < s.k; p += s.lanes)
        gemm<Plain>(count, smaller(s.lanes, s.k_padded - p), s.m, tile, s.tile_row, 1, packed.backward + p * s.m,
                    s.lanes, gradient + p, s.gradient_row, false);
      const V scale = V::all(static_cast<F>(job.scale));
      for (int64_t r = 0; r < count; ++r) {
        S* out = row_of(job.grad_source, position(begin + r));
        const F* in = gradient + r * s.gradient_row;
        vectors_of<V>(s.k, [&](int64_t i, int64_t n) PYD_INLINE_LAMBDA { store(V::load(in + i) * scale, out + i, n); });
      }
    }
    if (s.collects) {
      const int64_t first = s.first_row();
      gemm<Plain>(s.last_row() - first, s.m_padded, count, source + first, 1, s.source_row, tile, s.tile_row,
                  partial + first * s.m_padded, s.m_padded, more);
    }
    return value;
  }
};

// Calls f<V, S>() for the job's dtype.
template <class Function>
PYD_INLINE auto with_types(const ProjectedMseJob& job, Function f) {
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

size_t packed_bytes(const ProjectedMseJob& job) {
  return with_types(job, [&]<class V, class S>() { return Packed<V, S>(Shape<V, S>(job), nullptr).bytes; });
}

void pack(const ProjectedMseJob& job, void* packed) {
  with_types(job, [&]<class V, class S>() {
    const Shape<V, S> s(job);
    if constexpr (!same<S, double> && !same<S, float>) {
      if (job.projection_dtype == Dtype::f32) return pack_of<V, S, float>(s, packed);
    }
    pack_of<V, S, S>(s, packed);
  });
}

int64_t chunks(const ProjectedMseJob& job) {
  return with_types(job, [&]<class V, class S>() { return Shape<V, S>(job).chunks(); });
}

size_t scratch_bytes(const ProjectedMseJob& job) {
  return with_types(job, [&]<class V, class S>() { return Blocks<V, S>(job, nullptr).bytes; });
}

size_t partial_bytes(const ProjectedMseJob& job) {
  return with_types(job, [&]<class V, class S>() {
    const Shape<V, S> s(job);
    return s.collects ? static_cast<size_t>(s.depth * s.m_padded) * sizeof(typename V::scalar) : 0;
  });
}

double chunk(const ProjectedMseJob& job, const void* packed, int64_t chunk, void* partial, void* scratch) {
  return with_types(job, [&]<class V, class S>() {
    Blocks<V, S> blocks(job, scratch);
    const Shape<V, S>& s = blocks.s;
    const Packed<V, S> projection(s, const_cast<void*>(packed));
    double value = 0;
    for (int64_t block = 0; block < s.blocks_of_chunk; ++block) {
      const int64_t begin = (chunk * s.blocks_of_chunk + block) * s.rows;
      if (begin >= job.count) break;
      value += blocks.block(begin, smaller(s.rows, job.count - begin), projection,
                            static_cast<typename V::scalar*>(partial), block > 0);
    }
    return value;
  });
}

void add(const ProjectedMseJob& job, void* total, const void* partial) {
  with_types(job, [&]<class V, class S>() {
    using F = typename V::scalar;
    const Shape<V, S> s(job);
    F* to = static_cast<F*>(total);
    const F* from = static_cast<const F*>(partial);
    for (int64_t i = s.first_row() * s.m_padded; i < s.last_row() * s.m_padded; i += V::width)
      (V::load(to + i) + V::load(from + i)).store(to + i);
  });
}

void finish(const ProjectedMseJob& job, const void* total, double factor, void* projection, void* bias) {
  with_types(job, [&]<class V, class S>() {
    using F = typename V::scalar;
    const Shape<V, S> s(job);
    const V scale = V::all(static_cast<F>(factor));
    for (int64_t i = s.first_row(); i < s.last_row(); ++i) {
      const F* in = static_cast<const F*>(total) + i * s.m_padded;
      F* out = i < s.k ? static_cast<F*>(projection) + i * s.m : static_cast<F*>(bias);
      vectors_of<V>(s.m, [&](int64_t j, int64_t n) PYD_INLINE_LAMBDA { store(V::load(in + j) * scale, out + j, n); });
    }
  });
}

}  // namespace

extern const ProjectedMseKernel projected_mse = {packed_bytes,  pack,  chunks, scratch_bytes,
                                                 partial_bytes, chunk, add,    finish};

}  // namespace pyd::PYD_ISA
