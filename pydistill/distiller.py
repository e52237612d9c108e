# SPDX-License-Identifier: Apache-2.0
"""START HERE: one distillation step as one module: batch -> teacher and student -> signals -> weighted sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pydistill.capture import LOGITS, Capture, capture, freeze_unreachable
from pydistill.objective import Objective
from pydistill.packing import SEGMENTS, model_inputs
from pydistill.teachers import TEACHER_PREFIX, EnsembleTeacher, OnlineTeacher, Teacher, input_names


@dataclass
class DistillerOutput(ModelOutput):
    """What one step returns.

    Args:
        loss: 0-d; the weighted sum of the objective, or the student's own loss in a `student_only` forward.
        logits: the student's; None where no term reads them, or the objective overwrote them (a term with
            ``inplace=True``).
        parts: unweighted value of each term by name, 0-d and detached; None in a `student_only` forward.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    parts: dict[str, Tensor] | None = None


class Distiller(nn.Module):
    """Student, teacher and objective as one module, whose forward is the whole training step.

    Data parallelism, sharding and mixed precision wrap this module. Student and objective are submodules. The teacher
    is not: it is in no state dict, no optimizer and no gradient bucket, ``train()`` does not reach it, and it keeps its
    own dtype.

    Both models run only as far as the objective reads them: where it reads the queries of a layer, the forward ends
    there (see `capture`). Student parameters behind that point never get a gradient; `freeze_unreachable` finds them.

    Args:
        student: the model that learns. It needs a head only where a term reads its logits.
        teacher: a `Teacher` (`OnlineTeacher`, `RecordedTeacher`), a plain model (made an `OnlineTeacher`), or
            None where no term of the objective reads a teacher.
        objective: an `Objective`, one term, or a sequence of terms.

    Raises:
        ValueError: the objective reads what student or teacher cannot give, the teacher is missing, has
            another number of labels than the student, or shares parameters with it.

    Example::

        distiller = Distiller(student, teacher, SoftTarget(temperature=2.0))
        output = distiller(input_ids=ids, attention_mask=mask, labels=labels)
        output.loss.backward()
    """

    student: PreTrainedModel

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: Teacher | nn.Module | None,
        objective: Objective | nn.Module | Sequence[nn.Module],
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = _as_objective(objective)
        # A plain attribute: the teacher's modules hide inside an object that is no nn.Module.
        self.teacher: Teacher | None = OnlineTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        self.student_inputs = input_names(student)
        self._student_capture = self._check_signals()
        self._check_terms()
        self._check_teacher()

    @property
    def needs_teacher(self) -> bool:
        """Whether some term reads a teacher signal."""
        return bool(self.objective.teacher_signals)

    @property
    def reads_logits(self) -> bool:
        """Whether some term reads the student's logits; otherwise they are not computed."""
        return LOGITS in self.objective.student_signals

    @property
    def batch_keys(self) -> frozenset[str]:
        """Every key that `forward` has a use for: of either model, of the objective, ``labels``, ``segment_ids``."""
        teacher = self.teacher.batch_keys if self.teacher is not None and self.needs_teacher else frozenset[str]()
        return self.student_inputs | teacher | self.objective.batch_keys | {"labels", SEGMENTS}

    def forward(
        self,
        labels: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        student_only: bool = False,
        **batch: Tensor,
    ) -> DistillerOutput:
        """One training step up to the loss.

        Args:
            labels: hard labels, for the terms that read them.
            num_items_in_batch: replaces the denominators of the objective's means, see `Objective.forward`.
            student_only: run the student alone; the loss is then the student's own, for evaluation.
            **batch: student inputs under their own names. Teacher inputs are the keys ``teacher_<input>`` where there
                are any (a teacher with its own tokenizer), otherwise the student's; recorded teacher logits are
                ``teacher_logits [B, C]``. With ``segment_ids [B, N]`` (packed rows, see `pydistill.packing`) both
                models get the block mask of the segments as their attention mask; the terms see the batch as it is.

        Returns:
            `DistillerOutput`.

        Raises:
            ValueError: the batch has a key that neither model reads, or lacks what the teacher reads.
        """
        self._check_batch(batch)
        student_batch = self._student_batch(batch)
        if student_only:
            if labels is not None:
                student_batch["labels"] = labels
            outputs = self.student(**student_batch)
            return DistillerOutput(
                loss=outputs.loss if labels is not None else None, logits=getattr(outputs, LOGITS, None)
            )

        teacher_signals: dict[str, Tensor] = {}
        if self.needs_teacher:
            assert self.teacher is not None
            teacher_signals = self.teacher.signals(batch, self.objective.teacher_signals)
        student_signals = {} if self._student_capture is None else self._student_capture(**student_batch)
        logits = student_signals.get(LOGITS)
        version = None if logits is None else logits._version
        if labels is not None:
            batch["labels"] = labels
        loss, parts = self.objective(student_signals, teacher_signals, batch, num_items=num_items_in_batch)
        # A term that works in place has written its gradient over the logits; that is not to be mistaken for
        # them.
        overwritten = logits is not None and logits._version != version
        return DistillerOutput(loss=loss, logits=None if overwritten else logits, parts=parts)

    def freeze_unreachable(self, batch: Mapping[str, Tensor]) -> list[str]:
        """Freeze the student's parameters that the objective cannot reach, found with one batch; returns their names.

        Data parallelism would otherwise wait for their gradients. See `pydistill.capture.unreachable_parameters`.
        """
        self._check_batch(batch)
        if self._student_capture is None:
            return []
        return freeze_unreachable(self.student, self._student_capture.signals, self._student_batch(batch))

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the student's activations in the backward; ``TrainingArguments`` turns it on."""
        self.student.activation_checkpointing_enable(**options)

    def _student_batch(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return model_inputs({name: value for name, value in batch.items() if name in self.student_inputs}, batch)

    def _check_batch(self, batch: Mapping[str, Tensor]) -> None:
        unknown = batch.keys() - self.batch_keys
        if not self.needs_teacher:
            # Recorded or tokenized for a teacher that this objective does not ask.
            unknown = {name for name in unknown if not name.startswith(TEACHER_PREFIX)}
        if unknown:
            _fail(
                f"the batch has {', '.join(sorted(unknown))}, which neither {type(self.student).__name__} nor the "
                f"teacher reads; known keys: {', '.join(sorted(self.batch_keys))}"
            )

    def _check_signals(self) -> Capture | None:
        signals = sorted(self.objective.student_signals)
        try:
            # A term may read the student's weights alone.
            student = capture(self.student, signals) if signals else None
        except ValueError as error:
            raise ValueError(f"Distiller: the objective reads what the student cannot give: {error}") from error
        if not self.needs_teacher:
            return student
        needed = self.objective.teacher_signals
        if self.teacher is None:
            _fail(
                f"the objective reads {sorted(needed)} from a teacher, got teacher=None; pass one or drop those terms"
            )
        try:
            self.teacher.check(needed)
        except ValueError as error:
            raise ValueError(f"Distiller: the objective reads what the teacher cannot give: {error}") from error
        return student

    def _check_terms(self) -> None:
        """The labels of a causal language model are its tokens, of every other model what its logits are about. And not
        every teacher has raw logits; of one output, a regression, there is no other kind."""
        config = getattr(self.student, "config", None)
        generates = getattr(self.student, "can_generate", lambda: False)()
        causal = generates and not getattr(config, "is_encoder_decoder", False)
        normalized = getattr(self.teacher, "log_probabilities", False) and _num_labels(self.student) != 1
        # An objective of a kind of its own, such as that of dual training, has no terms.
        for term in getattr(self.objective, "terms", ()):
            if getattr(term, "shift", causal) != causal:
                kind = "is a" if causal else "is no"
                _fail(f"{type(self.student).__name__} {kind} causal language model: give {term.name} shift={causal}")
            if normalized and getattr(term, "raw_logits", False):
                _fail(
                    f"{term.name} compares raw logits, and {type(self.teacher).__name__} has log-probabilities; choose "
                    "another divergence, or a teacher that has logits"
                )

    def _check_teacher(self) -> None:
        members = self.teacher.teachers if isinstance(self.teacher, EnsembleTeacher) else [self.teacher]
        student_parameters = {id(parameter) for parameter in self.student.parameters()}
        for teacher in members:
            if not isinstance(teacher, OnlineTeacher):
                continue
            if any(id(parameter) in student_parameters for parameter in teacher.model.parameters()):
                _fail(
                    "student and teacher share parameters, and the teacher's are frozen; pass copy.deepcopy(model) as "
                    "teacher"
                )
            if LOGITS in self.objective.teacher_signals:
                student_labels, teacher_labels = _num_labels(self.student), _num_labels(teacher.model)
                if student_labels != teacher_labels and None not in (student_labels, teacher_labels):
                    _fail(
                        f"the student has {student_labels} labels and the teacher {teacher_labels}: their logits "
                        "cannot be compared; load the student with the teacher's num_labels and label order"
                    )


def _as_objective(objective: Objective | nn.Module | Sequence[nn.Module]) -> Objective:
    if isinstance(objective, Objective):
        return objective
    return Objective([objective] if isinstance(objective, nn.Module) else objective)


def _num_labels(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_labels", None)


def _fail(message: str) -> NoReturn:
    raise ValueError(f"Distiller: {message}")
