# SPDX-License-Identifier: Apache-2.0
"""Runs the soft_target op of libraries of tests/simt on a few problems and says what is wrong with each.

    python -m simt.probe NAMESPACE=LIBRARY ...

prints one line per library: its namespace, and "fine" or the first thing that is not. The problems are few, so that
sanitizers can watch them, and take every path once: teams within a warp, of a warp and of a block, rows at odd
addresses between NaN, masks, labels, rows that fit into shared memory and rows that do not, threads in every order.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator

import torch
from simt import library
from torch import Tensor

from pydistill.losses.soft_target import soft_target_reference

PROBLEMS = [  # rows, classes, divergence, temperature, shared memory of the device
    (5, 3, "forward_kl", 2.0, 232448),
    (3, 101, "reverse_kl", 1.0, 232448),
    (3, 101, "jsd", 1.0, 4096),
    (2, 700, "forward_kl", 1.0, 232448),
    (2, 1031, "reverse_kl", 1.0, 4096),
    (2, 1031, "jsd", 2.0, 232448),
    (1, 8200, "forward_kl", 1.0, 232448),
]


def between_nan(x: Tensor) -> Tensor:
    """The same values, contiguous, one element behind an aligned address, with NaN on both sides."""
    buffer = torch.full((x.numel() + 129,), math.nan)
    view = buffer[65 : 65 + x.numel()].view(x.shape)
    return view.copy_(x)


def wrong(namespace: str) -> Iterator[str]:
    """What is wrong with the op, one sentence each."""
    op = getattr(torch.ops, namespace).soft_target
    for rows, classes, divergence, temperature, shared in PROBLEMS:
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
        for order in ("forward", "reverse", "random"):
            os.environ["PYDISTILL_SIMT_ORDER"] = order
            case = f"{divergence} {rows}x{classes} {order}"
            try:
                found = op(between_nan(student), between_nan(teacher), *options)
            except RuntimeError as error:
                yield f"{case}: {error}"
                continue
            for what, mine, truth in (("value", found[0], exact), ("gradient", found[1], gradient)):
                if not torch.allclose(mine.double(), truth, rtol=1e-5, atol=1e-6):
                    yield f"{case}: {what}"
    student[0, 0] = math.nan
    if not op(student, teacher, None, None, None, "forward_kl", 1.0, 0.0, 0.5, True, -100, "sum", False)[0].isnan():
        yield "NaN is hidden"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, path = argument.split("=", 1)
        library.load(path, name)
        print(name, next(wrong(name), "fine"), flush=True)
