# SPDX-License-Identifier: Apache-2.0
"""Benchmark of attention_relation_loss: forward and backward against eager PyTorch, torch.compile and the arithmetic
of the machine.

What has to be computed, whoever does it, with n_b valid tokens in sequence b, A relation heads of size dt (teacher) and
ds (student): the scores of both sides and two products with the gradient of the scores,

    2 * A * sum_b n_b^2 * (dt + 3 * ds) floating-point operations    (2 * B * A * N^2 * (dt + 3 * ds) without padding)

and two exponentials per pair of tokens, 2 * A * sum_b n_b^2. A self relation has symmetric scores, and its one product
with the symmetric sum G + G^T is half the work of two: half of everything.

The limit is that many operations at the measured rate of fused multiply-adds. In bf16, where the processor has dot
products of bf16 pairs, scores count half (they are exact at twice the rate), gradients in full (they are fp32):

    2 * A * sum_b n_b^2 * ((dt + ds) / 2 + 2 * ds)

The other limit, `exponentials`, is that of the exponentials at the measured rate of the same 2^x. Both use the same
units, so that heads of few features are bound by the sum of the two.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    has_kernel,
    judge,
    with_gradients,
)
from pydistill.bench.gpu import on, product_limit
from pydistill.bench.measure import Variant
from pydistill.bench.rows import Row
from pydistill.losses import attention_relation
from pydistill.losses.attention_relation import split_heads

LOSS = OP = "attention_relation"
WORKLOADS = {
    "qk": "queries and keys",
    "vv": "self relation",
    "qk padded": "queries and keys, half of the tokens are padding",
}
PROVIDERS = ("eager", "compile", "ours", "ours as cross", *LIMITS)

SIZE_NAMES = ("batch", "heads", "positions", "teacher", "student")
EXAMPLE_SIZE = "32x12x128x64x32"
# Heads of 64 and 32 features: a BERT-base teacher and a student of half its width, at three lengths.
TEACHER, STUDENT = 64, 32
SIZES = ((32, 12, 128, TEACHER, STUDENT), (8, 12, 512, TEACHER, STUDENT), (1, 12, 4096, TEACHER, STUDENT))
# MiniLMv2's 48 relation heads of the same tensors.
SPLIT_SIZES = ((32, 48, 128, 16, 8), (8, 48, 512, 16, 8))
ONE_HEAD = (1, 1, 2048, TEACHER, STUDENT)  # nothing but its rows to share between threads
LONG = (1, 12, 16384, TEACHER, STUDENT)  # where N x N matrices would take 12 GiB each
QUICK_SIZES = ((4, 12, 128, TEACHER, STUDENT), (1, 12, 512, TEACHER, STUDENT))
QUICK_SPLIT_SIZES = ((4, 48, 128, 16, 8),)

# More relation heads than this come out of this many attention heads, joined and split again.
ATTENTION_HEADS = 12
# Errors are measured on so many pairs of tokens, heads included: one head of 4,096 tokens.
GATE_PAIRS = 1 << 24
# Of a provider that keeps N x N matrices; what needs more is left out.
MEMORY_LIMIT = 8 << 30
# How many such matrices it keeps at its peak, as measured.
MATRICES = {"eager": 5, "compile": 3}


def plain_loss(
    student_a: Tensor,
    student_b: Tensor | None,
    teacher_a: Tensor,
    teacher_b: Tensor | None,
    mask: Tensor | None,
    relation_heads: int | None,
) -> Tensor:
    """What one writes without this package; the eager and torch.compile providers."""

    def scores(a: Tensor, b: Tensor | None) -> Tensor:
        a = split_heads(a, relation_heads)
        b = a if b is None else split_heads(b, relation_heads)
        product = a @ b.transpose(-1, -2) / math.sqrt(a.size(-1))
        if mask is not None:
            product = product.masked_fill(~mask[:, None, None, :], torch.finfo(product.dtype).min)
        return product

    p = F.softmax(scores(teacher_a, teacher_b), -1)
    log_q = F.log_softmax(scores(student_a, student_b), -1)
    if mask is None:
        return F.kl_div(log_q.flatten(0, 2), p.flatten(0, 2), reduction="batchmean")
    rows = F.kl_div(log_q, p, reduction="none").sum(-1).masked_fill(~mask[:, None, :], 0)  # [B, A, N]
    return (rows.sum(-1) / mask.sum(-1, keepdim=True)).mean()


@dataclass(frozen=True)
class Problem:
    """Inputs of one workload: the arguments of the loss. `student_b` and `teacher_b` are None for a self relation."""

    student_a: Tensor  # [B, H, N, d], requires grad
    student_b: Tensor | None  # the same
    teacher_a: Tensor
    teacher_b: Tensor | None
    mask: Tensor | None  # [B, N], right padding
    relation_heads: int | None

    @classmethod
    def random(cls, size: Size, dtype: torch.dtype, workload: str) -> Problem:
        batch, relation_heads, positions, teacher_size, student_size = size
        split = relation_heads > ATTENTION_HEADS and relation_heads % ATTENTION_HEADS == 0
        heads = ATTENTION_HEADS if split else relation_heads
        generator = torch.Generator().manual_seed(0)

        def tensor(size_of_head: int) -> Tensor:
            features = size_of_head * relation_heads // heads
            # As a model's projections leave them: heads of a token beside each other.
            flat = torch.randn(batch, positions, heads, features, generator=generator)
            return flat.to(dtype).transpose(1, 2)

        teacher, student = ([tensor(size_of_head) for _ in "ab"] for size_of_head in (teacher_size, student_size))
        single = workload == "vv"
        return cls(
            student[0].requires_grad_(),
            None if single else student[1].requires_grad_(),
            teacher[0],
            None if single else teacher[1],
            half_padded(batch, positions) if workload == "qk padded" else None,
            relation_heads if split else None,
        )

    @property
    def students(self) -> list[Tensor]:
        """What receives gradients."""
        return [tensor for tensor in (self.student_a, self.student_b) if tensor is not None]

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        return self.student_a, self.student_b, self.teacher_a, self.teacher_b

    @property
    def heads(self) -> int:
        """Relation heads."""
        return self.student_a.size(1) if self.relation_heads is None else self.relation_heads

    def head_size(self, tensor: Tensor) -> int:
        """Features of a relation head."""
        return tensor.size(1) * tensor.size(3) // self.heads

    def part(self) -> Problem:
        """As many sequences, heads and tokens as the gate takes, copied."""
        batch, heads, positions, _ = self.student_a.shape
        positions = min(positions, math.isqrt(GATE_PAIRS))
        split = self.heads // heads
        heads = max(1, min(heads, GATE_PAIRS // (positions**2 * split)))
        batch = max(1, min(batch, GATE_PAIRS // (positions**2 * split * heads)))

        def cut(tensor: Tensor) -> Tensor:
            return tensor.detach()[:batch, :heads, :positions].clone().requires_grad_(tensor.requires_grad)

        return Problem(
            cut(self.student_a),
            None if self.student_b is None else cut(self.student_b),
            cut(self.teacher_a),
            None if self.teacher_b is None else cut(self.teacher_b),
            None if self.mask is None else self.mask[:batch, :positions].clone(),
            None if self.relation_heads is None else heads * split,
        )

    def pairs(self) -> int:
        """Of tokens that a relation head compares, in all heads; a self relation has each pair once."""
        batch, _, positions, _ = self.student_a.shape
        lengths = torch.full((batch,), positions) if self.mask is None else self.mask.sum(-1)
        pairs = self.heads * int((lengths * lengths).sum())
        return pairs // 2 if self.student_b is None else pairs

    def operations(self, *, pairs_of_bf16: bool = False) -> int:
        """Floating-point operations; scores counted half where they are dot products of bf16 pairs."""
        teacher, student = self.head_size(self.teacher_a), self.head_size(self.student_a)
        scores = teacher + student
        return self.pairs() * ((scores if pairs_of_bf16 else 2 * scores) + 4 * student)


def half_padded(batch: int, positions: int) -> Tensor:
    """A mask with lengths evenly spread over 1 to N, in mixed order, that add up to half of the tokens."""
    lengths = ((torch.arange(batch) + 0.5) * positions / batch).round().long().clamp(min=1)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    return torch.arange(positions) < lengths[order].unsqueeze(-1)


def provider_call(provider: str, problem: Problem, compiled: Callable[..., Tensor]) -> Callable[[], Result]:
    """One forward and backward by the named provider."""
    ours: dict[str, Any] = {"mask": problem.mask, "relation_heads": problem.relation_heads}

    def as_cross() -> Tensor:
        """A self relation as someone would compute it who has only cross relations; autograd adds both gradients."""
        a, _, teacher, _ = problem.arguments
        return attention_relation.attention_relation_loss(a, a, teacher, teacher, **ours)

    losses: Mapping[str, Callable[[], Tensor]] = {
        "eager": lambda: plain_loss(*problem.arguments, problem.mask, problem.relation_heads),
        "compile": lambda: compiled(*problem.arguments, problem.mask, problem.relation_heads),
        "ours": lambda: attention_relation.attention_relation_loss(*problem.arguments, **ours),
        "ours as cross": as_cross,
    }
    return with_gradients(losses[provider], problem.students)


def has_bf16_dots() -> bool:
    """Whether our scores of bf16 tensors are dot products of bf16 pairs."""
    return _dispatch.native is not None and _dispatch.native.isa() == "avx512"


def limit_call(limit: str, problem: Problem) -> Callable[[], object]:
    """The problem's arithmetic and nothing else, on all threads: multiply-adds, or exponentials."""
    if problem.student_a.device.type != "cpu":
        return product_limit(problem.operations(), problem.student_a.dtype, problem.student_a.device)
    native = _dispatch.native
    assert native is not None, "limits are loops of the compiled extension"
    if limit == "limit":
        pairs_of_bf16 = problem.student_a.dtype == torch.bfloat16 and has_bf16_dots()
        loop, amount = native.multiply_add, problem.operations(pairs_of_bf16=pairs_of_bf16)
    else:
        loop, amount = native.exponentials, 2 * problem.pairs()
    iterations = max(1, round(amount / loop(1)))
    return lambda: loop(iterations)


def providers_here(device: torch.device = CPU) -> list[str]:
    """All providers that this installation can run: the limits are measured by the compiled extension, or are a matrix
    product of the GPU's library."""
    if device.type != "cpu":
        return [provider for provider in PROVIDERS if provider != "exponentials"]
    return [provider for provider in PROVIDERS if _dispatch.native is not None or provider not in LIMITS]


def limit_name(device: torch.device = CPU) -> str:
    if device.type != "cpu":
        return "a matrix product by PyTorch of as many operations"
    if _dispatch.native is None:
        return "not measured without the compiled extension"
    return "fused multiply-adds" + (", bf16 scores at twice their rate" if has_bf16_dots() else "")


def too_large(provider: str, size: Size, dtype: torch.dtype, device: torch.device = CPU) -> bool:
    """Whether a provider that keeps N x N matrices would need more than MEMORY_LIMIT."""
    if not has_kernel(LOSS, device) and provider.startswith("ours"):
        provider = "eager"
    batch, heads, positions = size[:3]
    return MATRICES.get(provider, 0) * batch * heads * positions**2 * dtype.itemsize > MEMORY_LIMIT


def gate(problem: Problem, providers: Sequence[str], compiled: Callable[..., Tensor]) -> dict[str, Errors]:
    """Errors of every provider against float64, on a part of the problem; raises GateError for ours."""
    part = problem.part()
    keywords: dict[str, Any] = {"mask": part.mask, "relation_heads": part.relation_heads}

    def by_reference(arguments: Sequence[Tensor | None]) -> Result:
        a, b, teacher_a, teacher_b = arguments
        assert a is not None and teacher_a is not None
        loss = partial(attention_relation.attention_relation_reference, a, b, teacher_a, teacher_b, **keywords)
        return with_gradients(loss, [tensor for tensor in (a, b) if tensor is not None])()

    exact = [
        None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad)
        for tensor in part.arguments
    ]
    what = f"{LOSS} {{}} on {tuple(part.student_a.shape)} {part.student_a.dtype}"
    # As cross, a bf16 gradient is the sum of two that were rounded already: a worse way, not a wrong kernel.
    reference, truth = by_reference(part.arguments), by_reference(exact)
    return judge(what, providers, lambda one: provider_call(one, part, compiled), reference, truth)


def cases(sizes: Sequence[Size] | None, names: Sequence[str], *, quick: bool) -> list[tuple[Size, list[str]]]:
    """Every workload at every size that is asked for; of the documentation's, those that tell something."""
    if sizes is not None:
        return [(size, list(names)) for size in sizes]
    found: list[tuple[Size, list[str]]] = []
    for size in QUICK_SIZES if quick else SIZES:
        padded = size[2] == SIZES[0][2]
        found.append((size, [name for name in names if padded or name != "qk padded"]))
    for size in QUICK_SPLIT_SIZES if quick else SPLIT_SIZES:
        found.append((size, [name for name in names if name != "qk padded"]))
    for size in [ONE_HEAD] if quick else [ONE_HEAD, LONG]:
        found.append((size, [name for name in names if name == "qk"]))
    return [(size, chosen) for size, chosen in found if chosen]


def workloads(
    size: Size, dtype: torch.dtype, names: Sequence[str], providers: Sequence[str], device: torch.device = CPU
) -> list[Workload]:
    """The named workloads of one size. Providers that would need too much memory are left out, with a line on
    stderr."""
    large = [provider for provider in providers if too_large(provider, size, dtype, device)]
    if large:
        print(
            f"{LOSS} {'x'.join(map(str, size))} {dtype}: without {', '.join(large)}, which would need more than "
            f"{MEMORY_LIMIT >> 30} GiB",
            file=sys.stderr,
        )
    compiled = compile_loss(plain_loss) if "compile" in providers else plain_loss
    found = []
    for name in names:
        problem = on(Problem.random(size, dtype, name), device)
        chosen = [
            provider
            for provider in providers
            if provider not in large and (provider != "ours as cross" or problem.student_b is None)
        ]
        measured = gate(problem, chosen, compiled)
        variants = {
            provider: Variant(
                limit_call(provider, problem) if provider in LIMITS else provider_call(provider, problem, compiled)
            )
            for provider in chosen
        }
        found.append(Workload(name, size, variants, measured, gigaflop=problem.operations() / 1e9))
    return found


# (dtype, positions) -> times faster than eager, than torch.compile; qk with heads of 64 and 32 features
RATIO_TARGETS = {
    ("fp32", 128): (5.5, 3),
    ("fp32", 512): (12, 4.3),
    ("fp32", 4096): (17, 7),
    ("bf16", 128): (7, 4.2),
    ("bf16", 512): (17, 8.5),
    ("bf16", 4096): (16, 8),
}
# positions -> percent of the multiply-adds, fp32, 2 threads
LIMIT_TARGETS = {128: 68, 512: 80, 4096: 80}
SELF_FACTOR = 1.6  # times faster than as a cross relation
# Of the share of pairs that is left in a padded batch. Queries are taken in blocks of 64, which alone comes to 1.3 at
# N = 128; and padding is given its zeros.
PADDED_FACTOR = 1.6
ONE_HEAD_LIMIT = 60  # percent of the multiply-adds of 2 threads: more than one thread can do


def targets(rows: Sequence[Row]) -> list[Target]:
    """The promises that the measured rows can judge."""
    found = []
    by = {(*row.problem, row.provider): row for row in rows}
    for row in rows:
        if row.provider != "ours":
            continue
        name = f"{row.workload} {row.dtype} ({row.shape.replace('x', ', ')}) {row.threads}T"
        name += " [THP]" if row.thp_alloc else ""
        size = tuple(map(int, row.shape.split("x")))
        positions = size[2]
        if row.workload == "qk" and size in SIZES and not row.thp_alloc:
            over_eager, over_compile = RATIO_TARGETS.get((row.dtype, positions), (None, None))
            if row.vs_eager is not None and over_eager is not None:
                found.append(Target(f"{name}, times eager", row.vs_eager, over_eager, True))
            if row.vs_compile is not None and over_compile is not None:
                found.append(Target(f"{name}, times compile", row.vs_compile, over_compile, True))
            if row.percent_of_limit is not None and row.dtype == "fp32" and row.threads == 2:
                bound = LIMIT_TARGETS[positions]
                found.append(Target(f"{name}, % of limit", row.percent_of_limit, bound, True))
        if size == ONE_HEAD and row.percent_of_limit is not None and row.threads == 2 and not row.thp_alloc:
            found.append(Target(f"{name}, % of limit", row.percent_of_limit, ONE_HEAD_LIMIT, True))
        cross = by.get((*row.problem, "ours as cross"))
        if cross is not None and size in SIZES:
            found.append(Target(f"{name}, times as cross", cross.median_ms / row.median_ms, SELF_FACTOR, True))
        full = by.get((row.loss, "qk", *row.problem[2:], row.provider))
        if row.workload == "qk padded" and size in SIZES and full is not None and full.gigaflop and row.gigaflop:
            share = row.gigaflop / full.gigaflop
            text = f"{name}, share of the time without padding ({share:.2f} of the work)"
            found.append(Target(text, row.median_ms / full.median_ms, PADDED_FACTOR * share, False))
    return found
