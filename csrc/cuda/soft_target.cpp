// SPDX-License-Identifier: Apache-2.0
// The soft_target op on CUDA devices: allocation and launch. Nothing here waits for the device.
#include "soft_target.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>

#include "../soft_target_problem.h"
#include "binding.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Computes loss and gradient scale; the gradient goes to `gradient` unless that is null.
std::tuple<Tensor, Tensor> compute(const Tensor& student, const Tensor& teacher, const SoftTargetOptions& o,
                                   void* gradient) {
  std::vector<Tensor> keep;
  const SoftTargetProblem problem = soft_target_problem(student, teacher, o, gradient, keep);
  STD_TORCH_CHECK(problem.dtype != Dtype::f64,
                  "soft_target: the CUDA kernel takes fp32, bf16 and fp16, got fp64; use impl='reference', or "
                  "impl='triton' where it is installed");
  STD_TORCH_CHECK(problem.classes <= std::numeric_limits<int32_t>::max(), "soft_target: too many classes, got ",
                  shape(student));

  const auto fresh = [&](std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(student, sizes, std::optional<ScalarType>(dtype));
  };
  const bool per_row = o.reduction == "none";
  Tensor loss = fresh(soft_target_loss_shape(student, o), ScalarType::Float);
  Tensor gradient_scale = fresh({}, ScalarType::Float);
  Tensor row_values = per_row ? loss : fresh({problem.rows}, ScalarType::Float);
  Tensor scales = fresh({static_cast<int64_t>(soft_target_scales_bytes)}, ScalarType::Byte);
  SoftTargetCuda cuda{.mean = o.reduction == "mean",
                      .num_items = nullptr,
                      .scales = scales.mutable_data_ptr(),
                      .row_values = static_cast<float*>(row_values.mutable_data_ptr()),
                      .loss = per_row ? nullptr : static_cast<float*>(loss.mutable_data_ptr()),
                      .gradient_scale = static_cast<float*>(gradient_scale.mutable_data_ptr())};
  if (o.num_items) {
    keep.push_back(torch::stable::to(*o.num_items, std::optional<ScalarType>(ScalarType::Double), std::nullopt,
                                     student.device(), std::nullopt, /*non_blocking=*/true));
    cuda.num_items = static_cast<const double*>(keep.back().const_data_ptr());
  }
  const OnDevice device(student);
  check_launch("soft_target", launch_soft_target(problem, cuda, device.stream()));
  return {loss, gradient_scale};
}

std::tuple<Tensor, Tensor, Tensor> soft_target(Tensor student, Tensor teacher, std::optional<Tensor> labels,
                                               std::optional<Tensor> mask, std::optional<Tensor> num_items,
                                               std::string divergence, double temperature, double hard_weight,
                                               double jsd_beta, bool scale_by_temperature, int64_t ignore_index,
                                               std::string reduction, bool with_gradient) {
  std::vector<int64_t> sizes{0};
  if (with_gradient) sizes.assign(student.sizes().begin(), student.sizes().end());
  Tensor gradient = torch::stable::new_empty(student, sizes);
  auto [loss, scale] = compute(student, teacher,
                               {labels, mask, num_items, divergence, temperature, hard_weight, jsd_beta,
                                scale_by_temperature, ignore_index, reduction},
                               with_gradient ? gradient.mutable_data_ptr() : nullptr);
  return {loss, gradient, scale};
}

std::tuple<Tensor, Tensor> soft_target_inplace(Tensor student, Tensor teacher, std::optional<Tensor> labels,
                                               std::optional<Tensor> mask, std::optional<Tensor> num_items,
                                               std::string divergence, double temperature, double hard_weight,
                                               double jsd_beta, bool scale_by_temperature, int64_t ignore_index,
                                               std::string reduction) {
  STD_TORCH_CHECK(student.is_contiguous(), "soft_target_: student must be contiguous, got ", shape(student));
  return compute(student, teacher,
                 {labels, mask, num_items, divergence, temperature, hard_weight, jsd_beta, scale_by_temperature,
                  ignore_index, reduction},
                 student.mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PYD_NAMESPACE, PYD_KEY, m) {
  m.impl("soft_target", TORCH_BOX(&soft_target));
  m.impl("soft_target_", TORCH_BOX(&soft_target_inplace));
}

}  // namespace pyd
