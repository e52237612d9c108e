// SPDX-License-Identifier: Apache-2.0
// Launches of attention_relation: what each block works on, and how much shared memory that takes.
#include "attention_relation.h"

#include <algorithm>
#include <cmath>

#include "attention_relation.cuh"
#include "launch.cuh"

namespace pyd {
namespace {

constexpr int one_block = 1024;  // threads of a kernel that is one block

// What kernels hand to each other, in one piece of memory.
struct Workspace {
  int *firsts, *lasts, *counts;
  float *shares, *unit, *factors;
  double* partial[most_relations];
  float* statistics[most_relations];
  int64_t programs[most_relations];
  int64_t bytes;

  explicit Workspace(const AttentionRelationCuda& p) {
    Carver carver{static_cast<char*>(p.workspace)};
    const int64_t tokens = static_cast<int64_t>(p.batches) * p.positions;
    carver.take(firsts, tokens);
    carver.take(lasts, tokens);
    carver.take(counts, 2 * p.batches * blocks_of(p.positions, relation_threads));
    carver.take(shares, tokens);
    carver.take(unit, 1);
    carver.take(factors, most_relations);
    for (int r = 0; r < p.count; ++r) {
      programs[r] = p.batches * blocks_of(p.positions, own_tokens) * p.relations[r].heads;
      carver.take(partial[r], programs[r]);
      carver.take(statistics[r], p.with_gradient ? 4 * tokens * p.relations[r].heads : 0);
    }
    bytes = carver.bytes;
  }
};

template <class S>
RelationView view_of(const RelationTensor& t, const RelationFeatures& f) {
  RelationView v{.data = t.data,
                 .batch = t.batch,
                 .head = t.head,
                 .token = t.token,
                 .stored = f.stored,
                 .size = f.size,
                 .cut = f.stored % f.size != 0 && t.head != f.stored,
                 .vectors = false};
  const auto aligned = [](int64_t elements) { return elements * static_cast<int64_t>(sizeof(S)) % vector_bytes == 0; };
  v.vectors = !v.cut && reinterpret_cast<uintptr_t>(t.data) % vector_bytes == 0 && aligned(f.size) &&
              aligned(t.batch) && aligned(t.head) && aligned(t.token);
  return v;
}

// A relation with the tokens of its first tensor, or of its second, as a block's own.
template <class S>
RelationTask task_of(const AttentionRelationCuda& p, const Workspace& w, int r, bool second) {
  const RelationCuda& relation = p.relations[r];
  const auto side = [&](const RelationTensor& a, const RelationTensor& b, const RelationFeatures& f) {
    const RelationView first = view_of<S>(a, f), other = view_of<S>(b, f);
    return RelationSideView{second ? other : first, second ? first : other,
                            static_cast<float>(f.scale / std::log(2.0))};
  };
  RelationTask task{};
  task.student = side(relation.student_a, relation.student_b, relation.student);
  task.teacher = side(relation.teacher_a, relation.teacher_b, relation.teacher);
  task.heads = relation.heads;
  task.parts = 1;
  task.statistics = w.statistics[r];
  task.partial = w.partial[r];
  task.factor = w.factors + r;
  return task;
}

struct Launcher {
  const AttentionRelationCuda& p;
  const Workspace& w;
  cudaStream_t stream;

  RelationLaunch empty() const {
    RelationLaunch a{};
    a.batches = p.batches;
    a.positions = p.positions;
    a.causal = p.causal;
    a.with_gradient = p.with_gradient;
    a.firsts = w.firsts;
    a.lasts = w.lasts;
    a.shares = w.shares;
    a.row_weights = p.row_weights;
    a.unit = w.unit;
    a.row_loss = p.row_loss;
    return a;
  }

  template <class S>
  cudaError_t over_tokens(void (*kernel)(RelationLaunch), RelationLaunch& a, bool gradient) const {
    int64_t blocks = 0, shared = 0;
    for (int i = 0; i < a.count; ++i) {
      RelationTask& task = a.tasks[i];
      task.first_block = blocks;
      blocks += p.batches * blocks_of(p.positions, own_tokens) * task.heads * task.parts;
      shared =
          std::max<int64_t>(shared, relation_shared<S>(task.student.own.size, task.teacher.own.size, gradient).bytes);
    }
    if (blocks == 0) return cudaSuccess;
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), relation_threads, shared, stream, a);
  }

  template <class S>
  cudaError_t values() const {
    RelationLaunch a = empty();
    for (int r = 0; r < p.count; ++r) a.tasks[a.count++] = task_of<S>(p, w, r, false);
    return over_tokens<S>(relation_values<S>, a, false);
  }

  // Tasks whose students have as many features in shared memory share a launch.
  template <class S, int M>
  cudaError_t gradients() const {
    RelationLaunch a = empty();
    for (int r = 0; r < p.count; ++r) {
      const RelationCuda& relation = p.relations[r];
      if (padded(relation.student.size) != 8 * M) continue;
      for (const bool second : {false, true}) {
        if (second && relation.self) continue;
        RelationTask& task = a.tasks[a.count++] = task_of<S>(p, w, r, second);
        task.gradient = view_of<S>(second ? relation.gradient_b : relation.gradient_a, relation.student);
        task.parts = static_cast<int>(blocks_of(relation.student.size, 8 * M));
        task.rows = !second;
        task.columns = second || relation.self;
      }
    }
    return over_tokens<S>(relation_gradients<S, M>, a, true);
  }

  template <class S>
  cudaError_t all() const {
    const int64_t token_blocks = p.batches * blocks_of(p.positions, relation_threads);
    if (token_blocks > 0) {
      const RelationTokens tokens{p.mask,   p.segment_ids, p.positions, p.mean == RelationMean::sequences,
                                  w.firsts, w.lasts,       w.shares,    w.counts};
      PYD_LAUNCH(relation_sequences, static_cast<unsigned>(token_blocks), relation_threads, relation_sequences_bytes,
                 stream, tokens);
      if (const auto error = cudaGetLastError()) return error;
      if (p.row_weights != nullptr) {
        PYD_LAUNCH(relation_unit, 1, one_block, (reduction_bytes<float, 1>), stream, p.row_weights,
                   static_cast<const int*>(w.firsts), p.batches, p.relations[0].heads, p.positions, w.unit);
        if (const auto error = cudaGetLastError()) return error;
      }
      if (const auto error = values<S>()) return error;
    }
    RelationTotal total{};
    for (int r = 0; r < p.count; ++r) {
      total.partial[r] = w.partial[r];
      total.programs[r] = w.programs[r];
      total.heads[r] = p.relations[r].heads;
      total.weights[r] = p.relations[r].weight;
    }
    total.count = p.count;
    total.counts = w.counts;
    total.blocks = token_blocks;
    total.mean = p.mean;
    total.half_precision = p.dtype == Dtype::f16;
    total.num_items = p.num_items;
    total.loss = p.loss;
    total.parts = p.parts;
    total.factors = w.factors;
    total.gradient_scale = p.gradient_scale;
    PYD_LAUNCH(relation_total, 1, one_block, relation_total_bytes, stream, total);
    if (const auto error = cudaGetLastError()) return error;
    if (!p.with_gradient || token_blocks == 0) return cudaSuccess;
    if (const auto error = gradients<S, 2>()) return error;
    if (const auto error = gradients<S, 4>()) return error;
    if (const auto error = gradients<S, 6>()) return error;
    return gradients<S, 8>();
  }
};

}  // namespace

int64_t attention_relation_workspace(const AttentionRelationCuda& p) { return Workspace(p).bytes; }

int launch_attention_relation(const AttentionRelationCuda& p, void* stream) {
  const Workspace workspace(p);
  const Launcher launcher{p, workspace, static_cast<cudaStream_t>(stream)};
  switch (p.dtype) {
    case Dtype::f32:
      return launcher.all<float>();
    case Dtype::bf16:
      return launcher.all<__nv_bfloat16>();
    case Dtype::f16:
      return launcher.all<__half>();
    case Dtype::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyd
