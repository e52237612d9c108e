// SPDX-License-Identifier: Apache-2.0
// Boundary between the attention_relation binding and its CPU kernels: plain types, no torch, no per-instruction-set
// code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace pyd {

// A tensor [B, heads, N, head_size] with unit stride over features; strides in elements.
struct Heads {
  const void* data;
  int64_t head_size;
  int64_t batch_stride, head_stride, token_stride;
};

// One side of a relation, its heads concatenated and split again into relation heads of `size` features.
struct RelationSide {
  Heads a, b;  // the same for a self relation
  int64_t size;
  double scale;  // of the scores
};

// The tokens that see each other: one sequence of a batch row.
struct Sequence {
  int64_t batch;
  const int32_t* tokens;  // [count] ascending positions
  int64_t count;
  double weight;  // of one query row in the gradient
};

// One relation head of one sequence: the unit of work.
struct RelationJob {
  Dtype dtype;
  RelationSide student, teacher;
  bool self, causal;
  Sequence sequence;
  int64_t relation_head;
  const void* row_weights;  // [N] gradient arriving at each query row, float (double for f64), or null
  Heads grad_a, grad_b;     // where the gradients go (the same for a self relation); null: not wanted
  void* row_loss;           // [N] value of each query row, float (double for f64), or null
};

// A job's query rows are taken in blocks whose size depends on the job alone. Each adds to the gradient of the keys, in
// order; a part computed elsewhere and added later gives the same bits.
struct AttentionRelationKernel {
  // Whether the job is done in one sweep, or (long sequences) in several, which need no gradient of all keys at once.
  bool (*one_sweep)(const RelationJob&);
  // Whether the job is to be done as a whole even where threads idle: half the work, but not in parts.
  bool (*symmetric)(const RelationJob&);
  size_t (*scratch_bytes)(const RelationJob&);  // per thread, 64-byte aligned
  size_t (*partial_bytes)(const RelationJob&);  // of `total` and of each `partial`
  // One sweep, all of it: returns the sum of the rows' values. `next` is the job that this thread will do next, or
  // null.
  double (*whole)(const RelationJob&, const RelationJob* next, void* total, void* scratch);
  // The same in parts. The first writes to `total`, any other to its own `partial`, which `add` adds when its turn has
  // come; `write_keys` ends it.
  int64_t (*parts)(const RelationJob&);
  double (*part)(const RelationJob&, int64_t part, void* total, void* partial, void* scratch);
  void (*add)(const RelationJob&, int64_t part, void* total, const void* partial);
  void (*write_keys)(const RelationJob&, const void* total);
  // Several sweeps: blocks of tokens, first their row statistics (`statistics_bytes` in all), then their gradients.
  int64_t (*blocks)(const RelationJob&);
  size_t (*statistics_bytes)(const RelationJob&);
  double (*block_statistics)(const RelationJob&, int64_t block, void* statistics, void* scratch);
  void (*block_gradient)(const RelationJob&, int64_t block, const void* statistics, void* scratch);
};

namespace avx512 {
extern const AttentionRelationKernel attention_relation;
}
namespace avx2 {
extern const AttentionRelationKernel attention_relation;
}
namespace generic {
extern const AttentionRelationKernel attention_relation;
}

}  // namespace pyd
