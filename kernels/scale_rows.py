# SPDX-License-Identifier: Apache-2.0
"""rows *= scale in Triton, which every loss's backward ends with. A factor of 1, the usual one, costs no traffic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def scale_rows(rows, scale, length, BLOCK: tl.constexpr):
    """One program scales a block of a row, or of everything where there is one factor."""
    row = tl.program_id(1).to(tl.int64)
    factor = tl.load(scale + row)
    if factor != 1:
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < length
        x = tl.load(rows + row * length + places, mask=inside, other=0.0)
        scaled = x.to(factor.dtype) * factor
        tl.store(rows + row * length + places, scaled.to(x.dtype), mask=inside)


def scale_rows_(rows: Tensor, scale: Tensor) -> None:
    """The op `scale_rows_`: see `pydistill._schemas`. `rows` must be contiguous."""
    if rows.numel() == 0:
        return
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    count = scale.numel()
    length = rows.numel() // count
    scale_rows[(triton.cdiv(length, BLOCK), count)](
        rows, scale.to(wide).contiguous(), length, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True
    )
