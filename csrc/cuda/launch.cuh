// SPDX-License-Identifier: Apache-2.0
// What launchers share: shared memory beyond what a kernel has without asking, and a workspace in one piece of memory.
#pragma once

#include "device.cuh"

namespace pyd {

inline int64_t blocks_of(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Bytes of shared memory that a block of the current device may ask for.
inline cudaError_t find_most_shared(int& bytes) {
  int device = 0;
  if (const auto error = cudaGetDevice(&device)) return error;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Launches a kernel of one parameter with so many bytes of shared memory; most have to be asked for, kernel by kernel.
template <class Parameter>
cudaError_t launch(void (*kernel)(Parameter), dim3 grid, int block, int64_t shared, cudaStream_t stream,
                   const Parameter& parameter) {
  constexpr int64_t without_asking = 48 << 10;
  if (shared > without_asking)
    if (const auto error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)))
      return error;
  PYD_LAUNCH(kernel, grid, block, shared, stream, parameter);
  return cudaGetLastError();
}

// Hands out pieces of a memory that begins at `begin`, each aligned to a vector; with null it counts what is needed.
struct Carver {
  char* begin;
  int64_t bytes = 0;

  template <class T>
  void take(T*& piece, int64_t size) {
    piece = reinterpret_cast<T*>(begin + bytes);
    bytes += blocks_of(size * static_cast<int64_t>(sizeof(T)), vector_bytes) * vector_bytes;
  }
};

}  // namespace pyd
