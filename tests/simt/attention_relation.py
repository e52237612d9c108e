# SPDX-License-Identifier: Apache-2.0
"""What the CUDA attention_relation does beyond the numerics tests of all implementations.

tests/test_simt.py runs this file in a process where ``impl="cuda"`` runs on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import ATTENTION_RELATION, DTYPES
from torch import Tensor

ops = torch.ops.pydistill_simt
each_dtype = pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
NAMES = ("student_a", "student_b", "teacher_a", "teacher_b")


def between_nan(x: Tensor, offset: int) -> Tensor:
    """The same values and strides, `offset` elements behind an aligned address, with NaN on both sides."""
    buffer = torch.full((x.numel() + 256,), math.nan, dtype=x.dtype)
    view = buffer[64 + offset : 64 + offset + x.numel()].as_strided(x.shape, x.stride(), 64 + offset)
    return view.copy_(x)


def tokens_first(x: Tensor) -> Tensor:
    """The same values as [B, N, H, d] in memory: heads of a token lie side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def call(tensors: dict[str, Tensor], relations: list[int], relation_heads: int | None = None) -> tuple[Tensor, ...]:
    a, b, c, d = (tensors[name] for name in NAMES)
    return ops.attention_relation(
        a, b, None, c, d, None, relations, [0.7] * (len(relations) // 2), tensors.get("mask"),
        tensors.get("segment_ids"), None, None, False, relation_heads, None, "sequence_mean", True,
    )  # fmt: skip


def assert_same_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    assert all(bool(one.isfinite().all()) for one in found)


@each_dtype
@pytest.mark.parametrize("relations", [[0, 1], [0, 0, 1, 1]])
@pytest.mark.parametrize("sizes", [(8, 16), (48, 40), (16, 96), (80, 32)])
def test_order_of_threads_and_layout_change_no_bit(sizes, relations, dtype, monkeypatch):
    """Features moved 16 bytes at a time, one by one from odd addresses, heads that do and do not fit at once."""
    clean = ATTENTION_RELATION.inputs((2, 2, 70, *sizes), DTYPES[dtype])
    monkeypatch.setenv("PYDISTILL_SIMT_ORDER", "forward")
    expected = call(clean, relations)
    for order, layout, offset in (("reverse", tokens_first, 8), ("random", torch.Tensor.clone, 1)):
        monkeypatch.setenv("PYDISTILL_SIMT_ORDER", order)
        moved = {**clean, **{name: between_nan(layout(clean[name]), offset) for name in NAMES}}
        assert_same_bits(call(moved, relations), expected)


@each_dtype
def test_heads_that_are_cut_change_no_bit(dtype):
    """Three relation heads of two stored ones: side by side in memory, or looked up feature by feature."""
    tensors = ATTENTION_RELATION.inputs((2, 2, 40, 24, 48), DTYPES[dtype])
    joined = {**tensors, **{name: tokens_first(tensors[name]) for name in NAMES}}
    assert_same_bits(call(joined, [0, 1], 3), call(tensors, [0, 1], 3))


def test_nothing_is_asked_of_an_empty_batch():
    tensors = {name: torch.zeros(0, 2, 5, 8) for name in NAMES}
    loss, parts, *gradients, scale = call(tensors, [0, 1])
    assert loss == 0 and parts.tolist() == [0] and scale == 1
    assert [one.shape for one in gradients] == [(0, 2, 5, 8), (0, 2, 5, 8), (0,)]
