# SPDX-License-Identifier: Apache-2.0
"""soft_target_loss: golden values, error budget, properties, autograd, in place, errors, instruction sets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, IMPLEMENTATIONS, SOFT_TARGET, Outcome, Tensors, assert_within_budget, run, truth
from processes import ChildError, check_instruction_set, in_a_new_process, numerics_of
from torch import Tensor

from pydistill import SoftTarget, _dispatch, soft_target_loss
from pydistill.losses.soft_target import DIVERGENCES, soft_target_reference, sparse_soft_target_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_variant = pytest.mark.parametrize("variant", SOFT_TARGET.variants)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
needs_kernel = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="PYDISTILL_NATIVE=0: no compiled kernel")

STUDENT = torch.tensor([[1.0, -0.5, 0.25], [0.1, 0.2, -1.3], [2.0, 0.0, 0.5]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, -1.0, 0.0], [-0.4, 0.9, 0.3], [1.5, 0.5, -0.5]], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])

inputs = SOFT_TARGET.inputs


def ours(tensors: Tensors, impl: str = "auto", **keywords: Any) -> Outcome:
    """Forward and backward of the public function."""
    return run(soft_target_loss, tensors, {"impl": impl, **keywords}, ("student_logits",))


def check_budget(tensors: Tensors, impl: str, *, floor: float = 0.0, **keywords: Any) -> Outcome:
    """Runs `impl` and holds it against the reference in the same dtype and the truth in float64."""
    found = ours(tensors, impl, **keywords)
    keywords.pop("inplace", None)
    reference = run(soft_target_reference, tensors, keywords, ("student_logits",))
    assert_within_budget(found, reference, truth(SOFT_TARGET, tensors, keywords), floor=floor)
    return found


def logits_only(tensors: Tensors) -> Tensors:
    return {key: tensors[key] for key in ("student_logits", "teacher_logits")}


def pair(student: Tensor, teacher: Tensor, **more: Tensor) -> Tensors:
    return {"student_logits": student, "teacher_logits": teacher, **more}


def test_kernel_is_built():
    """Guards all tests below: without it, a missing extension would turn them into tests of the reference."""
    if os.environ.get("PYDISTILL_NATIVE") == "0":
        assert _dispatch.native is None
    else:
        assert "cpp" in IMPLEMENTATIONS, _dispatch.BACKENDS["soft_target"]["cpp"].reason


# -------------------------------------------------------------------------------- values

GOLDEN = [
    ({"divergence": "forward_kl"}, 0.1660193189),
    ({"divergence": "forward_kl", "temperature": 2.0}, 0.2267334961),
    ({"divergence": "forward_kl", "temperature": 2.0, "scale_by_temperature": False}, 0.0566833740),
    ({"divergence": "forward_kl", "temperature": 4.0}, 0.2486211742),
    ({"divergence": "reverse_kl"}, 0.1771890363),
    ({"divergence": "jsd", "jsd_beta": 0.0}, 0.1660193189),
    ({"divergence": "jsd", "jsd_beta": 0.1}, 0.0148438747),
    ({"divergence": "jsd", "jsd_beta": 0.5}, 0.0413676889),
    ({"divergence": "jsd", "jsd_beta": 0.9}, 0.0156216058),
    ({"divergence": "jsd", "jsd_beta": 1.0}, 0.1771890363),
    ({"divergence": "mse"}, 2.0375),
    ({"divergence": "cross_entropy"}, 0.9432033244),
    ({"hard_weight": 1.0}, 1.0298329305),
    ({"divergence": "mse", "hard_weight": 0.5}, 1.5336664653),  # Tang et al., alpha = 0.5
    ({"divergence": "cross_entropy", "hard_weight": 0.5}, 0.9865181275),  # MT-DNN-KD, the average of both
    ({"divergence": "forward_kl", "hard_weight": 0.5}, 1.1958522495 / 2),
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("keywords", "expected"), GOLDEN)
@each_implementation
def test_golden_values(impl, keywords, expected, dtype):
    """Values computed by an independent numpy script in float64, given to 10 digits."""
    labels = LABELS if keywords.get("hard_weight") else None
    value = soft_target_loss(STUDENT.to(dtype), TEACHER.to(dtype), labels, impl=impl, **keywords)
    assert value.dtype == dtype
    assert value.shape == ()
    # In float32 a few roundings of sums of size 1, times the T^2 in front.
    rounding = 2e-7 if keywords.get("temperature", 1.0) < 4 else 1e-6
    assert float(value) == pytest.approx(expected, abs=1e-10 if dtype == torch.float64 else rounding)


@pytest.mark.numerics
@each_implementation
def test_golden_gradients(impl):
    """Absolute sums of the gradient at three temperatures, with and without the T^2 factor."""
    for temperature, plain, scaled in ((1.0, 0.4497877555, 0.4497877555), (2.0, 0.1448561864, 0.5794247455)):
        for scale_by_temperature, expected in ((False, plain), (True, scaled)):
            student = STUDENT.clone().requires_grad_()
            loss = soft_target_loss(
                student,
                TEACHER,
                temperature=temperature,
                scale_by_temperature=scale_by_temperature,
                impl=impl,
            )
            loss.backward()
            assert float(student.grad.abs().sum()) == pytest.approx(expected, abs=1e-10)


@each_implementation
def test_same_value_as_plain_pytorch(impl):
    """The line that the docstring promises."""
    tensors = inputs((7, 50), torch.float64)
    student, teacher = tensors["student_logits"], tensors["teacher_logits"]
    plain = F.kl_div(F.log_softmax(student / 3, -1), F.softmax(teacher / 3, -1), reduction="batchmean") * 9
    torch.testing.assert_close(soft_target_loss(student, teacher, temperature=3.0, impl=impl), plain)


# -------------------------------------------------------------------------------- error budget

SHAPES = [
    (6, 1024),  # aligned: whole chunks, whole vectors
    (5, 1031),  # ragged classes, just over one chunk
    (33, 3),  # three-way classification: fewer classes than lanes, ragged rows
    (1, 4928),  # one row
    (2, 3, 300),  # three dimensions
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_variant
@each_implementation
def test_error_budget(impl, variant, dtype):
    for shape in SHAPES:
        tensors, keywords = SOFT_TARGET.select(inputs(shape, DTYPES[dtype]), variant)
        check_budget(tensors, impl, **keywords)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_divergence
@each_implementation
def test_every_class_count(impl, divergence, dtype):
    """1 to 70 classes cover every remainder of every vector width; the others lie around chunk boundaries."""
    counts = [*range(1, 71), *range(126, 131), *range(1022, 1043), 2047, 2048, 2049, 4095, 4097, 4928]
    for classes in counts:
        tensors = inputs((3 if classes > 70 else 19, classes), DTYPES[dtype], seed=classes)
        keywords = {} if divergence == "mse" else {"temperature": 2.0}
        tensors.pop("mask")
        check_budget(tensors, impl, divergence=divergence, hard_weight=0.5, **keywords)


@pytest.mark.numerics
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 33, 64, 257])
@each_implementation
def test_ragged_rows(impl, rows):
    """Row counts around the blocks in which few-class rows are processed together."""
    for classes in (1, 2, 3, 4, 5, 16, 17):
        tensors, keywords = SOFT_TARGET.select(inputs((rows, classes), seed=rows), "none")
        check_budget(tensors, impl, **keywords)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@each_variant
@each_implementation
def test_logits_of_scale_100(impl, variant, dtype):
    tensors, keywords = SOFT_TARGET.select(inputs((5, 1500), DTYPES[dtype], scale=100.0), variant)
    found = check_budget(tensors, impl, **keywords)
    assert bool(found.value.isfinite().all())


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_divergence
@each_implementation
def test_teacher_almost_equal_to_student(impl, divergence, dtype):
    """The value is a small difference of large numbers: rounding of the logits' own size is allowed, no
    more."""
    tensors = inputs((6, 2000), torch.float64)
    generator = torch.Generator().manual_seed(1)
    noise = 1e-3 * torch.randn(6, 2000, generator=generator, dtype=torch.float64)
    teacher = tensors["teacher_logits"]
    tensors = pair((teacher + noise).to(DTYPES[dtype]), teacher.to(DTYPES[dtype]))
    check_budget(tensors, impl, divergence=divergence, floor=1e-7)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_divergence
@each_implementation
def test_equality_is_zero(impl, divergence, dtype):
    """Same logits: the value is exactly 0 (for all but the cross-entropy, which then is the teacher's
    entropy), and the gradient vanishes to rounding."""
    for shape, scale in (((4, 1031), 3.0), ((4, 1031), 100.0), ((21, 3), 3.0), ((2, 5000), 1.0)):
        student = inputs(shape, DTYPES[dtype], scale=scale)["student_logits"]
        for temperature in (1.0,) if divergence == "mse" else (1.0, 2.0, 3.0):
            found = ours(pair(student, student.clone()), impl, divergence=divergence, temperature=temperature)
            epsilon = torch.finfo(torch.float64 if dtype == "fp64" else torch.float32).eps
            assert float(found.gradients["student_logits"].abs().max()) <= 4 * epsilon * temperature
            if divergence != "cross_entropy":
                assert float(found.value) == 0.0


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_implementation
def test_running_maximum(impl, dtype):
    """Orders of the classes that make a streaming softmax rescale: ascending, descending, an outlier at the
    end."""
    tensors = inputs((4, 5000), DTYPES[dtype], scale=40.0)
    student, teacher = tensors["student_logits"], tensors["teacher_logits"]
    outlier = student.clone()
    outlier[:, -1] = 400.0
    orders = [
        (student.sort(-1).values, teacher),
        (student, teacher.sort(-1).values),
        (student.sort(-1, descending=True).values, teacher.sort(-1).values),
        (outlier, teacher),
        (student, outlier),
    ]
    for divergence in DIVERGENCES:
        # The reverse KL's gradient is q (log(q / p) - KL), with log ratios of 300 here whose rounding alone
        # is 2e-5.
        floor = 4e-6 if divergence == "reverse_kl" else 0.0
        for temperature in (1.0,) if divergence == "mse" else (1.0, 2.0):
            for one, other in orders:
                tensors_ = pair(one, other, labels=tensors["labels"])
                check_budget(
                    tensors_,
                    impl,
                    divergence=divergence,
                    temperature=temperature,
                    hard_weight=0.5,
                    floor=floor,
                )


# -------------------------------------------------------------------------------- infinities, masks

FORBIDDEN = {
    "some classes": torch.arange(3000) % 7 == 3,
    "the first classes": torch.arange(3000) < 2200,  # whole chunks without any finite logit, before the first one
    "the last classes": torch.arange(3000) >= 700,
    "all but one": torch.arange(3000) != 1700,
}


@pytest.mark.numerics
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.bfloat16).min, -1e4])
@pytest.mark.parametrize("forbidden", FORBIDDEN)
@each_divergence
@each_implementation
def test_forbidden_classes_on_both_sides(impl, divergence, forbidden, fill):
    """Classes ruled out by -inf, or by a large negative number, in teacher and student alike count for
    nothing."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs((3, 3000), dtype)
        chosen = FORBIDDEN[forbidden]
        student = tensors["student_logits"].masked_fill(chosen, fill)
        teacher = tensors["teacher_logits"].masked_fill(chosen, fill)
        labels = torch.full((3,), int((~chosen).nonzero()[0]))
        found = check_budget(pair(student, teacher, labels=labels), impl, divergence=divergence, hard_weight=0.25)
        assert bool(found.value.isfinite())
        assert float(found.gradients["student_logits"][:, chosen].abs().max()) == 0.0
        kept = pair(student[:, ~chosen], teacher[:, ~chosen], labels=torch.zeros(3, dtype=torch.long))
        torch.testing.assert_close(
            found.value, ours(kept, impl, divergence=divergence, hard_weight=0.25).value, rtol=1e-6, atol=1e-7
        )


@pytest.mark.numerics
@pytest.mark.parametrize("classes", [5, 3000])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "cross_entropy"])
@each_implementation
def test_classes_forbidden_by_the_teacher_only(impl, divergence, classes):
    """What the teacher rules out (top-k, nucleus) has a finite cost."""
    tensors = inputs((4, classes))
    student = tensors["student_logits"]
    teacher = tensors["teacher_logits"].masked_fill(torch.arange(classes) % 3 != 1, -math.inf)
    found = check_budget(pair(student, teacher), impl, divergence=divergence)
    assert bool(found.value.isfinite())
    assert bool(found.gradients["student_logits"].isfinite().all())


@pytest.mark.numerics
@pytest.mark.parametrize("classes", [5, 3000])
@each_implementation
def test_divergence_without_common_support_is_infinite(impl, classes):
    """KL(p||q) is infinite where p > 0 = q; an infinite loss must not come out as a finite one."""
    tensors = inputs((4, classes))
    cut = tensors["student_logits"].masked_fill(torch.arange(classes) == 3, -math.inf)
    whole = tensors["teacher_logits"]
    for divergence, student, teacher in (
        ("forward_kl", cut, whole),
        ("cross_entropy", cut, whole),
        ("reverse_kl", whole, cut),
        ("mse", cut, whole),
    ):
        assert float(soft_target_loss(student, teacher, divergence=divergence, impl=impl)) == math.inf


@pytest.mark.numerics
@each_divergence
@each_implementation
def test_nan_in_a_valid_row_is_not_hidden(impl, divergence):
    for classes in (3, 1500):
        for name in ("student_logits", "teacher_logits"):
            tensors = logits_only(inputs((4, classes)))
            tensors[name][2, classes // 2] = math.nan
            value = soft_target_loss(**tensors, divergence=divergence, reduction="none", impl=impl)
            assert value.isnan().tolist() == [False, False, True, False]


@pytest.mark.numerics
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", [1, 3, 16, 40, 1031])
@each_divergence
@each_implementation
def test_garbage_in_invalid_rows(impl, divergence, classes, garbage):
    """Exactly zero loss and gradient there, and the other rows as if the invalid ones did not exist."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs((37, classes), dtype)
        valid = tensors["mask"] & (tensors["labels"] != -100)
        assert 0 < int(valid.sum()) < 37
        student, teacher, labels = tensors["student_logits"], tensors["teacher_logits"], tensors["labels"]
        alone = pair(student[valid], teacher[valid], labels=labels[valid])
        dirty = pair(
            student.masked_fill(~valid[:, None], garbage),
            teacher.masked_fill(~valid[:, None], garbage),
            labels=labels.masked_fill(~tensors["mask"], 10**9),  # never looked at
            mask=tensors["mask"],
        )
        for reduction in ("mean", "sum"):
            keywords = {"divergence": divergence, "hard_weight": 0.5, "reduction": reduction}
            found, expected = ours(dirty, impl, **keywords), ours(alone, impl, **keywords)
            gradient = found.gradients["student_logits"]
            assert float(gradient[~valid].abs().sum()) == 0.0
            torch.testing.assert_close(found.value, expected.value, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(gradient[valid], expected.gradients["student_logits"], rtol=1e-5, atol=1e-7)
        rows = soft_target_loss(**dirty, divergence=divergence, hard_weight=0.5, reduction="none", impl=impl)
        assert float(rows[~valid].abs().sum()) == 0.0


@pytest.mark.numerics
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@each_implementation
def test_all_rows_invalid(impl, reduction):
    for classes in (3, 1100):
        student = torch.full((5, classes), math.nan)
        for more in (
            {"mask": torch.zeros(5, dtype=torch.bool)},
            {"labels": torch.full((5,), -100), "hard_weight": 0.5},
        ):
            keywords = {key: value for key, value in more.items() if key == "hard_weight"}
            tensors = pair(student, student, **{key: value for key, value in more.items() if key != "hard_weight"})
            found = ours(tensors, impl, reduction=reduction, **keywords)
            assert float(found.value.abs().sum()) == 0.0
            assert float(found.gradients["student_logits"].abs().sum()) == 0.0


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [(0, 7), (3, 0, 1031), (0, 2, 4)])
@each_divergence
@each_implementation
def test_empty_batch(impl, divergence, shape):
    tensors = inputs(shape)
    for reduction in ("mean", "sum", "none"):
        found = ours(tensors, impl, divergence=divergence, hard_weight=0.5, reduction=reduction)
        assert found.value.shape == (torch.Size(shape[:-1]) if reduction == "none" else ())
        assert float(found.value.sum()) == 0.0
        assert found.gradients["student_logits"].shape == shape


@pytest.mark.numerics
@each_divergence
@each_implementation
def test_one_class(impl, divergence):
    """A distribution over one class leaves nothing to learn."""
    tensors = inputs((19, 1))
    found = ours(tensors, impl, divergence=divergence, hard_weight=1.0 if divergence == "mse" else 0.5)
    assert float(found.value) == 0.0
    assert float(found.gradients["student_logits"].abs().max()) == 0.0


@pytest.mark.numerics
@each_implementation
def test_one_row_without_batch_dimension(impl):
    tensors = {key: value[0] for key, value in inputs((1, 300), seed=3).items()}
    tensors["labels"], tensors["mask"] = torch.tensor(7), torch.tensor(True)
    check_budget(tensors, impl, hard_weight=0.5)


@pytest.mark.numerics
@each_implementation
def test_kinds_of_labels_and_masks(impl):
    """Any integer type, any ignore_index, class 0 included; masks as bool or integers; strided ones."""
    tensors = inputs((12, 30))
    labels = tensors["labels"].clamp(min=0)
    expected = ours({**tensors, "labels": labels}, impl, hard_weight=0.5)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        found = ours({**tensors, "labels": labels.to(dtype)}, impl, hard_weight=0.5)
        assert torch.equal(found.value, expected.value)
    for mask in (
        tensors["mask"].long() * 3,
        tensors["mask"].to(torch.uint8),
        tensors["mask"].repeat_interleave(2)[::2],
    ):
        found = ours({**tensors, "labels": labels, "mask": mask}, impl, hard_weight=0.5)
        assert torch.equal(found.value, expected.value)
    strided = labels.repeat_interleave(2)[::2]
    assert torch.equal(ours({**tensors, "labels": strided}, impl, hard_weight=0.5).value, expected.value)
    assert strided.stride() == (2,)
    for ignored in (0, 29, -1):
        marked = labels.clone()
        marked[:4] = ignored
        check_budget({**tensors, "labels": marked}, impl, hard_weight=0.5, ignore_index=ignored)


# -------------------------------------------------------------------------------- layouts


def layouts(base: Tensor) -> dict[str, Tensor]:
    """The same [4, 6, 41] values laid out differently."""
    wide = torch.full((4, 6, 50), math.nan, dtype=base.dtype)
    wide[..., 3:44] = base
    steps = torch.full((4, 6, 82), math.nan, dtype=base.dtype)
    steps[..., ::2] = base
    return {
        "transposed": base.transpose(0, 2).contiguous().transpose(0, 2),
        "rows swapped": base.transpose(0, 1).contiguous().transpose(0, 1),
        "class slice": wide[..., 3:44],
        "every second": steps[..., ::2],
    }


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_implementation
def test_non_contiguous_inputs(impl, dtype):
    tensors = inputs((4, 6, 41), DTYPES[dtype])
    expected = ours(tensors, impl, hard_weight=0.5)
    for name, student in layouts(tensors["student_logits"]).items():
        for teacher in (tensors["teacher_logits"], layouts(tensors["teacher_logits"])[name]):
            assert not student.is_contiguous()
            found = ours({**tensors, "student_logits": student, "teacher_logits": teacher}, impl, hard_weight=0.5)
            assert torch.equal(found.value, expected.value), name
            assert torch.equal(found.gradients["student_logits"], expected.gradients["student_logits"]), name


@pytest.mark.numerics
@each_implementation
def test_shifted_sequences(impl):
    """The language-model idiom logits[:, :-1] against labels[:, 1:]: the gradient of the last position is
    zero."""
    tensors = inputs((3, 9, 45))
    student = tensors["student_logits"].requires_grad_()
    arguments = (tensors["teacher_logits"][:, :-1], tensors["labels"][:, 1:])
    soft_target_loss(student[:, :-1], *arguments, hard_weight=0.5, impl=impl).backward()
    assert float(student.grad[:, -1].abs().sum()) == 0.0
    alone = pair(student.detach()[:, :-1].clone(), arguments[0].clone(), labels=arguments[1].clone())
    exact = truth(SOFT_TARGET, alone, {"hard_weight": 0.5})
    torch.testing.assert_close(student.grad[:, :-1] * 0.5, exact.gradients["student_logits"].float())


@pytest.mark.numerics
@each_implementation
def test_expanded_inputs(impl):
    """One teacher row for the whole batch; one student row used many times collects the sum of the
    gradients."""
    tensors = inputs((8, 33))
    teacher = tensors["teacher_logits"][:1].expand(8, -1)
    check_budget(pair(tensors["student_logits"], teacher), impl)
    student = tensors["student_logits"][:1].clone().requires_grad_()
    soft_target_loss(student.expand(8, -1), tensors["teacher_logits"], impl=impl).backward()
    exact = student.detach().double().requires_grad_()
    soft_target_reference(exact.expand(8, -1), tensors["teacher_logits"].double()).backward()
    torch.testing.assert_close(student.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("inplace", [False, True])
@needs_kernel
def test_stays_within_its_rows(dtype, inplace):
    """Logits in the middle of a NaN-filled buffer, at odd offsets: NaN that is read spoils the result, and
    the guards must still be NaN after a gradient was written between them."""
    for classes in (1, 2, 3, 5, 16, 17, 41, 63, 1023, 1025):
        for rows in (1, 3, 17):
            for offset in (64, 65, 67):
                buffers, views = [], []
                clean = inputs((rows, classes), DTYPES[dtype], seed=offset)
                for name in ("student_logits", "teacher_logits"):
                    buffer = torch.full((rows * classes + 200,), math.nan, dtype=DTYPES[dtype])
                    view = buffer[offset : offset + rows * classes].view(rows, classes)
                    view.copy_(clean[name])
                    buffers.append(buffer)
                    views.append(view)
                expected = ours(logits_only(clean), "cpp")
                seed = torch.zeros((), requires_grad=True)
                student = _Handed.apply(seed, views[0])
                value = soft_target_loss(student, views[1], inplace=inplace, impl="cpp")
                gradient = torch.autograd.grad(value, student, torch.tensor(0.5))[0]
                assert torch.equal(value.detach(), expected.value)
                assert torch.equal(gradient, expected.gradients["student_logits"])
                for buffer in buffers:
                    assert bool(buffer[:offset].isnan().all())
                    assert bool(buffer[offset + rows * classes :].isnan().all())


class _Handed(torch.autograd.Function):
    """Hands out given memory as the output of an operation."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, memory: Tensor) -> Tensor:
        return memory.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None


# -------------------------------------------------------------------------------- properties


@pytest.mark.numerics
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
@each_implementation
def test_invariances(impl, divergence):
    """A constant added to a row of logits changes nothing; neither does the order of the classes; gradients
    of a row sum to zero."""
    tensors = logits_only(inputs((5, 700), torch.float64))
    found = ours(tensors, impl, divergence=divergence, temperature=2.0)
    shift = torch.tensor([[3.0], [-200.0], [1e3], [0.0], [50.0]], dtype=torch.float64)
    shifted = pair(tensors["student_logits"] + shift, tensors["teacher_logits"] - shift)
    torch.testing.assert_close(ours(shifted, impl, divergence=divergence, temperature=2.0).value, found.value)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(0))
    permuted = {key: value[:, order] for key, value in tensors.items()}
    torch.testing.assert_close(ours(permuted, impl, divergence=divergence, temperature=2.0).value, found.value)
    assert float(found.gradients["student_logits"].sum(-1).abs().max()) < 1e-13


@pytest.mark.numerics
@each_implementation
def test_temperature_limit(impl):
    """T^2 KL tends to half the variance of the logit difference over the classes (Hinton et al. 2015, section
    2.1)."""
    tensors = logits_only(inputs((6, 50), torch.float64))
    difference = tensors["student_logits"] - tensors["teacher_logits"]
    expected = difference.var(-1, unbiased=False).mean() / 2
    value = soft_target_loss(**tensors, temperature=1e3, impl=impl)
    torch.testing.assert_close(value, expected, rtol=1e-2, atol=0.0)


@pytest.mark.numerics
@each_implementation
def test_jsd_limits(impl):
    """By definition JSD_beta goes to 0 with beta, like beta KL(p||q); by convention beta = 0 itself is the
    full KL. The same at the other end, with the reverse KL."""
    tensors = logits_only(inputs((6, 50), torch.float64, scale=1.0))

    def jsd(beta: float) -> float:
        return float(soft_target_loss(**tensors, divergence="jsd", jsd_beta=beta, impl=impl))

    forward = float(soft_target_loss(**tensors, divergence="forward_kl", impl=impl))
    reverse = float(soft_target_loss(**tensors, divergence="reverse_kl", impl=impl))
    assert jsd(0.0) == forward
    assert jsd(1.0) == reverse
    assert jsd(1e-6) / 1e-6 == pytest.approx(forward, rel=1e-3)
    assert jsd(1 - 1e-6) / 1e-6 == pytest.approx(reverse, rel=1e-3)
    assert 0 < jsd(0.5) <= math.log(2)
    swapped = pair(tensors["teacher_logits"], tensors["student_logits"])
    assert float(soft_target_loss(**swapped, divergence="jsd", impl=impl)) == pytest.approx(jsd(0.5), rel=1e-12)


@pytest.mark.numerics
@each_divergence
@each_implementation
def test_reductions(impl, divergence):
    tensors = inputs((17, 60))
    keywords = {"divergence": divergence, "hard_weight": 0.4, "impl": impl}
    rows = soft_target_loss(**tensors, reduction="none", **keywords)
    total = soft_target_loss(**tensors, reduction="sum", **keywords)
    valid = int((tensors["mask"] & (tensors["labels"] != -100)).sum())
    assert rows.shape == (17,)
    torch.testing.assert_close(total, rows.sum())
    torch.testing.assert_close(soft_target_loss(**tensors, **keywords), total / valid)
    for items in (23, 23.0, torch.tensor(23), torch.tensor(23.0), torch.tensor([23.0])):
        torch.testing.assert_close(
            soft_target_loss(**tensors, num_items=items, **keywords),
            total / 23,
            rtol=1e-6,
            atol=0.0,
            check_stride=False,
        )


@each_implementation
def test_accumulation_equals_one_large_batch(impl):
    """Four parts, with the number of valid rows of the whole as num_items, add up to the whole: value and
    gradient."""
    tensors = inputs((32, 40), torch.float64)
    whole = ours(tensors, impl, hard_weight=0.5)
    valid = (tensors["mask"] & (tensors["labels"] != -100)).sum()
    parts = [
        ours(
            {key: value[at : at + 8] for key, value in tensors.items()},
            impl,
            hard_weight=0.5,
            num_items=valid,
        )
        for at in range(0, 32, 8)
    ]
    torch.testing.assert_close(sum(part.value for part in parts), whole.value)
    gradient = torch.cat([part.gradients["student_logits"] for part in parts])
    torch.testing.assert_close(gradient, whole.gradients["student_logits"])


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@needs_kernel
def test_same_bits_for_any_number_of_threads(dtype, restored_threads):
    for shape in ((257, 1031), (5, 40_000), (4099, 3), (1000, 17), (1, 9000)):
        for reduction in ("mean", "none"):
            for inplace in (False, True):
                outcomes = []
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    tensors = inputs(shape, DTYPES[dtype])
                    outcomes.append(
                        ours(
                            tensors,
                            "cpp",
                            hard_weight=0.5,
                            temperature=2.0,
                            reduction=reduction,
                            inplace=inplace,
                        )
                    )
                for outcome in outcomes[1:]:
                    assert torch.equal(outcome.value, outcomes[0].value)
                    assert torch.equal(outcome.gradients["student_logits"], outcomes[0].gradients["student_logits"])


# -------------------------------------------------------------------------------- autograd


@each_variant
@each_implementation
def test_gradcheck(impl, variant):
    for shape in ((4, 5), (2, 20)):
        tensors, keywords = SOFT_TARGET.select(inputs(shape, torch.float64, scale=1.0, seed=2), variant)
        student = tensors.pop("student_logits").requires_grad_()
        # The gradient is computed in the forward, so a second look at it costs nothing and must give the
        # same.
        assert torch.autograd.gradcheck(
            lambda logits, tensors=tensors, keywords=keywords: soft_target_loss(
                logits, impl=impl, **tensors, **keywords
            ),
            (student,),
        )


@each_implementation
def test_backward_twice_over_a_retained_graph(impl):
    tensors = inputs((6, 40))
    student = tensors.pop("student_logits").requires_grad_()
    loss = soft_target_loss(student, impl=impl, hard_weight=0.5, **tensors)
    gradients = [torch.autograd.grad(loss, student, torch.tensor(1.5), retain_graph=True)[0] for _ in range(3)]
    gradients[0].zero_()  # what was handed out belongs to the caller
    last = torch.autograd.grad(loss, student, torch.tensor(1.5))[0]
    assert float(last.abs().max()) > 0
    assert torch.equal(gradients[1], gradients[2])
    assert torch.equal(last, gradients[1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


@needs_kernel
def test_backward_twice_in_place(impl="cpp"):
    tensors = inputs((6, 40))
    expected = ours(tensors, impl, hard_weight=0.5).gradients["student_logits"]
    leaf = tensors.pop("student_logits").requires_grad_()
    loss = soft_target_loss(leaf.clone(), impl=impl, hard_weight=0.5, inplace=True, **tensors)
    first = torch.autograd.grad(loss, leaf, torch.tensor(0.5), retain_graph=True)[0]
    second = torch.autograd.grad(loss, leaf, torch.tensor(0.5))[0]
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)


@each_implementation
def test_gradient_accumulates_into_leaf(impl):
    """Two losses on one tensor, and a second backward: .grad is the sum, and no gradient aliases another."""
    tensors = logits_only(inputs((6, 40)))
    single = ours(tensors, "reference").gradients["student_logits"] * 2  # run() passes a gradient of 0.5 to a 0-d value
    student = tensors["student_logits"].requires_grad_()
    teacher = tensors["teacher_logits"]
    both = soft_target_loss(student, teacher, impl=impl) + 2 * soft_target_loss(student, teacher, impl=impl)
    both.backward()
    soft_target_loss(student, teacher, impl=impl).backward()
    torch.testing.assert_close(student.grad, 4 * single)


@needs_kernel
def test_double_backward_is_refused(impl="cpp"):
    tensors = inputs((3, 5))
    student = tensors.pop("student_logits").requires_grad_()
    for logits, inplace in ((student, False), (student.clone(), True)):
        loss = soft_target_loss(logits, impl=impl, inplace=inplace, **tensors)
        with pytest.raises(RuntimeError, match=r"soft_target: double backward .* impl='reference'"):
            torch.autograd.grad(loss, student, create_graph=True)


@each_implementation
def test_no_gradient_wanted(impl):
    """Evaluation: same value, nothing recorded, logits untouched even with inplace=True."""
    tensors = inputs((6, 40))
    expected = ours(tensors, impl).value
    before = tensors["student_logits"].clone()
    value = soft_target_loss(**tensors, impl=impl)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    with torch.no_grad():
        tracked = tensors["student_logits"].clone().requires_grad_()
        assert not soft_target_loss(**{**tensors, "student_logits": tracked}, impl=impl).requires_grad
    with torch.inference_mode():
        assert torch.equal(soft_target_loss(**tensors, impl=impl), expected)
    if impl == "cpp":
        assert torch.equal(soft_target_loss(**tensors, impl=impl, inplace=True), expected)
    assert torch.equal(tensors["student_logits"], before)


@each_implementation
def test_inputs_are_left_alone(impl):
    tensors = inputs((6, 40))
    copies = {key: value.clone() for key, value in tensors.items()}
    ours(tensors, impl, hard_weight=0.5)
    for key, value in copies.items():
        assert torch.equal(tensors[key], value), key


@needs_kernel
@pytest.mark.parametrize(
    ("variant", "dtype"),
    [(variant, "fp32") for variant in SOFT_TARGET.variants] + [("none", dtype) for dtype in ("fp64", "bf16", "fp16")],
)
def test_opcheck(variant, dtype):
    """Schema, fake kernel, autograd registration and AOT dispatch of the registered op."""
    tensors, keywords = SOFT_TARGET.select(inputs((4, 9), DTYPES[dtype]), variant)
    student = tensors["student_logits"]
    options = op_options(tensors, keywords)
    for wanted in (True, False):
        arguments = (student.clone().requires_grad_(wanted), tensors["teacher_logits"], *options, wanted)
        torch.library.opcheck(torch.ops.pydistill.soft_target.default, arguments)
    torch.library.opcheck(
        torch.ops.pydistill.soft_target_.default, (student.clone(), tensors["teacher_logits"], *options)
    )


@needs_kernel
def test_only_the_loss_is_differentiable():
    """The gradient that the op hands over for its backward is no function to differentiate."""
    tensors = inputs((4, 9))
    student = tensors["student_logits"].requires_grad_()
    loss, gradient, scale = torch.ops.pydistill.soft_target(
        student, tensors["teacher_logits"], *op_options({}, {}), True
    )
    assert (loss.requires_grad, gradient.requires_grad, scale.requires_grad) == (True, False, False)


def op_options(tensors: Tensors, keywords: dict[str, Any]) -> tuple[Any, ...]:
    """The op's positional options, from the keywords of the public function."""
    items = keywords.get("num_items")
    return (
        tensors.get("labels"),
        tensors.get("mask"),
        None if items is None else torch.as_tensor(float(items), dtype=torch.float64),
        keywords.get("divergence", "forward_kl"),
        keywords.get("temperature", 1.0),
        keywords.get("hard_weight", 0.0),
        keywords.get("jsd_beta", 0.5),
        keywords.get("scale_by_temperature", True),
        -100,
        keywords.get("reduction", "mean"),
    )


@needs_kernel
def test_opcheck_of_scale_rows():
    rows = inputs((4, 9))["student_logits"]
    for scale in (torch.tensor(0.3), torch.linspace(0.1, 1.0, 4)):
        torch.library.opcheck(torch.ops.pydistill.scale_rows_.default, (rows.clone(), scale))
        scaled = rows.clone()
        torch.ops.pydistill.scale_rows_(scaled, scale)
        torch.testing.assert_close(scaled, rows * (scale if scale.dim() == 0 else scale[:, None]))


def compiled_outcome(function: Callable[..., Tensor], tensors: Tensors) -> Outcome:
    student = tensors["student_logits"].detach().requires_grad_()
    value = function(student, *(tensors[key] for key in tensors if key != "student_logits"))
    value.sum().backward()
    return Outcome(value.detach(), {"student_logits": student.grad})


@pytest.mark.parametrize("variant", ["kl+ce T=2", "jsd", "mse", "none"])
@each_implementation
def test_compile_without_graph_breaks(impl, variant):
    """Value and gradient through the compiler's graph capture, inside a larger computation."""
    torch._dynamo.reset()
    tensors, keywords = SOFT_TARGET.select(inputs((6, 70)), variant)
    names = [key for key in tensors if key not in ("student_logits", "teacher_logits")]

    def step(student: Tensor, teacher: Tensor, *more: Tensor) -> Tensor:
        extra = dict(zip(names, more, strict=True))
        return 3 * soft_target_loss(student * 2, teacher, impl=impl, **extra, **keywords)

    eager = compiled_outcome(step, tensors)
    found = compiled_outcome(torch.compile(step, fullgraph=True, backend="aot_eager"), tensors)
    torch.testing.assert_close(found.value, eager.value)
    torch.testing.assert_close(found.gradients, eager.gradients)


def test_compile_with_inductor_and_changing_shapes():
    """The default backend end to end; a second batch size compiles with a symbolic one, a third reuses it."""
    torch._dynamo.reset()

    def step(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return soft_target_loss(student * 2, teacher, labels, hard_weight=0.5, temperature=2.0) * 3

    compiled = torch.compile(step, fullgraph=True)
    for rows in (6, 11, 23):
        tensors = inputs((rows, 40), seed=rows)
        tensors.pop("mask")
        eager, found = compiled_outcome(step, tensors), compiled_outcome(compiled, tensors)
        torch.testing.assert_close(found.value, eager.value)
        torch.testing.assert_close(found.gradients, eager.gradients)


@each_implementation
def test_autocast(impl):
    """Inside autocast a bf16 model meets an fp32 teacher: the loss is fp32 and as exact as outside."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 30)
    features, teacher = torch.randn(8, 16), torch.randn(8, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(features)
        assert logits.dtype == torch.bfloat16
        inside = soft_target_loss(logits, teacher, impl=impl)
        mixed = soft_target_loss(logits.float(), teacher, impl=impl)
    assert inside.dtype == torch.float32
    outside = soft_target_loss(logits.detach(), teacher, impl=impl)
    assert torch.equal(inside, outside)
    assert torch.equal(mixed, outside)
    inside.backward()
    assert layer.weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(soft_target_reference(layer(features), teacher), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected, rtol=5e-2, atol=5e-4)


@pytest.mark.parametrize("dtypes", [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "fp16"), ("fp64", "fp32")])
@each_implementation
def test_mixed_dtypes(impl, dtypes):
    """Neither side is rounded to the other's type; the gradient has the student's."""
    tensors = inputs((5, 50))
    mixed = pair(tensors["student_logits"].to(DTYPES[dtypes[0]]), tensors["teacher_logits"].to(DTYPES[dtypes[1]]))
    found = check_budget(mixed, impl)
    assert found.gradients["student_logits"].dtype == DTYPES[dtypes[0]]
    assert found.value.dtype == (torch.float64 if "fp64" in dtypes else torch.float32)


# -------------------------------------------------------------------------------- in place


@needs_kernel
@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_variant
def test_inplace_gives_the_same_bits(variant, dtype):
    for shape in ((7, 1031), (33, 3), (2, 4, 64)):
        tensors, keywords = SOFT_TARGET.select(inputs(shape, DTYPES[dtype]), variant)
        fresh, inplace = ours(tensors, "cpp", **keywords), ours(tensors, "cpp", inplace=True, **keywords)
        assert torch.equal(inplace.value, fresh.value)
        assert torch.equal(inplace.gradients["student_logits"], fresh.gradients["student_logits"])


@needs_kernel
@each_divergence
@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_where_a_chunk_is_done_again(dtype, divergence):
    """The kernel repeats a chunk that outgrew its reference or holds -inf, when its logits are already overwritten."""
    for hard_weight in (0.0, 0.5):
        tensors = inputs((5, 3000), DTYPES[dtype], scale=1.0)
        tensors["labels"], tensors["mask"] = tensors["labels"].clamp(min=0), torch.ones_like(tensors["mask"])
        student, teacher = tensors["student_logits"], tensors["teacher_logits"]
        student[0] = student[0].sort().values * 40  # every chunk outgrows the one before
        student[1, 2500] = 300.0  # one late outlier
        for logits in (student, teacher):
            logits[2, 1100:1200] = -torch.inf  # classes ruled out, in the middle and from the start
            logits[3, :1500] = -torch.inf
        tensors["labels"][2:4] = 2999
        keywords = {"divergence": divergence, "hard_weight": hard_weight}
        fresh, inplace = ours(tensors, "cpp", **keywords), ours(tensors, "cpp", inplace=True, **keywords)
        assert fresh.value.isfinite() and fresh.gradients["student_logits"].isfinite().all()
        assert torch.equal(inplace.value, fresh.value)
        assert torch.equal(inplace.gradients["student_logits"], fresh.gradients["student_logits"])


@needs_kernel
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
def test_hard_labels_at_a_high_temperature(divergence):
    """A late outlier that is harmless divided by T overflows at T = 1, where the hard part is taken."""
    tensors = inputs((2, 3000), torch.float32, scale=1.0)
    tensors["labels"], tensors["mask"] = torch.tensor([7, 2500]), torch.ones_like(tensors["mask"])
    tensors["student_logits"][:, 2500] = 120.0
    keywords = {"divergence": divergence, "temperature": 10.0, "hard_weight": 0.5}
    expected, found = ours(tensors, "reference", **keywords), ours(tensors, "cpp", **keywords)
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.gradients["student_logits"], expected.gradients["student_logits"])


@needs_kernel
def test_inplace_uses_the_storage_of_the_logits():
    """Through a linear layer: weight gradients bit for bit as with a fresh gradient, and no second buffer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 100)
    features, teacher = torch.randn(5, 8), torch.randn(5, 100)
    soft_target_loss(layer(features), teacher).backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    logits = layer(features)
    handed_back: list[int] = []
    logits.register_hook(lambda gradient: handed_back.append(gradient.data_ptr()))
    soft_target_loss(logits, teacher, inplace=True).backward()
    assert handed_back == [logits.data_ptr()]
    assert torch.equal(layer.weight.grad, expected)


@needs_kernel
@pytest.mark.parametrize("producer", [torch.tanh, torch.sigmoid, torch.exp, lambda x: x.softmax(-1)])
def test_inplace_raises_for_a_producer_that_saved_its_output(producer):
    leaf = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = soft_target_loss(producer(leaf), torch.zeros(3, 5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
def test_inplace_raises_for_another_user_of_the_logits():
    leaf = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    logits = leaf.clone()
    other = logits.square().sum()
    loss = soft_target_loss(logits, torch.zeros(3, 5), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


@needs_kernel
def test_inplace_through_a_view():
    """Logits flattened to [tokens, classes]: same gradient, and the base's version counts as well."""
    tensors = inputs((2, 3, 40))
    expected = ours(tensors, "cpp").gradients["student_logits"] * 2
    leaf = tensors["student_logits"].requires_grad_()
    flat = leaf.clone().view(6, 40)
    loss = soft_target_loss(flat, tensors["teacher_logits"].view(6, 40), mask=tensors["mask"].view(6),
                            labels=tensors["labels"].view(6), inplace=True)  # fmt: skip
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected)
    logits = leaf.tanh()
    loss = soft_target_loss(logits.view(6, 40), tensors["teacher_logits"].view(6, 40), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernel
def test_inplace_refusals():
    teacher = torch.zeros(4, 6)
    leaf = torch.zeros(4, 6, requires_grad=True)
    for logits in (leaf, leaf.view(4, 6)):
        with pytest.raises(ValueError, match="overwrite a leaf"):
            soft_target_loss(logits, teacher, inplace=True)
    with pytest.raises(ValueError, match="needs contiguous student_logits"):
        soft_target_loss(leaf[:1].clone().expand(4, -1), teacher, inplace=True)
    with pytest.raises(ValueError, match="needs contiguous student_logits"):
        soft_target_loss(torch.cat([leaf, leaf], 1)[:, :6], teacher, inplace=True)
    with pytest.raises(ValueError, match="needs a fused kernel"):
        soft_target_loss(leaf.clone(), teacher, inplace=True, impl="reference")


# -------------------------------------------------------------------------------- errors

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"divergence": "kl"}, ValueError, "divergence must be one of forward_kl, .* got 'kl'"),
    ({"reduction": "batchmean"}, ValueError, "reduction must be one of mean, sum, none, got 'batchmean'"),
    ({"temperature": 0.0}, ValueError, "temperature must be a finite number above 0, got 0"),
    ({"temperature": -1.0}, ValueError, "temperature must be a finite number above 0, got -1"),
    ({"temperature": math.nan}, ValueError, "temperature must be a finite number above 0, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be a finite number above 0, got inf"),
    ({"divergence": "mse", "temperature": 2.0}, ValueError, "temperature must be 1 with divergence='mse'"),
    ({"hard_weight": 1.5}, ValueError, r"hard_weight must lie in \[0, 1\], got 1.5"),
    ({"hard_weight": math.nan}, ValueError, r"hard_weight must lie in \[0, 1\], got nan"),
    ({"hard_weight": 0.5, "labels": None}, ValueError, "hard_weight=0.5 needs labels"),
    ({"jsd_beta": -0.1}, ValueError, r"jsd_beta must lie in \[0, 1\], got -0.1"),
    ({"num_items": 0}, ValueError, "num_items must be above 0, got 0"),
    (
        {"num_items": torch.ones(2)},
        ValueError,
        r"num_items must be a number or a tensor of one element, got shape \[2\]",
    ),
    (
        {"num_items": 4, "reduction": "sum"},
        ValueError,
        "num_items replaces the denominator of reduction='mean'",
    ),
    (
        {"student_logits": torch.zeros(4, 6, dtype=torch.long)},
        TypeError,
        "student_logits must be a floating-point",
    ),
    ({"student_logits": torch.zeros(4, 0)}, ValueError, r"at least one class, got \[4, 0\]"),
    ({"student_logits": torch.tensor(1.0)}, ValueError, r"must have shape \[\*, C\]"),
    (
        {"teacher_logits": torch.zeros(4, 6, dtype=torch.long)},
        TypeError,
        "teacher_logits must be a floating-point",
    ),
    (
        {"teacher_logits": torch.zeros(4, 7)},
        ValueError,
        "teacher_logits must have the student's classes .* 7 against 6",
    ),
    (
        {"teacher_logits": torch.zeros(5, 6)},
        ValueError,
        r"must match student_logits, got \[5, 6\] vs \[4, 6\]",
    ),
    (
        {"teacher_logits": torch.zeros(1, 6)},
        ValueError,
        r"must match student_logits, got \[1, 6\] vs \[4, 6\]",
    ),
    ({"teacher_logits": torch.zeros(6)}, ValueError, r"must match student_logits, got \[6\] vs \[4, 6\]"),
    (
        {"teacher_logits": torch.zeros(4, 6, requires_grad=True)},
        RuntimeError,
        "teacher_logits requires grad.*detach",
    ),
    (
        {"teacher_logits": torch.zeros(4, 6, device="meta")},
        ValueError,
        "teacher_logits must be on cpu .* got meta",
    ),
    ({"labels": torch.zeros(4)}, TypeError, "labels must hold integer class ids, got torch.float32"),
    (
        {"labels": torch.zeros(4, dtype=torch.bool)},
        TypeError,
        "labels must hold integer class ids, got torch.bool",
    ),
    ({"labels": torch.zeros(4, 1, dtype=torch.long)}, ValueError, r"one id per row, \[4\], got \[4, 1\]"),
    ({"labels": torch.zeros(4, dtype=torch.long, device="meta")}, ValueError, "labels must be on cpu"),
    ({"mask": torch.zeros(4)}, TypeError, "mask must be boolean or integer .* got torch.float32"),
    (
        {"mask": torch.zeros(3, dtype=torch.bool)},
        ValueError,
        r"mask must have one entry per row, \[4\], got \[3\]",
    ),
    ({"mask": torch.zeros(4, dtype=torch.bool, device="meta")}, ValueError, "mask must be on cpu"),
    ({"impl": "fast"}, ValueError, "impl must be one of auto, .* got 'fast'"),
    ({"impl": "triton"}, ValueError, "impl='triton' does not run on device 'cpu'"),
    ({"impl": "cuda"}, ValueError, "impl='cuda' does not run on device 'cpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments: dict[str, Any] = {
        "student_logits": torch.zeros(4, 6), "teacher_logits": torch.zeros(4, 6),
        "labels": torch.zeros(4, dtype=torch.long),
    }  # fmt: skip
    soft_target_loss(**arguments)
    with pytest.raises(error, match=f"^soft_target: .*{message}"):
        soft_target_loss(**{**arguments, **change})


@pytest.mark.parametrize("label", [6, -1, 10**6, -101])
@pytest.mark.parametrize("classes", [6, 1030])
@each_implementation
def test_label_out_of_range(impl, classes, label):
    """Never a read outside the row. (-100 is the default ignore_index, and any label of a masked row is
    fine.)"""
    labels = torch.tensor([0, label if label != 6 else classes, -100, 5])
    logits = torch.zeros(4, classes)
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"labels|out of bounds"):
        soft_target_loss(logits, logits, labels, hard_weight=0.5, impl=impl)
    mask = torch.tensor([True, False, True, True])
    soft_target_loss(logits, logits, labels, hard_weight=0.5, mask=mask, impl=impl)


@needs_kernel
def test_error_text_of_the_op_itself():
    """torch.ops is reachable too: it refuses what it cannot do instead of reading past the end."""
    student, teacher = torch.zeros(4, 6), torch.zeros(4, 5)
    with pytest.raises(RuntimeError, match="teacher"):
        torch.ops.pydistill.soft_target(student, teacher, *op_options({}, {}), True)


# -------------------------------------------------------------------------------- sparse teacher


def top_k(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the k most likely classes."""
    log_probs, ids = teacher.log_softmax(-1).topk(k, dim=-1)
    return ids, log_probs


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
def test_sparse_teacher_with_all_classes_is_the_dense_one(divergence, temperature):
    tensors = inputs((2, 5, 12), torch.float64)
    keywords = {"divergence": divergence, "temperature": temperature, "hard_weight": 0.3}
    dense = ours(tensors, "reference", **keywords)
    ids, log_probs = top_k(tensors.pop("teacher_logits"), 12)
    sparse = run(
        sparse_soft_target_loss,
        {**tensors, "teacher_ids": ids, "teacher_log_probs": log_probs}, keywords, ("student_logits",),
    )  # fmt: skip
    torch.testing.assert_close(sparse.value, dense.value)
    torch.testing.assert_close(sparse.gradients, dense.gradients)


def test_sparse_teacher_is_the_coarse_grained_divergence():
    """K classes and one outcome for the rest: values by hand, at most the dense KL, and a gradcheck."""
    tensors = inputs((6, 15), torch.float64)
    student, teacher = tensors["student_logits"], tensors["teacher_logits"]
    ids, log_probs = top_k(teacher, 4)
    listed = torch.zeros(6, 15, dtype=torch.bool).scatter(-1, ids, True)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = []
    for row in range(6):
        coarse_p = torch.cat([p[row, listed[row]], p[row, ~listed[row]].sum()[None]])
        coarse_q = torch.cat([q[row, listed[row]], q[row, ~listed[row]].sum()[None]])
        expected.append((coarse_p * (coarse_p / coarse_q).log()).sum())
    found = sparse_soft_target_loss(student, ids, log_probs, reduction="none")
    torch.testing.assert_close(found, torch.stack(expected))
    assert bool((found <= soft_target_loss(student, teacher, reduction="none") + 1e-12).all())
    assert torch.autograd.gradcheck(
        lambda logits: sparse_soft_target_loss(logits, ids, log_probs, temperature=2.0),
        (student.requires_grad_(),),
    )


def test_sparse_teacher_masks_and_errors():
    tensors = inputs((8, 15))
    ids, log_probs = top_k(tensors["teacher_logits"], 3)
    student, mask = tensors["student_logits"].requires_grad_(), tensors["mask"]
    dirty_ids, dirty = ids.masked_fill(~mask[:, None], 10**9), log_probs.masked_fill(~mask[:, None], math.nan)
    found = sparse_soft_target_loss(student, dirty_ids, dirty, mask=mask)
    found.backward()
    assert float(student.grad[~mask].abs().sum()) == 0.0
    expected = sparse_soft_target_loss(student.detach()[mask], ids[mask], log_probs[mask])
    torch.testing.assert_close(found.detach(), expected)
    plain = student.detach()
    for arguments, error, message in (
        ((plain, ids.float(), log_probs), TypeError, "teacher_ids must hold integer class ids"),
        ((plain, ids, ids), TypeError, "teacher_log_probs must be a floating-point"),
        (
            (plain, ids, log_probs[:, :2]),
            ValueError,
            "teacher_ids and teacher_log_probs must both have shape",
        ),
        ((plain[:, :2], ids, log_probs), ValueError, "between 1 and C=2 classes per row, got 3"),
        ((plain, ids, log_probs.clone().requires_grad_()), RuntimeError, "teacher_log_probs requires grad"),
    ):
        with pytest.raises(error, match=f"soft_target: .*{message}"):
            sparse_soft_target_loss(*arguments)
    with pytest.raises(ValueError, match="'mse' needs the teacher's full logits"):
        sparse_soft_target_loss(plain, ids, log_probs, divergence="mse")
    with pytest.raises(ValueError, match="no kernel for a sparse teacher"):
        sparse_soft_target_loss(plain, ids, log_probs, impl="cpp")


# -------------------------------------------------------------------------------- objective term


def test_objective_term_is_the_function():
    tensors = inputs((8, 15))
    student, teacher = {"logits": tensors["student_logits"]}, {"logits": tensors["teacher_logits"]}
    batch = {"labels": tensors["labels"]}
    term = SoftTarget(weight=2.0, divergence="jsd", jsd_beta=0.3, temperature=2.0, hard_weight=0.5)
    expected = soft_target_loss(
        tensors["student_logits"], tensors["teacher_logits"], tensors["labels"],
        divergence="jsd", jsd_beta=0.3, temperature=2.0, hard_weight=0.5, num_items=9,
    )  # fmt: skip
    assert torch.equal(term(student, teacher, batch, num_items=9), expected)  # the weight is the objective's business
    assert (term.weight, term.name) == (2.0, "soft_target")
    assert (term.student_signals, term.teacher_signals) == ({"logits"}, {"logits"})
    assert list(term.state_dict()) == []
    assert "divergence='jsd'" in repr(term)


def test_objective_term_without_teacher():
    """hard_weight = 1 is plain cross-entropy: it must not make anybody run a teacher."""
    tensors = inputs((8, 15))
    term = SoftTarget(hard_weight=1.0)
    assert term.teacher_signals == frozenset()
    value = term({"logits": tensors["student_logits"]}, {}, {"labels": tensors["labels"]})
    torch.testing.assert_close(value, F.cross_entropy(tensors["student_logits"], tensors["labels"]))
    with pytest.raises(ValueError, match="hard_weight=1 needs integer labels"):
        term({"logits": tensors["student_logits"]}, {}, {})
    with pytest.raises(ValueError, match="divergence must be one of"):
        SoftTarget(divergence="kl")


# -------------------------------------------------------------------------------- instruction sets, processes


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(isa):
    check_instruction_set(isa, __file__)


@needs_kernel
def test_unknown_instruction_set_is_refused():
    with pytest.raises(ChildError, match=r"PYDISTILL_ISA must be one of .*got 'sse9'"):
        in_a_new_process(["-c", "import pydistill"], PYDISTILL_ISA="sse9")


def test_without_native_code():
    """PYDISTILL_NATIVE=0: the reference runs and says so; asking for the kernel raises."""
    code = (
        "import torch, pydistill; from pydistill import _dispatch\n"
        "assert _dispatch.native is None\n"
        "print(_dispatch.environment()['native'])\n"
        "s, t = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)\n"
        "pydistill.soft_target_loss(s, t).backward()\n"
        "try: pydistill.soft_target_loss(s, t, impl='cpp')\n"
        "except RuntimeError as error: print(error)\n"
    )
    printed = in_a_new_process(["-W", "error", "-c", code], PYDISTILL_NATIVE="0")
    assert "PYDISTILL_NATIVE=0 is set" in printed
    assert "impl='cpp' is not available: PYDISTILL_NATIVE=0 is set" in printed
    if os.environ.get("PYDISTILL_NATIVE") != "0":
        assert "passed" in in_a_new_process([*numerics_of(__file__), "-k", "golden or budget"], PYDISTILL_NATIVE="0")


def test_import_is_light():
    """Importing the package must not load transformers, datasets or triton."""
    code = (
        "import sys, pydistill\nprint([name for name in ('transformers', 'datasets', 'triton') if name in sys.modules])"
    )
    assert in_a_new_process(["-c", code]).strip() == "[]"
