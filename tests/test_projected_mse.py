# SPDX-License-Identifier: Apache-2.0
"""projected_mse_loss: values, error budget, masks, layouts, autograd, threads, memory, errors, the objective term."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    IMPLEMENTATIONS,
    PROJECTED_MSE,
    Outcome,
    Tensors,
    assert_within_budget,
    down,
    run,
    truth,
)
from processes import ChildError, check_instruction_set, in_a_new_process, numerics_of
from tiny_models import tiny_bert
from torch import Tensor

from pydistill import ProjectedMSE, _dispatch, projected_mse_loss
from pydistill.losses import projected_mse as module
from pydistill.losses.projected_mse import SHORTEST, projected_mse_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_kernel = pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "reference"])
each_variant = pytest.mark.parametrize("variant", PROJECTED_MSE.variants)
each_way = pytest.mark.parametrize("way", ["up", "down"])
each_reduction = pytest.mark.parametrize("reduction", module.REDUCTIONS)
needs_kernel = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="PYDISTILL_NATIVE=0: no compiled kernel")

LEAVES = PROJECTED_MSE.differentiable


def hidden(shape: tuple[int, ...], dtype: str = "fp32", way: str = "up", **how: Any) -> Tensors:
    """All tensors of one problem, shape (*, ds, dt), bias and mask included."""
    drawn = PROJECTED_MSE.inputs(shape, DTYPES[dtype], **how)
    return drawn if way == "up" else down(drawn)


def without(tensors: Tensors, *names: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key not in names}


def ours(tensors: Tensors, impl: str = "auto", **keywords: Any) -> Outcome:
    """Forward and backward of the public function."""
    return run(projected_mse_loss, tensors, {"impl": impl, **keywords}, LEAVES)


def check_budget(tensors: Tensors, impl: str, *, floor: float = 0.0, **keywords: Any) -> Outcome:
    """Runs `impl` and holds it against the reference in the same dtype and the truth in float64."""
    found = ours(tensors, impl, **keywords)
    reference = run(projected_mse_reference, tensors, keywords, LEAVES)
    assert_within_budget(found, reference, truth(PROJECTED_MSE, tensors, keywords), floor=floor)
    return found


def assert_same_bits(found: Outcome, expected: Outcome, what: Any = "") -> None:
    assert torch.equal(found.value, expected.value), what
    for key, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[key], gradient), (what, key)


def test_kernel_is_built():
    """Guards all tests below: without it, a missing extension would turn them into tests of the reference."""
    if os.environ.get("PYDISTILL_NATIVE") == "0":
        assert _dispatch.native is None
    else:
        assert "cpp" in IMPLEMENTATIONS, _dispatch.BACKENDS["projected_mse"]["cpp"].reason
        assert _dispatch.resolve("projected_mse", torch.device("cpu")) == "cpp"


# -------------------------------------------------------------------------------- values


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16"])
@each_implementation
def test_golden_values(impl, dtype):
    """Small numbers, worked out on paper; all of them exact in every dtype.

    Student rows (1, 2), (3, 0); P = [[1, 0, 2], [-1, 1, 0]]: projected (-1, 2, 2), (3, 0, 6); teacher (0, 2, 0),
    (3, 4, 3). Differences (-1, 0, 2), (0, -4, 3): squares 5 and 25.
    """
    given = {"dtype": DTYPES[dtype]}
    student = torch.tensor([[1.0, 2.0], [3.0, 0.0]], **given).requires_grad_()
    projection = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.0]], **given).requires_grad_()
    bias = torch.zeros(3, **given).requires_grad_()
    teacher = torch.tensor([[0.0, 2.0, 0.0], [3.0, 4.0, 3.0]], **given)
    loss = projected_mse_loss(student, teacher, projection, bias=bias, reduction="sum", impl=impl)
    assert float(loss.detach()) == 30.0
    gradients = torch.autograd.grad(loss, [student, projection, bias])
    # Twice D P^T, X^T D, and the sum of D over rows.
    assert gradients[0].tolist() == [[6.0, 2.0], [12.0, -8.0]]
    assert gradients[1].tolist() == [[-2.0, -24.0, 22.0], [-4.0, 0.0, 8.0]]
    assert gradients[2].tolist() == [-2.0, -8.0, 10.0]

    student, projection = student.detach(), projection.detach()
    assert float(projected_mse_loss(student, teacher, projection, impl=impl)) == 5.0
    rows = projected_mse_loss(student, teacher, projection, reduction="none", impl=impl)
    assert rows.tolist() == pytest.approx([5 / 3, 25 / 3], rel=2e-7)
    first = torch.tensor([True, False])
    assert float(projected_mse_loss(student, teacher, projection, mask=first, impl=impl)) == pytest.approx(5 / 3)
    assert float(projected_mse_loss(student, teacher, projection, num_items=15, impl=impl)) == pytest.approx(30 / 45)
    # Down, with the sides exchanged.
    back = projected_mse_loss(teacher, student, projection, impl=impl)
    assert float(back) == 5.0


@each_implementation
def test_same_value_as_plain_pytorch(impl):
    """The line in the docstring, and the cosine behind `normalize`."""
    tensors = without(hidden((6, 9, 12, 20)), "mask")
    student, teacher, projection, bias = (tensors[key] for key in ("student", "teacher", "projection", "bias"))
    projected = student @ projection + bias
    torch.testing.assert_close(projected_mse_loss(**tensors, impl=impl), F.mse_loss(projected, teacher))
    cosine = F.cosine_similarity(projected, teacher, dim=-1)
    found = projected_mse_loss(**tensors, normalize=True, reduction="none", impl=impl)
    torch.testing.assert_close(found, (2 - 2 * cosine) / 20)
    lowered = projected_mse_loss(student, teacher, projection.T, impl=impl)
    torch.testing.assert_close(lowered, F.mse_loss(teacher @ projection.T, student))


@each_implementation
def test_direction(impl):
    """The shape of the projection says it; a square one goes up unless told otherwise."""
    drawn = hidden((7, 5, 5), "fp64")
    student, teacher, projection = drawn["student"], drawn["teacher"], drawn["projection"]
    up, back = F.mse_loss(student @ projection, teacher), F.mse_loss(teacher @ projection, student)
    assert not torch.isclose(up, back)
    torch.testing.assert_close(projected_mse_loss(student, teacher, projection, impl=impl), up)
    for direction, expected in (("up", up), ("down", back)):
        found = projected_mse_loss(student, teacher, projection, direction=direction, impl=impl)
        torch.testing.assert_close(found, expected)


# Rows and sizes, each for what it reaches: one of everything; less than a vector; one block and its remainder of rows;
# a panel and a remainder in either size; whole panels; several chunks; accumulators beyond the second-level cache.
SHAPES = [
    (1, 1, 2),
    (7, 3, 5),
    (97, 17, 33),
    (100, 48, 130),
    (6, 128, 64),
    (2, 5, 20, 31),
    (500, 65, 48),
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_variant
@each_way
@each_kernel
def test_error_budget(impl, variant, dtype, way):
    for shape in SHAPES:
        tensors, keywords = PROJECTED_MSE.select(hidden(shape, dtype, way), variant)
        # Unit vectors of one feature are 1 and -1: what is left of their gradient is rounding of 1 / length.
        floor = 1e-5 * (dtype != "fp64") + 1e-13 if keywords.get("normalize") and 1 in shape[-2:] else 0.0
        check_budget(tensors, impl, floor=floor, **keywords)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_way
@each_kernel
def test_large_accumulators(impl, dtype, way):
    """Gradients of the projection that leave the second-level cache: larger blocks of rows."""
    check_budget(hidden((400, 384, 400), dtype, way), impl)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_way
@each_kernel
def test_many_chunks(impl, dtype, way):
    """More blocks than chunks: a chunk is several blocks."""
    check_budget(hidden((8000, 6, 9), dtype, way), impl)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@each_way
@each_implementation
def test_projection_in_fp32_beside_half_precision(impl, dtype, way):
    """As under autocast: the projection is a parameter in fp32, used and differentiated without rounding it."""
    narrow, wide = hidden((60, 24, 40), dtype, way), hidden((60, 24, 40), "fp32", way)
    tensors = {**narrow, "projection": wide["projection"], "bias": wide["bias"]}
    found = check_budget(tensors, impl)
    assert found.gradients["projection"].dtype == found.gradients["bias"].dtype == torch.float32
    assert found.gradients["student"].dtype == DTYPES[dtype]
    rounded = ours({**tensors, "projection": narrow["projection"].float()}, impl)
    assert not torch.equal(found.value, rounded.value)


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (("bf16", "fp32", "fp32", "fp32"), torch.float32),
        (("fp32", "bf16", "bf16", "fp32"), torch.float32),
        (("bf16", "fp16", "fp32", "bf16"), torch.float32),
        (("bf16", "bf16", "fp16", "bf16"), torch.float32),
        (("fp32", "fp32", "fp64", "fp32"), torch.float64),
        (("fp64", "bf16", "fp32", "bf16"), torch.float64),
    ],
)
@each_implementation
def test_mixed_dtypes(impl, dtypes, expected):
    """Computed in the widest; each gradient in the dtype of its tensor."""
    names = ("student", "teacher", "projection", "bias")
    drawn = hidden((30, 12, 20))
    tensors = {name: drawn[name].to(DTYPES[dtype]) for name, dtype in zip(names, dtypes, strict=True)}
    found = check_budget(tensors, impl)
    assert found.value.dtype == expected
    for name in LEAVES:
        assert found.gradients[name].dtype == tensors[name].dtype


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_way
@each_implementation
def test_equality_is_zero(impl, dtype, way):
    """A teacher that the projection meets exactly: small whole numbers, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    source, projection, bias = (
        torch.randint(-2, 3, size, generator=generator).to(DTYPES[dtype]) for size in ((50, 12), (12, 20), (20,))
    )
    target = source @ projection + bias
    sides = {"student": source, "teacher": target} if way == "up" else {"student": target, "teacher": source}
    found = ours({**sides, "projection": projection, "bias": bias}, impl)
    assert float(found.value) == 0.0
    assert all(float(gradient.abs().max()) == 0.0 for gradient in found.gradients.values())
    normalized = ours({**sides, "projection": projection, "bias": bias}, impl, normalize=True)
    small = {"fp64": 1e-15}.get(dtype, 1e-6)
    assert abs(float(normalized.value)) <= small**2
    assert all(float(gradient.abs().max()) < small for gradient in normalized.gradients.values())


@pytest.mark.numerics
@each_way
@each_implementation
def test_rows_without_direction(impl, way):
    """normalize: a row of length 0 on either side stays zero, gives |other|^2 = 1, and receives no gradient; so does
    one just below the shortest length, and one above it is a unit vector like any other."""
    tensors = without(hidden((8, 6, 10), "fp64", way), "mask", "bias")
    student, teacher = tensors["student"], tensors["teacher"]
    student[1], teacher[2] = 0, 0
    student[3], teacher[3] = 0, 0
    target = teacher if way == "up" else student
    source = student if way == "up" else teacher
    unit = F.normalize(torch.ones_like(target[0]), dim=0)
    target[4], target[5] = unit * SHORTEST * 0.99, unit * SHORTEST * 1.01
    found = ours(tensors, impl, normalize=True, reduction="none")
    rows = found.value * target.size(-1)
    torch.testing.assert_close(rows[1:5], torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64))
    cosine = F.cosine_similarity(source[5] @ tensors["projection"], unit, dim=0)
    torch.testing.assert_close(rows[5], 2 - 2 * cosine)
    gradient = found.gradients["student"]
    assert all(bool(gradient[row].isfinite().all()) for row in range(8))
    zero_rows = {1, 3} | (set() if way == "up" else {4})
    for row in zero_rows:
        assert float(gradient[row].abs().max()) == 0.0
    # Row 1 up (2 down) has no projected direction: it says nothing about the projection.
    assert bool(found.gradients["projection"].isfinite().all())


@each_implementation
def test_scale_of_rows_does_not_count_when_normalized(impl):
    tensors = without(hidden((20, 6, 10), "fp64"), "mask", "bias")
    expected = projected_mse_loss(**tensors, normalize=True, impl=impl)
    factors = torch.linspace(0.1, 9, 20, dtype=torch.float64).unsqueeze(-1)
    for key in ("student", "teacher"):
        scaled = {**tensors, key: tensors[key] * factors}
        torch.testing.assert_close(projected_mse_loss(**scaled, normalize=True, impl=impl), expected)


# -------------------------------------------------------------------------------- method="gram"


def residual(shape: tuple[int, ...], dtype: str, size: float) -> Tensors:
    """Teacher rows that the projection meets but for noise of the given size beside rows of size 1."""
    tensors = hidden(shape, "fp64")
    student, noise = tensors["student"], tensors["teacher"]
    tensors["teacher"] = student @ tensors["projection"] + tensors["bias"] + size * noise
    return {key: value.to(DTYPES[dtype]) if value.is_floating_point() else value for key, value in tensors.items()}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", [(), ("bias",), ("bias", "mask")])
@each_kernel
def test_gram_is_the_same_loss(impl, names, dtype):
    """Within a few roundings of |teacher|^2, not of the difference: that is what it gives up."""
    for shape in (*SHAPES, (8000, 6, 9)):
        tensors = without(hidden(shape, dtype), *({"bias", "mask"} - set(names)))
        for how in ({}, {"reduction": "sum"}, {"num_items": 37}):
            exact = truth(PROJECTED_MSE, tensors, how)
            found = ours(tensors, impl, method="gram", **how)
            rounding = 1e-14 if dtype == "fp64" else 2e-6
            assert abs(float(found.value) - float(exact.value)) <= rounding * float(exact.value)
            stored = {"bf16": 2**-8, "fp16": 2**-10}.get(dtype, 0.0)
            for key, gradient in exact.gradients.items():
                error = float((found.gradients[key].double() - gradient).norm())
                assert error <= (rounding + stored) * float(gradient.norm()) + 3 * rounding * stored, (shape, key)


@pytest.mark.numerics
@each_kernel
def test_accuracy_of_gram(impl):
    """The figures of docs/losses.md: digits go as the residual falls, of the value with its square."""
    for size, value_error, gradient_error in ((1.0, 1e-6, 3e-6), (0.1, 3e-5, 3e-5), (0.01, 3e-3, 3e-4)):
        tensors = without(residual((4000, 48, 200), "fp32", size), "mask")
        exact = truth(PROJECTED_MSE, tensors, {})
        found = ours(tensors, impl, method="gram")
        assert abs(float(found.value) / float(exact.value) - 1) < value_error
        for key, gradient in exact.gradients.items():
            error = float((found.gradients[key].double() - gradient).norm() / gradient.norm())
            assert error < gradient_error, (size, key)


@pytest.mark.numerics
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@needs_kernel
def test_gram_masks_threads_and_layouts(garbage, restored_threads):
    """The same bits with garbage in masked rows, with any number of threads, from any layout, and asked for less."""
    for dtype in ("fp32", "bf16"):
        clean = hidden((3, 1501, 12, 20), dtype)
        masked = ~clean["mask"].unsqueeze(-1)
        expected = ours(clean, "cpp", method="gram")
        assert float(expected.gradients["student"].masked_select(masked).abs().sum()) == 0.0
        dirty = {**clean, **{key: clean[key].masked_fill(masked, garbage) for key in ("student", "teacher")}}
        assert_same_bits(ours(dirty, "cpp", method="gram"), expected)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert_same_bits(ours(clean, "cpp", method="gram"), expected)
        sides = {key: layouts(clean[key])["slices at odd offsets"] for key in ("student", "teacher")}
        assert_same_bits(ours({**clean, **sides}, "cpp", method="gram"), expected)
        for wanted in (("student",), ("projection",), ("bias",)):
            found = run(projected_mse_loss, clean, {"impl": "cpp", "method": "gram"}, wanted)
            assert_same_bits(found, Outcome(expected.value, {key: expected.gradients[key] for key in wanted}))
        for nothing in ({**clean, "mask": torch.zeros_like(clean["mask"])}, hidden((0, 12, 20), dtype)):
            found = ours(nothing, "cpp", method="gram")
            assert float(found.value) == 0.0
            assert all(float(gradient.abs().sum()) == 0.0 for gradient in found.gradients.values())


@needs_kernel
def test_gradcheck_of_gram():
    tensors = without(hidden((9, 3, 5), "fp64"), "mask")
    leaves = [tensors.pop(key).requires_grad_() for key in LEAVES]

    def loss(*given: Tensor) -> Tensor:
        return projected_mse_loss(**dict(zip(LEAVES, given, strict=True)), **tensors, method="gram", impl="cpp")

    assert torch.autograd.gradcheck(loss, leaves)


# -------------------------------------------------------------------------------- masks


@pytest.mark.numerics
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@each_way
@each_implementation
def test_garbage_in_masked_rows(impl, way, garbage):
    """It changes no bit, and the rows themselves receive exactly 0."""
    for dtype in ("fp32", "bf16"):
        clean = hidden((3, 70, 12, 20), dtype, way)
        masked = ~clean["mask"].unsqueeze(-1)
        assert 0 < int(masked.sum()) < masked.numel()
        dirty = {**clean, **{key: clean[key].masked_fill(masked, garbage) for key in ("student", "teacher")}}
        for how in ({}, {"normalize": True}, {"reduction": "none"}, {"reduction": "sum"}):
            found = ours(dirty, impl, **how)
            assert_same_bits(found, ours(clean, impl, **how), how)
            assert float(found.gradients["student"].masked_select(masked).abs().sum()) == 0.0
            if found.value.dim() > 0:
                assert float(found.value.masked_select(masked[..., 0]).abs().sum()) == 0.0


@pytest.mark.numerics
@each_way
@each_implementation
def test_masked_batch_equals_its_valid_rows(impl, way):
    tensors = hidden((3, 70, 12, 20), "fp32", way)
    kept = tensors["mask"]
    rows = {**without(tensors, "mask"), "student": tensors["student"][kept], "teacher": tensors["teacher"][kept]}
    found, alone = ours(tensors, impl), ours(rows, impl)
    torch.testing.assert_close(found.value, alone.value)
    torch.testing.assert_close(found.gradients["student"][kept], alone.gradients["student"])
    for key in ("projection", "bias"):
        torch.testing.assert_close(found.gradients[key], alone.gradients[key])
    if impl == "cpp":
        assert torch.equal(found.gradients["student"][kept], alone.gradients["student"])
        assert all(torch.equal(found.gradients[key], alone.gradients[key]) for key in ("projection", "bias"))


@pytest.mark.numerics
@each_reduction
@each_way
@each_implementation
def test_everything_masked(impl, way, reduction):
    tensors = hidden((2, 17, 5, 8), "fp32", way)
    tensors["mask"] = torch.zeros(2, 17, dtype=torch.bool)
    tensors |= {key: torch.full_like(tensors[key], math.nan) for key in ("student", "teacher")}
    for normalize in (False, True):
        found = ours(tensors, impl, reduction=reduction, normalize=normalize)
        assert float(found.value.abs().sum()) == 0.0
        assert all(float(gradient.abs().sum()) == 0.0 for gradient in found.gradients.values())


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 4, 8), (0, 7, 1, 2)])
@each_reduction
@each_way
@each_implementation
def test_empty_batch(impl, way, reduction, shape):
    for tensors in (hidden(shape, "fp32", way), without(hidden(shape, "fp32", way), "mask", "bias")):
        found = ours(tensors, impl, reduction=reduction)
        assert found.value.shape == (torch.Size(shape[:-2]) if reduction == "none" else ())
        assert float(found.value.sum()) == 0.0
        for key, gradient in found.gradients.items():
            assert gradient.shape == tensors[key].shape
            assert float(gradient.abs().sum()) == 0.0


@pytest.mark.numerics
@each_way
@each_implementation
def test_nan_in_a_valid_row_is_not_hidden(impl, way):
    for key in ("student", "teacher"):
        for normalize in (False, True):
            tensors = without(hidden((50, 8, 12), "fp32", way), "mask")
            tensors[key][33, 2] = math.nan
            rows = projected_mse_loss(**tensors, normalize=normalize, reduction="none", impl=impl)
            assert rows.isnan().nonzero().tolist() == [[33]]
            found = ours(tensors, impl, normalize=normalize)
            assert bool(found.value.isnan())
            assert bool(found.gradients["projection"].isnan().any())


@pytest.mark.numerics
@each_implementation
def test_kinds_of_masks(impl):
    """As bool or integers, strided ones."""
    tensors = hidden((3, 30, 4, 6))
    mask, expected = tensors["mask"], ours(tensors, impl)
    for kind in (mask.long() * 3, -mask.int(), mask.to(torch.uint8), mask.repeat_interleave(2, 1)[:, ::2]):
        assert_same_bits(ours({**tensors, "mask": kind}, impl), expected)


# -------------------------------------------------------------------------------- layouts


def layouts(base: Tensor) -> dict[str, Tensor]:
    """The same [B, N, d] values laid out differently, beside NaN where something lies beside them."""
    batch, positions, size = base.shape
    wide = torch.full((batch, positions + 2, size + 5), math.nan, dtype=base.dtype)
    wide[:, 1:-1, 3:-2] = base
    steps = torch.full((batch, positions, 2 * size), math.nan, dtype=base.dtype)
    steps[..., ::2] = base
    rows = torch.full((batch, positions, size + 3), math.nan, dtype=base.dtype)
    rows[..., 2:-1] = base
    return {
        "slices at odd offsets": wide[:, 1:-1, 3:-2],
        "rows with gaps": rows[..., 2:-1],
        "every second feature": steps[..., ::2],
        "positions outermost": base.transpose(0, 1).contiguous().transpose(0, 1),
        "features outermost": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@each_way
@each_implementation
def test_non_contiguous_inputs(impl, way, dtype):
    tensors = hidden((3, 40, 8, 20), dtype, way)
    expected = ours(tensors, impl)
    for name in layouts(tensors["student"]):
        laid_out = {key: layouts(tensors[key])[name] for key in ("student", "teacher")}
        assert not laid_out["student"].is_contiguous()
        found = ours({**tensors, **laid_out}, impl)
        if impl == "cpp":
            assert_same_bits(found, expected, name)
        else:
            torch.testing.assert_close((found.value, found.gradients), (expected.value, expected.gradients))
    turned = {"projection": tensors["projection"].T.contiguous().T, "bias": tensors["bias"].repeat(2)[::2]}
    bias = tensors["bias"].repeat_interleave(2)[::2]
    assert not turned["projection"].is_contiguous()
    found = ours({**tensors, "projection": turned["projection"], "bias": bias}, impl)
    torch.testing.assert_close((found.value, found.gradients), (expected.value, expected.gradients))


@pytest.mark.numerics
@each_way
@each_implementation
def test_expanded_inputs(impl, way):
    """One row for all: the gradient is the sum over the copies."""
    tensors = hidden((1, 8, 20), "fp64", way)
    for key in ("student", "teacher"):
        tensors[key] = torch.cat([tensors[key]] * 9)
    tensors["mask"] = torch.arange(9) % 3 != 1
    expected = ours(tensors, impl)
    student = tensors["student"][:1].clone().requires_grad_()
    value = projected_mse_loss(
        student.expand(9, -1),
        tensors["teacher"][:1].expand(9, -1),
        tensors["projection"],
        bias=tensors["bias"],
        mask=tensors["mask"],
        impl=impl,
    )
    torch.testing.assert_close(value.detach(), expected.value)
    gradient = torch.autograd.grad(value, student, torch.tensor(0.5, dtype=torch.float64))[0]
    torch.testing.assert_close(gradient, expected.gradients["student"].sum(0, keepdim=True))


@pytest.mark.numerics
@each_implementation
def test_leading_dimensions(impl):
    """Any number of them, none included."""
    flat = hidden((24, 5, 8))
    expected = ours(flat, impl, reduction="none")
    shaped = {**flat, **{key: flat[key].unflatten(0, (2, 3, 4)) for key in ("student", "teacher", "mask")}}
    found = ours(shaped, impl, reduction="none")
    assert found.value.shape == (2, 3, 4)
    assert torch.equal(found.value.flatten(), expected.value)
    assert torch.equal(found.gradients["student"].flatten(0, 2), expected.gradients["student"])
    row = {**flat, **{key: flat[key][0] for key in ("student", "teacher", "mask")}}
    for reduction, value in (("none", expected.value[0]), ("mean", expected.value[0]), ("sum", expected.value[0] * 8)):
        found = ours(row, impl, reduction=reduction)
        assert found.value.shape == ()
        torch.testing.assert_close(found.value, value)
        assert found.gradients["student"].shape == (5,)


# -------------------------------------------------------------------------------- num_items, weights, fp16


@each_implementation
def test_num_items(impl):
    """A number, a 0-d tensor, a tensor of one element."""
    tensors = hidden((30, 8, 12), "fp64")
    total = ours(tensors, impl, reduction="sum").value / 12
    for items in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        found = ours(tensors, impl, num_items=items)
        torch.testing.assert_close(found.value, total / 7)


@each_way
@each_implementation
def test_accumulation_equals_one_large_batch(impl, way):
    tensors = hidden((40, 8, 12), "fp64", way)
    items = int(tensors["mask"].sum())
    expected = ours(tensors, impl)
    value, gradients = torch.zeros(()), []
    for part in (slice(0, 13), slice(13, 40)):
        one = {**tensors, **{key: tensors[key][part] for key in ("student", "teacher", "mask")}}
        found = ours(one, impl, num_items=torch.tensor(items))
        value = value + found.value
        gradients.append(found.gradients)
    torch.testing.assert_close(value, expected.value)
    for key in ("projection", "bias"):
        torch.testing.assert_close(gradients[0][key] + gradients[1][key], expected.gradients[key])
    torch.testing.assert_close(torch.cat([g["student"] for g in gradients]), expected.gradients["student"])


@pytest.mark.numerics
@each_way
@each_implementation
def test_weights_by_row(impl, way):
    """reduction="none": each row's weight reaches all three gradients, and 0 takes the row out of them."""
    tensors = hidden((60, 8, 20), "fp64", way)
    weights = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    weights[::4] = 0

    def gradients(function: Callable[..., Tensor], **how: Any) -> tuple[Tensor, ...]:
        leaves = {key: tensors[key].clone().requires_grad_() for key in LEAVES}
        rows = function(**{**tensors, **leaves}, reduction="none", **how)
        return torch.autograd.grad(rows, list(leaves.values()), weights)

    for normalize in (False, True):
        found = gradients(projected_mse_loss, impl=impl, normalize=normalize)
        torch.testing.assert_close(found, gradients(projected_mse_reference, normalize=normalize))
        assert float(found[0][::4].abs().sum()) == 0.0


@pytest.mark.numerics
@each_reduction
@each_way
@each_kernel
def test_fp16_gradient_under_a_loss_scaler(impl, way, reduction):
    """A scaler multiplies the loss so that fp16 gradients do not fall below the smallest number. The kernel has made
    the gradient by then: it must have kept what the scaler brings back into range, and not have overflowed itself."""
    tensors = without(hidden((4096, 16, 40), "fp16", way), "mask")
    tensors["student"] = tensors["student"] * 0.1
    leaves = {key: tensors[key].detach().requires_grad_() for key in LEAVES}

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype, **how: Any) -> Outcome:
        given = {key: x.to(dtype) for key, x in tensors.items()} | {key: leaf.to(dtype) for key, leaf in leaves.items()}
        loss = function(**given, reduction=reduction, **how)
        loss = loss.mean() if reduction == "none" else loss / (4096 * 40 if reduction == "sum" else 1)
        found = torch.autograd.grad(loss * 2.0**12, [given[key] for key in leaves])
        return Outcome(loss.detach(), dict(zip(leaves, found, strict=True)))

    exact = gradients(projected_mse_reference, torch.float64)
    assert all(0.01 < float(gradient.abs().max()) < 6e4 for gradient in exact.gradients.values())
    found = gradients(projected_mse_loss, torch.float16, impl=impl)
    assert_within_budget(found, gradients(projected_mse_reference, torch.float16), exact)


# -------------------------------------------------------------------------------- threads


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_way
@needs_kernel
def test_same_bits_for_any_number_of_threads(way, dtype, restored_threads):
    """Fewer chunks than threads, more, and chunks of several blocks."""
    for shape in ((20, 8, 12), (1000, 17, 33), (13000, 5, 9)):
        for how in ({}, {"reduction": "none"}, {"normalize": True}):
            expected = None
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                found = ours(hidden(shape, dtype, way), "cpp", **how)
                expected = expected or found
                assert_same_bits(found, expected, (shape, how, threads))


@needs_kernel
def test_same_bits_every_time(restored_threads):
    torch.set_num_threads(4)
    tensors = hidden((3000, 24, 40))
    expected = ours(tensors, "cpp")
    for _ in range(20):
        assert_same_bits(ours(tensors, "cpp"), expected)


@needs_kernel
def test_a_batch_larger_or_smaller_changes_no_bit_of_a_row():
    tensors = hidden((700, 24, 40))
    batch = ours(tensors, "cpp", reduction="sum").gradients["student"]
    part = {**tensors, **{key: tensors[key][311:600] for key in ("student", "teacher", "mask")}}
    assert torch.equal(ours(part, "cpp", reduction="sum").gradients["student"], batch[311:600])


# -------------------------------------------------------------------------------- autograd


@each_variant
@each_way
@each_implementation
def test_gradcheck(impl, way, variant):
    tensors, keywords = PROJECTED_MSE.select(hidden((5, 3, 4), "fp64", way, seed=2), variant)
    names = [key for key in LEAVES if key in tensors]
    leaves = [tensors.pop(key).requires_grad_() for key in names]

    def loss(*given: Tensor) -> Tensor:
        return projected_mse_loss(**dict(zip(names, given, strict=True)), **tensors, **keywords, impl=impl)

    # The reference is differentiated by PyTorch: a few directions will do.
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=impl == "reference")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_implementation
def test_backward_twice_over_a_retained_graph(impl, reduction):
    tensors = hidden((40, 8, 12))
    leaves = [tensors[key].requires_grad_() for key in LEAVES]
    loss = projected_mse_loss(**tensors, reduction=reduction, impl=impl).sum()
    gradients = [torch.autograd.grad(loss, leaves, torch.tensor(1.5), retain_graph=True) for _ in range(3)]
    for gradient in gradients[0]:
        gradient.zero_()  # what was handed out belongs to the caller
    last = torch.autograd.grad(loss, leaves, torch.tensor(1.5))
    for one, two, three in zip(gradients[1], gradients[2], last, strict=True):
        assert float(three.abs().max()) > 0
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@each_implementation
def test_gradients_accumulate_into_leaves(impl):
    """A projection that several layers share: .grad is the sum, and no gradient aliases another."""
    tensors = without(hidden((40, 8, 12)), "mask")
    single = ours(tensors, "reference").gradients  # run() passes a gradient of 0.5 to a 0-d value
    leaves = {key: tensors[key].requires_grad_() for key in LEAVES}
    both = projected_mse_loss(**tensors, impl=impl) + 2 * projected_mse_loss(**tensors, impl=impl)
    both.backward()
    projected_mse_loss(**tensors, impl=impl).backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 8 * single[key])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@needs_kernel
def test_double_backward_is_refused(reduction):
    tensors = hidden((5, 4, 6))
    student = tensors["student"].requires_grad_()
    loss = projected_mse_loss(**tensors, reduction=reduction, impl="cpp").sum()
    with pytest.raises(RuntimeError, match=r"projected_mse: double backward .* impl='reference'"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize(
    "wanted", [("student",), ("projection",), ("bias",), ("student", "bias"), ("projection", "bias")]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_way
@each_implementation
def test_gradients_only_where_asked(impl, way, reduction, wanted):
    tensors = hidden((150, 8, 20), "fp32", way)
    expected = ours(tensors, impl, reduction=reduction)
    found = run(projected_mse_loss, tensors, {"impl": impl, "reduction": reduction}, wanted)
    assert_same_bits(found, Outcome(expected.value, {key: expected.gradients[key] for key in wanted}))


@needs_kernel
def test_nothing_is_computed_for_those_that_do_not_ask(monkeypatch):
    """The op is told which gradients are wanted, and makes no other."""
    called = []
    original = torch.ops.pydistill.projected_mse

    def spy(*arguments: Any) -> Any:
        outputs = original(*arguments)
        called.append((arguments[-3:], [output.numel() for output in outputs[1:4]]))
        return outputs

    monkeypatch.setattr(torch.ops.pydistill, "projected_mse", spy)
    tensors = hidden((10, 4, 6))
    projected_mse_loss(**tensors)
    tensors["projection"].requires_grad_()
    projected_mse_loss(**tensors).backward()
    tensors["student"].requires_grad_()
    projected_mse_loss(**tensors, reduction="none").sum().backward()
    with torch.no_grad():
        projected_mse_loss(**tensors)
    nothing, all_but_bias = ((False, False, False), [0, 0, 0]), ((True, True, False), [40, 24, 0])
    assert [(tuple(flags), sizes) for flags, sizes in called] == [
        nothing, ((False, True, False), [0, 24, 0]), nothing, all_but_bias, nothing
    ]  # fmt: skip


@each_reduction
@each_implementation
def test_no_gradient_wanted(impl, reduction):
    """Evaluation: same value, nothing recorded."""
    tensors = hidden((40, 8, 12))
    expected = ours(tensors, impl, reduction=reduction).value
    value = projected_mse_loss(**tensors, reduction=reduction, impl=impl)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    tracked = {key: x.clone().requires_grad_(key in LEAVES) for key, x in tensors.items()}
    with torch.no_grad():
        value = projected_mse_loss(**tracked, reduction=reduction, impl=impl)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    with torch.inference_mode():
        assert torch.equal(projected_mse_loss(**tensors, reduction=reduction, impl=impl), expected)


@each_way
@each_implementation
def test_inputs_are_left_alone(impl, way):
    tensors = hidden((40, 8, 16), "fp32", way)
    copies = {key: value.clone() for key, value in tensors.items()}
    for how in ({}, {"reduction": "none"}, {"normalize": True}):
        ours(tensors, impl, **how)
        for key, value in copies.items():
            assert torch.equal(tensors[key], value), key


def op_arguments(tensors: Tensors, keywords: dict[str, Any], wanted: bool) -> tuple[Any, ...]:
    """The op's arguments, from those of the public function."""
    items = keywords.get("num_items")
    up = list(tensors["projection"].shape) == [tensors["student"].size(-1), tensors["teacher"].size(-1)]
    return (
        *(tensors["student"], tensors["teacher"], tensors["projection"], tensors.get("bias"), tensors.get("mask")),
        None if items is None else torch.as_tensor(float(items), dtype=torch.float64),
        None,
        up,
        keywords.get("normalize", False),
        keywords.get("method", "direct"),
        keywords.get("reduction", "mean"),
        *(wanted, wanted, wanted and "bias" in tensors),
    )


OPCHECKED = [
    ("plain", "fp32"),
    ("normalize bias mask", "fp32"),
    ("bias", "bf16"),
    ("none", "fp32"),
    ("num_items tensor", "fp64"),
    # Without a factor left to backward, which scales the op's own output in place: opcheck compares that output.
    ("sum", "fp16"),
]


@needs_kernel
@pytest.mark.parametrize(("variant", "dtype"), OPCHECKED)
@each_way
def test_opcheck(variant, dtype, way):
    """Schema, fake kernel, autograd registration and AOT dispatch of the registered op."""
    tensors, keywords = PROJECTED_MSE.select(hidden((9, 4, 6), dtype, way), variant)
    for wanted in (True, False):
        leaves = {key: tensors[key].clone().requires_grad_(wanted) for key in LEAVES if key in tensors}
        # For rows, the gradient waits for their weights.
        now = wanted and keywords.get("reduction") != "none"
        torch.library.opcheck(
            torch.ops.pydistill.projected_mse.default, op_arguments({**tensors, **leaves}, keywords, now)
        )


@needs_kernel
def test_only_the_loss_is_differentiable():
    """The gradients that the op hands over for its backward are no functions to differentiate."""
    tensors = hidden((9, 4, 6))
    tensors["student"].requires_grad_()
    outputs = torch.ops.pydistill.projected_mse(*op_arguments(tensors, {}, True))
    assert [output.requires_grad for output in outputs] == [True] + [False] * 4


def compiled_outcome(function: Callable[..., Tensor], tensors: Tensors) -> Outcome:
    leaves = {key: tensors[key].detach().requires_grad_() for key in LEAVES if key in tensors}
    value = function({**tensors, **leaves})
    value.sum().backward()
    return Outcome(value.detach(), {key: leaf.grad for key, leaf in leaves.items()})


@pytest.mark.parametrize("variant", ["plain", "normalize bias mask", "none", "num_items"])
@each_way
@each_implementation
def test_compile_without_graph_breaks(impl, way, variant):
    """Value and gradients through the compiler's graph capture, inside a larger computation."""
    torch._dynamo.reset()
    tensors, keywords = PROJECTED_MSE.select(hidden((3, 10, 8, 12), "fp32", way), variant)

    def step(given: Tensors) -> Tensor:
        given = {**given, "student": given["student"] * 2}
        return 3 * projected_mse_loss(**given, impl=impl, **keywords)

    eager = compiled_outcome(step, tensors)
    found = compiled_outcome(torch.compile(step, fullgraph=True, backend="aot_eager"), tensors)
    torch.testing.assert_close(found.value, eager.value)
    torch.testing.assert_close(found.gradients, eager.gradients)


def test_compile_with_inductor_and_changing_shapes():
    """The default backend end to end; a second batch compiles with symbolic sizes, a third reuses them."""
    torch._dynamo.reset()

    def step(given: Tensors) -> Tensor:
        return 3 * projected_mse_loss(**{**given, "student": given["student"] * 2})

    compiled = torch.compile(step, fullgraph=True)
    for batch, positions in ((2, 9), (3, 14), (5, 21)):
        tensors = hidden((batch, positions, 8, 12), seed=batch)
        eager, found = compiled_outcome(step, tensors), compiled_outcome(compiled, tensors)
        torch.testing.assert_close(found.value, eager.value)
        torch.testing.assert_close(found.gradients, eager.gradients)


@each_implementation
def test_autocast(impl):
    """Inside autocast a bf16 student meets an fp32 projection: the loss is fp32 and as exact as outside."""
    torch.manual_seed(0)
    layer, projection = torch.nn.Linear(16, 12), torch.nn.Parameter(torch.randn(12, 20) / 4)
    states, teacher = torch.randn(2, 11, 16), torch.randn(2, 11, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student = layer(states)
        assert student.dtype == torch.bfloat16
        inside = projected_mse_loss(student, teacher.bfloat16(), projection, impl=impl)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, projected_mse_loss(student, teacher.bfloat16(), projection, impl=impl))
    inside.backward()
    assert layer.weight.grad.dtype == projection.grad.dtype == torch.float32
    exact = projected_mse_reference(layer(states), teacher, projection)
    expected = torch.autograd.grad(exact, [layer.weight, projection])
    torch.testing.assert_close([layer.weight.grad, projection.grad], list(expected), rtol=5e-2, atol=3e-3)


# -------------------------------------------------------------------------------- memory

PEAK = """
import torch
from pydistill import projected_mse_loss

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

def extra(threads, rows, dtype, up, **how):
    torch.set_num_threads(threads)
    student, teacher = torch.randn(rows, 48).to(dtype).requires_grad_(), torch.randn(rows, 512).to(dtype)
    projection = torch.randn(*(48, 512) if up else (512, 48)).to(dtype).requires_grad_()
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what there is now
    before = status("VmRSS")
    value = projected_mse_loss(student, teacher, projection, **how)
    gradients = torch.autograd.grad(value, [student, projection])
    return status("VmHWM") - before - sum(g.numel() * g.element_size() for g in gradients)

for threads in (1, 2):
    extra(threads, 300, torch.float32, True)  # what only the first call takes
    print(
        extra(threads, 20000, torch.float32, True),
        extra(threads, 20000, torch.float32, False),
        extra(threads, 20000, torch.bfloat16, True, normalize=True),
    )
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures peaks with Linux's /proc")
@needs_kernel
def test_no_projected_rows_in_memory():
    """Inputs, gradients, and 2 MB for each thread: the projected rows, or an fp32 copy of bf16 ones, would be 40 MB."""
    try:
        printed = in_a_new_process(["-c", PEAK])
    except ChildError as error:
        if "clear_refs" in str(error):
            pytest.skip("this system does not let a process reset its peak")
        raise
    for threads, line in enumerate(printed.splitlines(), start=1):
        peaks = [int(number) for number in line.split()]
        assert len(peaks) == 3
        assert max(peaks) < (1 + threads) * 2 << 20, [f"{peak / 2**20:.1f} MB with {threads} threads" for peak in peaks]


# -------------------------------------------------------------------------------- errors

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none, got 'batchmean'"),
    ({"direction": "left"}, ValueError, "direction must be 'up', 'down' or None .*, got 'left'"),
    ({"method": "grams"}, ValueError, "method must be one of direct, gram, got 'grams'"),
    (
        {"method": "gram", "normalize": True},
        ValueError,
        "method 'gram' knows no single rows, got normalize=True and reduction='mean'; use 'direct'",
    ),
    ({"method": "gram", "reduction": "none"}, ValueError, "method 'gram' knows no single rows, got .*'none'; use"),
    (
        {"method": "gram", "projection": torch.zeros(6, 4)},
        ValueError,
        "method 'gram' goes up, and this projection goes down, .* use 'direct'",
    ),
    ({"num_items": 0}, ValueError, "num_items must be above 0, got 0"),
    ({"num_items": torch.ones(2)}, ValueError, r"num_items must be a number or a tensor of one element, got .*\[2\]"),
    ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items replaces the denominator of a mean, got .*'sum'"),
    (
        {"student": torch.zeros(2, 5, 4, dtype=torch.long)},
        TypeError,
        "student must be a floating-point tensor, got torch.int64",
    ),
    (
        {"projection": torch.zeros(4, 6, dtype=torch.int32)},
        TypeError,
        "projection must be a floating-point tensor, got torch.int32",
    ),
    ({"bias": torch.zeros(6, dtype=torch.bool)}, TypeError, "bias must be a floating-point tensor, got torch.bool"),
    ({"student": torch.zeros(())}, ValueError, r"student must have shape \[\*, features\] .*, got \[\]"),
    ({"teacher": torch.zeros(2, 5, 0)}, ValueError, r"teacher must have shape .* one feature, got \[2, 5, 0\]"),
    (
        {"teacher": torch.zeros(2, 6, 6)},
        ValueError,
        r"teacher must have the student's leading dimensions, got \[2, 6, 6\] vs \[2, 5, 4\]; both models must",
    ),
    (
        {"projection": torch.zeros(4, 7)},
        ValueError,
        r"projection must have shape \[4, 6\] \(up\) or \[6, 4\] \(down\), got \[4, 7\]",
    ),
    (
        {"direction": "down"},
        ValueError,
        r"projection must have shape \[6, 4\] \(down\), got \[4, 6\]",
    ),
    ({"projection": torch.zeros(24)}, ValueError, r"projection must have shape .*, got \[24\]"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias must have one entry per column of the projection, \[6\], got \[4\]"),
    (
        {"mask": torch.ones(2, 5)},
        TypeError,
        r"mask must hold boolean or integer \(non-zero = valid\), got torch.float32",
    ),
    ({"mask": torch.ones(5, 2).bool()}, ValueError, r"mask must have one entry per row, \[2, 5\], got \[5, 2\]"),
    ({"teacher": torch.zeros(2, 5, 6, device="meta")}, ValueError, "teacher must be on cpu like student, got meta"),
    ({"bias": torch.zeros(6, device="meta")}, ValueError, "bias must be on cpu like student, got meta"),
    (
        {"teacher": torch.zeros(2, 5, 6, requires_grad=True)},
        RuntimeError,
        r"teacher requires grad, but the teacher never receives a gradient; pass teacher.detach\(\)",
    ),
    ({"impl": "fast"}, ValueError, "impl must be one of auto, reference, cpp, triton, cuda, got 'fast'"),
    ({"impl": "cuda"}, ValueError, "impl='cuda' does not run on device 'cpu'; use one of 'auto', 'reference', 'cpp'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments = {"student": torch.zeros(2, 5, 4), "teacher": torch.zeros(2, 5, 6), "projection": torch.zeros(4, 6)}
    projected_mse_loss(**arguments)
    with pytest.raises(error, match=f"^projected_mse: {message}"):
        projected_mse_loss(**{**arguments, **change})


OP_ERRORS: list[tuple[int, Any, str]] = [
    (0, torch.zeros(9, 4, 1), "must be matrices"),
    (0, torch.zeros(9, 0), "must be matrices with at least one column"),
    (1, torch.zeros(8, 6), "student and teacher must have one dtype and as many rows"),
    (1, torch.zeros(9, 6, dtype=torch.bfloat16), "student and teacher must have one dtype"),
    (2, torch.zeros(6, 4), r"projection must be \[4, 6\], got \[6, 4\]"),
    (2, torch.zeros(4, 6, dtype=torch.bfloat16), "projection must have the dtype of the rows, or fp32"),
    (3, torch.zeros(4), r"bias must be \[6\] in the dtype of the projection, got \[4\]"),
    (3, torch.zeros(6, dtype=torch.float64), r"bias must be \[6\] in the dtype of the projection"),
    (3, None, "a gradient of the bias needs a bias"),
    (4, torch.ones(8, dtype=torch.bool), "mask must be bool, one per row"),
    (4, torch.ones(9), "mask must be bool, one per row"),
    (6, torch.ones(8), "row_weights must be one per row in the dtype of the loss"),
    (6, torch.ones(9, dtype=torch.float64), "row_weights must be one per row in the dtype of the loss"),
    (7, False, r"projection must be \[6, 4\], got \[4, 6\]"),
    (9, "grams", "unknown method 'grams'"),
    (9, "gram", "method 'gram' goes up, does not normalize, and has no value for each row"),
    (10, "batchmean", "unknown reduction 'batchmean'"),
]


@needs_kernel
@pytest.mark.parametrize(("position", "value", "message"), OP_ERRORS)
def test_error_text_of_the_op_itself(position, value, message):
    """torch.ops is reachable too: it refuses what it cannot do instead of reading past the end."""
    arguments = list(op_arguments(hidden((9, 4, 6)), {"reduction": "none"}, True))
    torch.ops.pydistill.projected_mse(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=f"projected_mse: .*{message}"):
        torch.ops.pydistill.projected_mse(*arguments)


# -------------------------------------------------------------------------------- objective term


def signals(student_layers: list[Any], teacher_layers: list[Any]) -> tuple[Tensors, Tensors, Tensors]:
    """Hidden states [3, 7, 6] and [3, 7, 10] by signal, and a batch with padding."""
    generator = torch.Generator().manual_seed(0)
    student = {f"hidden_states@{layer}": torch.randn(3, 7, 6, generator=generator) for layer in student_layers}
    teacher = {f"hidden_states@{layer}": torch.randn(3, 7, 10, generator=generator) for layer in teacher_layers}
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    return student, teacher, {"attention_mask": mask.long(), "input_ids": torch.zeros(3, 7, dtype=torch.long)}


@pytest.mark.parametrize("shared", [True, False])
@each_way
def test_objective_term_is_the_function(way, shared):
    pairs = [(0, 1), ("embeddings", "model.norm"), (-1, -1)]
    student, teacher, batch = signals([0, "embeddings", -1], [1, "model.norm", -1])
    term = ProjectedMSE(
        6, 10, pairs, direction=way, shared=shared, normalize=True, layer_weights=[1.0, 0.5, 2.0],
        weight=3.0, name="states",
    )  # fmt: skip
    assert (term.weight, term.name) == (3.0, "states")
    assert term.student_signals == student.keys() and term.teacher_signals == teacher.keys()
    assert [list(p.shape) for p in term.projections] == [[6, 10] if way == "up" else [10, 6]] * (1 if shared else 3)
    torch.nn.init.normal_(term.biases[0])
    expected = {}
    for place, (below, above) in enumerate(pairs):
        at = 0 if shared else place
        expected[f"{below}-{above}"] = projected_mse_loss(
            student[f"hidden_states@{below}"],
            teacher[f"hidden_states@{above}"],
            term.projections[at],
            bias=term.biases[at],
            mask=batch["attention_mask"],
            normalize=True,
            num_items=9,
        )
    # What a teacher hands over may still have a history: the term cuts it.
    value, parts = term.forward_with_parts(student, {k: x.requires_grad_() for k, x in teacher.items()}, batch, 9)
    first, second, third = expected.values()
    # The weight of the term is the objective's business.
    assert torch.equal(value, 1.0 * first + 0.5 * second + 2.0 * third)
    assert parts.keys() == expected.keys()
    assert all(torch.equal(parts[name], expected[name]) and not parts[name].requires_grad for name in parts)
    assert torch.equal(term(student, teacher, batch, num_items=9), value)
    value.backward()
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in term.parameters())
    assert len(list(term.parameters())) == (2 if shared else 6)
    assert ProjectedMSE(6, 10, method="gram").options["method"] == "gram"
    assert "layers=[(0, 1), ('embeddings', 'model.norm'), (-1, -1)]" in repr(term)


def test_objective_term_of_square_projections_keeps_its_direction():
    student, teacher, batch = signals([-1], [-1])
    teacher = {key: value[..., :6] for key, value in teacher.items()}
    up = ProjectedMSE(6, 6, bias=False)
    lower = ProjectedMSE(6, 6, bias=False, direction="down")
    lower.load_state_dict(up.state_dict())
    projection, (s,), (t,) = up.projections[0], student.values(), teacher.values()
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(up(student, teacher, batch), F.mse_loss((s @ projection)[kept], t[kept]))
    torch.testing.assert_close(lower(student, teacher, batch), F.mse_loss((t @ projection)[kept], s[kept]))


@pytest.mark.parametrize(
    ("layers", "depths", "expected"),
    [
        ("last", None, [(-1, -1)]),
        ("uniform", (4, 12), [(0, 2), (1, 5), (2, 8), (3, 11)]),
        ("uniform", (3, 3), [(0, 0), (1, 1), (2, 2)]),
        ("uniform", (4, 6), [(0, 1), (1, 2), (2, 4), (3, 5)]),
        ("uniform", (3, 2), [(0, 0), (1, 1), (2, 1)]),
        ([[0, 3], [-1, "encoder.layer.5"]], None, [(0, 3), (-1, "encoder.layer.5")]),
    ],
)
def test_pairs_of_layers(layers, depths, expected):
    assert ProjectedMSE(6, 10, layers, depths=depths).pairs == expected


def test_term_between_two_models():
    student, teacher = tiny_bert(layers=2), tiny_bert(layers=4)
    term = ProjectedMSE.between(student, teacher, direction="down", shared=False)
    assert term.pairs == [(0, 1), (1, 3)]
    assert [list(p.shape) for p in term.projections] == [[16, 16]] * 2
    assert ProjectedMSE.between(student, teacher, "last").pairs == [(-1, -1)]
    with pytest.raises(ValueError, match="the teacher's configuration must have hidden_size, got None; pass sizes"):
        ProjectedMSE.between(student, torch.nn.Linear(3, 3))


def test_projections_are_drawn_like_those_of_linear():
    torch.manual_seed(0)
    term = ProjectedMSE(100, 400, [(0, 0), (1, 1)], shared=False)
    for projection, bias in zip(term.projections, term.biases, strict=True):
        assert 0.099 < float(projection.detach().abs().max()) <= 0.1  # 1 / sqrt(100)
        assert abs(float(projection.detach().mean())) < 1e-3
        assert float(bias.detach().abs().max()) == 0.0
    assert not torch.equal(*term.projections)
    lower = ProjectedMSE(100, 400, direction="down")
    assert 0.049 < float(lower.projections[0].detach().abs().max()) <= 0.05


def test_count_items():
    """Valid tokens, as the loss counts them."""
    student, teacher, batch = signals([-1], [-1])
    segments = torch.tensor([[0, 0, 1, 1, -1, 2, 2], [3] * 7, [-1] * 7])
    for marks, expected in (
        ({"input_ids": batch["input_ids"]}, 21),
        (batch, 15),
        ({**batch, "segment_ids": segments}, 9),
        ({"inputs_embeds": torch.zeros(3, 7, 2), "segment_ids": segments}, 13),
    ):
        for reduction in ("mean", "sum"):
            term = ProjectedMSE(6, 10, reduction=reduction)
            items = int(term.count_items(marks))
            assert items == expected
            own, given = term(student, teacher, marks), term(student, teacher, marks, num_items=items)
            torch.testing.assert_close(own, given)


def test_example_in_the_docs():
    """The block as it stands in docs/losses.md."""
    page = (Path(__file__).parents[1] / "docs" / "losses.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert all(float(state.grad.abs().sum()) > 0 for state in names["student"].values())
    assert names["term"].projections[0].grad.shape == (384, 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_size": 0}, "student_size must be above 0, got 0"),
        ({"teacher_size": -1}, "teacher_size must be above 0, got -1"),
        ({"direction": None}, "direction must be 'up' or 'down', got None"),
        ({"reduction": "batchmean"}, "reduction must be one of"),
        ({"reduction": "none"}, "reduction must be mean or sum in an objective, got 'none'"),
        ({"method": "gram", "direction": "down"}, "method 'gram' goes up, got direction='down'"),
        ({"layers": "uniform"}, r"layers='uniform' needs depths=\(.*\), got None"),
        ({"layers": "first"}, "layers must be 'uniform', 'last' or pairs .*, got 'first'"),
        ({"layers": []}, r"layers must be 'uniform', 'last' or pairs .*, got \[\]"),
        ({"layers": [(0, 1, 2)]}, r"layers must be pairs of a student and a teacher layer, got \(0, 1, 2\)"),
        ({"layers": [(0, 1), (0, 1)]}, "layers must be distinct pairs"),
        ({"layer_weights": [1.0, 2.0]}, "layer_weights must have one number per pair, 1, got 2"),
        ({"layer_weights": [-1.0]}, "layer_weights must be finite and not negative, got -1.0"),
        ({"layer_weights": [math.nan]}, "layer_weights must be finite and not negative, got nan"),
    ],
)
def test_objective_term_refuses(change, message):
    with pytest.raises(ValueError, match=f"^projected_mse: {message}"):
        ProjectedMSE(**{"student_size": 6, "teacher_size": 10, **change})


# -------------------------------------------------------------------------------- instruction sets, processes


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(isa):
    check_instruction_set(isa, __file__)


def test_without_native_code():
    """PYDISTILL_NATIVE=0: the reference runs and says so; asking for the kernel raises."""
    code = (
        "import torch, pydistill; from pydistill import _dispatch\n"
        "assert _dispatch.native is None\n"
        "s, t, p = torch.zeros(3, 4, requires_grad=True), torch.ones(3, 5), torch.ones(4, 5)\n"
        "pydistill.projected_mse_loss(s, t, p).backward()\n"
        "try: pydistill.projected_mse_loss(s, t, p, impl='cpp')\n"
        "except RuntimeError as error: print(error)\n"
    )
    printed = in_a_new_process(["-W", "error", "-c", code], PYDISTILL_NATIVE="0")
    assert "impl='cpp' is not available: PYDISTILL_NATIVE=0 is set" in printed
    if os.environ.get("PYDISTILL_NATIVE") != "0":
        assert "passed" in in_a_new_process([*numerics_of(__file__), "-k", "golden"], PYDISTILL_NATIVE="0")
