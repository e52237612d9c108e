# SPDX-License-Identifier: Apache-2.0
"""What all fused losses do in their backward: the forward has made the gradient, and the incoming one scales it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaled(loss: str, ops: Any, gradient: Tensor, scale: Tensor) -> Tensor:
    """`gradient` times the incoming gradient, a 0-d tensor or one value per row; `loss` is named in errors, `ops` are
    those of the implementation that made the gradient.

    `gradient` must be dense. It is scaled in place, unless it may be asked for again.
    """
    # Traced by a compiler, which plans memory and fuses the product itself.
    if torch.compiler.is_compiling() or type(gradient) is not Tensor:
        return (gradient * (scale if scale.dim() == 0 else scale.unsqueeze(-1))).to(gradient.dtype)
    check_first_order(loss)
    # The gradient was made by the forward. Handing it out without a copy is only right if nobody asks for it again.
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradient = gradient.clone()
    # In the order of memory, where that is not the order of dimensions.
    rows = gradient if gradient.is_contiguous() else gradient.as_strided((gradient.numel(),), (1,))
    ops.scale_rows_(rows, scale)
    return gradient


def check_first_order(loss: str) -> None:
    """Raise where a backward is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{loss}: double backward is not supported: the gradient is computed once, in the forward. "
            "Use impl='reference' where second derivatives are needed"
        )
