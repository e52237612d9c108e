# SPDX-License-Identifier: Apache-2.0
"""Where teacher signals come from: models that run beside the student, or logits that are a column of the data.

Signals of any kind that are kept on disk, for any number of students, are in `pydistill.cache`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pydistill.capture import LOGITS, Capture, capture
from pydistill.packing import model_inputs

# Batch keys of a teacher that reads its own tokenization: this prefix, then the name of the input.
TEACHER_PREFIX = "teacher_"
RECORDED_LOGITS = "teacher_logits"


@runtime_checkable
class Teacher(Protocol):
    """Gives the teacher signals of a batch. Never an ``nn.Module``, so that no student ever owns its weights.

    Attributes:
        batch_keys: keys of the batch that it may read.
        log_probabilities: optional; whether its logits are log-probabilities, which are as good as logits to everything
            but a comparison of raw logits.
        collator: optional; ``collator(collate)`` returns a collator that adds what the teacher reads to its batches.
    """

    @property
    def batch_keys(self) -> frozenset[str]: ...

    def check(self, names: frozenset[str]) -> None:
        """Raise a ValueError that says why, if it cannot give all of the signals `names`."""
        ...

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Return the signals `names` for `batch`: tensors that do not require grad."""
        ...


class OnlineTeacher:
    """A teacher model that runs on every batch, always in eval mode and without gradients.

    It takes the model over: parameters are frozen, and cast where `dtype` says so. The forward runs outside autocast,
    in the model's own dtype, whatever precision the student trains in, and on the device of the batch. It ends with the
    last signal that is asked for: a teacher whose fourth layer is read never runs its fifth (see `capture`).

    Args:
        model: called with those keys of the batch that its forward names.
        dtype: cast the model's floating-point parameters, for instance to ``torch.bfloat16``; None keeps
            them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        if not isinstance(model, nn.Module):
            _fail("OnlineTeacher", f"model must be an nn.Module, got {type(model).__name__}", TypeError)
        self.model = model.requires_grad_(False).eval()
        if dtype is not None:
            self.model = self.model.to(dtype)
        self.input_names = input_names(model)
        self._captures: dict[frozenset[str], Capture] = {}

    @property
    def batch_keys(self) -> frozenset[str]:
        """The model's inputs, each with and without the prefix ``teacher_``."""
        return self.input_names | {TEACHER_PREFIX + name for name in self.input_names}

    def check(self, names: frozenset[str]) -> None:
        """See `Teacher.check`."""
        self._capture(names)

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Run the model on the keys ``teacher_<input>`` of `batch`, or on the student's inputs if there are none.

        Raises:
            ValueError: `batch` holds none of the model's inputs, or the model cannot give the signals `names`.
        """
        inputs = {
            name: batch[TEACHER_PREFIX + name] for name in self.input_names if TEACHER_PREFIX + name in batch
        } or {name: batch[name] for name in self.input_names if name in batch}
        if not inputs:
            _fail(
                "OnlineTeacher",
                f"the batch holds no input of {type(self.model).__name__}, only {', '.join(sorted(batch))}",
            )
        device = next(iter(inputs.values())).device
        first = next(self.model.parameters(), None)
        if first is not None and first.device != device:
            self.model.to(device)
        self.model.eval()
        # Not inference_mode: a loss that autograd differentiates may save the teacher's tensors, and
        # inference tensors cannot be saved.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return self._capture(names)(**model_inputs(inputs, batch))

    def _capture(self, names: frozenset[str]) -> Capture:
        if names not in self._captures:
            self._captures[names] = capture(self.model, sorted(names))
        return self._captures[names]


class EnsembleTeacher:
    r"""Several teachers as one: the mean of their class probabilities (Liu et al. 2019, arXiv 1904.09482, equation 3).

    .. math:: \text{logits} = \log \frac{1}{K} \sum_k \operatorname{softmax}(z_k)

    Given as logarithms, so that a soft target at temperature 1 is the mean itself; at another temperature it is that
    mean softened. The mean of the logits would be another distribution. Of teachers with one output, which is a
    regression, the mean is that of the outputs.

    Args:
        teachers: teachers, or models (made `OnlineTeacher`), of the same classes in the same order; at least one.
    """

    log_probabilities = True

    def __init__(self, teachers: Sequence[Teacher | nn.Module]) -> None:
        self.teachers = [OnlineTeacher(one) if isinstance(one, nn.Module) else one for one in teachers]
        if not self.teachers:
            _fail("EnsembleTeacher", "teachers must hold at least one, got none")

    @property
    def batch_keys(self) -> frozenset[str]:
        """Those of all of them."""
        return frozenset().union(*(one.batch_keys for one in self.teachers))

    def check(self, names: frozenset[str]) -> None:
        """See `Teacher.check`."""
        if other := sorted(names - {LOGITS}):
            _fail(
                "EnsembleTeacher", f"only logits have a mean, got {', '.join(other)}; pass one of the models as teacher"
            )
        for one in self.teachers:
            one.check(names)

    def collator(self, collate: Callable[[list[Any]], dict[str, Any]]) -> Callable[[list[Any]], dict[str, Any]]:
        """`collate` with what each of them adds to a batch."""
        for one in self.teachers:
            collate = with_signals(one, collate)
        return collate

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Return the logarithm of the mean of the probabilities, in fp32 (of one output: the mean).

        Raises:
            ValueError: the teachers have different numbers of classes.
        """
        found = [one.signals(batch, names)[LOGITS].float() for one in self.teachers]
        sizes = {tuple(logits.shape) for logits in found}
        if len(sizes) > 1:
            _fail("EnsembleTeacher", f"all teachers must have the same classes, got logits {sorted(map(list, sizes))}")
        return {LOGITS: mean_prediction(torch.stack(found))}


def mean_prediction(logits: Tensor) -> Tensor:
    """Logits of K teachers ``[K, ..., C]`` -> the logarithm of the mean of their probabilities ``[..., C]``; of one
    output, which is a score, the mean."""
    if logits.shape[-1] == 1:
        return logits.mean(0)
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def with_signals(
    teacher: Teacher | None, collate: Callable[[list[Any]], dict[str, Any]]
) -> Callable[[list[Any]], dict[str, Any]]:
    """`collate`, with what the teacher adds to batches where it adds anything."""
    collator = getattr(teacher, "collator", None)
    return collate if collator is None else collator(collate)


class RecordedTeacher:
    """A teacher whose logits come with the batch, as ``teacher_logits [B, C]`` (see `cache.with_logits`)."""

    batch_keys = frozenset({RECORDED_LOGITS})

    def check(self, names: frozenset[str]) -> None:
        """See `Teacher.check`."""
        if other := sorted(names - {LOGITS}):
            _fail(
                "RecordedTeacher", f"only logits are recorded, got {', '.join(other)}; pass the model itself as teacher"
            )

    def signals(self, batch: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        """Return the recorded logits.

        Raises:
            ValueError: `batch` has none.
        """
        if RECORDED_LOGITS not in batch:
            _fail(
                "RecordedTeacher",
                f"the batch has no {RECORDED_LOGITS!r}, only {', '.join(sorted(batch))}; give the training rows "
                "theirs with pydistill.cache.with_logits first",
            )
        return {LOGITS: batch[RECORDED_LOGITS]}


def input_names(model: nn.Module) -> frozenset[str]:
    """Names of the tensors that a model's forward takes, ``labels`` excepted."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named) - {"labels"}


def _fail(where: str, message: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{where}: {message}")
