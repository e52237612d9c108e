# SPDX-License-Identifier: Apache-2.0
"""What the CUDA projected_mse does beyond the numerics tests of all implementations.

tests/test_simt.py runs this file in a process where ``impl="cuda"`` runs on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, PROJECTED_MSE
from torch import Tensor

ops = torch.ops.pydistill_simt


def between_nan(x: Tensor, offset: int) -> Tensor:
    """The same values, contiguous, `offset` elements behind an aligned address, with NaN on both sides."""
    buffer = torch.full((x.numel() + 256,), math.nan, dtype=x.dtype)
    view = buffer[64 + offset : 64 + offset + x.numel()].view(x.shape)
    return view.copy_(x)


def call(tensors: dict[str, Tensor], up: bool, normalize: bool) -> tuple[Tensor, ...]:
    student, teacher = (tensors[name] for name in (("student", "teacher") if up else ("teacher", "student")))
    return ops.projected_mse(
        student, teacher, tensors["projection"], tensors["bias"], tensors["mask"], None, None, up, normalize, "direct",
        "mean", True, True, True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("sizes", [(48, 72), (64, 40), (104, 32)])
def test_order_of_threads_and_alignment_change_no_bit(sizes, up, dtype, monkeypatch):
    """Features moved 16 bytes at a time, or one by one from odd addresses; sources that do and do not fit at once."""
    clean = PROJECTED_MSE.inputs((150, *sizes), DTYPES[dtype])
    clean["projection"] = clean["projection"].to(DTYPES[dtype])
    clean["bias"] = clean["bias"].to(DTYPES[dtype])
    monkeypatch.setenv("PYDISTILL_SIMT_ORDER", "forward")
    expected = call(clean, up, sizes[0] == 48)
    for order, offset in (("reverse", 8), ("random", 1)):
        monkeypatch.setenv("PYDISTILL_SIMT_ORDER", order)
        moved = {name: between_nan(one, offset) if one.is_floating_point() else one for name, one in clean.items()}
        found = call(moved, up, sizes[0] == 48)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
        assert all(bool(one.isfinite().all()) for one in found)


def test_nothing_is_asked_of_an_empty_batch():
    tensors = PROJECTED_MSE.inputs((3, 8, 16), torch.float32)
    tensors = {name: one[:0] if name in ("student", "teacher", "mask") else one for name, one in tensors.items()}
    loss, gradient, of_projection, of_bias, scale = call(tensors, True, True)
    assert loss == 0 and scale == 1 and gradient.shape == (0, 8)
    assert not of_projection.any() and not of_bias.any()
