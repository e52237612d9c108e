# SPDX-License-Identifier: Apache-2.0
"""One distillation step: what runs, what is asked of whom, and what the teacher must never be part of."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import MatchSignal, tiny_bert
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


def count_layers(model: Any) -> list[int]:
    """Grows by the index of every layer that runs."""
    ran: list[int] = []
    for index, layer in enumerate(model.encoder.layer):
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
    return ran


def values_by_hand(model: Any, layer: int, inputs: Any) -> Any:
    states = model(**inputs, output_hidden_states=True).hidden_states[layer]  # what enters the layer
    projected = model.encoder.layer[layer].attention.self.value(states)
    return projected.view(*projected.shape[:2], 2, -1).transpose(1, 2)


def test_signals_inside_two_headless_models() -> None:
    """Another layer of each; both stop there, and the gradients are those of the same loss by hand."""
    student, teacher, inputs = tiny_bert(seed=0, layers=3).bert, tiny_bert(seed=1, layers=4).bert.eval(), batch()
    term = MatchSignal("values@1", "values@encoder.layer.2")
    step = Distiller(student, teacher, term)
    with torch.no_grad():
        wanted = values_by_hand(teacher, 2, inputs)
    expected = term({term.signal: values_by_hand(student, 1, inputs)}, {term.teacher_signal: wanted}, inputs)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()

    student_ran, teacher_ran = count_layers(student), count_layers(teacher)
    output = step(**inputs)
    assert output.logits is None and output.parts == {"match": output.loss}
    assert (student_ran, teacher_ran) == ([0, 1], [0, 1, 2])
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is None) == (gradients[name] is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name])


def test_logits_and_inner_signals_come_from_one_forward() -> None:
    step, inputs = distiller(objective=[SoftTarget(divergence="mse"), MatchSignal("hidden_states@0")]), batch()
    ran = count_layers(step.student.bert)
    output = step(**inputs)
    assert ran == [0]
    alone = distiller()(**inputs)
    assert torch.equal(output.logits, alone.logits) and torch.equal(output.parts["soft_target"], alone.loss)
    assert output.parts["match"] > 0


def test_a_teacher_gives_inner_signals_in_its_own_dtype_and_without_a_graph() -> None:
    teacher = OnlineTeacher(tiny_bert(seed=1, layers=2, dropout=0.5))
    names, inputs = frozenset({"queries@0", "hidden_states@1"}), batch()
    expected = teacher.signals(inputs, names)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = teacher.signals(inputs, names)
    for name in names:
        assert again[name].dtype == torch.float32 and torch.equal(again[name], expected[name])
        assert not again[name].requires_grad and not again[name].is_inference()


def test_a_student_within_autocast_gives_inner_signals_in_bf16() -> None:
    step, inputs = distiller(objective=MatchSignal()), batch()
    seen: list[Any] = []
    step.objective.terms[0].register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(**inputs).loss.backward()
    student, teacher = seen[0][:2]
    assert student["values@-1"].dtype == torch.bfloat16 and teacher["values@-1"].dtype == torch.float32


def test_unreachable_parameters_are_frozen_and_all_others_train() -> None:
    step, inputs = distiller(objective=MatchSignal()), batch()
    names = step.freeze_unreachable(inputs)
    assert {"classifier.weight", "bert.encoder.layer.0.attention.self.query.weight"} <= set(names)
    step(**inputs).loss.backward()
    for name, parameter in step.student.named_parameters():
        assert parameter.requires_grad == (name not in names) == (parameter.grad is not None), name
    assert distiller().freeze_unreachable(inputs) == []


def test_activation_checkpointing_and_compilation_around_inner_signals_change_nothing() -> None:
    inputs = batch()

    def gradients(checkpointed: bool, compiled: bool) -> dict[str, Any]:
        step = Distiller(tiny_bert(layers=2), tiny_bert(seed=1), MatchSignal())
        if checkpointed:
            step.activation_checkpointing_enable()
        run = torch.compile(step, backend="aot_eager") if compiled else step
        run(**inputs).loss.backward()
        return {name: parameter.grad for name, parameter in step.student.named_parameters()}

    expected = gradients(False, False)
    for checkpointed, compiled in ((True, False), (False, True)):
        found = gradients(checkpointed, compiled)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] is None) == (gradient is None), name
            if gradient is not None:
                torch.testing.assert_close(found[name], gradient)


def test_student_only_is_the_whole_student_whatever_the_objective_reads() -> None:
    step, inputs, labels = distiller(objective=MatchSignal()), batch(), torch.tensor([0, 1, 1, 0])
    output = step(**inputs, labels=labels, student_only=True)
    expected = step.student(**inputs, labels=labels)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.logits, expected.logits)
    headless = Distiller(tiny_bert().bert, tiny_bert(seed=1), MatchSignal())
    assert headless(**inputs, student_only=True).logits is None


def test_accepts_a_term_a_list_or_an_objective() -> None:
    term = SoftTarget()
    for objective in (term, [term], Objective([term])):
        assert list(distiller(objective=objective).objective.terms) == [term]


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ValueError, match="the batch has sentence_id, which neither Bert"):
        distiller()(**batch(), sentence_id=torch.zeros(4))


def test_missing_recorded_logits_are_named() -> None:
    with pytest.raises(ValueError, match="the batch has no 'teacher_logits'.*pydistill.cache.with_logits"):
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
        (
            lambda: distiller(objective=MatchSignal("values@3", "values@0")),
            r"what the student cannot give: capture: 'values@3': .* has 1 layers.* from -1 to 0, got 3",
        ),
        (
            lambda: distiller(objective=MatchSignal("values@0", "values@3")),
            r"what the teacher cannot give: capture: 'values@3': .* has 2 layers.* from -2 to 1, got 3",
        ),
        (
            lambda: distiller(RecordedTeacher(), MatchSignal()),
            "what the teacher cannot give: RecordedTeacher: only logits are recorded, got values@-1; pass the model",
        ),
        (
            lambda: Distiller(tiny_bert().bert, tiny_bert(seed=1), SoftTarget()),
            "what the student cannot give: capture: 'logits': BertModel has no head",
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
