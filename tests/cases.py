# SPDX-License-Identifier: Apache-2.0
"""One LossCase per loss: what the tests need to know to drive it forward, backward and against float64.

A new loss adds one LossCase here and one test module beside this file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydistill import _dispatch
from pydistill.losses import attention_relation, linear_soft_target, projected_mse, soft_target

Tensors = dict[str, Tensor]
Keywords = Mapping[str, Any]

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# PYDISTILL_TEST_IMPL: one implementation alone, in a process where it runs on the CPU (tests/test_triton.py).
IMPLEMENTATIONS = [os.environ["PYDISTILL_TEST_IMPL"]] if "PYDISTILL_TEST_IMPL" in os.environ else ["reference"]
if "PYDISTILL_TEST_IMPL" not in os.environ and _dispatch.BACKENDS["soft_target"]["cpp"].available:
    IMPLEMENTATIONS.insert(0, "cpp")


@dataclass(frozen=True)
class LossCase:
    """A loss under test.

    Attributes:
        loss: the public function, taking the tensors by name, `impl` and the keywords of a variant.
        reference: the specification, with the same arguments less `impl`.
        differentiable: names of the tensors that receive a gradient, as far as they are given.
        inputs: (shape, dtype, seed=, scale=) -> all tensors by argument name, optional ones included.
        variants: name -> keywords. The key "tensors" lists the optional tensors that the variant is given.
    """

    name: str
    loss: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    differentiable: tuple[str, ...]
    inputs: Callable[..., Tensors]
    variants: Mapping[str, Keywords]
    optional: tuple[str, ...] = ()

    def select(self, tensors: Tensors, variant: str) -> tuple[Tensors, dict[str, Any]]:
        """The tensors that `variant` takes, and its keywords."""
        keywords = dict(self.variants[variant])
        wanted = keywords.pop("tensors", ())
        return {key: value for key, value in tensors.items() if key not in self.optional or key in wanted}, keywords


@dataclass(frozen=True)
class Outcome:
    """What one forward and backward gave."""

    value: Tensor
    gradients: Tensors


def run(loss: Callable[..., Tensor], tensors: Tensors, keywords: Keywords, differentiable: Sequence[str]) -> Outcome:
    """Forward and backward.

    The incoming gradient is not 1, and differs by row for a loss without reduction. It consists of powers of
    two, by which a gradient in low precision can be multiplied without another rounding.
    """
    leaves = {key: tensors[key].detach().requires_grad_() for key in differentiable if key in tensors}
    arguments = {**tensors, **leaves}
    if keywords.get("inplace"):
        # Leaves cannot be overwritten; clone() is an operation that does not need its output again.
        arguments = {**tensors, **{key: leaf.clone() for key, leaf in leaves.items()}}
    value = loss(**arguments, **keywords)
    incoming = 2.0 ** (torch.arange(value.numel(), dtype=value.dtype) % 3 - 1).view_as(value)
    gradients = torch.autograd.grad(value, list(leaves.values()), incoming)
    return Outcome(value.detach(), dict(zip(leaves, gradients, strict=True)))


def truth(case: LossCase, tensors: Tensors, keywords: Keywords) -> Outcome:
    """The reference in float64, on the same (rounded) inputs."""
    exact = {key: value.double() if value.is_floating_point() else value for key, value in tensors.items()}
    return run(case.reference, exact, keywords, case.differentiable)


def assert_within_budget(
    found: Outcome, reference: Outcome, exact: Outcome, *, floor: float = 0.0, value_floor: float = 0.0
) -> None:
    """`|found - exact| <= |reference - exact| + small`, for the value and for each gradient.

    The reference has the same input dtype. `small` is a few roundings of the result, and for gradients an
    eighth of the rounding of 1, because a softmax that saturates leaves only rounding. `floor` is for values
    that are small differences of large numbers, `value_floor` for those whose gradients are not. An fp16
    gradient may be rounded once more: the division by the number of rows is left to backward, where a loss
    scaler keeps the quotient in range. Errors are judged by the worst element, and by their 2-norm, so that
    a bias of many small errors cannot hide behind one large rounding.
    """
    _assert_closer("value", found.value, reference.value, exact.value, floor + value_floor, 0.0)
    for key, gradient in exact.gradients.items():
        mine = found.gradients[key]
        assert mine.dtype == reference.gradients[key].dtype
        assert mine.shape == gradient.shape
        lowest = floor + (1e-17 if mine.dtype == torch.float64 else 1.5e-8)
        again = torch.finfo(torch.float16).eps / 2 if mine.dtype == torch.float16 else 0.0
        _assert_closer(f"gradient of {key}", mine, reference.gradients[key], gradient, lowest, again)


def _assert_closer(what: str, found: Tensor, reference: Tensor, exact: Tensor, floor: float, rounding: float) -> None:
    relative = rounding + (1e-13 if found.dtype == torch.float64 else 1e-6)
    # Infinite entries (a KL without common support) have no distance: they must be the same.
    finite = exact.isfinite()
    torch.testing.assert_close(found.double()[~finite], exact[~finite], equal_nan=True)
    found, reference, exact = (tensor.double()[finite] for tensor in (found, reference, exact))
    if exact.numel() == 0:
        return
    assert bool(found.isfinite().all()), f"{what}: not finite where the truth is"
    for name, size in (("worst error", lambda x: x.abs().max()), ("norm of errors", lambda x: x.norm())):
        error, allowed = size(found - exact), size(reference - exact)
        small = relative * size(exact) + floor * (1 if name == "worst error" else exact.numel() ** 0.5)
        assert error <= 1.02 * allowed + small, f"{what}: {name} {error:.3e}, reference {allowed:.3e} + {small:.3e}"


def soft_target_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int = 0, scale: float = 3.0
) -> Tensors:
    """Normal logits of the given scale; about one row in five is masked and one in five has an ignored
    label."""
    generator = torch.Generator().manual_seed(seed)
    *rows, classes = shape
    student = torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)
    teacher = torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(scale).to(dtype)
    labels = torch.randint(classes, rows, generator=generator)
    labels = labels.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100)
    mask = torch.rand(rows, generator=generator) > 0.2
    return {"student_logits": student, "teacher_logits": teacher, "labels": labels, "mask": mask}


SOFT_TARGET = LossCase(
    name="soft_target",
    loss=soft_target.soft_target_loss,
    reference=soft_target.soft_target_reference,
    differentiable=("student_logits",),
    inputs=soft_target_inputs,
    optional=("labels", "mask"),
    variants={
        "forward_kl": {},
        # At T = 1, 2 and 4 the soft and the hard part can share exponentials, at other temperatures not.
        "forward_kl T=2": {"temperature": 2.0},
        "forward_kl T=0.7": {"temperature": 0.7, "scale_by_temperature": False},
        "kl+ce T=1": {"hard_weight": 0.3, "tensors": ("labels",)},
        "kl+ce T=2": {"temperature": 2.0, "hard_weight": 0.5, "tensors": ("labels", "mask")},
        "kl+ce T=3": {"temperature": 3.0, "hard_weight": 0.3, "tensors": ("labels",)},
        "kl+ce T=4": {"temperature": 4.0, "hard_weight": 0.7, "tensors": ("labels",)},
        "ce alone": {"hard_weight": 1.0, "tensors": ("labels",)},
        "reverse_kl": {"divergence": "reverse_kl", "tensors": ("mask",)},
        "reverse_kl+ce T=2": {
            "divergence": "reverse_kl", "temperature": 2.0, "hard_weight": 0.5, "tensors": ("labels",)
        },
        "jsd": {"divergence": "jsd"},
        "jsd 0.1 T=2": {"divergence": "jsd", "jsd_beta": 0.1, "temperature": 2.0, "tensors": ("mask",)},
        "jsd 0.9+ce": {"divergence": "jsd", "jsd_beta": 0.9, "hard_weight": 0.4, "tensors": ("labels",)},
        "jsd 0": {"divergence": "jsd", "jsd_beta": 0.0},
        "jsd 1": {"divergence": "jsd", "jsd_beta": 1.0},
        "mse": {"divergence": "mse"},
        "mse+ce": {"divergence": "mse", "hard_weight": 0.5, "tensors": ("labels", "mask")},
        "cross_entropy": {"divergence": "cross_entropy", "tensors": ("mask",)},
        "cross_entropy+ce T=2": {
            "divergence": "cross_entropy", "temperature": 2.0, "hard_weight": 0.5, "tensors": ("labels",)
        },
        "sum": {"reduction": "sum", "tensors": ("mask",)},
        "none": {"reduction": "none", "hard_weight": 0.5, "temperature": 2.0, "tensors": ("labels", "mask")},
        "num_items": {"num_items": 37, "tensors": ("mask",)},
        "num_items tensor": {"num_items": torch.tensor(5.5), "tensors": ("mask",)},
    },
)  # fmt: skip


def linear_soft_target_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int = 0, scale: float = 3.0
) -> Tensors:
    """`shape` is (*, ds, dt, C). Normal hidden states and output layers that give logits of the given scale; labels and
    mask as those of `soft_target_inputs`."""
    generator = torch.Generator().manual_seed(seed)
    *rows, student_size, teacher_size, classes = shape

    def normal(*sizes: int, factor: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).mul_(factor).to(dtype)

    labels = torch.randint(classes, rows, generator=generator)
    return {
        "student_hidden": normal(*rows, student_size),
        "student_weight": normal(classes, student_size, factor=scale * student_size**-0.5),
        "student_bias": normal(classes, factor=0.3 * scale),
        "teacher_hidden": normal(*rows, teacher_size),
        "teacher_weight": normal(classes, teacher_size, factor=scale * teacher_size**-0.5),
        "teacher_bias": normal(classes, factor=0.3 * scale),
        "labels": labels.masked_fill(torch.rand(rows, generator=generator) < 0.2, -100),
        "mask": torch.rand(rows, generator=generator) > 0.2,
    }


LINEAR_SOFT_TARGET = LossCase(
    name="linear_soft_target",
    loss=linear_soft_target.linear_soft_target_loss,
    reference=linear_soft_target.linear_soft_target_reference,
    differentiable=("student_hidden", "student_weight", "student_bias"),
    inputs=linear_soft_target_inputs,
    optional=("student_bias", "teacher_bias", "labels", "mask"),
    variants={
        "plain": {},
        "biases": {"tensors": ("student_bias", "teacher_bias")},
        "kl+ce T=2": {"temperature": 2.0, "hard_weight": 0.5, "tensors": ("student_bias", "labels", "mask")},
        "reverse_kl": {"divergence": "reverse_kl", "tensors": ("mask",)},
        "jsd 0.1": {"divergence": "jsd", "jsd_beta": 0.1, "tensors": ("teacher_bias", "labels")},
        "sum": {"reduction": "sum", "tensors": ("mask",)},
        "none": {"reduction": "none", "hard_weight": 0.5, "tensors": ("student_bias", "labels", "mask")},
        "num_items": {"num_items": 37, "tensors": ("mask",)},
        "num_items tensor": {"num_items": torch.tensor(5.5), "tensors": ("student_bias",)},
    },
)


def attention_relation_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int = 0, scale: float = 1.0
) -> Tensors:
    """`shape` is (B, H, N, ds, dt). Normal features; a mask with right padding in the first row, left padding in
    the second and holes in all; up to four packed sequences a row whose tokens are mixed, and negative ids."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, positions, student_size, teacher_size = shape

    def features(size: int) -> Tensor:
        drawn = torch.randn(batch, heads, positions, size, generator=generator, dtype=torch.float64)
        return drawn.mul_(scale).to(dtype)

    tensors = {
        "student_a": features(student_size), "student_b": features(student_size),
        "teacher_a": features(teacher_size), "teacher_b": features(teacher_size),
    }  # fmt: skip
    mask = torch.rand(batch, positions, generator=generator) > 0.15
    mask[:1, positions - positions // 4 :] = False
    mask[1:2, : positions // 3] = False
    ids = torch.tensor([7, 0, 2**40, 3, -1, -100])
    segments = ids[torch.randint(len(ids), (batch, positions), generator=generator)]
    return {**tensors, "mask": mask, "segment_ids": segments}


_CROSS: Keywords = {"tensors": ("student_b", "teacher_b")}
_SELF: Keywords = {"student_b": None, "teacher_b": None}


def _with(kind: Keywords, *tensors: str, **keywords: Any) -> Keywords:
    return {**kind, **keywords, "tensors": (*kind.get("tensors", ()), *tensors)}


# Widths H * ds and H * dt have to be multiples of 12.
ATTENTION_RELATION = LossCase(
    name="attention_relation",
    loss=attention_relation.attention_relation_loss,
    reference=attention_relation.attention_relation_reference,
    differentiable=("student_a", "student_b"),
    inputs=attention_relation_inputs,
    optional=("student_b", "teacher_b", "mask", "segment_ids"),
    variants={
        "cross": _CROSS,
        "self": _SELF,
        "cross mask": _with(_CROSS, "mask"),
        "self mask": _with(_SELF, "mask"),
        "cross segments": _with(_CROSS, "segment_ids"),
        "self segments": _with(_SELF, "segment_ids"),
        "cross causal": _with(_CROSS, causal=True),
        "self causal": _with(_SELF, causal=True),
        "cross mask segments causal": _with(_CROSS, "mask", "segment_ids", causal=True),
        "self mask segments causal": _with(_SELF, "mask", "segment_ids", causal=True),
        # Joined heads, heads that are cut, and more heads than there were.
        "cross 1 relation head": _with(_CROSS, "mask", relation_heads=1),
        "self 4 relation heads": _with(_SELF, "mask", relation_heads=4),
        "cross 12 relation heads": _with(_CROSS, "segment_ids", relation_heads=12),
        "scale": _with(_CROSS, "mask", scale=0.7),
        "token_mean": _with(_CROSS, "mask", "segment_ids", reduction="token_mean"),
        "sum": _with(_SELF, "mask", reduction="sum"),
        "cross none": _with(_CROSS, "mask", "segment_ids", reduction="none"),
        "self none": _with(_SELF, "mask", reduction="none", causal=True, relation_heads=4),
        "num_items": _with(_CROSS, "mask", num_items=37),
        "num_items tensor": _with(_SELF, "mask", num_items=torch.tensor(5.5), reduction="token_mean"),
    },
)


def projected_mse_inputs(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int = 0, scale: float = 1.0
) -> Tensors:
    """`shape` is (*, ds, dt). Normal hidden states, a projection up that keeps their scale, and a bias;
    about one row in five is masked. `down` makes the other direction of it."""
    generator = torch.Generator().manual_seed(seed)
    *rows, student_size, teacher_size = shape

    def normal(*sizes: int, factor: float = 1.0) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).mul_(factor).to(dtype)

    return {
        "student": normal(*rows, student_size, factor=scale),
        "teacher": normal(*rows, teacher_size, factor=scale),
        "projection": normal(student_size, teacher_size, factor=student_size**-0.5),
        "bias": normal(teacher_size, factor=0.3 * scale),
        "mask": torch.rand(rows, generator=generator) > 0.2,
    }


def down(tensors: Tensors) -> Tensors:
    """The same with the teacher projected: the student's projection and bias turned into those of the teacher."""
    projection = tensors["projection"]
    found = {**tensors, "projection": projection.T.contiguous()}
    if "bias" in tensors:
        found["bias"] = torch.linspace(-0.4, 0.5, projection.size(0)).to(projection.dtype)
    return found


# Sizes differ in the shapes that tests take, so that the projection says its direction.
PROJECTED_MSE = LossCase(
    name="projected_mse",
    loss=projected_mse.projected_mse_loss,
    reference=projected_mse.projected_mse_reference,
    differentiable=("student", "projection", "bias"),
    inputs=projected_mse_inputs,
    optional=("bias", "mask"),
    variants={
        "plain": {},
        "bias": {"tensors": ("bias",)},
        "mask": {"tensors": ("mask",)},
        "normalize": {"normalize": True},
        "normalize bias mask": {"normalize": True, "tensors": ("bias", "mask")},
        "sum": {"reduction": "sum", "tensors": ("mask",)},
        "none": {"reduction": "none", "tensors": ("bias", "mask")},
        "none normalize": {"reduction": "none", "normalize": True, "tensors": ("mask",)},
        "num_items": {"num_items": 37, "tensors": ("mask",)},
        "num_items tensor": {"num_items": torch.tensor(5.5), "tensors": ("bias", "mask")},
    },
)
