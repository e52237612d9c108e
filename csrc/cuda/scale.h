// SPDX-License-Identifier: Apache-2.0
// Multiplying a gradient that is already there by the incoming one. Boundary between binding and CUDA kernel.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "launch.h"

namespace pyd {

// data[0 .. n) *= factor, which is factors[i / row], rounded once. A vector of elements whose factor is 1 is not
// touched.
int launch_scale(Dtype dtype, void* data, int64_t n, const float* factors, int64_t row, void* stream);

}  // namespace pyd
