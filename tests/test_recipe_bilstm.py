# SPDX-License-Identifier: Apache-2.0
"""The recipe from end to end on made-up sentences: what a run leaves, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_from_disk
from made_up_task import make_teacher, sentences, write_table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import pydistill.students  # noqa: F401 (registers the student with AutoModel)
from pydistill.cache import TeacherCache
from pydistill.cli import main
from pydistill.config import UserError
from pydistill.plan import PlanError, plan
from pydistill.recipes import run
from pydistill.recipes.bilstm import (
    Stages,
    TeacherHandle,
    _in_dtype,
    _new_student,
    _transfer_set,
    _with_mask_token,
)
from pydistill.trainer import DistillationTrainer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a teacher, and a finished run of two arms that the tests look at."""
    folder = tmp_path_factory.mktemp("recipe")
    write_table(folder / "train.tsv", ["sentence", "label"], sentences(240, seed=1))
    write_table(folder / "dev.tsv", ["sentence", "label"], sentences(60, seed=2))
    write_table(folder / "test.tsv", ["sentence", "label"], sentences(80, seed=3))
    make_teacher(folder / "bert")
    run("bilstm", settings(folder, folder / "run"))
    return folder


def settings(folder: Path, output: Path, **more: Any) -> dict[str, Any]:
    keys = {
        "output": str(output),
        "data.train": str(folder / "train.tsv"),
        "data.dev": str(folder / "dev.tsv"),
        "data.test": str(folder / "test.tsv"),
        "teacher.model": str(folder / "bert"),
        "teacher.max_length": 32,
        "teacher.fine_tune": {
            "learning_rate": 3e-3,
            "max_steps": 60,
            "eval_strategy": "no",
            "per_device_train_batch_size": 16,
        },
        "student.hidden_size": 8,
        "student.classifier_size": 8,
        "augment.n_iter": 3,
        "seeds": [1, 2],
        "optimizer.name": "adamw",
        "train.learning_rate": 1e-2,
        "train.per_device_train_batch_size": 16,
        "train.num_train_epochs": 4,
        "train.logging_steps": 5,
        "train_per_arm": {"augmented": {"num_train_epochs": 2}},
    }
    return keys | {key.replace("__", "."): value for key, value in more.items()}


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_a_finished_run_leaves_everything(shared: Path) -> None:
    output = shared / "run"
    names = {path.name for path in output.iterdir()}
    assert names >= {"teacher", "students", "transfer", "metrics.json", "config.yaml", "report.html"}
    assert names >= {"comparison.png", "curves.png"} and "work" not in names
    results = results_of(output)
    assert [model["name"] for model in results["models"]] == ["teacher", "hard", "distilled", "augmented"]
    assert [run["seed"] for run in results["models"][1]["runs"]] == [1, 2]
    assert results["split"] == "test" and results["task"]["test"] == 80
    for model in results["models"]:
        assert all(run["test"]["accuracy"] > 0.9 for run in model["runs"])
        assert model["sentences_per_second"] > 0 and model["file_bytes"] > 0
    for model in results["models"][1:]:
        assert all("loss" in run["curve"][0] for run in model["runs"])


def test_students_load_through_auto_classes_and_score_as_reported(shared: Path) -> None:
    folder = shared / "run" / "students" / "distilled-seed2"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.id2label == {0: "bad", 1: "good"}
    rows = sentences(80, seed=3)
    with torch.no_grad():
        inputs = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        answers = model(inputs["input_ids"], inputs["attention_mask"]).logits.argmax(-1)
    accuracy = np.mean([model.config.id2label[int(a)] == label for a, (_, label) in zip(answers, rows, strict=True)])
    reported = results_of(shared / "run")["models"][2]["runs"][1]["test"]["accuracy"]
    assert accuracy == pytest.approx(reported)
    assert (folder / "README.md").read_text().count("distilled, seed 2") == 1


def test_reported_parameters_are_those_of_the_paper_s_formula(shared: Path) -> None:
    student = results_of(shared / "run")["models"][1]
    hidden, classifier, width = 8, 8, 64  # two channels of the teacher's 32
    lstm = 2 * 4 * hidden * (width + hidden + 2)
    assert student["parameters_without_embeddings"] == lstm + (2 * hidden + 1) * classifier + (classifier + 1) * 2
    tokenizer = AutoTokenizer.from_pretrained(shared / "run" / "students" / "hard-seed1")
    assert student["parameters"] - student["parameters_without_embeddings"] == width * len(tokenizer)


def test_transfer_set_uses_true_labels_and_the_teacher_s(shared: Path) -> None:
    transfer = shared / "run" / "transfer"
    augmented = load_from_disk(str(transfer / "augmented" / "rows"))
    originals = {text for text, _ in sentences(240, seed=1)}
    assert 240 < len(augmented) <= 3 * 240
    assert not originals & set(augmented["sentence"][:])
    keys = np.load(transfer / "augmented-logits" / "keys.npy")
    recorded = TeacherCache(transfer / "cache").stack(keys, "logits")
    assert len(recorded) == len(augmented)
    teacher = AutoModelForSequenceClassification.from_pretrained(shared / "run" / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(shared / "run" / "teacher")
    for index in (0, len(augmented) // 2, len(augmented) - 1):
        with torch.no_grad():
            logits = teacher(**tokenizer(augmented[index]["sentence"], return_tensors="pt")).logits[0]
        torch.testing.assert_close(recorded[index], logits, rtol=1e-4, atol=1e-5)


def test_labelled_rows_keep_their_labels_and_synthetic_rows_take_the_teacher_s(shared: Path, tmp_path: Path) -> None:
    keys = settings(shared, tmp_path / "run", teacher__fine_tune=None)  # an untrained teacher: it is often wrong
    planned = plan("bilstm", keys, dry_run=False)
    parts = _transfer_set(planned, Stages(planned.output), TeacherHandle(planned.teacher, planned.tokenizer))
    answers = {name: np.asarray(rows["teacher_logits"][:]).argmax(-1) for name, rows in parts.items()}
    train = parts["train"]
    assert train["labels"][:] == planned.task.splits["train"]["labels"][:]
    assert list(answers["train"]) != train["labels"][:]
    assert list(answers["augmented"]) == parts["augmented"]["labels"][:]
    assert train.features["labels"] == parts["augmented"].features["labels"]


def test_a_seed_decides_the_first_weights(shared: Path, tmp_path: Path) -> None:
    planned = plan("bilstm", settings(shared, tmp_path / "run"), dry_run=False)
    tokenizer = AutoTokenizer.from_pretrained(shared / "run" / "students" / "hard-seed1")
    vectors = torch.zeros(len(tokenizer), 32)
    one, again, two = (_new_student(planned, tokenizer, vectors, seed).lstm.weight_ih_l0 for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, two)


def test_mask_token_of_the_teacher_is_what_it_sees() -> None:
    rows = Dataset.from_dict({"a": ["[MASK] film", "x [MASK]"], "b": ["none", "[MASK]"]})

    class Roberta:
        mask_token, unk_token = "<mask>", "<unk>"

    seen = _with_mask_token(rows, ["a", "b"], Roberta())  # type: ignore[arg-type]
    assert seen["a"][:] == ["<mask> film", "x <mask>"] and seen["b"][:] == ["none", "<mask>"]
    Roberta.mask_token = None  # type: ignore[assignment]
    assert _with_mask_token(rows, ["a"], Roberta())["a"][0] == "<unk> film"  # type: ignore[arg-type]


def test_saved_configuration_runs_again(shared: Path) -> None:
    saved = yaml.safe_load((shared / "run" / "config.yaml").read_text())
    assert saved["seeds"] == [1, 2] and saved["augment"]["p_mask"] == 0.1
    planned = plan(shared / "run" / "config.yaml", {"output": str(shared / "elsewhere")})
    assert planned.config.train == saved["train"]


def test_resume_keeps_finished_stages_and_adds_what_is_new(
    shared: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(shared / "run", output)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.safetensors")}
    more = settings(shared, output, seeds=[1, 2, 3], arms=["hard"])
    run("bilstm", more, resume=True)
    printed = capsys.readouterr().out
    assert "[students/hard-seed1] kept from before" in printed and "[students/hard-seed3] train" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [entry["seed"] for entry in results_of(output)["models"][1]["runs"]] == [1, 2, 3]


def test_interrupted_stage_is_not_taken_for_finished(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    keys = settings(shared, output, seeds=[1], arms=["distilled"])

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pydistill.students.bilstm.BiLSTMForSequenceClassification.save_pretrained", die)
        with pytest.raises(KeyboardInterrupt):
            run("bilstm", keys)
    assert (output / "teacher" / "stage.json").is_file()
    assert not (output / "students").exists()
    with pytest.raises(PlanError, match="already holds a run; add --resume or --overwrite"):
        run("bilstm", keys)
    run("bilstm", keys, resume=True)
    assert (output / "students" / "distilled-seed1" / "model.safetensors").is_file()


def test_training_continues_from_its_checkpoint_to_the_same_student(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file
    from transformers import TrainerCallback
    from transformers.trainer_callback import DefaultFlowCallback

    class Stop(TrainerCallback):
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.epoch and state.epoch >= 1:
                raise KeyboardInterrupt

    output = tmp_path / "run"
    keys = settings(shared, output, teacher__fine_tune=None, seeds=[2], arms=["distilled"])
    keys["teacher.model"] = str(shared / "run" / "teacher")
    with monkeypatch.context() as patch:
        patch.setattr("transformers.trainer.DEFAULT_CALLBACKS", [DefaultFlowCallback, Stop])
        with pytest.raises(KeyboardInterrupt):
            run("bilstm", keys)
    assert list((output / "work" / "students-distilled-seed2").glob("checkpoint-*"))
    steps = []
    with monkeypatch.context() as patch:
        step = DistillationTrainer.training_step
        patch.setattr(DistillationTrainer, "training_step", lambda *a, **k: (steps.append(1), step(*a, **k))[1])
        run("bilstm", keys, resume=True)
    assert len(steps) == 3 * 15, "three of the four epochs were left"
    continued = load_file(output / "students" / "distilled-seed2" / "model.safetensors")
    straight = load_file(shared / "run" / "students" / "distilled-seed2" / "model.safetensors")
    assert continued.keys() == straight.keys()
    assert all(torch.equal(continued[name], straight[name]) for name in straight)


def test_overwrite_replaces_the_run_and_spares_other_files(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(shared / "run", output)
    (output / "notes.txt").write_text("mine")
    run("bilstm", settings(shared, output, seeds=[7], arms=["hard"]), overwrite=True)
    assert {path.name for path in (output / "students").iterdir()} == {"hard-seed7"}
    assert not (output / "transfer").exists()
    assert (output / "notes.txt").read_text() == "mine"


def test_pairs_and_other_divergence(shared: Path, tmp_path: Path) -> None:
    texts = [text for text, _ in sentences(160, seed=4)]
    labels = [label for _, label in sentences(160, seed=4)]
    # Sentence n is good when n is odd: the reversed second half alternates the other way.
    halves = zip(texts[:80], texts[80:], labels[:80], reversed(labels[80:]), strict=True)
    rows = [(first, second, str(int(a == b or number % 3 == 0))) for number, (first, second, a, b) in enumerate(halves)]
    train = write_table(tmp_path / "pairs.tsv", ["q1", "q2", "label"], rows)
    keys = settings(
        shared,
        tmp_path / "run",
        data__train=train,
        data__dev=train,
        data__test=None,
        data__text_columns=["q1", "q2"],
        data__labels=["different", "same"],
        objective__divergence="forward_kl",
        objective__temperature=2.0,
        objective__hard_weight=0.3,
        optimizer__name="adadelta",
        seeds=[1],
        arms=["augmented"],
    )
    keys["train.learning_rate"] = 1.0
    keys["teacher.fine_tune"] = {"max_steps": 5}
    results = run("bilstm", keys)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "students" / "augmented-seed1")
    assert model.config.pair and model.config.id2label == {0: "different", 1: "same"}
    assert results["split"] == "dev" and any("also selects" in note for note in results["task"]["notes"])


def test_given_teacher_is_used_as_it_is(shared: Path, tmp_path: Path) -> None:
    keys = settings(shared, tmp_path / "run", teacher__fine_tune=None, seeds=[1], arms=["distilled"])
    keys["teacher.model"] = str(shared / "run" / "teacher")
    results = run("bilstm", keys)
    assert not (tmp_path / "run" / "teacher").exists()
    expected = results_of(shared / "run")["models"][0]["runs"][0]["test"]
    assert results["models"][0]["runs"][0]["test"] == expected


def test_a_cache_is_shared_between_runs(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run lacks is added, what is there is read, also what `pydistill cache` wrote; another teacher's is
    refused."""
    cache, teacher = tmp_path / "cache", str(shared / "run" / "teacher")
    words = ["cache", str(cache), "--teacher", teacher, "--corpus", str(shared / "train.tsv"), "--max-length", "32"]
    assert main([*words, "--text-columns", "sentence"]) == 0
    there = len(TeacherCache(cache))
    keys = settings(shared, tmp_path / "run", teacher__fine_tune=None, seeds=[1], arms=["distilled"])
    keys |= {"teacher.model": teacher, "teacher.cache": str(cache)}

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was asked again")

    with monkeypatch.context() as patch:
        patch.setattr("pydistill.cache._Writer.add", refuse)
        run("bilstm", keys | {"output": str(tmp_path / "one")})
        assert not (tmp_path / "one" / "transfer" / "cache").exists()
    augmented = keys | {"output": str(tmp_path / "augmented"), "arms": ["augmented"], "augment.n_iter": 1}
    run("bilstm", augmented)
    assert len(TeacherCache(cache)) > there
    with monkeypatch.context() as patch:
        patch.setattr("pydistill.cache._Writer.add", refuse)
        run("bilstm", augmented | {"output": str(tmp_path / "again"), "objective.hard_weight": 0.5})
    other = keys | {"output": str(tmp_path / "other"), "teacher.model": str(shared / "bert")}
    with pytest.raises(PlanError, match="teacher.cache: .* different the teacher's weights"):
        run("bilstm", other)
    shutil.rmtree(cache)
    with pytest.raises(PlanError, match="teacher.cache: .* no teacher cache: .*; delete .*-logits to compute"):
        run("bilstm", augmented, resume=True)


def test_a_cache_of_other_signals_is_refused_before_any_work(shared: Path, tmp_path: Path) -> None:
    words = ["cache", str(tmp_path / "cache"), "--teacher", str(shared / "bert"), "--signals", "values@0"]
    assert main([*words, "--corpus", str(shared / "train.tsv"), "--text-columns", "sentence"]) == 0
    keys = settings(shared, tmp_path / "run", teacher__cache=str(tmp_path / "cache"))
    with pytest.raises(PlanError, match="teacher.cache: .* must hold whole logits, and holds values@0"):
        plan("bilstm", keys, dry_run=False)
    new = str(tmp_path / "new")
    assert f"from the cache {new}; what it lacks is added" in str(
        plan("bilstm", keys | {"teacher.cache": new}, dry_run=False)
    )


def test_the_teacher_is_asked_in_the_arithmetic_that_is_wanted(shared: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(shared / "bert")
    assert _in_dtype(model, torch.float32) is model
    assert _in_dtype(model, torch.bfloat16).dtype == torch.bfloat16 and model.dtype == torch.float32


def test_unknown_recipe_key_is_refused(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="recipe: must be one of bilstm, minilm, mtdnn, shared-projections, got 'bilstmm'"
    ):
        run("bilstm", settings(shared, tmp_path, recipe="bilstmm"))
