# SPDX-License-Identifier: Apache-2.0
"""Tests in a process of their own: another instruction set, no native code, a peak of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pydistill
from pydistill import _dispatch


class ChildError(AssertionError):
    """A child process failed; the message is what it printed."""


def in_a_new_process(arguments: list[str], timeout: float = 300, **environment: str) -> str:
    """Runs Python with changed environment variables and returns what it printed; ChildError if it fails."""
    root = str(Path(pydistill.__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    if done.returncode != 0:
        raise ChildError(done.stdout[-4000:] + done.stderr[-4000:])
    return done.stdout


def launch(processes: int, module: str, *arguments: str) -> str:
    """Runs a module in several processes of this machine that talk over its loopback; ChildError if one fails."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    # What the name of this machine stands for is nobody's business here.
    interface = "lo" if sys.platform == "linux" else "lo0"
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface, "CUDA_VISIBLE_DEVICES": ""}
    return in_a_new_process([*launcher, "-m", module, *arguments], **environment)


def numerics_of(file: str) -> list[str]:
    """Arguments that run the numerics tests of a test module."""
    return ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "numerics", Path(file).name]


def check_instruction_set(isa: str, file: str) -> None:
    """All numerics tests of a test module again, with the kernels of another instruction set."""
    native = _dispatch.native
    assert native is not None and isa in native.isas_compiled()
    if isa == native.isa():
        return  # the module's tests ran with it
    report = "from pydistill import _dispatch; print(_dispatch.native.isa())"
    try:
        assert in_a_new_process(["-c", report], PYDISTILL_ISA=isa).strip() == isa
    except ChildError as error:
        if "this processor does not have these instructions" in str(error):
            pytest.skip(f"this processor has no {isa}")
        raise
    assert "passed" in in_a_new_process([*numerics_of(file), "-k", "not reference"], PYDISTILL_ISA=isa)
