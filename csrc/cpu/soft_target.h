// SPDX-License-Identifier: Apache-2.0
// Boundary between the soft_target binding and its CPU kernels: plain types, no torch, no per-instruction-set code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../soft_target.h"

namespace pyd {

struct SoftTargetArgs : SoftTargetProblem {
  double soft_grad, hard_grad;  // soft_value and hard_value as they stand in the gradient
  void* row_loss;               // [rows] float (double for f64), or null
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
