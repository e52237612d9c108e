// SPDX-License-Identifier: Apache-2.0
// The soft_target op: checks, allocation, and the distribution of rows over threads. Kernels are in csrc/cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"
#include "soft_target_problem.h"
#include "tensors.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Computes loss and gradient scale; the gradient goes to `gradient` unless that is null.
std::tuple<Tensor, Tensor> compute(const Tensor& student, const Tensor& teacher, const SoftTargetOptions& o,
                                   void* gradient) {
  std::vector<Tensor> keep;
  SoftTargetArgs a{soft_target_problem(student, teacher, o, gradient, keep)};
  const int64_t classes = a.classes;
  int64_t count = a.rows;
  if (a.labels != nullptr || a.mask != nullptr) {
    count = 0;
    for (int64_t r = 0; r < a.rows; ++r) {
      if ((a.mask != nullptr && !a.mask[r]) || (a.labels != nullptr && a.labels[r] == a.ignore_index)) continue;
      STD_TORCH_CHECK(o.hard_weight == 0 || (a.labels[r] >= 0 && a.labels[r] < classes),
                      "soft_target: labels must lie in [0, ", classes, ") or be ignore_index=", a.ignore_index,
                      ", got ", a.labels[r], " in row ", r);
      ++count;
    }
  }

  double denominator = 1;
  if (o.reduction == "mean")
    denominator = o.num_items ? scalar_of(*o.num_items) : static_cast<double>(std::max<int64_t>(count, 1));
  // fp16 has no room below for a gradient divided by many rows: that factor is left to backward, where the incoming
  // gradient (which a loss scaler makes large) meets it first. A power of two, so that nothing is rounded twice.
  const double later = a.dtype == Dtype::f16 ? std::exp2(-std::floor(std::log2(denominator))) : 1;
  a.soft_grad = a.soft_value / (denominator * later);
  a.hard_grad = a.hard_value / (denominator * later);

  const bool per_row = o.reduction == "none";
  const auto loss_dtype = std::optional<ScalarType>(a.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  Tensor loss = torch::stable::new_empty(student, soft_target_loss_shape(student, o), loss_dtype);
  Tensor gradient_scale = torch::stable::new_empty(student, {}, loss_dtype);
  if (per_row) a.row_loss = loss.mutable_data_ptr();

  const int64_t block = soft_target_block_rows(classes), blocks = (a.rows + block - 1) / block;
  const SoftTargetKernel& kernel = kernels().soft_target;
  std::vector<double> sums(blocks);
  // Less work than this is not worth waking a thread for.
  const int64_t grain = std::max<int64_t>(1, 32768 / (block * classes));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const Buffer scratch(kernel.scratch_bytes(a));
    for (int64_t b = begin; b < end; ++b)
      sums[b] = kernel.rows(a, b * block, std::min(a.rows, (b + 1) * block), scratch.data);
  });

  const auto write = [&](Tensor& t, double x) {
    if (a.dtype == Dtype::f64)
      *static_cast<double*>(t.mutable_data_ptr()) = x;
    else
      *static_cast<float*>(t.mutable_data_ptr()) = static_cast<float>(x);
  };
  if (!per_row) {
    double total = 0;
    for (const double s : sums) total += s;
    write(loss, total / denominator);
  }
  write(gradient_scale, later);
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
  if (with_gradient) ask_for_large_pages(gradient);
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

void scale_rows_(Tensor rows, Tensor scale) {
  check_scale_rows(rows, scale);
  const Tensor factors =
      torch::stable::contiguous(torch::stable::to(scale, std::optional<ScalarType>(ScalarType::Double)));
  const double* factor = static_cast<const double*>(factors.const_data_ptr());
  const Dtype dtype = dtype_of("scale_rows_", rows);
  char* data = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t count = scale.numel(), size = static_cast<int64_t>(rows.element_size());
  // One factor for all: pieces of the whole. Otherwise row by row.
  constexpr int64_t piece = 1 << 16;
  const int64_t length = count == 1 ? piece : rows.size(rows.dim() - 1);
  const int64_t pieces = length == 0 ? 0 : (rows.numel() + length - 1) / length;
  if (count == 1 && *factor == 1) return;
  torch::stable::parallel_for(0, pieces, std::max<int64_t>(1, piece / length), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double f = factor[count == 1 ? 0 : i];
      if (f != 1) kernels().scale(dtype, data + i * length * size, std::min(length, rows.numel() - i * length), f);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pydistill, CPU, m) {
  m.impl("soft_target", TORCH_BOX(&soft_target));
  m.impl("soft_target_", TORCH_BOX(&soft_target_inplace));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_));
}

}  // namespace pyd
