// SPDX-License-Identifier: Apache-2.0
// Boundary between the bindings and the launchers of csrc/cuda: plain types, neither torch nor CUDA headers. A launcher
// returns a cudaError_t as int and waits for nothing; all pointers are to device memory.
#pragma once

namespace pyd {

const char* cuda_error_string(int code);

}  // namespace pyd
