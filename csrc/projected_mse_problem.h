// SPDX-License-Identifier: Apache-2.0
// Every check of a projected_mse call that does not look at data, and its tensors as kernels read them: the same for
// all devices.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "checks.h"
#include "tensors.h"

namespace pyd {

struct ProjectedMseOptions {
  std::optional<torch::stable::Tensor> bias, mask, row_weights;
  bool up;
  bool normalize;
  std::string method, reduction;
  bool with_bias;
};

// Rows with unit stride over features; projection, and what follows, contiguous. `row_weights` only by row.
struct ProjectedMseProblem {
  torch::stable::Tensor student, teacher, projection;
  std::optional<torch::stable::Tensor> bias, mask, row_weights;
  Dtype dtype, projection_dtype;
  bool up, by_row;

  const torch::stable::Tensor& source() const { return up ? student : teacher; }
  const torch::stable::Tensor& target() const { return up ? teacher : student; }
};

inline ProjectedMseProblem projected_mse_problem(const torch::stable::Tensor& student,
                                                 const torch::stable::Tensor& teacher,
                                                 const torch::stable::Tensor& projection,
                                                 const ProjectedMseOptions& o) {
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  for (const Tensor* t : {&student, &teacher, &projection})
    STD_TORCH_CHECK(t->dim() == 2 && t->size(1) > 0,
                    "projected_mse: student, teacher and projection must be matrices with at least one column, got ",
                    shape(*t));
  STD_TORCH_CHECK(student.size(0) == teacher.size(0) && student.scalar_type() == teacher.scalar_type(),
                  "projected_mse: student and teacher must have one dtype and as many rows, got ", shape(student),
                  " vs ", shape(teacher));
  const Tensor &from = o.up ? student : teacher, &to = o.up ? teacher : student;
  STD_TORCH_CHECK(projection.size(0) == from.size(1) && projection.size(1) == to.size(1),
                  "projected_mse: projection must be [", from.size(1), ", ", to.size(1), "], got ", shape(projection));
  STD_TORCH_CHECK(projection.scalar_type() == student.scalar_type() ||
                      (projection.scalar_type() == ScalarType::Float && student.scalar_type() != ScalarType::Double),
                  "projected_mse: projection must have the dtype of the rows, or fp32 where they are narrower");
  STD_TORCH_CHECK(!o.bias || (o.bias->dim() == 1 && o.bias->size(0) == to.size(1) &&
                              o.bias->scalar_type() == projection.scalar_type()),
                  "projected_mse: bias must be [", to.size(1), "] in the dtype of the projection, got ",
                  o.bias ? shape(*o.bias) : "");
  STD_TORCH_CHECK(!o.with_bias || o.bias, "projected_mse: a gradient of the bias needs a bias");
  STD_TORCH_CHECK(o.reduction == "mean" || o.reduction == "sum" || o.reduction == "none",
                  "projected_mse: unknown reduction '", o.reduction, "'");
  STD_TORCH_CHECK(o.method == "direct" || o.method == "gram", "projected_mse: unknown method '", o.method, "'");
  STD_TORCH_CHECK(o.method == "direct" || (o.up && !o.normalize && o.reduction != "none"),
                  "projected_mse: method 'gram' goes up, does not normalize, and has no value for each row");

  const auto with_unit_stride = [](const Tensor& t) {
    return t.size(1) > 1 && t.stride(1) != 1 ? torch::stable::contiguous(t) : t;
  };
  const auto contiguous = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : t;
  };
  ProjectedMseProblem p{};
  p.student = with_unit_stride(student);
  p.teacher = with_unit_stride(teacher);
  p.projection = torch::stable::contiguous(projection);
  p.bias = contiguous(o.bias);
  p.dtype = dtype_of("projected_mse", student);
  p.projection_dtype = dtype_of("projected_mse", projection);
  p.up = o.up;
  p.by_row = o.reduction == "none";
  const int64_t rows = student.size(0);
  STD_TORCH_CHECK(!o.mask || (o.mask->scalar_type() == ScalarType::Bool && o.mask->numel() == rows),
                  "projected_mse: mask must be bool, one per row, got ", o.mask ? shape(*o.mask) : "");
  p.mask = contiguous(o.mask);
  if (p.by_row && o.row_weights) {
    STD_TORCH_CHECK(
        o.row_weights->numel() == rows &&
            o.row_weights->scalar_type() == (p.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float),
        "projected_mse: row_weights must be one per row in the dtype of the loss, got ", shape(*o.row_weights));
    p.row_weights = contiguous(o.row_weights);
  }
  return p;
}

}  // namespace pyd
