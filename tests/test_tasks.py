# SPDX-License-Identifier: Apache-2.0
"""Reading rows: formats, labels, splits, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pydistill.config import DataConfig
from pydistill.data.tasks import DataError, Task, example_row, load_task

ROWS = [
    ("a good film", "pos"),
    ("a bad film", "neg"),
    ('so "fine"', "pos"),
    ("NA", "neg"),
    ("null", "pos"),
    ("dull", "neg"),
]


def write(
    folder: Path, name: str, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = ("sentence", "label")
) -> str:
    path = folder / name
    if path.suffix == ".tsv":
        lines = ["\t".join(columns), *("\t".join(map(str, row)) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])
    else:
        objects = [dict(zip(columns, row, strict=True)) for row in rows]
        text = json.dumps(objects) if path.suffix == ".json" else "\n".join(map(json.dumps, objects))
        path.write_text(text, encoding="utf-8")
    return str(path)


def load(**keys: Any) -> Task:
    return load_task(DataConfig(**keys))


@pytest.mark.parametrize("suffix", ["tsv", "csv", "json", "jsonl"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    train, dev = write(tmp_path, f"train.{suffix}", ROWS), write(tmp_path, f"dev.{suffix}", ROWS[:2])
    task = load(train=train, dev=dev)
    assert task.label_names == ("neg", "pos")
    # Words such as NA and quotes inside a tsv are text, not missing values or csv quoting.
    assert task.splits["train"]["sentence"][:] == [text for text, _ in ROWS]
    assert task.splits["train"]["labels"][:] == [1, 0, 1, 0, 1, 0]
    assert task.splits["train"].features["labels"].names == ["neg", "pos"]
    assert task.counts == {"train": 6, "dev": 2, "test": 2}
    assert any("dev: 2 of 2 rows also occur in train" == note for note in task.notes)


def test_labels_follow_the_given_order(tmp_path: Path) -> None:
    train = write(tmp_path, "train.tsv", ROWS)
    task = load(train=train, dev=train, labels=["pos", "neg"])
    assert task.splits["train"]["labels"][:] == [0, 1, 0, 1, 0, 1]


def test_number_labels_keep_their_ids_and_take_names(tmp_path: Path) -> None:
    rows = [(text, int(label == "pos")) for text, label in ROWS]
    for suffix in ("tsv", "json"):
        train = write(tmp_path, f"train.{suffix}", rows)
        task = load(train=train, dev=train, labels=["negative", "positive"])
        assert task.splits["train"]["labels"][:] == [1, 0, 1, 0, 1, 0]
        assert task.label_names == ("negative", "positive") and task.named_labels
        assert not load(train=train, dev=train).named_labels


def test_labels_that_start_at_one_are_renumbered(tmp_path: Path) -> None:
    train = write(tmp_path, "train.tsv", [("a", 3), ("b", 1), ("c", 2)])
    task = load(train=train, dev=train)
    assert task.label_names == ("1", "2", "3")
    assert task.splits["train"]["labels"][:] == [2, 0, 1]


def test_held_out_rows_are_disjoint_seeded_and_independent(tmp_path: Path) -> None:
    train = write(tmp_path, "train.tsv", [(f"row {number}", number % 2) for number in range(100)])
    task = load(train=train, dev_rows=10, test_rows=0.2)
    parts = {split: set(rows["sentence"][:]) for split, rows in task.splits.items()}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 70, "dev": 10, "test": 20}
    assert len(set.union(*parts.values())) == 100
    again = load(train=train, dev_rows=30, test_rows=0.2)
    assert set(again.splits["test"]["sentence"][:]) == parts["test"]
    other = load(train=train, dev_rows=10, test_rows=0.2, split_seed=1)
    assert set(other.splits["test"]["sentence"][:]) != parts["test"]


def test_last_rows_can_be_held_out(tmp_path: Path) -> None:
    train = write(tmp_path, "train.tsv", [(f"row {number}", number % 2) for number in range(10)])
    task = load(train=train, dev_rows=2, split="last")
    assert task.splits["dev"]["sentence"][:] == ["row 8", "row 9"]
    assert any("numbers are on dev" in note for note in task.notes)
    assert not any("selects" in note for note in task.notes)  # a recipe that does so says it


def test_filter_and_pairs(tmp_path: Path) -> None:
    rows = [("a", "b", 0, "x"), ("c", "d", 1, "x"), ("e", "f", 1, "y")]
    train = write(tmp_path, "train.tsv", rows, ("q1", "q2", "label", "kind"))
    task = load(train=train, dev=train, text_columns=["q1", "q2"], filter={"kind": "x"})
    assert task.pair and task.splits["train"].column_names == ["q1", "q2", "labels"]
    assert task.splits["train"]["q2"][:] == ["b", "d"]


def test_rows_without_text_are_dropped_and_noted(tmp_path: Path) -> None:
    train = write(tmp_path, "train.tsv", [*ROWS, (" ", "pos")])
    task = load(train=train, dev=write(tmp_path, "dev.tsv", [("new", "pos")]))
    assert len(task.splits["train"]) == 6
    assert "train: 1 rows without text were dropped" in task.notes


def test_hub_sources_go_through_datasets(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", ROWS)
    task = load(train=f"hub:{tmp_path}:train", dev=f"hub:{tmp_path}:train[:2]")
    assert task.counts["train"] == 6 and task.counts["dev"] == 2
    with pytest.raises(DataError, match="datasets cannot load it"):
        load(train=f"hub:{tmp_path}:nothing")


@pytest.mark.parametrize(
    ("rows", "keys", "rule"),
    [
        (
            ROWS,
            {"text_columns": ["sentense"]},
            "there is no column 'sentense', the file has: sentence, label; did you mean",
        ),
        (ROWS, {"label_column": "y"}, "data.label_column: there is no column 'y'"),
        (ROWS, {"filter": {"kind": "x"}}, "data.filter: there is no column 'kind'"),
        (ROWS, {"filter": {"label": "x"}}, "no row has label = 'x'; its values are 'neg', 'pos'"),
        ([], {}, "holds no rows with text"),
        ([("a", "x"), ("b", "x")], {}, "at least two classes"),
        ([("a", -1), ("b", 0), ("c", 1)], {}, "the label -1 marks unlabelled rows"),
        ([("a", 0.5), ("b", 1.25), ("c", 2)], {}, "scores, not classes"),
        ([("a", ""), ("b", "x"), ("c", "y")], {}, "have no label"),
        (ROWS, {"labels": ["neg", "neutral"]}, "the label 'pos' is not one of data.labels: neg, neutral"),
        (
            [("a", 0), ("b", 1), ("c", 2)],
            {"labels": ["neg", "pos"]},
            "the label '2' is not one of data.labels: neg, pos",
        ),
        (ROWS, {"labels": ["neg", "pos", "other"]}, "no example of the class 'other'"),
        (ROWS, {"labels": ["neg", "neg"]}, "must not repeat"),
        (ROWS, {"dev": None, "dev_rows": 6}, "cannot hold out 6 of 6 rows"),
        ([("a", "x", "y")], {}, "cannot be read"),
    ],
)
def test_what_is_refused(tmp_path: Path, rows: list[Any], keys: dict[str, Any], rule: str) -> None:
    train = write(tmp_path, "train.tsv", rows, ("sentence", "label"))
    with pytest.raises(DataError) as caught:
        load(**{"train": train, "dev": train} | keys)
    assert rule in str(caught.value) and train in str(caught.value)


def test_label_of_dev_that_train_does_not_have(tmp_path: Path) -> None:
    train, dev = write(tmp_path, "train.tsv", ROWS), write(tmp_path, "dev.tsv", [("odd", "neutral")])
    with pytest.raises(
        DataError, match=r"dev.tsv: data.label_column: the label 'neutral' is not one of those of the training"
    ):
        load(train=train, dev=dev)


def test_reserved_column_names_are_refused(tmp_path: Path) -> None:
    train = write(tmp_path, "train.tsv", ROWS, ("labels", "label"))
    with pytest.raises(DataError, match="a name that the recipes use"):
        load(train=train, dev=train, text_columns=["labels"])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        load(train=str(tmp_path / "none.tsv"))
    (tmp_path / "train.parquet").write_bytes(b"x")
    with pytest.raises(DataError, match=r"must be one of .tsv, .csv"):
        load(train=str(tmp_path / "train.parquet"))
    (tmp_path / "latin.tsv").write_bytes("sentence\tlabel\ncaf\xe9\t0\n".encode("latin-1"))
    with pytest.raises(DataError, match="must be UTF-8"):
        load(train=str(tmp_path / "latin.tsv"))
    (tmp_path / "bad.jsonl").write_text('{"sentence": 1\n')
    with pytest.raises(DataError, match="cannot be read"):
        load(train=str(tmp_path / "bad.jsonl"))


def test_scores_are_numbers(tmp_path: Path) -> None:
    rows = [("a", "4.250"), ("b", "0"), ("c", "-1"), ("d", "2.5")]
    train = write(tmp_path, "train.tsv", rows, ("sentence", "score"))
    task = load_task(DataConfig(train=train, label_column="score", dev_rows=1, split="last"), scores=True)
    assert task.splits["train"]["labels"][:] == [4.25, 0.0, -1.0] and task.splits["dev"]["labels"][:] == [2.5]
    assert task.label_names == () and task.splits["train"].features["labels"].dtype == "float32"
    for bad in ("", "good", "nan"):
        train = write(tmp_path, "bad.tsv", [*rows, ("e", bad)], ("sentence", "score"))
        with pytest.raises(DataError, match=rf"bad.tsv: data.label_column: 1 rows of 'score' hold no score, .*'{bad}'"):
            load_task(DataConfig(train=train, label_column="score", dev_rows=1), scores=True)


DATA = Path(os.environ.get("PYDISTILL_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))


@pytest.mark.parametrize(
    ("name", "keys", "train", "classes"),
    [
        ("sst2", {"dev": "dev.tsv"}, 67349, 2),
        ("rte", {"dev": "dev.tsv", "text_columns": ["sentence1", "sentence2"]}, 2490, 2),
        ("snips", {"dev": "dev.tsv", "text_columns": ["text"]}, 13784, 7),
    ],
)
def test_real_files(name: str, keys: dict[str, Any], train: int, classes: int) -> None:
    folder = DATA / name
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder}; set PYDISTILL_DATA")
    task = load(**keys | {"train": str(folder / "train.tsv"), "dev": str(folder / "dev.tsv")})
    assert task.counts["train"] == train and len(task.label_names) == classes


def test_the_row_to_show_is_short_and_needs_no_quoting() -> None:
    long, quoted, short = ("one " * 40,), ("it's not for a shell",), ("a fine film it is",)
    assert example_row([long, quoted, short]) == short
    assert example_row([long, quoted]) == long
    assert example_row([(*short, *long), (*short, *short)]) == (*short, *short)
