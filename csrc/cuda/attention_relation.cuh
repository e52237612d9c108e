// SPDX-License-Identifier: Apache-2.0
// Attention-relation loss on the GPU (Wang et al. 2020, arXiv 2002.10957; MiniLMv2, arXiv 2012.15828).
//
// With scores t of the teacher and s of the student, p = softmax(t), q = softmax(s) over the tokens that a row sees,
//   value of row i      sum_j p_ij (log p_ij - log q_ij)
//   gradient of s_ij    w_i (q_ij - p_ij) = G_ij,  of A_i  sum_j G_ij B_j,  of B_j  sum_i G_ij A_i
// and for a self relation (B = A) of A_i  sum_j (G_ij + G_ji) A_j, where scores are symmetric: one product. A block of
// threads has `own_tokens` tokens of one relation head, 16 to a warp, and meets those that they share a sequence with,
// `other_tokens` at a time, which are on their way to shared memory while the ones before are worked on. No N x N
// matrix is ever written: relation_values leaves maxima and sums of exponentials, four numbers per row, from which
// relation_gradients makes the probabilities of rows, of columns or of both again. Nothing is added atomically: the
// same bits every time.
//
// Exponentials are 2^((s - max s) c) with c = scale * log2 e: the difference comes first, and is exact near the
// maximum. Where student and teacher agree, value and gradient are exactly 0.
#pragma once

#include <climits>

#include "attention_relation.h"
#include "matrix.cuh"
#include "team.cuh"

namespace pyd {

constexpr int own_tokens = 64;
constexpr int other_tokens = 32;
constexpr int relation_threads = own_tokens / 16 * warp_size;
constexpr int relation_tiles = other_tokens / 8;
constexpr int chunk_features = 64;  // of a head, in shared memory at a time
constexpr int padding = -1;
constexpr float lowest = -3.4028234e38f;  // a finite maximum of nothing, whose difference from anything is a number
constexpr float ln2 = 0.693147181f;

struct Minimum {
  template <class T>
  static __device__ __forceinline__ T identity() {
    return INT_MAX;
  }
  __device__ __forceinline__ int operator()(int a, int b) const { return min(a, b); }
};

// --------------------------------------------------------------------------- what kernels are told

// A tensor as relation heads of it are read: `cut` where features of one head do not lie side by side, `vectors` where
// 16 bytes can be moved at once.
struct RelationView {
  void* data;
  int64_t batch, head, token;
  int stored, size;
  bool cut, vectors;
};

// One side: `scale` is in units of log 2.
struct RelationSideView {
  RelationView own, other;
  float scale;
};

struct RelationTask {
  RelationSideView student, teacher;
  RelationView gradient;  // of student.own
  int heads;
  int parts;           // that the features of a head are divided in for the gradient
  bool rows, columns;  // own tokens are those of the first tensor, of the second
  int64_t first_block;
  float* statistics;    // [4, B, heads, N]
  double* partial;      // [blocks] of relation_values
  const float* factor;  // of the gradient
};

struct RelationLaunch {
  RelationTask tasks[most_relations];
  int count;
  int batches, positions;
  bool causal, with_gradient;
  const int *firsts, *lasts;  // [B, N]
  const float* shares;        // [B, N]
  const float* row_weights;   // [B, heads, N], or null
  const float* unit;          // of row weights
  float* row_loss;
};

// --------------------------------------------------------------------------- tokens

struct RelationTokens {
  const bool* mask;
  const int64_t* segment_ids;
  int positions;
  bool sequence_mean;
  int *firsts, *lasts;
  float* shares;
  int* counts;  // [blocks, 2]
};

// The sequence of a token, negative for padding.
__device__ __forceinline__ int64_t sequence_of(const RelationTokens& a, int64_t batch, int token) {
  const int64_t at = batch * a.positions + token;
  if (token >= a.positions || (a.mask != nullptr && !a.mask[at])) return padding;
  return a.segment_ids == nullptr ? 0 : a.segment_ids[at];
}

constexpr int relation_sequences_bytes = relation_threads * sizeof(int64_t) + reduction_bytes<int, 2>;

// Of each token the first and the last of its sequence, which also say who sees whom, and its share in the loss; of
// each block of tokens how many are valid and how many are the first of their sequence.
__global__ void __launch_bounds__(relation_threads) relation_sequences(const RelationTokens a) {
  PYD_DYNAMIC_SHARED(shared);
  int64_t* const others = reinterpret_cast<int64_t*>(shared);
  const int blocks = (a.positions + relation_threads - 1) / relation_threads;
  const int64_t batch = blockIdx.x / blocks;
  const int token = static_cast<int>(blockIdx.x % blocks) * relation_threads + static_cast<int>(threadIdx.x);
  const int64_t own = sequence_of(a, batch, token);
  const bool valid = own >= 0;
  int first = 0, last = a.positions - 1, length = a.positions;
  if (a.mask != nullptr || a.segment_ids != nullptr) {
    first = a.positions;
    last = padding;
    length = 0;
    for (int start = 0; start < a.positions; start += relation_threads) {
      __syncthreads();
      others[threadIdx.x] = sequence_of(a, batch, start + static_cast<int>(threadIdx.x));
      __syncthreads();
      if (!valid) continue;
      for (int i = 0; i < relation_threads; ++i) {
        if (others[i] != own) continue;
        first = min(first, start + i);
        last = start + i;
        ++length;
      }
    }
  }
  if (token < a.positions) {
    const int64_t at = batch * a.positions + token;
    a.firsts[at] = valid ? first : padding;
    a.lasts[at] = valid ? last : padding;
    a.shares[at] = !valid ? 0.0f : a.sequence_mean ? 1.0f / static_cast<float>(length) : 1.0f;
  }
  int counts[2] = {valid, valid && token == first};
  reduce<Sum>(team_of(relation_threads), counts, reinterpret_cast<int*>(others + relation_threads));
  if (threadIdx.x == 0) {
    a.counts[2 * blockIdx.x] = counts[0];
    a.counts[2 * blockIdx.x + 1] = counts[1];
  }
}

// One block: a power of two that takes the largest weight of a valid row to 1 or a little above, where fp16 has the
// room for it.
__global__ void __launch_bounds__(1024)
    relation_unit(const float* row_weights, const int* firsts, int batches, int heads, int positions, float* unit) {
  PYD_DYNAMIC_SHARED(shared);
  float largest[1] = {ldexpf(1.0f, -100)};
  const int64_t rows = static_cast<int64_t>(batches) * heads * positions;
  for (int64_t i = threadIdx.x; i < rows; i += blockDim.x) {
    const int64_t row = i / positions;
    if (firsts[row / heads * positions + (i - row * positions)] >= 0)
      largest[0] = fmaxf(largest[0], fabsf(row_weights[i]));
  }
  reduce<Maximum>(team_of(blockDim.x), largest, reinterpret_cast<float*>(shared));
  if (threadIdx.x == 0) *unit = ldexpf(1.0f, -ilogbf(largest[0]));
}

// --------------------------------------------------------------------------- tiles

__host__ __device__ constexpr int padded(int features) {
  return features < chunk_features ? (features + 15) / 16 * 16 : chunk_features;
}

// Where things lie in a block's shared memory, in bytes. A head that does not fit is walked through, own tokens and
// others, chunk by chunk; else own tokens stay, and two sets of others take turns.
struct RelationShared {
  int student_pitch, teacher_pitch;
  int slots, own_ids, other_ids, statistics, spread;
  int own_student, own_teacher, other_student, other_teacher, turn, part;
  int bytes;
  bool wide;
};

template <class S>
__host__ __device__ constexpr RelationShared relation_shared(int student_size, int teacher_size, bool gradient) {
  constexpr int element = sizeof(S);
  RelationShared s{};
  s.wide = student_size > chunk_features || teacher_size > chunk_features;
  s.student_pitch = pitch_of<S>(padded(student_size));
  s.teacher_pitch = pitch_of<S>(padded(teacher_size));
  int at = 0;
  const auto take = [&at](int bytes) {
    const int begin = at;
    at += (bytes + vector_bytes - 1) / vector_bytes * vector_bytes;
    return begin;
  };
  s.slots = take(reduction_bytes<double, 1>);
  s.own_ids = take(own_tokens * 4);
  s.other_ids = take(3 * other_tokens * 4);
  s.statistics = take(gradient ? 2 * 4 * other_tokens * 4 : 0);
  s.spread = take(gradient ? own_tokens / 16 * spread_bytes<S, relation_tiles> : 0);
  s.own_student = take(own_tokens * s.student_pitch * element);
  s.own_teacher = take(own_tokens * s.teacher_pitch * element);
  s.other_student = take(other_tokens * s.student_pitch * element);
  s.other_teacher = take(other_tokens * s.teacher_pitch * element);
  s.turn = s.wide ? 0 : at - s.other_student;
  at += s.turn;
  s.part = s.wide && gradient ? take(other_tokens * s.student_pitch * element) : 0;
  s.bytes = at;
  return s;
}

// What a block works on.
struct RelationPlace {
  const RelationTask* task;
  int64_t batch;
  int head, part, start;   // `start` is its first token
  int64_t rows;            // statistics of its head begin here
  int64_t statistics_gap;  // from one of the four to the next
};

__device__ __forceinline__ RelationPlace relation_place(const RelationLaunch& a) {
  int index = 0;
  while (index + 1 < a.count && static_cast<int64_t>(blockIdx.x) >= a.tasks[index + 1].first_block) ++index;
  const RelationTask& task = a.tasks[index];
  const int blocks = (a.positions + own_tokens - 1) / own_tokens;
  int rest = static_cast<int>(blockIdx.x - task.first_block);
  RelationPlace p{};
  p.task = &task;
  p.start = rest % blocks * own_tokens;
  rest /= blocks;
  p.part = rest % task.parts;
  rest /= task.parts;
  p.head = rest % task.heads;
  p.batch = rest / task.heads;
  p.rows = (p.batch * task.heads + p.head) * a.positions;
  p.statistics_gap = static_cast<int64_t>(a.batches) * task.heads * a.positions;
  return p;
}

// Element 0 of token 0 of a relation head, or of its batch row where the head is cut out of several.
template <class S>
__device__ __forceinline__ S* head_of(const RelationView& v, const RelationPlace& p) {
  S* const batch = static_cast<S*>(v.data) + p.batch * v.batch;
  if (v.cut) return batch;
  const int64_t first = static_cast<int64_t>(p.head) * v.size;
  return batch + first / v.stored * v.head + first % v.stored;
}

// Where a feature lies behind what head_of says.
__device__ __forceinline__ int64_t place_of(const RelationView& v, int head, int feature) {
  if (!v.cut) return feature;
  const int64_t joined = static_cast<int64_t>(head) * v.size + feature;
  return joined / v.stored * v.head + joined % v.stored;
}

// Copies features [first, first + columns) of tokens [start, start + rows) to shared memory, zero where there are none:
// beyond the head, and for padding, which is not read.
template <class S>
__device__ __forceinline__ void fetch(S* tile, int pitch, const RelationView& v, const RelationPlace& p, const int* ids,
                                      int start, int rows, int first, int columns) {
  constexpr int width = vector_bytes / sizeof(S);
  const S* const base = head_of<S>(v, p);
  const int pieces = columns / width;
  for (int i = threadIdx.x; i < rows * pieces; i += relation_threads) {
    const int row = i / pieces, column = (i - row * pieces) * width;
    S* const to = tile + row * pitch + column;
    const int given = ids[row] < 0 ? 0 : max(0, min(width, v.size - first - column));
    const S* const from = base + (given > 0 ? (start + row) * v.token : 0);
    if (v.vectors) {
      copy_16(to, from + (given > 0 ? first + column : 0), given * static_cast<int>(sizeof(S)));
    } else {
#pragma unroll 1
      for (int k = 0; k < width; ++k) {
        narrow(0.0f, to[k]);
        if (k < given) to[k] = from[place_of(v, p.head, first + column + k)];
      }
    }
  }
}

// --------------------------------------------------------------------------- own tokens and others

// The range in which all tokens lie that the block's own tokens see, and what its threads know of their two rows.
struct RelationRange {
  int begin, end;
  int row;          // in the block, of the upper of a thread's rows; the other is 8 below
  int sequence[2];  // first token of the row's sequence, for padding a number that nobody has
};

__device__ __forceinline__ RelationRange relation_range(const RelationLaunch& a, const RelationPlace& p, bool before,
                                                        bool behind, int* own_ids, int* slots) {
  const int64_t row_of_batch = p.batch * a.positions;
  int bounds[2] = {INT_MAX, INT_MAX};  // the first, and the last negated
  if (threadIdx.x < own_tokens) {
    const int token = p.start + static_cast<int>(threadIdx.x);
    const int first = token < a.positions ? a.firsts[row_of_batch + token] : padding;
    own_ids[threadIdx.x] = first;
    if (first >= 0) {
      bounds[0] = first;
      bounds[1] = -a.lasts[row_of_batch + token];
    }
  }
  reduce<Minimum>(team_of(relation_threads), bounds, slots);
  RelationRange r{};
  // Where no token is valid, the range is empty.
  r.begin = bounds[0] == INT_MAX ? 0 : bounds[0];
  r.end = bounds[0] == INT_MAX ? 0 : 1 - bounds[1];
  if (a.causal && !behind) r.end = min(r.end, p.start + own_tokens);
  if (a.causal && !before) r.begin = max(r.begin, p.start);
  r.row = static_cast<int>(threadIdx.x) / warp_size * 16 + static_cast<int>(threadIdx.x) % warp_size / 4;
  for (int i = 0; i < 2; ++i) {
    const int first = own_ids[r.row + 8 * i];
    r.sequence[i] = first < 0 ? padding - 1 : first;
  }
  return r;
}

// The others that take turns in shared memory, and their scores.
template <class S>
struct RelationOthers {
  const RelationLaunch& a;
  const RelationPlace& p;
  const RelationRange& range;
  const RelationShared& layout;
  unsigned char* shared;
  bool statistics;  // come with the others

  __device__ __forceinline__ S* tile(int offset) const { return reinterpret_cast<S*>(shared + offset); }
  __device__ __forceinline__ int step_of(int start) const { return (start - range.begin) / other_tokens; }
  __device__ __forceinline__ int turn_of(int start) const { return step_of(start) % 2; }
  __device__ __forceinline__ int* ids(int start) const {
    return reinterpret_cast<int*>(shared + layout.other_ids) + step_of(start) % 3 * other_tokens;
  }
  __device__ __forceinline__ float* statistics_of(int start) const {
    return reinterpret_cast<float*>(shared + layout.statistics) + turn_of(start) * 4 * other_tokens;
  }
  __device__ __forceinline__ const S* students(int start) const {
    return tile(layout.other_student + turn_of(start) * layout.turn);
  }

  // What of the others is known without their features: the first tokens of their sequences.
  __device__ __forceinline__ void fetch_ids(int start) const {
    if (start >= range.end || threadIdx.x >= other_tokens) return;
    const int token = start + static_cast<int>(threadIdx.x);
    int* const to = ids(start) + threadIdx.x;
    if (token < range.end)
      copy_4(to, a.firsts + p.batch * a.positions + token, 4);
    else
      *to = padding;
  }

  __device__ __forceinline__ void fetch_others(int start) const {
    if (start >= range.end) return;
    if (statistics && threadIdx.x < 4 * other_tokens) {
      const int which = threadIdx.x / other_tokens, token = start + static_cast<int>(threadIdx.x) % other_tokens;
      const bool there = token < range.end;
      copy_4(statistics_of(start) + threadIdx.x,
             p.task->statistics + which * p.statistics_gap + p.rows + (there ? token : 0), there ? 4 : 0);
    }
    if (layout.wide) return;
    const int by = turn_of(start) * layout.turn;
    const RelationView &student = p.task->student.other, &teacher = p.task->teacher.other;
    fetch<S>(tile(layout.other_student + by), layout.student_pitch, student, p, ids(start), start, other_tokens, 0,
             padded(student.size));
    fetch<S>(tile(layout.other_teacher + by), layout.teacher_pitch, teacher, p, ids(start), start, other_tokens, 0,
             padded(teacher.size));
  }

  __device__ __forceinline__ void begin() const {
    if (!layout.wide) {
      const int* const own = reinterpret_cast<const int*>(shared + layout.own_ids);
      const RelationView &student = p.task->student.own, &teacher = p.task->teacher.own;
      fetch<S>(tile(layout.own_student), layout.student_pitch, student, p, own, p.start, own_tokens, 0,
               padded(student.size));
      fetch<S>(tile(layout.own_teacher), layout.teacher_pitch, teacher, p, own, p.start, own_tokens, 0,
               padded(teacher.size));
    }
    fetch_ids(range.begin);
    wait_for_copies();
    __syncthreads();
    fetch_others(range.begin);
    fetch_ids(range.begin + other_tokens);
  }

  // Scores before their scale. Afterwards others `start` are in shared memory, and the next are on their way.
  __device__ __forceinline__ void scores(int start, float (&s)[relation_tiles][4],
                                         float (&t)[relation_tiles][4]) const {
#pragma unroll
    for (int n = 0; n < relation_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = t[n][i] = 0;
    }
    wait_for_copies();
    __syncthreads();
    fetch_others(start + other_tokens);
    fetch_ids(start + 2 * other_tokens);
    if (layout.wide) {
      side_in_chunks(p.task->student, start, layout.own_student, layout.other_student, layout.student_pitch, s);
      side_in_chunks(p.task->teacher, start, layout.own_teacher, layout.other_teacher, layout.teacher_pitch, t);
      return;
    }
    const int warp = static_cast<int>(threadIdx.x) / warp_size * 16, by = turn_of(start) * layout.turn;
    add_product_nt<S>(s, tile(layout.own_student) + warp * layout.student_pitch, layout.student_pitch,
                      tile(layout.other_student + by), layout.student_pitch, padded(p.task->student.own.size));
    add_product_nt<S>(t, tile(layout.own_teacher) + warp * layout.teacher_pitch, layout.teacher_pitch,
                      tile(layout.other_teacher + by), layout.teacher_pitch, padded(p.task->teacher.own.size));
  }

  __device__ __forceinline__ void side_in_chunks(const RelationSideView& side, int start, int own, int other, int pitch,
                                                 float (&c)[relation_tiles][4]) const {
    const int* const own_ids = reinterpret_cast<const int*>(shared + layout.own_ids);
    const int warp = static_cast<int>(threadIdx.x) / warp_size * 16;
    for (int first = 0; first < side.own.size; first += chunk_features) {
      const int columns = padded(side.own.size - first);
      fetch<S>(tile(own), pitch, side.own, p, own_ids, p.start, own_tokens, first, columns);
      fetch<S>(tile(other), pitch, side.other, p, ids(start), start, other_tokens, first, columns);
      wait_for_copies();
      __syncthreads();
      add_product_nt<S>(c, tile(own) + warp * pitch, pitch, tile(other), pitch, columns);
      __syncthreads();
    }
  }
};

// Whether rows see columns: of tile n element i.
struct RelationSight {
  const RelationRange& range;
  const int* ids;  // of the others
  int own, start;  // first tokens of both

  __device__ __forceinline__ int column(int n, int i) const {
    return n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
  }
  __device__ __forceinline__ bool same(int n, int i) const { return range.sequence[i / 2] == ids[column(n, i)]; }
  // How far the other token is behind the row's.
  __device__ __forceinline__ int behind(int n, int i) const {
    return start + column(n, i) - (own + range.row + i / 2 * 8);
  }
};

// --------------------------------------------------------------------------- values

// The best of four neighbours, which have the same rows.
template <class Combine>
__device__ __forceinline__ float over_columns(float x) {
  float all[1] = {x};
  reduce_within_warp<Combine>(0xffffffffu, 4, all);
  return all[0];
}

// Maximum and sums of a row so far, those of its columns that a thread has.
struct RelationSums {
  float top_s = lowest, top_t = lowest;
  float student = 0, teacher = 0;  // sums of exponentials
  float difference = 0;            // sum of 2^t (t - s), relative to both maxima, in the teacher's unit

  __device__ __forceinline__ void raise(float above_s, float above_t, float scale_s, float scale_t, float ratio) {
    if (above_s == top_s && above_t == top_t) return;
    const float moved = (top_t - above_t) - (top_s - above_s) * ratio;
    const float kept_s = exp2f((top_s - above_s) * scale_s), kept_t = exp2f((top_t - above_t) * scale_t);
    difference = (difference + (teacher > 0 ? teacher * moved : 0.0f)) * kept_t;
    teacher *= kept_t;
    student *= kept_s;
    top_s = above_s;
    top_t = above_t;
  }
};

// Values of a block of rows, added up by their shares, and for the gradient maxima and sums of exponentials.
template <class S>
__global__ void __launch_bounds__(relation_threads, 4) relation_values(const __grid_constant__ RelationLaunch a) {
  PYD_DYNAMIC_SHARED(shared);
  const RelationPlace p = relation_place(a);
  const RelationTask& task = *p.task;
  const RelationShared layout = relation_shared<S>(task.student.own.size, task.teacher.own.size, false);
  int* const own_ids = reinterpret_cast<int*>(shared + layout.own_ids);
  const RelationRange range = relation_range(a, p, true, false, own_ids, reinterpret_cast<int*>(shared + layout.slots));
  const RelationOthers<S> others{a, p, range, layout, shared, false};
  const float scale_s = task.student.scale, scale_t = task.teacher.scale, ratio = scale_s / scale_t;
  RelationSums sums[2];
  others.begin();
  for (int start = range.begin; start < range.end; start += other_tokens) {
    float s[relation_tiles][4], t[relation_tiles][4];
    others.scores(start, s, t);
    const RelationSight sight{range, others.ids(start), p.start, start};
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      RelationSums& sum = sums[row];
      unsigned seen = 0;
      float above_s = sum.top_s, above_t = sum.top_t;
#pragma unroll
      for (int n = 0; n < relation_tiles; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          if (!sight.same(n, i) || (a.causal && sight.behind(n, i) > 0)) continue;
          seen |= 1u << (2 * n + i % 2);
          above_s = fmaxf(above_s, s[n][i]);
          above_t = fmaxf(above_t, t[n][i]);
        }
      }
      above_s = over_columns<Maximum>(above_s);
      above_t = over_columns<Maximum>(above_t);
      sum.raise(above_s, above_t, scale_s, scale_t, ratio);
#pragma unroll
      for (int n = 0; n < relation_tiles; ++n) {
#pragma unroll
        for (int i = 2 * row; i < 2 * row + 2; ++i) {
          if (!(seen >> (2 * n + i % 2) & 1)) continue;
          const float below_s = s[n][i] - above_s, below_t = t[n][i] - above_t;
          const float e = exp2f(below_t * scale_t);
          sum.difference += e * (below_t - below_s * ratio);
          sum.teacher += e;
          sum.student += exp2f(below_s * scale_s);
        }
      }
    }
  }
  double total[1] = {0};
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float all[3] = {sums[row].difference, sums[row].teacher, sums[row].student};
    reduce_within_warp<Sum>(0xffffffffu, 4, all);
    const int token = p.start + range.row + 8 * row;
    if (threadIdx.x % 4 != 0 || token >= a.positions) continue;
    const bool valid = range.sequence[row] >= 0;
    const float quotient = !valid || all[1] == all[2] ? 1.0f : all[1] / all[2];
    const float value = valid ? (all[0] / all[1] * scale_t - log2f(quotient)) * ln2 : 0.0f;
    total[0] += static_cast<double>(value) * a.shares[p.batch * a.positions + token];
    const int64_t at = p.rows + token;
    if (a.row_loss != nullptr) a.row_loss[at] = value;
    if (!a.with_gradient) continue;
    float weight = 0;
    if (valid) weight = 1 / all[1];
    if (valid && a.row_weights != nullptr) weight *= a.row_weights[at] * *a.unit;
    task.statistics[at] = sums[row].top_s;
    task.statistics[at + p.statistics_gap] = sums[row].top_t;
    task.statistics[at + 2 * p.statistics_gap] = quotient;
    task.statistics[at + 3 * p.statistics_gap] = weight;
  }
  reduce<Sum>(team_of(relation_threads), total, reinterpret_cast<double*>(shared + layout.slots));
  if (threadIdx.x == 0) task.partial[blockIdx.x - task.first_block] = total[0];
}

// --------------------------------------------------------------------------- loss

struct RelationTotal {
  const double* partial[most_relations];
  int64_t programs[most_relations];
  int heads[most_relations];
  double weights[most_relations];
  int count;
  const int* counts;  // [blocks, 2]
  int64_t blocks;
  RelationMean mean;
  bool half_precision;
  const double* num_items;
  float *loss, *parts, *factors, *gradient_scale;
};

constexpr int relation_total_bytes = reduction_bytes<double, 2> + reduction_bytes<double, most_relations>;

// One block, which adds in a fixed order: the loss, the value of each relation, what its gradient is multiplied by.
__global__ void __launch_bounds__(1024) relation_total(const RelationTotal a) {
  PYD_DYNAMIC_SHARED(shared);
  double* const slots = reinterpret_cast<double*>(shared);
  double counts[2] = {0, 0};
  for (int64_t i = threadIdx.x; i < a.blocks; i += blockDim.x) {
    counts[0] += a.counts[2 * i];
    counts[1] += a.counts[2 * i + 1];
  }
  const Team team = team_of(blockDim.x);
  reduce<Sum>(team, counts, slots);
  double values[most_relations] = {};
#pragma unroll
  for (int r = 0; r < most_relations; ++r)
    for (int64_t i = threadIdx.x; i < a.programs[r]; i += blockDim.x) values[r] += a.partial[r][i];
  reduce<Sum>(team, values, slots + 2 * warp_size);
  if (threadIdx.x != 0) return;
  const double valid = fmax(counts[0], 1.0), sequences = fmax(counts[1], 1.0);
  double denominator = 1;
  if (a.num_items != nullptr)
    denominator = *a.num_items;
  else if (a.mean == RelationMean::sequences)
    denominator = sequences;
  else if (a.mean == RelationMean::tokens)
    denominator = valid;
  // What is left to backward has its size for a head of middling length.
  double rows = denominator, loss = 0;
  if (a.mean != RelationMean::none) rows *= a.heads[0];
  if (a.mean == RelationMean::sequences) rows *= valid / sequences;
  const double later = left_to_backward(rows, a.half_precision);
#pragma unroll
  for (int r = 0; r < most_relations; ++r) {
    if (r >= a.count) break;
    const double factor = 1 / (denominator * (a.mean == RelationMean::none ? 1 : a.heads[r]));
    loss += a.weights[r] * (values[r] * factor);
    a.parts[r] = static_cast<float>(values[r] * factor);
    a.factors[r] = static_cast<float>(a.weights[r] * factor / later);
  }
  if (a.loss != nullptr) *a.loss = static_cast<float>(loss);
  *a.gradient_scale = static_cast<float>(later);
}

// --------------------------------------------------------------------------- gradients

// What relation_values has left of a row.
struct RelationStatistics {
  float top_s, top_t, ratio, weight;

  // (q - p) * weight of a score, with q = 2^s ratio / sum 2^t and p = 2^t / sum 2^t; `weight` has the sum.
  __device__ __forceinline__ float gradient(float s, float t, float scale_s, float scale_t) const {
    return (exp2f((s - top_s) * scale_s) * ratio - exp2f((t - top_t) * scale_t)) * weight;
  }
};

// Gradient of 8 M = padded(size) features of a block of tokens, as the first tensor of a relation (rows: probabilities
// are those of their own rows), as the second (columns: of the other tokens' rows), or, for a self relation, as both.
template <class S, int M>
__global__ void __launch_bounds__(relation_threads, 3) relation_gradients(const __grid_constant__ RelationLaunch a) {
  PYD_DYNAMIC_SHARED(shared);
  const RelationPlace p = relation_place(a);
  const RelationTask& task = *p.task;
  const RelationShared layout = relation_shared<S>(task.student.own.size, task.teacher.own.size, true);
  int* const own_ids = reinterpret_cast<int*>(shared + layout.own_ids);
  const RelationRange range =
      relation_range(a, p, task.rows, task.columns, own_ids, reinterpret_cast<int*>(shared + layout.slots));
  const RelationOthers<S> others{a, p, range, layout, shared, task.columns};
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  float* const spread = reinterpret_cast<float*>(shared + layout.spread + warp * spread_bytes<S, relation_tiles>);
  const float scale_s = task.student.scale, scale_t = task.teacher.scale;
  // Numbers below 1 have their lower half in fp16 too if they are made larger.
  constexpr float larger = std::is_same_v<S, __half> ? 4096.0f : 1.0f;

  RelationStatistics own[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    own[row] = {};
    if (!task.rows || range.sequence[row] < 0) continue;
    const float* const at = task.statistics + p.rows + p.start + range.row + 8 * row;
    own[row] = {at[0], at[p.statistics_gap], at[2 * p.statistics_gap], at[3 * p.statistics_gap]};
  }
  float total[M][4];
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) total[m][i] = 0;
  }
  const int first = p.part * 8 * M;
  others.begin();
  for (int start = range.begin; start < range.end; start += other_tokens) {
    float s[relation_tiles][4], t[relation_tiles][4];
    others.scores(start, s, t);
    const RelationSight sight{range, others.ids(start), p.start, start};
    const float* const statistics = others.statistics_of(start);
#pragma unroll
    for (int n = 0; n < relation_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float g = 0;
        if (sight.same(n, i)) {
          if (task.rows && !(a.causal && sight.behind(n, i) > 0))
            g += own[i / 2].gradient(s[n][i], t[n][i], scale_s, scale_t);
          if (task.columns && !(a.causal && sight.behind(n, i) < 0)) {
            const float* const at = statistics + sight.column(n, i);
            const RelationStatistics other{at[0], at[other_tokens], at[2 * other_tokens], at[3 * other_tokens]};
            g += other.gradient(s[n][i], t[n][i], scale_s, scale_t);
          }
        }
        s[n][i] = g * larger;
      }
    }
    const S* y = others.students(start);
    if (layout.wide) {
      S* const part = reinterpret_cast<S*>(shared + layout.part);
      fetch<S>(part, layout.student_pitch, task.student.other, p, others.ids(start), start, other_tokens, first, 8 * M);
      wait_for_copies();
      __syncthreads();
      y = part;
    }
    add_product_nn<S>(total, s, y, layout.student_pitch, spread);
  }

  // By way of shared memory, where a warp's rows are its own, to whole vectors.
  __syncthreads();
  const float factor = *task.factor * scale_s * ln2 / larger;
  S* const tile = reinterpret_cast<S*>(shared + layout.own_student) + warp * 16 * layout.student_pitch;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const bool valid = range.sequence[row] >= 0;
    float by = 0;
    if (valid) by = factor * a.shares[p.batch * a.positions + p.start + range.row + 8 * row];
    if (a.row_weights != nullptr) by /= *a.unit;
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        narrow(valid ? total[m][2 * row + i] * by : 0.0f,
               tile[(lane / 4 + 8 * row) * layout.student_pitch + 8 * m + lane % 4 * 2 + i]);
    }
  }
  __syncwarp();
  constexpr int width = vector_bytes / sizeof(S);
  const RelationView& v = task.gradient;
  S* const base = head_of<S>(v, p);
  for (int i = lane; i < 16 * 8 * M / width; i += warp_size) {
    const int row = i / (8 * M / width), column = i % (8 * M / width) * width;
    const int token = p.start + warp * 16 + row, count = min(width, v.size - first - column);
    if (token >= a.positions || count <= 0) continue;
    const S* const from = tile + row * layout.student_pitch + column;
    S* const to = base + token * v.token;
    if (v.vectors) {
      store(load<width>(from), to + first + column);
    } else {
#pragma unroll 1
      for (int k = 0; k < count; ++k) to[place_of(v, p.head, first + column + k)] = from[k];
    }
  }
}

}  // namespace pyd
