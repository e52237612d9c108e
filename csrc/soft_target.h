// SPDX-License-Identifier: Apache-2.0
// What every backend of soft_target is told: plain types, no torch.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace pyd {

enum class Divergence { forward_kl, reverse_kl, jsd, mse, cross_entropy };

// The rows of a tensor [*, C] with unit stride over classes, leading dimensions collapsed to at most two:
// row r starts at data + (r / inner) * outer_stride + (r % inner) * inner_stride, strides in bytes.
struct Rows {
  const void* data;
  int64_t inner, outer_stride, inner_stride;
};

struct SoftTargetProblem {
  Dtype dtype;
  Divergence divergence;
  int64_t rows, classes;
  Rows student;           // [rows, classes]
  Rows teacher;           // [rows, classes]
  void* grad;             // [rows, classes] contiguous, may be the student's own storage; null: no gradient wanted
  const int64_t* labels;  // [rows] or null
  const bool* mask;       // [rows] or null
  int64_t ignore_index;
  double temperature, jsd_beta;
  double soft_value,
      hard_value;  // factors of divergence and cross-entropy in a row's value; hard_value 0: no hard part
};

}  // namespace pyd
