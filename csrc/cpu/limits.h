// SPDX-License-Identifier: Apache-2.0
// The machine's limits, measured by loops that do nothing else: what the microbenchmarks compare kernels with.
#pragma once

#include <cstdint>

namespace pyd {

struct LimitKernels {
  void (*stream)(const float* a, const float* b, float* out, int64_t n);  // out = a + b with non-temporal stores
  double (*multiply_add)(int64_t iterations);                             // returns the floating-point operations done
  double (*exponentials)(int64_t iterations);                             // returns the exponentials done
};

namespace avx512 {
extern const LimitKernels limits;
}
namespace avx2 {
extern const LimitKernels limits;
}
namespace generic {
extern const LimitKernels limits;
}

}  // namespace pyd
