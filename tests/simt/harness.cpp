// SPDX-License-Identifier: Apache-2.0
// The harness' own test: kernels that a GPU would leave undefined, each of which has to be reported, and some that are
// right. Exits with the number of surprises.
#include "simt.h"

#include <cstdio>
#include <stdexcept>
#include <string>

namespace {

__global__ void right(float* out) {
  PYD_DYNAMIC_SHARED(shared);
  float* const x = reinterpret_cast<float*>(shared);
  x[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncthreads();
  const float other = x[threadIdx.x ^ 1];
  out[threadIdx.x] = __shfl_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, other, 1), threadIdx.x % 32);
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void barrier_of_half(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void lane_missing(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void not_in_mask(float* out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }

__global__ void different_operations(float* out) {
  out[threadIdx.x] =
      threadIdx.x & 1 ? __shfl_xor_sync(0xffffffffu, 1.0f, 1) : static_cast<float>(__ballot_sync(0xffffffffu, 1));
}

__global__ void outside_its_mask(float* out) {
  const unsigned half = threadIdx.x < 16 ? 0xffffu : 0xffff0000u;
  out[threadIdx.x] = __shfl_xor_sync(half, 1.0f, 16);
}

__global__ void unwritten_shared(float* out) {
  PYD_DYNAMIC_SHARED(shared);
  out[threadIdx.x] = reinterpret_cast<float*>(shared)[threadIdx.x];
}

__global__ void no_barrier(float* out) {
  PYD_DYNAMIC_SHARED(shared);
  float* const x = reinterpret_cast<float*>(shared);
  x[threadIdx.x] = 1;
  out[threadIdx.x] = x[31 - threadIdx.x];
}

__global__ void copy_without_wait(float* out) {
  PYD_DYNAMIC_SHARED(shared);
  float* const x = reinterpret_cast<float*>(shared);
  simt::copy_async(x + threadIdx.x, out + threadIdx.x, sizeof(float), sizeof(float));
  simt::commit_copies();
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x];
  simt::wait_copies(0);
}

__global__ void copy_with_wait(float* out) {
  PYD_DYNAMIC_SHARED(shared);
  float* const x = reinterpret_cast<float*>(shared);
  simt::copy_async(x + threadIdx.x, out + threadIdx.x, sizeof(float), sizeof(float));
  simt::commit_copies();
  simt::wait_copies(0);
  __syncthreads();
  out[threadIdx.x] = x[31 - threadIdx.x];
}

__global__ void copy_without_commit(float* out) {
  PYD_DYNAMIC_SHARED(shared);
  simt::copy_async(shared, out, sizeof(float), sizeof(float));
}

int surprises = 0;

void expect(const char* name, void (*kernel)(float*), const std::string& report, size_t shared_bytes = 128) {
  float out[32] = {};
  std::string found = "fine";
  try {
    PYD_LAUNCH(kernel, 1, 32, shared_bytes, nullptr, out);
    if (cudaGetLastError() != cudaSuccess) found = "not launched";
    for (const float x : out)
      if (x != x) found = "NaN";
  } catch (const std::runtime_error& error) {
    found = error.what();
  }
  if (found.find(report) != std::string::npos) return;
  std::printf("%s: expected '%s', found '%s'\n", name, report.c_str(), found.c_str());
  ++surprises;
}

}  // namespace

int main() {
  for (const char* order : {"forward", "reverse", "random"}) {
    setenv("PYDISTILL_SIMT_ORDER", order, 1);
    expect("right", right, "fine");
    expect("two_barriers", two_barriers, "threads stand at two barriers");
    expect("barrier_of_half", barrier_of_half, "is never reached by 16 threads");
    expect("lane_missing", lane_missing, "__shfl_xor_sync");
    expect("not_in_mask", not_in_mask, "the calling lane is not in its mask");
    expect("different_operations", different_operations, "lanes disagree");
    expect("outside_its_mask", outside_its_mask, "NaN");
    expect("unwritten_shared", unwritten_shared, "NaN");
    expect("no_barrier", no_barrier, "NaN");
    expect("copy_without_wait", copy_without_wait, "NaN");
    expect("copy_with_wait", copy_with_wait, "fine");
    expect("copy_without_commit", copy_without_commit, "has not committed");
    expect("much shared memory, not asked for", right, "not launched", 64 << 10);
  }
  return surprises;
}
