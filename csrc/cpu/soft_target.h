// SPDX-License-Identifier: Apache-2.0
// Boundary between the soft_target binding and its CPU kernels: plain types, no torch, no per-instruction-set code.
#pragma once

#include <cstddef>
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

struct SoftTargetArgs {
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
  double soft_value, hard_value;  // factors of divergence and cross-entropy in the value of a row
  double soft_grad, hard_grad;    // the same in its gradient; hard_value == hard_grad == 0: no hard part
  void* row_loss;                 // [rows] float (double for f64), or null
};

// One kernel, compiled once per instruction set (csrc/cpu/soft_target.cpp).
struct SoftTargetKernel {
  size_t (*scratch_bytes)(const SoftTargetArgs&);  // per thread, 64-byte aligned
  double (*rows)(const SoftTargetArgs&, int64_t begin, int64_t end,
                 void* scratch);  // returns the sum of the rows' values
};

// Blocks of rows are the unit of work and of summation, so that the result does not depend on the number of threads.
// A multiple of every vector width, for narrow rows are processed one per lane.
constexpr int64_t soft_target_block_rows(int64_t classes) {
  const int64_t rows = 16384 / classes / 16 * 16;
  return classes > 512 ? 1 : rows;
}

namespace avx512 {
extern const SoftTargetKernel soft_target;
}
namespace avx2 {
extern const SoftTargetKernel soft_target;
}
namespace generic {
extern const SoftTargetKernel soft_target;
}

}  // namespace pyd
