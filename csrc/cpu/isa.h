// SPDX-License-Identifier: Apache-2.0
// Which instruction set's kernels run: the best one this processor has, or the one named by PYDISTILL_ISA.
#pragma once

#include <string>
#include <vector>

#include "attention_relation.h"
#include "limits.h"
#include "projected_mse.h"
#include "scale.h"
#include "soft_target.h"

namespace pyd {

struct Kernels {
  const char* isa;
  const AttentionRelationKernel& attention_relation;
  const ProjectedMseKernel& projected_mse;
  const SoftTargetKernel& soft_target;
  const ScaleKernel& scale;
  const LimitKernels& limits;
};

// Chosen once, at first use. Throws std::runtime_error where PYDISTILL_ISA names a set that is not compiled in or that
// this processor does not have.
const Kernels& kernels();

std::vector<std::string> isas_compiled();

}  // namespace pyd
