// SPDX-License-Identifier: Apache-2.0
// Small CUDA kernels on which the tools themselves are tested, with bugs planted on request.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace {

enum Bug {
  NONE,
  NO_BARRIER,
  NO_WAIT,
  NO_SECOND_BARRIER,
  READS_PAST_END,
  MISALIGNED,
  DIVERGENT_BARRIER,
  SAME_PLACE,
  NO_WARP_BARRIER,
};

constexpr int THREADS = 128, CHUNK = 4 * THREADS;

__device__ void copy16(float* shared, const float* global) {
  const unsigned target = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(global));
}
__device__ void commit() { asm volatile("cp.async.commit_group;"); }
__device__ void wait_for_all_but_one() { asm volatile("cp.async.wait_group 1;"); }

template <Bug BUG>
__device__ float sum_of_block(float x) {
  __shared__ float of_warp[THREADS / 32];
  for (int other = 16; other > 0; other >>= 1) x += __shfl_xor_sync(0xffffffffu, x, other);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  if (BUG != NO_BARRIER) __syncthreads();
  float total = 0;
  for (int i = 0; i < THREADS / 32; ++i) total += of_warp[i];
  return total;
}

// Sum of exponentials of a row whose length is a multiple of CHUNK; chunks arrive in two buffers in turn. Each thread
// reads what its neighbour across warps has copied.
template <Bug BUG>
__global__ void __launch_bounds__(THREADS) sum_exp_rows(const float* x, float* sums, int length) {
  __shared__ __align__(16) float buffer[2][CHUNK];
  const int thread = threadIdx.x, chunks = length / CHUNK;
  const float* row = x + static_cast<long>(blockIdx.x) * length + (BUG == MISALIGNED ? 1 : 0);
  copy16(&buffer[0][4 * thread], row + 4 * thread);
  commit();
  float sum = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks || (BUG == READS_PAST_END && blockIdx.x + 1 == gridDim.x))
      copy16(&buffer[(chunk + 1) % 2][4 * thread], row + (chunk + 1) * CHUNK + 4 * thread);
    commit();
    if (BUG != NO_WAIT) wait_for_all_but_one();
    if (BUG == DIVERGENT_BARRIER) {
      if (thread < 64) __syncthreads();
    } else {
      __syncthreads();
    }
    for (int i = 0; i < 4; ++i) sum += expf(buffer[chunk % 2][(4 * thread + 64 + i) % CHUNK]);
    if (BUG != NO_SECOND_BARRIER) __syncthreads();
  }
  sum = sum_of_block<BUG>(sum);
  if (thread == 0) sums[BUG == SAME_PLACE ? 0 : blockIdx.x] = sum;
}

// Every warp turns its 32 numbers around, through shared memory.
template <Bug BUG>
__global__ void reverse_warps(const int* x, int* y) {
  __shared__ int numbers[THREADS];
  const int thread = threadIdx.x, at = blockIdx.x * THREADS + thread;
  numbers[thread] = x[at];
  if (BUG != NO_WARP_BARRIER) __syncwarp();
  y[at] = numbers[thread ^ 31];
}

// c [16, 8] = a [16, 16] b [8, 16]^T by one instruction, operands through ldmatrix.
__global__ void product_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  __shared__ __align__(16) __nv_bfloat16 left[16 * 16], right[8 * 16];
  const int lane = threadIdx.x, group = lane / 4, inner = lane % 4;
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  __syncwarp();
  unsigned x[4], y[2];
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(&left[lane % 16 * 16 + lane / 16 * 8]));
  const unsigned also = static_cast<unsigned>(__cvta_generic_to_shared(&right[lane % 8 * 16 + lane / 8 % 2 * 8]));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(from));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(also));
  float z[4] = {0, 0, 0, 0};
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(z[0]), "+f"(z[1]), "+f"(z[2]), "+f"(z[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  for (int i = 0; i < 4; ++i) c[(group + i / 2 * 8) * 8 + 2 * inner + i % 2] = z[i];
}

// Integers: division, remainder, shifts and high products by runtime numbers, 32 and 64 bits.
__global__ void integers(const long long* x, const long long* y, long long* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const long long a = x[i], b = y[i];
  const int c = static_cast<int>(a), d = static_cast<int>(b);
  long long* to = out + 12l * i;
  to[0] = a / b, to[1] = a % b, to[2] = c / d, to[3] = c % d;
  to[4] = static_cast<unsigned>(c) / static_cast<unsigned>(d), to[5] = __mulhi(c, d);
  to[6] = __mul64hi(a, b), to[7] = a >> (b & 63), to[8] = static_cast<unsigned long long>(a) >> (d & 63);
  to[9] = __popc(c) + 100 * __clz(d) + 10000 * __ffsll(a), to[10] = __byte_perm(c, d, 0x1735), to[11] = __brev(c);
}

}  // namespace

extern "C" {
int run_sum_exp(int bug, const float* x, float* sums, int rows, int length, void* stream) {
  decltype(&sum_exp_rows<NONE>) kernels[] = {
      sum_exp_rows<NONE>,
      sum_exp_rows<NO_BARRIER>,
      sum_exp_rows<NO_WAIT>,
      sum_exp_rows<NO_SECOND_BARRIER>,
      sum_exp_rows<READS_PAST_END>,
      sum_exp_rows<MISALIGNED>,
      sum_exp_rows<DIVERGENT_BARRIER>,
      sum_exp_rows<SAME_PLACE>,
  };
  kernels[bug]<<<rows, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(x, sums, length);
  return cudaGetLastError();
}
int run_reverse(int bug, const int* x, int* y, int blocks, void* stream) {
  const auto kernel = bug == NO_WARP_BARRIER ? reverse_warps<NO_WARP_BARRIER> : reverse_warps<NONE>;
  kernel<<<blocks, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(x, y);
  return cudaGetLastError();
}
int run_product(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, void* stream) {
  product_bf16<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(a, b, c);
  return cudaGetLastError();
}
int run_integers(const long long* x, const long long* y, long long* out, int count, void* stream) {
  integers<<<(count + 63) / 64, 64, 0, static_cast<cudaStream_t>(stream)>>>(x, y, out, count);
  return cudaGetLastError();
}
}
