// SPDX-License-Identifier: Apache-2.0
// Projected mean squared error on the GPU: value and gradients without the projected rows in memory.
//
// Rows of the source x [R, k] are projected, y = x P + b [R, m], and compared with rows of the target t (Jiao et al.
// 2019, arXiv 1909.10351, equation 8). A row's value is |d|^2 / m with d = y - t, and the gradients are, times 2 / m,
//   to x: d P^T    to t: -d    to P: x^T d    to b: the sum of d over rows.
// With u = y / |y|, v = t / |t| and c = <u, v> (normalize), d = u - v, and (c u - v) / |y| stands for d in the
// gradients, (c v - u) / |t| for -d.
//
// A block of threads makes y again, `tile_rows` by `tile_columns` at a time: projected_mse_rows walks the columns of y
// under a block of rows, for their values and the gradient of their side; projected_mse_projection walks the rows over
// `tile_columns` columns of P, for its gradient. Both have up to F features of the source in shared memory at a time,
// and a block makes that many of the gradient: y is made once by each kernel where all features fit, else once for each
// part of them. The tiles of the next step are fetched while this one computes. Rows are shared out to several blocks
// of projected_mse_projection, whose parts are added in a fixed order at the end, as are the values: the same bits
// every time.
//
// Products of half precision run on tensor cores: x P is exact up to its sum, and d enters the other two as the sum of
// two such numbers. fp16 has no range for that: there a power of two brings each row, or column, of d to the size of 1.
#pragma once

#include "matrix.cuh"
#include "projected_mse.h"
#include "team.cuh"

namespace pyd {

constexpr int tile_rows = 64;
constexpr int tile_columns = 32;
constexpr int projected_threads = 256;
constexpr int row_groups = tile_rows / 16;                                                 // each of 16 rows
constexpr int warp_columns = tile_columns / (projected_threads / warp_size / row_groups);  // of y that a warp makes
constexpr int column_tiles = warp_columns / 8;
// Features of the source that a block has at a time, in half precision: many where a block may have the shared memory
// for it; in fp32.
constexpr int most_features = 384, fewer_features = 128, single_features = 96;
constexpr int blocks_at_once(int features) { return features > fewer_features ? 1 : 2; }
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

// Where things lie in a block's shared memory, in bytes. Of what changes from step to step there are two: the
// projection and the target over rows, the source and the target over the projection.
struct ProjectedShared {
  int slots, largest, source, projection, target, difference;
  int one_source, one_projection, one_target, one_difference;
  int bytes;
};

template <class T, class S, int F>
__host__ __device__ constexpr ProjectedShared projected_shared(bool over_projection) {
  ProjectedShared s{};
  int at = 0;
  const auto take = [&at](int bytes) {
    const int begin = at;
    at += (bytes + vector_bytes - 1) / vector_bytes * vector_bytes;
    return begin;
  };
  s.one_source = tile_rows * pitch_of<T>(F) * static_cast<int>(sizeof(T));
  s.one_projection = F * pitch_of<T>(tile_columns) * static_cast<int>(sizeof(T));
  s.one_target = tile_rows * pitch_of<S>(tile_columns) * static_cast<int>(sizeof(S));
  s.one_difference = tile_rows * pitch_of<T>(tile_columns) * static_cast<int>(sizeof(T));
  s.slots = take(over_projection ? row_groups * tile_columns * 4 : reduction_bytes<double, 1>);
  s.largest = take(std::is_same_v<T, __half> ? row_groups * tile_columns * 4 : 0);
  s.source = take(over_projection ? 2 * s.one_source : s.one_source);
  s.projection = take(over_projection ? s.one_projection : 2 * s.one_projection);
  s.target = take(2 * s.one_target);
  s.difference = take(sizeof(T) == 2 ? 2 * s.one_difference : s.one_difference);
  s.bytes = at;
  return s;
}

// Copies a tile of a matrix to shared memory, [height, width], as numbers of type T; zero where there are none. Rows
// that do not count are not read.
template <int Height, int Width, class T, class S>
__device__ __forceinline__ void fetch_tile(T* tile, const S* data, int64_t stride, bool vectors, const bool* mask,
                                           int64_t row, int64_t rows, int column, int columns) {
  constexpr int width = vector_bytes / sizeof(T), pieces = Width / width;
  for (int i = threadIdx.x; i < Height * pieces; i += projected_threads) {
    const int r = i / pieces, c = (i - r * pieces) * width;
    const bool there = row + r < rows && (mask == nullptr || mask[row + r]);
    const int given = there ? max(0, min(width, columns - column - c)) : 0;
    const S* const from = data + (given > 0 ? (row + r) * stride + column + c : 0);
    T* const to = tile + r * pitch_of<T>(Width) + c;
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

// What a block knows, and what its threads know of their part of a tile of y: the warp's 16 rows and `warp_columns`
// columns, of which a thread has two rows. T is the type of products, F how many features are there at a time.
template <class T, class S, class W, int F, bool OverProjection>
struct ProjectedBlock {
  const ProjectedRows& a;
  unsigned char* shared;
  int part;  // which features of the source the block makes a gradient of
  static constexpr ProjectedShared layout = projected_shared<T, S, F>(OverProjection);
  static constexpr int source_pitch = pitch_of<T>(F), pitch = pitch_of<T>(tile_columns),
                       target_pitch = pitch_of<S>(tile_columns);

  template <class U>
  __device__ __forceinline__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }
  __device__ __forceinline__ T* source(int buffer) const { return at<T>(layout.source + buffer * layout.one_source); }
  __device__ __forceinline__ T* projection(int buffer) const {
    return at<T>(layout.projection + buffer * layout.one_projection);
  }
  __device__ __forceinline__ S* target(int buffer) const { return at<S>(layout.target + buffer * layout.one_target); }
  __device__ __forceinline__ T* difference() const { return at<T>(layout.difference); }
  static constexpr int rest = layout.one_difference / static_cast<int>(sizeof(T));  // behind the leading parts

  __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / warp_size; }
  __device__ __forceinline__ int group() const { return warp() % row_groups; }
  __device__ __forceinline__ int across() const { return warp() / row_groups; }
  // In the tile, of the upper of a thread's rows; the other is 8 below.
  __device__ __forceinline__ int row() const { return group() * 16 + static_cast<int>(threadIdx.x) % warp_size / 4; }
  __device__ __forceinline__ int lane_column() const { return static_cast<int>(threadIdx.x) % 4 * 2; }
  __device__ __forceinline__ int column(int n, int i) const {
    return across() * warp_columns + n * 8 + lane_column() + i % 2;
  }
  __device__ __forceinline__ bool valid(int64_t r, int64_t end) const {
    return r < end && (a.mask == nullptr || a.mask[r]);
  }

  // Parts of the source are taken in turn, the block's own last: it is there when y is complete.
  __device__ __forceinline__ int parts() const { return (a.source.size + F - 1) / F; }
  __device__ __forceinline__ int part_of(int turn) const { return (part + 1 + turn) % parts(); }

  __device__ __forceinline__ void fetch_source(int buffer, int64_t begin, int64_t end, int which) const {
    fetch_tile<tile_rows, F>(source(buffer), static_cast<const S*>(a.source.data), a.source.stride, a.source_vectors,
                             a.mask, begin, end, which * F, a.source.size);
  }
  __device__ __forceinline__ void fetch_projection(int buffer, int which, int column) const {
    fetch_tile<F, tile_columns>(projection(buffer), static_cast<const W*>(a.projection), a.target.size,
                                a.projection_vectors, nullptr, which * F, a.source.size, column, a.target.size);
  }
  __device__ __forceinline__ void fetch_target(int buffer, int64_t begin, int64_t end, int column) const {
    fetch_tile<tile_rows, tile_columns>(target(buffer), static_cast<const S*>(a.target.data), a.target.stride,
                                        a.target_vectors, a.mask, begin, end, column, a.target.size);
  }

  // Makes y, a tile after the other: columns under the rows from `begin` on, or rows up to `end` over the columns from
  // `first` on. Calls body(row, column, y, target, moving) with where the tile begins, the tile of the target, and in
  // which of two the block's own part of what changes from step to step lies.
  template <class Body>
  __device__ __forceinline__ void walk(int64_t begin, int64_t end, int first, Body&& body) const {
    const int turns = parts();
    const int tiles = OverProjection ? static_cast<int>((end - begin + tile_rows - 1) / tile_rows)
                                     : (a.target.size + tile_columns - 1) / tile_columns;
    const auto row_of = [&](int tile) { return OverProjection ? begin + int64_t{tile} * tile_rows : begin; };
    const auto column_of = [&](int tile) { return OverProjection ? first : first + tile * tile_columns; };
    const auto fetch_moving = [&](int step) {
      const int tile = step / turns, which = part_of(step % turns);
      if (OverProjection)
        fetch_source(step % 2, row_of(tile), end, which);
      else
        fetch_projection(step % 2, which, column_of(tile));
      if (step % turns == 0) fetch_target(tile % 2, row_of(tile), end, column_of(tile));
    };
    const auto fetch_staying = [&](int which) {
      if (OverProjection)
        fetch_projection(0, which, first);
      else
        fetch_source(0, begin, end, which);
    };
    if (turns == 1) fetch_staying(0);
    fetch_moving(0);
    float y[column_tiles][4];
    for (int step = 0; step < tiles * turns; ++step) {
      const int tile = step / turns, turn = step % turns, which = part_of(turn), moving = step % 2;
      if (turn == 0) {
#pragma unroll
        for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) y[n][i] = 0;
        }
      }
      wait_for_copies();
      __syncthreads();
      if (turns > 1) {
        fetch_staying(which);
        wait_for_copies();
        __syncthreads();
      }
      // Into what the last step is done with.
      if (step + 1 < tiles * turns) fetch_moving(step + 1);
      const int depth = min(F, (a.source.size - which * F + 15) / 16 * 16);
      add_product_nn<T>(y, source(OverProjection ? moving : 0) + group() * 16 * source_pitch, source_pitch,
                        projection(OverProjection ? 0 : moving) + across() * warp_columns, pitch, depth);
      if (turn == turns - 1) body(row_of(tile), column_of(tile), y, target(tile % 2), moving);
    }
  }

  // Adds the bias to y, and reads the target; both 0 where a row does not count and beyond the columns.
  __device__ __forceinline__ void finish(int first_column, const bool (&valid)[2], const S* target,
                                         float (&y)[column_tiles][4], float (&t)[column_tiles][4]) const {
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = first_column + column(n, i);
        t[n][i] = widen(target[(row() + i / 2 * 8) * target_pitch + column(n, i)]);
        const bool counts = c < a.target.size && valid[i / 2];
        if (counts && a.bias != nullptr) y[n][i] += widen(static_cast<const W*>(a.bias)[c]);
        if (!counts) y[n][i] = 0;
      }
    }
  }

  // Puts the thread's part of d into shared memory.
  __device__ __forceinline__ void put_difference(const float (&d)[column_tiles][4]) const {
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* const to = difference() + (row() + 8 * half) * pitch + column(n, 0);
        const float left = d[n][2 * half], right = d[n][2 * half + 1];
        if constexpr (sizeof(T) == 2) {
          unsigned leading, remaining;
          split<T>(left, right, leading, remaining);
          *reinterpret_cast<unsigned*>(to) = leading;
          *reinterpret_cast<unsigned*>(to + rest) = remaining;
        } else {
          store(Vector<float, 2>{left, right}, to);
        }
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

// Each thread's sums over its part of two rows become those of whole rows, [sums][tile_rows] in shared memory: over the
// lanes of a row, then over the warps across, in order.
template <int N, class Block>
__device__ __forceinline__ const float* sums_of_rows(const Block& block, float (&upper)[N], float (&lower)[N]) {
  constexpr int warps = tile_columns / warp_columns;
  static_assert(warps == 2 && N * warps * tile_rows * 4 <= Block::layout.one_difference);
  float* const sums = block.template at<float>(Block::layout.difference);
  reduce_within_warp<Sum>(0xffffffffu, 4, upper);
  reduce_within_warp<Sum>(0xffffffffu, 4, lower);
  __syncthreads();
  if (threadIdx.x % 4 == 0) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float* const to = sums + (block.across() * N + k) * tile_rows + block.row();
      to[0] = upper[k];
      to[8] = lower[k];
    }
  }
  __syncthreads();
  if (threadIdx.x < tile_rows) {
#pragma unroll
    for (int k = 0; k < N; ++k) sums[k * tile_rows + threadIdx.x] += sums[(N + k) * tile_rows + threadIdx.x];
  }
  return sums;
}

template <class T, class S, class W, int F>
__global__ void __launch_bounds__(projected_threads, blocks_at_once(F))
    row_directions(const __grid_constant__ ProjectedRows a) {
  PYD_DYNAMIC_SHARED(shared);
  const ProjectedBlock<T, S, W, F, false> block{a, shared, 0};
  const int64_t begin = int64_t{blockIdx.x} * tile_rows;
  const bool valid[2] = {block.valid(begin + block.row(), a.rows), block.valid(begin + block.row() + 8, a.rows)};
  float sums[2][3] = {};
  block.walk(begin, a.rows, 0, [&](int64_t, int first, float (&y)[column_tiles][4], const S* target, int) {
    float t[column_tiles][4];
    block.finish(first, valid, target, y, t);
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[i / 2][0] = fmaf(y[n][i], y[n][i], sums[i / 2][0]);
        sums[i / 2][1] = fmaf(t[n][i], t[n][i], sums[i / 2][1]);
        sums[i / 2][2] = fmaf(y[n][i], t[n][i], sums[i / 2][2]);
      }
    }
  });
  const float* const total = sums_of_rows(block, sums[0], sums[1]) + threadIdx.x;
  const int64_t r = begin + threadIdx.x;
  if (threadIdx.x >= tile_rows || !block.valid(r, a.rows)) return;
  const float inverse_y = inverse_length(total[0]), inverse_t = inverse_length(total[tile_rows]);
  float* const to = a.directions + 3 * r;
  to[0] = inverse_y;
  to[1] = inverse_t;
  to[2] = total[2 * tile_rows] * inverse_y * inverse_t;
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

// Values of a block of rows, one by one or their sum, and the gradient of their source (a part of its features) or of
// their target.
template <class T, class S, class W, int F>
__global__ void __launch_bounds__(projected_threads, blocks_at_once(F))
    projected_mse_rows(const __grid_constant__ ProjectedRows a) {
  PYD_DYNAMIC_SHARED(shared);
  const ProjectedBlock<T, S, W, F, false> block{a, shared, static_cast<int>(blockIdx.y)};
  using Block = ProjectedBlock<T, S, W, F, false>;
  constexpr int warp_features = F / (tile_columns / warp_columns), feature_tiles = warp_features / 8;
  const int64_t begin = int64_t{blockIdx.x} * tile_rows;
  // The warp's features: those of the block are shared out to the warps that have the same rows.
  const int in_block = block.across() * warp_features, feature = block.part * F + in_block;
  Direction direction[2];
  bool valid[2];
  float factor[2], value[2][1] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t r = begin + block.row() + 8 * half;
    valid[half] = block.valid(r, a.rows);
    direction[half] = direction_of(a.directions, r, valid[half]);
    factor[half] = static_cast<float>(a.factors[1]);
    if (a.row_weights != nullptr) factor[half] *= valid[half] ? a.row_weights[r] : 0.0f;
  }
  float total[feature_tiles][4];
#pragma unroll
  for (int m = 0; m < feature_tiles; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[m][i] = 0;
  }
  block.walk(begin, a.rows, 0, [&](int64_t, int first, float (&y)[column_tiles][4], S* target, int moving) {
    float t[column_tiles][4];
    block.finish(first, valid, target, y, t);
#pragma unroll
    for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float d, of_y, of_t;
        direction[i / 2].slopes(y[n][i], t[n][i], a.directions != nullptr, d, of_y, of_t);
        value[i / 2][0] = fmaf(d, d, value[i / 2][0]);
        y[n][i] = of_y;
        t[n][i] = of_t;
      }
    }
    if (a.grad_source.data != nullptr) {
      float scale[2] = {1, 1};
      if constexpr (std::is_same_v<T, __half>) {
        float largest[2] = {0, 0};
#pragma unroll
        for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) largest[i / 2] = fmaxf(largest[i / 2], fabsf(y[n][i]));
        }
        reduce_within_warp<Maximum>(0xffffffffu, 4, largest);
        float* const all = block.template at<float>(Block::layout.largest);
        if (threadIdx.x % 4 == 0) {
          all[block.across() * tile_rows + block.row()] = largest[0];
          all[block.across() * tile_rows + block.row() + 8] = largest[1];
        }
        __syncthreads();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = block.row() + 8 * half;
          float inverse;
          power_of_two(fmaxf(all[r], all[tile_rows + r]), scale[half], inverse);
#pragma unroll
          for (int n = 0; n < column_tiles; ++n) {
            y[n][2 * half] *= inverse;
            y[n][2 * half + 1] *= inverse;
          }
        }
      }
      block.put_difference(y);
      __syncthreads();
      const T* const d = block.difference() + block.group() * 16 * Block::pitch;
      const T* const p = block.projection(moving) + in_block * Block::pitch;
      if constexpr (sizeof(T) == 2)
        add_split_product_nt<T, tile_columns>(total, d, Block::rest, Block::pitch, scale, p, Block::pitch,
                                              a.source.size - feature);
      else
        add_product_nt<T>(total, d, Block::pitch, p, Block::pitch, tile_columns);
    }
    if (a.grad_target.data != nullptr) {
      // Over the target's own tile, whose elements each thread has read.
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          narrow(valid[i / 2] ? t[n][i] * factor[i / 2] : 0.0f,
                 target[(block.row() + i / 2 * 8) * Block::target_pitch + block.column(n, i)]);
      }
      __syncwarp();
      store_rows<S>(target + block.group() * 16 * Block::target_pitch + block.across() * warp_columns,
                    Block::target_pitch, warp_columns, a.grad_target, a.gradient_vectors, begin + block.group() * 16,
                    a.rows, first + block.across() * warp_columns);
    }
  });
  // The sums of rows come after a barrier, behind which nobody reads the source's tile any more; S needs no more room
  // than T.
  const float* const values = sums_of_rows(block, value[0], value[1]);
  if (a.grad_source.data != nullptr) {
    S* const tile =
        reinterpret_cast<S*>(block.source(0)) + block.group() * 16 * pitch_of<S>(F) + block.across() * warp_features;
#pragma unroll
    for (int m = 0; m < feature_tiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        narrow(valid[i / 2] ? total[m][i] * factor[i / 2] : 0.0f,
               tile[(block.row() % 16 + i / 2 * 8) * pitch_of<S>(F) + m * 8 + block.lane_column() + i % 2]);
    }
    __syncwarp();
    store_rows<S>(tile, pitch_of<S>(F), warp_features, a.grad_source, a.gradient_vectors, begin + block.group() * 16,
                  a.rows, feature);
  }
  if (blockIdx.y != 0) return;
  double sum[1] = {0};
  if (threadIdx.x < tile_rows) {
    const int64_t r = begin + threadIdx.x;
    sum[0] = values[threadIdx.x];
    if (a.row_loss != nullptr && r < a.rows) a.row_loss[r] = values[threadIdx.x] * static_cast<float>(a.factors[0]);
  }
  reduce<Sum>(team_of(projected_threads), sum, block.template at<double>(Block::layout.slots));
  if (threadIdx.x == 0) a.squares[blockIdx.x] = sum[0];
}

// --------------------------------------------------------------------------- projection

// A tile of x^T d, and the sum of d, over a share of the rows.
template <class T, class S, class W, int F>
__global__ void __launch_bounds__(projected_threads, blocks_at_once(F))
    projected_mse_projection(const __grid_constant__ ProjectedRows a) {
  PYD_DYNAMIC_SHARED(shared);
  const ProjectedBlock<T, S, W, F, true> block{a, shared, static_cast<int>(blockIdx.y)};
  using Block = ProjectedBlock<T, S, W, F, true>;
  // Sixteen features each, dealt out to the warps in turn.
  constexpr int warps = projected_threads / warp_size, turns = (F / 16 + warps - 1) / warps,
                all_tiles = tile_columns / 8;
  const int first = static_cast<int>(blockIdx.x) * tile_columns;
  const int64_t begin = int64_t{blockIdx.z} * a.share, end = min(begin + a.share, a.rows);
  float total[turns][all_tiles][4], sums[column_tiles][2];
#pragma unroll
  for (int j = 0; j < turns; ++j) {
#pragma unroll
    for (int n = 0; n < all_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[j][n][i] = 0;
    }
  }
#pragma unroll
  for (int n = 0; n < column_tiles; ++n) sums[n][0] = sums[n][1] = 0;
  // Of those that the source has; the others would be of zeros.
  const auto feature_of = [&](int j) { return (j * warps + block.warp()) * 16; };
  const int features = min(F, a.source.size - block.part * F);

  block.walk(begin, end, first, [&](int64_t row, int, float (&y)[column_tiles][4], const S* target, int moving) {
    float t[column_tiles][4];
    const int64_t rows[2] = {row + block.row(), row + block.row() + 8};
    const bool valid[2] = {block.valid(rows[0], end), block.valid(rows[1], end)};
    block.finish(first, valid, target, y, t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Direction direction = direction_of(a.directions, rows[half], valid[half]);
      const float weight = a.row_weights != nullptr && valid[half] ? a.row_weights[rows[half]] : 1.0f;
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          float d, of_y, of_t;
          direction.slopes(y[n][i], t[n][i], a.directions != nullptr, d, of_y, of_t);
          y[n][i] = of_y * weight;
          sums[n][i % 2] += y[n][i];
        }
      }
    }
    if (!a.with_projection) return;
    float scale[all_tiles][2];
#pragma unroll
    for (int n = 0; n < all_tiles; ++n) scale[n][0] = scale[n][1] = 1;
    if constexpr (std::is_same_v<T, __half>) {
      float* const all = block.template at<float>(Block::layout.largest);
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float largest = fmaxf(fabsf(y[n][e]), fabsf(y[n][2 + e]));
          for (int step = 16; step >= 4; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
          if (threadIdx.x % warp_size < 4) all[block.group() * tile_columns + block.column(n, e)] = largest;
        }
      }
      __syncthreads();
      const auto largest_of = [&](int c) {
        return fmaxf(fmaxf(all[c], all[tile_columns + c]), fmaxf(all[2 * tile_columns + c], all[3 * tile_columns + c]));
      };
      float unused, inverse;
#pragma unroll
      for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          power_of_two(largest_of(block.column(n, i)), unused, inverse);
          y[n][i] *= inverse;
        }
      }
#pragma unroll
      for (int n = 0; n < all_tiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) power_of_two(largest_of(n * 8 + block.lane_column() + e), scale[n][e], unused);
      }
    }
    block.put_difference(y);
    __syncthreads();
    const T* const source = block.source(moving);
#pragma unroll
    for (int j = 0; j < turns; ++j) {
      if (feature_of(j) >= features) continue;
      if constexpr (sizeof(T) == 2)
        add_split_product_tn<T, tile_rows>(total[j], source + feature_of(j), Block::source_pitch, block.difference(),
                                           Block::rest, Block::pitch, scale);
      else
        add_product_tn<T>(total[j], source + feature_of(j), Block::source_pitch, block.difference(), Block::pitch,
                          tile_rows);
    }
  });
  const int m = a.target.size, k = a.source.size, lane_row = static_cast<int>(threadIdx.x) % warp_size / 4;
  float* const parts = a.parts + static_cast<int64_t>(blockIdx.z) * (k + 1) * m;
  if (a.with_projection) {
#pragma unroll
    for (int j = 0; j < turns; ++j) {
#pragma unroll
      for (int n = 0; n < all_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int f = feature_of(j) + lane_row + i / 2 * 8, c = first + n * 8 + block.lane_column() + i % 2;
          if (f < features && c < m) parts[static_cast<int64_t>(block.part * F + f) * m + c] = total[j][n][i];
        }
      }
    }
  }
  if (!a.with_bias || blockIdx.y != 0) return;
  // Over the rows of a warp, then over the groups of rows, in order.
  float* const slots = block.template at<float>(Block::layout.slots);
#pragma unroll
  for (int n = 0; n < column_tiles; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      for (int step = 16; step >= 4; step /= 2) sums[n][e] += __shfl_xor_sync(0xffffffffu, sums[n][e], step);
      if (threadIdx.x % warp_size < 4) slots[block.group() * tile_columns + block.column(n, e)] = sums[n][e];
    }
  }
  __syncthreads();
  const int c = first + static_cast<int>(threadIdx.x);
  if (threadIdx.x >= tile_columns || c >= m) return;
  float sum = 0;
  for (int g = 0; g < row_groups; ++g) sum += slots[g * tile_columns + threadIdx.x];
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
