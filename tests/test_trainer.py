# SPDX-License-Identifier: Apache-2.0
"""The trainer: logs, checkpoints, exact resume, accumulation, evaluation, optimizers, order, collation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors import safe_open
from tiny_models import MatchSignal, tiny_bert, tiny_rows, tiny_sentences, tiny_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    TrainingArguments,
)

from pydistill import ProjectedMSE, SoftTarget
from pydistill.cache import TeacherCache, tokenized, with_logits, write_cache
from pydistill.distiller import Distiller
from pydistill.teachers import OnlineTeacher, RecordedTeacher
from pydistill.trainer import (
    DistillationCollator,
    DistillationTrainer,
    OptimizerConfig,
    last_checkpoint,
    row_lengths,
)


class Factor(nn.Module):
    """A term with a parameter of its own: mean of (factor * first logit - 1) squared."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.weight = "factor", 0.5
        self.student_signals, self.teacher_signals = frozenset({"logits"}), frozenset[str]()
        self.factor = nn.Parameter(torch.tensor(0.3))

    def count_items(self, batch: Any) -> int:
        return batch["input_ids"].shape[0]

    def forward(self, student: Any, teacher: Any, batch: Any, num_items: Any = None) -> Any:
        errors = (self.factor * student["logits"][:, 0] - 1).square()
        return errors.sum() / (len(errors) if num_items is None else num_items)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(**options | changes)


def trainer(
    folder: Path,
    *,
    rows: int = 22,
    dropout: float = 0.0,
    objective: Any = None,
    teacher: Any = "online",
    data: Dataset | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> DistillationTrainer:
    model = tiny_bert(seed=1, layers=2, dropout=0.1) if teacher == "online" else teacher
    distiller = Distiller(tiny_bert(seed=0, dropout=dropout), model, objective or SoftTarget(divergence="mse"))
    return DistillationTrainer(
        distiller,
        arguments(folder, **changes),
        tiny_rows(rows) if data is None else data,
        tiny_rows(12, seed=9),
        processing_class=tiny_tokenizer(),
        compute_metrics=accuracy,
        **options or {},
    )


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def weights(run: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.distiller.state_dict().items()}


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_different(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


# --------------------------------------------------------------------------- training and logs


def test_training_lowers_the_distance_to_the_teacher(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=40, logging_steps=10)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < 0.5 * losses[0]


def test_parts_are_logged_as_means_over_the_window(tmp_path: Path) -> None:
    """Two terms, uneven micro-batches, windows that do not divide the steps: the logs are step means."""
    seen: list[dict[str, float]] = []

    class Recording(DistillationTrainer):
        def _add_parts(self, parts: Any) -> None:
            seen.append({name: float(value) for name, value in parts.items()})
            super()._add_parts(parts)

    objective = [SoftTarget(weight=0.5), SoftTarget(name="hard", weight=2.0, hard_weight=1.0)]
    distiller = Distiller(tiny_bert(), tiny_bert(seed=1), objective)
    args = arguments(tmp_path, gradient_accumulation_steps=3, max_steps=7, logging_steps=3)
    run = Recording(distiller, args, tiny_rows(22), processing_class=tiny_tokenizer())
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [3, 6]
    # 22 rows in batches of 4 are 6 micro-batches, 2 steps an epoch: every step is 3 micro-batches.
    steps = [{name: sum(part[name] for part in seen[i : i + 3]) for name in seen[0]} for i in range(0, len(seen), 3)]
    for entry, window in zip(logs, (steps[:3], steps[3:6]), strict=True):
        for name in ("soft_target", "hard"):
            assert entry[f"loss_{name}"] == pytest.approx(np.mean([step[name] for step in window]), rel=1e-5)
        assert entry["loss"] == pytest.approx(0.5 * entry["loss_soft_target"] + 2.0 * entry["loss_hard"], rel=1e-5)
    assert not any(key.startswith("loss_") for entry in run.state.log_history if "loss" not in entry for key in entry)


def test_parts_cause_no_transfer_to_the_host_outside_logging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, max_steps=1)
    run.train()
    run._part_sums = {}
    value = torch.tensor(1.5)

    def forbidden(self: Any, *args: Any) -> Any:
        raise AssertionError("a value was read on the host")

    for name in ("item", "tolist", "__float__", "__bool__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    run._add_parts({"soft_target": value})
    run._add_parts({"soft_target": value})
    monkeypatch.undo()
    assert run._part_sums["soft_target"].item() == 3.0 and value.item() == 1.5


@pytest.mark.parametrize("rows", [64, 70])
def test_accumulation_equals_one_large_batch(tmp_path: Path, rows: int) -> None:
    """1 x 32 and 4 x 8 end at the same weights to rounding; 70 rows leave an uneven last step of 6."""
    finals = []
    for size, accumulation in ((32, 1), (8, 4)):
        run = trainer(
            tmp_path / str(size),
            data=tiny_rows(rows),
            objective=[SoftTarget(), SoftTarget(name="hard", weight=0.3, hard_weight=1.0)],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=-1,
            num_train_epochs=2,
            optim="sgd",
            learning_rate=0.05,
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",
        )
        run.train()
        assert run.state.global_step == 2 * -(-rows // 32)
        finals.append(weights(run))
    start = weights(trainer(tmp_path / "start"))
    for name, value in finals[0].items():
        torch.testing.assert_close(finals[1][name], value, rtol=1e-4, atol=2e-6)
    assert_different(finals[0], start)


def test_labels_play_no_part_in_a_purely_soft_loss(tmp_path: Path) -> None:
    """Where no hard part reads them, labels may be missing; only -100 says something, see the next test."""
    labelled = tiny_rows(16)
    finals = []
    for data in (labelled, labelled.map(lambda row: {"labels": 1 - row["labels"]}), labelled.remove_columns("labels")):
        run = trainer(tmp_path, data=data, max_steps=4)
        run.train()
        finals.append(weights(run))
    assert_same_bits(finals[0], finals[1])
    assert_same_bits(finals[0], finals[2])


@pytest.mark.parametrize("hard_weight", [0.0, 0.5, 1.0])
def test_a_step_without_any_valid_row_changes_nothing(tmp_path: Path, hard_weight: float) -> None:
    data = tiny_rows(8).map(lambda row: {"labels": -100})
    term = SoftTarget(hard_weight=hard_weight)
    run = trainer(tmp_path, data=data, objective=term, max_steps=2, logging_steps=1)
    before = weights(run)
    run.train()
    assert_same_bits(weights(run), before)
    parts = [entry["loss_soft_target"] for entry in run.state.log_history if "loss" in entry]
    assert parts == [0.0, 0.0]


def test_mixed_precision_trains_the_student_and_leaves_the_teacher_alone(tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []

    class Spy(OnlineTeacher):
        def signals(self, batch: Any, names: Any) -> dict[str, torch.Tensor]:
            result = super().signals(batch, names)
            dtypes.append(result["logits"].dtype)
            return result

    run = trainer(tmp_path, teacher=Spy(tiny_bert(seed=1, layers=2)), bf16=True)
    run.train()
    assert set(dtypes) == {torch.float32}
    assert {value.dtype for value in weights(run).values()} <= {torch.float32, torch.int64}
    losses = [entry["loss_soft_target"] for entry in run.state.log_history if "loss" in entry]
    exact = trainer(tmp_path / "fp32")
    exact.train()
    expected = [entry["loss_soft_target"] for entry in exact.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, rel=0.1) and losses != expected


def test_bilstm_on_pairs_learns_from_a_transfer_set_and_resumes(tmp_path: Path) -> None:
    """The whole chain: a teacher labels pairs, a siamese student with frozen embeddings learns, stops, goes on."""
    from pydistill.students import BiLSTMConfig, BiLSTMForSequenceClassification
    from pydistill.students.words import build_word_tokenizer

    first, second = tiny_sentences(24, seed=1), tiny_sentences(24, seed=2)
    words = build_word_tokenizer([*first, *second])
    data = Dataset.from_dict({"first": first, "second": second})
    rows = tokenized(zip(first, second, strict=True), tiny_tokenizer(), 64)
    keys = write_cache(rows, tiny_bert(seed=1), ["logits"], tmp_path / "logits", progress=False).keys
    labelled = with_logits(data, TeacherCache(tmp_path / "logits"), keys)
    labelled = labelled.add_column("input_ids", words(first)["input_ids"])
    labelled = labelled.add_column("pair_input_ids", words(second)["input_ids"])

    def build(**changes: Any) -> DistillationTrainer:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"embedding_size": 8, "hidden_size": 6, "classifier_size": 5, "dropout": 0.2}
        student = BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=len(words), pair=True, **sizes))
        return DistillationTrainer(
            Distiller(student, RecordedTeacher(), SoftTarget(divergence="mse")),
            arguments(
                tmp_path / "run", lr_scheduler_type="constant", train_sampling_strategy="group_by_length", **changes
            ),
            labelled,
            processing_class=words,
            optimizer=OptimizerConfig("adadelta"),
        )

    whole = build(save_strategy="steps", save_steps=4)
    before = weights(whole)["student.frozen_embeddings"]
    whole.train()
    assert torch.equal(weights(whole)["student.frozen_embeddings"], before)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "checkpoint-8")
    assert type(loaded) is BiLSTMForSequenceClassification
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same_bits(weights(resumed), weights(whole))
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# --------------------------------------------------------------------------- checkpoints and resume


def test_checkpoints_hold_the_student_alone_in_hub_format(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=5)
    run.train()
    checkpoint = tmp_path / "checkpoint-10"
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(run.distiller.student.state_dict())
    assert not (checkpoint / "objective.safetensors").exists()
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert_same_bits(loaded.state_dict(), run.distiller.student.state_dict())
    assert json.loads((checkpoint / "config.json").read_text())["use_cache"] is True  # the student's own, untouched
    assert AutoTokenizer.from_pretrained(checkpoint)("w1 w2")["input_ids"] == tiny_tokenizer()("w1 w2")["input_ids"]
    run.save_model(str(tmp_path / "final"))
    final = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    assert_same_bits(final.state_dict(), run.distiller.student.state_dict())
    optimizer = torch.load(checkpoint / "optimizer.pt")
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(list(run.distiller.parameters()))


@pytest.mark.parametrize(
    ("stop", "strategy"), [(5, "random"), (6, "random"), (6, "group_by_length"), (9, "group_by_length")]
)
def test_resume_is_exact(tmp_path: Path, stop: int, strategy: str) -> None:
    """10 steps in one go and 10 with a stop in between end with the same bits, dropout and order included.

    6 steps are an epoch (22 rows in batches of 4), so the stops lie inside the first epoch, at its end, and
    inside the second. Evaluations happen at the end of an epoch, between a checkpoint and the next step.
    """
    options: dict[str, Any] = {
        "dropout": 0.3,
        "save_strategy": "steps",
        "save_steps": stop,
        "eval_strategy": "epoch",
        "train_sampling_strategy": strategy,
        "weight_decay": 0.1,
    }

    def build(folder: str, **more: Any) -> DistillationTrainer:
        objective = [SoftTarget(divergence="mse"), Factor()]
        return trainer(tmp_path / folder, objective=objective, **options, **more)

    whole = build("whole")
    whole.train()

    first = build("parts", options={"callbacks": [StopAt(stop)]})
    first.train()
    assert first.state.global_step == stop
    torch.manual_seed(12345)  # another process would not stand at the same random number either
    second = build("parts")
    result = second.train(resume_from_checkpoint=True)
    assert result.global_step == 10
    assert_same_bits(weights(second), weights(whole))
    assert_different(weights(first), weights(whole))


KILLED = """
import os, signal, sys
from pathlib import Path
from test_trainer import trainer
from transformers import TrainerCallback

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

options = {"callbacks": [Kill()]}
trainer(Path(sys.argv[1]), dropout=0.3, save_strategy="steps", save_steps=3, options=options).train()
"""


def test_resume_after_a_kill_is_exact(tmp_path: Path) -> None:
    """A process that is killed without any chance to clean up, and the rest of the training in this one."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = trainer(tmp_path / "killed", dropout=0.3)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", dropout=0.3)
    whole.train()
    assert_same_bits(weights(resumed), weights(whole))


def test_resume_restores_the_parameters_of_the_objective(tmp_path: Path) -> None:
    run = trainer(tmp_path, objective=[SoftTarget(), Factor()], save_strategy="steps", save_steps=5)
    run.train()
    trained = run.distiller.objective.state_dict()["terms.1.factor"]
    assert trained.item() != pytest.approx(0.3)
    again = trainer(tmp_path, objective=[SoftTarget(), Factor()], max_steps=10)
    again._load_from_checkpoint(str(tmp_path / "checkpoint-10"))
    assert torch.equal(again.distiller.objective.state_dict()["terms.1.factor"], trained)


def test_projections_train_and_lie_beside_a_student_that_does_not_contain_them(tmp_path: Path) -> None:
    """Hidden states of two layers, up to a wider teacher: logged by pair, resumed to the same bits, and no part of what
    a user loads."""

    def states(folder: str, **more: Any) -> DistillationTrainer:
        student, teacher = tiny_bert(seed=0, layers=2), tiny_bert(seed=1, layers=4, hidden_size=24)
        torch.manual_seed(5)
        terms = [SoftTarget(), ProjectedMSE.between(student, teacher, shared=False, name="states")]
        return DistillationTrainer(
            Distiller(student, teacher, terms),
            arguments(tmp_path / folder, save_strategy="steps", save_steps=5, logging_steps=5, **more),
            tiny_rows(22),
            processing_class=tiny_tokenizer(),
        )

    run = states("whole")
    before = weights(run)
    run.train()
    after = weights(run)
    own = {name for name in after if name.startswith("objective.")}
    assert {name.removeprefix("objective.terms.1.") for name in own} == {
        "projections.0", "projections.1", "biases.0", "biases.1"
    }  # fmt: skip
    assert all(not torch.equal(before[name], after[name]) for name in own)
    logged = [entry for entry in run.state.log_history if "loss_states" in entry]
    assert len(logged) == 2 and logged[-1]["loss_states"] < logged[0]["loss_states"]
    for entry in logged:
        assert entry["loss_states"] == pytest.approx(entry["loss_states.0-1"] + entry["loss_states.1-3"])

    checkpoint = tmp_path / "whole" / "checkpoint-10"
    with safe_open(checkpoint / "objective.safetensors", "pt") as stored:
        assert {f"objective.{name}" for name in stored.keys()} == own
    with safe_open(checkpoint / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == set(run.distiller.student.state_dict())
    loaded = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert_same_bits(loaded.state_dict(), run.distiller.student.state_dict())

    again = states("again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same_bits(weights(again), after)


def test_checkpoint_that_was_not_completely_written_is_passed_over(tmp_path: Path) -> None:
    run = trainer(tmp_path, save_strategy="steps", save_steps=4)
    run.train()
    shutil.copytree(tmp_path / "checkpoint-8", tmp_path / "checkpoint-9")
    (tmp_path / "checkpoint-9" / "trainer_state.json").unlink()
    state = (tmp_path / "checkpoint-8" / "trainer_state.json").read_text()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text(state[: len(state) // 2])
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-8"
    assert last_checkpoint(tmp_path / "checkpoint-8") is None
    again = trainer(tmp_path, max_steps=10)
    again.train(resume_from_checkpoint=True)
    assert_same_bits(weights(again), weights(run))


def test_resume_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_best_student_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([0.2, 0.9, 0.4, 0.1, 0.3])
    kept: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            kept.append({name: value.clone() for name, value in model.state_dict().items()})

    run = trainer(
        tmp_path,
        objective=[SoftTarget(), Factor()],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        options={"callbacks": [Keep()]},
    )
    run.compute_metrics = lambda prediction: {"score": next(scores)}
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert_same_bits(weights(run), kept[1])
    assert_different(kept[1], kept[-1])


# --------------------------------------------------------------------------- evaluation


def test_evaluation_runs_the_student_alone_and_in_the_order_of_the_rows(tmp_path: Path) -> None:
    class Forbidden(RecordedTeacher):
        def signals(self, batch: Any, names: Any) -> Any:
            raise AssertionError("the teacher ran")

    run = trainer(tmp_path, teacher=Forbidden(), dropout=0.5, train_sampling_strategy="group_by_length")
    data = tiny_rows(21, seed=9)
    metrics = run.evaluate(data)
    student = run.distiller.student.eval()
    with torch.no_grad():
        logits = [student(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in data]
    expected = torch.stack(logits)
    labels = torch.tensor(data["labels"])
    assert metrics["eval_accuracy"] == pytest.approx((expected.argmax(-1) == labels).float().mean().item())
    prediction = run.predict(data)
    torch.testing.assert_close(torch.from_numpy(prediction.predictions), expected, rtol=1e-4, atol=1e-5)
    unlabelled = run.predict(data.remove_columns("labels"))
    assert np.array_equal(unlabelled.predictions, prediction.predictions)
    even = tiny_rows(16, seed=9)
    assert run.evaluate(even)["eval_loss"] == pytest.approx(
        nn.functional.cross_entropy(
            torch.stack([expected[data["sentence"].index(text)] for text in even["sentence"]]),
            torch.tensor(even["labels"]),
        ).item(),
        rel=1e-4,
    )


def test_how_often_one_evaluates_does_not_change_what_is_trained(tmp_path: Path) -> None:
    never = trainer(tmp_path / "never", dropout=0.3)
    often = trainer(tmp_path / "often", dropout=0.3, eval_strategy="steps", eval_steps=1)
    never.train()
    often.train()
    assert_same_bits(weights(often), weights(never))


# --------------------------------------------------------------------------- students without a head


def headless(folder: Path, rows: int = 22, **changes: Any) -> DistillationTrainer:
    """The last layer's values of a two-layer student follow those of its teacher; no logits, no labels."""
    data = [tiny_rows(count, seed).remove_columns("labels") for count, seed in ((rows, 0), (12, 9))]
    return DistillationTrainer(
        Distiller(tiny_bert(layers=2).bert, tiny_bert(seed=1), MatchSignal()),
        arguments(folder, **changes),
        *data,
        processing_class=tiny_tokenizer(),
    )


def test_headless_student_trains_and_is_evaluated_by_the_objective(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = headless(tmp_path, max_steps=30, save_strategy="steps", save_steps=30)
    before = run.evaluate()
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    monkeypatch.setattr(transformers.logging.get_logger("pydistill.trainer"), "propagate", True)
    with caplog.at_level("WARNING"):
        run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"] / 2
    step, inputs = run.distiller.eval(), run.data_collator(list(run.eval_dataset))
    with torch.no_grad():
        batches = [{name: value[part] for name, value in inputs.items()} for part in (slice(8), slice(8, 12))]
        losses = [step(**batch).loss.item() for batch in batches]
    assert after["eval_loss"] == pytest.approx((8 * losses[0] + 4 * losses[1]) / 12, rel=1e-4)
    assert run.predict(run.eval_dataset).predictions is None
    (line,) = [record.message for record in caplog.records if "cannot reach" in record.message]
    assert "encoder.layer.1.output.dense.weight" in line and "encoder.layer.1.attention.self.value" not in line
    loaded = AutoModel.from_pretrained(tmp_path / "checkpoint-30")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, run.distiller.student.state_dict()[name]), name


def test_what_the_objective_cannot_reach_is_frozen_only_while_it_trains(tmp_path: Path) -> None:
    run = headless(tmp_path, max_steps=3, weight_decay=0.1)
    start = {name: value.clone() for name, value in run.distiller.student.state_dict().items()}
    trainable: list[set[str]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            parameters = run.distiller.student.named_parameters()
            trainable.append({name for name, parameter in parameters if parameter.requires_grad})

    run.add_callback(Watch())
    run.train()
    assert all(parameter.requires_grad for parameter in run.distiller.student.parameters())
    assert trainable[0] == trainable[2]
    for name, value in run.distiller.student.named_parameters():
        assert torch.equal(value, start[name]) == (name not in trainable[0]), name


def test_frozen_parameters_are_restored_after_an_interruption(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    run = headless(tmp_path)
    run.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert all(parameter.requires_grad for parameter in run.distiller.student.parameters())


def test_headless_resume_and_accumulation_are_exact(tmp_path: Path) -> None:
    whole = headless(tmp_path / "whole")
    whole.train()
    first = headless(tmp_path / "parts", save_strategy="steps", save_steps=4)
    first.add_callback(StopAt(4))
    first.train()
    second = headless(tmp_path / "parts", save_strategy="steps", save_steps=4)
    second.train(resume_from_checkpoint=True)
    assert_same_bits(weights(second), weights(whole))
    # Not Adam: it blows up the rounding of gradients that are zero, a key's bias for instance.
    options: dict[str, Any] = {"max_steps": 5, "optim": "sgd", "learning_rate": 1e-3, "max_grad_norm": 0.0}
    large = headless(tmp_path / "large", rows=20, **options)
    start = weights(large)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    accumulated = headless(tmp_path / "accumulated", rows=20, **options, **split)
    large.train()
    accumulated.train()
    assert_different(weights(large), start)
    for name, value in weights(large).items():
        torch.testing.assert_close(weights(accumulated)[name], value, rtol=1e-4, atol=2e-6)


# --------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("learning_rate", [None, 0.5])
def test_adadelta_is_the_papers_and_updates_as_torch_does(tmp_path: Path, learning_rate: float | None) -> None:
    config = OptimizerConfig("adadelta", learning_rate=learning_rate)
    run = trainer(tmp_path, options={"optimizer": config}, lr_scheduler_type="constant", max_grad_norm=0.0)
    run.create_optimizer()
    assert isinstance(run.optimizer, torch.optim.Adadelta)
    assert {(group["lr"], group["rho"]) for group in run.optimizer.param_groups} == {(learning_rate or 1.0, 0.95)}
    run.optimizer = None
    run.train()

    twin = tiny_bert(seed=0)
    reference = Distiller(twin, tiny_bert(seed=1, layers=2), SoftTarget(divergence="mse"))
    optimizer = torch.optim.Adadelta(twin.parameters(), lr=learning_rate or 1.0, rho=0.95)
    again = trainer(tmp_path / "order", options={"optimizer": config})
    batches = iter([batch for _ in range(2) for batch in epoch_batches(again)])
    for _ in range(10):
        reference.train()
        optimizer.zero_grad()
        reference(**next(batches)).loss.backward()
        optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(run.distiller.student.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def epoch_batches(run: DistillationTrainer) -> list[dict[str, Any]]:
    if not hasattr(run, "_test_loader"):
        run._test_loader, run._test_epoch = run.get_train_dataloader(), 0  # type: ignore[attr-defined]
    run._test_loader.set_epoch(run._test_epoch)  # type: ignore[attr-defined]
    run._test_epoch += 1  # type: ignore[attr-defined]
    return list(run._test_loader)  # type: ignore[attr-defined]


def test_adamw_by_name_equals_adamw_by_arguments(tmp_path: Path) -> None:
    finals = []
    for optimizer in (None, OptimizerConfig("adamw")):
        run = trainer(
            tmp_path, options={"optimizer": optimizer}, weight_decay=0.1, adam_beta2=0.9, optim="adamw_torch_fused"
        )
        run.train()
        finals.append(weights(run))
    assert_same_bits(*finals)


def test_frozen_parameters_are_not_trained(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    student: Any = run.distiller.student
    embeddings = student.get_input_embeddings().weight
    embeddings.requires_grad_(False)
    before = embeddings.clone()
    run.train()
    assert torch.equal(embeddings, before)
    assert run.optimizer is not None
    trained = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    assert all(parameter is not embeddings for parameter in trained)
    assert len(trained) == len(list(student.parameters())) - 1


# --------------------------------------------------------------------------- length grouping


def test_length_grouping_batches_rows_of_like_length(tmp_path: Path) -> None:
    data = tiny_rows(400)
    spread = {}
    for strategy in ("random", "group_by_length"):
        run = trainer(tmp_path, data=data, train_sampling_strategy=strategy, per_device_train_batch_size=8)
        lengths = [batch["attention_mask"].sum(1).float() for batch in epoch_batches(run)]
        assert sum(len(length) for length in lengths) == 400
        spread[strategy] = float(torch.stack([length.max() - length.min() for length in lengths]).mean())
        second = [batch["attention_mask"].sum(1) for batch in epoch_batches(run)]
        assert any(not torch.equal(a, b) for a, b in zip(lengths, second, strict=True))  # another order every epoch
    assert spread["group_by_length"] < 0.25 * spread["random"]


def test_lengths_are_those_of_the_rows_or_of_the_length_column() -> None:
    data = tiny_rows(20)
    expected = [len(ids) for ids in data["input_ids"]]
    assert row_lengths(data) == expected
    assert row_lengths(data.select(range(19, -1, -1))) == expected[::-1]
    assert row_lengths([dict(row) for row in data]) == expected
    pairs = data.add_column("pair_input_ids", data["input_ids"]).add_column("teacher_input_ids", data["input_ids"])
    assert row_lengths(pairs) == [2 * length for length in expected]
    with pytest.raises(ValueError, match="needs rows with input_ids"):
        row_lengths(data.select_columns(["sentence"]))


def test_length_column_is_taken_where_there_is_one(tmp_path: Path) -> None:
    data = tiny_rows(40)
    lengths = list(range(40))
    run = trainer(tmp_path, data=data.add_column("length", lengths), train_sampling_strategy="group_by_length")
    sampler = run._get_train_sampler(data)
    assert sampler is not None and sampler.lengths == lengths  # type: ignore[attr-defined]


# --------------------------------------------------------------------------- refusals


def test_refuses_what_would_be_silently_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        trainer(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(TypeError, match="distiller must be a Distiller, got BertForSequenceClassification"):
        DistillationTrainer(tiny_bert(), arguments(tmp_path))
    with pytest.raises(ValueError, match="needs processing_class"):
        DistillationTrainer(Distiller(tiny_bert(), tiny_bert(seed=1), SoftTarget()), arguments(tmp_path))
    with pytest.raises(ValueError, match="name must be 'adadelta' or 'adamw', got 'sgd'"):
        OptimizerConfig("sgd")  # type: ignore[arg-type]


def test_refuses_several_gpus_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="one process must use one GPU, got 2; start with torchrun"):
        trainer(tmp_path)


def test_activation_checkpointing_reaches_the_student(tmp_path: Path) -> None:
    run = trainer(tmp_path, activation_checkpointing=True, max_steps=2)
    plain = trainer(tmp_path, max_steps=2)
    run.train()
    plain.train()
    assert run.distiller.student.is_activation_checkpointing
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(run)[name], value)


# --------------------------------------------------------------------------- collation


def test_collator_pads_every_group_to_its_own_length() -> None:
    collate = DistillationCollator(tiny_tokenizer(), teacher_tokenizer=tiny_tokenizer("left"))
    batch = collate(
        [
            {
                "input_ids": [7, 8, 9],
                "pair_input_ids": [7],
                "teacher_input_ids": [2, 7, 3],
                "labels": 1,
                "sentence": "a",
            },
            {
                "input_ids": [7],
                "pair_input_ids": [8, 9],
                "teacher_input_ids": [2, 7, 8, 3],
                "labels": 0,
                "sentence": "b",
            },
        ]
    )
    assert batch["input_ids"].tolist() == [[7, 8, 9], [7, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["pair_input_ids"].tolist() == [[7, 0], [8, 9]]
    assert batch["pair_attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["teacher_input_ids"].tolist() == [[0, 2, 7, 3], [2, 7, 8, 3]]
    assert batch["teacher_attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64
    assert "sentence" not in batch


def test_collator_stacks_logits_and_keeps_given_masks() -> None:
    rows = [
        {
            "input_ids": [7, 8],
            "attention_mask": [1, 0],
            "token_type_ids": [0, 1],
            "teacher_logits": [0.5, -1.25],
            "labels": 0.5,
        },
        {
            "input_ids": [7, 8, 9],
            "attention_mask": [1, 1, 1],
            "token_type_ids": [1, 1, 1],
            "teacher_logits": [2.0, 3.0],
            "labels": 1.5,
        },
    ]
    batch = DistillationCollator(tiny_tokenizer(), pad_to_multiple_of=4)(rows)
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["teacher_logits"].tolist() == [[0.5, -1.25], [2.0, 3.0]]
    assert batch["teacher_logits"].dtype == batch["labels"].dtype == torch.float32


def test_collator_keeps_rows_of_no_tokens() -> None:
    batch = DistillationCollator(tiny_tokenizer())([{"input_ids": []}, {"input_ids": []}])
    assert batch["input_ids"].tolist() == [[0], [0]] and batch["attention_mask"].tolist() == [[0], [0]]


def test_collator_refuses() -> None:
    collate = DistillationCollator(tiny_tokenizer())
    with pytest.raises(ValueError, match="pass teacher_tokenizer"):
        collate([{"input_ids": [1], "teacher_input_ids": [1]}])
    with pytest.raises(ValueError, match="some rows of the batch have 'labels' and others have not"):
        collate([{"input_ids": [1], "labels": 1}, {"input_ids": [1]}])
    no_padding = tiny_tokenizer()
    no_padding.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        DistillationCollator(no_padding)([{"input_ids": [1]}])
