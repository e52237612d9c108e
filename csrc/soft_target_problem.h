// SPDX-License-Identifier: Apache-2.0
// From the tensors of a soft_target call to the problem that its kernels are told, with every check that does not look
// at data: the same for all devices.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "soft_target.h"
#include "tensors.h"

namespace pyd {

struct SoftTargetOptions {
  std::optional<torch::stable::Tensor> labels, mask, num_items;
  std::string divergence;
  double temperature, hard_weight, jsd_beta;
  bool scale_by_temperature;
  int64_t ignore_index;
  std::string reduction;
};

inline Divergence divergence_of(const SoftTargetOptions& o) {
  if (o.divergence == "forward_kl" || (o.divergence == "jsd" && o.jsd_beta == 0)) return Divergence::forward_kl;
  if (o.divergence == "reverse_kl" || (o.divergence == "jsd" && o.jsd_beta == 1)) return Divergence::reverse_kl;
  if (o.divergence == "jsd") return Divergence::jsd;
  if (o.divergence == "mse") return Divergence::mse;
  STD_TORCH_CHECK(o.divergence == "cross_entropy", "soft_target: unknown divergence '", o.divergence, "'");
  return Divergence::cross_entropy;
}

// The tensor as rows without a copy: unit stride over classes, and leading dimensions that collapse to at most two.
inline std::optional<Rows> as_rows(const torch::stable::Tensor& t) {
  const int64_t last = t.dim() - 1, size = static_cast<int64_t>(t.element_size());
  if (t.size(last) > 1 && t.stride(last) != 1) return std::nullopt;
  std::vector<std::pair<int64_t, int64_t>> collapsed;  // (size, stride), outermost first
  for (int64_t d = 0; d < last; ++d) {
    if (t.size(d) == 1) continue;
    if (!collapsed.empty() && collapsed.back().second == t.size(d) * t.stride(d))
      collapsed.back() = {collapsed.back().first * t.size(d), t.stride(d)};
    else
      collapsed.emplace_back(t.size(d), t.stride(d));
  }
  if (collapsed.size() > 2) return std::nullopt;
  while (collapsed.size() < 2) collapsed.insert(collapsed.begin(), {1, 0});
  return Rows{t.const_data_ptr(), collapsed[1].first, collapsed[0].second * size, collapsed[1].second * size};
}

// Checks the arguments and fills in the problem; tensors that had to be copied for it go to `keep`.
inline SoftTargetProblem soft_target_problem(const torch::stable::Tensor& student, const torch::stable::Tensor& teacher,
                                             const SoftTargetOptions& o, void* gradient,
                                             std::vector<torch::stable::Tensor>& keep) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(student.dim() >= 1 && same_shape(student, teacher), "soft_target: teacher must match student, got ",
                  shape(teacher), " vs ", shape(student));
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(),
                  "soft_target: student and teacher must have one dtype");
  const int64_t classes = student.size(student.dim() - 1);
  STD_TORCH_CHECK(classes >= 1, "soft_target: there must be at least one class, got ", shape(student));
  STD_TORCH_CHECK(o.reduction == "mean" || o.reduction == "sum" || o.reduction == "none",
                  "soft_target: unknown reduction '", o.reduction, "'");
  STD_TORCH_CHECK(o.hard_weight == 0 || o.labels, "soft_target: hard_weight needs labels");

  SoftTargetProblem p{};
  p.dtype = dtype_of("soft_target", student);
  p.divergence = divergence_of(o);
  p.rows = student.numel() / classes;
  p.classes = classes;
  p.grad = gradient;
  p.ignore_index = o.ignore_index;
  p.jsd_beta = o.jsd_beta;
  p.temperature = o.temperature;
  STD_TORCH_CHECK(p.divergence != Divergence::mse || p.temperature == 1, "soft_target: mse needs temperature 1");

  // Strided rows are read where they lie; only odd layouts are copied.
  const auto rows = [&](const torch::stable::Tensor& t) {
    if (const auto r = as_rows(t)) return *r;
    keep.push_back(torch::stable::contiguous(t));
    return *as_rows(keep.back());
  };
  p.student = rows(student);
  p.teacher = rows(teacher);
  const double T2 = o.scale_by_temperature ? p.temperature * p.temperature : 1;
  p.soft_value = (1 - o.hard_weight) * T2;
  p.hard_value = o.hard_weight;
  // At equality every divergence but the soft cross-entropy is 0 with gradient 0: what is left is the hard part alone.
  if (o.hard_weight == 1) {
    p.divergence = Divergence::forward_kl;
    p.temperature = 1;
    p.teacher = p.student;
  }

  if (o.labels) {
    STD_TORCH_CHECK(o.labels->scalar_type() == ScalarType::Long && o.labels->numel() == p.rows,
                    "soft_target: labels must be int64, one per row, got ", shape(*o.labels));
    keep.push_back(torch::stable::contiguous(*o.labels));
    p.labels = static_cast<const int64_t*>(keep.back().const_data_ptr());
  }
  if (o.mask) {
    STD_TORCH_CHECK(o.mask->scalar_type() == ScalarType::Bool && o.mask->numel() == p.rows,
                    "soft_target: mask must be bool, one per row, got ", shape(*o.mask));
    keep.push_back(torch::stable::contiguous(*o.mask));
    p.mask = static_cast<const bool*>(keep.back().const_data_ptr());
  }
  return p;
}

// Sizes of the loss: one value per row, or a 0-d tensor.
inline std::vector<int64_t> soft_target_loss_shape(const torch::stable::Tensor& student, const SoftTargetOptions& o) {
  std::vector<int64_t> sizes;
  if (o.reduction == "none")
    for (int64_t d = 0; d + 1 < student.dim(); ++d) sizes.push_back(student.size(d));
  return sizes;
}

}  // namespace pyd
