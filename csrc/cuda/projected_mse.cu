// SPDX-License-Identifier: Apache-2.0
// Launches of projected_mse: which types, how rows are shared out, how much shared memory.
#include "projected_mse.h"

#include <algorithm>

#include "launch.cuh"
#include "projected_mse.cuh"

namespace pyd {
namespace {

constexpr int64_t busy_blocks = 512;  // as many as keep a large device busy
constexpr int end_threads = 256;

// What kernels hand to each other, in one piece of memory.
struct Workspace {
  double *factors, *squares;
  float *directions, *parts;
  int64_t share, shares, bytes;

  explicit Workspace(const ProjectedMseCuda& p) {
    const int64_t k = p.source.size, m = p.target.size;
    const bool wanted = p.grad_projection != nullptr || p.grad_bias != nullptr;
    // As many rows to a share whatever is asked for: the same bits.
    const int64_t tiles = blocks_of(m, tile_columns) * blocks_of(k, tile_features);
    share = std::max<int64_t>(1, blocks_of(blocks_of(p.rows, tile_rows), blocks_of(busy_blocks, tiles))) * tile_rows;
    shares = wanted ? blocks_of(p.rows, share) : 0;
    Carver carver{static_cast<char*>(p.workspace)};
    carver.take(factors, 3);
    carver.take(squares, blocks_of(p.rows, tile_rows));
    carver.take(directions, p.normalize ? 3 * p.rows : 0);
    carver.take(parts, shares * (k + 1) * m);
    bytes = carver.bytes;
  }
};

template <class T, class S, class W>
cudaError_t launch_all(const ProjectedMseCuda& p, const Workspace& w, cudaStream_t stream) {
  const auto vectors = [](const MatrixCuda& m, int64_t element) {
    return reinterpret_cast<uintptr_t>(m.data) % vector_bytes == 0 && m.size * element % vector_bytes == 0 &&
           m.stride * element % vector_bytes == 0;
  };
  const MatrixCuda projection{const_cast<void*>(p.projection), p.target.size, p.target.size};
  const MatrixCuda& gradient = p.grad_source.data != nullptr ? p.grad_source : p.grad_target;
  ProjectedRows a{};
  a.rows = p.rows;
  a.source = p.source;
  a.target = p.target;
  a.source_vectors = vectors(p.source, sizeof(S));
  a.target_vectors = vectors(p.target, sizeof(S));
  a.projection_vectors = vectors(projection, sizeof(W));
  a.gradient_vectors = vectors(gradient, sizeof(S));
  a.projection = p.projection;
  a.bias = p.bias;
  a.mask = p.mask;
  a.row_weights = p.row_weights;
  a.directions = p.normalize ? w.directions : nullptr;
  a.factors = w.factors;
  a.grad_source = p.grad_source;
  a.grad_target = p.grad_target;
  a.row_loss = p.row_loss;
  a.squares = w.squares;
  a.parts = w.parts;
  a.share = w.share;
  a.with_projection = p.grad_projection != nullptr;
  a.with_bias = p.grad_bias != nullptr;

  const bool wide = p.source.size > tile_features;
  const int64_t over_rows = projected_shared<T, S>(wide, false).bytes;
  const auto blocks = static_cast<unsigned>(blocks_of(p.rows, tile_rows));
  const auto features = static_cast<unsigned>(blocks_of(p.source.size, tile_features));
  if (blocks > 0) {
    if (p.normalize)
      if (const auto error = launch(row_directions<T, S, W>, dim3(blocks), projected_threads, over_rows, stream, a))
        return error;
    const unsigned parts = p.grad_source.data != nullptr ? features : 1;
    if (const auto error =
            launch(projected_mse_rows<T, S, W>, dim3(blocks, parts), projected_threads, over_rows, stream, a))
      return error;
    if (a.with_projection || a.with_bias) {
      const dim3 grid(static_cast<unsigned>(blocks_of(p.target.size, tile_columns)), a.with_projection ? features : 1,
                      static_cast<unsigned>(w.shares));
      if (const auto error = launch(projected_mse_projection<T, S, W>, grid, projected_threads,
                                    projected_shared<T, S>(wide, true).bytes, stream, a))
        return error;
    }
  }
  const int64_t size = static_cast<int64_t>(p.source.size) * p.target.size;
  const int64_t length = (a.with_projection ? size : 0) + (a.with_bias ? p.target.size : 0);
  const ProjectedEnd end{
      w.squares,     blocks,        w.factors,         p.loss,     w.parts, static_cast<int>(w.shares),
      p.source.size, p.target.size, p.grad_projection, p.grad_bias};
  PYD_LAUNCH(projected_mse_end, static_cast<unsigned>(1 + blocks_of(length, end_threads)), end_threads,
             (reduction_bytes<double, 1>), stream, end);
  return cudaGetLastError();
}

}  // namespace

int64_t projected_mse_workspace(const ProjectedMseCuda& p) { return Workspace(p).bytes; }

int launch_projected_mse(const ProjectedMseCuda& p, void* stream_handle) {
  const Workspace w(p);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  PYD_LAUNCH(projected_mse_factors, 1, 1024, (reduction_bytes<double, 1>), stream, p.mask, p.rows, p.num_items,
             p.target.size, p.mean, p.by_row, p.dtype == Dtype::f16, w.factors, p.gradient_scale);
  if (const auto error = cudaGetLastError()) return error;
  const bool same = p.projection_dtype == p.dtype;
  switch (p.dtype) {
    case Dtype::f32:
      return launch_all<float, float, float>(p, w, stream);
    case Dtype::bf16:
      return same ? launch_all<__nv_bfloat16, __nv_bfloat16, __nv_bfloat16>(p, w, stream)
                  : launch_all<float, __nv_bfloat16, float>(p, w, stream);
    case Dtype::f16:
      return same ? launch_all<float, __half, __half>(p, w, stream) : launch_all<float, __half, float>(p, w, stream);
    case Dtype::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyd
