# SPDX-License-Identifier: Apache-2.0
"""Labelling a transfer set once: values, pairing by content, resumption to the bit, and what is refused."""

from __future__ import annotations

import json
import math
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
from datasets import Dataset
from tiny_models import tiny_bert, tiny_sentences, tiny_tokenizer

from pydistill import SoftTarget
from pydistill.distiller import Distiller
from pydistill.teachers import (
    EnsembleTeacher,
    OnlineTeacher,
    RecordedTeacher,
    Teacher,
    TransferSetError,
    label_transfer_set,
)


def sentences(count: int = 60, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"sentence": tiny_sentences(count, seed)})


def label(data: Dataset, output: Path, **changes: Any) -> Dataset:
    options: dict[str, Any] = {
        "model": tiny_bert(dropout=0.1),
        "tokenizer": tiny_tokenizer(),
        "text_columns": "sentence",
        "batch_size_tokens": 64,
        "max_length": 32,
        "progress": False,
        "flush_seconds": 0.0,
    }
    return label_transfer_set(data, output=output, **options | changes)


def logits(data: Dataset) -> np.ndarray:
    return np.asarray(data["teacher_logits"], dtype=np.float32)


def one_by_one(data: Dataset, model: Any = None, columns: tuple[str, ...] = ("sentence",)) -> np.ndarray:
    model = (model or tiny_bert()).eval()
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        rows = [model(**tokenizer(*(row[name] for name in columns), return_tensors="pt")).logits[0] for row in data]
    return torch.stack(rows).numpy()


class Counting:
    """Counts the rows that a model labels, and optionally stops it after some batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        from transformers import BertForSequenceClassification

        self.rows, self.batches = 0, 0
        forward = BertForSequenceClassification.forward

        def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
            if stop_after is not None and self.batches == stop_after:
                raise KeyboardInterrupt
            self.batches += 1
            self.rows += len(kwargs["input_ids"])
            return forward(model, *args, **kwargs)

        # The signature of the forward says which inputs the model reads.
        counted.__wrapped__ = forward  # type: ignore[attr-defined]
        monkeypatch.setattr(BertForSequenceClassification, "forward", counted)


# --------------------------------------------------------------------------- values


@pytest.mark.parametrize("tokens", [1, 64, 100_000])
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_each_row_alone(tmp_path: Path, tokens: int, side: str) -> None:
    """Whatever shares a batch with a row, and on whichever side the tokenizer would pad it."""
    data = sentences()
    labelled = label(data, tmp_path, tokenizer=tiny_tokenizer(side), batch_size_tokens=tokens)
    assert labelled.column_names == ["sentence", "teacher_logits"]
    assert list(labelled["sentence"]) == list(data["sentence"])
    np.testing.assert_allclose(logits(labelled), one_by_one(data), rtol=1e-4, atol=1e-5)


def test_column_is_fp32_of_fixed_length_and_collates(tmp_path: Path) -> None:
    labelled = label(sentences(), tmp_path, model=tiny_bert(num_labels=3))
    feature = labelled.features["teacher_logits"]
    assert feature.length == 3 and feature.feature.dtype == "float32"


def test_sentence_pairs(tmp_path: Path) -> None:
    """Both texts reach the teacher, in order; the same first sentence may come with several second ones."""
    first, second = tiny_sentences(20, seed=1), tiny_sentences(20, seed=2)
    data = Dataset.from_dict({"a": [*first, *first, *second], "b": [*second, *second[::-1], *first]})
    labelled = label(data, tmp_path, text_columns=["a", "b"])
    np.testing.assert_allclose(logits(labelled), one_by_one(data, columns=("a", "b")), rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits(labelled)[:20], logits(labelled)[40:])


def test_each_distinct_text_is_labelled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sentences(30)
    repeated = Dataset.from_dict({"sentence": list(data["sentence"]) * 3})
    counting = Counting(monkeypatch)
    labelled = label(repeated, tmp_path)
    assert counting.rows == 30
    values = logits(labelled)
    assert np.array_equal(values[:30], values[30:60]) and np.array_equal(values[:30], values[60:])


def test_batches_stay_within_the_token_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertForSequenceClassification

    shapes: list[tuple[int, ...]] = []
    forward = BertForSequenceClassification.forward

    def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        assert "attention_mask" not in kwargs and 0 not in kwargs["input_ids"]  # nothing is padded
        return forward(model, *args, **kwargs)

    spy.__wrapped__ = forward  # type: ignore[attr-defined]
    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    label(sentences(200), tmp_path, batch_size_tokens=50)
    assert all(rows * width <= 50 for rows, width in shapes) and sum(rows for rows, _ in shapes) == 200
    assert max(rows for rows, _ in shapes) > 3
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)  # longest first


def test_bf16_is_a_copy_and_close(tmp_path: Path) -> None:
    model, data = tiny_bert(), sentences()
    exact = logits(label(data, tmp_path / "fp32", model=model))
    rounded = logits(label(data, tmp_path / "bf16", model=model, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, atol=0.1 * np.abs(exact).max())


def test_model_is_left_as_it_was_found(tmp_path: Path) -> None:
    model = tiny_bert(dropout=0.5)
    model.train()
    model.bert.embeddings.eval()
    before = [module.training for module in model.modules()]
    labelled = label(sentences(), tmp_path, model=model)
    assert [module.training for module in model.modules()] == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    # And yet it ran without dropout.
    np.testing.assert_allclose(logits(labelled), one_by_one(sentences(), model), rtol=1e-4, atol=1e-5)


def test_tokenizer_that_pads_by_default(tmp_path: Path) -> None:
    """Some tokenizer files have padding to a fixed length baked in: neither used nor part of the key."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_padding(length=32)
    tokenizer.backend_tokenizer.enable_truncation(4)
    data = sentences()
    labelled = label(data, tmp_path, tokenizer=tokenizer)
    np.testing.assert_allclose(logits(labelled), one_by_one(data), rtol=1e-4, atol=1e-5)
    label(data, tmp_path)


def test_max_length_truncates(tmp_path: Path) -> None:
    data = Dataset.from_dict({"sentence": ["w1 w2 w3 w4 w5", "w1 w2 w3"]})
    values = logits(label(data, tmp_path, max_length=5))  # [CLS] w1 w2 w3 [SEP]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)


# --------------------------------------------------------------------------- reuse and resumption


def test_finished_folder_is_read_back_without_running_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order and multiplicity: rows are paired with logits by their text."""
    data = sentences()
    first = label(data, tmp_path)
    by_text = dict(zip(data["sentence"], logits(first).tolist(), strict=True))
    counting = Counting(monkeypatch)
    order = np.random.default_rng(0).permutation(len(data)).tolist()
    shuffled = data.select([*order, *order[:10]])
    again = label(shuffled, tmp_path)
    assert counting.rows == 0
    assert logits(again).tolist() == [by_text[text] for text in shuffled["sentence"]]


def test_interruption_is_resumed_to_the_bit_without_labelling_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sentences(100)
    whole = logits(label(data, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        first = Counting(patch, stop_after=5)
        with pytest.raises(KeyboardInterrupt):
            # Far less than the interval passes: an interrupt by hand still keeps what is finished.
            label(data, tmp_path / "parts", flush_seconds=3600)
    assert 0 < first.rows < 100
    with monkeypatch.context() as patch:
        second = Counting(patch)
        resumed = label(data, tmp_path / "parts")
    assert first.rows + second.rows == 100
    assert np.array_equal(logits(resumed), whole)


KILLED = """
import os, signal, sys
from pathlib import Path
from test_teachers import label, sentences
from transformers import BertForSequenceClassification

forward, calls = BertForSequenceClassification.forward, []

def killing(model, *args, **kwargs):
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(len(kwargs["input_ids"]))
    print(calls[-1], flush=True)
    return forward(model, *args, **kwargs)

killing.__wrapped__ = forward
BertForSequenceClassification.forward = killing
label(sentences(100), Path(sys.argv[1]))
"""


def test_kill_is_resumed_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed without any chance to clean up; with a shard per batch nothing is lost."""
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    killed = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = sum(int(line) for line in killed.stdout.split())
    # What a kill in the middle of a write leaves behind.
    (tmp_path / "killed" / ".logits-0123.safetensors.77.tmp").write_bytes(b"half a shard")
    data = sentences(100)
    with monkeypatch.context() as patch:
        counting = Counting(patch)
        resumed = label(data, tmp_path / "killed")
    assert counting.rows == 100 - done
    assert np.array_equal(logits(resumed), logits(label(data, tmp_path / "whole")))
    assert not list((tmp_path / "killed").glob(".*"))


def test_resumption_with_another_batch_size_labels_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = sentences(100)
    with monkeypatch.context() as patch:
        first = Counting(patch, stop_after=5)
        with pytest.raises(KeyboardInterrupt):
            label(data, tmp_path)
    second = Counting(monkeypatch)
    resumed = label(data, tmp_path, batch_size_tokens=200)
    assert first.rows + second.rows == 100
    np.testing.assert_allclose(logits(resumed), one_by_one(data), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- refusals


def changed_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w99"])
    return tokenizer


def changed_weight() -> Any:
    model = tiny_bert(dropout=0.1)
    with torch.no_grad():
        model.classifier.bias[0] += 1e-6
    return model


def changed_config() -> Any:
    model = tiny_bert(dropout=0.1)
    model.config.hidden_act = "relu"
    return model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": changed_weight}, "different the teacher's weights or configuration;"),
        ({"model": changed_config}, "different the teacher's weights or configuration;"),
        ({"tokenizer": changed_tokenizer}, "different the tokenizer;"),
        ({"data": lambda: sentences(61)}, "different the texts;"),
        (
            {"max_length": lambda: 31},
            r"different settings \(.*'max_length': 32.* there, .*'max_length': 31.* here\);",
        ),
        ({"dtype": lambda: torch.bfloat16}, "different settings .*float32.* there, .*bfloat16.* here"),
        ({"resume": lambda: False}, "holds .* already and resume=False"),
    ],
)
def test_stale_folder_is_refused_with_the_reason(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    label(sentences(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changes = {name: build() for name, build in change.items()}
    with pytest.raises(TransferSetError, match=words):
        label(changes.pop("data", sentences()), tmp_path, **changes)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-3])


def flip_a_bit(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 4
    shard.write_bytes(bytes(content))


def foreign_shard(folder: Path) -> None:
    label(sentences(10, seed=4), folder / "other")
    shard = next((folder / "other").glob("*.safetensors"))
    shutil.move(shard, folder / shard.name)
    shutil.rmtree(folder / "other")


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:40])


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def other_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 0, "key": "other"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            truncate,
            r"is damaged: logits-\w+.safetensors cannot be read .* delete that file to label its rows again",
        ),
        (flip_a_bit, "does not match its checksum; delete that file"),
        (foreign_shard, "belongs to another transfer set"),
        (cut_manifest, "is damaged: manifest.json cannot be read"),
        (no_manifest, "holds logits-.* but no manifest.json"),
        (other_format, r"different the file format \(0 there, 1 here\)"),
    ],
)
def test_damaged_folder_is_refused_with_the_reason(tmp_path: Path, damage: Any, words: str) -> None:
    label(sentences(), tmp_path)
    damage(tmp_path)
    with pytest.raises(TransferSetError, match=words):
        label(sentences(), tmp_path)


def test_deleting_the_damaged_shard_repairs_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sentences()
    expected = logits(label(data, tmp_path))
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    counting = Counting(monkeypatch)
    assert np.allclose(logits(label(data, tmp_path)), expected, rtol=1e-4, atol=1e-5)
    assert 0 < counting.rows < len(data)


def test_output_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TransferSetError, match="holds notes.txt but no manifest.json"):
        label(sentences(), tmp_path)
    with pytest.raises(TransferSetError, match="is a file, not a folder"):
        label(sentences(), tmp_path / "notes.txt")


def broken_model() -> Any:
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.weight[:] = float("inf")
    return model


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (lambda: sentences(), {"text_columns": "text"}, "has no column 'text', only sentence"),
        (lambda: sentences(), {"text_columns": ["a", "b", "c"]}, "must name one column or two"),
        (lambda: sentences(), {"max_length": 65}, "at most the model's 64 positions, got 65"),
        (lambda: sentences(), {"batch_size_tokens": 0}, "batch_size_tokens must be at least 1"),
        (lambda: sentences().select([]), {}, "at least one row"),
        (
            lambda: Dataset.from_dict({"sentence": ["a", None]}),
            {},
            "row 1 of column 'sentence' must be text, got None",
        ),
        (
            lambda: sentences().add_column("teacher_logits", [[0.0]] * 60),
            {},
            "has a column 'teacher_logits' already",
        ),
        (lambda: sentences(), {"model": broken_model()}, "logits for 'w.*' are not finite"),
    ],
)
def test_refuses(tmp_path: Path, data: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="label_transfer_set: .*" + words):
        label(data(), tmp_path / "out", **changes)


# --------------------------------------------------------------------------- teachers of a step


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
