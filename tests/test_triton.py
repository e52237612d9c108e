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
    "soft_target": "every_class_count and not forward_kl-fp32 or running_maximum or fp64 or (fp16 and scale_100)"
}

needs_triton = pytest.mark.skipif(not _dispatch.BACKENDS["soft_target"]["triton"].available, reason="needs triton")
interpreted = pytest.mark.skipif(
    not _dispatch.interpreting, reason="needs TRITON_INTERPRET=1: test_in_the_interpreter runs it in such a process"
)
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
    keywords = ["-k", "triton and (error_budget or running_maximum or forbidden) and (fp32 or bf16 or forbidden)"]
    assert " passed" in with_interpreter(
        [*numerics_of("test_soft_target.py"), *keywords], PYDISTILL_TEST_BLOCKS="small"
    )


@needs_triton
def test_in_the_interpreter():
    """The tests below that are marked so."""
    assert " passed" in with_interpreter(["-m", "pytest", "-q", "-p", "no:cacheprovider", "test_triton.py"])


@interpreted
@each_kernel
def test_compiles_into_one_graph(loss):
    """torch.compile(fullgraph=True) goes through the op and its autograd, with the same value and gradients."""
    case = CASES[loss]
    shapes = {"soft_target": (3, 20), "attention_relation": (2, 2, 9, 8, 16), "projected_mse": (7, 5, 12)}
    tensors = {key: value for key, value in case.inputs(shapes[loss]).items() if key not in case.optional}
    if loss == "attention_relation":
        tensors |= {"student_b": None, "teacher_b": None}

    def outcome(function):
        leaves = {
            key: tensors[key].clone().requires_grad_() for key in case.differentiable if tensors.get(key) is not None
        }
        value = function(**{**tensors, **leaves}, impl="triton")
        return value.detach(), *torch.autograd.grad(value, list(leaves.values()))

    compiled = outcome(torch.compile(case.loss, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, outcome(case.loss), rtol=0, atol=0)


@interpreted
def test_in_place():
    """The gradient over the student's storage is the gradient, and whoever needed the logits is told."""
    tensors = SOFT_TARGET.inputs((5, 70), seed=3)
    student, teacher = tensors["student_logits"], tensors["teacher_logits"]
    leaf = student.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(soft_target_loss(leaf, teacher, impl="triton"), leaf)
    logits = leaf.clone()
    soft_target_loss(logits, teacher, impl="triton", inplace=True).backward()
    torch.testing.assert_close(leaf.grad, wanted, rtol=0, atol=0)
    torch.testing.assert_close(logits.detach(), wanted, rtol=0, atol=0)
    doubled = leaf.exp()
    loss = soft_target_loss(doubled, teacher, impl="triton", inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@interpreted
def test_a_label_outside_the_classes_is_nan():
    """Looking at labels would wait for the device: the row is NaN, and so is its gradient; the others are as ever."""
    tensors = SOFT_TARGET.inputs((3, 20))
    student, teacher = tensors["student_logits"].requires_grad_(), tensors["teacher_logits"]
    labels = torch.tensor([1, 20, 2])
    values = soft_target_loss(student, teacher, labels, hard_weight=0.5, reduction="none", impl="triton")
    assert values.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


@needs_triton
def test_needs_a_gpu_outside_the_interpreter():
    if _dispatch.interpreting:
        pytest.skip("this process interprets")
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
