// SPDX-License-Identifier: Apache-2.0
// The storage types that kernels know, shared by their boundaries.
#pragma once

namespace pyd {

// What tensors are stored in. Arithmetic is in float, and in double for f64, which CPU kernels alone take.
enum class Dtype { f32, bf16, f16, f64 };

}  // namespace pyd
