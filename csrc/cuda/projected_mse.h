// SPDX-License-Identifier: Apache-2.0
// Boundary between the projected_mse binding and its CUDA kernels (see launch.h).
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "launch.h"

namespace pyd {

// A matrix of rows with unit stride over features; the stride of rows in elements.
struct MatrixCuda {
  void* data;
  int size;  // features
  int64_t stride;
};

// source [R, k] P [k, m] + b is compared with target [R, m]: the source is the side that is projected. One of the two
// is the student's and may receive a gradient.
struct ProjectedMseCuda {
  Dtype dtype;             // of both sides
  Dtype projection_dtype;  // the same, or f32
  int64_t rows;
  MatrixCuda source, target;
  const void* projection;    // [k, m], contiguous
  const void* bias;          // [m], or null
  const bool* mask;          // [R], or null
  const double* num_items;   // one number, or null
  const float* row_weights;  // [R], or null
  bool normalize;
  bool mean, by_row;                    // the mean over rows and features; a value for each row
  MatrixCuda grad_source, grad_target;  // null data: not wanted
  float *grad_projection, *grad_bias;   // [k, m] and [m]; null: not wanted
  float* row_loss;                      // [R], or null
  float* loss;                          // one number, or null
  float* gradient_scale;                // one number: what is still to be applied to the student's gradient
  void* workspace;                      // as many bytes as projected_mse_workspace finds
};

int projected_mse_workspace(const ProjectedMseCuda& problem, int64_t& bytes);
int launch_projected_mse(const ProjectedMseCuda& problem, void* stream);

}  // namespace pyd
