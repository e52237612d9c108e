// SPDX-License-Identifier: Apache-2.0
// Multiplying a gradient that is already there by the incoming one. Boundary between binding and CPU kernel.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace pyd {

// data[0..n) *= factor, in float (double for f64), rounded once.
using ScaleKernel = void (*)(Dtype dtype, void* data, int64_t n, double factor);

namespace avx512 {
extern const ScaleKernel scale;
}
namespace avx2 {
extern const ScaleKernel scale;
}
namespace generic {
extern const ScaleKernel scale;
}

}  // namespace pyd
