# SPDX-License-Identifier: Apache-2.0
"""Texts in, a column of logits out: values, pairing by content, resumption to the bit, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from made_up_task import make_teacher
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_sentences, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pydistill.cache import TeacherCache, TeacherCacheError, key_of, tokenized, whole_logits, with_logits, write_cache
from pydistill.cli import main


def sentences(count: int = 60, seed: int = 0) -> Dataset:
    return Dataset.from_dict({"sentence": tiny_sentences(count, seed)})


def label(data: Dataset, folder: Path, max_length: int = 32, **changes: Any) -> Dataset:
    """As the recipe does it."""
    options: dict[str, Any] = {"dtype": "float32", "batch_size_tokens": 64, "progress": False, "flush_seconds": 0.0}
    options |= {"model": tiny_bert(dropout=0.1), "tokenizer": tiny_tokenizer(), "signals": ["logits"]} | changes
    texts = zip(*(data[column][:] for column in data.column_names), strict=True)
    summary = write_cache(tokenized(texts, options["tokenizer"], max_length), folder=folder, **options)
    return with_logits(data, TeacherCache(folder), summary.keys)


def logits(data: Dataset) -> np.ndarray:
    return np.asarray(data["teacher_logits"], dtype=np.float32)


def one_by_one(data: Dataset, model: Any = None, columns: tuple[str, ...] = ("sentence",)) -> np.ndarray:
    model = (model or tiny_bert()).eval()
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        rows = [model(**tokenizer(*(row[name] for name in columns), return_tensors="pt")).logits[0] for row in data]
    return torch.stack(rows).numpy()


class Counting:
    """Counts the rows that a model labels, and optionally stops it after some batches.

    Labelling is in inference mode; the two tokens that tell which weights count are not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> None:
        from transformers import BertForSequenceClassification

        self.rows, self.batches = 0, 0
        forward = BertForSequenceClassification.forward

        def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
            if torch.is_inference_mode_enabled():
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
    labelled = label(data, tmp_path)
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
        if torch.is_inference_mode_enabled():
            shapes.append(tuple(kwargs["input_ids"].shape))
            assert kwargs["attention_mask"].all() and 0 not in kwargs["input_ids"]  # nothing is padded
        return forward(model, *args, **kwargs)

    spy.__wrapped__ = forward  # type: ignore[attr-defined]
    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    label(sentences(200), tmp_path, batch_size_tokens=50)
    assert all(rows * width <= 50 for rows, width in shapes) and sum(rows for rows, _ in shapes) == 200
    assert max(rows for rows, _ in shapes) > 3
    widths = [width for _, width in shapes]
    assert widths == sorted(widths, reverse=True)  # longest first


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
import os, signal, sys, torch
from pathlib import Path
from test_labelling import label, sentences
from transformers import BertForSequenceClassification

forward, calls = BertForSequenceClassification.forward, []

def killing(model, *args, **kwargs):
    if torch.is_inference_mode_enabled():
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
    # What a kill in the middle of a write leaves behind: not read, and removed once it cannot be another writer's.
    young, old = (tmp_path / "killed" / f".signals-{age}.safetensors.77.tmp.safetensors" for age in ("young", "old"))
    for leftover in (young, old):
        leftover.write_bytes(b"half a shard")
    os.utime(old, times=(time.time() - 7200,) * 2)
    data = sentences(100)
    with monkeypatch.context() as patch:
        counting = Counting(patch)
        resumed = label(data, tmp_path / "killed")
    assert counting.rows == 100 - done
    assert np.array_equal(logits(resumed), logits(label(data, tmp_path / "whole")))
    assert list((tmp_path / "killed").glob(".*")) == [young]


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
        ({"model": changed_weight}, "different the teacher's weights, their dtype or its configuration;"),
        ({"model": changed_config}, "different the teacher's weights, their dtype or its configuration;"),
        ({"model": lambda: tiny_bert(dropout=0.1).bfloat16()}, "different the teacher's weights, their dtype or"),
        ({"tokenizer": changed_tokenizer}, "different the tokenizer;"),
        ({"dtype": lambda: "bfloat16"}, "different dtype .float32 there, bfloat16 here"),
    ],
)
def test_stale_folder_is_refused_with_the_reason(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    label(sentences(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TeacherCacheError, match=words):
        label(sentences(), tmp_path, **{name: build() for name, build in change.items()})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_other_texts_and_lengths_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tokens are other examples; texts that the teacher reads as the same tokens are one."""
    label(sentences(), tmp_path)
    counting = Counting(monkeypatch)
    label(Dataset.from_dict({"sentence": [*sentences()["sentence"][:], "w1 w2 w3 w4 w5 w6 w7", "w1  w2"]}), tmp_path)
    label(sentences(), tmp_path, max_length=5)
    short = sum(len(text.split()) > 3 for text in sentences()["sentence"])
    assert 2 < counting.rows <= 2 + short


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-3])


def flip_a_bit(folder: Path, of: str = "logits") -> None:
    """Of one tensor, wherever it lies in the file."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    header = int.from_bytes(content[:8], "little")
    _, end = json.loads(content[8 : 8 + header])[of]["data_offsets"]
    content[8 + header + end - 1] ^= 4
    shard.write_bytes(bytes(content))


def flip_a_bit_of_the_keys(folder: Path) -> None:
    flip_a_bit(folder, "keys")


def flip_a_bit_of_the_checksums(folder: Path) -> None:
    flip_a_bit(folder, "crc32:logits")


def foreign_shard(folder: Path) -> None:
    label(sentences(10, seed=4), folder / "other", model=tiny_bert(seed=3))
    shard = next((folder / "other").glob("*.safetensors"))
    shutil.move(shard, folder / shard.name)
    shutil.rmtree(folder / "other")


def cut_manifest(folder: Path) -> None:
    (folder / "cache.json").write_text((folder / "cache.json").read_text()[:40])


def no_manifest(folder: Path) -> None:
    (folder / "cache.json").unlink()


def other_format(folder: Path) -> None:
    manifest = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps(manifest | {"format": 0}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, r"is damaged: signals-\w+.safetensors cannot be read .* delete that file and write again"),
        (flip_a_bit, "does not match its checksum; delete that file and write its examples again"),
        (flip_a_bit_of_the_keys, "does not match its checksum; delete that file"),
        (flip_a_bit_of_the_checksums, "does not match its checksum; delete that file"),
        (foreign_shard, "belongs to another cache; delete that file"),
        (cut_manifest, "cache.json cannot be read"),
        (no_manifest, "holds signals-.* but no cache.json"),
        (other_format, "cache.json does not match its key; delete the folder"),
    ],
)
def test_damaged_folder_is_refused_with_the_reason(tmp_path: Path, damage: Any, words: str) -> None:
    label(sentences(), tmp_path)
    damage(tmp_path)
    with pytest.raises(TeacherCacheError, match=words):
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
    with pytest.raises(TeacherCacheError, match="holds notes.txt but no cache.json"):
        label(sentences(), tmp_path)
    with pytest.raises(TeacherCacheError, match="is a file, not a folder"):
        label(sentences(), tmp_path / "notes.txt")


def test_only_what_is_asked_for_is_compared(tmp_path: Path) -> None:
    """A damaged example does not keep the others of its shard from being read."""
    data = sentences()
    options: dict[str, Any] = {"flush_seconds": 3600}
    expected = logits(label(data, tmp_path, **options))
    keys = write_cache(
        tokenized(zip(data["sentence"][:], strict=True), tiny_tokenizer(), 32), tiny_bert(dropout=0.1), ["logits"],
        tmp_path, tokenizer=tiny_tokenizer(), dtype="float32", progress=False,
    ).keys  # fmt: skip
    (shard,) = tmp_path.glob("*.safetensors")
    (last,) = np.flatnonzero(keys.view("S16") == load_file(shard)["keys"].numpy().reshape(-1).view("S16")[-1])
    flip_a_bit(tmp_path)
    cache, others = TeacherCache(tmp_path), np.delete(np.arange(60), last)
    assert np.array_equal(cache.stack(keys[others], "logits").numpy(), expected[others])
    for read in (lambda: cache.stack(keys, "logits"), lambda: cache.find(keys[[last]], ["logits"])):
        with pytest.raises(TeacherCacheError, match="does not match its checksum"):
            read()


def loud_model() -> Any:
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias[:] = 1e6
    return model


def broken_model() -> Any:
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.weight[:] = float("inf")
    return model


@pytest.mark.parametrize(
    ("data", "changes", "words"),
    [
        (lambda: sentences().select([]), {}, "write_cache: rows must hold at least one"),
        (lambda: Dataset.from_dict({"a": ["x", "y"], "b": ["z", None]}), {}, "row 1 must be text, got 'y' | None"),
        (
            lambda: sentences(),
            {"model": broken_model()},
            "the teacher's logits of an example of .* tokens are not finite; run it in a dtype of wider range than",
        ),
        (lambda: sentences(), {"model": loud_model(), "dtype": "float16"}, "tokens are not finite in float16; store"),
    ],
)
def test_refuses(tmp_path: Path, data: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        label(data(), tmp_path / "out", **changes)


def test_a_column_needs_a_key_for_every_row(tmp_path: Path) -> None:
    data = sentences()
    labelled = label(data, tmp_path)
    cache = TeacherCache(tmp_path)
    keys = np.frombuffer(b"".join(bytes([n]) * 16 for n in range(60)), dtype="S16")
    for rows, of, words in (
        (labelled, keys, "has a column 'teacher_logits' already"),
        (data, keys[1:], "keys must be one per row, got 59 for 60 rows"),
        (data, keys, "lacks 60 of 60 examples; run pydistill cache on these texts"),
    ):
        with pytest.raises(ValueError, match=words):
            with_logits(rows, cache, of)
    with pytest.raises(ValueError, match="keys must be at least one, got none"):
        cache.stack(keys[:0], "logits")


def test_a_cache_of_something_else_is_no_column(tmp_path: Path) -> None:
    assert whole_logits(tmp_path / "new") is None
    found = whole_logits(tmp_path) if label(sentences(3), tmp_path) else None
    assert found is not None and (found.signals, found.dtype) == (("logits",), "float32")
    rows = list(tokenized([("w1 w2",)], tiny_tokenizer(), 32))
    write_cache(rows, tiny_bert(), ["values@0"], tmp_path / "values", progress=False)
    write_cache(rows, tiny_bert(), ["logits"], tmp_path / "top", top_k=1, progress=False)
    for name, held in (("values", "values@0"), ("top", "the 1 largest of its logits")):
        with pytest.raises(TeacherCacheError, match=f"must hold whole logits, and holds {held}; write one with"):
            whole_logits(tmp_path / name)
    summary = write_cache(rows, tiny_bert(), ["values@0"], tmp_path / "values", progress=False)
    with pytest.raises(ValueError, match="values@0 must be of rows, as a classifier's logits are"):
        TeacherCache(tmp_path / "values").stack(summary.keys, "values@0")


def test_top_k_comes_back_many_at_once(tmp_path: Path) -> None:
    """As it does one by one, from several shards."""
    rows = list(tokenized([(text,) for text in tiny_sentences(30)], tiny_tokenizer(), 32))
    model = tiny_bert(num_labels=6)
    options: dict[str, Any] = {"top_k": 2, "progress": False, "flush_seconds": 0.0, "batch_size_tokens": 40}
    keys = write_cache(rows, model, ["logits"], tmp_path, **options).keys
    cache = TeacherCache(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    stacked = cache.stack(keys, "logits")
    singly = [example["logits"] for example in cache.find(keys, ["logits"]) if example is not None]
    assert stacked.shape == (30, 6) and torch.equal(stacked, torch.stack(singly))


# --------------------------------------------------------------------------- pydistill cache


@pytest.mark.parametrize("suffix", ["tsv", "csv", "json", "jsonl", "parquet"])
def test_pairs_of_a_table(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A cell's content is its text, also "NA" and quotes; a row without one of the two texts is no pair."""
    teacher = make_teacher(tmp_path / "bert", classes=3)
    rows = [("a dull film", "a great film"), ("NA", "null"), ('"the plot', "with warm music"), ("a great film", " ")]
    frame = pandas.DataFrame({"id": range(4), "one": [row[0] for row in rows], "two": [row[1] for row in rows]})
    path = tmp_path / f"train.{suffix}"
    if suffix == "tsv":
        path.write_text("\n".join("\t".join(row) for row in [("one", "two"), *rows]))
    elif suffix == "parquet":
        frame.to_parquet(path)
    elif suffix == "csv":
        frame.to_csv(path)
    else:
        frame.to_json(path, orient="records", lines=suffix == "jsonl")
    words = ["cache", str(tmp_path / "cache"), "--teacher", teacher, "--corpus", str(path), "--dtype", "float32"]
    assert main([*words, "--text-columns", "one", "two"]) == 0
    assert "3 texts, 3 of them new" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    encoded = [tokenizer(*row, return_tensors="pt") for row in rows[:3]]
    keys = [key_of(one["input_ids"][0].numpy(), one["token_type_ids"][0].numpy()) for one in encoded]
    found = TeacherCache(tmp_path / "cache", model=model, tokenizer=tokenizer).stack(np.array(keys), "logits")
    with torch.no_grad():
        expected = torch.cat([model(**one).logits for one in encoded])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert main([*words, "--text-columns", "one", "three"]) == 2
    assert "there is no column 'three', only" in capsys.readouterr().err


def test_columns_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "texts.txt").write_text("a film\n")
    words = ["cache", str(tmp_path / "cache"), "--teacher", make_teacher(tmp_path / "bert")]
    words += ["--corpus", str(tmp_path / "texts.txt"), "--text-columns", "one", "two"]
    assert main([*words, "three"]) == 2
    assert "--text-columns must name one column or two, got one, two, three" in capsys.readouterr().err
    assert main(words) == 2
    assert "is read line by line and has no columns one, two; name files that end in .json," in capsys.readouterr().err
