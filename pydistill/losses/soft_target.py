# SPDX-License-Identifier: Apache-2.0
"""Soft-target loss: what a teacher's logits say, and optionally the hard labels, in one sweep over the classes.

Reads top to bottom: the reference (the specification), the argument checks, the registration of the compiled op
(fake kernels, autograd), the public functions, the objective term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill import _dispatch
from pydistill.losses.checks import check_detached, check_num_items, on_device, shape
from pydistill.losses.gradient import scaled

LOSS = "soft_target"
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "mse", "cross_entropy")
REDUCTIONS = ("mean", "sum", "none")


def soft_target_reference(
    student_logits: Tensor,  # [*, C]
    teacher_logits: Tensor,  # [*, C]
    labels: Tensor | None = None,  # [*]
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    jsd_beta: float = 0.5,
    scale_by_temperature: bool = True,
    mask: Tensor | None = None,  # [*]
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """The specification of `soft_target_loss`: eager PyTorch in fp32 (fp64 for fp64), differentiated by autograd."""
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    valid = valid_rows(labels, mask, ignore_index)
    if valid is not None:
        # Selecting before any arithmetic is what keeps NaN and inf of invalid rows out of value and gradient.
        student = torch.where(valid.unsqueeze(-1), student, 0.0)
        teacher = torch.where(valid.unsqueeze(-1), teacher, 0.0)

    row_loss = student.new_zeros(student.shape[:-1])  # [*]
    if hard_weight < 1:
        scale = temperature**2 if scale_by_temperature else 1.0
        distance = _divergence(student / temperature, teacher / temperature, divergence, jsd_beta)
        row_loss = row_loss + (1 - hard_weight) * scale * distance
    if hard_weight > 0:
        assert labels is not None
        target = labels if valid is None else torch.where(valid, labels, 0)
        log_probs = F.log_softmax(student, dim=-1)
        row_loss = row_loss - hard_weight * log_probs.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    return _reduce(row_loss, valid, reduction, num_items)


def _divergence(student: Tensor, teacher: Tensor, divergence: str, jsd_beta: float) -> Tensor:
    """Per row, of logits already divided by the temperature: [*, C], [*, C] -> [*]."""
    if divergence == "mse":
        # Two logits of -inf agree; their difference would be NaN.
        return torch.where(student == teacher, 0.0, student - teacher).square().sum(-1)
    if divergence == "jsd" and jsd_beta in (0.0, 1.0):
        divergence = "forward_kl" if jsd_beta == 0.0 else "reverse_kl"
    return _divergence_of_log_probs(
        F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), divergence, jsd_beta
    )


def _divergence_of_log_probs(log_q: Tensor, log_p: Tensor, divergence: str, jsd_beta: float) -> Tensor:
    """Between teacher p and student q, per row: [*, C], [*, C] -> [*]. A class of probability 0 contributes 0."""
    p, q = log_p.exp(), log_q.exp()
    # Compared with 0 for equality, so that NaN stays NaN.
    if divergence == "forward_kl":
        return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)
    if divergence == "cross_entropy":
        return -torch.where(p == 0, 0.0, p * log_q).sum(-1)
    # A factor is made finite before it is multiplied, for the derivative of the product uses it as it stands.
    if divergence == "reverse_kl":
        return (q * torch.where(q == 0, 0.0, log_q - log_p)).sum(-1)
    mixture = q + jsd_beta * (p - q)  # so written, it is q exactly where p is q
    # Below the smallest normal number the derivative of a logarithm overflows, and the class weighs nothing.
    tiny = torch.finfo(p.dtype).tiny
    log_mixture = mixture.clamp(min=tiny).log()
    teacher_part = p * (p.clamp(min=tiny).log() - log_mixture)
    student_part = q * (q.clamp(min=tiny).log() - log_mixture)
    return (jsd_beta * teacher_part + (1 - jsd_beta) * student_part).sum(-1)


def valid_rows(labels: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """Rows that count: inside the mask and with a label other than `ignore_index`. None where all do."""
    valid = None if mask is None else mask.bool()
    if labels is not None:
        labelled = labels != ignore_index
        valid = labelled if valid is None else valid & labelled
    return valid


def _reduce(row_loss: Tensor, valid: Tensor | None, reduction: str, num_items: float | Tensor | None) -> Tensor:
    if valid is not None:
        row_loss = torch.where(valid, row_loss, 0.0)
    if reduction == "none":
        return row_loss
    total = row_loss.sum()
    if reduction == "sum":
        return total
    if num_items is not None:
        return total / (num_items.reshape(()).to(total.dtype) if isinstance(num_items, Tensor) else num_items)
    count: float | Tensor = row_loss.numel() if valid is None else valid.sum()
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


# --------------------------------------------------------------------------- argument checks


def _fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{LOSS}: {message}")


def check_options(
    divergence: str,
    temperature: float,
    hard_weight: float,
    jsd_beta: float,
    reduction: str,
    num_items: float | Tensor | None,
    labels: Tensor | None,
) -> None:
    if divergence not in DIVERGENCES:
        _fail(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if reduction not in REDUCTIONS:
        _fail(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not temperature > 0 or temperature == float("inf"):
        _fail(f"temperature must be a finite number above 0, got {temperature}")
    if divergence == "mse" and temperature != 1.0:
        _fail(f"temperature must be 1 with divergence='mse', which compares raw logits, got {temperature}")
    if not 0 <= hard_weight <= 1:
        _fail(f"hard_weight must lie in [0, 1], got {hard_weight}")
    if hard_weight > 0 and labels is None:
        _fail(f"hard_weight={hard_weight} needs labels, got None; pass labels or hard_weight=0")
    if not 0 <= jsd_beta <= 1:
        _fail(f"jsd_beta must lie in [0, 1], got {jsd_beta}")
    if num_items is not None:
        if reduction != "mean":
            _fail(f"num_items replaces the denominator of reduction='mean', got reduction={reduction!r}")
        check_num_items(_fail, num_items)


def check_rows(student_logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> None:
    if not student_logits.is_floating_point():
        _fail(f"student_logits must be a floating-point tensor, got {student_logits.dtype}", TypeError)
    if student_logits.dim() < 1 or student_logits.size(-1) < 1:
        _fail(f"student_logits must have shape [*, C] with at least one class, got {shape(student_logits)}")
    rows = student_logits.shape[:-1]
    if labels is not None:
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            _fail(f"labels must hold integer class ids, got {labels.dtype}", TypeError)
        if labels.shape != rows:
            _fail(f"labels must have one id per row, {list(rows)}, got {shape(labels)}")
        if labels.device != student_logits.device:
            _fail(f"labels must be on {student_logits.device} like student_logits, got {labels.device}")
    if mask is not None:
        if mask.is_floating_point() or mask.is_complex():
            _fail(f"mask must be boolean or integer (non-zero = valid), got {mask.dtype}", TypeError)
        if mask.shape != rows:
            _fail(f"mask must have one entry per row, {list(rows)}, got {shape(mask)}")
        if mask.device != student_logits.device:
            _fail(f"mask must be on {student_logits.device} like student_logits, got {mask.device}")


def _check_teacher(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if not teacher_logits.is_floating_point():
        _fail(f"teacher_logits must be a floating-point tensor, got {teacher_logits.dtype}", TypeError)
    if teacher_logits.dim() >= 1 and student_logits.shape[:-1] == teacher_logits.shape[:-1]:
        if student_logits.size(-1) != teacher_logits.size(-1):
            _fail(
                "teacher_logits must have the student's classes in the student's order, got "
                f"{teacher_logits.size(-1)} against {student_logits.size(-1)}; select or map the shared vocabulary on "
                "both sides first (padding with a constant would leak probability mass)"
            )
    elif student_logits.shape != teacher_logits.shape:
        _fail(f"teacher_logits must match student_logits, got {shape(teacher_logits)} vs {shape(student_logits)}")
    if teacher_logits.device != student_logits.device:
        _fail(f"teacher_logits must be on {student_logits.device} like student_logits, got {teacher_logits.device}")
    check_detached(_fail, "teacher_logits", teacher_logits)


def _check_inplace(student_logits: Tensor, impl: str) -> None:
    if impl == "reference":
        _fail("inplace=True needs a fused kernel, and impl resolved to the reference; pass inplace=False")
    if torch.compiler.is_compiling():
        _fail(
            "inplace=True is not supported under torch.compile, which plans memory itself; pass inplace=False",
            RuntimeError,
        )
    owner = student_logits if student_logits._base is None else student_logits._base
    if owner.is_leaf and owner.requires_grad:
        _fail(
            "inplace=True would overwrite a leaf that requires grad; pass logits computed by a model, or inplace=False"
        )
    if not student_logits.is_contiguous():
        _fail(
            f"inplace=True needs contiguous student_logits, got strides {student_logits.stride()} for shape "
            f"{shape(student_logits)}; pass inplace=False, or slice before the output layer"
        )


# --------------------------------------------------------------------------- the compiled op


def _register(namespace: str) -> None:
    """Fake kernels and autograd of the op in one namespace. They are written once, for every backend."""

    @torch.library.register_fake(f"{namespace}::soft_target")
    def _(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
        reduction, with_gradient = options[-2:]
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        loss = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=dtype)
        gradient = torch.empty(student.shape if with_gradient else (0,), dtype=student.dtype, device=student.device)
        return loss, gradient, student.new_empty((), dtype=dtype)

    @torch.library.register_fake(f"{namespace}::soft_target_")
    def _(student: Tensor, teacher: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        reduction = options[-1]
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        loss = student.new_empty(student.shape[:-1] if reduction == "none" else (), dtype=dtype)
        return loss, student.new_empty((), dtype=dtype)

    @torch.library.register_fake(f"{namespace}::scale_rows_")
    def _(rows: Tensor, scale: Tensor) -> None:
        return None

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, gradient, gradient_scale = output
        ctx.mark_non_differentiable(gradient, gradient_scale)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient, gradient_scale)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradient, gradient_scale = ctx.saved_tensors
        if grad_loss is None:
            return (None,) * 13
        return scaled(LOSS, getattr(torch.ops, namespace), gradient, grad_loss * gradient_scale), *(None,) * 12

    torch.library.register_autograd(f"{namespace}::soft_target", backward, setup_context=setup_context)


class _FusedSoftTarget(torch.autograd.Function):
    """The op in eager mode. What is registered above does the same for compilers; torch's generic wrapper around it
    fills in defaults argument by argument, which is slower than the kernel on small batches.

    In place, the write goes through a detached alias, which shares the version counter: whoever saved these logits for
    its own backward finds them modified and raises, instead of computing with a gradient in place of logits.
    """

    @staticmethod
    def forward(ctx: Any, ops: Any, student: Tensor, teacher: Tensor, inplace: bool, *options: Any) -> Tensor:
        if inplace:
            gradient = student.detach()
            loss, gradient_scale = ops.soft_target_(gradient, teacher, *options)
            # The dispatcher does not count writes of compiled ops.
            torch.autograd.graph.increment_version(gradient)
        else:
            loss, gradient, gradient_scale = ops.soft_target(student, teacher, *options, True)
        ctx.ops = ops
        ctx.save_for_backward(gradient, gradient_scale)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gradient, gradient_scale = ctx.saved_tensors
        return None, scaled(LOSS, ctx.ops, gradient, grads[0] * gradient_scale), *(None,) * 12


for _namespace in _dispatch.libraries:
    _register(_namespace)


# --------------------------------------------------------------------------- public functions


def soft_target_loss(
    student_logits: Tensor,  # [*, C]
    teacher_logits: Tensor,  # [*, C]
    labels: Tensor | None = None,  # [*]
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    jsd_beta: float = 0.5,
    scale_by_temperature: bool = True,
    mask: Tensor | None = None,  # [*]
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""Distance of the student's class distribution from the teacher's, mixed with the hard-label cross-entropy.

    With :math:`p = \mathrm{softmax}(t / T)` and :math:`q = \mathrm{softmax}(s / T)`, per row

    .. math:: L = w\,\mathrm{CE}(s, y) + (1 - w)\,T^2\,D(p, q)

    ================== =============================================================================================
    ``forward_kl``     :math:`\sum_c p_c (\log p_c - \log q_c)` (Hinton et al. 2015, arXiv 1503.02531)
    ``reverse_kl``     :math:`\sum_c q_c (\log q_c - \log p_c)`
    ``jsd``            :math:`\beta\,KL(p\|m) + (1-\beta)\,KL(q\|m)`, :math:`m = \beta p + (1-\beta) q`; by convention
                       :math:`\beta = 0` is the forward and :math:`\beta = 1` the reverse KL (arXiv 2306.13649)
    ``mse``            :math:`\sum_c (s_c - t_c)^2` of the raw logits (Tang et al. 2019, arXiv 1903.12136, section 3.2)
    ``cross_entropy``  :math:`-\sum_c p_c \log q_c` (Liu et al. 2019, arXiv 1904.09482); not 0 at equality
    ================== =============================================================================================

    Same value as ``F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean") * T**2`` for the
    default arguments and 2-D logits. One sweep computes loss and gradient: each logit is read once, the gradient
    written once, nothing else of that size exists.

    Args:
        student_logits: ``[*, C]``, fp32, bf16, fp16 or fp64; any strides. Receives the gradient.
        teacher_logits: ``[*, C]``, same classes in the same order. Must not require grad. Where the two dtypes differ,
            both are taken in the wider one.
        labels: ``[*]`` integer class ids for the hard part. A row whose label is `ignore_index` is not valid.
        divergence: see the table.
        temperature: T, above 0. Must be 1 for ``mse``. The hard part is always taken at T = 1.
        hard_weight: w in [0, 1].
        jsd_beta: :math:`\beta` in [0, 1], for ``jsd`` only.
        scale_by_temperature: multiply the soft part by T², which keeps its gradient's size independent of T.
        mask: ``[*]`` boolean or integer, non-zero = valid. Invalid rows have zero loss and zero gradient, whatever they
            hold.
        ignore_index: label of rows to leave out.
        reduction: ``"mean"`` over valid rows, ``"sum"``, or ``"none"`` (one value per row, ``[*]``).
        num_items: replaces the mean's denominator (number or 0-d tensor), for gradient accumulation and data
            parallelism.
        inplace: write the gradient over the storage of `student_logits`, which then holds no logits any more: no memory
            at all. Safe under autograd: an operation that saved these logits raises in its backward. Without a gradient
            to compute, it has nothing to write and the logits stay as they are.
        impl: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        fp32 (fp64 for fp64 inputs): 0-d, or ``[*]`` for ``reduction="none"``.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names it and the way out.
        RuntimeError: the teacher requires grad, the implementation is missing, or backward runs twice through this loss
            with ``create_graph=True``.
    """
    check_options(divergence, temperature, hard_weight, jsd_beta, reduction, num_items, labels)
    check_rows(student_logits, labels, mask)
    _check_teacher(student_logits, teacher_logits)
    wider = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    resolved = _dispatch.resolve(LOSS, student_logits.device, impl, wider)
    with_gradient = torch.is_grad_enabled() and student_logits.requires_grad
    if inplace:
        _check_inplace(student_logits, resolved)
    if resolved == "reference":
        return soft_target_reference(
            student_logits,
            teacher_logits,
            labels,
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
    if student_logits.dtype != teacher_logits.dtype:
        if inplace and wider != student_logits.dtype:
            _fail(
                f"inplace=True needs teacher_logits no wider than the student's {student_logits.dtype}, got "
                f"{teacher_logits.dtype}; pass teacher_logits.to({student_logits.dtype}), or inplace=False"
            )
        student_logits, teacher_logits = student_logits.to(wider), teacher_logits.to(wider)
    options = (
        None if labels is None else labels.long(),
        None if mask is None else mask.bool(),
        on_device(num_items, student_logits.device),
        divergence,
        float(temperature),
        float(hard_weight),
        float(jsd_beta),
        scale_by_temperature,
        ignore_index,
        reduction,
    )
    ops = _dispatch.ops(resolved)
    if with_gradient and not torch.compiler.is_compiling():
        return _FusedSoftTarget.apply(ops, student_logits, teacher_logits, inplace, *options)
    return ops.soft_target(student_logits, teacher_logits, *options, with_gradient)[0]


def sparse_soft_target_loss(
    student_logits: Tensor,  # [*, C]
    teacher_ids: Tensor,  # [*, K]
    teacher_log_probs: Tensor,  # [*, K]
    labels: Tensor | None = None,  # [*]
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    hard_weight: float = 0.0,
    jsd_beta: float = 0.5,
    scale_by_temperature: bool = True,
    mask: Tensor | None = None,  # [*]
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""`soft_target_loss` with a teacher known by its K most likely classes and the mass of all others.

    The distributions compared have K + 1 outcomes: the K listed classes, and "any other class", whose probability is
    :math:`1 - \sum_k p_k` for the teacher and :math:`1 - \sum_k q_k` for the student. By the log-sum inequality a KL so
    measured is at most the dense one, and equal to it when K = C, when the tail has no mass, or when the student
    distributes its tail like the teacher.

    The log-probabilities are those at T = 1. At another temperature the K listed classes are exact relative to each
    other; the teacher's tail is taken as spread evenly over the C - K unlisted classes, the least informed guess. Its
    mass then is :math:`(C-K)^{1-1/T}\,\mathrm{tail}^{1/T}` before normalisation, against :math:`p_k^{1/T}`.

    Args:
        student_logits: ``[*, C]``. Receives the gradient.
        teacher_ids: ``[*, K]`` integer class ids, distinct within a row, K from 1 to C.
        teacher_log_probs: ``[*, K]`` their natural log-probabilities at T = 1.
        labels, temperature, hard_weight, jsd_beta, scale_by_temperature, mask, ignore_index, reduction, num_items: as
            in `soft_target_loss`.
        divergence: ``forward_kl``, ``reverse_kl``, ``jsd`` or ``cross_entropy``; the squared logit distance (``mse``)
            needs all of the teacher's logits.
        impl: ``"auto"`` or ``"reference"``: this entry point has the eager implementation only.

    Returns:
        fp32 (fp64 for fp64 inputs): 0-d, or ``[*]`` for ``reduction="none"``.

    Raises:
        ValueError, TypeError, RuntimeError: as `soft_target_loss`.
    """
    check_options(divergence, temperature, hard_weight, jsd_beta, reduction, num_items, labels)
    check_rows(student_logits, labels, mask)
    check_detached(_fail, "teacher_log_probs", teacher_log_probs)
    if divergence == "mse":
        _fail(
            "divergence='mse' needs the teacher's full logits, and this teacher is sparse; "
            "pick a divergence of distributions"
        )
    if impl not in ("auto", "reference"):
        _fail(f"impl={impl!r} has no kernel for a sparse teacher; use impl='auto' or impl='reference'")
    rows, classes = student_logits.shape[:-1], student_logits.size(-1)
    if teacher_ids.is_floating_point() or teacher_ids.dtype == torch.bool:
        _fail(f"teacher_ids must hold integer class ids, got {teacher_ids.dtype}", TypeError)
    if not teacher_log_probs.is_floating_point():
        _fail(f"teacher_log_probs must be a floating-point tensor, got {teacher_log_probs.dtype}", TypeError)
    if teacher_ids.shape != teacher_log_probs.shape or teacher_ids.shape[:-1] != rows:
        _fail(
            f"teacher_ids and teacher_log_probs must both have shape {[*rows, 'K']}, got {shape(teacher_ids)} and "
            f"{shape(teacher_log_probs)}"
        )
    listed = teacher_ids.size(-1)
    if not 1 <= listed <= classes:
        _fail(f"teacher_ids must list between 1 and C={classes} classes per row, got {listed}")

    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student, log_p = student_logits.to(dtype), teacher_log_probs.to(dtype)
    valid = valid_rows(labels, mask, ignore_index)
    if valid is not None:
        student = torch.where(valid.unsqueeze(-1), student, 0.0)
        log_p = torch.where(valid.unsqueeze(-1), log_p, -float(torch.tensor(classes).log()))
        teacher_ids = torch.where(valid.unsqueeze(-1), teacher_ids, torch.arange(listed, device=student.device))

    row_loss = student.new_zeros(rows)
    if hard_weight < 1:
        scale = temperature**2 if scale_by_temperature else 1.0
        log_q, log_p = _coarse_log_probs(student, teacher_ids.long(), log_p, temperature)
        if divergence == "jsd" and jsd_beta in (0.0, 1.0):
            divergence = "forward_kl" if jsd_beta == 0.0 else "reverse_kl"
        row_loss = row_loss + (1 - hard_weight) * scale * _divergence_of_log_probs(log_q, log_p, divergence, jsd_beta)
    if hard_weight > 0:
        assert labels is not None
        target = labels if valid is None else torch.where(valid, labels, 0)
        row_loss = row_loss - hard_weight * F.log_softmax(student, -1).gather(-1, target.long().unsqueeze(-1)).squeeze(
            -1
        )
    return _reduce(row_loss, valid, reduction, num_items)


def _coarse_log_probs(student: Tensor, teacher_ids: Tensor, log_p: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the K listed classes and of the rest, at the temperature: both [*, K + 1]."""
    classes, listed = student.size(-1), teacher_ids.size(-1)
    scaled = student / temperature
    chosen = scaled.gather(-1, teacher_ids)
    if listed == classes:
        return F.log_softmax(chosen, -1), F.log_softmax(log_p / temperature, -1)
    unlisted = scaled.scatter(-1, teacher_ids, -float("inf")).logsumexp(-1, keepdim=True)
    log_q = F.log_softmax(torch.cat([chosen, unlisted], -1), -1)
    # Rounded log-probabilities may sum to a hair over 1: the tail then has no mass.
    tail = (-torch.expm1(torch.logsumexp(log_p, -1, keepdim=True))).clamp(min=0)
    spread = (1 - 1 / temperature) * float(torch.tensor(classes - listed, dtype=torch.float64).log())
    return log_q, F.log_softmax(torch.cat([log_p / temperature, tail.log() / temperature + spread], -1), -1)


# --------------------------------------------------------------------------- objective term


class SoftTarget(nn.Module):
    """`soft_target_loss` as a term of an objective: stores the arguments, reads the signals it needs.

    With ``hard_weight=1`` the teacher has no say: the term is the plain cross-entropy and asks for no teacher signal.

    Args:
        weight: factor of this term in the objective's sum.
        name: under which the term's value is logged.
        divergence, temperature, hard_weight, jsd_beta, scale_by_temperature, inplace, impl: see `soft_target_loss`.
        shift: for causal language models, whose ``labels [B, N]`` are the tokens themselves: the logits of a token are
            compared where the label of the next one counts (it is not -100, and of packed rows it belongs to the same
            text).
    """

    student_signals = frozenset({"logits"})

    def __init__(
        self,
        *,
        weight: float = 1.0,
        name: str = LOSS,
        divergence: str = "forward_kl",
        temperature: float = 1.0,
        hard_weight: float = 0.0,
        jsd_beta: float = 0.5,
        scale_by_temperature: bool = True,
        inplace: bool = False,
        impl: str = "auto",
        shift: bool = False,
    ) -> None:
        super().__init__()
        # hard_weight=1 is checked against the labels of a batch; here any labels will do.
        check_options(divergence, temperature, hard_weight, jsd_beta, "mean", None, labels=torch.empty(0))
        if inplace and hard_weight == 1:
            _fail("inplace=True has nothing to write with hard_weight=1, where the term is the plain cross-entropy")
        self.weight = weight
        self.name = name
        self.options: dict[str, Any] = {
            "divergence": divergence,
            "temperature": temperature,
            "hard_weight": hard_weight,
            "jsd_beta": jsd_beta,
            "scale_by_temperature": scale_by_temperature,
            "inplace": inplace,
            "impl": impl,
        }
        self.shift = shift
        # Told to the distiller: some teachers have log-probabilities, whose distance is another one.
        self.raw_logits = divergence == "mse"
        # Told to the objective, which must not let another term read what this one overwrites.
        self.inplace = inplace
        self.teacher_signals = frozenset() if hard_weight == 1 else frozenset({"logits"})

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor | int:
        """How many rows of `batch` this term's mean runs over: those with a class id, or all where there are none."""
        labels = self._labels(batch)
        return next(iter(batch.values())).shape[0] if labels is None else (labels != -100).sum()

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Student and teacher signals by name, and the batch -> the unweighted loss, 0-d.

        Integer ``labels`` of the batch are class ids: rows labelled -100 are left out, also where ``hard_weight`` is 0.
        """
        student_logits, labels = student["logits"], self._labels(batch)
        if labels is None and num_items is not None and student_logits.dim() > 2:
            _fail(
                "logits of several rows per example need labels (-100 where a row does not count), "
                "and the batch has none"
            )
        if self.teacher_signals:
            return soft_target_loss(student_logits, teacher["logits"], labels, num_items=num_items, **self.options)
        if labels is None:
            _fail("hard_weight=1 needs integer labels, and the batch has none")
        logits = student_logits.flatten(0, -2)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        return total / ((labels != -100).sum().clamp(min=1) if num_items is None else num_items)

    def _labels(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """Class ids of the rows of logits; None where the batch has none."""
        labels = _class_ids(batch)
        if not self.shift:
            return labels
        if labels is None or labels.dim() < 2:
            _fail("shift=True needs integer labels [B, N], such as the token ids with -100 where the prompt is")
        following = labels[:, 1:]
        segments = batch.get("segment_ids")
        if segments is not None:
            following = following.masked_fill(segments[:, 1:] != segments[:, :-1], -100)
        return F.pad(following, (0, 1), value=-100)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{key}={value!r}" for key, value in {"weight": self.weight, **self.options, "shift": self.shift}.items()
        )


def _class_ids(batch: Mapping[str, Tensor]) -> Tensor | None:
    labels = batch.get("labels")
    return None if labels is None or labels.is_floating_point() else labels
