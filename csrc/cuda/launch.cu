// SPDX-License-Identifier: Apache-2.0
#include "launch.h"

#include "device.cuh"

namespace pyd {

const char* cuda_error_string(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

}  // namespace pyd
