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

from pydistill.losses.projected_mse import projected_mse_reference

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
@pytest.mark.parametrize("sizes", [(48, 72), (64, 40), (200, 32)])
def test_order_of_threads_and_alignment_change_no_bit(sizes, up, dtype, monkeypatch):
    """Features moved 16 bytes at a time, or one by one from odd addresses; few and many features at a time."""
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


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("sizes", "shared"), [((200, 24), 101376), ((408, 24), 232448), ((24, 408), 232448)])
def test_a_source_that_is_taken_in_parts(sizes, shared, dtype, monkeypatch):
    """Where shared memory is less, or the source has more features than fit into any."""
    tensors = PROJECTED_MSE.inputs((70, *sizes), DTYPES[dtype])
    monkeypatch.setenv("PYDISTILL_SIMT_ORDER", "random")
    for one in ("projection", "bias"):
        tensors[one] = tensors[one].to(DTYPES[dtype])
    for up in (True, False):
        monkeypatch.setenv("PYDISTILL_SIMT_SHARED", str(shared))
        found = call(tensors, up, True)
        monkeypatch.setenv("PYDISTILL_SIMT_SHARED", "232448")
        exact = {name: one.double() if one.is_floating_point() else one for name, one in tensors.items()}
        wanted = [exact["student"] if up else exact["teacher"], exact["projection"], exact["bias"]]
        student, teacher = (exact[name] for name in (("student", "teacher") if up else ("teacher", "student")))
        for one in wanted:
            one.requires_grad_()
        value = projected_mse_reference(
            student, teacher, exact["projection"], bias=exact["bias"], mask=exact["mask"],
            direction="up" if up else "down", normalize=True,
        )  # fmt: skip
        truths = (value.detach(), *torch.autograd.grad(value, wanted))
        found = (found[0], found[1].double() * found[4].double(), *found[2:4])
        for mine, truth, rounding in zip(found, truths, (0, 1, 0, 0), strict=True):
            allowed = 2e-5 * truth.abs().max() + rounding * torch.finfo(DTYPES[dtype]).eps * truth.abs()
            assert ((mine.double() - truth).abs() <= allowed).all()


def test_nothing_is_asked_of_an_empty_batch():
    tensors = PROJECTED_MSE.inputs((3, 8, 16), torch.float32)
    tensors = {name: one[:0] if name in ("student", "teacher", "mask") else one for name, one in tensors.items()}
    loss, gradient, of_projection, of_bias, scale = call(tensors, True, True)
    assert loss == 0 and scale == 1 and gradient.shape == (0, 8)
    assert not of_projection.any() and not of_bias.any()
