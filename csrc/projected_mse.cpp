// SPDX-License-Identifier: Apache-2.0
// The projected_mse op: checks, rows from the mask, allocation, and the distribution of rows over threads. Kernels are
// in csrc/cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "tensors.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor with_unit_stride(const Tensor& t) {
  return t.size(1) > 1 && t.stride(1) != 1 ? torch::stable::contiguous(t) : t;
}

Matrix matrix_of(const Tensor& t) { return {const_cast<void*>(t.const_data_ptr()), t.size(1), t.stride(0)}; }

// The sum of squares of all rows; gradients of projection and bias, if any, times `factor`.
double run(const ProjectedMseJob& job, double factor, void* grad_projection, void* grad_bias) {
  const ProjectedMseKernel& kernel = kernels().projected_mse;
  const int64_t chunks = kernel.chunks(job);
  const int64_t workers = std::min<int64_t>(chunks, std::max<int64_t>(1, torch::stable::get_num_threads()));
  const Buffer packed(kernel.packed_bytes(job)), total(kernel.partial_bytes(job));
  if (chunks == 0) std::memset(total.data, 0, kernel.partial_bytes(job));
  kernel.pack(job, packed.data);

  // Chunks are taken in order, and whoever has taken one is at work on it: its turn to add will come.
  std::vector<double> values(chunks);
  std::atomic<int64_t> next{0}, turn{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const Buffer scratch(kernel.scratch_bytes(job)), partial(chunks > 1 ? kernel.partial_bytes(job) : 0);
      for (int64_t chunk; (chunk = next++) < chunks;) {
        values[chunk] = kernel.chunk(job, packed.data, chunk, chunk == 0 ? total.data : partial.data, scratch.data);
        for (int64_t now; (now = turn.load()) != chunk;) turn.wait(now);
        if (chunk > 0) kernel.add(job, total.data, partial.data);
        turn = chunk + 1;
        turn.notify_all();
      }
    }
  });
  double sum = kernel.finish(job, packed.data, total.data, factor, grad_projection, grad_bias);
  for (const double value : values) sum += value;
  return sum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> projected_mse(
    Tensor student_, Tensor teacher_, Tensor projection_, std::optional<Tensor> bias_, std::optional<Tensor> mask,
    std::optional<Tensor> num_items, std::optional<Tensor> row_weights, bool up, bool normalize, std::string method,
    std::string reduction, bool with_student, bool with_projection, bool with_bias) {
  for (const Tensor* t : {&student_, &teacher_, &projection_})
    STD_TORCH_CHECK(t->dim() == 2 && t->size(1) > 0,
                    "projected_mse: student, teacher and projection must be matrices with at least one column, got ",
                    shape(*t));
  STD_TORCH_CHECK(student_.size(0) == teacher_.size(0) && student_.scalar_type() == teacher_.scalar_type(),
                  "projected_mse: student and teacher must have one dtype and as many rows, got ", shape(student_),
                  " vs ", shape(teacher_));
  const Tensor &from = up ? student_ : teacher_, &to = up ? teacher_ : student_;
  STD_TORCH_CHECK(projection_.size(0) == from.size(1) && projection_.size(1) == to.size(1),
                  "projected_mse: projection must be [", from.size(1), ", ", to.size(1), "], got ", shape(projection_));
  STD_TORCH_CHECK(projection_.scalar_type() == student_.scalar_type() ||
                      (projection_.scalar_type() == ScalarType::Float && student_.scalar_type() != ScalarType::Double),
                  "projected_mse: projection must have the dtype of the rows, or fp32 where they are narrower");
  STD_TORCH_CHECK(!bias_ || (bias_->dim() == 1 && bias_->size(0) == to.size(1) &&
                             bias_->scalar_type() == projection_.scalar_type()),
                  "projected_mse: bias must be [", to.size(1), "] in the dtype of the projection, got ",
                  bias_ ? shape(*bias_) : "");
  STD_TORCH_CHECK(!with_bias || bias_, "projected_mse: a gradient of the bias needs a bias");
  STD_TORCH_CHECK(reduction == "mean" || reduction == "sum" || reduction == "none",
                  "projected_mse: unknown reduction '", reduction, "'");

  STD_TORCH_CHECK(method == "direct" || method == "gram", "projected_mse: unknown method '", method, "'");
  STD_TORCH_CHECK(method == "direct" || (up && !normalize && reduction != "none"),
                  "projected_mse: method 'gram' goes up, does not normalize, and has no value for each row");

  const Tensor student = with_unit_stride(student_), teacher = with_unit_stride(teacher_);
  const Tensor projection = torch::stable::contiguous(projection_);
  const int64_t rows = student.size(0);
  ProjectedMseJob job{};
  job.dtype = dtype_of("projected_mse", student);
  job.projection_dtype = dtype_of("projected_mse", projection);
  job.source = matrix_of(up ? student : teacher);
  job.target = matrix_of(up ? teacher : student);
  job.projection = projection.const_data_ptr();
  job.gram = method == "gram";
  job.normalize = normalize;
  job.grad_projection = with_projection;
  job.grad_bias = with_bias;
  job.count = rows;
  Tensor bias;
  if (bias_) {
    bias = torch::stable::contiguous(*bias_);
    job.bias = bias.const_data_ptr();
  }

  const auto loss_dtype = std::optional<ScalarType>(job.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  const auto fresh = [&](bool wanted, std::vector<int64_t> sizes, std::optional<ScalarType> dtype) {
    return torch::stable::new_empty(student, wanted ? sizes : std::vector<int64_t>{0}, dtype);
  };
  Tensor grad_student = fresh(with_student, {rows, student.size(1)}, std::nullopt);
  Tensor grad_projection = fresh(with_projection, {job.source.size, job.target.size}, loss_dtype);
  Tensor grad_bias = fresh(with_bias, {job.target.size}, loss_dtype);
  ask_for_large_pages(grad_student);
  if (with_student) (up ? job.grad_source : job.grad_target) = matrix_of(grad_student);

  // The rows that count; the others get a gradient of zero and are not looked at.
  std::vector<int64_t> valid;
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->numel() == rows,
                    "projected_mse: mask must be bool, one per row, got ", shape(*mask));
    const Tensor masks = torch::stable::contiguous(*mask);
    const bool* valid_row = static_cast<const bool*>(masks.const_data_ptr());
    const int64_t bytes = student.size(1) * static_cast<int64_t>(student.element_size());
    for (int64_t r = 0; r < rows; ++r) {
      if (valid_row[r])
        valid.push_back(r);
      else if (with_student)
        std::memset(static_cast<char*>(grad_student.mutable_data_ptr()) + r * bytes, 0, bytes);
    }
    job.rows = valid.data();
    job.count = static_cast<int64_t>(valid.size());
  }

  const bool by_row = reduction == "none";
  Tensor loss = by_row ? torch::stable::new_zeros(student, {rows}, loss_dtype)
                       : torch::stable::new_empty(student, {}, loss_dtype);
  Tensor weights;
  if (by_row) {
    job.row_loss = loss.mutable_data_ptr();
    if (row_weights) {
      STD_TORCH_CHECK(row_weights->numel() == rows && row_weights->scalar_type() == *loss_dtype,
                      "projected_mse: row_weights must be one per row in the dtype of the loss, got ",
                      shape(*row_weights));
      weights = torch::stable::contiguous(*row_weights);
      job.row_weights = weights.const_data_ptr();
    }
  }
  const double features = static_cast<double>(job.target.size);
  double denominator = by_row ? features : 1;
  if (reduction == "mean")
    denominator = features * (num_items ? scalar_of(*num_items) : static_cast<double>(std::max<int64_t>(job.count, 1)));
  // fp16 has no room below for a gradient divided by many rows: that factor is left to backward (see soft_target).
  const double later =
      job.dtype == Dtype::f16 && reduction == "mean" ? std::exp2(-std::floor(std::log2(denominator))) : 1;
  job.scale = 2 / (denominator * later);
  const double squares = run(job, 2 / denominator, grad_projection.mutable_data_ptr(), grad_bias.mutable_data_ptr());

  const auto write = [&](const Tensor& t, double x) {
    if (job.dtype == Dtype::f64)
      *static_cast<double*>(t.mutable_data_ptr()) = x;
    else
      *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(x);
  };
  if (!by_row) write(loss, squares / denominator);
  Tensor gradient_scale = torch::stable::new_empty(student, {}, loss_dtype);
  write(gradient_scale, later);
  return {loss, grad_student, grad_projection, grad_bias, gradient_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("projected_mse", TORCH_BOX(&projected_mse)); }

}  // namespace pyd
