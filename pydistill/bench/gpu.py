# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks need on a GPU: its clock and memory, problems that lie there, and what it can do at most."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from pydistill.bench.measure import Variant

CACHE_BYTES = 256 << 20  # more than any GPU keeps near itself
PRODUCT = 4096  # rows and columns of the matrix product that is the limit

Problem = TypeVar("Problem")


class CudaMeter:
    """Time between two events of the current stream, and what PyTorch's allocator hands out."""

    def __init__(self) -> None:
        self.flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(self, variant: Variant) -> float:
        if variant.prepare is not None:
            variant.prepare()
        # Nothing of an earlier call is to be found in the cache.
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        variant.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def extra_peak_mib(self, variant: Variant) -> float | None:
        variant.run()
        if variant.prepare is not None:
            variant.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def foreign_seconds(self) -> float | None:
        """Other processes do not use the GPU, or the numbers are worth nothing."""
        return None


def on(problem: Problem, device: torch.device) -> Problem:
    """A problem, a dataclass, with its tensors on a device; those that receive gradients do so there."""
    if device.type == "cpu":
        return problem

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)

    names = [one.name for one in dataclasses.fields(problem)]  # type: ignore[arg-type]
    return type(problem)(**{name: moved(getattr(problem, name)) for name in names})


def product_limit(operations: float, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """One matrix product by PyTorch's library of about so many floating-point operations."""
    depth = max(64, round(operations / (2 * PRODUCT**2) / 64) * 64)
    a = torch.randn(PRODUCT, depth, device=device).to(dtype)
    b = torch.randn(depth, PRODUCT, device=device).to(dtype)
    return lambda: a @ b


def describe() -> dict[str, str]:
    """The GPU and the libraries that drive it."""
    name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    return {"gpu": f"{name} ({capability})", "cuda": str(torch.version.cuda or torch.version.hip)}
