// SPDX-License-Identifier: Apache-2.0
#include "scale.h"

#include <algorithm>

#include "scale.cuh"

namespace pyd {
namespace {

template <class S>
cudaError_t launch(void* data, int64_t n, const float* factors, int64_t row, cudaStream_t stream) {
  constexpr int64_t block = 256, most_blocks = 1 << 20;
  const int64_t vectors = (n * static_cast<int64_t>(sizeof(S)) + vector_bytes - 1) / vector_bytes;
  const int64_t blocks = std::min((vectors + block - 1) / block, most_blocks);
  PYD_LAUNCH(scale_rows<S>, static_cast<unsigned>(blocks), block, 0, stream, static_cast<S*>(data), n, factors, row);
  return cudaGetLastError();
}

}  // namespace

int launch_scale(Dtype dtype, void* data, int64_t n, const float* factors, int64_t row, void* stream_handle) {
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  if (n == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::f32:
      return launch<float>(data, n, factors, row, stream);
    case Dtype::bf16:
      return launch<__nv_bfloat16>(data, n, factors, row, stream);
    case Dtype::f16:
      return launch<__half>(data, n, factors, row, stream);
    case Dtype::f64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace pyd
