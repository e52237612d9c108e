# SPDX-License-Identifier: Apache-2.0
"""Projected mean squared error: hidden states of two models, brought to one size by a matrix that is learnt.

Reads top to bottom: the reference (the specification), the argument checks, the registration of the compiled op
(fake kernel, autograd), the public function, the objective term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pydistill import _dispatch
from pydistill.losses.checks import check_detached, check_num_items, on_device, shape
from pydistill.losses.gradient import check_first_order, scaled

LOSS = "projected_mse"
REDUCTIONS = ("mean", "sum", "none")
DIRECTIONS = ("up", "down")
METHODS = ("direct", "gram")
# A row whose length is not above this has no direction: normalised it is zero, and it receives no gradient.
SHORTEST = 1e-12


def projected_mse_reference(
    student: Tensor,  # [*, ds]
    teacher: Tensor,  # [*, dt]
    projection: Tensor,  # [ds, dt] or [dt, ds]
    *,
    bias: Tensor | None = None,  # [dt] or [ds]
    mask: Tensor | None = None,  # [*]
    direction: str | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """The specification of `projected_mse_loss`: eager PyTorch in fp32 (fp64 for fp64), differentiated by autograd."""
    given = [tensor for tensor in (student, teacher, projection, bias) if tensor is not None]
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32
    valid = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device) if mask is None else mask.bool()
    # Selecting before any arithmetic is what keeps NaN and inf of padding out of value and gradient.
    student, teacher = (torch.where(valid.unsqueeze(-1), side.to(dtype), 0.0) for side in (student, teacher))
    up = _goes_up(student, teacher, projection, direction)
    source, target = (student, teacher) if up else (teacher, student)
    with torch.autocast(student.device.type, enabled=False):
        projected = source @ projection.to(dtype)
    if bias is not None:
        projected = projected + bias.to(dtype)
    if normalize:
        projected, target = _unit(projected), _unit(target)
    row_loss = torch.where(valid, (projected - target).square().mean(-1), 0.0)  # [*]
    if reduction == "none":
        return row_loss
    if reduction == "sum":
        return row_loss.sum() * target.size(-1)
    items = valid.sum().clamp(min=1) if num_items is None else torch.as_tensor(num_items, dtype=dtype).reshape(())
    return row_loss.sum() / items


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1, and of 0 where a row has no direction."""
    length = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return torch.where(length <= SHORTEST, 0.0, rows / length.clamp(min=SHORTEST))


def _goes_up(student: Tensor, teacher: Tensor, projection: Tensor, direction: str | None) -> bool:
    """Whether the student's rows are projected; a square projection does that unless told otherwise."""
    if direction is None:
        return list(projection.shape) == [student.size(-1), teacher.size(-1)]
    return direction == "up"


# --------------------------------------------------------------------------- argument checks


def _fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{LOSS}: {message}")


def _check_options(
    direction: str | None, reduction: str, num_items: Any, method: str = "direct", normalize: bool = False
) -> None:
    if direction is not None and direction not in DIRECTIONS:
        _fail(f"direction must be 'up', 'down' or None (read off the projection's shape), got {direction!r}")
    if reduction not in REDUCTIONS:
        _fail(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if method not in METHODS:
        _fail(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "gram" and (normalize or reduction == "none"):
        _fail(
            f"method 'gram' knows no single rows, got normalize={normalize} and reduction={reduction!r}; use 'direct'"
        )
    if num_items is not None:
        if reduction != "mean":
            _fail(f"num_items replaces the denominator of a mean, got reduction={reduction!r}")
        check_num_items(_fail, num_items)


def _check_tensors(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    direction: str | None,
) -> None:
    floating = {"student": student, "teacher": teacher, "projection": projection, "bias": bias}
    for name, tensor in floating.items():
        if tensor is not None and not tensor.is_floating_point():
            _fail(f"{name} must be a floating-point tensor, got {tensor.dtype}", TypeError)
    for name, tensor in {"student": student, "teacher": teacher}.items():
        if tensor.dim() < 1 or tensor.size(-1) < 1:
            _fail(f"{name} must have shape [*, features] with at least one feature, got {shape(tensor)}")
    if student.shape[:-1] != teacher.shape[:-1]:
        _fail(
            f"teacher must have the student's leading dimensions, got {shape(teacher)} vs {shape(student)}; both "
            "models must read the same tokens"
        )
    ds, dt = student.size(-1), teacher.size(-1)
    shapes = {"up": [ds, dt], "down": [dt, ds]}
    allowed = [shapes[direction]] if direction is not None else [shapes["up"], shapes["down"]]
    if list(projection.shape) not in allowed:
        rule = " or ".join(
            f"{wanted} ({way})" for way, wanted in shapes.items() if wanted in allowed and direction in (None, way)
        )
        _fail(f"projection must have shape {rule}, got {shape(projection)}")
    if bias is not None and list(bias.shape) != [projection.size(1)]:
        _fail(f"bias must have one entry per column of the projection, [{projection.size(1)}], got {shape(bias)}")
    if mask is not None:
        if mask.is_floating_point() or mask.is_complex():
            _fail(f"mask must hold boolean or integer (non-zero = valid), got {mask.dtype}", TypeError)
        if mask.shape != student.shape[:-1]:
            _fail(f"mask must have one entry per row, {list(student.shape[:-1])}, got {shape(mask)}")
    for name, tensor in {"teacher": teacher, "projection": projection, "bias": bias, "mask": mask}.items():
        if tensor is not None and tensor.device != student.device:
            _fail(f"{name} must be on {student.device} like student, got {tensor.device}")
    check_detached(_fail, "teacher", teacher)


# --------------------------------------------------------------------------- the compiled op

_OP_INPUTS = 14  # arguments of the op
_STUDENT, _PROJECTION, _BIAS = 0, 2, 3  # those that receive gradients
_WEIGHTS, _REDUCTION = 6, 10


def _register(namespace: str) -> None:
    """Fake kernel and autograd of the op in one namespace. They are written once, for every backend."""

    @torch.library.register_fake(f"{namespace}::projected_mse")
    def _(*arguments: Any) -> tuple[Tensor, ...]:
        student, projection, reduction = arguments[_STUDENT], arguments[_PROJECTION], arguments[_REDUCTION]
        with_student, with_projection, with_bias = arguments[_OP_INPUTS - 3 :]
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        return (
            student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=dtype),
            student.new_empty(student.shape if with_student else 0),
            student.new_empty(projection.shape if with_projection else 0, dtype=dtype),
            student.new_empty(projection.shape[1] if with_bias else 0, dtype=dtype),
            student.new_empty((), dtype=dtype),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        _save(ctx, getattr(torch.ops, namespace), inputs, output)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_loss, ctx.needs_input_grad)

    torch.library.register_autograd(f"{namespace}::projected_mse", backward, setup_context=setup_context)


def _save(ctx: Any, ops: Any, inputs: Sequence[Any], output: Sequence[Tensor]) -> None:
    """What the backward needs: the gradients made by the forward, or, where each row's weight comes with the incoming
    gradient (``reduction="none"``), the inputs."""
    ctx.ops = ops
    ctx.by_row = inputs[_REDUCTION] == "none"
    ctx.dtype = inputs[_PROJECTION].dtype
    if ctx.by_row:
        ctx.tensors = [isinstance(value, Tensor) for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
    else:
        ctx.save_for_backward(*output[1:])


def _gradients(ctx: Any, grad_loss: Tensor | None, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs, of which some are needed; those of projection and bias come in the loss's dtype."""
    wanted = [needed[place] for place in (_STUDENT, _PROJECTION, _BIAS)]
    if grad_loss is None or not any(wanted):
        return (None,) * len(needed)
    found: Sequence[Tensor]
    if ctx.by_row:
        check_first_order(LOSS)
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if tensor else other for tensor, other in zip(ctx.tensors, ctx.others, strict=True)]
        inputs[_WEIGHTS], inputs[_OP_INPUTS - 3 :] = grad_loss, wanted
        found = ctx.ops.projected_mse(*inputs)[1:4]
    else:
        *found, gradient_scale = ctx.saved_tensors
        factors = (grad_loss * gradient_scale, grad_loss, grad_loss)
        found = [
            scaled(LOSS, ctx.ops, gradient, factor) if asked else gradient
            for gradient, factor, asked in zip(found, factors, wanted, strict=True)
        ]
    gradients: list[Tensor | None] = [None] * len(needed)
    if wanted[0]:
        gradients[_STUDENT] = found[0]
    for place, gradient, asked in zip((_PROJECTION, _BIAS), found[1:], wanted[1:], strict=True):
        if asked:
            gradients[place] = gradient.to(ctx.dtype)
    return tuple(gradients)


class _FusedProjectedMse(torch.autograd.Function):
    """The op in eager mode, without torch's generic wrapper (see soft_target)."""

    @staticmethod
    def forward(ctx: Any, ops: Any, *inputs: Any) -> Tensor:
        # The incoming gradient decides about rows: nothing to compute before it is there.
        now = inputs[_REDUCTION] != "none"
        needed = ctx.needs_input_grad[1:]
        wanted = [now and needed[place] for place in (_STUDENT, _PROJECTION, _BIAS)]
        output = ops.projected_mse(*inputs, *wanted)
        _save(ctx, ops, (*inputs, *wanted), output)
        return output[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, *_gradients(ctx, grads[0], ctx.needs_input_grad[1:])


for _namespace in _dispatch.libraries:
    _register(_namespace)


def _call(
    ops: Any,
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    up: bool,
    normalize: bool,
    method: str,
    reduction: str,
    num_items: float | Tensor | None,
) -> Tensor:
    """One call of the compiled op, on rows."""
    rows = torch.promote_types(student.dtype, teacher.dtype)
    weights = projection.dtype if bias is None else torch.promote_types(projection.dtype, bias.dtype)
    if torch.float64 in (rows, weights):
        rows = weights = torch.float64
    elif weights != rows:
        # A projection is small: in fp32 beside rows of any dtype.
        weights = torch.float32
    inputs = (
        student.reshape(-1, student.size(-1)).to(rows),
        teacher.reshape(-1, teacher.size(-1)).to(rows),
        projection.to(weights),
        None if bias is None else bias.to(weights),
        None if mask is None else mask.reshape(-1).bool(),
        on_device(num_items, student.device),
        None,
        up,
        normalize,
        method,
        reduction,
    )
    wanted = [
        torch.is_grad_enabled() and tensor is not None and tensor.requires_grad
        for tensor in (student, projection, bias)
    ]
    if any(wanted) and not torch.compiler.is_compiling():
        loss = _FusedProjectedMse.apply(ops, *inputs)
    else:
        loss = ops.projected_mse(*inputs, *(asked and reduction != "none" for asked in wanted))[0]
    return loss.view(student.shape[:-1]) if reduction == "none" else loss


# --------------------------------------------------------------------------- public function


def projected_mse_loss(
    student: Tensor,  # [*, ds]
    teacher: Tensor,  # [*, dt]
    projection: Tensor,  # [ds, dt] or [dt, ds]
    *,
    bias: Tensor | None = None,  # [dt] or [ds]
    mask: Tensor | None = None,  # [*]
    direction: str | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    method: str = "direct",
    impl: str = "auto",
) -> Tensor:
    r"""Mean squared error between hidden states of two sizes, one of which is projected to the other.

    .. math:: L_i = \tfrac{1}{d_t} \| h^s_i P + b - h^t_i \|^2 \quad (\text{up}), \qquad
              L_i = \tfrac{1}{d_s} \| h^t_i P + b - h^s_i \|^2 \quad (\text{down})

    Up is TinyBERT's loss on hidden states (Jiao et al. 2019, arXiv 1909.10351, equation 8). Where nothing is masked,
    same value as ``F.mse_loss(student @ projection + bias, teacher)``. Neither the projected rows nor the difference
    exist in memory: loss and gradients take the gradients, and the projection's size per thread.

    Args:
        student: ``[*, ds]``, fp32, bf16, fp16 or fp64; any strides. Receives a gradient.
        teacher: ``[*, dt]`` with the same leading dimensions; must not require grad.
        projection: ``[ds, dt]`` takes the student up to the teacher's space, ``[dt, ds]`` the teacher down to the
            student's. Receives a gradient. fp32 beside rows of half precision is used as it is; any other difference of
            dtypes is resolved by taking the wider.
        bias: one entry per column of the projection; receives a gradient.
        mask: ``[*]`` boolean or integer, non-zero = valid. Other rows have zero loss and zero gradient whatever they
            hold, and are not read.
        direction: ``"up"`` or ``"down"``; None reads it off the shape of the projection, and takes a square one up.
        normalize: scale the rows of both sides, after the projection, to length 1: ``2 - 2 cos`` of the angle between
            them, divided by the features. A row of length 1e-12 or less has no direction: it stays zero, and receives
            no gradient.
        reduction: ``"mean"`` over valid rows and features, ``"sum"`` over both, or ``"none"``: ``[*]``, for each row
            the mean over its features.
        num_items: replaces the number of valid rows in a mean, for gradient accumulation and data parallelism.
        method: ``"direct"``, or ``"gram"``: value and gradients from products of features with features (up only, no
            ``normalize``, no ``"none"``), with two large matrix products instead of three where ds is far below dt.
            They are differences of large numbers: what it costs in accuracy, see docs/losses.md. The reference computes
            the same loss either way.
        impl: ``"auto"``, ``"reference"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Returns:
        fp32 (fp64 where an input is fp64): 0-d, or ``[*]`` for ``reduction="none"``.

    Raises:
        ValueError, TypeError: an argument breaks its rule; the message names it and the way out.
        RuntimeError: the teacher requires grad, the implementation is missing, or backward runs twice through this loss
            with ``create_graph=True``.
    """
    _check_options(direction, reduction, num_items, method, normalize)
    _check_tensors(student, teacher, projection, bias, mask, direction)
    up = _goes_up(student, teacher, projection, direction)
    if method == "gram" and not up:
        _fail("method 'gram' goes up, and this projection goes down, where it would save nothing; use 'direct'")
    resolved = _dispatch.resolve(LOSS, student.device, impl)
    if resolved == "reference":
        return projected_mse_reference(
            student,
            teacher,
            projection,
            bias=bias,
            mask=mask,
            direction=direction,
            normalize=normalize,
            reduction=reduction,
            num_items=num_items,
        )
    ops = _dispatch.ops(resolved)
    return _call(ops, student, teacher, projection, bias, mask, up, normalize, method, reduction, num_items)


# --------------------------------------------------------------------------- objective term


class ProjectedMSE(nn.Module):
    r"""`projected_mse_loss` of the hidden states of pairs of layers, :math:`\sum_l w_l L_l`, as a term of an objective.

    It owns the projections, which are trained with the student, stored beside it in checkpoints
    (``objective.safetensors``), and no part of it: an exported student does not contain them.

    Args:
        student_size, teacher_size: features of the hidden states.
        layers: ``"last"``: the last layer of both; ``"uniform"``: every layer of the student with the last of its share
            of the teacher's layers (TinyBERT's mapping: of 4 and 12 layers 0-2, 1-5, 2-8, 3-11); or pairs of a student
            and a teacher layer, each an index, a module's name or ``"embeddings"``, see `capture`.
        depths: how many layers student and teacher have; ``"uniform"`` needs them.
        direction: ``"up"``: the student is projected to the teacher's size; ``"down"``: the teacher to the student's.
        shared: one projection for all pairs, as in TinyBERT and Zhao et al. 2019 (arXiv 1909.11687), or one for each.
        bias: whether a projection has a bias.
        normalize, reduction, method, impl: see `projected_mse_loss`; the mean is over valid tokens and features.
        layer_weights: one per pair; None is 1 for each.
        weight: factor of this term in the objective's sum.
        name: under which the term's value is logged; each pair's is logged as ``<name>.<student layer>-<teacher
            layer>``.

    Attributes:
        projections: one ``[student_size, teacher_size]`` (down: the reverse), or one per pair, drawn like the weights
            of ``nn.Linear``.
        biases: one for each projection, zero at first, or none.

    Raises:
        ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        student_size: int,
        teacher_size: int,
        layers: str | Sequence[tuple[int | str, int | str]] = "last",
        *,
        depths: tuple[int, int] | None = None,
        direction: str = "up",
        shared: bool = True,
        bias: bool = True,
        normalize: bool = False,
        reduction: str = "mean",
        method: str = "direct",
        layer_weights: Sequence[float] | None = None,
        weight: float = 1.0,
        name: str = LOSS,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        for side, size in (("student_size", student_size), ("teacher_size", teacher_size)):
            if size < 1:
                _fail(f"{side} must be above 0, got {size}")
        if direction not in DIRECTIONS:
            _fail(f"direction must be 'up' or 'down', got {direction!r}")
        _check_options(direction, reduction, None, method, normalize)
        if method == "gram" and direction == "down":
            _fail("method 'gram' goes up, got direction='down', where it would save nothing; use 'direct'")
        if reduction == "none":
            _fail("reduction must be mean or sum in an objective, got 'none'")
        self.pairs = _layer_pairs(layers, depths)
        self.layer_weights = [1.0] * len(self.pairs) if layer_weights is None else [float(w) for w in layer_weights]
        if len(self.layer_weights) != len(self.pairs):
            _fail(f"layer_weights must have one number per pair, {len(self.pairs)}, got {len(self.layer_weights)}")
        for layer_weight in self.layer_weights:
            if not (math.isfinite(layer_weight) and layer_weight >= 0):
                _fail(f"layer_weights must be finite and not negative, got {layer_weight}")
        self.shared = shared
        self.weight = weight
        self.name = name
        self.options: dict[str, Any] = {
            "direction": direction,
            "normalize": normalize,
            "reduction": reduction,
            "method": method,
            "impl": impl,
        }
        source, target = (student_size, teacher_size) if direction == "up" else (teacher_size, student_size)
        count = 1 if shared else len(self.pairs)
        bound = source**-0.5
        self.projections = nn.ParameterList(torch.empty(source, target).uniform_(-bound, bound) for _ in range(count))
        self.biases = nn.ParameterList(torch.zeros(target) for _ in range(count if bias else 0))
        self.student_signals = frozenset(f"hidden_states@{student}" for student, _ in self.pairs)
        self.teacher_signals = frozenset(f"hidden_states@{teacher}" for _, teacher in self.pairs)

    @classmethod
    def between(
        cls,
        student: nn.Module,
        teacher: nn.Module,
        layers: str | Sequence[tuple[int | str, int | str]] = "uniform",
        **options: Any,
    ) -> ProjectedMSE:
        """The term for two models, whose configurations say how many layers they have, and of what size.

        Args:
            student, teacher: transformers models.
            layers, **options: see `ProjectedMSE`.

        Raises:
            ValueError: a model's configuration lacks ``hidden_size`` or ``num_hidden_layers``; or as the constructor.
        """

        def read(side: str, model: nn.Module, key: str) -> int:
            value = getattr(getattr(model, "config", None), key, None)
            if not isinstance(value, int):
                _fail(f"the {side}'s configuration must have {key}, got {value!r}; pass sizes and depths yourself")
            return value

        sides = (("student", student), ("teacher", teacher))
        sizes = [read(side, model, "hidden_size") for side, model in sides]
        student_depth, teacher_depth = (read(side, model, "num_hidden_layers") for side, model in sides)
        return cls(sizes[0], sizes[1], layers, depths=(student_depth, teacher_depth), **options)

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many tokens of `batch` this term's mean runs over."""
        mask = _valid_tokens(batch)
        if mask is not None:
            return mask.sum()
        tokens = next(value for key in ("input_ids", "inputs_embeds") if (value := batch.get(key)) is not None)
        return torch.tensor(tokens.size(0) * tokens.size(1))

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """Student and teacher signals by name, and the batch -> the unweighted loss, 0-d.

        ``attention_mask [B, N]`` of the batch, and ``segment_ids [B, N]`` that are negative, say which tokens are
        padding.
        """
        return self.forward_with_parts(student, teacher, batch, num_items)[0]

    def forward_with_parts(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        num_items: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` returns, and the value of each pair of layers by name, without its weight (0-d, detached)."""
        mask = _valid_tokens(batch)
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for place, ((below, above), weight) in enumerate(zip(self.pairs, self.layer_weights, strict=True)):
            projection = 0 if self.shared else place
            value = projected_mse_loss(
                student[f"hidden_states@{below}"],
                teacher[f"hidden_states@{above}"].detach(),
                self.projections[projection],
                bias=self.biases[projection] if len(self.biases) > 0 else None,
                mask=mask,
                num_items=num_items if self.options["reduction"] == "mean" else None,
                **self.options,
            )
            parts[f"{below}-{above}"] = value.detach()
            total = weight * value if total is None else total + weight * value
        assert total is not None
        return total, parts

    def extra_repr(self) -> str:
        return ", ".join(
            f"{key}={value!r}"
            for key, value in {
                "layers": self.pairs,
                "shared": self.shared,
                "weight": self.weight,
                **self.options,
            }.items()
        )


def _valid_tokens(batch: Mapping[str, Tensor]) -> Tensor | None:
    mask, segments = batch.get("attention_mask"), batch.get("segment_ids")
    if segments is None:
        return None if mask is None else mask.bool()
    return segments >= 0 if mask is None else mask.bool() & (segments >= 0)


def _layer_pairs(
    layers: str | Sequence[tuple[int | str, int | str]], depths: tuple[int, int] | None
) -> list[tuple[int | str, int | str]]:
    """Pairs of a student and a teacher layer, from one of the ways to say them."""
    if layers == "last":
        return [(-1, -1)]
    if layers == "uniform":
        if depths is None or min(depths) < 1:
            _fail(f"layers='uniform' needs depths=(layers of the student, layers of the teacher), got {depths}")
        below, above = depths
        return [(layer, -(-(layer + 1) * above // below) - 1) for layer in range(below)]
    if isinstance(layers, str) or not layers:
        _fail(f"layers must be 'uniform', 'last' or pairs such as [(0, 2), (1, 5)], got {layers!r}")
    for pair in layers:
        if len(pair) != 2:
            _fail(f"layers must be pairs of a student and a teacher layer, got {pair}")
    pairs = [(student, teacher) for student, teacher in layers]
    if len(set(pairs)) != len(pairs):
        _fail(f"layers must be distinct pairs, got {pairs}")
    return pairs
