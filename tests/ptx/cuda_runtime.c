// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime without a GPU: what nvcc's host code and the launchers call, every launch handed to a callback. Linked
// in the place of cudart (nvcc -cudart none), so that launchers run as they are compiled for a machine that has one.

#include <stddef.h>
#include <string.h>

typedef struct {
  unsigned x, y, z;
} dim3;

// Returns an error of CUDA, 0 for none.
typedef int (*launch_callback)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                               size_t shared);

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_FUNCTION = 98, MAX_KERNELS = 4096 };

static launch_callback on_launch;
static int last_error;
static int multiprocessors = 4;
static const void* functions[MAX_KERNELS];
static const char* names[MAX_KERNELS];
static int kernels;
// Of a launch that is being made: one at a time, as tests do.
static struct {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pending;

void pydistill_on_launch(launch_callback callback) { on_launch = callback; }

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  (void)binary;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
char __cudaInitModule(void** handle) {
  (void)handle;
  return 1;
}
void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, void* tid,
                            void* bid, void* block, void* grid, int* warp) {
  (void)handle, (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
  if (kernels < MAX_KERNELS) {
    functions[kernels] = host;
    names[kernels++] = name;
  }
}

static const char* name_of(const void* function) {
  for (int i = 0; i < kernels; ++i)
    if (functions[i] == function) return names[i];
  return NULL;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pending.grid = grid, pending.block = block, pending.shared = shared, pending.stream = stream;
  return SUCCESS;
}
int __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid, *block = pending.block, *shared = pending.shared;
  *(void**)stream = pending.stream;
  return SUCCESS;
}

int __cudaGetKernel(void** kernel, const void* function) {
  *kernel = (void*)function;
  return SUCCESS;
}
int cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  const char* name = name_of(function);
  (void)stream;
  // What a device would refuse.
  if (!name)
    last_error = INVALID_FUNCTION;
  else if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u || !block.x ||
           !block.y || !block.z || block.x * block.y * block.z > 1024)
    last_error = INVALID_VALUE;
  else if (on_launch) {
    const unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
    const int error = on_launch(name, g, b, arguments, shared);
    if (error) last_error = error;
  }
  return last_error;
}
int __cudaLaunchKernel(void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

int cudaGetLastError(void) {
  const int error = last_error;
  last_error = SUCCESS;
  return error;
}
int cudaPeekAtLastError(void) { return last_error; }
const char* cudaGetErrorString(int error) { return error ? "refused by the runtime of the tests" : "no error"; }
const char* cudaGetErrorName(int error) { return error ? "error" : "cudaSuccess"; }

int cudaFuncSetAttribute(const void* function, int attribute, int value) {
  (void)attribute;
  return !name_of(function) ? INVALID_FUNCTION : value > 163 * 1024 ? INVALID_VALUE : SUCCESS;
}
int cudaGetDevice(int* device) {
  *device = 0;
  return SUCCESS;
}
int cudaSetDevice(int device) { return device ? INVALID_VALUE : SUCCESS; }
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  // Those of an A100, by their numbers in driver_types.h; few multiprocessors, so that grids stay small.
  switch (attribute) {
    case 1:
      *value = 1024;
      return SUCCESS;  // threads per block
    case 8:
      *value = 48 << 10;
      return SUCCESS;  // shared memory per block
    case 10:
      *value = 32;
      return SUCCESS;  // warp
    case 16:
      *value = multiprocessors;
      return SUCCESS;
    case 39:
      *value = 2048;
      return SUCCESS;  // threads per multiprocessor
    case 75:
      *value = 8;
      return SUCCESS;  // compute capability
    case 76:
      *value = 0;
      return SUCCESS;
    case 81:
      *value = 164 << 10;
      return SUCCESS;  // shared memory per multiprocessor
    case 97:
      *value = 163 << 10;
      return SUCCESS;  // per block, when asked for
    default:
      return INVALID_VALUE;
  }
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* function, int threads,
                                                           size_t shared, unsigned flags) {
  (void)function, (void)threads, (void)shared, (void)flags;
  *blocks = 1;
  return SUCCESS;
}
int cudaMemsetAsync(void* pointer, int value, size_t count, void* stream) {
  (void)stream;
  memset(pointer, value, count);
  return SUCCESS;
}
