# SPDX-License-Identifier: Apache-2.0
"""The calls of ops that are budgeted, measured and mutated: aligned shapes as they occur, few rows of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Workload:
    """One call of an op.

    Attributes:
        call: runs it, on tensors drawn from a seed, and returns what is compared.
        minimum: bytes that have to move: every input once, every output once, and the workspace that is stated there.
    """

    op: str
    name: str
    call: Callable[[], tuple[Tensor, ...]]
    minimum: int


def soft_target(dtype: str, rows: int, classes: int, divergence: str = "forward_kl") -> Workload:
    """Logits are read, the gradient is written, all once; and a loss of four bytes per row is written and read."""
    element = DTYPES[dtype].itemsize

    def call() -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            torch.randn(rows, classes, generator=generator).mul_(3).to(DTYPES[dtype]) for _ in range(2)
        )
        op = torch.ops.pydistill_triton.soft_target
        return op(student, teacher, None, None, None, divergence, 2.0, 0.0, 0.5, True, -100, "mean", True)

    return Workload("soft_target", f"{divergence} {dtype} {classes}", call, rows * (3 * classes * element + 8))
