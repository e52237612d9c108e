# SPDX-License-Identifier: Apache-2.0
"""Powers of two, by which numbers reach the range of fp16 and come back without being rounded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(x):
    """The power of two at or below x >= 0 (fp32), and its inverse, as far as both are normal numbers."""
    exponent = (x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    power = (exponent << 23).to(tl.float32, bitcast=True)
    return power, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def left_to_backward(denominator, HALF: tl.constexpr):
    """What the gradient is still to be multiplied by after the forward, an fp32 number: 1 unless it is in fp16.

    fp16 has no room below for a gradient divided by many rows: that factor is left to backward, where the incoming
    gradient (which a loss scaler makes large) meets it first. A power of two, so that nothing is rounded twice.
    """
    later = tl.full((), 1, tl.float32)
    if HALF:
        _, later = power_of_two(denominator)
    return later
