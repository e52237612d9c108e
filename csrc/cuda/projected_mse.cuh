// SPDX-License-Identifier: Apache-2.0
// Projected mean squared error on the GPU: value and gradients without the projected rows in memory.
//
// Rows of the source x [R, k] are projected, y = x P + b [R, m], and compared with rows of the target t (Jiao et al.
// 2019, arXiv 1909.10351, equation 8). A row's value is |d|^2 / m with d = y - t, and the gradients are, times 2 / m,
//   to x: d P^T    to t: -d    to P: x^T d    to b: the sum of d over rows.
// With u = y / |y|, v = t / |t| and c = <u, v> (normalize), d = u - v, and (c u - v) / |y| stands for d in the
// gradients, (c v - u) / |t| for -d.
//
// A block of threads makes y again, `tile_rows` by `tile_columns` at a time: projected_mse_rows walks the features
// under a block of rows, for their values and the gradient of their side; projected_mse_projection walks the rows over
// a tile of P, for its gradient. Rows are shared out to several blocks there, whose parts are added in a fixed order at
// the end, as are the values: the same bits every time.
//
// Products of bf16 run on tensor cores: x P is exact up to its sum, and d enters the other two as the sum of two
// numbers of bf16. All others run in fp32: a difference in fp16 may be too small for its own second half.
#pragma once

#include "matrix.cuh"
#include "projected_mse.h"
#include "team.cuh"

namespace pyd {

constexpr int tile_rows = 64;
constexpr int tile_columns = 32;
constexpr int tile_features = 64;
constexpr int projected_threads = tile_rows / 16 * warp_size;
constexpr int column_tiles = tile_columns / 8;
constexpr int feature_tiles = tile_features / 8;
constexpr float shortest = 1e-12f;  // length of a row below which it has no direction

// What a block is told; S is how sides are stored, W how the projection is.
struct ProjectedRows {
  int64_t rows;
  MatrixCuda source, target;
  bool source_vectors, target_vectors, projection_vectors, gradient_vectors;
  const void *projection, *bias;
  const bool* mask;
  const float* row_weights;
  float* directions;  // [R, 3]: 1 / |y|, 1 / |t|, c; null where rows are not normalised
  const double* factors;
  MatrixCuda grad_source, grad_target;
  float* row_loss;
  double* squares;  // [blocks]
  float* parts;     // [shares, k + 1, m]
  int64_t share;    // rows
  bool with_projection, with_bias;
};

// One block. What depends on the number of valid rows: the factors of the value, of the gradient of a side, and of
// those of projection and bias, and what backward applies to the first of these gradients.
__global__ void __launch_bounds__(1024)
    projected_mse_factors(const bool* mask, int64_t rows, const double* num_items, int m, bool mean, bool by_row,
                          bool half_precision, double* factors, float* gradient_scale) {
  PYD_DYNAMIC_SHARED(shared);
  double count[1] = {0};
  if (mean && num_items == nullptr) {
    for (int64_t r = threadIdx.x; r < rows; r += blockDim.x) count[0] += mask == nullptr || mask[r];
    reduce<Sum>(team_of(blockDim.x), count, reinterpret_cast<double*>(shared));
  }
  if (threadIdx.x != 0) return;
  double denominator = mean || by_row ? m : 1;
  if (mean) denominator *= num_items != nullptr ? *num_items : fmax(count[0], 1.0);
  const double later = left_to_backward(denominator, mean && half_precision);
  factors[0] = 1 / denominator;
  factors[1] = 2 / (denominator * later);
  factors[2] = 2 / denominator;
  *gradient_scale = static_cast<float>(later);
}

// --------------------------------------------------------------------------- tiles

// Where things lie in a block's shared memory, in bytes. A source whose features fit at once stays there, with its part
// of the projection; else both are walked through.
struct ProjectedShared {
  int slots, valid, spread, source, projection, target, part, difference;
  int bytes;
};

template <class T, class S>
__host__ __device__ constexpr ProjectedShared projected_shared(bool wide, bool over_projection) {
  ProjectedShared s{};
  int at = 0;
  const auto take = [&at](int bytes) {
    const int begin = at;
    at += (bytes + vector_bytes - 1) / vector_bytes * vector_bytes;
    return begin;
  };
  constexpr int of_source = tile_rows * pitch_of<T>(tile_features) * static_cast<int>(sizeof(T));
  constexpr int of_projection = tile_features * pitch_of<T>(tile_columns) * static_cast<int>(sizeof(T));
  constexpr int of_target = tile_rows * pitch_of<S>(tile_columns) * static_cast<int>(sizeof(S));
  constexpr int of_difference = tile_rows * pitch_of<T>(tile_columns) * static_cast<int>(sizeof(T));
  s.slots = take(over_projection ? tile_rows / 16 * tile_columns * 4 : reduction_bytes<double, 1>);
  s.valid = take(tile_rows * 4);
  s.spread = take(over_projection ? 0 : tile_rows / 16 * spread_bytes<T, column_tiles>);
  s.source = take(of_source);
  s.projection = take(of_projection);
  s.target = take(of_target);
  s.part = take(!wide ? 0 : over_projection ? of_source : of_projection);
  s.difference = take(!over_projection ? 0 : sizeof(T) == 2 ? 2 * of_difference : of_difference);
  s.bytes = at;
  return s;
}

// Copies a tile of a matrix to shared memory, [rows, columns], as numbers of type T; zero where there are none. Rows
// that `valid` does not name are not read.
template <class T, class S>
__device__ __forceinline__ void fetch_tile(T* tile, int pitch, const S* data, int64_t stride, bool vectors,
                                           const int* valid, int64_t row, int64_t rows, int column, int columns,
                                           int tile_height, int tile_width) {
  constexpr int width = vector_bytes / sizeof(T);
  const int pieces = tile_width / width;
  for (int i = threadIdx.x; i < tile_height * pieces; i += projected_threads) {
    const int r = i / pieces, c = (i - r * pieces) * width;
    const bool there = row + r < rows && (valid == nullptr || valid[r] != 0);
    const int given = there ? max(0, min(width, columns - column - c)) : 0;
    const S* const from = data + (given > 0 ? (row + r) * stride + column + c : 0);
    T* const to = tile + r * pitch + c;
    if constexpr (std::is_same_v<T, S>) {
      if (vectors) {
        copy_16(to, from, given * static_cast<int>(sizeof(T)));
        continue;
      }
    }
#pragma unroll 1
    for (int k = 0; k < width; ++k) narrow(k < given ? widen(from[k]) : 0.0f, to[k]);
  }
}

// The rows of a block and what its threads know of their two. T is the type of products.
template <class T, class S, class W>
struct ProjectedBlock {
  const ProjectedRows& a;
  const ProjectedShared& layout;
  unsigned char* shared;
  int64_t begin, end;  // rows

  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }
  __device__ __forceinline__ bool wide() const { return a.source.size > tile_features; }
  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / warp_size; }
  // In the block, of the upper of a thread's rows; the other is 8 below.
  __device__ __forceinline__ int row() const { return warp() * 16 + static_cast<int>(threadIdx.x) % warp_size / 4; }
  __device__ __forceinline__ int column(int n, int i) const {
    return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
  }
  __device__ __forceinline__ bool valid(int i) const { return at<int>(layout.valid)[row() + i / 2 * 8] != 0; }

  __device__ __forceinline__ void find_valid() const {
    if (threadIdx.x < tile_rows) {
      const int64_t r = begin + threadIdx.x;
      at<int>(layout.valid)[threadIdx.x] = r < end && (a.mask == nullptr || a.mask[r]);
    }
    __syncthreads();
  }

  __device__ __forceinline__ void fetch_source(T* tile, int first) const {
    fetch_tile<T, S>(tile, pitch_of<T>(tile_features), static_cast<const S*>(a.source.data), a.source.stride,
                     a.source_vectors, at<int>(layout.valid), begin, end, first, a.source.size, tile_rows,
                     tile_features);
  }
  __device__ __forceinline__ void fetch_projection(T* tile, int first, int column) const {
    fetch_tile<T, W>(tile, pitch_of<T>(tile_columns), static_cast<const W*>(a.projection), a.target.size,
                     a.projection_vectors, nullptr, first, a.source.size, column, a.target.size, tile_features,
                     tile_columns);
  }
  __device__ __forceinline__ void fetch_target(int column) const {
    fetch_tile<S, S>(at<S>(layout.target), pitch_of<S>(tile_columns), static_cast<const S*>(a.target.data),
                     a.target.stride, a.target_vectors, at<int>(layout.valid), begin, end, column, a.target.size,
                     tile_rows, tile_columns);
  }

  // A tile of y, and of the target; 0 where a row does not count and beyond the features. A source that is not wide, or
  // that part of the projection, is in shared memory before (`source_there`, `projection_there`) and in any case after.
  __device__ __forceinline__ void project(int first_column, bool source_there, bool projection_there,
                                          float (&y)[column_tiles][4], float (&t)[column_tiles][4]) const {
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[n][i] = 0;
    }
    T *const source = at<T>(layout.source), *const projection = at<T>(layout.projection);
    for (int first = 0; first < a.source.size; first += tile_features) {
      __syncthreads();
      if (!source_there || wide()) fetch_source(source, first);
      if (!projection_there || wide()) fetch_projection(projection, first, first_column);
      if (first == 0) fetch_target(first_column);
      wait_for_copies();
      __syncthreads();
      add_product_nn<T>(y, source + warp() * 16 * pitch_of<T>(tile_features), pitch_of<T>(tile_features), projection,
                        pitch_of<T>(tile_columns), tile_features);
    }
    const S* const target = at<S>(layout.target);
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = first_column + column(n, i);
        t[n][i] = widen(target[(row() + i / 2 * 8) * pitch_of<S>(tile_columns) + column(n, i)]);
        const bool counts = c < a.target.size && valid(i);
        if (counts && a.bias != nullptr) y[n][i] += widen(static_cast<const W*>(a.bias)[c]);
        if (!counts) y[n][i] = 0;
      }
    }
  }
};

// What `row_directions` found of a row; nothing where rows are not normalised.
struct Direction {
  float inverse_y = 1, inverse_t = 1, cosine = 1;

  // The difference d, and half the gradient of |d|^2 with respect to y and to t.
  __device__ __forceinline__ void slopes(float y, float t, bool normalize, float& d, float& of_y, float& of_t) const {
    if (!normalize) {
      d = of_y = y - t;
      of_t = t - y;
      return;
    }
    const float u = y * inverse_y, v = t * inverse_t;
    d = u - v;
    of_y = (cosine * u - v) * inverse_y;
    of_t = (cosine * v - u) * inverse_t;
  }
};

__device__ __forceinline__ Direction direction_of(const float* directions, int64_t row, bool valid) {
  if (directions == nullptr) return {};
  if (!valid) return {0, 0, 0};
  return {directions[3 * row], directions[3 * row + 1], directions[3 * row + 2]};
}

// 1 / length, and 0 for a row without a direction; NaN stays.
__device__ __forceinline__ float inverse_length(float squares) {
  const float length = sqrtf(squares);
  return length <= shortest ? 0.0f : 1 / length;
}

// --------------------------------------------------------------------------- rows

template <class T, class S, class W>
__global__ void __launch_bounds__(projected_threads, 4) row_directions(const __grid_constant__ ProjectedRows a) {
  PYD_DYNAMIC_SHARED(shared);
  const ProjectedShared layout = projected_shared<T, S>(a.source.size > tile_features, false);
  const ProjectedBlock<T, S, W> block{a, layout, shared, int64_t{blockIdx.x} * tile_rows, a.rows};
  block.find_valid();
  float sums[2][3] = {};
  for (int first = 0; first < a.target.size; first += tile_columns) {
    float y[column_tiles][4], t[column_tiles][4];
    block.project(first, first > 0, false, y, t);
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i / 2][0] = fmaf(y[n][i], y[n][i], sums[i / 2][0]);
        sums[i / 2][1] = fmaf(t[n][i], t[n][i], sums[i / 2][1]);
        sums[i / 2][2] = fmaf(y[n][i], t[n][i], sums[i / 2][2]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    reduce_within_warp<Sum>(0xffffffffu, 4, sums[half]);
    if (threadIdx.x % 4 != 0 || !block.valid(2 * half)) continue;
    const float inverse_y = inverse_length(sums[half][0]), inverse_t = inverse_length(sums[half][1]);
    float* const to = a.directions + 3 * (block.begin + block.row() + 8 * half);
    to[0] = inverse_y;
    to[1] = inverse_t;
    to[2] = sums[half][2] * inverse_y * inverse_t;
  }
}

// Writes a warp's [16, width] numbers, which lie in its own rows of a tile, by whole vectors where they are aligned.
template <class S>
__device__ __forceinline__ void store_rows(const S* tile, int pitch, int tile_width, const MatrixCuda& to, bool vectors,
                                           int64_t row, int64_t rows, int column) {
  constexpr int width = vector_bytes / sizeof(S);
  const int pieces = tile_width / width;
  for (int i = threadIdx.x % warp_size; i < 16 * pieces; i += warp_size) {
    const int r = i / pieces, c = (i - r * pieces) * width, count = min(width, to.size - column - c);
    if (row + r >= rows || count <= 0) continue;
    const S* const from = tile + r * pitch + c;
    S* const out = static_cast<S*>(to.data) + (row + r) * to.stride + column + c;
    if (vectors) {
      store(load<width>(from), out);
    } else {
#pragma unroll 1
      for (int k = 0; k < count; ++k) out[k] = from[k];
    }
  }
}

// Values of a block of rows, one by one or their sum, and the gradient of their source (tile_features of its features)
// or of their target.
template <class T, class S, class W>
__global__ void __launch_bounds__(projected_threads, 3) projected_mse_rows(const __grid_constant__ ProjectedRows a) {
  PYD_DYNAMIC_SHARED(shared);
  const bool wide = a.source.size > tile_features;
  const ProjectedShared layout = projected_shared<T, S>(wide, false);
  const ProjectedBlock<T, S, W> block{a, layout, shared, int64_t{blockIdx.x} * tile_rows, a.rows};
  block.find_valid();
  const int part = static_cast<int>(blockIdx.y) * tile_features;
  float* const spread = reinterpret_cast<float*>(shared + layout.spread + block.warp() * spread_bytes<T, column_tiles>);
  Direction direction[2];
  float factor[2], value[2] = {0, 0};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = block.begin + block.row() + 8 * half;
    const bool valid = block.valid(2 * half);
    direction[half] = direction_of(a.directions, r, valid);
    factor[half] = static_cast<float>(a.factors[1]);
    if (a.row_weights != nullptr) factor[half] *= valid ? a.row_weights[r] : 0.0f;
  }
  float total[feature_tiles][4];
#pragma unroll
  for (int m = 0; m < feature_tiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[m][i] = 0;
  }
  for (int first = 0; first < a.target.size; first += tile_columns) {
    float y[column_tiles][4], t[column_tiles][4];
    block.project(first, first > 0, false, y, t);
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float d, of_y, of_t;
        direction[i / 2].slopes(y[n][i], t[n][i], a.directions != nullptr, d, of_y, of_t);
        value[i / 2] = fmaf(d, d, value[i / 2]);
        y[n][i] = of_y;
        t[n][i] = of_t;
      }
    }
    if (a.grad_source.data != nullptr) {
      const T* projection = block.template at<T>(layout.projection);
      if (wide) {
        T* const tile = block.template at<T>(layout.part);
        block.fetch_projection(tile, part, first);
        wait_for_copies();
        __syncthreads();
        projection = tile;
      }
      add_product_nt<T>(total, y, projection, pitch_of<T>(tile_columns), spread);
    }
    if (a.grad_target.data != nullptr) {
      // Over the target's own tile, whose elements each thread has read.
      S* const tile = block.template at<S>(layout.target);
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          narrow(block.valid(i) ? t[n][i] * factor[i / 2] : 0.0f,
                 tile[(block.row() + i / 2 * 8) * pitch_of<S>(tile_columns) + block.column(n, i)]);
      }
      __syncwarp();
      store_rows<S>(tile + block.warp() * 16 * pitch_of<S>(tile_columns), pitch_of<S>(tile_columns), tile_columns,
                    a.grad_target, a.gradient_vectors, block.begin + block.warp() * 16, a.rows, first);
    }
  }
  if (a.grad_source.data != nullptr) {
    // The source's tile is not read any more by this warp, whose rows it holds; S needs no more room than T.
    S* const tile =
        reinterpret_cast<S*>(block.template at<T>(layout.source)) + block.warp() * 16 * pitch_of<S>(tile_features);
    __syncthreads();
#pragma unroll
    for (int m = 0; m < feature_tiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        narrow(block.valid(i) ? total[m][i] * factor[i / 2] : 0.0f,
               tile[(block.row() % 16 + i / 2 * 8) * pitch_of<S>(tile_features) + block.column(m, i)]);
    }
    __syncwarp();
    store_rows<S>(tile, pitch_of<S>(tile_features), tile_features, a.grad_source, a.gradient_vectors,
                  block.begin + block.warp() * 16, a.rows, part);
  }
  if (blockIdx.y != 0) return;
  reduce_within_warp<Sum>(0xffffffffu, 4, value);
  double sum[1] = {0};
  if (threadIdx.x % 4 == 0) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = block.begin + block.row() + 8 * half;
      sum[0] += value[half];
      if (a.row_loss != nullptr && r < a.rows) a.row_loss[r] = value[half] * static_cast<float>(a.factors[0]);
    }
  }
  reduce<Sum>(team_of(projected_threads), sum, block.template at<double>(layout.slots));
  if (threadIdx.x == 0) a.squares[blockIdx.x] = sum[0];
}

// --------------------------------------------------------------------------- projection

// A tile of x^T d, and the sum of d, over a share of the rows.
template <class T, class S, class W>
__global__ void __launch_bounds__(projected_threads, 3)
    projected_mse_projection(const __grid_constant__ ProjectedRows a) {
  PYD_DYNAMIC_SHARED(shared);
  const bool wide = a.source.size > tile_features;
  const ProjectedShared layout = projected_shared<T, S>(wide, true);
  const int first = static_cast<int>(blockIdx.x) * tile_columns, part = static_cast<int>(blockIdx.y) * tile_features;
  const int64_t share_begin = int64_t{blockIdx.z} * a.share, share_end = min(share_begin + a.share, a.rows);
  ProjectedBlock<T, S, W> block{a, layout, shared, share_begin, share_end};
  constexpr int pitch = pitch_of<T>(tile_columns);
  float total[column_tiles][4], sums[column_tiles][2];
#pragma unroll
  for (int n = 0; n < column_tiles; ++n) {
    sums[n][0] = sums[n][1] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) total[n][i] = 0;
  }
  for (; block.begin < share_end; block.begin += tile_rows) {
    __syncthreads();
    block.find_valid();
    float y[column_tiles][4], t[column_tiles][4];
    block.project(first, false, block.begin > share_begin, y, t);
    T* const difference = block.template at<T>(layout.difference);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = block.begin + block.row() + 8 * half;
      const bool valid = block.valid(2 * half);
      const Direction direction = direction_of(a.directions, r, valid);
      const float weight = a.row_weights != nullptr && valid ? a.row_weights[r] : 1.0f;
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          float d, of_y, of_t;
          direction.slopes(y[n][i], t[n][i], a.directions != nullptr, d, of_y, of_t);
          of_y *= weight;
          sums[n][i % 2] += of_y;
          T* const to = difference + (block.row() + 8 * half) * pitch + block.column(n, i);
          narrow(of_y, *to);
          if constexpr (sizeof(T) == 2) narrow(of_y - widen(*to), to[tile_rows * pitch]);
        }
      }
    }
    const T* source = block.template at<T>(layout.source);
    if (a.with_projection && wide) {
      T* const tile = block.template at<T>(layout.part);
      block.fetch_source(tile, part);
      wait_for_copies();
      source = tile;
    }
    __syncthreads();
    if (!a.with_projection) continue;
    source += block.warp() * 16;
    if constexpr (sizeof(T) == 2)
      add_product_tn<T>(total, source, pitch_of<T>(tile_features), difference + tile_rows * pitch, pitch, tile_rows);
    add_product_tn<T>(total, source, pitch_of<T>(tile_features), difference, pitch, tile_rows);
  }
  const int m = a.target.size, k = a.source.size;
  float* const parts = a.parts + static_cast<int64_t>(blockIdx.z) * (k + 1) * m;
  if (a.with_projection) {
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int f = part + block.row() + i / 2 * 8, c = first + block.column(n, i);
        if (f < k && c < m) parts[static_cast<int64_t>(f) * m + c] = total[n][i];
      }
    }
  }
  if (!a.with_bias || blockIdx.y != 0) return;
  // Over the rows of a warp, then over warps, in order.
  float* const slots = block.template at<float>(layout.slots);
#pragma unroll
  for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      for (int step = 16; step >= 4; step /= 2) sums[n][e] += __shfl_xor_sync(0xffffffffu, sums[n][e], step);
      if (threadIdx.x % warp_size < 4) slots[block.warp() * tile_columns + block.column(n, e)] = sums[n][e];
    }
  }
  __syncthreads();
  const int c = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= tile_columns || c >= m) return;
  float sum = 0;
  for (int w = 0; w < projected_threads / warp_size; ++w) sum += slots[w * tile_columns + threadIdx.x];
  parts[static_cast<int64_t>(k) * m + c] = sum;
}

// --------------------------------------------------------------------------- the end

struct ProjectedEnd {
  const double* squares;
  int64_t blocks;
  const double* factors;
  float* loss;
  const float* parts;
  int shares, k, m;
  float *grad_projection, *grad_bias;
};

// The loss, by the first block, and the gradients of projection and bias, by the others: the parts of each added in a
// fixed order, times the factor.
__global__ void __launch_bounds__(256) projected_mse_end(const ProjectedEnd a) {
  PYD_DYNAMIC_SHARED(shared);
  if (blockIdx.x == 0) {
    if (a.loss == nullptr) return;
    double total[1] = {0};
    for (int64_t i = threadIdx.x; i < a.blocks; i += blockDim.x) total[0] += a.squares[i];
    reduce<Sum>(team_of(blockDim.x), total, reinterpret_cast<double*>(shared));
    if (threadIdx.x == 0) *a.loss = static_cast<float>(total[0] * a.factors[0]);
    return;
  }
  const int64_t size = static_cast<int64_t>(a.k) * a.m;
  const int64_t i = int64_t{blockIdx.x - 1} * blockDim.x + threadIdx.x + (a.grad_projection == nullptr ? size : 0);
  if (i >= size + a.m || (i >= size && a.grad_bias == nullptr)) return;
  float total = 0;
  for (int s = 0; s < a.shares; ++s) total += a.parts[s * (size + a.m) + i];
  total *= static_cast<float>(a.factors[2]);
  (i < size ? a.grad_projection[i] : a.grad_bias[i - size]) = total;
}

}  // namespace pyd
