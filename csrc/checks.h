// SPDX-License-Identifier: Apache-2.0
// The one voice of errors: every check names the op, the argument, the rule, and what came. Python checks first and
// speaks to users; these guard calls that go straight to torch.ops.pydistill.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <sstream>
#include <string>

namespace pyd {

inline std::string shape(const torch::stable::Tensor& t) {
  std::ostringstream out;
  out << '[';
  for (int64_t d = 0; d < t.dim(); ++d) out << (d == 0 ? "" : ", ") << t.size(d);
  out << ']';
  return out.str();
}

inline bool same_shape(const torch::stable::Tensor& a, const torch::stable::Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline void check_scale_rows(const torch::stable::Tensor& rows, const torch::stable::Tensor& scale) {
  STD_TORCH_CHECK(rows.is_contiguous(), "scale_rows_: rows must be contiguous");
  STD_TORCH_CHECK(scale.numel() == 1 || scale.numel() * rows.size(rows.dim() - 1) == rows.numel(),
                  "scale_rows_: scale must hold one factor or one per row, got ", shape(scale), " for ", shape(rows));
}

}  // namespace pyd
