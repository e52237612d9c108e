# SPDX-License-Identifier: Apache-2.0
"""Triton kernels without a GPU: the numerics tests of every loss in its interpreter, and how kernels are reached."""

from __future__ import annotations

import pytest
import torch
from cases import ATTENTION_RELATION, PROJECTED_MSE, SOFT_TARGET
from processes import in_a_new_process, numerics_of

from pydistill import _dispatch, soft_target_loss

CASES = {case.name: case for case in (SOFT_TARGET, ATTENTION_RELATION, PROJECTED_MSE)}
# What the interpreter, which is numpy, takes minutes for: many programs, and dtypes that differ by a cast.
TOO_SLOW = {
    "soft_target": "every_class_count and not forward_kl-fp32 or running_maximum or fp64 or fp16 and not error_budget "
    "or garbage_in_invalid_rows and (inf or 1031 and not jsd)"
}

needs_triton = pytest.mark.skipif(not _dispatch.BACKENDS["soft_target"]["triton"].available, reason="needs triton")
each_kernel = pytest.mark.parametrize("loss", [loss for loss in CASES if loss in _dispatch.TRITON_OPS])


def with_interpreter(arguments: list[str], **environment: str) -> str:
    return in_a_new_process(arguments, TRITON_INTERPRET="1", PYDISTILL_TEST_IMPL="triton", **environment)


@needs_triton
@each_kernel
def test_numerics(loss):
    """Every numerics test of the loss: the same shapes and the same tolerances as on the CPU, gradients included."""
    slow = f" and not ({TOO_SLOW[loss]})" if loss in TOO_SLOW else ""
    printed = with_interpreter([*numerics_of(f"test_{loss}.py"), "-k", f"triton{slow}"])
    assert " passed" in printed, printed


@needs_triton
def test_rows_walked_in_blocks():
    """soft_target's kernel for rows that do not fit a program, on rows of ordinary length."""
    keywords = ["-k", "triton and (error_budget and fp32 or forbidden and some)"]
    assert " passed" in with_interpreter(
        [*numerics_of("test_soft_target.py"), *keywords], PYDISTILL_TEST_BLOCKS="small"
    )


@needs_triton
def test_in_the_interpreter():
    printed = with_interpreter(["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_triton_interpreted.py"])
    assert " passed" in printed
    assert "skipped" not in printed


@needs_triton
def test_needs_a_gpu_outside_the_interpreter():
    with pytest.raises(
        ValueError, match=r"impl='triton' does not run on device 'cpu'; use one of 'auto', 'reference', 'cpp'"
    ):
        soft_target_loss(torch.zeros(1, 2), torch.zeros(1, 2), impl="triton")


def test_without_triton_asking_says_how_to_get_it(monkeypatch):
    missing = _dispatch.Backend(False, "triton is not installed; pip install 'pydistill[triton]'")
    monkeypatch.setitem(_dispatch.BACKENDS["soft_target"], "triton", missing)
    with pytest.raises(
        RuntimeError, match=r"soft_target: impl='triton' is not available: .*pip install 'pydistill\[triton\]'"
    ):
        _dispatch.resolve("soft_target", torch.device("cuda"), "triton")


def test_import_leaves_triton_alone():
    printed = in_a_new_process(["-c", "import sys, pydistill; print('triton' in sys.modules)"])
    assert printed.strip() == "False"


def test_both_namespaces_have_every_op():
    for op in ("soft_target", "soft_target_", "attention_relation", "projected_mse", "scale_rows_"):
        schemas = [
            str(getattr(getattr(torch.ops, name), op).default._schema) for name in ("pydistill", "pydistill_triton")
        ]
        assert schemas[0].removeprefix("pydistill::") == schemas[1].removeprefix("pydistill_triton::")
