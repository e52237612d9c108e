// SPDX-License-Identifier: Apache-2.0
// The scale_rows_ op on CUDA devices. Nothing here waits for the device.
#include "scale.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "../checks.h"
#include "../tensors.h"
#include "binding.h"

namespace pyd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void scale_rows_(Tensor rows, Tensor scale) {
  check_scale_rows(rows, scale);
  const Dtype dtype = dtype_of("scale_rows_", rows);
  STD_TORCH_CHECK(dtype != Dtype::f64, "scale_rows_: the CUDA kernel takes fp32, bf16 and fp16, got fp64");
  const Tensor factors =
      torch::stable::contiguous(torch::stable::to(scale, std::optional<ScalarType>(ScalarType::Float)));
  const int64_t n = rows.numel(), row = scale.numel() == 1 ? n : rows.size(rows.dim() - 1);
  const OnDevice device(rows);
  check_launch("scale_rows_", launch_scale(dtype, rows.mutable_data_ptr(), n,
                                           static_cast<const float*>(factors.const_data_ptr()), row, device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(PYD_NAMESPACE, PYD_KEY, m) { m.impl("scale_rows_", TORCH_BOX(&scale_rows_)); }

}  // namespace pyd
