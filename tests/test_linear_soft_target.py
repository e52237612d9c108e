# SPDX-License-Identifier: Apache-2.0
"""linear_soft_target_loss: two output layers and soft_target_loss, in chunks of rows, without all of their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, IMPLEMENTATIONS, LINEAR_SOFT_TARGET, Outcome, Tensors, assert_within_budget, run, truth
from processes import in_a_new_process
from torch import Tensor

from pydistill import linear_soft_target_loss, soft_target_loss
from pydistill.losses.linear_soft_target import linear_soft_target_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
needs_kernel = pytest.mark.skipif("reference" in IMPLEMENTATIONS[:1], reason="the reference keeps all logits")

SHAPE = (13, 24, 40, 301)
inputs = LINEAR_SOFT_TARGET.inputs
differentiable = LINEAR_SOFT_TARGET.differentiable


def ours(tensors: Tensors, impl: str, **keywords: Any) -> Outcome:
    return run(linear_soft_target_loss, tensors, {"impl": impl, **keywords}, differentiable)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", LINEAR_SOFT_TARGET.variants)
@each_implementation
def test_error_budget(impl, variant, dtype):
    """Value and every gradient against float64, with chunks that do not divide the rows."""
    tensors, keywords = LINEAR_SOFT_TARGET.select(inputs(SHAPE, DTYPES[dtype]), variant)
    reference = run(linear_soft_target_reference, tensors, keywords, differentiable)
    found = ours(tensors, impl, chunk_rows=5, **keywords)
    # The floor is what summing a product's terms in another order comes to.
    floor = {"fp64": 1e-14, "fp32": 5e-7, "bf16": 4e-3, "fp16": 5e-4}[dtype] * 0.05
    assert_within_budget(found, reference, truth(LINEAR_SOFT_TARGET, tensors, keywords), floor=floor)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@each_implementation
def test_equals_the_composition(impl, dtype):
    """In one chunk it is the composition with soft_target_loss, but for the rounding of the weight's gradient."""
    tensors, keywords = LINEAR_SOFT_TARGET.select(inputs(SHAPE, DTYPES[dtype]), "kl+ce T=2")

    def composition(student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor, **rest: Any) -> Tensor:
        teacher = F.linear(rest.pop("teacher_hidden"), rest.pop("teacher_weight"))
        return soft_target_loss(F.linear(student_hidden, student_weight, student_bias), teacher, impl=impl, **rest)

    found, expected = ours(tensors, impl, **keywords), run(composition, tensors, keywords, differentiable)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-6, atol=0)
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 4, 12, 13, 100])
@each_implementation
def test_any_chunk_gives_the_same(impl, chunk_rows, reduction):
    tensors, _ = LINEAR_SOFT_TARGET.select(inputs(SHAPE, torch.float64), "none")
    keywords = {"hard_weight": 0.3, "reduction": reduction}
    found = ours(tensors, impl, chunk_rows=chunk_rows, **keywords)
    expected = run(linear_soft_target_reference, tensors, keywords, differentiable)
    torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=1e-12)
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient, rtol=1e-12, atol=1e-12)


@each_implementation
def test_garbage_in_rows_that_do_not_count(impl):
    """NaN in masked hidden states reaches neither value nor any gradient, the weight's included."""
    tensors, keywords = LINEAR_SOFT_TARGET.select(inputs((2, 6, 8, 8, 50)), "kl+ce T=2")
    expected = ours(tensors, impl, chunk_rows=5, **keywords)
    out = ~tensors["mask"] | (tensors["labels"] == -100)
    assert out.any()
    for key in ("student_hidden", "teacher_hidden"):
        tensors[key] = tensors[key].masked_fill(out.unsqueeze(-1), float("nan"))
    found = ours(tensors, impl, chunk_rows=5, **keywords)
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=0)
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient, rtol=0, atol=0)
    assert bool((found.gradients["student_hidden"][out] == 0).all())


@each_implementation
def test_only_what_asks_for_a_gradient_gets_one(impl):
    tensors, _ = LINEAR_SOFT_TARGET.select(inputs(SHAPE), "plain")
    hidden = tensors["student_hidden"].requires_grad_()
    linear_soft_target_loss(**tensors, impl=impl).backward()
    assert hidden.grad is not None
    assert tensors["student_weight"].grad is None
    with torch.no_grad():
        assert not linear_soft_target_loss(**tensors, impl=impl).requires_grad


@each_implementation
def test_no_rows(impl):
    tensors, _ = LINEAR_SOFT_TARGET.select(inputs((0, 4, 6, 7)), "plain")
    found = ours(tensors, impl)
    assert float(found.value) == 0
    assert found.gradients["student_hidden"].shape == (0, 4)
    assert float(found.gradients["student_weight"].abs().sum()) == 0


@each_implementation
def test_gradcheck(impl):
    tensors, keywords = LINEAR_SOFT_TARGET.select(inputs((5, 3, 4, 6), torch.float64), "kl+ce T=2")
    leaves = [tensors.pop(key).requires_grad_() for key in differentiable]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor, reduction: str) -> Tensor:
        given = dict(zip(differentiable, (hidden, weight, bias), strict=True))
        return linear_soft_target_loss(**given, **tensors, **keywords, reduction=reduction, chunk_rows=2, impl=impl)

    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda *x, reduction=reduction: loss(*x, reduction), leaves)


@each_implementation
def test_under_autocast_it_is_what_linear_layers_do(impl):
    tensors, _ = LINEAR_SOFT_TARGET.select(inputs(SHAPE), "biases")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(tensors, impl)
        student = F.linear(tensors["student_hidden"], tensors["student_weight"], tensors["student_bias"])
        teacher = F.linear(tensors["teacher_hidden"], tensors["teacher_weight"], tensors["teacher_bias"])
        assert student.dtype == torch.bfloat16
        expected = soft_target_loss(student, teacher, impl=impl)
    torch.testing.assert_close(found.value, expected, rtol=1e-6, atol=0)
    assert found.gradients["student_weight"].dtype == torch.float32


@needs_kernel
def test_compiles_into_one_graph():
    tensors, keywords = LINEAR_SOFT_TARGET.select(inputs(SHAPE), "kl+ce T=2")
    compiled = torch.compile(linear_soft_target_loss, fullgraph=True, backend="aot_eager")
    impl = IMPLEMENTATIONS[0]
    found = run(compiled, tensors, {"impl": impl, "chunk_rows": 5, **keywords}, differentiable)
    expected = ours(tensors, impl, chunk_rows=5, **keywords)
    torch.testing.assert_close(found.value, expected.value)
    for key, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[key], gradient)


@needs_kernel
def test_refuses_to_be_differentiated_twice():
    tensors, _ = LINEAR_SOFT_TARGET.select(inputs(SHAPE), "plain")
    hidden = tensors["student_hidden"].requires_grad_()
    loss = linear_soft_target_loss(**tensors)
    with pytest.raises(RuntimeError, match="linear_soft_target: double backward is not supported"):
        torch.autograd.grad(loss, hidden, create_graph=True)


PEAK = """
import resource, torch
from pydistill import linear_soft_target_loss
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
generator = torch.Generator().manual_seed(0)
def step(rows):
    tensors = [torch.randn(*size, generator=generator, requires_grad=grad) for size, grad in (
        ((rows, 64), True), ((20000, 64), True), ((rows, 64), False), ((20000, 64), False))]
    linear_soft_target_loss(*tensors).backward()
step(256)
before = used()
step(8192)
print(used() - before)
"""


@needs_kernel
def test_memory_does_not_grow_with_rows_times_classes():
    """8,192 rows of 20,000 classes have 625 MiB of logits on each side; all that comes with them is less than 60."""
    assert float(in_a_new_process(["-c", PEAK])) < 60


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"student_weight": torch.zeros(301, 23)},
        ValueError,
        r"student_weight must have shape \[classes, 24\].*got \[301, 23\]",
    ),
    (
        {"teacher_weight": torch.zeros(300, 40)},
        ValueError,
        "in the student's order, got 300 against 301; select the rows of the shared",
    ),
    (
        {"teacher_hidden": torch.zeros(12, 40)},
        ValueError,
        r"teacher_hidden must have the student's rows, got \[12, 40\]",
    ),
    ({"student_bias": torch.zeros(7)}, ValueError, r"student_bias must have one entry per class, \[301\], got \[7\]"),
    ({"student_hidden": torch.zeros(13, 24).long()}, TypeError, "student_hidden must be a floating-point tensor"),
    ({"teacher_weight": torch.zeros(301, 40, requires_grad=True)}, RuntimeError, r"pass teacher_weight.detach\(\)"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows must be a whole number above 0 or None, got 0"),
    ({"labels": torch.zeros(3).long()}, ValueError, r"labels must have one id per row, \[13\], got \[3\]"),
    ({"temperature": 0}, ValueError, "temperature must be a finite number above 0, got 0"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input_is_named(change, error, message):
    tensors, _ = LINEAR_SOFT_TARGET.select(inputs(SHAPE), "plain")
    with pytest.raises(error, match=message):
        linear_soft_target_loss(**{**tensors, **change})
