# SPDX-License-Identifier: Apache-2.0
"""Benchmark of linear_soft_target_loss: forward and backward against eager PyTorch, torch.compile and the matrix
products that it consists of.

What has to be computed, whoever does it, for R rows, C classes, ds (student) and dt (teacher) features: logits of both
sides, the gradient of the student's rows and that of its weight,

    2 * R * C * (3 * ds + dt) floating-point operations

The limit is one product by PyTorch of as many operations in the same dtype. On a CPU a half-precision gradient of the
weight is made in fp32, where PyTorch's product would round each chunk's: a quarter of the operations, at the fp32 rate.

Prediction for the machine of docs/benchmarks.md, 2 threads at 228 GFLOP/s, fp32: (1024, 384, 768, 30522) takes 527 ms
of products, and the loss between them 10 ms (41 ms for 4096 rows in place), so ours should be at 95 % of the limit and
2.3 times faster than eager, which spends 700 ms on the loss. Memory: the gradients and two chunks of logits, 105 MiB,
at any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill.bench import liger
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
from pydistill.losses import linear_soft_target

LOSS = "linear_soft_target"
OP = "soft_target"
TEMPERATURE = 2.0
WORKLOADS = {"kl": "KL alone at T=2"}
PROVIDERS = ("eager", "compile", "liger", "ours", "limit")

SIZE_NAMES = ("rows", "student", "teacher", "classes")
EXAMPLE_SIZE = "1024x384x768x30522"
# Half a BERT-base and BERT's vocabulary; a mixed-vocabulary student and its 4,928 pieces; small models with Llama 3's
# vocabulary.
SIZES: tuple[Size, ...] = ((1024, 384, 768, 30522), (4096, 96, 384, 4928), (512, 512, 1024, 128256))
QUICK_SIZES: tuple[Size, ...] = ((128, 384, 768, 30522), (512, 96, 384, 4928))

# Errors are measured on as many rows as fit in this many logits.
GATE_ELEMENTS = 1 << 22


def plain_loss(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    """What one writes without this package; the eager and torch.compile providers."""
    with torch.no_grad():
        target = F.softmax(F.linear(teacher, teacher_weight) / TEMPERATURE, -1)
    logits = F.linear(student, weight)
    return F.kl_div(F.log_softmax(logits / TEMPERATURE, -1), target, reduction="batchmean") * TEMPERATURE**2


@dataclass(frozen=True)
class Problem:
    """Inputs of one size: the arguments of the loss."""

    student: Tensor  # [R, ds], requires grad
    weight: Tensor  # [C, ds], requires grad
    teacher: Tensor  # [R, dt]
    teacher_weight: Tensor  # [C, dt]

    @classmethod
    def random(cls, size: Size, dtype: torch.dtype) -> Problem:
        """Logits of either side spread as far as those of `soft_target`'s benchmark."""
        rows, student_size, teacher_size, classes = size
        generator = torch.Generator().manual_seed(0)

        def side(features: int) -> list[Tensor]:
            scale = 3 * features**-0.5
            drawn = [torch.randn(count, features, generator=generator) for count in (rows, classes)]
            return [drawn[0].to(dtype), drawn[1].mul_(scale).to(dtype)]

        student, weight = (tensor.requires_grad_() for tensor in side(student_size))
        return cls(student, weight, *side(teacher_size))

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student, self.weight, self.teacher, self.teacher_weight

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        """What receives gradients."""
        return self.student, self.weight

    def part(self, dtype: torch.dtype | None = None) -> Problem:
        """As many rows as the gate takes, copied, in another dtype if one is named."""
        count = max(1, GATE_ELEMENTS // self.weight.size(0))
        student, teacher = (side.detach()[:count].to(dtype, copy=True) for side in (self.student, self.teacher))
        weight, teacher_weight = (side.detach().to(dtype, copy=True) for side in (self.weight, self.teacher_weight))
        return Problem(student.requires_grad_(), weight.requires_grad_(), teacher, teacher_weight)

    def operations(self) -> int:
        """Floating-point operations of the products."""
        rows, classes = self.student.size(0), self.weight.size(0)
        return 2 * rows * classes * (3 * self.student.size(1) + self.teacher.size(1))


def provider_call(provider: str, problem: Problem, compiled: Callable[..., Tensor]) -> Callable[[], Result]:
    """One forward and backward by the named provider."""
    arguments = problem.arguments
    losses: dict[str, Callable[[], Tensor]] = {
        "eager": lambda: plain_loss(*arguments),
        "compile": lambda: compiled(*arguments),
        "liger": lambda: liger.linear_soft_target_loss(*arguments, TEMPERATURE),
        "ours": lambda: linear_soft_target.linear_soft_target_loss(*arguments, temperature=TEMPERATURE),
    }
    return with_gradients(losses[provider], problem.trained)


def providers_here(device: torch.device = CPU) -> list[str]:
    """All providers that this installation can run."""
    return [provider for provider in PROVIDERS if provider != "liger" or liger.available(device)]


def limit_name(device: torch.device = CPU) -> str:
    return "a matrix product by PyTorch of as many operations"


def gate(problem: Problem, providers: Sequence[str], compiled: Callable[..., Tensor]) -> dict[str, Errors]:
    """Errors of every provider against float64, on the first rows; raises GateError for ours."""

    def by_reference(part: Problem) -> Result:
        loss = partial(linear_soft_target.linear_soft_target_reference, *part.arguments, temperature=TEMPERATURE)
        return with_gradients(loss, part.trained)()

    part = problem.part()
    what = f"{LOSS} {{}} on {tuple(part.student.shape)} x {tuple(part.weight.shape)} {part.student.dtype}"
    truth = by_reference(problem.part(torch.float64))
    return judge(what, providers, lambda one: provider_call(one, part, compiled), by_reference(part), truth)


def cases(sizes: Sequence[Size] | None, names: Sequence[str], *, quick: bool) -> list[tuple[Size, list[str]]]:
    """Every workload at every size."""
    return [(size, list(names)) for size in sizes or (QUICK_SIZES if quick else SIZES)]


def workloads(
    size: Size, dtype: torch.dtype, names: Sequence[str], providers: Sequence[str], device: torch.device = CPU
) -> list[Workload]:
    """The one workload of a size."""
    compiled = compile_loss(plain_loss) if "compile" in providers else plain_loss
    problem = on(Problem.random(size, dtype), device)
    found = gate(problem, providers, compiled)
    variants = {
        provider: Variant(
            product_limit(problem.operations(), dtype, device)
            if provider in LIMITS
            else provider_call(provider, problem, compiled)
        )
        for provider in providers
    }
    return [Workload(name, size, variants, found, gigaflop=problem.operations() / 1e9) for name in names]


LIMIT_TARGETS = {"fp32": 85, "bf16": 45}  # percent of the product, at 2 threads
RATIO_TARGET = 1.0  # never slower than eager or torch.compile
SLACK_MIB = 8


def targets(rows: Sequence[Row]) -> list[Target]:
    """The promises that the measured rows can judge."""
    found = []
    for row in rows:
        if row.provider != "ours" or row.thp_alloc:
            continue
        name = f"{row.workload} {row.dtype} ({row.shape.replace('x', ', ')}) {row.threads}T"
        if row.vs_eager is not None:
            found.append(Target(f"{name}, times eager", row.vs_eager, RATIO_TARGET, True))
        if row.vs_compile is not None:
            found.append(Target(f"{name}, times compile", row.vs_compile, RATIO_TARGET, True))
        share = LIMIT_TARGETS.get(row.dtype)
        if row.percent_of_limit is not None and share is not None and row.threads == 2:
            found.append(Target(f"{name}, % of limit", row.percent_of_limit, share, True))
        if row.extra_mib is not None:
            count, features, _, classes = map(int, row.shape.split("x"))
            width = {"fp32": 4, "bf16": 2, "fp16": 2}[row.dtype]
            # The weight's gradient is summed in fp32 and then rounded; so is a chunk's gradient before its product.
            gradient = classes * features * (4 if width == 4 else 4 + width) + count * features * width
            logits = min(count, linear_soft_target.rows_at_a_time(classes, "cpu")) * classes
            allowed = (gradient + logits * (8 if width == 4 else 4 + 2 * width)) / 2**20 + SLACK_MIB
            found.append(Target(f"{name}, extra MiB", row.extra_mib, allowed, False))
    return found
