# SPDX-License-Identifier: Apache-2.0
"""What else is asked of Triton kernels. Needs TRITON_INTERPRET=1: tests/test_triton.py runs it in such a process."""

from __future__ import annotations

import pytest
import torch
from cases import ATTENTION_RELATION, PROJECTED_MSE, SOFT_TARGET

from pydistill import _dispatch, soft_target_loss

pytestmark = pytest.mark.skipif(
    not _dispatch.interpreting, reason="tests/test_triton.py runs it with TRITON_INTERPRET=1"
)
CASES = {case.name: case for case in (SOFT_TARGET, ATTENTION_RELATION, PROJECTED_MSE)}
each_kernel = pytest.mark.parametrize("loss", [loss for loss in CASES if loss in _dispatch.TRITON_OPS])


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
