# SPDX-License-Identifier: Apache-2.0
"""What the CUDA soft_target does beyond the numerics tests of all implementations.

tests/test_simt.py runs this file in a process where ``impl="cuda"`` runs on the CPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import SOFT_TARGET, run
from torch import Tensor

from pydistill import soft_target_loss

inputs = SOFT_TARGET.inputs
each_order = pytest.mark.parametrize("order", ["forward", "reverse", "random"])
ops = torch.ops.pydistill_simt


def options(tensors: dict[str, Tensor], **keywords: object) -> tuple[object, ...]:
    defaults = {
        "labels": tensors["labels"], "mask": tensors["mask"], "num_items": None, "divergence": "forward_kl",
        "temperature": 1.0, "hard_weight": 0.5, "jsd_beta": 0.5, "scale_by_temperature": True, "ignore_index": -100,
        "reduction": "mean",
    }  # fmt: skip
    return tuple({**defaults, **keywords}.values())


@pytest.mark.parametrize("shared", [232448, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "mse", "cross_entropy"])
def test_in_place_and_order_of_threads_change_no_bit(divergence, dtype, shared, monkeypatch):
    """Rows at odd addresses between NaN, kept in shared memory or read again."""
    for rows, classes in ((9, 3), (5, 41), (3, 1027)):
        clean = inputs((rows, classes), dtype, seed=classes)
        arguments = options(clean, divergence=divergence)
        monkeypatch.setenv("PYDISTILL_SIMT_ORDER", "forward")
        monkeypatch.setenv("PYDISTILL_SIMT_SHARED", "232448")
        expected = ops.soft_target(clean["student_logits"], clean["teacher_logits"], *arguments, True)
        monkeypatch.setenv("PYDISTILL_SIMT_SHARED", str(shared))
        for order, offset in (("reverse", 64), ("random", 65)):
            monkeypatch.setenv("PYDISTILL_SIMT_ORDER", order)
            buffers = [torch.full((rows * classes + 200,), math.nan, dtype=dtype) for _ in range(2)]
            student, teacher = (buffer[offset : offset + rows * classes].view(rows, classes) for buffer in buffers)
            student.copy_(clean["student_logits"])
            teacher.copy_(clean["teacher_logits"])
            fresh = ops.soft_target(student, teacher, *arguments, True)
            loss, scale = ops.soft_target_(student, teacher, *arguments)
            for found in (fresh, (loss, student, scale)):
                assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
            for buffer in buffers:
                assert bool(buffer[:offset].isnan().all())
                assert bool(buffer[offset + rows * classes :].isnan().all())


def test_in_place_through_autograd():
    tensors = inputs((6, 40))
    fresh, inplace = (
        run(soft_target_loss, tensors, {"impl": "cuda", "inplace": inplace, "hard_weight": 0.5}, ("student_logits",))
        for inplace in (False, True)
    )
    assert torch.equal(fresh.value, inplace.value)
    assert torch.equal(fresh.gradients["student_logits"], inplace.gradients["student_logits"])


def test_a_label_that_is_no_class_makes_its_row_nan():
    for classes in (3, 40, 1031):
        tensors = inputs((4, classes))
        labels = torch.tensor([0, classes, -3, -100])
        arguments = options({"labels": labels, "mask": None}, reduction="none")
        loss, gradient, _ = ops.soft_target(tensors["student_logits"], tensors["teacher_logits"], *arguments, True)
        assert loss.isnan().tolist() == [False, True, True, False]
        assert gradient.isnan().any(-1).tolist() == [False, True, True, False]
        # Where there is no hard part, labels only say which rows count.
        arguments = options({"labels": labels, "mask": None}, reduction="none", hard_weight=0.0)
        assert bool(
            ops.soft_target(tensors["student_logits"], tensors["teacher_logits"], *arguments, True)[0].isfinite().all()
        )


def test_half_precision_leaves_a_power_of_two_to_backward():
    """Together with the gradient it is what the CPU kernel hands over."""
    tensors = inputs((37, 50), torch.float16)
    for items in (None, torch.tensor(5.5), torch.tensor(1024.0), torch.tensor(37)):
        arguments = options(tensors, num_items=items)
        found = ops.soft_target(tensors["student_logits"], tensors["teacher_logits"], *arguments, True)
        expected = torch.ops.pydistill.soft_target(
            tensors["student_logits"], tensors["teacher_logits"], *arguments, True
        )
        assert torch.equal(found[2], expected[2])
        assert math.frexp(float(found[2]))[0] == 0.5
        torch.testing.assert_close(found[1], expected[1])


def test_fp64_names_the_way_out():
    tensors = inputs((4, 5), torch.float64)
    with pytest.raises(RuntimeError, match=r"fp32, bf16 and fp16, got fp64; use impl='reference'"):
        soft_target_loss(tensors["student_logits"], tensors["teacher_logits"], impl="cuda")


@each_order
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scale_rows(dtype, order, monkeypatch):
    monkeypatch.setenv("PYDISTILL_SIMT_ORDER", order)
    for rows, columns in ((1, 1), (3, 5), (7, 64), (257, 3), (2, 5000)):
        for offset in (0, 1):
            buffer = torch.full((rows * columns + 16,), math.nan, dtype=dtype)
            x = buffer[offset : offset + rows * columns].view(rows, columns)
            x.copy_(inputs((rows, columns), dtype)["student_logits"])
            for scale in (torch.tensor(0.3), torch.tensor([0.3]), torch.linspace(-1.0, 1.0, rows), torch.ones(())):
                expected = (x.float() * (scale.view(-1, 1) if scale.numel() > 1 else scale)).to(dtype)
                ops.scale_rows_(x, scale)
                assert torch.equal(x, expected)
            assert bool(buffer[offset + rows * columns :].isnan().all())
    garbage = torch.tensor([[math.nan, math.inf], [1.0, 2.0]], dtype=dtype)
    ops.scale_rows_(garbage, torch.tensor([1.0, 2.0]))
    assert garbage[1].tolist() == [2.0, 4.0]
    with pytest.raises(RuntimeError, match="got fp64"):
        ops.scale_rows_(torch.ones(2, 2, dtype=torch.float64), torch.tensor(2.0))
