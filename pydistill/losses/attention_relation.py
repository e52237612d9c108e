# SPDX-License-Identifier: Apache-2.0
"""Attention-relation loss: how a teacher's tokens attend to each other, and how its queries, keys or values relate.

Reads top to bottom: the reference (the specification), the argument checks, the registration of the compiled op
(fake kernels, autograd), the public functions, the objective term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill import _dispatch
from pydistill.losses.checks import check_detached, check_num_items, on_device, shape
from pydistill.losses.gradient import check_first_order, scaled

LOSS = "attention_relation"
REDUCTIONS = ("sequence_mean", "token_mean", "sum", "none")
# The letters of a relation, the signal that each stands for, and its place among the op's arguments.
SIGNALS = {"q": "queries", "k": "keys", "v": "values"}
SLOTS = {"q": 0, "k": 1, "v": 2}


def attention_relation_reference(
    student_a: Tensor,  # [B, H, N, ds]
    student_b: Tensor | None,  # [B, H, N, ds]
    teacher_a: Tensor,  # [B, H, N, dt]
    teacher_b: Tensor | None,  # [B, H, N, dt]
    *,
    mask: Tensor | None = None,  # [B, N]
    segment_ids: Tensor | None = None,  # [B, N]
    causal: bool = False,
    relation_heads: int | None = None,
    scale: float | None = None,
    reduction: str = "sequence_mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """The specification of `attention_relation_loss`: eager PyTorch in fp32 (fp64 for fp64), differentiated by
    autograd."""
    given = [tensor for tensor in (student_a, student_b, teacher_a, teacher_b) if tensor is not None]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32
    batch, _, positions, _ = student_a.shape
    valid = torch.ones(batch, positions, dtype=torch.bool, device=student_a.device)  # [B, N]
    if mask is not None:
        valid = valid & mask.bool()
    if segment_ids is not None:
        valid = valid & (segment_ids >= 0)
    # Who sees whom, [B, N, N]; padding sees itself alone, so that its row is defined until it is dropped.
    same = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    if segment_ids is not None:
        same = same & (segment_ids.unsqueeze(-1) == segment_ids.unsqueeze(-2))
    seen = same.tril() if causal else same
    seen = (seen | torch.eye(positions, dtype=torch.bool, device=seen.device)).unsqueeze(1)

    def scores(a: Tensor, b: Tensor | None) -> Tensor:
        sides = [a] if b is None else [a, _repeat_heads(b, a.size(1))]
        # Selecting before any arithmetic is what keeps NaN and inf of padding out of value and gradient.
        sides = [torch.where(valid[:, None, :, None], side.to(dtype), 0.0) for side in sides]
        heads = [split_heads(side, relation_heads) for side in sides]
        factor = 1 / math.sqrt(heads[0].size(-1)) if scale is None else scale
        with torch.autocast(student_a.device.type, enabled=False):
            product = heads[0] @ heads[-1].transpose(-1, -2) * factor
        return F.log_softmax(product.masked_fill(~seen, -math.inf), dim=-1)

    log_p, log_q = scores(teacher_a, teacher_b), scores(student_a, student_b)
    row_loss = (log_p.exp() * torch.where(seen, log_p - log_q, 0.0)).sum(-1)  # [B, A, N]
    row_loss = torch.where(valid.unsqueeze(1), row_loss, 0.0)
    if reduction == "none":
        return row_loss
    if reduction == "sum":
        return row_loss.sum()
    length = same.sum(-1).clamp(min=1)  # [B, N]: tokens of the sequence that a token belongs to
    share = valid.to(dtype) / (length if reduction == "sequence_mean" else 1)  # sums to the number of items
    items = share.sum().round().clamp(min=1) if num_items is None else num_items
    return (row_loss.mean(1) * share).sum() / items


def split_heads(heads: Tensor, relation_heads: int | None) -> Tensor:
    """All heads concatenated and split into `relation_heads`: ``[B, H, N, d] -> [B, A, N, H * d / A]``.

    The features of a token stay together (MiniLMv2, arXiv 2012.15828): heads move next to features before
    the split. None leaves the heads as they are.
    """
    if relation_heads is None or relation_heads == heads.size(1):
        return heads
    batch, count, positions, size = heads.shape
    joined = heads.transpose(1, 2).reshape(batch, positions, count * size)
    return joined.reshape(batch, positions, relation_heads, -1).transpose(1, 2)


def _repeat_heads(b: Tensor, heads: int) -> Tensor:
    """Key or value heads of a grouped-query model, one for each query head."""
    return b if b.size(1) == heads else b.repeat_interleave(heads // b.size(1), dim=1)


# --------------------------------------------------------------------------- argument checks


def _fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{LOSS}: {message}")


def _check_options(reduction: str, relation_heads: int | None, scale: float | None, num_items: Any) -> None:
    if reduction not in REDUCTIONS:
        _fail(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if relation_heads is not None and (not isinstance(relation_heads, int) or relation_heads < 1):
        _fail(f"relation_heads must be a whole number above 0 or None, got {relation_heads!r}")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        _fail(f"scale must be a finite number above 0 or None (1 / sqrt(size of a head)), got {scale}")
    if num_items is not None:
        if reduction not in ("sequence_mean", "token_mean"):
            _fail(f"num_items replaces the denominator of a mean, got reduction={reduction!r}")
        check_num_items(_fail, num_items)


def _check_tensors(name: str, student: Tensor, teacher: Tensor) -> None:
    for side, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            _fail(f"{side}_{name} must be a floating-point tensor, got {tensor.dtype}", TypeError)
        if tensor.dim() != 4 or tensor.size(1) < 1 or tensor.size(3) < 1:
            _fail(f"{side}_{name} must have shape [B, H, N, d] with at least one head, got {shape(tensor)}")
    if student.size(0) != teacher.size(0) or student.size(2) != teacher.size(2):
        _fail(
            f"teacher_{name} must have the student's batch and positions, got {shape(teacher)} vs {shape(student)}; "
            "both models must read the same tokens"
        )
    if student.device != teacher.device:
        _fail(f"teacher_{name} must be on {student.device} like student_{name}, got {teacher.device}")
    check_detached(_fail, f"teacher_{name}", teacher)


def _check_pair(side: str, a: Tensor, b: Tensor) -> None:
    if a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:] or a.size(1) % b.size(1) != 0:
        _fail(
            f"{side}_b must match {side}_a, with as many heads or (grouped queries) a divisor of them, got {shape(b)} "
            f"vs {shape(a)}"
        )


def _check_heads(student: Tensor, teacher: Tensor, relation_heads: int | None) -> None:
    widths = [tensor.size(1) * tensor.size(3) for tensor in (student, teacher)]
    common = math.gcd(*widths)
    if relation_heads is None:
        if student.size(1) != teacher.size(1):
            _fail(
                f"student and teacher have {student.size(1)} and {teacher.size(1)} heads; pass relation_heads, one of "
                f"{_divisors(common)}, to compare them after all heads are joined and split again"
            )
    elif common % relation_heads != 0:
        _fail(
            f"relation_heads must divide the student's width {widths[0]} and the teacher's {widths[1]}, got "
            f"{relation_heads}; pass one of {_divisors(common)}"
        )


def _divisors(width: int) -> str:
    return ", ".join(str(count) for count in range(1, width + 1) if width % count == 0)


def _check_tokens(student: Tensor, mask: Tensor | None, segment_ids: Tensor | None) -> None:
    tokens = [student.size(0), student.size(2)]
    for name, tensor in (("mask", mask), ("segment_ids", segment_ids)):
        if tensor is None:
            continue
        if tensor.is_floating_point() or tensor.is_complex() or (name == "segment_ids" and tensor.dtype == torch.bool):
            rule = "boolean or integer (non-zero = valid)" if name == "mask" else "integers, one id per packed sequence"
            _fail(f"{name} must hold {rule}, got {tensor.dtype}", TypeError)
        if list(tensor.shape) != tokens:
            _fail(f"{name} must have one entry per token, [B, N] = {tokens}, got {shape(tensor)}")
        if tensor.device != student.device:
            _fail(f"{name} must be on {student.device} like the student's tensors, got {tensor.device}")


# --------------------------------------------------------------------------- the compiled op

_OP_INPUTS = 17  # arguments of the op, of which the first three receive gradients


def _register(namespace: str) -> None:
    """Fake kernel and autograd of the op in one namespace. They are written once, for every backend."""

    @torch.library.register_fake(f"{namespace}::attention_relation")
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        students, relations = arguments[:3], arguments[6]
        relation_heads, reduction, with_gradient = arguments[13], arguments[15], arguments[16]
        first = next(tensor for tensor in students if tensor is not None)
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        shape: tuple[Any, ...] = ()
        if reduction == "none":
            heads = students[relations[0]].size(1) if relation_heads is None else relation_heads
            shape = (first.size(0), heads, first.size(2))
        gradients = [
            first.new_empty(0) if tensor is None or not with_gradient else torch.empty_like(_with_unit_stride(tensor))
            for tensor in students
        ]
        parts = first.new_empty(len(relations) // 2, dtype=dtype)
        return first.new_empty(shape, dtype=dtype), parts, *gradients, first.new_empty((), dtype=dtype)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, getattr(torch.ops, namespace), inputs, output)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return *_student_gradients(ctx, grad_loss), *(None,) * (_OP_INPUTS - 3)

    torch.library.register_autograd(f"{namespace}::attention_relation", backward, setup_context=setup_context)


def _with_unit_stride(tensor: Tensor) -> Tensor:
    """What the kernel reads: features of a head side by side."""
    return tensor if tensor.size(-1) < 2 or tensor.stride(-1) == 1 else tensor.contiguous()


def _save(ctx: Any, ops: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """What the backward needs: the gradients made by the forward, or, where each row's weight comes with the incoming
    gradient (``reduction="none"``), the inputs."""
    ctx.ops = ops
    ctx.by_row = inputs[15] == "none"
    if ctx.by_row:
        ctx.tensors = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    else:
        ctx.students = [tensor is not None for tensor in inputs[:3]]
        ctx.save_for_backward(*output[2:])


def _student_gradients(ctx: Any, grad_loss: Tensor | None) -> list[Tensor | None]:
    if grad_loss is None:
        return [None] * 3
    if not ctx.by_row:
        *gradients, gradient_scale = ctx.saved_tensors
        return [
            scaled(LOSS, ctx.ops, gradient, grad_loss * gradient_scale) if given else None
            for gradient, given in zip(gradients, ctx.students, strict=True)
        ]
    check_first_order(LOSS)
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if tensor else other for tensor, other in zip(ctx.tensors, ctx.others, strict=True)]
    inputs[11], inputs[16] = grad_loss, True
    gradients = ctx.ops.attention_relation(*inputs)[2:5]
    return [gradient if inputs[slot] is not None else None for slot, gradient in enumerate(gradients)]


class _FusedAttentionRelation(torch.autograd.Function):
    """The op in eager mode, without torch's generic wrapper (see soft_target)."""

    @staticmethod
    def forward(ctx: Any, ops: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        # The incoming gradient decides about rows: nothing to compute before it is there.
        with_gradient = inputs[15] != "none"
        output = ops.attention_relation(*inputs, with_gradient)
        ctx.mark_non_differentiable(output[1])
        _save(ctx, ops, (*inputs, with_gradient), output)
        return output[0], output[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, *_student_gradients(ctx, grads[0]), *(None,) * (_OP_INPUTS - 4)


for _namespace in _dispatch.libraries:
    _register(_namespace)


def _call(
    ops: Any,
    students: list[Tensor | None],
    teachers: list[Tensor | None],
    relations: list[int],
    weights: list[float],
    mask: Tensor | None,
    segment_ids: Tensor | None,
    num_items: float | Tensor | None,
    causal: bool,
    relation_heads: int | None,
    scale: float | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """One call of the compiled op: weighted loss, and the value of each relation."""
    given = [tensor for tensor in (*students, *teachers) if tensor is not None]
    wider = given[0].dtype
    for tensor in given:
        wider = torch.promote_types(wider, tensor.dtype)
    inputs = (
        *(None if tensor is None else tensor.to(wider) for tensor in (*students, *teachers)),
        relations,
        weights,
        None if mask is None else mask.bool(),
        None if segment_ids is None else segment_ids.long(),
        on_device(num_items, given[0].device),
        None,
        causal,
        relation_heads,
        None if scale is None else float(scale),
        reduction,
    )
    with_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in students)
    if with_gradient and not torch.compiler.is_compiling():
        return _FusedAttentionRelation.apply(ops, *inputs)
    loss, parts, *_ = ops.attention_relation(*inputs, with_gradient and reduction != "none")
    return loss, parts


# --------------------------------------------------------------------------- public functions


def attention_relation_loss(
    student_a: Tensor,  # [B, H, N, ds]
    student_b: Tensor | None,  # [B, H, N, ds]
    teacher_a: Tensor,  # [B, H, N, dt]
    teacher_b: Tensor | None,  # [B, H, N, dt]
    *,
    mask: Tensor | None = None,  # [B, N]
    segment_ids: Tensor | None = None,  # [B, N]
    causal: bool = False,
    relation_heads: int | None = None,
    scale: float | None = None,
    reduction: str = "sequence_mean",
    num_items: float | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    r"""KL of the student's token relations from the teacher's, per head and query row.

    .. math:: R = \mathrm{softmax}(A B^\top / \sqrt{d}), \qquad
              L_{a,i} = KL(R^\mathrm{teacher}_{a,i} \,\|\, R^\mathrm{student}_{a,i})

    With queries and keys this is MiniLM's attention transfer, with ``b=None`` a self relation such as its value
    relation (Wang et al. 2020, arXiv 2002.10957, equations 6 and 9) or MiniLMv2's QQ, KK and VV (arXiv 2012.15828).
    Where nothing is masked, same value as the mean over batch, heads and rows of
    ``(p * (p.log() - (A_s @ B_s.mT / ds**0.5).log_softmax(-1))).sum(-1)`` with
    ``p = (A_t @ B_t.mT / dt**0.5).softmax(-1)``. Scores, probabilities and their gradient never exist as N x N matrices
    in memory: loss and gradients take O(B H N) beyond the inputs.

    Args:
        student_a: ``[B, H, N, ds]``, fp32, bf16, fp16 or fp64; any strides. Receives a gradient.
        student_b: the same shape, or fewer heads (a divisor: grouped-query models); receives a gradient. None makes a
            self relation.
        teacher_a, teacher_b: ``[B, H, N, dt]``; must not require grad. Where dtypes differ, all are taken in the
            widest.
        mask: ``[B, N]`` boolean or integer, non-zero = valid: left or right padding, or holes. Padding is no key and no
            query: it has zero loss and zero gradient whatever it holds, and a padded batch equals its sequences one by
            one.
        segment_ids: ``[B, N]`` integers for packed sequences: tokens see those with the same id. Negative is padding.
            Each segment counts as one sequence.
        causal: a token sees only itself and those before it.
        relation_heads: join all heads and split them into this many (MiniLMv2), so that head counts and sizes of the
            two sides are free; must divide both widths. None takes the heads as they are, equally many on both sides.
        scale: of the scores on both sides; None is 1 / sqrt(size of a head), for each side its own.
        reduction: ``"sequence_mean"`` (mean over heads and rows of each sequence, then over sequences: the papers'),
            ``"token_mean"`` (mean over heads and all valid rows), ``"sum"``, or ``"none"``: ``[B, A, N]``.
        num_items: replaces the number of sequences (``sequence_mean``) or of valid tokens (``token_mean``), for
            gradient accumulation and data parallelism.
        impl: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        fp32 (fp64 for fp64 inputs): 0-d, or ``[B, A, N]`` for ``reduction="none"``.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names it and the way out.
        RuntimeError: the teacher requires grad, the implementation is missing, or backward runs twice through this loss
            with ``create_graph=True``.
    """
    _check_options(reduction, relation_heads, scale, num_items)
    _check_tensors("a", student_a, teacher_a)
    if (student_b is None) != (teacher_b is None):
        _fail("student_b and teacher_b must both be tensors, or both None for a self relation")
    if student_b is not None and teacher_b is not None:
        _check_tensors("b", student_b, teacher_b)
        _check_pair("student", student_a, student_b)
        _check_pair("teacher", teacher_a, teacher_b)
    _check_heads(student_a, teacher_a, relation_heads)
    _check_tokens(student_a, mask, segment_ids)
    resolved = _dispatch.resolve(LOSS, student_a.device, impl)
    if resolved == "reference":
        return attention_relation_reference(
            student_a,
            student_b,
            teacher_a,
            teacher_b,
            mask=mask,
            segment_ids=segment_ids,
            causal=causal,
            relation_heads=relation_heads,
            scale=scale,
            reduction=reduction,
            num_items=num_items,
        )
    students: list[Tensor | None] = [student_a, None, None]
    teachers: list[Tensor | None] = [teacher_a, None, None]
    relations = [0, 0]
    if student_b is not None and teacher_b is not None:
        students[1] = _repeat_heads(student_b, student_a.size(1))
        teachers[1] = _repeat_heads(teacher_b, teacher_a.size(1))
        relations = [0, 1]
    return _call(
        _dispatch.ops(resolved),
        students,
        teachers,
        relations,
        [1.0],
        mask,
        segment_ids,
        num_items,
        causal,
        relation_heads,
        scale,
        reduction,
    )[0]


def attention_relations_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    relations: Sequence[str] = ("qk", "vv"),
    *,
    weights: Sequence[float] | None = None,
    mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    causal: bool = False,
    relation_heads: int | None = None,
    scale: float | None = None,
    reduction: str = "sequence_mean",
    num_items: float | Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Several relations of one pair of layers, :math:`\sum_r w_r L_r`, in one launch where no tensor is in two.

    Args:
        student, teacher: ``queries``, ``keys`` and ``values`` ``[B, H, N, d]``, as far as the relations need them.
        relations: pairs of q, k, v: ``("qk", "vv")`` is MiniLM, ``("qq", "kk", "vv")`` MiniLMv2; ``"qv"`` and the like
            are allowed too. Two equal letters are a self relation.
        weights: one per relation; None is 1 for each, as in the papers.
        mask, segment_ids, causal, relation_heads, scale, num_items, impl: as in `attention_relation_loss`.
        reduction: ``"sequence_mean"``, ``"token_mean"`` or ``"sum"``.

    Returns:
        the weighted sum (0-d), and the unweighted value of each relation by name (0-d, detached).

    Raises:
        ValueError, TypeError, RuntimeError: as `attention_relation_loss`.
    """
    names, weights = check_relations(relations, weights)
    pairs = [(name[0], name[1]) for name in names]
    if reduction == "none":
        _fail("reduction must be sequence_mean, token_mean or sum where several relations are added, got 'none'")
    options: dict[str, Any] = {
        "mask": mask,
        "segment_ids": segment_ids,
        "causal": causal,
        "relation_heads": relation_heads,
        "scale": scale,
        "reduction": reduction,
        "num_items": num_items,
    }
    for letter in sorted(set("".join(names))):
        for side, given in (("student", student), ("teacher", teacher)):
            if SIGNALS[letter] not in given:
                _fail(f"relations {', '.join(names)} need the {side}'s {SIGNALS[letter]}, got {sorted(given)}")
    tensors = {letter: (student[name], teacher[name]) for letter, name in SIGNALS.items() if name in student}
    used = [letter for pair in pairs for letter in sorted(set(pair))]
    # A tensor in two relations has two gradients to add, and heads that one relation repeats are others in the next.
    apart = len(set(used)) != len(used) or any(
        tensors[a][side].size(1) != tensors[b][side].size(1) for a, b in pairs for side in (0, 1)
    )
    resolved = _dispatch.resolve(LOSS, tensors[used[0]][0].device, impl)
    parts: dict[str, Tensor] = {}
    if apart or resolved == "reference" or len(pairs) == 1:
        total: Tensor | None = None
        for (a, b), weight in zip(pairs, weights, strict=True):
            value = attention_relation_loss(
                tensors[a][0],
                None if a == b else tensors[b][0],
                tensors[a][1],
                None if a == b else tensors[b][1],
                impl=impl,
                **options,
            )
            parts[a + b] = value.detach()
            total = weight * value if total is None else total + weight * value
        assert total is not None
        return total, parts

    _check_options(reduction, relation_heads, scale, num_items)
    for a, b in pairs:
        for letter in {a, b}:
            _check_tensors(SIGNALS[letter], *tensors[letter])
            _check_heads(*tensors[letter], relation_heads)
        _check_pair("student", tensors[a][0], tensors[b][0])
        _check_pair("teacher", tensors[a][1], tensors[b][1])
    _check_tokens(tensors[used[0]][0], mask, segment_ids)
    students, teachers = ([tensors[x][side] if x in used else None for x in SLOTS] for side in (0, 1))
    slots = [SLOTS[letter] for pair in pairs for letter in pair]
    loss, values = _call(
        _dispatch.ops(resolved),
        students,
        teachers,
        slots,
        weights,
        mask,
        segment_ids,
        num_items,
        causal,
        relation_heads,
        scale,
        reduction,
    )
    return loss, dict(zip(names, values.unbind(), strict=True))


def check_relations(relations: Sequence[str], weights: Sequence[float] | None) -> tuple[list[str], list[float]]:
    """Relations and weights as lists, or the error that says what is wrong with them."""
    if isinstance(relations, str) or not relations:
        _fail(f"relations must be a list such as ['qk', 'vv'], got {relations!r}")
    for relation in relations:
        if len(relation) != 2 or not set(relation) <= SIGNALS.keys():
            _fail(f"a relation is two of the letters q, k, v, such as 'qk' or 'vv', got {relation!r}")
    if len(set(relations)) != len(relations):
        _fail(f"relations must be distinct, got {', '.join(relations)}")
    weights = [1.0] * len(relations) if weights is None else [float(weight) for weight in weights]
    if len(weights) != len(relations):
        _fail(f"weights must have one number per relation, {len(relations)}, got {len(weights)}")
    for weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            _fail(f"weights must be finite and not negative, got {weight}")
    return list(relations), weights


# --------------------------------------------------------------------------- objective term


class AttentionRelation(nn.Module):
    """`attention_relations_loss` of one student layer and one teacher layer, as a term of an objective.

    Args:
        relations, relation_weights: which relations, and the weight of each; see `attention_relations_loss`.
        relation_heads, causal, scale, reduction, impl: see `attention_relation_loss`.
        student_layer, teacher_layer: whose queries, keys and values are read; negative counts from the last. MiniLM
            reads the last layer of both; large teachers are better read some layers below (papers of MiniLMv2).
        weight: factor of this term in the objective's sum.
        name: under which the term's value is logged.
    """

    def __init__(
        self,
        *,
        relations: Sequence[str] = ("qk", "vv"),
        relation_heads: int | None = None,
        relation_weights: Sequence[float] | None = None,
        student_layer: int | str = -1,
        teacher_layer: int | str = -1,
        causal: bool = False,
        scale: float | None = None,
        reduction: str = "sequence_mean",
        weight: float = 1.0,
        name: str = LOSS,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.relations, self.relation_weights = check_relations(relations, relation_weights)
        _check_options(reduction, relation_heads, scale, None)
        if reduction == "none":
            _fail("reduction must be sequence_mean, token_mean or sum in an objective, got 'none'")
        self.weight = weight
        self.name = name
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer
        self.options: dict[str, Any] = {
            "relation_heads": relation_heads,
            "causal": causal,
            "scale": scale,
            "reduction": reduction,
            "impl": impl,
        }
        kinds = [SIGNALS[letter] for letter in SIGNALS if letter in "".join(self.relations)]
        self.student_signals = frozenset(f"{kind}@{student_layer}" for kind in kinds)
        self.teacher_signals = frozenset(f"{kind}@{teacher_layer}" for kind in kinds)

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor | int:
        """How many items of `batch` this term's mean runs over: sequences, or valid tokens."""
        mask, segments = batch.get("attention_mask"), batch.get("segment_ids")
        tokens = next(value for key in ("input_ids", "inputs_embeds") if (value := batch.get(key)) is not None)
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if mask is None else mask.bool()
        if segments is not None:
            valid = valid & (segments >= 0)
        if self.options["reduction"] == "token_mean":
            return valid.sum()
        if segments is None:
            return valid.any(-1).sum()
        ids = torch.where(valid, segments, -1).sort(-1).values
        first = ids.diff(dim=-1, prepend=torch.full_like(ids[:, :1], -1)) != 0
        return (first & (ids >= 0)).sum()

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Student and teacher signals by name, and the batch -> the unweighted loss, 0-d.

        ``attention_mask [B, N]`` and ``segment_ids [B, N]`` of the batch say which tokens see each other.
        """
        return self.forward_with_parts(student, teacher, batch, num_items)[0]

    def forward_with_parts(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        num_items: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, and the value of each relation by name, without its weight (0-d, detached)."""

        def read(signals: Mapping[str, Tensor], layer: int | str) -> dict[str, Tensor]:
            return {kind: signals[key] for kind in SIGNALS.values() if (key := f"{kind}@{layer}") in signals}

        return attention_relations_loss(
            read(student, self.student_layer),
            {kind: tensor.detach() for kind, tensor in read(teacher, self.teacher_layer).items()},
            self.relations,
            weights=self.relation_weights,
            mask=batch.get("attention_mask"),
            segment_ids=batch.get("segment_ids"),
            num_items=num_items if self.options["reduction"] != "sum" else None,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(
            f"{key}={value!r}"
            for key, value in {
                "relations": self.relations,
                "weight": self.weight,
                "student_layer": self.student_layer,
                "teacher_layer": self.teacher_layer,
                **self.options,
            }.items()
        )
