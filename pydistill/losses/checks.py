# SPDX-License-Identifier: Apache-2.0
"""Argument checks that all losses make alike; `fail` is the loss's own, which names it and raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

Fail = Callable[..., NoReturn]


def shape(tensor: Tensor) -> str:
    """A tensor's shape as errors show it."""
    return str(list(tensor.shape))


def check_num_items(fail: Fail, num_items: float | Tensor) -> None:
    """A positive number, or a tensor of one element, whose value is not looked at: that would wait for the device."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            fail(f"num_items must be a number or a tensor of one element, got shape {shape(num_items)}")
    elif not num_items > 0:
        fail(f"num_items must be above 0, got {num_items}")


def on_device(num_items: float | Tensor | None, device: torch.device) -> Tensor | None:
    """`num_items` as kernels read it: a tensor of one element on the device where they run."""
    if num_items is None or isinstance(num_items, Tensor):
        return None if num_items is None else num_items.to(device, non_blocking=True)
    return torch.full((), num_items, dtype=torch.float64, device=device)


def check_detached(fail: Fail, name: str, tensor: Tensor) -> None:
    """A teacher's tensor, which never receives a gradient."""
    if tensor.requires_grad:
        fail(f"{name} requires grad, but the teacher never receives a gradient; pass {name}.detach()", RuntimeError)
