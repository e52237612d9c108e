// SPDX-License-Identifier: Apache-2.0
// Boundary between the attention_relation binding and its CUDA kernels (see launch.h).
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "launch.h"

namespace pyd {

constexpr int most_relations = 3;

// A tensor [B, H, N, d] with unit stride over features; the other strides are in elements.
struct RelationTensor {
  void* data;
  int64_t batch, head, token;
};

// One side, whose heads of `stored` features are concatenated and split again into relation heads of `size`.
struct RelationFeatures {
  int stored, size;
  double scale;  // of the scores
};

struct RelationCuda {
  RelationTensor student_a, student_b, teacher_a, teacher_b;
  RelationTensor gradient_a, gradient_b;
  RelationFeatures student, teacher;
  int heads;
  bool self;
  double weight;
};

enum class RelationMean { none, sequences, tokens };

struct AttentionRelationCuda {
  Dtype dtype;
  int count;
  RelationCuda relations[most_relations];
  int batches, positions;
  bool causal, with_gradient;
  RelationMean mean;
  const bool* mask;            // [B, N], or null
  const int64_t* segment_ids;  // [B, N], or null
  const double* num_items;     // one number, or null
  const float* row_weights;    // [B, heads, N], or null
  float* row_loss;             // [B, heads, N], or null
  float* loss;                 // one number, or null
  float* parts;                // [count]: value of each relation
  float* gradient_scale;       // one number: what is still to be applied to the gradients
  void* workspace;             // [attention_relation_workspace(...)]
};

int64_t attention_relation_workspace(const AttentionRelationCuda& problem);
int launch_attention_relation(const AttentionRelationCuda& problem, void* stream);

}  // namespace pyd
