// SPDX-License-Identifier: Apache-2.0
// Runs the tests of one instruction set, or says (77) that this processor does not have it.
#include <cstdio>
#include <cstring>

#define PYD_STRING_OF(x) #x
#define PYD_STRING(x) PYD_STRING_OF(x)

namespace pyd::PYD_ISA {
int test_headers();
}

int main() {
  const char* isa = PYD_STRING(PYD_ISA);
#if defined(__x86_64__)
  bool supported = true;
  if (std::strcmp(isa, "avx2") == 0)
    supported = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (std::strcmp(isa, "avx512") == 0)
    supported = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma");
  if (!supported) {
    std::printf("%s: this processor does not have these instructions\n", isa);
    return 77;
  }
#endif
  const int failures = pyd::PYD_ISA::test_headers();
  std::printf("%s: %d failures\n", isa, failures);
  return failures == 0 ? 0 : 1;
}
