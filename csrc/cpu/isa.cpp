// SPDX-License-Identifier: Apache-2.0
// The choice of the instruction set, from what the processor says and what the user asked for.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace pyd {
namespace {

struct Candidate {
  Kernels kernels;
  bool supported;
};

// Best first.
std::vector<Candidate> candidates() {
  return {
#if defined(__x86_64__)
      {{"avx512", avx512::attention_relation, avx512::projected_mse, avx512::soft_target, avx512::scale,
        avx512::limits},
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma")},
      {{"avx2", avx2::attention_relation, avx2::projected_mse, avx2::soft_target, avx2::scale, avx2::limits},
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {{"generic", generic::attention_relation, generic::projected_mse, generic::soft_target, generic::scale,
        generic::limits},
       true},
  };
}

Kernels choose() {
  const char* wanted = std::getenv("PYDISTILL_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string names;
  for (const Candidate& c : candidates()) {
    if (any ? c.supported : c.kernels.isa == std::string(wanted)) {
      if (c.supported) return c.kernels;
      throw std::runtime_error("PYDISTILL_ISA=" + std::string(wanted) +
                               ": this processor does not have these instructions");
    }
    names += (names.empty() ? "" : ", ") + std::string(c.kernels.isa);
  }
  throw std::runtime_error("PYDISTILL_ISA must be one of " + names + ", got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

std::vector<std::string> isas_compiled() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.emplace_back(c.kernels.isa);
  return names;
}

}  // namespace pyd
