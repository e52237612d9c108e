// SPDX-License-Identifier: Apache-2.0
// Boundary between the soft_target binding and its CUDA kernels (see launch.h).
#pragma once

#include <cstddef>

#include "../soft_target.h"
#include "launch.h"

namespace pyd {

// Room for what the kernels hand to each other, besides the rows' values.
constexpr size_t soft_target_scales_bytes = 16;

struct SoftTargetCuda {
  bool mean;                // divide by the number of valid rows, or by num_items
  const double* num_items;  // one number, or null
  void* scales;             // [soft_target_scales_bytes]
  float* row_values;        // [rows]; for reduction "none" this is the loss
  float* loss;              // one number; null for reduction "none"
  float* gradient_scale;    // one number: what is still to be applied to the gradient
};

int launch_soft_target(const SoftTargetProblem& problem, const SoftTargetCuda& cuda, void* stream);

}  // namespace pyd
