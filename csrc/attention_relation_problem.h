// SPDX-License-Identifier: Apache-2.0
// From the tensors of an attention_relation call to what its kernels are told, with every check that does not look at
// data: the same for all devices.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "tensors.h"

namespace pyd {

constexpr int relation_slots = 3;  // queries, keys, values

using RelationSlots = std::array<std::optional<torch::stable::Tensor>, relation_slots>;

struct RelationOptions {
  std::vector<int64_t> relations;  // two slots each
  std::vector<double> weights;     // one each
  std::optional<torch::stable::Tensor> mask, segment_ids, num_items, row_weights;
  bool causal;
  std::optional<int64_t> relation_heads;
  std::optional<double> scale;
  std::string reduction;
};

// Which two slots are related, in how many heads, and of each side the features and the score scale of a head.
struct RelationPair {
  int64_t a, b, heads;
  int64_t student_size, teacher_size;
  double student_scale, teacher_scale;
  double weight;
};

// Only tensors that a relation needs, with unit stride over features; `mask` and what follows contiguous.
struct RelationProblem {
  RelationSlots students, teachers;
  std::vector<RelationPair> pairs;
  Dtype dtype;
  int64_t batches, positions;
  std::optional<torch::stable::Tensor> mask, segment_ids, row_weights;

  const torch::stable::Tensor& first() const { return *students[pairs.front().a]; }
};

inline RelationProblem relation_problem(const RelationSlots& students, const RelationSlots& teachers,
                                        const RelationOptions& o) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  const int64_t count = static_cast<int64_t>(o.relations.size()) / 2;
  STD_TORCH_CHECK(count >= 1 && o.relations.size() == 2 * o.weights.size(),
                  "attention_relation: relations must hold two slots per weight");
  STD_TORCH_CHECK(
      o.reduction == "sequence_mean" || o.reduction == "token_mean" || o.reduction == "sum" || o.reduction == "none",
      "attention_relation: unknown reduction '", o.reduction, "'");
  STD_TORCH_CHECK(o.reduction != "none" || count == 1, "attention_relation: reduction 'none' takes one relation");
  STD_TORCH_CHECK(!o.scale || *o.scale > 0, "attention_relation: scale must be above 0");
  RelationProblem p{};
  std::array<int, relation_slots> uses{};
  const Tensor* first = nullptr;
  for (int64_t r = 0; r < count; ++r)
    for (int side = 0; side < 2; ++side) {
      const int64_t slot = o.relations[2 * r + side];
      STD_TORCH_CHECK(slot >= 0 && slot < relation_slots && students[slot] && teachers[slot],
                      "attention_relation: relation ", r, " needs the tensors of slot ", slot);
      if (side == 1 && slot == o.relations[2 * r]) continue;
      STD_TORCH_CHECK(++uses[slot] == 1, "attention_relation: slot ", slot, " stands in two relations");
      const auto usable = [&](const Tensor& t) {
        STD_TORCH_CHECK(t.dim() == 4, "attention_relation: tensors must be [B, H, N, d], got ", shape(t));
        return t.size(3) > 1 && t.stride(3) != 1 ? torch::stable::contiguous(t) : t;
      };
      p.students[slot] = usable(*students[slot]);
      p.teachers[slot] = usable(*teachers[slot]);
      if (first == nullptr) first = &*p.students[slot];
      for (const Tensor* t : {&*p.students[slot], &*p.teachers[slot]})
        STD_TORCH_CHECK(
            t->scalar_type() == first->scalar_type() && t->size(0) == first->size(0) && t->size(2) == first->size(2),
            "attention_relation: all tensors must have one dtype, B and N, got ", shape(*t), " vs ", shape(*first));
    }
  p.dtype = dtype_of("attention_relation", *first);
  p.batches = first->size(0);
  p.positions = first->size(2);
  STD_TORCH_CHECK(p.positions < (int64_t{1} << 31), "attention_relation: N must be below 2^31, got ", p.positions);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t a = o.relations[2 * r], b = o.relations[2 * r + 1];
    const Tensor &student = *p.students[a], &teacher = *p.teachers[a];
    const int64_t heads = o.relation_heads ? *o.relation_heads : student.size(1);
    const auto width = [](const Tensor& t) { return t.size(1) * t.size(3); };
    STD_TORCH_CHECK(same_shape(student, *p.students[b]) && same_shape(teacher, *p.teachers[b]),
                    "attention_relation: both tensors of a relation must have one shape, got ", shape(student), " and ",
                    shape(*p.students[b]), ", ", shape(teacher), " and ", shape(*p.teachers[b]));
    STD_TORCH_CHECK(heads >= 1 && width(student) % heads == 0 && width(teacher) % heads == 0 &&
                        (o.relation_heads || student.size(1) == teacher.size(1)),
                    "attention_relation: ", heads, " relation heads do not divide ", shape(student), " and ",
                    shape(teacher));
    const auto scale = [&](int64_t size) { return o.scale ? *o.scale : 1 / std::sqrt(static_cast<double>(size)); };
    const int64_t of_student = width(student) / heads, of_teacher = width(teacher) / heads;
    p.pairs.push_back({a, b, heads, of_student, of_teacher, scale(of_student), scale(of_teacher), o.weights[r]});
  }
  const auto of_tokens = [&](const std::optional<Tensor>& t, ScalarType dtype, const char* name) {
    if (!t) return t;
    STD_TORCH_CHECK(t->scalar_type() == dtype && t->dim() == 2 && t->size(0) == p.batches && t->size(1) == p.positions,
                    "attention_relation: ", name, " must have shape [", p.batches, ", ", p.positions,
                    "] and its proper dtype, got ", shape(*t));
    return std::optional<Tensor>(torch::stable::contiguous(*t));
  };
  p.mask = of_tokens(o.mask, ScalarType::Bool, "mask");
  p.segment_ids = of_tokens(o.segment_ids, ScalarType::Long, "segment_ids");
  if (o.reduction == "none" && o.row_weights) {
    STD_TORCH_CHECK(
        o.row_weights->numel() == p.batches * p.pairs[0].heads * p.positions &&
            o.row_weights->scalar_type() == (p.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float),
        "attention_relation: row_weights must be [B, heads, N] in the dtype of the loss, got ", shape(*o.row_weights));
    p.row_weights = torch::stable::contiguous(*o.row_weights);
  }
  return p;
}

}  // namespace pyd
