# SPDX-License-Identifier: Apache-2.0
"""Small Triton kernels on which the tools themselves are tested."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def softmax_rows(x, y, length, stride, BLOCK: tl.constexpr):
    """One program per row, two passes over it."""
    row = tl.program_id(0).to(tl.int64)
    highest = -float("inf")
    total = 0.0
    for start in range(0, length, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * stride + columns, mask=columns < length, other=-float("inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(part, 0))
        total = total * tl.exp2((highest - above) * 1.44269504) + tl.sum(tl.exp2((part - above) * 1.44269504), 0)
        highest = above
    for start in range(0, length, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        part = tl.load(x + row * stride + columns, mask=columns < length, other=0.0).to(tl.float32)
        value = tl.exp2((part - highest) * 1.44269504) / total
        tl.store(y + row * stride + columns, value.to(y.dtype.element_ty), mask=columns < length)


@triton.jit
def product(a, b, c, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """c [m, n] = a [m, k] b [k, n]; the loop is pipelined through shared memory."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    found = tl.zeros((BM, BN), c.dtype.element_ty)
    for start in range(0, k, BK):
        inner = start + tl.arange(0, BK)
        left = tl.load(
            a + rows[:, None] * k + inner[None, :], mask=(rows[:, None] < m) & (inner[None, :] < k), other=0.0
        )
        right = tl.load(
            b + inner[:, None] * n + columns[None, :], mask=(inner[:, None] < k) & (columns[None, :] < n), other=0.0
        )
        found = tl.dot(left, right, found, input_precision=PRECISION)
    tl.store(c + rows[:, None] * n + columns[None, :], found, mask=(rows[:, None] < m) & (columns[None, :] < n))


@triton.jit
def add_to_first(x, y, length, BLOCK: tl.constexpr):
    """A planted race: every program writes the same places."""
    places = tl.arange(0, BLOCK)
    block = tl.load(x + tl.program_id(0) * BLOCK + places, mask=places < length, other=0.0)
    tl.store(y + places, block, mask=places < length)


def softmax(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    softmax_rows[(x.size(0),)](x, y, x.size(1), x.size(1), BLOCK=512, num_warps=4, enable_fp_fusion=True)
    return y


def matmul(a: Tensor, b: Tensor, precision: str = "ieee", block: int = 32) -> Tensor:
    (m, k), n = a.shape, b.size(1)
    c = torch.empty(m, n, dtype=torch.float64 if a.dtype == torch.float64 else torch.float32)
    product[(triton.cdiv(m, block), triton.cdiv(n, block))](
        a, b, c, m, n, k, BM=block, BN=block, BK=32, PRECISION=precision, num_warps=4, num_stages=3,
        enable_fp_fusion=True,
    )  # fmt: skip
    return c
