// SPDX-License-Identifier: Apache-2.0
// The attention_relation op on CUDA devices: allocation and launch. Nothing here waits for the device.
#include "attention_relation.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <utility>

#include "../attention_relation_problem.h"
#include "binding.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

RelationTensor tensor_of(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_relation(
    std::optional<Tensor> student_q, std::optional<Tensor> student_k, std::optional<Tensor> student_v,
    std::optional<Tensor> teacher_q, std::optional<Tensor> teacher_k, std::optional<Tensor> teacher_v,
    std::vector<int64_t> relations, std::vector<double> weights, std::optional<Tensor> mask,
    std::optional<Tensor> segment_ids, std::optional<Tensor> num_items, std::optional<Tensor> row_weights, bool causal,
    std::optional<int64_t> relation_heads, std::optional<double> scale, std::string reduction, bool with_gradient) {
  const RelationProblem p = relation_problem(
      {student_q, student_k, student_v}, {teacher_q, teacher_k, teacher_v},
      {relations, weights, mask, segment_ids, num_items, row_weights, causal, relation_heads, scale, reduction});
  const Tensor& first = p.first();
  STD_TORCH_CHECK(p.dtype != Dtype::f64,
                  "attention_relation: the CUDA kernel takes fp32, bf16 and fp16, got fp64; use impl='reference', or "
                  "impl='triton' where it is installed");
  for (int slot = 0; slot < relation_slots; ++slot) {
    if (!p.students[slot]) continue;
    check_device("attention_relation", "a student's tensor", *p.students[slot], first);
    check_device("attention_relation", "a teacher's tensor", *p.teachers[slot], first);
  }
  if (p.mask) check_device("attention_relation", "mask", *p.mask, first);
  if (p.segment_ids) check_device("attention_relation", "segment_ids", *p.segment_ids, first);
  if (p.row_weights) check_device("attention_relation", "row_weights", *p.row_weights, first);

  const auto fresh = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(first, sizes, std::optional<ScalarType>(dtype));
  };
  const int64_t count = static_cast<int64_t>(p.pairs.size());
  const bool by_row = reduction == "none";
  std::vector<int64_t> loss_sizes;
  if (by_row) loss_sizes = {p.batches, p.pairs[0].heads, p.positions};
  Tensor loss = fresh(loss_sizes, ScalarType::Float), parts = fresh({count}, ScalarType::Float);
  Tensor gradient_scale = fresh({}, ScalarType::Float);
  std::array<Tensor, relation_slots> gradients;
  for (int slot = 0; slot < relation_slots; ++slot)
    gradients[slot] = with_gradient && p.students[slot] ? torch::stable::empty_like(*p.students[slot])
                                                        : torch::stable::new_empty(first, {0});

  AttentionRelationCuda cuda{};
  cuda.dtype = p.dtype;
  for (const RelationPair& pair : p.pairs) {
    const Tensor &student = *p.students[pair.a], &teacher = *p.teachers[pair.a];
    STD_TORCH_CHECK(pair.heads * pair.student_size <= std::numeric_limits<int32_t>::max() &&
                        pair.heads * pair.teacher_size <= std::numeric_limits<int32_t>::max(),
                    "attention_relation: too many features, got ", shape(student), " and ", shape(teacher));
    RelationCuda& relation = cuda.relations[cuda.count++];
    relation = {.student_a = tensor_of(student),
                .student_b = tensor_of(*p.students[pair.b]),
                .teacher_a = tensor_of(teacher),
                .teacher_b = tensor_of(*p.teachers[pair.b]),
                .gradient_a = {},
                .gradient_b = {},
                .student = {static_cast<int>(student.size(3)), static_cast<int>(pair.student_size), pair.student_scale},
                .teacher = {static_cast<int>(teacher.size(3)), static_cast<int>(pair.teacher_size), pair.teacher_scale},
                .heads = static_cast<int>(pair.heads),
                .self = pair.a == pair.b,
                .weight = pair.weight};
    if (!with_gradient) continue;
    relation.gradient_a = tensor_of(gradients[pair.a]);
    relation.gradient_b = tensor_of(gradients[pair.b]);
  }
  STD_TORCH_CHECK(p.batches <= std::numeric_limits<int32_t>::max(), "attention_relation: too many batch rows, got ",
                  shape(first));
  cuda.batches = static_cast<int>(p.batches);
  cuda.positions = static_cast<int>(p.positions);
  cuda.causal = causal;
  cuda.with_gradient = with_gradient;
  cuda.mean = reduction == "sequence_mean" ? RelationMean::sequences
              : reduction == "token_mean"  ? RelationMean::tokens
                                           : RelationMean::none;
  if (p.mask) cuda.mask = static_cast<const bool*>(p.mask->const_data_ptr());
  if (p.segment_ids) cuda.segment_ids = static_cast<const int64_t*>(p.segment_ids->const_data_ptr());
  if (p.row_weights) cuda.row_weights = static_cast<const float*>(p.row_weights->const_data_ptr());
  Tensor items;
  if (num_items) {
    items = torch::stable::to(*num_items, std::optional<ScalarType>(ScalarType::Double), std::nullopt, first.device(),
                              std::nullopt, /*non_blocking=*/true);
    cuda.num_items = static_cast<const double*>(items.const_data_ptr());
  }
  cuda.row_loss = by_row ? static_cast<float*>(loss.mutable_data_ptr()) : nullptr;
  cuda.loss = by_row ? nullptr : static_cast<float*>(loss.mutable_data_ptr());
  cuda.parts = static_cast<float*>(parts.mutable_data_ptr());
  cuda.gradient_scale = static_cast<float*>(gradient_scale.mutable_data_ptr());
  Tensor workspace = fresh({attention_relation_workspace(cuda)}, ScalarType::Byte);
  cuda.workspace = workspace.mutable_data_ptr();
  const OnDevice device(first);
  check_launch("attention_relation", launch_attention_relation(cuda, device.stream()));
  return {loss, parts, gradients[0], gradients[1], gradients[2], gradient_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PYD_NAMESPACE, PYD_KEY, m) { m.impl("attention_relation", TORCH_BOX(&attention_relation)); }

}  // namespace pyd
