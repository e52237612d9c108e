# SPDX-License-Identifier: Apache-2.0
"""The calls of ops that are measured, budgeted and mutated.

Traffic is held against a formula in which every input is read once and every output written once, with what a kernel
needs beyond that said here: workspace, and inputs that are read again because keeping them would cost more. Shapes
are aligned, and few rows of what occurs: the work of a row does not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SINGLE = 4  # bytes of a number in fp32


@dataclass(frozen=True)
class Workload:
    """One call of an op.

    Attributes:
        call: takes the namespace of operators, torch.ops.<namespace>, and returns the outputs.
        minimum: bytes, every input and output once.
        formula: bytes, with workspace and repeated reads.
        cached: memory is shared by blocks of a launch, so that a sector counts once per launch; else each time.
    """

    op: str
    name: str
    call: Callable[[Any], tuple[Tensor, ...]]
    minimum: int
    formula: int
    cached: bool = False


def normal(*shape: int, dtype: str, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).mul_(scale).to(DTYPES[dtype])


def soft_target(dtype: str, rows: int, classes: int, divergence: str, walks: int = 1) -> Workload:
    """A row that is not kept is walked again, student and teacher. Beside it, its loss is written and read."""

    def call(ops: Any) -> tuple[Tensor, ...]:
        student, teacher = (normal(rows, classes, dtype=dtype, seed=seed, scale=3) for seed in (0, 1))
        return ops.soft_target(student, teacher, None, None, None, divergence, 2.0, 0.0, 0.5, True, -100, "mean", True)

    row = classes * DTYPES[dtype].itemsize
    minimum, formula = rows * 3 * row, rows * ((2 * walks + 1) * row + 2 * SINGLE)
    return Workload("soft_target", f"{divergence} {dtype} {rows} x {classes}", call, minimum, formula)


def attention_relation(
    dtype: str, batch: int, heads: int, positions: int, teacher_size: int, student_size: int, launches: int
) -> Workload:
    """Queries against keys. Inputs are read by each of the launches: values, gradients of queries and of keys, which
    CUDA computes in one. Per head and token there are four statistics in between, written once and read by each launch
    that follows, and two numbers of each token's sequence."""

    def call(ops: Any) -> tuple[Tensor, ...]:
        sizes = (student_size, student_size, teacher_size, teacher_size)
        student_q, student_k, teacher_q, teacher_k = (
            normal(batch, heads, positions, size, dtype=dtype, seed=seed) for seed, size in enumerate(sizes)
        )
        return ops.attention_relation(
            student_q, student_k, None, teacher_q, teacher_k, None, [0, 1], [1.0], None, None, None, None, False, None,
            None, "sequence_mean", True,
        )  # fmt: skip

    tokens, element = batch * heads * positions, DTYPES[dtype].itemsize
    inputs, outputs = (2 * tokens * size * element for size in (student_size + teacher_size, student_size))
    return Workload(
        "attention_relation",
        f"{dtype} {batch} x {heads} x {positions} x {teacher_size}/{student_size}",
        call,
        inputs + outputs,
        launches * inputs + outputs + tokens * (4 * launches + 2) * SINGLE,
        cached=True,
    )


def projected_mse(dtype: str, rows: int, student_size: int, teacher_size: int, parts: int) -> Workload:
    """The student is projected. Inputs are read by two launches: loss with the student's gradient, and the projection's
    gradient, which is in fp32, and of which each part of the rows has a sum of its own, written and read."""

    def call(ops: Any) -> tuple[Tensor, ...]:
        student, teacher = (
            normal(rows, size, dtype=dtype, seed=seed) for seed, size in enumerate((student_size, teacher_size))
        )
        projection = normal(student_size, teacher_size, dtype=dtype, seed=2, scale=student_size**-0.5)
        return ops.projected_mse(
            student, teacher, projection, None, None, None, None, True, False, "direct", "mean", True, True, False
        )

    element = DTYPES[dtype].itemsize
    weights = student_size * teacher_size
    inputs = (rows * (student_size + teacher_size) + weights) * element
    outputs = rows * student_size * element + weights * SINGLE
    return Workload(
        "projected_mse",
        f"{dtype} {rows} x {student_size} -> {teacher_size}",
        call,
        inputs + outputs,
        2 * inputs + outputs + 2 * parts * weights * SINGLE,
        cached=True,
    )


def workloads(implementation: str) -> list[Workload]:
    """All that the kernels of "triton" or "cuda" are held against."""
    from pydistill import _dispatch

    # Up to here a row is read once: it stays in registers, or in shared memory.
    kept = {"triton": 8192 * SINGLE, "cuda": 80 << 10}[implementation]
    launches = {"triton": 3, "cuda": 2}[implementation]

    def rows_of(dtype: str, classes: int, divergence: str) -> Workload:
        size = classes * (SINGLE if implementation == "triton" else DTYPES[dtype].itemsize)
        again = 2 if divergence == "forward_kl" else 3
        return soft_target(dtype, 2, classes, divergence, 1 if size <= kept else again)

    found = [
        rows_of("bf16", 4096, "forward_kl"),
        rows_of("fp32", 4096, "forward_kl"),
        rows_of("bf16", 32768, "forward_kl"),
        rows_of("bf16", 32768, "jsd"),
        attention_relation("bf16", 2, 2, 128, 64, 32, launches),
        attention_relation("fp32", 2, 2, 128, 64, 32, launches),
        projected_mse("bf16", 256, 128, 256, parts={"triton": 4, "cuda": 4}[implementation]),
        projected_mse("bf16", 128, 384, 128, parts={"triton": 2, "cuda": 2}[implementation]),
        projected_mse("fp32", 256, 128, 256, parts={"triton": 8, "cuda": 4}[implementation]),
    ]
    there = _dispatch.TRITON_OPS if implementation == "triton" else _dispatch.CUDA_LOSSES
    return [one for one in found if one.op in there]
