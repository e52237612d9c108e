# SPDX-License-Identifier: Apache-2.0
"""The mutants of the package's kernels: `python tests/ptx/trials.py triton|cuda LOSS [mutants of a kind]`.

Each kernel has a few launches to be caught by: sizes that are neither multiples nor blocks, small and large, masks,
and the last row valid, so that what goes over the end shows. The last word printed is the share of mutants that were
caught."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import torch
from cases import ATTENTION_RELATION, PROJECTED_MSE, SOFT_TARGET, LossCase, Tensors, run
from poison import poisoned_memory

from ptx import cuda_device, mutants, triton_device

CASES = {case.name: case for case in (SOFT_TARGET, ATTENTION_RELATION, PROJECTED_MSE)}
SEED = 0


def soft_target() -> Iterator[tuple[Tensors, dict[str, Any]]]:
    """Rows of all scales, up to one where what is not taken relative to a maximum overflows."""
    for rows, classes in ((7, 1003), (5, 1000), (1100, 3)):
        tensors = SOFT_TARGET.inputs((rows, classes), torch.float32)
        for name in ("student_logits", "teacher_logits"):
            tensors[name] *= torch.tensor([1.0, 40.0, 0.1])[torch.arange(rows) % 3, None]
        # One row of each kind that does not count: elsewhere an element that is left as it was is the wrong one.
        tensors["mask"][:], tensors["labels"][:] = True, torch.arange(rows) % classes
        tensors["mask"][1], tensors["labels"][2] = False, -100
        yield tensors, {"divergence": "jsd", "temperature": 2.0, "hard_weight": 0.3}


def attention_relation() -> Iterator[tuple[Tensors, dict[str, Any]]]:
    for positions in (40, 70):
        tensors = ATTENTION_RELATION.inputs((2, 3, positions, 16, 32), torch.bfloat16)
        tensors["mask"][-1, -1] = True
        del tensors["segment_ids"]
        yield tensors, {}
    # Two whole blocks, sequences and a triangle, and another denominator.
    tensors = ATTENTION_RELATION.inputs((2, 3, 128, 16, 32), torch.bfloat16)
    tensors["mask"][:] = True
    yield tensors, {"causal": True, "reduction": "token_mean"}


def projected_mse() -> Iterator[tuple[Tensors, dict[str, Any]]]:
    for shape in ((37, 24, 56), (70, 64, 128)):
        tensors = PROJECTED_MSE.inputs(shape, torch.bfloat16)
        tensors["mask"][-1] = True
        yield tensors, {"normalize": True}


TRIALS = {"soft_target": soft_target, "attention_relation": attention_relation, "projected_mse": projected_mse}


def launches(implementation: str, case: LossCase) -> list[Any]:
    """Of all trials of a loss, forward and backward."""
    found: list[Any] = []
    for tensors, keywords in TRIALS[case.name]():
        if implementation == "triton":
            device: Any = triton_device.Device("sm_80", keep=True)
        else:
            device = cuda_device.ops().device(keep=True)
        # Elsewhere what was there before could be what a mutant fails to write, or a number so large that nothing
        # differs from it.
        with device, poisoned_memory():
            run(case.loss, tensors, {**keywords, "impl": implementation}, case.differentiable)
        found += device.launches
    return found


def main(implementation: str, loss: str, per_kind: str = "4") -> None:
    if implementation == "triton":
        triton_device.register_ops()
    else:
        cuda_device.ops()
        cuda_device.stand_in_for_cuda()
    caught = total = 0
    for same in mutants.by_kernel(launches(implementation, CASES[loss])):
        score = mutants.score(same, per_kind=int(per_kind), seed=SEED)
        print(score, flush=True)
        caught, total = caught + score.total - len(score.survivors), total + score.total
    print(f"{implementation} {loss}: {caught} of {total} mutants caught: {caught / total:.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
