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
#include "projected_mse_problem.h"
#include "tensors.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
    Tensor student_, Tensor teacher_, Tensor projection_, std::optional<Tensor> bias, std::optional<Tensor> mask,
    std::optional<Tensor> num_items, std::optional<Tensor> row_weights, bool up, bool normalize, std::string method,
    std::string reduction, bool with_student, bool with_projection, bool with_bias) {
  const ProjectedMseProblem p = projected_mse_problem(
      student_, teacher_, projection_, {bias, mask, row_weights, up, normalize, method, reduction, with_bias});
  const Tensor& student = p.student;
  const int64_t rows = student.size(0);
  ProjectedMseJob job{};
  job.dtype = p.dtype;
  job.projection_dtype = p.projection_dtype;
  job.source = matrix_of(p.source());
  job.target = matrix_of(p.target());
  job.projection = p.projection.const_data_ptr();
  job.gram = method == "gram";
  job.normalize = normalize;
  job.grad_projection = with_projection;
  job.grad_bias = with_bias;
  job.count = rows;
  if (p.bias) job.bias = p.bias->const_data_ptr();

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
  if (p.mask) {
    const bool* valid_row = static_cast<const bool*>(p.mask->const_data_ptr());
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

  Tensor loss = p.by_row ? torch::stable::new_zeros(student, {rows}, loss_dtype)
                         : torch::stable::new_empty(student, {}, loss_dtype);
  if (p.by_row) job.row_loss = loss.mutable_data_ptr();
  if (p.row_weights) job.row_weights = p.row_weights->const_data_ptr();
  const double features = static_cast<double>(job.target.size);
  double denominator = p.by_row ? features : 1;
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
  if (!p.by_row) write(loss, squares / denominator);
  Tensor gradient_scale = torch::stable::new_empty(student, {}, loss_dtype);
  write(gradient_scale, later);
  return {loss, grad_student, grad_projection, grad_bias, gradient_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) { m.impl("projected_mse", TORCH_BOX(&projected_mse)); }

}  // namespace pyd
