# SPDX-License-Identifier: Apache-2.0
"""Reads the rows of a classification task: files, packaged files or hub data sets in; checked splits out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset

from pydistill.config import ConfigError, DataConfig, UserError, near_matches, resolve_path
from pydistill.data.augment import READERS  # one idea of tsv, csv and json for training and for augmentation

# Columns that the recipes add; a text column of that name would be overwritten.
RESERVED = ("labels", "teacher_logits", "source")
# More distinct labels than this in numbers with decimals are scores, not classes.
MAX_CLASSES = 1000


class DataError(UserError):
    """A source cannot be read, or its rows do not make a classification task."""


@dataclass(frozen=True)
class Task:
    """Checked rows.

    Attributes:
        splits: ``train``, ``dev`` and ``test``, each with the text columns and ``labels`` (a ``ClassLabel``, or
            ``float32`` scores).
        text_columns: one name for single sentences, two for pairs.
        label_names: the class names in the order of their ids; none for scores.
        notes: what a reader of the results should know (dropped rows, rows shared between splits, test being dev).
        named_labels: whether the names mean something; False when they are only the numbers 0..k-1 of the file.
        test_is_dev: no test rows were given, and ``test`` is ``dev`` again.
        counts: rows of each split.
    """

    splits: DatasetDict
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    named_labels: bool = True
    test_is_dev: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def pair(self) -> bool:
        return len(self.text_columns) == 2


def load_task(config: DataConfig, *, scores: bool = False, by_first_text: bool = False) -> Task:
    """Read, filter, check and split the rows that ``config`` names.

    Args:
        config: sources, columns and splits.
        scores: the labels are numbers to be predicted, not classes.
        by_first_text: rows with the same first text stay together, whether they are held out or left out: the
            candidates of a query. A share is one of these groups; a number of rows is the most, in whole groups.

    Raises:
        DataError: unreadable or malformed files, missing columns, no rows left, labels that are unknown, unlabelled or
            not classes (not numbers, for scores), a split larger than the data. Every message names the source, the
            rule and the way out.
    """
    notes: list[str] = []
    frames: dict[str, pandas.DataFrame] = {}
    names = list(config.labels) if config.labels else None
    for split, source in (("train", config.train), ("dev", config.dev), ("test", config.test)):
        if source is not None:
            frame, feature_names = _read(source, config, split)
            frames[split] = _checked(frame, source, config, notes, split)
            names = names or feature_names
    label_names, named = ((), False) if scores else _label_names(frames["train"][config.label_column], names, config)
    for split, frame in frames.items():
        source, labels = getattr(config, split), frame[config.label_column]
        inferred = config.labels is None
        frame["labels"] = _scores(labels, source) if scores else _label_ids(labels, label_names, source, inferred)

    hold_out = _hold_out_groups if by_first_text else _hold_out
    # Test rows leave train first, so that a dev split added later never changes what is reported.
    if "test" not in frames and config.test_rows:
        frames["train"], frames["test"] = hold_out(frames["train"], config.test_rows, config, "test_rows")
    if "dev" not in frames:
        frames["train"], frames["dev"] = hold_out(frames["train"], config.dev_rows, config, "dev_rows")
    test_is_dev = "test" not in frames
    if test_is_dev:
        frames["test"] = frames["dev"]
        notes.append("no test rows are given: the reported numbers are on dev")
    if config.max_train_rows is not None and by_first_text:
        frames["train"] = _whole_groups(frames["train"], config.max_train_rows, config, "max_train_rows")
    elif config.max_train_rows is not None:
        frames["train"] = frames["train"].head(config.max_train_rows)
    missing = sorted(set(range(len(label_names))) - set(frames["train"]["labels"]))
    if missing:
        listed = ", ".join(repr(label_names[index]) for index in missing)
        raise DataError(f"{config.train}: the training rows hold no example of the class {listed}; see data.labels")
    notes += _shared_rows(frames, config.text_columns)

    columns = [*config.text_columns, "labels"]
    features = Features({name: Value("string") for name in config.text_columns})
    features["labels"] = Value("float32") if scores else ClassLabel(names=list(label_names))
    splits = DatasetDict(
        {
            split: Dataset.from_pandas(frames[split][columns], features=features, preserve_index=False)
            for split in ("train", "dev", "test")
        }
    )
    counts = {split: len(rows) for split, rows in splits.items()}
    return Task(splits, tuple(config.text_columns), label_names, tuple(notes), named, test_is_dev, counts)


def example_row(rows: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the texts of a row to show: a short one, free of what a shell would need quoted, if there is one."""
    short = [row for row in rows if 4 <= max(len(text.split()) for text in row) <= 12]
    plain = (row for row in short if not set("'\"\\$`!") & set("".join(row)))
    return next(plain, rows[0])


def _read(source: str, config: DataConfig, split: str) -> tuple[pandas.DataFrame, list[str] | None]:
    """Return the rows of one source, text as ``str``, and the class names if the source itself knows them."""
    if source.startswith("hub:"):
        return _read_hub(source, config, split)
    try:
        path = Path(resolve_path(source))
    except ConfigError as error:
        raise DataError(str(error)) from None
    if not path.is_file():
        raise DataError(f"data.{split}: {source}: there is no such file")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"data.{split}: {source}: the format must be one of {', '.join(READERS)}")
    try:
        _, columns = reader(path)
    except UnicodeDecodeError as error:
        raise DataError(f"data.{split}: {source}: must be UTF-8 text: byte {error.start}: {error.reason}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"data.{split}: cannot be read: {error}") from None
    return pandas.DataFrame(columns), None


def _read_hub(source: str, config: DataConfig, split: str) -> tuple[pandas.DataFrame, list[str] | None]:
    name, _, hub_split = source.removeprefix("hub:").partition(":")
    name, _, subset = name.partition("@")
    hub_split = hub_split or {"train": "train", "dev": "validation", "test": "test"}[split]
    try:
        rows = load_dataset(name, subset or None, split=hub_split)
    except Exception as error:  # whatever the hub, the network or a loader raised: the name is the user's to correct
        raise DataError(f"data.{split}: {source}: datasets cannot load it: {_first_line(error)}") from None
    label = rows.features.get(config.label_column)
    return rows.to_pandas(), list(label.names) if isinstance(label, ClassLabel) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _checked(
    frame: pandas.DataFrame, source: str, config: DataConfig, notes: list[str], split: str
) -> pandas.DataFrame:
    for key, column in [
        *(("data.text_columns", name) for name in config.text_columns),
        ("data.label_column", config.label_column),
        *(("data.filter", name) for name in config.filter),
    ]:
        if column not in frame.columns:
            near = near_matches(column, [str(name) for name in frame.columns], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(str(name) for name in frame.columns)
            raise DataError(f"{source}: {key}: there is no column {column!r}, the file has: {listed}{hint}")
    for column in config.text_columns:
        if column in RESERVED:
            raise DataError(
                f"{source}: data.text_columns: {column!r} is a name that the recipes use; rename the column"
            )
    for column, value in config.filter.items():
        kept = frame[frame[column].astype(str) == value]
        if kept.empty and len(frame):
            seen = ", ".join(repr(item) for item in sorted(frame[column].astype(str).unique())[:8])
            raise DataError(f"{source}: data.filter: no row has {column} = {value!r}; its values are {seen}")
        frame = kept
    texts = frame[list(config.text_columns)]
    usable = texts.map(lambda text: isinstance(text, str) and bool(text.strip())).all(axis=1)
    if not usable.all():
        notes.append(f"{split}: {int((~usable).sum())} rows without text were dropped")
    frame = frame[usable].copy()
    if frame.empty:
        raise DataError(f"{source}: holds no rows with text in {', '.join(config.text_columns)}")
    return frame


def _as_integer(value: Any) -> int | None:
    if isinstance(value, bool):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _label_names(
    labels: Iterable[Any], names: Sequence[str] | None, config: DataConfig
) -> tuple[tuple[str, ...], bool]:
    if names is not None:
        if len(set(names)) != len(names):
            raise DataError(f"{config.train}: data.labels: must not repeat a name, got {list(names)}")
        return tuple(names), True
    values = {value: _as_integer(value) for value in labels}
    if any(value is None or value == "" for value in values):
        raise DataError(f"{config.train}: data.label_column: some rows of {config.label_column!r} have no label")
    integers = {number for number in values.values() if number is not None}
    if None not in values.values():
        if min(integers) < 0:
            raise DataError(
                f"{config.train}: data.label_column: the label {min(integers)} marks unlabelled rows; "
                "use a labelled file, or keep the labelled rows with data.filter"
            )
        plain = integers == set(range(len(integers)))
        found = [str(number) for number in sorted(integers)]
    else:
        plain, found = False, sorted(str(value) for value in values)
        if all(_is_number(value) for value in values) or len(found) > MAX_CLASSES:
            raise DataError(
                f"{config.train}: data.label_column: {config.label_column!r} holds {len(found)} different values such "
                f"as {found[0]!r}: scores, not classes"
            )
    if len(found) < 2:
        raise DataError(f"{config.train}: data.label_column: needs at least two classes, found only {found}")
    return tuple(found), not plain


def _scores(labels: pandas.Series, source: str) -> pandas.Series:
    numbers = pandas.to_numeric(labels, errors="coerce")
    unusable = ~np.isfinite(numbers)
    if unusable.any():
        raise DataError(
            f"{source}: data.label_column: {int(unusable.sum())} rows of {labels.name!r} hold no score, such as "
            f"{labels[unusable].iloc[0]!r}; remove them, or ask for a metric of classes"
        )
    return numbers


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _label_ids(labels: pandas.Series, names: Sequence[str], source: str, inferred: bool) -> list[int]:
    by_name = {name: index for index, name in enumerate(names)}
    ids: dict[Any, int] = {}
    for value in labels.unique():
        number = _as_integer(value)
        if str(value) in by_name:
            ids[value] = by_name[str(value)]
        elif number is not None and str(number) in by_name:
            ids[value] = by_name[str(number)]
        elif number is not None and not inferred and 0 <= number < len(names):
            ids[value] = number
        else:
            where = "those of the training rows" if inferred else "data.labels"
            raise DataError(
                f"{source}: data.label_column: the label {value!r} is not one of {where}: "
                f"{', '.join(names)} (or their numbers 0 to {len(names) - 1})"
            )
    return [ids[value] for value in labels]


def _hold_out(
    frame: pandas.DataFrame, amount: int | float, config: DataConfig, key: str
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    rows = amount if isinstance(amount, int) else max(1, round(amount * len(frame)))
    if rows >= len(frame):
        raise DataError(f"{config.train}: data.{key}: cannot hold out {rows} of {len(frame)} rows")
    if config.split == "random":
        frame = frame.sample(frac=1.0, random_state=config.split_seed)
    # The original order is kept inside both parts: a run is easier to compare with its file.
    return frame.iloc[:-rows].sort_index(), frame.iloc[-rows:].sort_index()


def _hold_out_groups(
    frame: pandas.DataFrame, amount: int | float, config: DataConfig, key: str
) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """`_hold_out` by whole groups of rows with the same first text: the last ones, or random ones, are held out."""
    groups = pandas.Series(frame[config.text_columns[0]].unique())
    if config.split == "random":
        groups = groups.sample(frac=1.0, random_state=config.split_seed)
    order = dict(zip(reversed(list(groups)), range(len(groups)), strict=True))
    ranks = frame[config.text_columns[0]].map(order)
    if isinstance(amount, int):
        held_out = _whole_groups(frame.iloc[np.argsort(ranks, kind="stable")], amount, config, key).index
    else:
        held_out = frame.index[ranks < max(1, round(amount * len(groups)))]
    kept = ~frame.index.isin(held_out)
    if not kept.any():
        raise DataError(
            f"{config.train}: data.{key}: cannot hold out {amount} rows: no group of rows with the same "
            f"{config.text_columns[0]!r} would be left of {len(groups)}"
        )
    return frame[kept], frame[~kept]


def _whole_groups(frame: pandas.DataFrame, rows: int, config: DataConfig, key: str) -> pandas.DataFrame:
    """As many of the first groups of rows with the same first text as are ``rows`` at most."""
    column = frame[config.text_columns[0]]
    sizes = column.groupby(column, sort=False).size()
    chosen = sizes.index[sizes.cumsum() <= rows]
    if chosen.empty:
        raise DataError(
            f"{config.train}: data.{key}: {rows} rows are too few: rows with the same {column.name!r} stay together, "
            f"and the first such group has {sizes.iloc[0]}"
        )
    return frame[column.isin(set(chosen))]


def _shared_rows(frames: dict[str, pandas.DataFrame], columns: Sequence[str]) -> list[str]:
    def keys(frame: pandas.DataFrame) -> pandas.Series:
        joined = frame[columns[0]]
        for column in columns[1:]:
            joined = joined.str.cat(frame[column], sep="\t")
        return joined.str.lower().str.strip()

    train = set(keys(frames["train"]))
    notes = []
    for split in ("dev", "test"):
        if split == "test" and frames["test"] is frames["dev"]:
            continue
        shared = int(keys(frames[split]).isin(train).sum())
        if shared:
            notes.append(f"{split}: {shared} of {len(frames[split])} rows also occur in train")
    return notes
