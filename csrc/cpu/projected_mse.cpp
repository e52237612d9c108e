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

#include "projected_mse_direct.h"
#include "projected_mse_gram.h"
#include "projected_mse_shape.h"
#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

// Calls f<Direct<V, S>>() or f<Gram<V, S>>() for the job's dtype and method.
template <class Function>
PYD_INLINE auto with_blocks(const ProjectedMseJob& job, Function f) {
  const auto of = [&]<class V, class S>() {
    return job.gram ? f.template operator()<V, S, Gram<V, S>>() : f.template operator()<V, S, Direct<V, S>>();
  };
  switch (job.dtype) {
    case Dtype::bf16:
      return of.template operator()<Floats, bf16>();
    case Dtype::f16:
      return of.template operator()<Floats, f16>();
    case Dtype::f64:
      return of.template operator()<Doubles, double>();
    default:
      return of.template operator()<Floats, float>();
  }
}

size_t packed_bytes(const ProjectedMseJob& job) {
  return with_blocks(job,
                     [&]<class V, class S, class B>() { return typename B::Packed(Shape<V, S>(job), nullptr).bytes; });
}

void pack(const ProjectedMseJob& job, void* memory) {
  with_blocks(job, [&]<class V, class S, class B>() {
    const Shape<V, S> s(job);
    const typename B::Packed packed(s, memory);
    if constexpr (sizeof(S) == 2) {
      if (job.projection_dtype == Dtype::f32) return B::template pack<float>(s, packed);
    }
    B::template pack<S>(s, packed);
  });
}

int64_t chunks(const ProjectedMseJob& job) {
  return with_blocks(job, [&]<class V, class S, class B>() { return Shape<V, S>(job).chunks(); });
}

size_t scratch_bytes(const ProjectedMseJob& job) {
  return with_blocks(job, [&]<class V, class S, class B>() { return B(job, nullptr).bytes; });
}

size_t partial_bytes(const ProjectedMseJob& job) {
  return with_blocks(job, [&]<class V, class S, class B>() {
    return static_cast<size_t>(B::partial_size(Shape<V, S>(job))) * sizeof(typename V::scalar);
  });
}

double chunk(const ProjectedMseJob& job, const void* packed, int64_t chunk, void* partial, void* scratch) {
  return with_blocks(job, [&]<class V, class S, class B>() {
    B blocks(job, scratch);
    const Shape<V, S>& s = blocks.s;
    const typename B::Packed projection(s, const_cast<void*>(packed));
    double value = 0;
    for (int64_t block = 0; block < s.blocks_of_chunk; ++block) {
      const int64_t begin = (chunk * s.blocks_of_chunk + block) * s.rows, end = smaller(begin + s.rows, job.count);
      if (begin >= end) break;
      value += blocks.block(begin, end - begin, projection, static_cast<typename V::scalar*>(partial), block > 0,
                            {s, end, smaller(end + s.rows, job.count)});
    }
    return value;
  });
}

void add(const ProjectedMseJob& job, void* total, const void* partial) {
  with_blocks(job, [&]<class V, class S, class B>() {
    using F = typename V::scalar;
    const Shape<V, S> s(job);
    F* to = static_cast<F*>(total);
    const F* from = static_cast<const F*>(partial);
    const int64_t begin = job.gram ? 0 : s.first_row() * s.m_padded;
    const int64_t end = job.gram ? B::partial_size(s) : s.last_row() * s.m_padded;
    for (int64_t i = begin; i < end; i += V::width) (V::load(to + i) + V::load(from + i)).store(to + i);
  });
}

double finish(const ProjectedMseJob& job, const void* packed, void* total, double factor, void* projection,
              void* bias) {
  return with_blocks(job, [&]<class V, class S, class B>() {
    using F = typename V::scalar;
    const Shape<V, S> s(job);
    const double value = B::finish(s, typename B::Packed(s, const_cast<void*>(packed)), static_cast<F*>(total));
    const V scale = V::all(static_cast<F>(factor));
    for (int64_t i = s.first_row(); i < s.last_row(); ++i) {
      const F* in = static_cast<const F*>(total) + i * s.m_padded;
      F* out = i < s.k ? static_cast<F*>(projection) + i * s.m : static_cast<F*>(bias);
      vectors_of<V>(s.m, [&](int64_t j, int64_t n) PYD_INLINE_LAMBDA { store(V::load(in + j) * scale, out + j, n); });
    }
    return value;
  });
}

}  // namespace

extern const ProjectedMseKernel projected_mse = {packed_bytes,  pack,  chunks, scratch_bytes,
                                                 partial_bytes, chunk, add,    finish};

}  // namespace pyd::PYD_ISA
