// SPDX-License-Identifier: Apache-2.0
// Launches of projected_mse: which types, how rows are shared out, how much shared memory.
#include "projected_mse.h"

#include <algorithm>

#include "launch.cuh"
#include "projected_mse.cuh"

namespace pyd {
namespace {

constexpr int end_threads = 256;

// How many features of the source a block has at a time.
cudaError_t find_features(const ProjectedMseCuda& p, int& features) {
  int most_shared = 0;
  if (const auto error = find_most_shared(most_shared)) return error;
  if (p.projection_dtype == Dtype::f32)
    features = single_features;
  else
    features =
        p.source.size > fewer_features && projected_shared<__half, __half, most_features>(true).bytes <= most_shared
            ? most_features
            : fewer_features;
  return cudaSuccess;
}

// What kernels hand to each other, in one piece of memory.
struct Workspace {
  double *factors, *squares;
  float *directions, *parts;
  int64_t share, shares, bytes;

  Workspace(const ProjectedMseCuda& p, int features) {
    const int64_t k = p.source.size, m = p.target.size;
    const bool wanted = p.grad_projection != nullptr || p.grad_bias != nullptr;
    // As many blocks as keep a large device busy, and as many rows to a share whatever is asked for: the same bits.
    const int64_t tiles = blocks_of(m, tile_columns) * blocks_of(k, features), busy = 160 * blocks_at_once(features);
    share = std::max<int64_t>(1, blocks_of(blocks_of(p.rows, tile_rows), blocks_of(busy, tiles))) * tile_rows;
    shares = wanted ? blocks_of(p.rows, share) : 0;
    Carver carver{static_cast<char*>(p.workspace)};
    carver.take(factors, 3);
    carver.take(squares, blocks_of(p.rows, tile_rows));
    carver.take(directions, p.normalize ? 3 * p.rows : 0);
    carver.take(parts, shares * (k + 1) * m);
    bytes = carver.bytes;
  }
};

template <class T, class S, class W, int F>
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

  constexpr int64_t over_rows = projected_shared<T, S, F>(false).bytes;
  constexpr int64_t over_projection = projected_shared<T, S, F>(true).bytes;
  const auto blocks = static_cast<unsigned>(blocks_of(p.rows, tile_rows));
  const auto features = static_cast<unsigned>(blocks_of(p.source.size, F));
  if (blocks > 0) {
    if (p.normalize)
      if (const auto error = launch(row_directions<T, S, W, F>, dim3(blocks), projected_threads, over_rows, stream, a))
        return error;
    const unsigned parts = p.grad_source.data != nullptr ? features : 1;
    if (const auto error =
            launch(projected_mse_rows<T, S, W, F>, dim3(blocks, parts), projected_threads, over_rows, stream, a))
      return error;
    if (a.with_projection || a.with_bias) {
      const dim3 grid(static_cast<unsigned>(blocks_of(p.target.size, tile_columns)), a.with_projection ? features : 1,
                      static_cast<unsigned>(w.shares));
      if (const auto error =
              launch(projected_mse_projection<T, S, W, F>, grid, projected_threads, over_projection, stream, a))
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

template <class S>
cudaError_t launch_half(const ProjectedMseCuda& p, const Workspace& w, int features, cudaStream_t stream) {
  if (p.projection_dtype == Dtype::f32) return launch_all<float, S, float, single_features>(p, w, stream);
  return features == most_features ? launch_all<S, S, S, most_features>(p, w, stream)
                                   : launch_all<S, S, S, fewer_features>(p, w, stream);
}

}  // namespace

int projected_mse_workspace(const ProjectedMseCuda& p, int64_t& bytes) {
  int features = 0;
  if (const auto error = find_features(p, features)) return error;
  bytes = Workspace(p, features).bytes;
  return cudaSuccess;
}

int launch_projected_mse(const ProjectedMseCuda& p, void* stream_handle) {
  int features = 0;
  if (const auto error = find_features(p, features)) return error;
  const Workspace w(p, features);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  PYD_LAUNCH(projected_mse_factors, 1, 1024, (reduction_bytes<double, 1>), stream, p.mask, p.rows, p.num_items,
             p.target.size, p.mean, p.by_row, p.dtype == Dtype::f16, w.factors, p.gradient_scale);
  if (const auto error = cudaGetLastError()) return error;
  switch (p.dtype) {
    case Dtype::f32:
      return launch_all<float, float, float, single_features>(p, w, stream);
    case Dtype::bf16:
      return launch_half<__nv_bfloat16>(p, w, features, stream);
    case Dtype::f16:
      return launch_half<__half>(p, w, features, stream);
    case Dtype::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyd
