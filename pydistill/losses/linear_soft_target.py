# SPDX-License-Identifier: Apache-2.0
"""Output layer and soft-target loss in one, for vocabularies whose logits would be the largest tensor of a step.

Reads top to bottom: the reference (the specification), the argument checks, the walk over chunks of rows and its
autograd, the public function.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from pydistill import _dispatch
from pydistill.losses import soft_target
from pydistill.losses.checks import check_detached, on_device, shape
from pydistill.losses.gradient import check_first_order, scaled

LOSS = "linear_soft_target"
# Logits of one side that exist at a time, in elements, by type of device: what the caches of a processor hold, and
# enough to fill a GPU. But never fewer rows than make the products of a chunk take longer than it takes to read both
# weights and to add to the gradient of one: operations per second over bytes per second is 6 on a processor, 300 on a
# GPU.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**26}
FEWEST_ROWS = {"cpu": 256, "cuda": 2048}


def rows_at_a_time(classes: int, device: str) -> int:
    """Rows whose logits exist at a time on a type of device."""
    place = device if device in CHUNK_ELEMENTS else "cuda"
    return max(FEWEST_ROWS[place], CHUNK_ELEMENTS[place] // classes)


def linear_soft_target_reference(
    student_hidden: Tensor,  # [*, ds]
    student_weight: Tensor,  # [C, ds]
    teacher_hidden: Tensor,  # [*, dt]
    teacher_weight: Tensor,  # [C, dt]
    labels: Tensor | None = None,  # [*]
    *,
    student_bias: Tensor | None = None,  # [C]
    teacher_bias: Tensor | None = None,  # [C]
    mask: Tensor | None = None,  # [*]
    ignore_index: int = -100,
    **options: Any,
) -> Tensor:
    """The specification of `linear_soft_target_loss`: both output layers, then `soft_target_reference`."""
    valid = soft_target.valid_rows(labels, mask, ignore_index)
    if valid is not None:
        # Before the product: garbage in a row that does not count would reach the gradient of the weight.
        student_hidden, teacher_hidden = (
            torch.where(valid.unsqueeze(-1), hidden, 0.0) for hidden in (student_hidden, teacher_hidden)
        )
    return soft_target.soft_target_reference(
        F.linear(student_hidden, student_weight, student_bias),
        F.linear(teacher_hidden, teacher_weight, teacher_bias),
        labels,
        mask=mask,
        ignore_index=ignore_index,
        **options,
    )


# --------------------------------------------------------------------------- argument checks


def _fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{LOSS}: {message}")


def _check_layer(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in ((f"{side}_hidden", hidden), (f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            _fail(f"{name} must be a floating-point tensor, got {tensor.dtype}", TypeError)
        if tensor is not None and tensor.device != hidden.device:
            _fail(f"{name} must be on {hidden.device} like {side}_hidden, got {tensor.device}")
    if hidden.dim() < 1 or hidden.size(-1) < 1:
        _fail(f"{side}_hidden must have shape [*, features] with at least one feature, got {shape(hidden)}")
    if weight.dim() != 2 or weight.size(1) != hidden.size(-1) or weight.size(0) < 1:
        _fail(
            f"{side}_weight must have shape [classes, {hidden.size(-1)}], as that of the output layer's nn.Linear, got "
            f"{shape(weight)}"
        )
    if bias is not None and list(bias.shape) != [weight.size(0)]:
        _fail(f"{side}_bias must have one entry per class, [{weight.size(0)}], got {shape(bias)}")


def _check_sides(student_hidden: Tensor, student_weight: Tensor, teacher: dict[str, Tensor | None]) -> None:
    hidden, weight = teacher["teacher_hidden"], teacher["teacher_weight"]
    assert hidden is not None and weight is not None
    if student_hidden.shape[:-1] != hidden.shape[:-1]:
        _fail(f"teacher_hidden must have the student's rows, got {shape(hidden)} vs {shape(student_hidden)}")
    if student_weight.size(0) != weight.size(0):
        _fail(
            "teacher_weight must have the student's classes in the student's order, got "
            f"{weight.size(0)} against {student_weight.size(0)}; select the rows of the shared vocabulary on both sides"
        )
    if hidden.device != student_hidden.device:
        _fail(f"teacher_hidden must be on {student_hidden.device} like student_hidden, got {hidden.device}")
    for name, tensor in teacher.items():
        if tensor is not None:
            check_detached(_fail, name, tensor)


# --------------------------------------------------------------------------- chunks of rows


class _Layers(NamedTuple):
    """Rows and output layers of both sides; student and teacher each in one dtype."""

    student: Tensor  # [R, ds]
    weight: Tensor  # [C, ds]
    bias: Tensor | None  # [C]
    teacher: Tensor  # [R, dt]
    teacher_weight: Tensor  # [C, dt]
    teacher_bias: Tensor | None  # [C]


class _Rows(NamedTuple):
    """What the loss is told about rows, and its options, in the order of the op `soft_target`."""

    labels: Tensor | None  # [R]
    mask: Tensor | None  # [R]
    num_items: Tensor | None
    options: tuple[Any, ...]  # from the divergence to the reduction
    chunk: int

    @property
    def by_row(self) -> bool:
        return self.options[-1] == "none"


def _walk(
    ops: Any, layers: _Layers, rows: _Rows, wanted: tuple[bool, bool, bool], weights: Tensor | None
) -> tuple[Tensor, list[Tensor | None], Tensor | None]:
    """Loss, gradients of the student's rows, weight and bias as far as `wanted`, and what is to be applied to them.

    Both sides' logits of a chunk of rows exist at a time, and the gradient takes the place of the student's. `weights`
    are gradients that arrive at single rows.
    """
    count, classes = layers.student.size(0), layers.weight.size(0)
    wide = torch.float64 if layers.student.dtype == torch.float64 else torch.float32
    gradients: list[Tensor | None] = [None, None, None]
    if wanted[0]:
        gradients[0] = torch.empty_like(layers.student, memory_format=torch.contiguous_format)
    if wanted[1]:
        gradients[1] = layers.weight.new_zeros(layers.weight.shape, dtype=wide)
    if wanted[2]:
        gradients[2] = layers.weight.new_zeros(classes, dtype=wide)
    starts = range(0, count, rows.chunk)
    values = layers.student.new_zeros(count if rows.by_row else len(starts), dtype=wide)
    gradient_scale: Tensor | None = None
    # The same memory for every chunk: new memory would cost more than the arithmetic on it.
    held = min(count, rows.chunk)
    student_logits = layers.student.new_empty(held, classes)
    teacher_logits = layers.teacher.new_empty(held, classes)
    for place, start in enumerate(starts):
        part = slice(start, min(count, start + rows.chunk))
        student = _linear(layers.student[part], layers.weight, layers.bias, student_logits)
        teacher = _linear(layers.teacher[part], layers.teacher_weight, layers.teacher_bias, teacher_logits)
        if student.dtype != teacher.dtype:
            wider = torch.promote_types(student.dtype, teacher.dtype)
            student, teacher = student.to(wider), teacher.to(wider)
        labels, mask = (None if tensor is None else tensor[part] for tensor in (rows.labels, rows.mask))
        arguments = (student, teacher, labels, mask, rows.num_items, *rows.options)
        if any(wanted):
            value, gradient_scale = ops.soft_target_(*arguments)
        else:
            value = ops.soft_target(*arguments, False)[0]
        values[part if rows.by_row else place] = value
        if not any(wanted):
            continue
        if weights is not None and gradient_scale is not None:
            ops.scale_rows_(student, weights[part] * gradient_scale)
        gradient = student.to(layers.student.dtype)
        if gradients[0] is not None:
            torch.mm(gradient, layers.weight, out=gradients[0][part])
        if gradients[1] is not None:
            _add_product(gradients[1], gradient, layers.student[part])
        if gradients[2] is not None:
            gradients[2] += gradient.sum(0, dtype=wide)
    # In the order of rows, with the precision of a sum over many chunks.
    return values if rows.by_row else values.double().sum().to(wide), gradients, gradient_scale


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, memory: Tensor) -> Tensor:
    """`F.linear` into the first rows of `memory`."""
    logits = memory[: rows.size(0)]
    if bias is None:
        return torch.mm(rows, weight.T, out=logits)
    return torch.addmm(bias, rows, weight.T, out=logits)


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """total += gradient^T rows, without rounding the product of a chunk to the dtype of half-precision operands."""
    if gradient.is_cuda and gradient.dtype != total.dtype:
        torch.addmm(total, gradient.T, rows, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(gradient.T.to(total.dtype), rows.to(total.dtype))


class _LinearSoftTarget(torch.autograd.Function):
    """The forward makes the gradients, and the backward scales them; where each row's weight comes with the incoming
    gradient (``reduction="none"``), the backward makes them."""

    @staticmethod
    def forward(
        ctx: Any, ops: Any, rows: _Rows, student: Tensor, weight: Tensor, bias: Tensor | None, *teacher: Any
    ) -> Tensor:
        layers = _Layers(student, weight, bias, *teacher)
        ctx.ops, ctx.rows = ops, rows
        wanted = tuple(ctx.needs_input_grad[2:5])
        loss, gradients, gradient_scale = _walk(
            ops, layers, rows, (False, False, False) if rows.by_row else wanted, None
        )
        if rows.by_row:
            ctx.save_for_backward(*layers)
        else:
            ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in layers[:3]]
            ctx.save_for_backward(*gradients, gradient_scale)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        incoming = grads[0]
        wanted = tuple(ctx.needs_input_grad[2:5])
        check_first_order(LOSS)
        if ctx.rows.by_row:
            layers = _Layers(*ctx.saved_tensors)
            found = _walk(ctx.ops, layers, ctx.rows, wanted, incoming)[1]
            dtypes = [None if tensor is None else tensor.dtype for tensor in layers[:3]]
        else:
            *made, gradient_scale = ctx.saved_tensors
            dtypes = ctx.dtypes
            factor = incoming if gradient_scale is None else incoming * gradient_scale
            found = [None if gradient is None else scaled(LOSS, ctx.ops, gradient, factor) for gradient in made]
        gradients = [
            None if gradient is None else gradient.to(dtype) for gradient, dtype in zip(found, dtypes, strict=True)
        ]
        return None, None, *gradients, None, None, None


# --------------------------------------------------------------------------- public function


def linear_soft_target_loss(
    student_hidden: Tensor,  # [*, ds]
    student_weight: Tensor,  # [C, ds]
    teacher_hidden: Tensor,  # [*, dt]
    teacher_weight: Tensor,  # [C, dt]
    labels: Tensor | None = None,  # [*]
    *,
    student_bias: Tensor | None = None,  # [C]
    teacher_bias: Tensor | None = None,  # [C]
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    jsd_beta: float = 0.5,
    scale_by_temperature: bool = True,
    mask: Tensor | None = None,  # [*]
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk_rows: int | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`soft_target_loss` of what two output layers make of hidden states, without the logits of all rows.

    .. math:: L\big(h^s W_s^T + b_s,\; h^t W_t^T + b_t\big)

    Same value and gradients as ``soft_target_loss(F.linear(student_hidden, student_weight, student_bias),
    F.linear(teacher_hidden, ...), ...)``, logits rounded to the dtype of their hidden states included. A chunk of rows
    at a time is multiplied out, compared, and differentiated in place; memory is two chunks of logits and the
    gradients, at any number of rows.

    Args:
        student_hidden: ``[*, ds]``, fp32, bf16, fp16 or fp64. Receives a gradient.
        student_weight: ``[C, ds]``, as ``nn.Linear.weight``; in a language model often the embedding itself. Receives a
            gradient, summed over chunks in fp32. Hidden states, weight and bias of a side are taken in their widest
            dtype, under autocast in autocast's.
        teacher_hidden, teacher_weight: ``[*, dt]`` and ``[C, dt]``: same rows, same classes in the same order. Must not
            require grad.
        student_bias, teacher_bias: ``[C]``. The student's receives a gradient.
        labels, divergence, temperature, hard_weight, jsd_beta, scale_by_temperature, mask, ignore_index, reduction,
            num_items, impl: as in `soft_target_loss`. The reference keeps all logits.
        chunk_rows: rows whose logits exist at a time; None takes 256 on a CPU, 2,048 on a GPU, and more where there are
            few classes. It changes memory and speed, and the result by rounding.

    Returns:
        fp32 (fp64 for fp64 inputs): 0-d, or ``[*]`` for ``reduction="none"``.

    Raises:
        ValueError, TypeError, RuntimeError: as `soft_target_loss`.
    """
    teacher: dict[str, Tensor | None] = {
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
    }
    soft_target.check_options(divergence, temperature, hard_weight, jsd_beta, reduction, num_items, labels)
    _check_layer("student", student_hidden, student_weight, student_bias)
    _check_layer("teacher", teacher_hidden, teacher_weight, teacher_bias)
    _check_sides(student_hidden, student_weight, teacher)
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        _fail(f"chunk_rows must be a whole number above 0 or None, got {chunk_rows!r}")
    # The rows are those of the hidden states: labels and mask are held against them as if they were logits.
    soft_target.check_rows(student_hidden, labels, mask)
    sides = (student_hidden, student_weight, student_bias), (teacher_hidden, teacher_weight, teacher_bias)
    dtype = torch.promote_types(*(_product_dtype(*side) for side in sides))
    resolved = _dispatch.resolve(soft_target.LOSS, student_hidden.device, impl, dtype)
    if resolved == "reference":
        return linear_soft_target_reference(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            divergence=divergence,
            temperature=temperature,
            hard_weight=hard_weight,
            jsd_beta=jsd_beta,
            scale_by_temperature=scale_by_temperature,
            mask=mask,
            ignore_index=ignore_index,
            reduction=reduction,
            num_items=num_items,
        )
    valid = soft_target.valid_rows(labels, mask, ignore_index)
    if reduction == "mean" and num_items is None:
        # The denominator is that of all chunks.
        num_items = float(max(1, student_hidden.numel() // student_hidden.size(-1)))
        if valid is not None:
            num_items = valid.sum().clamp(min=1)
    if valid is not None:
        # What a row that does not count holds must not reach the products with it.
        student_hidden = torch.where(valid.unsqueeze(-1), student_hidden, 0.0)
        teacher_hidden = torch.where(valid.unsqueeze(-1), teacher_hidden, 0.0)
    classes, device = student_weight.size(0), student_hidden.device.type
    rows = _Rows(
        None if labels is None else labels.reshape(-1).long(),
        None if mask is None else mask.reshape(-1).bool(),
        on_device(num_items, student_hidden.device),
        (
            divergence,
            float(temperature),
            float(hard_weight),
            float(jsd_beta),
            scale_by_temperature,
            ignore_index,
            reduction,
        ),
        chunk_rows or rows_at_a_time(classes, device),
    )
    layers = [
        *_in_one_dtype(student_hidden, student_weight, student_bias),
        *_in_one_dtype(teacher_hidden, teacher_weight, teacher_bias),
    ]
    with torch.autocast(device, enabled=False):
        loss = _LinearSoftTarget.apply(_dispatch.ops(resolved), rows, *layers)
    return loss.view(student_hidden.shape[:-1]) if reduction == "none" else loss


def _product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype in which a side is multiplied: what nn.Linear does under autocast, or the widest."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return dtype


def _in_one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A side's rows and output layer as the product takes them."""
    dtype = _product_dtype(hidden, weight, bias)
    return hidden.reshape(-1, hidden.size(-1)).to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
