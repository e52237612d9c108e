// SPDX-License-Identifier: Apache-2.0
// rows *= factor, one for all or one per row: what backward does with a gradient that the forward has made.
#pragma once

#include "device.cuh"

namespace pyd {

// n elements in pieces of 16 bytes, one or a few per thread.
template <class S>
__global__ void __launch_bounds__(256) scale_rows(S* data, int64_t n, const float* factors, int64_t row) {
  constexpr int width = vector_bytes / sizeof(S);
  const int64_t stride = int64_t{gridDim.x} * blockDim.x * width;
  const bool one = row >= n, aligned = reinterpret_cast<uintptr_t>(data) % vector_bytes == 0;
  const float factor = factors[0];
  if (one && factor == 1) return;
  for (int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * width; i < n; i += stride) {
    float by[width];
    bool idle = true;
    int64_t r = one ? 0 : i / row, column = i - r * row;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      by[k] = one ? factor : i + k < n ? factors[r] : 1.0f;
      idle = idle && by[k] == 1;
      if (++column == row) {
        column = 0;
        ++r;
      }
    }
    if (idle) continue;
    if (aligned && i + width <= n) {
      float x[width];
      widen(load<width>(data + i), x);
#pragma unroll
      for (int k = 0; k < width; ++k) x[k] *= by[k];
      Vector<S, width> out;
      narrow(x, out);
      store(out, data + i);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (i + k < n) narrow(widen(data[i + k]) * by[k], data[i + k]);
    }
  }
}

}  // namespace pyd
