// SPDX-License-Identifier: Apache-2.0
// The projected_mse op on CUDA devices: allocation and launch. Nothing here waits for the device.
#include "projected_mse.h"

#include <torch/csrc/stable/ops.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../projected_mse_problem.h"
#include "binding.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

MatrixCuda matrix_of(const Tensor& t) { return {t.mutable_data_ptr(), static_cast<int>(t.size(1)), t.stride(0)}; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> projected_mse(
    Tensor student, Tensor teacher, Tensor projection, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::optional<Tensor> num_items, std::optional<Tensor> row_weights, bool up, bool normalize, std::string method,
    std::string reduction, bool with_student, bool with_projection, bool with_bias) {
  const ProjectedMseProblem p = projected_mse_problem(
      student, teacher, projection, {bias, mask, row_weights, up, normalize, method, reduction, with_bias});
  STD_TORCH_CHECK(p.dtype != Dtype::f64,
                  "projected_mse: the CUDA kernel takes fp32, bf16 and fp16, got fp64; use impl='reference', or "
                  "impl='triton' where it is installed");
  check_device("projected_mse", "teacher", p.teacher, p.student);
  check_device("projected_mse", "projection", p.projection, p.student);
  if (p.bias) check_device("projected_mse", "bias", *p.bias, p.student);
  if (p.mask) check_device("projected_mse", "mask", *p.mask, p.student);
  if (p.row_weights) check_device("projected_mse", "row_weights", *p.row_weights, p.student);
  for (const Tensor* t : {&p.student, &p.teacher})
    STD_TORCH_CHECK(t->size(1) <= std::numeric_limits<int32_t>::max(), "projected_mse: too many features, got ",
                    shape(*t));

  const int64_t rows = p.student.size(0);
  const auto fresh = [&](bool wanted, std::vector<int64_t> sizes, ScalarType dtype) {
    return torch::stable::new_empty(p.student, wanted ? sizes : std::vector<int64_t>{0},
                                    std::optional<ScalarType>(dtype));
  };
  std::vector<int64_t> loss_sizes;
  if (p.by_row) loss_sizes = {rows};
  Tensor loss = fresh(true, loss_sizes, ScalarType::Float), gradient_scale = fresh(true, {}, ScalarType::Float);
  Tensor grad_student = fresh(with_student, {rows, p.student.size(1)}, p.student.scalar_type());
  Tensor grad_projection = fresh(with_projection, {p.projection.size(0), p.projection.size(1)}, ScalarType::Float);
  Tensor grad_bias = fresh(with_bias, {p.projection.size(1)}, ScalarType::Float);

  ProjectedMseCuda cuda{};
  cuda.dtype = p.dtype;
  cuda.projection_dtype = p.projection_dtype;
  cuda.rows = rows;
  cuda.source = matrix_of(p.source());
  cuda.target = matrix_of(p.target());
  cuda.projection = p.projection.const_data_ptr();
  if (p.bias) cuda.bias = p.bias->const_data_ptr();
  if (p.mask) cuda.mask = static_cast<const bool*>(p.mask->const_data_ptr());
  if (p.row_weights) cuda.row_weights = static_cast<const float*>(p.row_weights->const_data_ptr());
  cuda.normalize = normalize;
  cuda.mean = reduction == "mean";
  if (with_student) (up ? cuda.grad_source : cuda.grad_target) = matrix_of(grad_student);
  if (with_projection) cuda.grad_projection = static_cast<float*>(grad_projection.mutable_data_ptr());
  if (with_bias) cuda.grad_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  (p.by_row ? cuda.row_loss : cuda.loss) = static_cast<float*>(loss.mutable_data_ptr());
  cuda.by_row = p.by_row;
  cuda.gradient_scale = static_cast<float*>(gradient_scale.mutable_data_ptr());
  Tensor items;
  if (num_items) {
    items = torch::stable::to(*num_items, std::optional<ScalarType>(ScalarType::Double), std::nullopt,
                              p.student.device(), std::nullopt, /*non_blocking=*/true);
    cuda.num_items = static_cast<const double*>(items.const_data_ptr());
  }
  const OnDevice device(p.student);
  int64_t bytes = 0;
  check_launch("projected_mse", projected_mse_workspace(cuda, bytes));
  Tensor workspace = fresh(true, {bytes}, ScalarType::Byte);
  cuda.workspace = workspace.mutable_data_ptr();
  check_launch("projected_mse", launch_projected_mse(cuda, device.stream()));
  return {loss, grad_student, grad_projection, grad_bias, gradient_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PYD_NAMESPACE, PYD_KEY, m) { m.impl("projected_mse", TORCH_BOX(&projected_mse)); }

}  // namespace pyd
