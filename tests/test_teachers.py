# SPDX-License-Identifier: Apache-2.0
"""Teachers of a step: what they give, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert

from pydistill import SoftTarget
from pydistill.distiller import Distiller
from pydistill.teachers import EnsembleTeacher, OnlineTeacher, RecordedTeacher, Teacher


def test_teachers_follow_the_protocol() -> None:
    assert isinstance(OnlineTeacher(tiny_bert()), Teacher) and isinstance(RecordedTeacher(), Teacher)
    assert not isinstance(RecordedTeacher(), torch.nn.Module)


def test_online_teacher_gives_tensors_that_a_loss_may_save() -> None:
    teacher = OnlineTeacher(tiny_bert())
    signal = teacher.signals({"input_ids": torch.tensor([[2, 7, 3]])}, frozenset({"logits"}))["logits"]
    assert not signal.requires_grad and not signal.is_inference()
    student = torch.randn(1, 2, requires_grad=True)
    (student * signal).sum().backward()


def test_teachers_say_which_signals_they_cannot_give() -> None:
    online, recorded = OnlineTeacher(tiny_bert()), RecordedTeacher()
    for teacher in (online, recorded):
        teacher.check(frozenset({"logits"}))
    online.check(frozenset({"logits", "queries@-1", "hidden_states@0"}))
    with pytest.raises(ValueError, match="'queries@1': .* has 1 layers"):
        online.check(frozenset({"queries@1"}))
    with pytest.raises(ValueError, match="only logits are recorded, got queries@0; pass the model itself as teacher"):
        recorded.check(frozenset({"logits", "queries@0"}))


def test_online_teacher_refuses() -> None:
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        OnlineTeacher("bert-base-uncased")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the batch holds no input of BertForSequenceClassification, only words"):
        OnlineTeacher(tiny_bert()).signals({"words": torch.zeros(1)}, frozenset({"logits"}))


class Given:
    """A teacher of one answer."""

    batch_keys = frozenset({"given"})

    def __init__(self, logits: list[list[float]]) -> None:
        self.logits = torch.tensor(logits)

    def check(self, names: frozenset[str]) -> None:
        pass

    def signals(self, batch: Any, names: frozenset[str]) -> dict[str, torch.Tensor]:
        return {"logits": self.logits}


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    """Golden values, which those of the mean of logits are not (.7325, .1171, .1504); one output has a plain mean."""
    student = [[1.0, -0.5, 0.25], [0.1, 0.2, -1.3], [2.0, 0.0, 0.5]]
    teacher = [[2.0, -1.0, 0.0], [-0.4, 0.9, 0.3], [1.5, 0.5, -0.5]]
    ensemble = EnsembleTeacher([Given(teacher), Given(teacher[::-1]), Given(student)])
    found = ensemble.signals({}, frozenset({"logits"}))["logits"].softmax(-1)
    torch.testing.assert_close(found[0], torch.tensor([0.699611117971, 0.139446728112, 0.160942153917]))
    torch.testing.assert_close(found.sum(-1), torch.ones(3))
    numbers = EnsembleTeacher([Given([[1.0], [4.0]]), Given([[3.0], [0.0]])]).signals({}, frozenset({"logits"}))
    assert numbers["logits"].tolist() == [[2.0], [2.0]]
    # Far apart, where probabilities underflow.
    far = EnsembleTeacher([Given([[0.0, 500.0]]), Given([[0.0, 400.0]])]).signals({}, frozenset({"logits"}))["logits"]
    torch.testing.assert_close(far, torch.tensor([[-400.0 - math.log(2), 0.0]]))


def test_an_ensemble_trains_a_student_and_refuses() -> None:
    models = [tiny_bert(seed=seed) for seed in (1, 2)]
    distiller = Distiller(tiny_bert(), EnsembleTeacher(models), SoftTarget())
    ids = torch.tensor([[2, 7, 9, 3]])
    distiller(input_ids=ids, attention_mask=torch.ones_like(ids)).loss.backward()
    assert isinstance(distiller.teacher, Teacher) and all(not model.training for model in models)
    with pytest.raises(ValueError, match="teachers must hold at least one, got none"):
        EnsembleTeacher([])
    with pytest.raises(ValueError, match="only logits have a mean, got values@-1"):
        EnsembleTeacher(models).check(frozenset({"logits", "values@-1"}))
    with pytest.raises(ValueError, match=r"all teachers must have the same classes, got logits \[\[1, 2\], \[1, 3\]\]"):
        EnsembleTeacher([Given([[0.0, 1.0]]), Given([[0.0, 1.0, 2.0]])]).signals({}, frozenset({"logits"}))
    with pytest.raises(ValueError, match="the student has 2 labels and the teacher 3"):
        Distiller(tiny_bert(), EnsembleTeacher([models[0], tiny_bert(num_labels=3)]), SoftTarget())
