// SPDX-License-Identifier: Apache-2.0
// Loops at the machine's limits, compiled once per instruction set.
#include "limits.h"

#include "simd.h"

namespace pyd::PYD_ISA {
namespace {

// Two reads and one write per element, the pattern of a loss that writes its gradient. `out` is aligned to a vector.
void stream(const float* a, const float* b, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + Floats::width <= n; i += Floats::width) {
    const Floats x = Floats::load(a + i) + Floats::load(b + i);
#if defined(__AVX512F__)
    _mm512_stream_ps(out + i, x.v);
#elif defined(__AVX2__)
    _mm256_stream_ps(out + i, x.v);
#else
    x.store(out + i);
#endif
  }
  for (; i < n; ++i) out[i] = a[i] + b[i];
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

double multiply_add(int64_t iterations) {
  constexpr int chains = 12;  // latency 4 times two units, and some to spare
  decltype(Floats::v) sums[chains];
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) sums[i] = Floats::all(0).v;
  const Floats x = Floats::all(1.0001f), y = Floats::all(0.5f);
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) {
      sums[i] = fma(x, y, Floats{sums[i]}).v;
#if defined(__x86_64__)
      asm volatile("" : "+v"(sums[i]));  // or the compiler sees twelve equal chains and keeps one
#endif
    }
  }
  volatile float sink = 0;
#pragma GCC unroll 12
  for (int i = 0; i < chains; ++i) sink = sink + sum(Floats{sums[i]});
  return 2.0 * chains * Floats::width * static_cast<double>(iterations);
}

double exponentials(int64_t iterations) {
  constexpr int chains = 4;
  Floats x[chains];
#pragma GCC unroll 4
  for (int i = 0; i < chains; ++i) x[i] = Floats::all(-0.3f * static_cast<float>(i));
  for (int64_t k = 0; k < iterations; ++k) {
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) {
      // As if each number were new and each exponential were used; or the compiler computes them once, or never.
#if defined(__x86_64__)
      asm volatile("" : "+v"(x[i].v));
      const Floats y = exp2(x[i]);
      asm volatile("" : : "v"(y.v));
#else
      asm volatile("" : "+m"(x[i].v));
      const Floats y = exp2(x[i]);
      asm volatile("" : : "m"(y.v));
#endif
    }
  }
  return static_cast<double>(chains * Floats::width) * static_cast<double>(iterations);
}

}  // namespace

extern const LimitKernels limits = {stream, multiply_add, exponentials};

}  // namespace pyd::PYD_ISA
