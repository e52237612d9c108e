// SPDX-License-Identifier: Apache-2.0
// Boundary between the projected_mse binding and its CPU kernels: plain types, no torch, no per-instruction-set code.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../dtype.h"

namespace pyd {

// A matrix of rows with unit stride over features; the stride of rows in elements.
struct Matrix {
  void* data;
  int64_t size;  // features
  int64_t stride;
};

// source [R, k] P [k, m] + b is compared with target [R, m]: the source is the side that is projected. One of the two
// is the student's and may receive a gradient.
struct ProjectedMseJob {
  Dtype dtype;             // of both sides
  Dtype projection_dtype;  // the same, or f32
  Matrix source, target;
  const void* projection;  // [k, m], contiguous
  const void* bias;        // [m], or null
  const int64_t* rows;     // [count] positions of the rows that are read, or null: all of them
  int64_t count;
  bool gram;  // by Gram matrices: no normalisation, no row_weights, no row_loss
  bool normalize;
  const void* row_weights;          // [R] gradient arriving at each row, float (double for f64), or null
  double scale;                     // of the gradient of a side
  Matrix grad_source, grad_target;  // null data: not wanted
  bool grad_projection, grad_bias;
  void* row_loss;  // [R] mean over the features of each row, float (double for f64), or null
};

// Rows are taken in chunks whose number depends on the job alone. Each makes its part of the gradients of projection
// and bias in `partial`; parts are added in the order of chunks, so that the result is the same with any number of
// threads.
struct ProjectedMseKernel {
  // The projection as the chunks read it, made once.
  size_t (*packed_bytes)(const ProjectedMseJob&);
  void (*pack)(const ProjectedMseJob&, void* packed);
  int64_t (*chunks)(const ProjectedMseJob&);
  size_t (*scratch_bytes)(const ProjectedMseJob&);  // per thread, 64-byte aligned
  size_t (*partial_bytes)(const ProjectedMseJob&);
  // Returns the sum of squares of a chunk.
  double (*chunk)(const ProjectedMseJob&, const void* packed, int64_t chunk, void* partial, void* scratch);
  void (*add)(const ProjectedMseJob&, void* total, const void* partial);
  // The gradients times `factor`, float (double for f64): [k, m] and [m], as far as they are wanted. Uses up `total`,
  // and returns what is still to be added to the sum of squares.
  double (*finish)(const ProjectedMseJob&, const void* packed, void* total, double factor, void* projection,
                   void* bias);
};

namespace avx512 {
extern const ProjectedMseKernel projected_mse;
}
namespace avx2 {
extern const ProjectedMseKernel projected_mse;
}
namespace generic {
extern const ProjectedMseKernel projected_mse;
}

}  // namespace pyd
