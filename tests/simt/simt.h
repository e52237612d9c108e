// SPDX-License-Identifier: Apache-2.0
// CUDA C++ on the CPU, for tests: the project's own .cuh and .cu files are compiled by a C++ compiler against this
// header in place of nvcc's built-ins. Every thread of a block is a fiber; blocks run one after another.
//
// What a GPU leaves undefined is an error or spoils the result here: barriers that not all threads reach, collectives
// whose lanes disagree, reads of shared memory that nobody wrote (it is filled with NaN), asynchronous copies that were
// not waited for (they land no sooner). Threads run in one of three orders, so that a missing barrier shows in one of
// them; under ThreadSanitizer switching fibers orders nothing, so that it shows in all. Under AddressSanitizer shared
// memory ends where the launch said it does.
//
// The scalar types and their conversions are NVIDIA's own. Exponentials are the C library's, exact to the last bit or
// nearly so, and no floating-point contraction is done that the source does not ask for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

#if defined(__SANITIZE_THREAD__)
#define SIMT_HARNESS __attribute__((no_sanitize_thread))
#else
#define SIMT_HARNESS
#endif

namespace simt {

struct Position {
  uint3 thread;
  int lane;
};
const Position& position();  // of the running thread
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* shared_memory();

void barrier(const char* site);
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments... arguments) {
  run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [=] { kernel(arguments...); });
}

// All lanes of `mask` meet here; the last one to arrive calls combine(mask, inputs, outputs) for them, arrays of 32.
using Combine = void (*)(unsigned mask, const void* const* inputs, void* const* outputs);
void collective(unsigned mask, const char* name, const void* input, void* output, Combine combine);
// Orders what lanes did before against what they do after it, which the other collectives do not.
void sync_warp(unsigned mask);

// cp.async: groups of copies, which land when they are waited for; `given` bytes are read, the others become zero.
void copy_async(void* to, const void* from, size_t bytes, size_t given);
void commit_copies();
void wait_copies(int groups_left);

// ldmatrix of four 8 x 8 matrices of 16-bit numbers: each lane reads the row that it names, here, where sanitizers
// watch; then rows are exchanged.
void exchange_rows(unsigned (&out)[4], const uint16_t (&row)[8], bool transposed);

inline void load_matrices(unsigned (&out)[4], const void* row, bool transposed) {
  using Element = uint16_t __attribute__((may_alias));
  uint16_t elements[8];
  for (int i = 0; i < 8; ++i) elements[i] = static_cast<const Element*>(row)[i];
  exchange_rows(out, elements, transposed);
}

// mma.m16n8k16: c += a b.
struct Fragments {
  unsigned a[4], b[2];
  float c[4];
};

template <class S>
SIMT_HARNESS void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const Fragments input{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  collective(0xffffffffu, "mma", &input, &c, [](unsigned, const void* const* in, void* const* out) SIMT_HARNESS {
    const auto element = [](const unsigned& pair, int which) SIMT_HARNESS {
      S x;
      std::memcpy(&x, reinterpret_cast<const char*>(&pair) + which * sizeof(S), sizeof(S));
      return static_cast<double>(static_cast<float>(x));
    };
    const auto of = [&](int lane) SIMT_HARNESS { return static_cast<const Fragments*>(in[lane]); };
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
        double sum = of(l)->c[i];
        for (int k = 0; k < 16; ++k)
          sum += element(of(row % 8 * 4 + k % 8 / 2)->a[k / 8 * 2 + row / 8], k % 2) *
                 element(of(column * 4 + k % 8 / 2)->b[k / 8], k % 2);
        static_cast<float*>(out[l])[i] = static_cast<float>(sum);
      }
  });
}

template <class T>
struct Given {
  T value;
  int from;
};

template <class T>
SIMT_HARNESS T shuffle(unsigned mask, const char* name, T value, int from) {
  const Given<T> input{value, from};
  T output;
  collective(mask, name, &input, &output, [](unsigned lanes, const void* const* in, void* const* out) SIMT_HARNESS {
    for (int l = 0; l < 32; ++l) {
      if (!(lanes >> l & 1)) continue;
      const int source = static_cast<const Given<T>*>(in[l])->from;
      // The value of a lane that does not take part is undefined: NaN, or the largest number.
      if (source < 0 || source > 31 || !(lanes >> source & 1))
        std::memset(out[l], 0xff, sizeof(T));
      else
        *static_cast<T*>(out[l]) = static_cast<const Given<T>*>(in[source])->value;
    }
  });
  return output;
}

}  // namespace simt

#define SIMT_TEXT_OF(x) #x
#define SIMT_TEXT(x) SIMT_TEXT_OF(x)

#define threadIdx (::simt::position().thread)
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_size())
#define gridDim (::simt::grid_size())

#define PYD_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::shared_memory()
#define PYD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::simt::launch(kernel, dim3(grid), dim3(block), (shared_bytes), stream, __VA_ARGS__)

#define __syncthreads() ::simt::barrier(__FILE__ ":" SIMT_TEXT(__LINE__))

inline void __syncwarp(unsigned mask = 0xffffffffu) { simt::sync_warp(mask); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
  const int lane = simt::position().lane, from = lane ^ by;
  // Beyond the lane's own segment a thread gets its own value back.
  return simt::shuffle(mask, "__shfl_xor_sync", value, from / width > lane / width ? lane : from);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = simt::position().lane;
  return simt::shuffle(mask, "__shfl_sync", value, lane / width * width + from % width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  simt::collective(mask, "__ballot_sync", &predicate, &votes,
                   [](unsigned lanes, const void* const* in, void* const* out) SIMT_HARNESS {
                     unsigned all = 0;
                     for (int l = 0; l < 32; ++l)
                       if ((lanes >> l & 1) && *static_cast<const int*>(in[l]) != 0) all |= 1u << l;
                     for (int l = 0; l < 32; ++l)
                       if (lanes >> l & 1) *static_cast<unsigned*>(out[l]) = all;
                   });
  return votes;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
