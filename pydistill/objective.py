# SPDX-License-Identifier: Apache-2.0
"""The objective of a distillation: a weighted sum of terms, each saying which signals it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

# What a term must have beside `forward(student, teacher, batch, num_items)` and `count_items(batch)`.
TERM_ATTRIBUTES = ("name", "weight", "student_signals", "teacher_signals")


class Objective(nn.Module):
    r"""Weighted sum of loss terms: :math:`L = \sum_k w_k L_k`.

    A term is an ``nn.Module`` (it may have parameters, which are then trained with the student) with

    - ``name``: under which its value is logged; unique within the objective;
    - ``weight``: :math:`w_k`, finite and not negative;
    - ``student_signals``, ``teacher_signals``: the names of the tensors it reads from either model, for
      instance ``frozenset({"logits"})``;
    - ``forward(student, teacher, batch, num_items=None)``: its unweighted value, a 0-d tensor;
    - ``count_items(batch)``: how many items its mean runs over in this batch (a number or 0-d tensor);
    - optionally ``batch_keys``: keys of the batch that no model reads, for the term itself;
    - optionally ``forward_with_parts``, with the arguments of ``forward``: its value and, by name, the parts (0-d,
      detached) that it consists of, which are logged as ``<term>.<part>``.

    Args:
        terms: at least one term, of distinct names.

    Raises:
        TypeError: a term lacks one of the above.
        ValueError: no term, a repeated name, a weight that is negative or not finite, or a term that
            overwrites a student signal (``inplace``) which another term reads too.
    """

    def __init__(self, terms: Sequence[nn.Module]) -> None:
        super().__init__()
        terms = list(terms)
        if not terms:
            _fail("terms must hold at least one term, got none")
        for position, term in enumerate(terms):
            _check_term(position, term)
        names = [str(term.name) for term in terms]
        for name in names:
            if names.count(name) > 1:
                _fail(f"terms must have distinct names, got {name!r} {names.count(name)} times; pass name=")
        for term in terms:
            _check_sole_reader(term, terms)
        self.terms = nn.ModuleList(terms)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the terms, in order."""
        return tuple(str(term.name) for term in self.terms)

    @property
    def student_signals(self) -> frozenset[str]:
        """Every signal that some term reads from the student."""
        return frozenset[str]().union(*(_signals(term, "student_signals") for term in self.terms))

    @property
    def teacher_signals(self) -> frozenset[str]:
        """Every signal that some term reads from the teacher; empty where no teacher is needed."""
        return frozenset[str]().union(*(_signals(term, "teacher_signals") for term in self.terms))

    @property
    def batch_keys(self) -> frozenset[str]:
        """Every key that some term reads from the batch, beside ``labels`` and what the models read."""
        return frozenset[str]().union(*(getattr(term, "batch_keys", ()) for term in self.terms))

    def count_items(self, batch: Mapping[str, Tensor]) -> Tensor:
        """How many items each term's mean runs over in `batch`: fp32 ``[K]`` for K terms.

        Summed over the micro-batches of a step (and over processes) it is the `num_items` of `forward`.
        """
        counts = [cast(Callable[..., Any], term.count_items)(batch) for term in self.terms]
        return torch.stack([torch.as_tensor(count, dtype=torch.float32) for count in counts])

    def forward(
        self,
        student: Mapping[str, Tensor],
        teacher: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
        num_items: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluate every term on the signals of one batch.

        Args:
            student, teacher: signals by name; teacher signals must not require grad.
            batch: the batch as the collator made it; terms read ``labels`` and masks from it.
            num_items: replaces the denominators of the terms' means, so that micro-batches add up to one
                large batch: one number for all terms, or a tensor ``[K]`` with one per term (see
                `count_items`).

        Returns:
            the weighted sum (0-d, differentiable), and the unweighted value of each term, and of its parts, by name
            (0-d, detached).

        Raises:
            ValueError: a signal that a term reads is missing, a term's value is not 0-d, or `num_items` has
                another length than there are terms.
        """
        self._check_signals("student", student, self.student_signals)
        self._check_signals("teacher", teacher, self.teacher_signals)
        counts = self._per_term(num_items)
        total: Tensor | None = None
        parts: dict[str, Tensor] = {}
        for term, count in zip(self.terms, counts, strict=True):
            own: Mapping[str, Tensor] = {}
            if hasattr(term, "forward_with_parts"):
                value, own = cast(Any, term).forward_with_parts(student, teacher, batch, num_items=count)
            else:
                value = term(student, teacher, batch, num_items=count)
            if value.dim() != 0:
                _fail(f"term {term.name!r} must return a 0-d tensor, got shape {list(value.shape)}")
            weighted = value * _weight(term)  # a new tensor: the sum never shares memory with a part
            total = weighted if total is None else total + weighted
            parts[str(term.name)] = value.detach()
            parts |= {f"{term.name}.{name}": part for name, part in own.items()}
        assert total is not None
        return total, parts

    def _per_term(self, num_items: float | Tensor | None) -> list[Any]:
        if isinstance(num_items, Tensor) and num_items.dim() > 0:
            if num_items.shape != (len(self.terms),):
                _fail(f"num_items must have one entry per term, [{len(self.terms)}], got {list(num_items.shape)}")
            return list(num_items.unbind())
        return [num_items] * len(self.terms)

    def _check_signals(self, side: str, given: Mapping[str, Tensor], needed: frozenset[str]) -> None:
        for name in sorted(needed - given.keys()):
            readers = [repr(term.name) for term in self.terms if name in _signals(term, f"{side}_signals")]
            _fail(f"{side} signal {name!r} is read by {', '.join(readers)}, and only {sorted(given)} were given")


def _check_term(position: int, term: nn.Module) -> None:
    if not isinstance(term, nn.Module):
        _fail(f"terms[{position}] must be an nn.Module, got {type(term).__name__}", TypeError)
    missing = [name for name in TERM_ATTRIBUTES if not hasattr(term, name)]
    missing += [] if callable(getattr(term, "count_items", None)) else ["count_items()"]
    if missing:
        _fail(
            f"terms[{position}] ({type(term).__name__}) must have {', '.join(missing)}; see Objective",
            TypeError,
        )
    weight = _weight(term)
    if not (math.isfinite(weight) and weight >= 0):
        _fail(f"the weight of {term.name!r} must be finite and not negative, got {weight}")


def _check_sole_reader(term: nn.Module, terms: Sequence[nn.Module]) -> None:
    # A fused loss that writes its gradient over the signal leaves garbage for any other reader, silently.
    if not getattr(term, "inplace", False):
        return
    for other in terms:
        shared = sorted(_signals(term, "student_signals") & _signals(other, "student_signals"))
        if other is not term and shared:
            _fail(
                f"{term.name!r} has inplace=True and overwrites the student's {', '.join(shared)}, which "
                f"{other.name!r} reads too; pass inplace=False"
            )


def _weight(term: nn.Module) -> float:
    return float(cast(float, term.weight))


def _signals(term: nn.Module, side: str) -> frozenset[str]:
    return frozenset(getattr(term, side))


def _fail(message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"objective: {message}")
