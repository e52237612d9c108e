# SPDX-License-Identifier: Apache-2.0
"""One distillation step: what runs, what is asked of whom, and what the teacher must never be part of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import tiny_bert
from torch import nn

from pydistill import SoftTarget, _dispatch, soft_target_loss
from pydistill.distiller import Distiller
from pydistill.objective import Objective
from pydistill.teachers import OnlineTeacher, RecordedTeacher


def batch(rows: int = 4, length: int = 6, seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(5, 45, (rows, length)), "attention_mask": mask}


def distiller(teacher: Any = "online", objective: Any = None) -> Distiller:
    model = tiny_bert(seed=1, layers=2, dropout=0.1) if teacher == "online" else teacher
    return Distiller(tiny_bert(seed=0), model, objective or SoftTarget(divergence="mse"))


def test_step_is_the_loss_of_the_two_forwards() -> None:
    step, inputs = distiller(), batch()
    output = step(**inputs)
    assert isinstance(step.teacher, OnlineTeacher)
    with torch.no_grad():
        teacher_logits = step.teacher.model.eval()(**inputs).logits
    student_logits = step.student(**inputs).logits
    expected = soft_target_loss(student_logits, teacher_logits, divergence="mse")
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.logits, student_logits)
    assert output.parts == {"soft_target": output.loss}
    output.loss.backward()
    torch.autograd.backward(expected)  # the same gradients a second time
    for name, parameter in step.student.named_parameters():
        assert parameter.grad is not None, name


def test_teacher_is_in_no_parameter_list_state_dict_or_train_mode() -> None:
    step = distiller()
    assert isinstance(step.teacher, OnlineTeacher)
    teacher_ids = {id(parameter) for parameter in step.teacher.model.parameters()}
    assert not any(id(parameter) in teacher_ids for parameter in step.parameters())
    assert all(name.startswith("student.") for name in step.state_dict())
    assert step.state_dict().keys() == {f"student.{name}" for name in step.student.state_dict()}
    assert step.teacher.model not in list(step.modules())
    step.train()
    assert not any(module.training for module in step.teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in step.teacher.model.parameters())
    step.double()
    assert {parameter.dtype for parameter in step.teacher.model.parameters()} == {torch.float32}


def test_teacher_put_into_train_mode_by_its_owner_still_runs_without_dropout() -> None:
    step, inputs = distiller(), batch()
    assert isinstance(step.teacher, OnlineTeacher)
    before = step(**inputs).loss
    step.teacher.model.train()
    assert torch.equal(step(**inputs).loss, before)


def test_teacher_keeps_its_dtype_under_autocast() -> None:
    """The student trains in bf16; an fp32 teacher's signal is the fp32 one, to the bit."""
    step, inputs = distiller(), batch()
    assert step.teacher is not None
    expected = step.teacher.signals(inputs, frozenset({"logits"}))["logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        signal = step.teacher.signals(inputs, frozenset({"logits"}))["logits"]
        output = step(**inputs)
    assert signal.dtype == torch.float32 and torch.equal(signal, expected)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()


def test_teacher_dtype_of_its_own() -> None:
    teacher = OnlineTeacher(tiny_bert(seed=1), dtype=torch.bfloat16)
    step, inputs = distiller(teacher), batch()
    assert teacher.signals(inputs, frozenset({"logits"}))["logits"].dtype == torch.bfloat16
    step(**inputs).loss.backward()
    assert {parameter.dtype for parameter in step.student.parameters()} == {torch.float32}


def test_teacher_with_its_own_tokenization() -> None:
    step, inputs, other = distiller(), batch(), batch(length=9, seed=5)
    assert isinstance(step.teacher, OnlineTeacher)
    output = step(**inputs, **{f"teacher_{name}": value for name, value in other.items()})
    with torch.no_grad():
        teacher_logits = step.teacher.model(**other).logits
    expected = soft_target_loss(step.student(**inputs).logits, teacher_logits, divergence="mse")
    torch.testing.assert_close(output.loss, expected)
    assert not torch.equal(output.loss, step(**inputs).loss)


def test_inputs_that_only_the_teacher_reads() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = tiny_bert()

        def forward(self, input_ids: Any, labels: Any = None) -> Any:
            return self.model(input_ids=input_ids, labels=labels)

    inputs = batch()
    step = Distiller(Narrow(), tiny_bert(seed=1), SoftTarget())  # type: ignore[arg-type]
    changed = step(**inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}).loss
    assert not torch.equal(step(**inputs).loss, changed)  # the mask reached the teacher


def test_recorded_logits_equal_the_online_teacher() -> None:
    online, inputs = distiller(), batch()
    assert online.teacher is not None
    logits = online.teacher.signals(inputs, frozenset({"logits"}))["logits"]
    recorded = distiller(RecordedTeacher())(**inputs, teacher_logits=logits)
    assert torch.equal(recorded.loss, online(**inputs).loss)


def test_hard_labels_need_no_teacher_and_ignore_what_was_recorded_for_one() -> None:
    step, inputs = distiller(None, SoftTarget(hard_weight=1.0)), batch()
    labels = torch.tensor([0, 1, 1, -100])
    output = step(**inputs, labels=labels, teacher_logits=torch.full((4, 2), float("nan")))
    expected = nn.functional.cross_entropy(step.student(**inputs).logits, labels)
    torch.testing.assert_close(output.loss, expected)
    assert not step.needs_teacher


def test_a_teacher_that_nobody_asks_is_not_run() -> None:
    class Forbidden(RecordedTeacher):
        def signals(self, batch: Any, names: Any) -> Any:
            raise AssertionError("the teacher ran")

    step = distiller(Forbidden(), SoftTarget(hard_weight=1.0))
    step(**batch(), labels=torch.zeros(4, dtype=torch.long))


def test_student_only_runs_no_teacher_and_gives_the_students_own_loss() -> None:
    step, inputs = distiller(RecordedTeacher()), batch()
    labels = torch.tensor([0, 1, 1, 0])
    output = step(**inputs, labels=labels, student_only=True)
    expected = step.student(**inputs, labels=labels)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    assert output.parts is None
    assert step(**inputs, student_only=True).loss is None


def test_num_items_replaces_the_denominator() -> None:
    step, inputs = distiller(), batch()
    torch.testing.assert_close(step(**inputs, num_items_in_batch=torch.tensor(16.0)).loss, step(**inputs).loss / 4)


@pytest.mark.skipif(_dispatch.native is None, reason="in-place needs the compiled kernel")
def test_overwritten_logits_are_not_returned() -> None:
    step, inputs = distiller(objective=SoftTarget(inplace=True)), batch()
    output = step(**inputs)
    assert output.logits is None
    plain = distiller(objective=SoftTarget())
    expected = plain(**inputs)
    assert torch.equal(output.loss, expected.loss)
    output.loss.backward()
    expected.loss.backward()
    for ours, theirs in zip(step.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_accepts_a_term_a_list_or_an_objective() -> None:
    term = SoftTarget()
    for objective in (term, [term], Objective([term])):
        assert list(distiller(objective=objective).objective.terms) == [term]


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ValueError, match="the batch has sentence_id, which neither Bert"):
        distiller()(**batch(), sentence_id=torch.zeros(4))


def test_missing_recorded_logits_are_named() -> None:
    with pytest.raises(ValueError, match="the batch has no 'teacher_logits'.*label_transfer_set"):
        distiller(RecordedTeacher())(**batch())


def shared_parameters() -> Distiller:
    student = tiny_bert()
    return Distiller(student, student, SoftTarget())


class Hidden(SoftTarget):
    student_signals = frozenset({"hidden"})


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: distiller(None), r"reads \['logits'\] from a teacher, got teacher=None"),
        (lambda: distiller(tiny_bert(num_labels=3)), "student has 2 labels and the teacher 3"),
        (shared_parameters, "share parameters.*deepcopy"),
        (
            lambda: distiller(objective=Hidden()),
            "reads what the student cannot give: capture: a signal must be 'logits' or .* got 'hidden'",
        ),
    ],
)
def test_refuses(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match="Distiller: .*" + words):
        build()


def test_a_copy_of_the_student_may_teach_it() -> None:
    student = tiny_bert()
    step = Distiller(student, copy.deepcopy(student), SoftTarget())
    assert step(**batch()).loss.item() == pytest.approx(0, abs=1e-6)
    assert all(parameter.requires_grad for parameter in student.parameters())
