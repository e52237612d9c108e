# SPDX-License-Identifier: Apache-2.0
"""Benchmark of soft_target_loss: forward and backward against eager PyTorch, torch.compile and the memory
system.

Bytes that have to move, whoever does it: student logits and teacher logits are read once and the gradient is
written once, 3 * rows * classes * itemsize, plus 8 * rows for int64 labels. The limit is a plain stream of
the same pattern, two reads and one write over the very same tensors with the output preallocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill import _dispatch
from pydistill.bench import liger
from pydistill.bench.compare import (
    CPU,
    Errors,
    Result,
    Size,
    Target,
    Workload,
    compile_loss,
    has_kernel,
    judge,
    with_gradients,
)
from pydistill.bench.gpu import on
from pydistill.bench.measure import Variant
from pydistill.bench.rows import Row
from pydistill.losses import soft_target

LOSS = OP = "soft_target"
TEMPERATURE = 2.0
WORKLOADS = {"kl": "KL alone at T=2", "kl+ce": "half hard-label cross-entropy"}
HARD_WEIGHT = {"kl": 0.0, "kl+ce": 0.5}
PROVIDERS = ("eager", "compile", "liger", "ours", "ours in place", "limit")

SIZE_NAMES = ("rows", "classes")
EXAMPLE_SIZE = "4096x30522"
# BERT's vocabulary; the 4,928 word pieces of a mixed-vocabulary student; Llama 3's vocabulary; three-way
# classification.
SIZES = ((4096, 30522), (4096, 4928), (1024, 128256), (65536, 3))
QUICK_SIZES = ((128, 30522), (512, 4928), (32, 128256), (65536, 3))

# Errors are measured on as many rows as fit in this many logits: they do not depend on the number of rows.
GATE_ELEMENTS = 1 << 22


def plain_loss(student: Tensor, teacher: Tensor, labels: Tensor | None, hard_weight: float) -> Tensor:
    """What one writes without this package; the eager and torch.compile providers."""
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1), reduction="batchmean"
    )
    soft = soft * TEMPERATURE**2
    if labels is None:
        return soft
    return hard_weight * F.cross_entropy(student, labels) + (1 - hard_weight) * soft


class HandOut(torch.autograd.Function):
    """A layer that costs nothing: hands out a preallocated buffer as its output and keeps the gradient it
    receives.

    Gradients in place need logits that some operation produced (a leaf's value cannot be overwritten), and
    the time of a real output layer is not what is measured here.
    """

    @staticmethod
    def forward(ctx: Any, seed: Tensor, holder: dict[str, Tensor]) -> Tensor:
        ctx.holder = holder
        return holder["logits"].detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        ctx.holder["gradient"] = grad_outputs[0]
        return None, None


@dataclass(frozen=True)
class Problem:
    """Inputs of one case. `buffer` is scratch of the student's size: in-place logits, and the limit's
    output."""

    student: Tensor  # [rows, classes], requires grad
    teacher: Tensor  # [rows, classes]
    labels: Tensor  # [rows]
    buffer: Tensor  # [rows, classes]

    @classmethod
    def random(cls, rows: int, classes: int, dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(0)
        student = torch.randn(rows, classes, generator=generator).mul_(3).to(dtype)
        teacher = torch.randn(rows, classes, generator=generator).mul_(3).to(dtype)
        labels = torch.randint(classes, (rows,), generator=generator)
        return cls(student.requires_grad_(), teacher, labels, student.detach().clone())

    def head(self, rows: int) -> Problem:
        """The first rows, copied."""
        student = self.student.detach()[:rows].clone().requires_grad_()
        return Problem(student, self.teacher[:rows].clone(), self.labels[:rows].clone(), self.buffer[:rows].clone())

    def bytes_to_move(self, hard_weight: float) -> int:
        """Read student and teacher, write the gradient: 3 * rows * classes * itemsize; labels: 8 * rows."""
        return 3 * self.student.numel() * self.student.element_size() + (8 * len(self.labels) if hard_weight else 0)


def provider_call(
    provider: str, problem: Problem, hard_weight: float, compiled: Callable[..., Tensor]
) -> Callable[[], Result]:
    """One forward and backward by the named provider."""
    student, teacher = problem.student, problem.teacher
    labels = problem.labels if hard_weight else None
    ours: dict[str, Any] = {"labels": labels, "temperature": TEMPERATURE, "hard_weight": hard_weight}

    def from_leaf(loss: Callable[[], Tensor]) -> Result:
        return with_gradients(loss, [student])()

    def in_place() -> Result:
        holder = {"logits": problem.buffer}
        logits = HandOut.apply(seed, holder)
        value = soft_target.soft_target_loss(logits, teacher, inplace=True, **ours)
        value.backward()
        return value.detach(), (holder["gradient"],)

    seed = torch.zeros((), device=student.device, requires_grad=True)
    calls: Mapping[str, Callable[[], Result]] = {
        "eager": lambda: from_leaf(lambda: plain_loss(student, teacher, labels, hard_weight)),
        "compile": lambda: from_leaf(lambda: compiled(student, teacher, labels, hard_weight)),
        "liger": lambda: from_leaf(lambda: liger.soft_target_loss(student, teacher, TEMPERATURE)),
        "ours": lambda: from_leaf(lambda: soft_target.soft_target_loss(student, teacher, **ours)),
        "ours in place": in_place,
    }
    return calls[provider]


def variant(provider: str, problem: Problem, hard_weight: float, compiled: Callable[..., Tensor]) -> Variant:
    """The provider as something to time; in place gets its logits back before each call, outside the
    clock."""
    if provider == "limit":
        return Variant(stream_limit(problem))
    call = provider_call(provider, problem, hard_weight, compiled)
    if provider == "ours in place":
        return Variant(call, lambda: _restore(problem))
    return Variant(call)


def _restore(problem: Problem) -> None:
    problem.buffer.copy_(problem.student.detach())


def stream_limit(problem: Problem) -> Callable[[], object]:
    """Two reads and one non-temporal write over the problem's own tensors; torch.add without native code and on a
    GPU."""
    student, teacher, buffer = problem.student.detach(), problem.teacher, problem.buffer
    native = _dispatch.native
    if native is None or student.device.type != "cpu":
        return lambda: torch.add(student, teacher, out=buffer)
    floats = student.numel() * student.element_size() // 4
    return lambda: native.stream(student.data_ptr(), teacher.data_ptr(), buffer.data_ptr(), floats)


def providers_here(device: torch.device = CPU) -> list[str]:
    """All providers that this installation can run: in place needs a compiled kernel."""
    there = {"ours in place": has_kernel(LOSS, device), "liger": liger.available(device)}
    return [provider for provider in PROVIDERS if there.get(provider, True)]


def limit_name(device: torch.device = CPU) -> str:
    streams = _dispatch.native is not None and device.type == "cpu"
    return "2 reads + 1 write, non-temporal" if streams else "torch.add(out=)"


def gate(
    problem: Problem, hard_weight: float, providers: Sequence[str], compiled: Callable[..., Tensor]
) -> dict[str, Errors]:
    """Errors of every provider against float64, on the first rows; raises GateError for ours."""
    rows = max(1, min(len(problem.labels), GATE_ELEMENTS // problem.student.shape[-1]))
    part = problem.head(rows)
    labels = part.labels if hard_weight else None
    keywords: dict[str, Any] = {"temperature": TEMPERATURE, "hard_weight": hard_weight}
    exact = part.student.detach().double().requires_grad_()

    def by_reference(student: Tensor, teacher: Tensor) -> Result:
        loss = partial(soft_target.soft_target_reference, student, teacher, labels, **keywords)
        return with_gradients(loss, [student])()

    truth, reference = by_reference(exact, part.teacher.double()), by_reference(part.student, part.teacher)
    what = f"{LOSS} {{}} on {tuple(part.student.shape)} {part.student.dtype}"
    return judge(
        what,
        providers,
        lambda one: provider_call(one, part, hard_weight, compiled),
        reference,
        truth,
        kernels=("ours", "ours in place"),
    )


def cases(sizes: Sequence[Size] | None, names: Sequence[str], *, quick: bool) -> list[tuple[Size, list[str]]]:
    """Every workload at every size."""
    return [(size, list(names)) for size in sizes or (QUICK_SIZES if quick else SIZES)]


def workloads(
    size: Size, dtype: torch.dtype, names: Sequence[str], providers: Sequence[str], device: torch.device = CPU
) -> list[Workload]:
    """The named workloads over the same logits; they share the limit."""
    rows, classes = size
    compiled = compile_loss(plain_loss) if "compile" in providers else plain_loss
    problem = on(Problem.random(rows, classes, dtype), device)
    # Liger's divergence knows no labels.
    measured = {name: [one for one in providers if one != "liger" or not HARD_WEIGHT[name]] for name in names}
    found = {name: gate(problem, HARD_WEIGHT[name], measured[name], compiled) for name in names}
    limit = variant("limit", problem, 0.0, compiled)
    return [
        Workload(
            name,
            size,
            {
                provider: limit if provider == "limit" else variant(provider, problem, HARD_WEIGHT[name], compiled)
                for provider in measured[name]
            },
            found[name],
            megabytes=problem.bytes_to_move(HARD_WEIGHT[name]) / 1e6,
        )
        for name in names
    ]


# (dtype, provider, thp_alloc) -> times faster than eager, than torch.compile; vocabularies of 4,928 and more
RATIO_TARGETS = {
    ("fp32", "ours in place", 0): (45, 12),
    ("fp32", "ours", 0): (28, 8),
    ("bf16", "ours in place", 0): (45, 18),
    ("bf16", "ours", 0): (25, 9),
    ("fp32", "ours in place", 1): (30, 7),
    ("fp32", "ours", 1): (18, 5),
}
# (dtype, provider) -> percent of the measured limit, at 2 threads
LIMIT_TARGETS = {
    ("fp32", "ours in place"): 80,
    ("fp32", "ours"): 45,
    ("bf16", "ours in place"): 60,
    ("bf16", "ours"): 35,
}
SMALL_CLASSES_MS = 0.5  # (65536, 3) on one thread, the Python call included
HARD_LABELS_FACTOR = 1.15  # KL + CE against KL alone


def targets(rows: Sequence[Row]) -> list[Target]:
    """The promises that the measured rows can judge."""
    found = []
    median = {(*row.problem, row.provider): row.median_ms for row in rows}
    for row in rows:
        name = f"{row.workload} {row.dtype} ({row.shape.replace('x', ', ')}) {row.threads}T {row.provider}"
        name += " [THP]" if row.thp_alloc else ""
        classes = int(row.shape.split("x")[1])
        if not row.provider.startswith("ours"):
            continue
        if row.workload == "kl" and classes >= 4928:
            over_eager, over_compile = RATIO_TARGETS.get((row.dtype, row.provider, row.thp_alloc), (None, None))
            if row.vs_eager is not None and over_eager is not None:
                found.append(Target(f"{name}, times eager", row.vs_eager, over_eager, True))
            if row.vs_compile is not None and over_compile is not None:
                found.append(Target(f"{name}, times compile", row.vs_compile, over_compile, True))
            share = LIMIT_TARGETS.get((row.dtype, row.provider))
            if row.percent_of_limit is not None and share is not None and row.threads == 2 and not row.thp_alloc:
                found.append(Target(f"{name}, % of limit", row.percent_of_limit, share, True))
        if row.workload == "kl" and row.shape == "65536x3" and row.threads == 1:
            found.append(Target(f"{name}, ms", row.median_ms, SMALL_CLASSES_MS, False))
        alone = median.get((row.loss, "kl", *row.problem[2:], row.provider))
        if row.workload == "kl+ce" and classes >= 4928 and alone is not None:
            found.append(Target(f"{name}, times KL alone", row.median_ms / alone, HARD_LABELS_FACTOR, False))
    return found
