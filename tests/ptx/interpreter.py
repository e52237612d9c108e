# SPDX-License-Identifier: Apache-2.0
"""Functional interpreter of sm_80 PTX in numpy: what nvcc and Triton really emitted, executed on the CPU.

Beyond the results it finds accesses out of bounds of the tensors that were passed, misaligned ones, races in shared
memory and between blocks, copies that nobody waited for, barriers that not all threads reach, and it counts the
traffic of global memory. It has no caches, no time and no rounding of approximate instructions, and none of the
instructions of sm_90 and later (wgmma, TMA, tcgen05). An instruction that it does not know stops the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from torch import Tensor

from ptx import arithmetic, collective
from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.parser import Program, PtxError, parse

__all__ = ["PtxError", "launch", "pointed_to", "read"]
# Importing them made their instructions known.
_ = arithmetic, collective


@lru_cache(maxsize=256)
def read(text: str, entry: str | None = None) -> Program:
    """PTX as a program, read once."""
    return parse(text, entry)


def launch(
    program: Program | str,
    grid: Sequence[int],
    block: Sequence[int],
    parameters: Sequence[Tensor | bytes],
    *,
    shared: int = 0,
    tensors: Sequence[Tensor] = (),
    max_steps: int = 10_000_000,
) -> Machine:
    """Runs a kernel on the memory of CPU tensors.

    Args:
        program: of `read`, or PTX with one entry point.
        parameters: tensors, and the bytes of anything else, with pointers as the host has them. Parameters that are
            missing at the end are zero.
        shared: bytes of dynamic shared memory.
        tensors: what the kernel may access besides the tensors among the parameters.

    Returns:
        The machine after its run, with its `traffic` and `steps`.

    Raises:
        PtxError: the kernel did what it must not, or what is not supported.
    """
    memory = GlobalMemory([*tensors, *(one for one in parameters if isinstance(one, Tensor))])
    encoded = [one.data_ptr().to_bytes(8, "little") if isinstance(one, Tensor) else one for one in parameters]
    program = read(program) if isinstance(program, str) else program
    machine = Machine(program, grid, block, encoded, memory, shared, max_steps).run()
    memory.write_back()
    return machine


def _words(content: bytes) -> list[int]:
    return [int.from_bytes(content[start : start + 8], "little") for start in range(0, len(content) - 7, 8)]


def pointed_to(parameters: Sequence[bytes], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those tensors into whose storages one of the parameters points."""
    words = np.array([word for one in parameters for word in _words(one)], np.uint64)

    def hit(tensor: Tensor) -> bool:
        start, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        return bool(((words >= start) & (words < start + size)).any())

    return [one for one in tensors if hit(one)]
