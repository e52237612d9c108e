# SPDX-License-Identifier: Apache-2.0
"""Shared-projection loss of Zhao et al.: the weights of a narrow model against those of a wide one of the same depth.

Plain PyTorch: the products are small beside a training step, and there is nothing to fuse with.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydistill.losses.checks import shape

LOSS = "shared_projection"
Direction = Literal["down", "up"]
DIRECTIONS: tuple[Direction, ...] = ("down", "up")
REDUCTIONS = ("mean", "sum")

# U (left) and V (right) of one pair of parameters.
Pair = tuple[Tensor | None, Tensor]


def shared_projection_loss(
    student_parameters: Sequence[Tensor],  # [ms, ns] or [ns]
    teacher_parameters: Sequence[Tensor],  # [mt, nt] or [nt]
    projections: Sequence[Pair],
    direction: Direction,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""Squared distance between projected parameters of one model and their counterparts in the other.

    .. math::
        L_\downarrow = \sum_\theta \| U \theta_t V - \theta_s \|^2
        \qquad
        L_\uparrow = \sum_\theta \| \theta_t - U \theta_s V \|^2

    Where ``U`` is None, the parameter is projected on the right only: :math:`\theta V`. This is the form for biases and
    other vectors, and for tables whose rows mean the same in both models. Projections are shared between parameters
    by passing the same tensor again.

    Same value as ``sum(F.mse_loss(U @ t @ V, s) for ...)`` (down), ``sum(F.mse_loss(U @ s @ V, t) for ...)`` (up), with
    the product in the cheaper order. No parameter is copied: beside the products of each pair, and for ``"up"`` one
    tensor of the teacher parameter's size, nothing is kept for the backward.

    Args:
        student_parameters: floating-point, 1-D or 2-D.
        teacher_parameters: as many, each with the dimensions of its counterpart, of any size.
        projections: (U, V) of each. Down: U ``[ms, mt]``, V ``[nt, ns]``. Up: U ``[mt, ms]``, V ``[ns, nt]``. U must be
            None for 1-D parameters.
        direction: ``"down"`` projects the teacher, ``"up"`` the student.
        reduction: what is taken of each pair's squares before the sum over the pairs: ``"mean"`` (no parameter counts
            more than another because it is larger) or ``"sum"`` (the formula above).

    Returns:
        0-d, in fp32 (fp64 where a tensor is), also under autocast; 0 without any pair. Gradients reach student, teacher
        and projections, whichever require them.

    Raises:
        TypeError: tensors that are not floating-point.
        ValueError: an unknown direction or reduction, sequences of different lengths, or shapes or devices that do not
            fit.

    Zhao et al. 2019, arXiv 1909.11687v1, section 3.2, the two unnumbered equations of the projection losses. The paper
    sums squares; the mean is our default.
    """
    if direction not in DIRECTIONS:
        _fail(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if reduction not in REDUCTIONS:
        _fail(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    counts = [len(student_parameters), len(teacher_parameters), len(projections)]
    if len(set(counts)) > 1:
        _fail(
            f"student_parameters, teacher_parameters and projections must be as many, got {counts[0]}, {counts[1]} "
            f"and {counts[2]}"
        )
    total: Tensor | None = None
    for index, (student, teacher, (left, right)) in enumerate(
        zip(student_parameters, teacher_parameters, projections, strict=True)
    ):
        source, target = (teacher, student) if direction == "down" else (student, teacher)
        _check(index, source, target, left, right)
        given = [tensor for tensor in (source, target, left, right) if tensor is not None]
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given) else torch.float32
        with torch.autocast(student.device.type, enabled=False):
            factors = [tensor.to(dtype) for tensor in (left, source, right) if tensor is not None]
            # multi_dot chooses the order of three factors by their sizes.
            value = F.mse_loss(torch.linalg.multi_dot(factors), target.to(dtype), reduction=reduction)
        total = value if total is None else total + value
    return torch.zeros(()) if total is None else total


def _check(index: int, source: Tensor, target: Tensor, left: Tensor | None, right: Tensor) -> None:
    given = {"the parameter": source, "its counterpart": target, "U": left, "V": right}
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            _fail(f"pair {index}: {name} must be a floating-point tensor, got {tensor.dtype}", TypeError)
        if tensor is not None and tensor.device != source.device:
            _fail(f"pair {index}: {name} must be on {source.device} like the parameter, got {tensor.device}")
    if source.dim() not in (1, 2) or target.dim() != source.dim():
        _fail(f"pair {index}: must be two vectors or two matrices, got {shape(source)} and {shape(target)}")
    if left is not None and source.dim() == 1:
        _fail(f"pair {index}: a vector is projected on the right only, got U of {shape(left)}; pass None")
    if left is None and source.shape[:-1] != target.shape[:-1]:
        _fail(
            f"pair {index}: without U both must have the same number of rows, got {shape(source)} and {shape(target)}"
        )
    wanted = {"U": [target.size(0), source.size(0)], "V": [source.size(-1), target.size(-1)]}
    for name, tensor in (("U", left), ("V", right)):
        if tensor is not None and list(tensor.shape) != wanted[name]:
            _fail(
                f"pair {index}: {name} must be {wanted[name]} to take {shape(source)} to {shape(target)}, got "
                f"{shape(tensor)}"
            )


def _fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{LOSS}: {message}")


class SharedProjections(nn.Module):
    """The trainable U and V of `shared_projection_loss`, one of each per pair of sizes, shared by all layers.

    A parameter ``[1536, 384]`` of the teacher with a counterpart ``[384, 96]`` uses the left projection between 1536
    and 384 and the right one between 384 and 96, in whichever layer it stands. They begin as Gaussian noise of standard
    deviation ``1 / sqrt(size that is summed over)``, which keeps the scale of the weights, and are needed for training
    only.

    The parameters themselves are not owned: they are handed to every call, which must see them whole. Data parallelism
    does; models that FSDP has cut into pieces do not.

    Args:
        student_parameters, teacher_parameters: matched by name, see `shared_projection_loss`.
        direction: ``"down"`` or ``"up"``.
        tables: names of the 2-D parameters whose rows mean the same in both models (embeddings): they are projected on
            the right only.
        reduction: see `shared_projection_loss`.
        seed: of the noise; the global random state is left alone.

    Raises:
        ValueError: names that differ or are none, a table that is none of them or has another number of rows, and what
            `shared_projection_loss` refuses.
    """

    # They are free to be as large as they need; `DistillationTrainer` looks here.
    no_weight_decay = True

    def __init__(
        self,
        student_parameters: Mapping[str, Tensor],
        teacher_parameters: Mapping[str, Tensor],
        direction: Direction,
        *,
        tables: Collection[str] = (),
        reduction: str = "mean",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.direction = direction
        self.reduction = reduction
        _check_names(student_parameters, teacher_parameters)
        if unknown := sorted(set(tables) - student_parameters.keys()):
            _fail(f"tables must name parameters, got {', '.join(unknown)}")
        self.matrices = nn.ParameterDict()
        self._keys: dict[str, tuple[str | None, str]] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, student in student_parameters.items():
            teacher = teacher_parameters[name]
            source, target = (teacher, student) if direction == "down" else (student, teacher)
            left = None
            if source.dim() == 2 and name not in tables:
                left = self._add("left", (target.size(0), source.size(0)), source.size(0), generator, source)
            right = self._add("right", (source.size(-1), target.size(-1)), source.size(-1), generator, source)
            self._keys[name] = (left, right)
        with torch.no_grad():
            self(student_parameters, teacher_parameters)  # refuses what does not fit, before any training

    def _add(self, side: str, size: tuple[int, int], fan_in: int, generator: torch.Generator, like: Tensor) -> str:
        key = f"{side}_{size[0]}_{size[1]}"
        if key not in self.matrices:
            noise = torch.randn(size, generator=generator) / fan_in**0.5
            self.matrices[key] = nn.Parameter(noise.to(like.device))
        return key

    def pair(self, name: str) -> Pair:
        """Return U (None for vectors and tables) and V of the parameter ``name``."""
        left, right = self._keys[name]
        return None if left is None else self.matrices[left], self.matrices[right]

    def forward(self, student_parameters: Mapping[str, Tensor], teacher_parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the loss, 0-d, for parameters of the names and sizes that this was built for."""
        _check_names(student_parameters, teacher_parameters)
        if student_parameters.keys() != self._keys.keys():
            _fail(f"parameters must be those that it was built for: {', '.join(self._keys)}")
        return shared_projection_loss(
            [student_parameters[name] for name in self._keys],
            [teacher_parameters[name] for name in self._keys],
            [self.pair(name) for name in self._keys],
            self.direction,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """What ``print`` shows beside the matrices."""
        return f"direction={self.direction!r}, reduction={self.reduction!r}, parameters={len(self._keys)}"


def _check_names(student_parameters: Mapping[str, Tensor], teacher_parameters: Mapping[str, Tensor]) -> None:
    if alone := sorted(student_parameters.keys() ^ teacher_parameters.keys()):
        _fail(f"student and teacher parameters must have the same names, only one side has {', '.join(alone[:5])}")
    if not student_parameters:
        _fail("student_parameters must hold at least one parameter, got none")
