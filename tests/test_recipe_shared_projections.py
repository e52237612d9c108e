# SPDX-License-Identifier: Apache-2.0
"""The recipe shared-projections end to end on a made-up corpus: arms, resume, the students, what is refused."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_vocab_data import SENTENCES, student_tokenizer, teacher_tokenizer
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    ConvBertConfig,
    DistilBertConfig,
    ElectraConfig,
    TrainerCallback,
)

import pydistill
from pydistill.cli import main
from pydistill.config import ConfigError, load_config
from pydistill.plan import PlanError
from pydistill.recipes import run, shared_projections, shared_projections_report


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of two layers, and a corpus of 300 texts of the same words."""
    folder = tmp_path_factory.mktemp("shared-projections")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    config = BertConfig(vocab_size=len(teacher_tokenizer()), intermediate_size=32, max_position_embeddings=64, **sizes)
    for name, kind in (("bert", BertModel), ("with-head", BertForMaskedLM)):
        kind(config).save_pretrained(folder / name)
        teacher_tokenizer().save_pretrained(folder / name)
    student_tokenizer().save_pretrained(folder / "vocabulary")
    generator = random.Random(0)
    texts = [" ".join(generator.sample(SENTENCES, 2)) for _ in range(300)]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    (folder / "others.txt").write_text("\n".join(SENTENCES) + "\n")
    return folder


def settings(folder: Path, output: Path, **more: Any) -> dict[str, Any]:
    keys = {
        "recipe": "shared-projections",
        "output": str(output),
        "teacher.model": str(folder / "bert"),
        "vocabulary.size": 90,
        "student.hidden_size": 8,
        "corpus.files": [str(folder / "texts.txt")],
        "corpus.max_length": 32,
        "corpus.held_out": 10,
        "corpus.shuffle_buffer": 100,
        "train.max_steps": 30,
        "train.learning_rate": 1e-2,
        "train.per_device_train_batch_size": 8,
        "train.save_steps": 10,
        "train.logging_steps": 5,
    }
    return keys | {key.replace("__", "."): value for key, value in more.items()}


def start(folder: Path, output: Path, resume: bool = False, **more: Any) -> dict[str, Any]:
    return run(load_config(None, settings(folder, output, **more)), resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


def test_the_arms_of_the_paper_side_by_side(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["no_kd", "dual", "down", "up"]
    more = {"arms": arms, "objective__projection_weight": 0.1}
    results = start(shared, tmp_path / "run", **more)
    printed = capsys.readouterr().out
    teacher, *students = results["models"]
    assert (teacher["vocabulary"], teacher["layers"], teacher["hidden_size"]) == (171, 2, 16)
    assert [model["name"] for model in students] == arms
    for model in students:
        assert (model["vocabulary"], model["layers"], model["hidden_size"], model["steps"]) == (90, 2, 8, 30)
        # The same student at first, on the same masks; all of them learn.
        assert model["loss_before"] == students[0]["loss_before"]
        assert model["loss_after"] < 0.95 * model["loss_before"]
        parts = ["student"] if model["name"] == "no_kd" else ["student", "teacher", "projection"]
        assert list(model["parts_after"]) == list(model["parts_before"]) == parts
        assert all(model["parts_after"][part] < model["parts_before"][part] for part in parts)
    assert len({model["loss_after"] for model in students}) == 4
    header, *rows = shared_projections_report.table(results)
    places = [header.index(name) for name in ("loss before", "after", "in training")]
    for row, model in zip(rows[1:], students, strict=True):
        logged = {entry["step"]: entry["loss_student"] for entry in model["curve"]}
        losses = (model["loss_before"], model["loss_after"], logged[30])
        assert [row[place] for place in places] == [f"{loss:.3f}" for loss in losses]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"comparison.png", "curves.png", "segmentation.png"}
    files = {"metrics.json", "segmentation.json", "config.yaml", "data.sha256", "report.html"}
    assert names == {"students", "vocabulary"} | pictures | files
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == results
    # A student is an encoder like any other, with its own tokenizer and no trace of teacher and projections.
    for arm in arms:
        folder = tmp_path / "run" / "students" / arm
        model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
        assert not loading["unexpected_keys"] and not loading["missing_keys"]
        assert max(AutoTokenizer.from_pretrained(folder)("the great machine")["input_ids"]) < 90
        assert sum(p.numel() for p in model.parameters()) == students[0]["parameters"]
    assert AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).config.num_labels == 3
    best = min(students, key=lambda model: model["loss_after"])["name"]
    assert f"--model {tmp_path / 'run' / 'students' / best}" in printed
    # The saved configuration is complete.
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(
        None, settings(shared, tmp_path / "run", **more)
    )


class _Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@contextmanager
def interrupted_after(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    trained = shared_projections.DistillationTrainer.train

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        self.add_callback(_Interrupt(step))
        return trained(self, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shared_projections.DistillationTrainer, "train", interrupted)
        yield


def test_an_interrupted_run_ends_with_the_same_bits(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout is on, the corpus is gone through more than once, and the mixing moves.
    more: dict[str, Any] = {
        "train__max_steps": 50,
        "mixing": {"start": 0.1, "end": 0.9},
        "teacher__learning_rate": 1e-3,
    }
    more |= {"train__eval_strategy": "steps", "train__eval_steps": 20}
    whole = start(shared, tmp_path / "whole", **more)
    looked_at = [entry["step"] for entry in whole["models"][1]["curve"] if "eval_loss" in entry]
    assert looked_at == [20, 40, 50]
    with interrupted_after(45, monkeypatch):
        start(shared, tmp_path / "cut", **more)
    assert not (tmp_path / "cut" / "students").exists() and (tmp_path / "cut" / "vocabulary").exists()
    again = start(shared, tmp_path / "cut", resume=True, **more)
    first, second = (weights(tmp_path / name / "students" / "down") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for key in ("loss_before", "parts_after", "steps"):
        assert again["models"][1][key] == whole["models"][1][key]
    # Another arm is added to the finished one, which is kept.
    more["arms"] = ["down", "no_kd"]
    added = start(shared, tmp_path / "cut", resume=True, **more)
    assert [model["name"] for model in added["models"]] == ["teacher", "down", "no_kd"]
    assert added["models"][1]["seconds"] == again["models"][1]["seconds"]


@pytest.mark.parametrize("resumed", [False, True])
def test_losses_are_taken_in_float32_before_and_after_a_training_in_bfloat16(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    more = {"train__bf16": True, "train__learning_rate": 0.0, "train__max_steps": 3, "train__save_steps": 2}
    if resumed:
        with interrupted_after(3, monkeypatch):
            start(shared, tmp_path, **more)
    student = start(shared, tmp_path, resume=resumed, **more)["models"][1]
    # The training has changed nothing, and there is nothing else that they could differ by.
    assert student["steps"] == 3 and student["parts_after"] == student["parts_before"]


def test_the_mixing_moves_over_the_rows_of_all_steps(shared: Path, tmp_path: Path) -> None:
    def mixing(**given: Any) -> Any:
        config: Any = load_config(None, settings(shared, tmp_path, mixing=given))
        return shared_projections._segmenter(config, teacher_tokenizer(), student_tokenizer(), 16).mixing

    assert mixing(start=0.2).at(10_000) == 0.2
    assert [mixing(start=0.0, end=1.0).at(row) for row in (0, 240, 480, 999)] == [0, 0.5, 1, 1]
    assert [mixing(start=0.0, end=1.0, steps=10).at(row) for row in (80, 160)] == [0.5, 1]


def test_losses_are_measured_where_asked_and_a_head_is_taken_over(shared: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"corpus__held_out": 0, "evaluation_corpus": {"files": [str(shared / "others.txt")]}}
    more |= {"evaluation_texts": 5, "train__max_steps": 2, "vocabulary__size": None, "train__logging_steps": 9}
    more |= {"vocabulary__folder": str(shared / "vocabulary"), "teacher__model": str(shared / "with-head")}
    config: Any = load_config(None, settings(shared, tmp_path / "run", **more))
    plan: Any = pydistill.plan(config)
    text = str(plan)
    assert "masked-piece head  its own" in text and f"90 pieces of {shared / 'vocabulary'}" in text
    assert re.search(r"losses +of the first 5 texts, at most, of \S+others.txt", text)
    step = shared_projections._dual_training(plan, "down", student_tokenizer())
    assert step.objective.teacher is not None and not step.objective.teacher.new_head
    results = run(config)
    assert results["evaluation_texts"] == 5 and not (tmp_path / "run" / "vocabulary").exists()
    rows = enumerate(SENTENCES[:5])
    collate = shared_projections.MixedVocabularyCollator(
        shared_projections._segmenter(config, teacher_tokenizer(), student_tokenizer())
    )
    batch = collate([{"text": sentence, "index": index} for index, sentence in rows])
    expected = shared_projections.held_out_losses(step, [batch])
    assert results["models"][1]["parts_before"] == pytest.approx(expected, rel=1e-5)
    # No line of the log was written.
    header, *rows = shared_projections_report.table(results)
    assert [row[header.index("in training")] for row in rows] == ["", ""]
    assert not any(axis.lines for axis in shared_projections_report.draw_curves(results["models"][1:]).axes)


def test_every_option_arrives(shared: Path, tmp_path: Path) -> None:
    options = {"projection_weight": 0.3, "project_embeddings": False, "project_norms": False, "reduction": "mean"}
    more: dict[str, Any] = {"objective": options | {"next_sentence": True}, "teacher__learning_rate": 1e-3}
    more |= {"mixing": {"start": 0.4, "masking": 0.3}, "seed": 5}
    config: Any = load_config(None, settings(shared, tmp_path, **more))
    plan: Any = pydistill.plan(config, dry_run=False)
    text = str(plan)
    assert "of parameters, without tables of pieces, without LayerNorms, mean, weight 0.3" in text
    assert "30% of the words masked, next sentence" in text and "learning_rate 0.001 of encoder and tables" in text
    objective = shared_projections._dual_training(plan, "up", student_tokenizer()).objective
    assert {name: getattr(objective, name) for name in options} == options
    assert objective.projections.direction == "up" and objective.projections.reduction == "mean"
    assert set(objective.next_sentence_heads) == {"student", "teacher"}
    # The settings say 1e-2 for the student.
    assert objective.teacher.encoder.learning_rate_scale == pytest.approx(0.1)
    collate = shared_projections._collator(config, teacher_tokenizer(), student_tokenizer())
    cut = collate.segmenter
    assert (cut.masking, cut.mixing.start, cut.seed, cut.max_length) == (0.3, 0.4, 5, 32) and collate.next_sentence
    # Seeds make another student, and other heads.
    config.seed = 6
    other = shared_projections._dual_training(plan, "up", student_tokenizer())
    assert not torch.equal(other.objective.student_head.dense.weight, objective.student_head.dense.weight)
    assert not torch.equal(
        other.student.get_input_embeddings().weight, objective._student[0].get_input_embeddings().weight
    )


def test_hidden_states_and_a_frozen_teacher(shared: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"objective__projected": "hidden_states", "teacher__freeze_encoder": True}
    plan: Any = pydistill.plan(load_config(None, settings(shared, tmp_path, **more)), dry_run=False)
    assert "of hidden states, sum" in str(plan) and "only tables, head and biases" in str(plan)
    step = shared_projections._dual_training(plan, "up", student_tokenizer())
    assert step.objective.projected == "hidden_states" and step.objective.projections.direction == "up"
    trained = {name for name, value in step.objective.teacher.named_parameters() if value.requires_grad}
    assert not any("layer." in name for name in trained) and "student_embeddings.weight" in trained


def test_a_student_may_start_from_its_teacher(shared: Path, tmp_path: Path) -> None:
    plan: Any = pydistill.plan(
        load_config(None, settings(shared, tmp_path, student__initialization="svd")), dry_run=False
    )
    ours = shared_projections._dual_training(plan, "no_kd", student_tokenizer()).student
    # As wide as the teacher it is the teacher, on its own pieces: the same hidden states, up to the basis and rounding.
    plan.config.student.hidden_size = 16
    step = shared_projections._dual_training(plan, "down", student_tokenizer())
    assert ours.config.vocab_size == step.student.config.vocab_size == 90
    inputs = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}
    with torch.no_grad():
        mine = step.eval().student(**inputs).last_hidden_state
        theirs = step.objective.teacher(**inputs, vocabulary=torch.ones(2, 10, dtype=torch.long))[-1]
        plan.config.student.initialization = "random"
        other = shared_projections._dual_training(plan, "no_kd", student_tokenizer()).eval().student(**inputs)
    hidden = (mine, theirs, other.last_hidden_state)
    products = torch.stack([(rows.flatten(0, 1) @ rows.flatten(0, 1).T).flatten() for rows in hidden])
    alike = torch.corrcoef(products)
    assert alike[0, 1] > 0.95 > 0.8 > alike[1, 2]


def test_a_report_is_drawn_again_with_another_sentence(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"train__max_steps": 5, "arms": ["no_kd", "down"], "objective__next_sentence": True}
    results = start(shared, tmp_path / "run", **keys)
    parts = ["student", "teacher", "projection", "student_next", "teacher_next"]
    assert [list(model["parts_after"]) for model in results["models"][1:]] == [["student", "student_next"], parts]
    first = json.loads((tmp_path / "run" / "segmentation.json").read_text())
    assert first["sentence"] == "I like machine learning"
    capsys.readouterr()
    start(shared, tmp_path / "run", resume=True, picture__sentence="He mended what was broken", **keys)
    printed = capsys.readouterr().out
    assert printed.count("kept from before") == 3 and "loss before" in printed
    again = json.loads((tmp_path / "run" / "segmentation.json").read_text())
    assert "".join(piece["piece"].removeprefix("##") for piece in again["student"]) == "hemendedwhatwasbroken"
    (tmp_path / "run" / "report.html").unlink()
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "every arm" in page


def test_the_plan_says_what_will_run(shared: Path, tmp_path: Path) -> None:
    text = str(pydistill.plan(load_config(None, settings(shared, tmp_path / "run", arms=["down", "no_kd"]))))
    for line in (
        r"masked-piece head +none that its configuration names: a new one is made",
        r"mixing +a word is cut by the student's vocabulary with probability 0.5",
        r"vocabulary +90 pieces, trained on the corpus",
        r"pace of down +\d+\.\d+ s a step, about",
        r"pace of no_kd +\d+\.\d+ s a step, about",
        r"all arms +at most about",
    ):
        assert re.search(line, text), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("config", "architecture", "expected"),
    [
        (DistilBertConfig(), "DistilBertForMaskedLM", "its own"),
        (ElectraConfig(), "ElectraForMaskedLM", "its own"),
        # Its head tells replaced pieces.
        (ElectraConfig(), "ElectraForPreTraining", "none that its configuration names: a new one"),
        (ConvBertConfig(), "ConvBertForMaskedLM", "its own is not of a kind known here (bert, distilbert, electra)"),
    ],
)
def test_the_plan_says_which_head_the_teacher_has(
    shared: Path, tmp_path: Path, config: Any, architecture: str, expected: str
) -> None:
    config.architectures = [architecture]
    config.save_pretrained(tmp_path / "teacher")
    teacher_tokenizer().save_pretrained(tmp_path / "teacher")
    keys = settings(shared, tmp_path / "run", teacher__model=str(tmp_path / "teacher"), student__hidden_size=48)
    text = str(pydistill.plan(load_config(None, keys), dry_run=False))
    assert re.search(rf"masked-piece head +{re.escape(expected)}", text)


def test_the_pace_of_the_rows_counts_the_words_in_them(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text(("the " * 50 + "\n") * 20)
    more = {"corpus__files": [str(tmp_path / "texts.txt")], "corpus__max_length": 12, "vocabulary__size": None}
    more |= {"vocabulary__folder": str(shared / "vocabulary"), "arms": ["no_kd"]}
    monkeypatch.setattr(shared_projections.time, "process_time", map(float, itertools.count()).__next__)
    text = str(pydistill.plan(load_config(None, settings(shared, tmp_path / "run", **more))))
    # In one second by this clock: ten words have room in each of 512 rows.
    assert "5,120 words per second and core" in text


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"student__hidden_size": 9}, "student: smaller_config: num_attention_heads must divide hidden_size 9"),
        ({"corpus__max_length": 65}, "corpus.max_length: must be at most 64"),
        ({"corpus__files": ["none.txt"]}, "none.txt: there is no such file"),
        ({"evaluation_corpus": {"files": ["none.txt"]}}, "none.txt: there is no such file"),
        ({"corpus__held_out": 1000}, "no text is held out with held_out 1000"),
        ({"train__max_steps": -1}, "train.max_steps: the corpus is read as an endless stream"),
        ({"train__dataloader_num_workers": 2}, "train.dataloader_num_workers: the corpus is one stream"),
        ({"teacher__model": "./none"}, "teacher.model: ./none: there is no such folder"),
        ({"vocabulary": {"folder": "./none"}}, "vocabulary.folder: "),
    ],
)
def test_what_is_refused_before_any_work(shared: Path, tmp_path: Path, keys: dict[str, Any], rule: str) -> None:
    given = settings(shared, tmp_path / "run", **keys)
    if "vocabulary" in keys:
        del given["vocabulary.size"]
    with pytest.raises(PlanError, match=re.escape(rule)):
        pydistill.plan(load_config(None, given), dry_run=False)


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"vocabulary__folder": "x"}, "give size, to train a vocabulary, or folder"),
        ({"teacher__cache": "x"}, "cache: this teacher trains along, so that its signals change at every step"),
        ({"mixing__steps": 5}, "steps says when end is reached"),
        ({"objective": {"projected": "hidden_states", "project_norms": False}}, "choose among parameters"),
        ({"corpus__packing": "packed"}, "corpus.packing must be truncate"),
        ({"arms": ["dual"], "objective__project_embeddings": False}, "the arm dual ties the tables of embeddings"),
        ({"corpus__held_out": 0}, "losses need texts"),
        ({"arms": ["down", "down"]}, "must not repeat an entry"),
        ({"student__layers": 2}, "student.layers: unknown key"),
    ],
)
def test_what_the_configuration_refuses(shared: Path, tmp_path: Path, keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(rule)):
        load_config(None, settings(shared, tmp_path / "run", **keys))
