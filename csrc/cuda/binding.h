// SPDX-License-Identifier: Apache-2.0
// What the bindings of CUDA kernels share: device and stream of a tensor, the check of a launch, and where the ops are
// registered. The test harness (tests/simt) runs the same bindings on the CPU, under a name of its own.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "launch.h"

#ifndef PYD_SIMT_HOST
#include <dlfcn.h>
#define PYD_NAMESPACE pydistill
#define PYD_KEY CUDA
#endif

namespace pyd {

// Makes the tensor's device the current one for as long as it lives.
class OnDevice {
 public:
#ifdef PYD_SIMT_HOST
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit OnDevice(const torch::stable::Tensor& t) : index_(t.get_device_index()), guard_(index_) {}

  // The current stream as a cudaStream_t. The module has to load without CUDA libraries, so that this one function of
  // libtorch_cuda is looked up when it is first called, when a tensor on a CUDA device has proved it to be loaded.
  void* stream() const {
    using Function = AOTITorchError (*)(int32_t, void**);
    static const Function current_stream = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library == nullptr ? nullptr
                                : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
    }();
    STD_TORCH_CHECK(current_stream != nullptr, "pydistill: this build of torch has no CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(current_stream(index_, &stream));
    return stream;
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline void check_launch(const char* op, int code) {
  STD_TORCH_CHECK(code == 0, op, ": CUDA kernel launch failed: ", cuda_error_string(code));
}

}  // namespace pyd
