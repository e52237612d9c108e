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
#include "tensors.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Options {
  std::optional<Tensor> labels, mask, num_items;
  std::string divergence;
  double temperature, hard_weight, jsd_beta;
  bool scale_by_temperature;
  int64_t ignore_index;
  std::string reduction;
};

Divergence divergence_of(const Options& o) {
  if (o.divergence == "forward_kl" || (o.divergence == "jsd" && o.jsd_beta == 0)) return Divergence::forward_kl;
  if (o.divergence == "reverse_kl" || (o.divergence == "jsd" && o.jsd_beta == 1)) return Divergence::reverse_kl;
  if (o.divergence == "jsd") return Divergence::jsd;
  if (o.divergence == "mse") return Divergence::mse;
  STD_TORCH_CHECK(o.divergence == "cross_entropy", "soft_target: unknown divergence '", o.divergence, "'");
  return Divergence::cross_entropy;
}

// The tensor as rows without a copy: unit stride over classes, and leading dimensions that collapse to at most two.
std::optional<Rows> as_rows(const Tensor& t) {
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

// Computes loss and gradient scale; the gradient goes to `gradient` unless that is null.
std::tuple<Tensor, Tensor> compute(const Tensor& student, const Tensor& teacher, const Options& o, void* gradient) {
  STD_TORCH_CHECK(student.dim() >= 1 && same_shape(student, teacher), "soft_target: teacher must match student, got ",
                  shape(teacher), " vs ", shape(student));
  STD_TORCH_CHECK(student.scalar_type() == teacher.scalar_type(),
                  "soft_target: student and teacher must have one dtype");
  const int64_t classes = student.size(student.dim() - 1);
  STD_TORCH_CHECK(classes >= 1, "soft_target: there must be at least one class, got ", shape(student));
  STD_TORCH_CHECK(o.reduction == "mean" || o.reduction == "sum" || o.reduction == "none",
                  "soft_target: unknown reduction '", o.reduction, "'");
  STD_TORCH_CHECK(o.hard_weight == 0 || o.labels, "soft_target: hard_weight needs labels");

  SoftTargetArgs a{};
  a.dtype = dtype_of("soft_target", student);
  a.divergence = divergence_of(o);
  a.rows = student.numel() / classes;
  a.classes = classes;
  a.grad = gradient;
  a.ignore_index = o.ignore_index;
  a.jsd_beta = o.jsd_beta;
  a.temperature = o.temperature;
  STD_TORCH_CHECK(a.divergence != Divergence::mse || a.temperature == 1, "soft_target: mse needs temperature 1");

  // Strided rows are read where they lie; only odd layouts are copied.
  std::vector<Tensor> keep;
  const auto rows = [&](const Tensor& t) {
    if (const auto r = as_rows(t)) return *r;
    keep.push_back(torch::stable::contiguous(t));
    return *as_rows(keep.back());
  };
  a.student = rows(student);
  a.teacher = rows(teacher);
  // At equality every divergence but the soft cross-entropy is 0 with gradient 0: what is left is the hard part alone.
  if (o.hard_weight == 1) {
    a.divergence = Divergence::forward_kl;
    a.temperature = 1;
    a.teacher = a.student;
  }

  Tensor labels, mask;
  if (o.labels) {
    STD_TORCH_CHECK(o.labels->scalar_type() == ScalarType::Long && o.labels->numel() == a.rows,
                    "soft_target: labels must be int64, one per row, got ", shape(*o.labels));
    labels = torch::stable::contiguous(*o.labels);
    a.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  }
  if (o.mask) {
    STD_TORCH_CHECK(o.mask->scalar_type() == ScalarType::Bool && o.mask->numel() == a.rows,
                    "soft_target: mask must be bool, one per row, got ", shape(*o.mask));
    mask = torch::stable::contiguous(*o.mask);
    a.mask = static_cast<const bool*>(mask.const_data_ptr());
  }
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
  const double T2 = o.scale_by_temperature ? a.temperature * a.temperature : 1;
  a.soft_value = (1 - o.hard_weight) * T2;
  a.hard_value = o.hard_weight;
  // fp16 has no room below for a gradient divided by many rows: that factor is left to backward, where the incoming
  // gradient (which a loss scaler makes large) meets it first. A power of two, so that nothing is rounded twice.
  const double later = a.dtype == Dtype::f16 ? std::exp2(-std::floor(std::log2(denominator))) : 1;
  a.soft_grad = a.soft_value / (denominator * later);
  a.hard_grad = a.hard_value / (denominator * later);

  const bool per_row = o.reduction == "none";
  const auto loss_dtype = std::optional<ScalarType>(a.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  std::vector<int64_t> loss_shape;
  if (per_row)
    for (int64_t d = 0; d + 1 < student.dim(); ++d) loss_shape.push_back(student.size(d));
  Tensor loss = torch::stable::new_empty(student, loss_shape, loss_dtype);
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
  STD_TORCH_CHECK(rows.is_contiguous(), "scale_rows_: rows must be contiguous");
  STD_TORCH_CHECK(scale.numel() == 1 || scale.numel() * rows.size(rows.dim() - 1) == rows.numel(),
                  "scale_rows_: scale must hold one factor or one per row, got ", shape(scale), " for ", shape(rows));
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
