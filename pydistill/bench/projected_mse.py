# SPDX-License-Identifier: Apache-2.0
"""Benchmark of projected_mse_loss: forward and backward against eager PyTorch, torch.compile and the arithmetic of the
machine.

What has to be computed, whoever does it, for R rows of ds (student) and dt (teacher) features: up, the projected rows,
the gradient of the student's and that of the projection; down, no gradient passes through the projection, so it is two
products:

    6 * R * ds * dt (up) or 4 * R * ds * dt (down) floating-point operations

What has to move: both sides read once, the student's gradient written once, and the projection with its gradient,

    (R * (2 * ds + dt) + 2 * ds * dt) * bytes per number

The limit is the operations at the measured rate of fused multiply-adds. In bf16, where the processor has dot products
of bf16 pairs, the projected rows count half (they are exact at twice the rate), gradients in full (the difference is
fp32): 5 * R * ds * dt and 3 * R * ds * dt.

Prediction for the machine of docs/benchmarks.md, 2 threads at 228 GFLOP/s and 40 GB/s, dt = 768, fp32 up: the
operations take 4.0 ms for (4096, 48), 64 ms for (65536, 48), 32 ms for (4096, 384) and 509 ms for (65536, 384); memory
0.4, 5.7, 0.7 and 10 ms. So it is bound by multiply-adds everywhere, also where eager, which moves the projected rows
and their difference several times, is bound by memory (ds = 48).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill import _dispatch
from pydistill.bench.compare import (
    CPU,
    LIMITS,
    Errors,
    Result,
    Size,
    Target,
    Workload,
    compile_loss,
    judge,
    with_gradients,
)
from pydistill.bench.gpu import on, product_limit
from pydistill.bench.measure import Variant
from pydistill.bench.rows import Row
from pydistill.losses import projected_mse

LOSS = OP = "projected_mse"
WORKLOADS = {
    "up": "the student projected to the teacher's size",
    "down": "the teacher projected to the student's size",
}
PROVIDERS = ("eager", "compile", "ours", "limit")

SIZE_NAMES = ("rows", "student", "teacher")
EXAMPLE_SIZE = "4096x384x768"
# A BERT-base teacher with a tiny student and one of half its width; a batch, and many at once.
SIZES: tuple[Size, ...] = ((4096, 48, 768), (65536, 48, 768), (4096, 384, 768), (65536, 384, 768))
# Other students and teachers, up: panels and blocks that do not come out even.
MORE_SIZES: tuple[Size, ...] = tuple(
    (4096, student, teacher)
    for teacher in (312, 768, 1024)
    for student in (48, 96, 192, 312, 384)
    if (4096, student, teacher) not in SIZES
)
QUICK_SIZES = ((2048, 48, 768), (2048, 384, 768))

# Errors are measured on the first so many rows.
GATE_ROWS = 4096


def plain_loss(student: Tensor, teacher: Tensor, projection: Tensor, up: bool) -> Tensor:
    """What one writes without this package; the eager and torch.compile providers."""
    return F.mse_loss(student @ projection, teacher) if up else F.mse_loss(teacher @ projection, student)


@dataclass(frozen=True)
class Problem:
    """Inputs of one workload: the arguments of the loss."""

    student: Tensor  # [R, ds], requires grad
    teacher: Tensor  # [R, dt]
    projection: Tensor  # requires grad
    up: bool

    @classmethod
    def random(cls, size: Size, dtype: torch.dtype, workload: str) -> Problem:
        rows, student_size, teacher_size = size
        generator = torch.Generator().manual_seed(0)
        student, teacher = (
            torch.randn(rows, features, generator=generator).to(dtype) for features in (student_size, teacher_size)
        )
        up = workload == "up"
        source, target = (student_size, teacher_size) if up else (teacher_size, student_size)
        projection = (torch.randn(source, target, generator=generator) * source**-0.5).to(dtype)
        return cls(student.requires_grad_(), teacher, projection.requires_grad_(), up)

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        """What receives gradients."""
        return self.student, self.projection

    def part(self, dtype: torch.dtype | None = None) -> Problem:
        """As many rows as the gate takes, copied, in another dtype if one is named."""
        student, teacher = (side.detach()[:GATE_ROWS].to(dtype, copy=True) for side in (self.student, self.teacher))
        projection = self.projection.detach().to(dtype, copy=True)
        return Problem(student.requires_grad_(), teacher, projection.requires_grad_(), self.up)

    def operations(self, *, pairs_of_bf16: bool = False) -> int:
        """Floating-point operations; the projection counted half where it is made of dot products of bf16 pairs."""
        each = self.student.numel() * self.teacher.size(1)
        return each * ((6 if self.up else 4) - int(pairs_of_bf16))


def provider_call(provider: str, problem: Problem, compiled: Callable[..., Tensor]) -> Callable[[], Result]:
    """One forward and backward by the named provider."""
    arguments = (problem.student, problem.teacher, problem.projection)
    direction = "up" if problem.up else "down"
    losses: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: plain_loss(*arguments, problem.up),
        "compile": lambda: compiled(*arguments, problem.up),
        "ours": lambda: projected_mse.projected_mse_loss(*arguments, direction=direction),
    }
    return with_gradients(losses[provider], problem.trained)


def has_bf16_dots() -> bool:
    """Whether we project bf16 rows by dot products of bf16 pairs."""
    return _dispatch.native is not None and _dispatch.native.isa() == "avx512"


def limit_call(problem: Problem) -> Callable[[], object]:
    """The problem's multiply-adds and nothing else, on all threads."""
    if problem.student.device.type != "cpu":
        return product_limit(problem.operations(), problem.student.dtype, problem.student.device)
    native = _dispatch.native
    assert native is not None, "limits are loops of the compiled extension"
    amount = problem.operations(pairs_of_bf16=problem.student.dtype == torch.bfloat16 and has_bf16_dots())
    iterations = max(1, round(amount / native.multiply_add(1)))
    return lambda: native.multiply_add(iterations)


def providers_here(device: torch.device = CPU) -> list[str]:
    """All providers that this installation can run: the limit is measured by the compiled extension, or is a matrix
    product of the GPU's library."""
    if device.type != "cpu":
        return list(PROVIDERS)
    return [provider for provider in PROVIDERS if _dispatch.native is not None or provider not in LIMITS]


def limit_name(device: torch.device = CPU) -> str:
    if device.type != "cpu":
        return "a matrix product by PyTorch of as many operations"
    if _dispatch.native is None:
        return "not measured without the compiled extension"
    return "fused multiply-adds" + (", projections of bf16 at twice their rate" if has_bf16_dots() else "")


def gate(problem: Problem, providers: Sequence[str], compiled: Callable[..., Tensor]) -> dict[str, Errors]:
    """Errors of every provider against float64, on the first rows; raises GateError for ours."""

    def by_reference(part: Problem) -> Result:
        arguments, direction = (part.student, part.teacher, part.projection), "up" if part.up else "down"
        loss = partial(projected_mse.projected_mse_reference, *arguments, direction=direction)
        return with_gradients(loss, part.trained)()

    part = problem.part()
    what = f"{LOSS} {{}} on {tuple(part.student.shape)} {part.student.dtype}"
    truth = by_reference(problem.part(torch.float64))
    return judge(what, providers, lambda one: provider_call(one, part, compiled), by_reference(part), truth)


def cases(sizes: Sequence[Size] | None, names: Sequence[str], *, quick: bool) -> list[tuple[Size, list[str]]]:
    """Every workload at every size that is asked for; of the documentation's, both directions of four."""
    if sizes is not None:
        return [(size, list(names)) for size in sizes]
    if quick:
        return [(size, list(names)) for size in QUICK_SIZES]
    more = [(size, ["up"]) for size in MORE_SIZES if "up" in names]
    return [(size, list(names)) for size in SIZES] + more


def workloads(
    size: Size, dtype: torch.dtype, names: Sequence[str], providers: Sequence[str], device: torch.device = CPU
) -> list[Workload]:
    """The named workloads of one size."""
    compiled = compile_loss(plain_loss) if "compile" in providers else plain_loss
    found = []
    for name in names:
        problem = on(Problem.random(size, dtype, name), device)
        measured = gate(problem, providers, compiled)
        variants = {
            provider: Variant(limit_call(problem) if provider in LIMITS else provider_call(provider, problem, compiled))
            for provider in providers
        }
        found.append(Workload(name, size, variants, measured, gigaflop=problem.operations() / 1e9))
    return found


# (dtype, rows, student) -> times faster than eager, than torch.compile; up, with dt = 768
RATIO_TARGETS: dict[tuple[str, int, int], tuple[float, float]] = {
    ("fp32", 4096, 48): (4.5, 2.5),
    ("fp32", 65536, 48): (8.5, 3.3),
    ("fp32", 4096, 384): (1.6, 1.4),
    ("bf16", 65536, 48): (5.5, 1.7),
}
NEVER_SLOWER = (65536, 384, 768)  # than torch.compile, in any dtype and direction
LIMIT_TARGET = 85  # percent of the multiply-adds of 2 threads, fp32, where the student has 384 features of 768
# Percent of the multiply-adds that no other size falls below: no cliff.
SWEEP_TARGET = 70
# Beside the gradients and the projection's size in fp32 for each thread and once more: the packed projection, and a
# block of rows per thread.
BLOCK_MIB = 3


def targets(rows: Sequence[Row]) -> list[Target]:
    """The promises that the measured rows can judge."""
    found = []
    for row in rows:
        if row.provider != "ours" or row.thp_alloc:
            continue
        name = f"{row.workload} {row.dtype} ({row.shape.replace('x', ', ')}) {row.threads}T"
        count, student, teacher = map(int, row.shape.split("x"))
        size = (count, student, teacher)
        if size in SIZES and row.workload == "up":
            over_eager, over_compile = RATIO_TARGETS.get((row.dtype, count, student), (None, None))
            if row.vs_eager is not None and over_eager is not None:
                found.append(Target(f"{name}, times eager", row.vs_eager, over_eager, True))
            if row.vs_compile is not None and over_compile is not None:
                found.append(Target(f"{name}, times compile", row.vs_compile, over_compile, True))
        if size == NEVER_SLOWER and row.vs_compile is not None:
            found.append(Target(f"{name}, times compile", row.vs_compile, 1.0, True))
        if row.percent_of_limit is not None and row.dtype == "fp32" and row.threads == 2 and row.workload == "up":
            if size in SIZES and student == 384:
                found.append(Target(f"{name}, % of limit", row.percent_of_limit, LIMIT_TARGET, True))
            if size in MORE_SIZES:
                found.append(Target(f"{name}, % of limit", row.percent_of_limit, SWEEP_TARGET, True))
        if row.extra_mib is not None and size in SIZES:
            width = {"fp32": 4, "bf16": 2, "fp16": 2}[row.dtype]
            gradients = (count * student + student * teacher) * width
            accumulators = (row.threads + 1) * student * teacher * 4
            allowed = (gradients + accumulators) / 2**20 + (row.threads + 1) * BLOCK_MIB
            found.append(Target(f"{name}, extra MiB", row.extra_mib, allowed, False))
    return found
