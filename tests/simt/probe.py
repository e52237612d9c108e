# SPDX-License-Identifier: Apache-2.0
"""Runs the ops of libraries of tests/simt on a few problems and says what is wrong with each.

    python -m simt.probe ORDERS OP,OP... LIBRARY ...

prints one line per library: its name, and "fine" or the first thing that is not. The problems are few, so that
sanitizers can watch them, and take every path once. For soft_target: teams within a warp, of a warp and of a block,
rows at odd addresses between NaN, masks, labels, rows that fit into shared memory and rows that do not. For
attention_relation and projected_mse, in bf16: masks and segments, tensors moved by vectors and element by element,
heads and sources that fit into shared memory at once and such that do not. Threads run in every order that is named.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from simt import library
from torch import Tensor

from pydistill.losses.attention_relation import attention_relation_reference
from pydistill.losses.projected_mse import projected_mse_reference
from pydistill.losses.soft_target import soft_target_reference

ops = torch.ops.pydistill_simt

SOFT_TARGETS = [  # rows, classes, divergence, temperature, shared memory of the device
    (5, 3, "forward_kl", 2.0, 232448),
    (3, 101, "reverse_kl", 1.0, 232448),
    (3, 101, "jsd", 1.0, 4096),
    (2, 700, "forward_kl", 1.0, 232448),
    (2, 1031, "reverse_kl", 1.0, 4096),
    (2, 1031, "jsd", 2.0, 232448),
    (1, 8200, "forward_kl", 1.0, 232448),
]
RELATIONS = [  # tokens, features of the student's and the teacher's heads, relation, causal
    (70, 32, 16, [0, 1], True),
    (100, 8, 24, [0, 0], False),
    (70, 18, 80, [0, 1], False),
]

PROJECTIONS = [  # rows, features of the source and of the target, up, normalize, shared memory of the device
    (70, 48, 40, True, True, 232448),
    (150, 24, 72, False, False, 232448),
    (70, 144, 40, True, False, 101376),
    (70, 141, 33, True, False, 101376),
]
# Of which a block has up to 384 at a time, and more.
WIDE_PROJECTIONS = [(70, 144, 40, True, False, 232448), (70, 389, 33, True, False, 232448)]


def between_nan(x: Tensor) -> Tensor:
    """The same values, contiguous, one element behind an aligned address, with NaN on both sides."""
    buffer = torch.full((x.numel() + 129,), math.nan, dtype=x.dtype)
    view = buffer[65 : 65 + x.numel()].view(x.shape)
    return view.copy_(x)


def soft_target(orders: list[str]) -> Iterator[str]:
    """What is wrong with the op, with threads in each of these orders."""
    for rows, classes, divergence, temperature, shared in SOFT_TARGETS:
        os.environ["PYDISTILL_SIMT_SHARED"] = str(shared)
        generator = torch.Generator().manual_seed(classes)
        student, teacher = (3 * torch.randn(rows, classes, generator=generator) for _ in range(2))
        labels = torch.randint(classes, (rows,), generator=generator)
        mask = torch.arange(rows) != 1
        logits = student.double().requires_grad_()
        keywords = {"divergence": divergence, "temperature": temperature, "hard_weight": 0.5, "mask": mask}
        exact = soft_target_reference(logits, teacher.double(), labels, **keywords)
        (gradient,) = torch.autograd.grad(exact, logits)
        options = (labels, mask, None, divergence, temperature, 0.5, 0.5, True, -100, "mean", True)
        for order in orders:
            os.environ["PYDISTILL_SIMT_ORDER"] = order
            case = f"{divergence} {rows}x{classes} {order}"
            try:
                found = ops.soft_target(between_nan(student), between_nan(teacher), *options)
            except RuntimeError as error:
                yield f"{case}: {error}"
                continue
            for what, mine, truth in (("value", found[0], exact), ("gradient", found[1], gradient)):
                if not torch.allclose(mine.double(), truth, rtol=1e-5, atol=1e-6):
                    yield f"{case}: {what}"
    student[0, 0] = math.nan
    options = (None, None, None, "forward_kl", 1.0, 0.0, 0.5, True, -100, "sum", False)
    if not ops.soft_target(student, teacher, *options)[0].isnan():
        yield "NaN is hidden"


def attention_relation(orders: list[str]) -> Iterator[str]:
    """The same."""
    os.environ["PYDISTILL_SIMT_SHARED"] = "232448"
    for positions, student_size, teacher_size, relation, causal in RELATIONS:
        generator = torch.Generator().manual_seed(positions)
        sizes = (student_size, student_size, teacher_size, teacher_size)
        tensors = [torch.randn(1, 2, positions, size, generator=generator).mul(2).bfloat16() for size in sizes]
        mask = torch.arange(positions)[None] % 7 != 3
        segments = torch.arange(positions)[None] // 45
        for tensor in tensors:
            tensor[:, :, ~mask[0]] = math.nan
        exact = [tensor.double().requires_grad_(i < 2) for i, tensor in enumerate(tensors)]
        (student_a, student_b, teacher_a, teacher_b), itself = exact, relation == [0, 0]
        value = attention_relation_reference(
            student_a, None if itself else student_b, teacher_a, None if itself else teacher_b, mask=mask,
            segment_ids=segments, causal=causal, reduction="token_mean",
        )  # fmt: skip
        truths = (value, *torch.autograd.grad(value, exact[: 1 if itself else 2]))
        a, b, c, d = (between_nan(tensor) for tensor in tensors) if student_size == 18 else tensors
        options = (relation, [1.0], mask, segments, None, None, causal, None, None, "token_mean", True)
        for order in orders:
            os.environ["PYDISTILL_SIMT_ORDER"] = order
            case = f"{positions} tokens {student_size}/{teacher_size} {order}"
            try:
                found = ops.attention_relation(a, b, None, c, d, None, *options)
            except RuntimeError as error:
                yield f"{case}: {error}"
                continue
            if not torch.allclose(found[0].double(), truths[0], rtol=1e-5):
                yield f"{case}: value"
            for mine, truth in zip(found[2:], truths[1:], strict=False):
                # Within one rounding of a number in bf16, and of the largest.
                if not ((mine.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-5 * truth.abs().max()).all():
                    yield f"{case}: gradient"


def projected_mse(orders: list[str], problems: list[tuple[int, int, int, bool, bool, int]]) -> Iterator[str]:
    """The same."""
    for rows, source_size, target_size, up, normalize, shared in problems:
        os.environ["PYDISTILL_SIMT_SHARED"] = str(shared)
        generator = torch.Generator().manual_seed(rows)
        source, target, projection, bias = (
            torch.randn(*sizes, generator=generator).bfloat16()
            for sizes in ((rows, source_size), (rows, target_size), (source_size, target_size), (target_size,))
        )
        mask = torch.arange(rows) % 7 != 3
        source[~mask] = target[~mask] = math.nan
        exact = [tensor.double().requires_grad_() for tensor in (source, target, projection, bias)]
        student, teacher = exact[:2] if up else exact[1::-1]
        value = projected_mse_reference(
            student, teacher, exact[2], bias=exact[3], mask=mask, direction="up" if up else "down", normalize=normalize
        )
        truths = (value, *torch.autograd.grad(value, (student, *exact[2:])))
        moved = [between_nan(tensor) if source_size % 8 else tensor for tensor in (source, target)]
        student, teacher = moved if up else moved[::-1]
        options = (bias, mask, None, None, up, normalize, "direct", "mean", True, True, True)
        for order in orders:
            os.environ["PYDISTILL_SIMT_ORDER"] = order
            case = f"{rows} x {source_size} -> {target_size} {order}"
            try:
                found = ops.projected_mse(student, teacher, projection, *options)
            except RuntimeError as error:
                yield f"{case}: {error}"
                continue
            for what, mine, truth, rounding in zip(
                ("value", "gradient", "projection", "bias"), found, truths, (1e-5, 2**-8, 2e-5, 2e-5), strict=False
            ):
                if not ((mine.double() - truth).abs() <= rounding * truth.abs() + 2e-5 * truth.abs().max()).all():
                    yield f"{case}: {what}"


PROBES: dict[str, Callable[[list[str]], Iterator[str]]] = {
    "soft_target": soft_target,
    "attention_relation": attention_relation,
    "projected_mse": partial(projected_mse, problems=PROJECTIONS),
    "projected_mse_wide": partial(projected_mse, problems=WIDE_PROJECTIONS),
}

if __name__ == "__main__":
    # All libraries register the same ops, each in a process of its own.
    for argument in sys.argv[3:]:
        child = os.fork()
        if child == 0:
            library.load(argument)
            wrong = (what for op in sys.argv[2].split(",") for what in PROBES[op](sys.argv[1].split(",")))
            print(Path(argument).stem, next(wrong, "fine"), flush=True)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status != 0:
            sys.exit(os.waitstatus_to_exitcode(status))
