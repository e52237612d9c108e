// SPDX-License-Identifier: Apache-2.0
// What the bindings of all ops do with tensors: storage types, scalars, fresh memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <optional>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "dtype.h"

namespace pyd {

// Memory for a kernel's own use, aligned to a vector.
struct Buffer {
  void* data = nullptr;
  Buffer() = default;
  explicit Buffer(size_t bytes) : data(std::aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
  Buffer(Buffer&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data, other.data);
    return *this;
  }
  ~Buffer() { std::free(data); }
};

inline Dtype dtype_of(const char* op, const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::f32;
    case ScalarType::BFloat16:
      return Dtype::bf16;
    case ScalarType::Half:
      return Dtype::f16;
    case ScalarType::Double:
      return Dtype::f64;
    default:
      STD_TORCH_CHECK(false, op, ": tensors must be fp32, bf16, fp16 or fp64");
      return Dtype::f32;
  }
}

inline double scalar_of(const torch::stable::Tensor& t) {
  using torch::headeronly::ScalarType;
  const torch::stable::Tensor number = torch::stable::to(t, std::optional<ScalarType>(ScalarType::Double));
  return *static_cast<const double*>(number.const_data_ptr());
}

// Fresh memory is mapped page by page at first touch, which costs more than the kernel. Large pages cut that to a
// third.
inline void ask_for_large_pages(const torch::stable::Tensor& t) {
#if defined(__linux__)
  constexpr uintptr_t page = 2u << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + static_cast<uintptr_t>(t.numel()) * t.element_size()) / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace pyd
