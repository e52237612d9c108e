# SPDX-License-Identifier: Apache-2.0
"""The plan: what it says, and everything it refuses before any work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_task import make_teacher, sentences, write_table
from transformers import AutoModelForSequenceClassification

import pydistill
from pydistill.config import RunConfig, load_config
from pydistill.plan import Plan, PlanError, plan, quiet


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_table(folder / "train.tsv", ["sentence", "label"], sentences(120, seed=1))
    write_table(folder / "dev.tsv", ["sentence", "label"], sentences(64, seed=2))
    make_teacher(folder / "bert")
    return folder


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    keys = {
        "recipe": "bilstm",
        "output": str(folder / "out"),
        "data.train": str(folder / "train.tsv"),
        "data.dev": str(folder / "dev.tsv"),
        "teacher.model": str(folder / "bert"),
        "teacher.max_length": 32,
        "teacher.fine_tune": {"max_steps": 1},
    }
    return keys | {key.replace("__", "."): value for key, value in more.items()}


def make_plan(folder: Path, **more: Any) -> Plan:
    return plan(load_config(None, settings(folder, **more)))


def refusal(folder: Path, **more: Any) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(folder, **more)
    assert not (folder / "out").exists(), "a refused plan leaves nothing behind"
    return str(caught.value)


def test_several_processes_are_refused(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would write into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "this recipe is one process, got 2: start it without torchrun" in refusal(shared)


def test_a_teacher_without_tokenizer_files_is_refused(shared: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(shared / "bert" / name, tmp_path)
    words = refusal(shared, teacher__model=str(tmp_path))
    assert f"teacher.tokenizer: {tmp_path}: holds no tokenizer files" in words
    make_plan(shared, teacher__model=str(tmp_path), teacher__tokenizer=str(shared / "bert"))


def test_a_plan_says_what_will_happen(shared: Path) -> None:
    text = str(make_plan(shared, seeds=[3, 4], objective__hard_weight=0.25))
    for words in (
        "120 rows from",
        "0 = bad, 1 = good",
        "hard, distilled, augmented; seeds 3, 4",
        "at most 2,400 new rows",
        "rows per second",
        "0.75 mse + 0.25 cross-entropy",
        "soft_target",
        "at most 945 steps",  # 120 rows and 20 new ones each, in batches of 8, three times
        "also selects",
    ):
        assert words in text
    assert not (shared / "out").exists()


def test_public_name_is_callable_and_importable(shared: Path) -> None:
    assert isinstance(pydistill.plan(load_config(None, settings(shared))), Plan)
    config = load_config(None, settings(shared))
    assert isinstance(config, RunConfig)


def test_recipe_name_with_overrides(shared: Path) -> None:
    planned = plan("bilstm", settings(shared), dry_run=False)
    assert planned.config.optimizer.name == "adadelta" and planned.config.train["learning_rate"] == 1.0


def test_every_problem_is_reported_at_once(shared: Path) -> None:
    lines = refusal(
        shared,
        data__train=str(shared / "missing.tsv"),
        teacher__max_length=500,
        student__vectors=str(shared / "missing.txt"),
        train={"eval_strategy": "epoch", "save_strategy": "steps", "load_best_model_at_end": True},
    ).splitlines()
    keys = [line.split(":")[0] for line in lines]
    assert keys == ["data.train", "student.vectors", "train", "teacher.max_length"]


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"data__text_columns": ["text"]}, "there is no column 'text'"),
        ({"teacher__max_length": 65}, "must be at most 64"),
        ({"teacher__fine_tune": None, "teacher__model": "./nowhere/bert"}, "no such folder with a config.json"),
        ({"student__embedding_size": 300}, "the teacher's vectors have 32 numbers, got 300"),
        ({"student__vectors": "random"}, "random vectors need a width"),
        ({"patience": 3, "train": {"eval_strategy": "no"}}, "patience: counts evaluations"),
        ({"data__labels": ["bad"]}, "the label 'good' is not one of data.labels"),
        ({"teacher__tokenizer": "./nowhere"}, "teacher.tokenizer: ./nowhere"),
    ],
)
def test_what_is_refused(shared: Path, more: dict[str, Any], rule: str) -> None:
    assert rule in refusal(shared, **more)


def test_teacher_without_a_head_must_be_fine_tuned(shared: Path, tmp_path: Path) -> None:
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(shared / "bert")
    model.bert.save_pretrained(tmp_path / "encoder")
    for file in (shared / "bert").glob("token*"):
        (tmp_path / "encoder" / file.name).write_bytes(file.read_bytes())
    message = refusal(shared, teacher__model=str(tmp_path / "encoder"), teacher__fine_tune=None)
    assert "has no classification head (BertModel)" in message and "--teacher.fine_tune" in message
    assert make_plan(shared, teacher__model=str(tmp_path / "encoder"))


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        (["a", "b", "c"], "has 3 classes (a, b, c), the data has 2 (bad, good)"),
        (["negative", "positive"], "names its classes negative, positive, the data bad, good"),
        (["good", "bad"], "orders its classes good, bad, the data bad, good"),
    ],
)
def test_labels_of_teacher_and_data_must_agree(shared: Path, tmp_path: Path, labels: list[str], rule: str) -> None:
    teacher = make_teacher(tmp_path / "teacher", labels=labels)
    assert rule in refusal(shared, teacher__model=teacher, teacher__fine_tune=None)


def test_labels_agree_whatever_their_case(shared: Path, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", labels=["Bad", "GOOD"])
    config = load_config(None, settings(shared, teacher__model=teacher, teacher__fine_tune=None))
    assert plan(config, dry_run=False)


def test_exchanged_classes_without_names_are_found_by_their_answers(shared: Path, tmp_path: Path) -> None:
    """A teacher that knows the task, but whose class 0 is the data's class 1, and both only have numbers."""
    teacher = _expert(shared, tmp_path / "right", exchanged=False)
    text = str(make_plan(shared, teacher__model=teacher, teacher__fine_tune=None))
    assert re.search(r"agreement +100% of 64 rows of dev", text)
    teacher = _expert(shared, tmp_path / "wrong", exchanged=True)
    message = refusal(shared, teacher__model=teacher, teacher__fine_tune=None)
    assert "its 0 is the data's 1, its 1 is the data's 0" in message


def _expert(shared: Path, folder: Path, exchanged: bool) -> str:
    """Train the small BERT for a moment on the task's rows."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(shared / "bert")
    tokenizer = AutoTokenizer.from_pretrained(shared / "bert")
    rows = sentences(240, seed=5)
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([(label == "good") != exchanged for _, label in rows]).long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    model.eval()
    for _ in range(40):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_output_folder_rules(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    keys = settings(shared) | {"output": str(output)}
    config = load_config(None, keys)
    output.mkdir()
    assert plan(config, dry_run=False)  # an empty folder is free

    (output / "thesis.tex").write_text("mine")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(PlanError, match="is not empty and holds no run"):
            plan(config, dry_run=False, **flags)

    (output / "config.yaml").write_text("model: mine")
    with pytest.raises(PlanError, match="is not the configuration of a run"):
        plan(config, dry_run=False, overwrite=True)

    (output / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(PlanError, match="already holds a run; add --resume or --overwrite"):
        plan(config, dry_run=False)
    assert plan(config, dry_run=False, overwrite=True).overwrite
    assert plan(config, dry_run=False, resume=True).resume

    more_seeds = load_config(None, keys | {"seeds": [1, 2], "arms": ["hard"]})
    assert plan(more_seeds, dry_run=False, resume=True)
    other = load_config(None, keys | {"augment.p_mask": 0.3, "train.learning_rate": 2})
    with pytest.raises(PlanError, match=r"augment.p_mask was 0.1, now 0.3; train.learning_rate was None, now 2"):
        plan(other, dry_run=False, resume=True)

    inside = load_config(None, keys | {"teacher.cache": str(output / "transfer")})
    with pytest.raises(PlanError, match="teacher.cache: .* which --overwrite empties"):
        plan(inside, dry_run=False, overwrite=True)

    file = load_config(None, keys | {"output": str(output / "thesis.tex")})
    with pytest.raises(PlanError, match="is a file; name a folder"):
        plan(file, dry_run=False)


def test_changed_rows_are_not_continued(shared: Path, tmp_path: Path) -> None:
    from pydistill.plan import DATA_FILE, data_fingerprint

    keys = settings(shared) | {"output": str(tmp_path)}
    config = load_config(None, keys)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    (tmp_path / DATA_FILE).write_text(data_fingerprint(plan(config, dry_run=False, resume=True).task))
    assert plan(config, dry_run=False, resume=True)
    (tmp_path / DATA_FILE).write_text("another")
    with pytest.raises(PlanError, match="the rows have changed"):
        plan(config, dry_run=False, resume=True)


def test_width_of_word_vector_files_is_compared(shared: Path, tmp_path: Path) -> None:
    glove, word2vec = tmp_path / "glove.txt", tmp_path / "w2v.txt"
    glove.write_text("film 0.1 0.2 0.3\n")
    word2vec.write_text("1 3\nfilm 0.1 0.2 0.3\n")
    for file in (glove, word2vec):
        assert "have 3 numbers, got 5" in refusal(shared, student__vectors=str(file), student__embedding_size=5)
        assert make_plan(shared, student__vectors=str(file), student__embedding_size=3)


def test_missing_tagger_is_refused_with_the_command(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "textblob" else find_spec(name, *a)
    )
    assert "pip install textblob" in refusal(shared)
    assert make_plan(shared, augment__pos_replacement=False)
    assert make_plan(shared, arms=["distilled"])
