# SPDX-License-Identifier: Apache-2.0
"""Soft-target loss in Triton: value and gradient of a row by one program.

With p = softmax(t / T), q = softmax(s / T) and logarithms to the base 2, taken relative to the maximum of the row, as
in log2 p = (t - max t) (log2 e / T) - log2 sum 2^((t - max t) (log2 e / T)), the forward KL (Hinton et al. 2015, arXiv
1503.02531) of a row is ln 2 sum p (log2 p - log2 q) with gradient (q - p) / T; the reverse KL the same with the sides
swapped and gradient q (log(q / p) - KL) / T; the generalised Jensen-Shannon divergence (arXiv 2306.13649) has the
gradient (1 - b) q (log(q / m) - KL(q||m)) / T.

A row that fits a program's registers is read once. A longer one is walked in blocks: once for maxima and sums of
exponentials, once more for value and gradient, and in between for the mean that the gradients of the reverse KL and of
the Jensen-Shannon divergence need. Nothing else of that size exists. The number of valid rows is counted on the device,
and rows are added in a fixed order.

A label outside the classes cannot be refused without waiting for the device: its row, and with it the loss, is NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))


@triton.jit
def _row_offsets(rows, inner, outer_stride, inner_stride):
    """Where rows start: leading dimensions collapsed to two, [rows] -> [rows, 1]."""
    return ((rows // inner) * outer_stride + (rows % inner) * inner_stride)[:, None]


@triton.jit
def _valid_rows(labels, mask, rows, count, ignore_index, HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr):
    """Which rows count, and their labels: [rows], [rows]."""
    valid = rows < count
    label = tl.zeros_like(rows)
    if HAS_MASK:
        valid = valid & (tl.load(mask + rows, mask=rows < count, other=0) != 0)
    if HAS_LABELS:
        label = tl.load(labels + rows, mask=rows < count, other=0)
        valid = valid & (label != ignore_index)
    return valid, label


@triton.jit
def count_rows(
    labels, mask, num_items, factors, gradient_scale, count, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_ITEMS: tl.constexpr, MEAN: tl.constexpr, HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What depends on the number of valid rows: factors of the loss and of its gradient, [2], and what backward does.

    fp16 has no room below for a gradient divided by many rows: that factor is left to backward, where the incoming
    gradient (which a loss scaler makes large) meets it first. A power of two, so that nothing is rounded twice.
    """
    dtype: tl.constexpr = factors.dtype.element_ty
    denominator = tl.full((), 1, dtype)
    if MEAN:
        if HAS_ITEMS:
            denominator = tl.load(num_items).to(dtype)
        else:
            found = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, count, BLOCK):
                rows = start + tl.arange(0, BLOCK).to(tl.int64)
                valid, _ = _valid_rows(labels, mask, rows, count, ignore_index, HAS_LABELS, HAS_MASK)
                found += valid.to(tl.int32)
            denominator = tl.maximum(tl.sum(found, 0), 1).to(dtype)
    later = tl.full((), 1, dtype)
    if HALF:
        exponent = ((denominator.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
        later = ((127 - exponent) << 23).to(tl.float32, bitcast=True).to(dtype)
    tl.store(factors, 1 / denominator)
    tl.store(factors + 1, 1 / (denominator * later))
    tl.store(gradient_scale, later)


@triton.jit
def _load(pointer, offsets, columns, classes, valid, dtype: tl.constexpr):
    """Logits of a block of classes, [rows, BLOCK]; -inf behind the last class. Rows that do not count are not read."""
    inside = columns < classes
    x = tl.load(pointer + offsets + columns, mask=valid[:, None] & inside, other=0.0).to(dtype)
    return tl.where(inside, x, -float("inf"))


@triton.jit
def _online(highest, total, x, scale):
    """Maximum of a row and the sum of 2^((x - maximum) scale), after another block."""
    above = tl.maximum(highest, tl.max(x, 1))
    # Nothing but -inf so far: there is nothing to rescale, and no difference to be taken.
    finite = tl.where(above == -float("inf"), 0.0, above)
    kept = tl.where(highest == -float("inf"), 0.0, tl.exp2((highest - finite) * scale))
    return above, total * kept + tl.sum(tl.exp2((x - finite[:, None]) * scale), 1)


@triton.jit
def _log_probability(x, highest, log_total, scale):
    return (x - highest[:, None]) * scale - log_total[:, None]


@triton.jit
def _slope(q, log_q, p, log_p, beta, DIVERGENCE: tl.constexpr):
    """What the gradient of the reverse KL and of the Jensen-Shannon divergence weighs by q: log q - log p, (1 - b) (log
    q - log m). Base e; zero for a class that the student rules out."""
    if DIVERGENCE == "reverse_kl":
        return tl.where(q == 0, 0.0, (log_q - log_p) * LN2)
    # Below the smallest normal number the class weighs nothing.
    mixture = q + beta * (p - q)  # so written, it is q exactly where p is q
    return (1 - beta) * (_log2(q) - _log2(mixture)) * LN2


@triton.jit
def _log2(x):
    """Of a probability, kept finite at 0."""
    return tl.log2(tl.maximum(x, 1.17549435e-38))


@triton.jit
def soft_target_rows(
    student, teacher, gradient, row_loss, labels, mask, factors, classes, count, ignore_index,
    student_inner, student_outer_stride, student_inner_stride,
    teacher_inner, teacher_outer_stride, teacher_inner_stride,
    temperature: tl.float64, beta: tl.float64, soft: tl.float64, hard: tl.float64,
    DIVERGENCE: tl.constexpr, HARD: tl.constexpr, GRADIENT: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Values of ROWS rows and their gradients. `soft` and `hard` are the factors of the two parts in a row's value;
    DIVERGENCE is empty where there is only the hard part. WHOLE: a block holds all classes, and is loaded once."""
    dtype: tl.constexpr = row_loss.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid, label = _valid_rows(labels, mask, rows, count, ignore_index, HAS_LABELS, HAS_MASK)
    student += _row_offsets(rows, student_inner, student_outer_stride, student_inner_stride)
    teacher += _row_offsets(rows, teacher_inner, teacher_outer_stride, teacher_inner_stride)
    gradient += (rows * classes)[:, None]
    lanes = tl.arange(0, BLOCK)[None, :]
    temperature = tl.full((), temperature, dtype)
    beta = tl.full((), beta, dtype)
    scale = LOG2E / temperature
    SOFT: tl.constexpr = DIVERGENCE != ""
    # The squared distance is one of raw logits, all others are of probabilities.
    PROBABILITIES: tl.constexpr = SOFT and DIVERGENCE != "mse"
    MEAN: tl.constexpr = DIVERGENCE == "reverse_kl" or DIVERGENCE == "jsd"

    lowest = tl.full((ROWS,), -float("inf"), dtype)
    zero = tl.zeros((ROWS,), dtype)
    max_s, max_t, max_h = lowest, lowest, lowest
    sum_s, sum_t, sum_h = zero, zero, zero
    s = tl.zeros((ROWS, BLOCK), dtype)
    t = s
    columns = lanes
    for start in range(0, 1 if WHOLE else classes, BLOCK):
        columns = start + lanes
        s = _load(student, 0, columns, classes, valid, dtype)
        if SOFT:
            t = _load(teacher, 0, columns, classes, valid, dtype)
        if PROBABILITIES:
            max_s, sum_s = _online(max_s, sum_s, s, scale)
            max_t, sum_t = _online(max_t, sum_t, t, scale)
        if HARD:
            max_h, sum_h = _online(max_h, sum_h, s, LOG2E)
    log_s, log_t, log_h = zero, zero, zero
    if PROBABILITIES:
        log_s, log_t = tl.log2(sum_s), tl.log2(sum_t)
    if HARD:
        log_h = tl.log2(sum_h)

    mean = zero
    if MEAN:
        for start in range(0, 1 if WHOLE else classes, BLOCK):
            if not WHOLE:
                columns = start + lanes
                s = _load(student, 0, columns, classes, valid, dtype)
                t = _load(teacher, 0, columns, classes, valid, dtype)
            log_q = _log_probability(s, max_s, log_s, scale)
            log_p = _log_probability(t, max_t, log_t, scale)
            q, p = tl.exp2(log_q), tl.exp2(log_p)
            mean += tl.sum(tl.where(columns < classes, q * _slope(q, log_q, p, log_p, beta, DIVERGENCE), 0.0), 1)

    factor = tl.load(factors + 1)
    soft = tl.full((), soft, dtype)
    hard = tl.full((), hard, dtype)
    if HARD:
        hard = tl.where((label >= 0) & (label < classes), hard, float("nan"))[:, None]
    value = zero
    for start in range(0, 1 if WHOLE else classes, BLOCK):
        if not WHOLE:
            columns = start + lanes
            s = _load(student, 0, columns, classes, valid, dtype)
            if SOFT:
                t = _load(teacher, 0, columns, classes, valid, dtype)
        inside = columns < classes
        terms = tl.zeros((ROWS, BLOCK), dtype)
        slope = tl.zeros((ROWS, BLOCK), dtype)
        if DIVERGENCE == "mse":
            # Two logits of -inf agree; their difference would be NaN.
            difference = tl.where(s == t, 0.0, s - t)
            terms = soft * difference * difference
            slope = 2 * soft * difference
        elif SOFT:
            log_q = _log_probability(s, max_s, log_s, scale)
            log_p = _log_probability(t, max_t, log_t, scale)
            q, p = tl.exp2(log_q), tl.exp2(log_p)
            if MEAN:
                weighed = _slope(q, log_q, p, log_p, beta, DIVERGENCE)
                slope = (soft / temperature) * (q * (weighed - mean[:, None]))
                if DIVERGENCE == "reverse_kl":
                    terms = soft * (q * weighed)
                else:
                    mixture = q + beta * (p - q)
                    terms = soft * (q * weighed + beta * p * (_log2(p) - _log2(mixture)) * LN2)
            else:
                slope = (soft / temperature) * (q - p)
                surprise = -log_q
                if DIVERGENCE == "forward_kl":
                    surprise = log_p - log_q
                terms = (soft * LN2) * tl.where(p == 0, 0.0, p * surprise)
        if HARD:
            log_q = _log_probability(s, max_h, log_h, LOG2E)
            labelled = columns == label[:, None]
            terms -= (hard * LN2) * tl.where(labelled, log_q, 0.0)
            slope += hard * (tl.exp2(log_q) - tl.where(labelled, 1.0, 0.0))
        value += tl.sum(tl.where(inside, terms, 0.0), 1)
        if GRADIENT:
            # Rows that do not count get a gradient of zero, whatever they hold.
            slope = tl.where(valid[:, None], slope * factor, 0.0)
            tl.store(gradient + columns, slope.to(gradient.dtype.element_ty), mask=(rows < count)[:, None] & inside)
    tl.store(row_loss + rows, tl.where(valid, value, 0.0), mask=rows < count)


@triton.jit
def sum_rows(row_loss, factors, loss, count, BLOCK: tl.constexpr):
    """All rows added in a fixed order, times the first factor."""
    dtype: tl.constexpr = row_loss.dtype.element_ty
    # In double precision: one program has few numbers to add, and many rows are not to cost digits.
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        rows = start + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(row_loss + rows, mask=rows < count, other=0.0).to(tl.float64)
    tl.store(loss, (tl.sum(total, 0) * tl.load(factors).to(tl.float64)).to(dtype))


# --------------------------------------------------------------------------- host

WHOLE_CLASSES = 8192  # up to here a row stays in a program's registers, without spills
ROW_BLOCK = 4096  # classes that a longer row is walked by


def _shape_of_program(classes: int) -> dict[str, Any]:
    """Rows and classes of a program, and its warps: fixed, so that a new shape costs a compilation and no search."""
    block = min(triton.next_power_of_2(classes), WHOLE_CLASSES)
    if classes > WHOLE_CLASSES:
        return {"ROWS": 1, "BLOCK": ROW_BLOCK, "WHOLE": False, "num_warps": 8}
    rows = max(1, min(64, 1024 // block))
    return {"ROWS": rows, "BLOCK": block, "WHOLE": True, "num_warps": max(4, min(32, block // 512))}


def _rows_of(tensor: Tensor) -> tuple[Tensor, int, int, int]:
    """The tensor as rows of unit stride, leading dimensions collapsed to two: inner size, outer and inner stride."""
    if tensor.size(-1) == 1 or tensor.stride(-1) == 1:
        collapsed: list[tuple[int, int]] = []  # (size, stride), outermost first
        for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
            if size == 1:
                continue
            if collapsed and collapsed[-1][1] == size * stride:
                collapsed[-1] = (collapsed[-1][0] * size, stride)
            else:
                collapsed.append((size, stride))
        if len(collapsed) <= 2:
            (_, outer), (inner, stride) = [(1, 0)] * (2 - len(collapsed)) + collapsed
            return tensor, inner, outer, stride
    return _rows_of(tensor.contiguous())


def _compute(
    student: Tensor,
    teacher: Tensor,
    gradient: Tensor | None,
    labels: Tensor | None,
    mask: Tensor | None,
    num_items: Tensor | None,
    divergence: str,
    temperature: float,
    hard_weight: float,
    jsd_beta: float,
    scale_by_temperature: bool,
    ignore_index: int,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Loss and what backward applies to the gradient, which is written to `gradient`."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    classes = student.size(-1)
    count = student.numel() // classes
    if divergence == "jsd" and jsd_beta in (0, 1):
        divergence = "forward_kl" if jsd_beta == 0 else "reverse_kl"
    gradient_scale = student.new_empty((), dtype=dtype)
    factors = student.new_empty(2, dtype=dtype)
    row_loss = student.new_empty(student.shape[:-1], dtype=dtype)
    loss = row_loss if reduction == "none" else student.new_empty((), dtype=dtype)
    labels, mask = (None if tensor is None else tensor.contiguous() for tensor in (labels, mask))
    given = {"HAS_LABELS": labels is not None, "HAS_MASK": mask is not None}
    count_rows[(1,)](
        labels, mask, num_items, factors, gradient_scale, count, ignore_index, **given,
        HAS_ITEMS=num_items is not None, MEAN=reduction == "mean", HALF=student.dtype == torch.float16,
        BLOCK=1024, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if count > 0:
        program = _shape_of_program(classes)
        student, *student_layout = _rows_of(student)
        teacher, *teacher_layout = _rows_of(teacher)
        soft = (1 - hard_weight) * (temperature**2 if scale_by_temperature else 1)
        soft_target_rows[(triton.cdiv(count, program["ROWS"]),)](
            student, teacher, row_loss if gradient is None else gradient, row_loss, labels, mask, factors, classes,
            count, ignore_index, *student_layout, *teacher_layout,
            temperature, jsd_beta, soft, hard_weight,
            DIVERGENCE="" if hard_weight == 1 else divergence, HARD=hard_weight > 0, GRADIENT=gradient is not None,
            **given, **program, enable_fp_fusion=True,
        )  # fmt: skip
    if reduction != "none":
        sum_rows[(1,)](row_loss, factors, loss, count, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return loss, gradient_scale


def soft_target(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `soft_target`: see `pydistill._schemas`."""
    *settings, with_gradient = options
    gradient = torch.empty(student.shape if with_gradient else (0,), dtype=student.dtype, device=student.device)
    loss, gradient_scale = _compute(student, teacher, gradient if with_gradient else None, *settings)
    return loss, gradient, gradient_scale


def soft_target_(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """The op `soft_target_`, which writes the gradient over the student's logits: see `pydistill._schemas`."""
    return _compute(student, teacher, student, *options)
