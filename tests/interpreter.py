# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with bf16 as the hardware has it.

As of triton 3.9 it rounds to bf16 toward zero and multiplies the bit patterns of bf16 matrices. Compiled kernels round
to nearest even and multiply numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend_bf16() -> None:
    """Replaces the conversion from and to bf16, and the product of matrices of bf16."""
    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, wanted: Any) -> Any:
        kinds = (source.dtype.scalar, wanted.scalar)
        if kinds == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16).numpy()
            return interpreter.TensorHandle(bits.view(np.uint16), wanted.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_single(source.data), wanted.scalar)
        return cast(self, source, wanted)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(_single(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot


def _single(bits: np.ndarray) -> np.ndarray:
    """fp32 from the bits of bf16, exactly."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
