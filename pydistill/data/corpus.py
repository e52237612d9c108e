# SPDX-License-Identifier: Apache-2.0
"""A corpus of plain texts as an endless, shuffled, exactly resumable stream of token rows, truncated or packed."""

from __future__ import annotations

import copy
import csv
import glob
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from datasets import load_dataset
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from pydistill.config import ConfigError, OneOrMore, Section, UserError, resolve_path
from pydistill.packing import SEGMENTS

Row = dict[str, Any]
Packing = Literal["truncate", "packed"]

# Texts that are read and tokenized in one call: enough to keep a fast tokenizer's threads busy.
_CHUNK = 256
# Rows that packing fills at the same time; more waste less and mix documents from further apart.
_OPEN_ROWS = 16
# Kinds of files by suffix; every other one is read line by line.
_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
# How `datasets` reads a kind where its name does not say it. A cell that reads "NA" or "null" is a text; tabs come
# without quoting.
_READERS: dict[str, dict[str, Any]] = {
    "csv": {"keep_default_na": False},
    "tsv": {"path": "csv", "sep": "\t", "quoting": csv.QUOTE_NONE, "keep_default_na": False},
}


class CorpusError(UserError):
    """A corpus cannot be read, or holds no text."""


class TextSource(Section):
    """Where texts come from: any number of them, without labels; read as a stream, never whole."""

    files: OneOrMore[str] | None = Field(
        None,
        description="files, patterns (*, **) or package:NAME/PATH: a text per line, or per row of a "
        ".json, .jsonl, .csv, .tsv or .parquet file",
    )
    dataset: str | None = Field(None, description="NAME[@CONFIG][:SPLIT] for datasets.load_dataset, instead of files")
    text_column: str = Field("text", description="of a dataset, or of files with columns")

    @model_validator(mode="after")
    def _one_source(self) -> TextSource:
        if (self.files is None) == (self.dataset is None):
            raise ValueError("give either files or dataset")
        return self


class CorpusSection(TextSource):
    """The texts to distil on, and how rows are made of them."""

    packing: Packing = Field(
        "truncate", description="one text per row, or as many as fit, kept apart by a block-diagonal attention mask"
    )
    max_length: Annotated[int, Field(gt=1)] = Field(128, description="tokens per row; longer texts are cut")
    held_out: int = Field(0, ge=0, description="keep every k-th text out of training, for evaluation; 0: none")
    shuffle_buffer: int = Field(
        10_000, gt=0, description="texts that are shuffled among each other, block by block; 1: the order of the files"
    )

    @model_validator(mode="after")
    def _some_to_train_on(self) -> CorpusSection:
        if self.held_out == 1:
            raise ValueError("held_out 1 would keep every text out of training; give 0 or at least 2")
        return self


def load_corpus(
    section: CorpusSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    part: Literal["train", "held_out"] = "train",
    seed: int = 0,
    as_texts: bool = False,
) -> Corpus:
    """Open the corpus that ``section`` describes.

    Args:
        section: see :class:`CorpusSection`.
        tokenizer: of the student.
        part: ``"train"``: the texts that are not held out, shuffled, again and again without an end; ``"held_out"``:
            the others, once, in order.
        seed: of the shuffling.

    Raises:
        CorpusError: a file, data set or column that does not exist, a file without text, or nothing held out.
    """
    texts = _Texts(section)
    if part == "held_out" and not section.held_out:
        raise CorpusError("corpus.held_out: is 0, so there are no held-out texts; set it to 100, for instance")
    return Corpus(
        texts,
        tokenizer,
        max_length=section.max_length,
        packing="texts" if as_texts else section.packing,
        shuffle_buffer=section.shuffle_buffer if part == "train" else 1,
        every=section.held_out,
        held_out=part == "held_out",
        endless=part == "train",
        seed=seed,
    )


def corpus_texts(section: TextSource) -> Iterable[str]:
    """Return the texts that ``section`` describes, held out or not, in order, to be iterated any number of times.

    Raises:
        CorpusError: a file, data set or column that does not exist, or a file without text.
    """
    return _Texts(section)


def corpus_rows(section: TextSource, columns: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """Return the rows of a table, their texts in `columns`, in order, to be iterated any number of times.

    Rows in which one of them is missing or blank are left out; ``section.text_column`` does not count.

    Raises:
        CorpusError: a file, data set or column that does not exist, or a file without text.
    """
    return _Rows(section, columns, "text columns")


class _Texts:
    """The texts of files or of a data set, in order, without the blank ones; read anew by every iteration."""

    def __init__(self, section: TextSource) -> None:
        self._rows = _Rows(section, [section.text_column], "corpus.text_column")

    def __iter__(self) -> Iterator[str]:
        return (text for (text,) in self._rows)


class _Rows:
    """Rows of texts, the same way; files that are read line by line have one column, whatever it is called."""

    def __init__(self, section: TextSource, columns: Sequence[str], key: str) -> None:
        self.columns, self.key = list(columns), key
        if section.files is not None:
            paths = _expand(section.files)
            kinds = {_KINDS.get(path.suffix.lower(), "text") for path in paths}
            if len(kinds) > 1:
                raise CorpusError(
                    f"corpus.files: must be of one kind, got {', '.join(sorted(kinds))}; convert them, or make two runs"
                )
            kind = kinds.pop()
            self.name = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
            if kind == "text":
                if len(self.columns) > 1:
                    raise CorpusError(
                        f"corpus.files: {self.name}: is read line by line and has no columns "
                        f"{', '.join(self.columns)}; name files that end in {', '.join(_KINDS)}"
                    )
                self.columns = ["text"]
                for path in paths:
                    _check_text_file(path)
            self._options: dict[str, Any] = {"path": kind, "data_files": [str(path) for path in paths]}
            self._options |= _READERS.get(kind, {})
        else:
            assert section.dataset is not None  # one of the two, says the section
            source, _, split = section.dataset.partition(":")
            source, _, subset = source.partition("@")
            self.name = section.dataset
            self._options = {"path": source, "name": subset or None, "split": split or "train"}
        self._options = {"split": "train", "streaming": True} | self._options
        if next(iter(self), None) is None:
            raise CorpusError(f"corpus: {self.name}: holds no text")

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        try:
            for batch in load_dataset(**self._options).iter(_CHUNK):
                for column in self.columns:
                    if column not in batch:
                        raise CorpusError(
                            f"{self.key}: {self.name}: there is no column {column!r}, only {', '.join(batch)}"
                        )
                for row in zip(*(batch[column] for column in self.columns), strict=True):
                    if all(isinstance(text, str) and text.strip() for text in row):
                        yield row
        # One clause: an iterator that is left open is closed when the interpreter ends, and finds no global name then.
        except Exception as error:
            if isinstance(error, CorpusError):
                raise
            # Whatever the hub, the network, a loader or a decoder raised: the source is to blame.
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CorpusError(f"corpus: {self.name}: datasets cannot read it: {reason}") from None


def _expand(patterns: Iterable[str]) -> list[Path]:
    paths: list[Path] = []
    for pattern in patterns:
        try:
            resolved = str(resolve_path(pattern))
        except ConfigError as error:
            raise CorpusError(f"corpus.files: {error}") from None
        literal = Path(resolved).is_file()  # a name may hold brackets
        found = [resolved] if literal else sorted(glob.glob(resolved, recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files:
            raise CorpusError(f"corpus.files: {pattern}: there is no such file")
        paths += [path for path in files if path not in paths]
    return paths


def _check_text_file(path: Path) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            blank = not any(line.strip() for line in file)
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus.files: {path}: must be readable UTF-8 text: {error}") from None
    if blank:
        raise CorpusError(f"corpus.files: {path}: holds no text; take it out of the list")


class Corpus(IterableDataset):
    r"""A stream of token rows for ``transformers.Trainer``.

    Order: pass ``p`` over the texts cuts them into consecutive blocks of ``shuffle_buffer``; block ``b`` is permuted
    by a generator seeded with ``(seed, p, b)``. The order is therefore a function of these numbers alone, and a trainer
    that skips the rows it has seen continues with the same rows as an uninterrupted run. An endless stream is one
    epoch to the trainer: train with ``max_steps``.

    Rows: ``"truncate"`` yields ``input_ids``, one text each. ``"packed"`` yields ``input_ids``, ``segment_ids`` (1 for
    the first text of the row, 2 for the second, ...) and ``position_ids`` (from 0 in each text); a text goes into the
    first of a few open rows that has room for it, and if none has, the fullest one is yielded. ``"texts"`` yields what
    a collator needs that tokenizes by itself and draws at random: ``text``, its ``index`` in the corpus, the ``pass``,
    and how many rows came before this one in all (``position``). These numbers depend on the order alone.

    Args:
        texts: iterated once per pass.
        tokenizer: cuts each text to ``max_length`` tokens, special tokens included.
        max_length: longest row.
        packing: see above.
        shuffle_buffer: texts in a block; 1 keeps the order.
        every: ``k``: the ``k``-th, ``2k``-th, ... text is held out; 0: none.
        held_out: yield those instead of the others.
        endless: start over when the texts are used up.
        seed: of the shuffling.

    Raises:
        CorpusError: no text is left to yield, or the tokenizer has no padding token.
    """

    def __init__(
        self,
        texts: Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        packing: Packing | Literal["texts"] = "truncate",
        shuffle_buffer: int = 10_000,
        every: int = 0,
        held_out: bool = False,
        endless: bool = True,
        seed: int = 0,
    ) -> None:
        if tokenizer.pad_token_id is None:
            raise CorpusError("corpus: the tokenizer has no padding token; set tokenizer.pad_token first")
        self.texts = texts
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.packing = packing
        self.shuffle_buffer = shuffle_buffer
        self.every = every
        self.held_out = held_out
        self.endless = endless
        self.seed = seed
        self._seen = 0

    def seen(self, rows: int) -> Corpus:
        """Return the same stream for a trainer that is about to skip its first ``rows`` rows.

        Skipping reads and throws away; the rows that will be thrown away come as a single padding token each instead of
        being tokenized, or as an empty text (not of packed rows: how many texts fill one is known only from their
        tokens).
        """
        stream = copy.copy(self)
        stream._seen = 0 if self.packing == "packed" else rows
        return stream

    def first_texts(self, count: int) -> list[str]:
        """Return the first ``count`` texts of this part of the corpus, unshuffled; none at all is an error."""
        found = [text for _, text in itertools.islice(self._part(), count)]
        if not found:
            raise self._no_text()
        return found

    def __iter__(self) -> Iterator[Row]:
        workers = get_worker_info()
        if workers is not None and workers.num_workers > 1:
            raise CorpusError(
                f"corpus: is one stream and cannot be read by {workers.num_workers} workers; "
                "set dataloader_num_workers to 0 or 1"
            )
        seen, position = self._seen, itertools.count()
        for number in itertools.count() if self.endless else range(1):
            empty = True
            texts = self._shuffled(number)
            if self.packing == "packed":
                rows = _pack(self._tokenized(texts), self.max_length)
            else:
                for index, _ in itertools.islice(texts, seen):
                    empty = False
                    seen -= 1
                    if self.packing == "texts":
                        yield {"text": "", "index": index, "pass": number, "position": next(position)}
                    else:
                        yield {"input_ids": [int(self.tokenizer.pad_token_id)]}
                if self.packing == "texts":
                    rows = (
                        {"text": text, "index": index, "pass": number, "position": next(position)}
                        for index, text in texts
                    )
                else:
                    rows = ({"input_ids": ids} for ids in self._tokenized(texts))
            for row in rows:
                empty = False
                yield row
            if empty:
                raise self._no_text()

    def _no_text(self) -> CorpusError:
        kind = "held out" if self.held_out else "left for training"
        return CorpusError(f"corpus: no text is {kind} with held_out {self.every}; give more texts")

    def _part(self) -> Iterator[tuple[int, str]]:
        """The texts of this part, each with its index in the corpus."""
        for index, text in enumerate(self.texts):
            if (self.every > 0 and (index + 1) % self.every == 0) == self.held_out:
                yield index, text

    def _shuffled(self, number: int) -> Iterator[tuple[int, str]]:
        texts = self._part()
        if self.shuffle_buffer == 1:
            yield from texts
            return
        for index in itertools.count():
            block = list(itertools.islice(texts, self.shuffle_buffer))
            if not block:
                return
            for position in np.random.default_rng([self.seed, number, index]).permutation(len(block)):
                yield block[position]

    def _tokenized(self, texts: Iterator[tuple[int, str]]) -> Iterator[list[int]]:
        while chunk := [text for _, text in itertools.islice(texts, _CHUNK)]:
            yield from self.tokenizer(chunk, truncation=True, max_length=self.max_length)["input_ids"]


def _pack(documents: Iterable[Sequence[int]], width: int) -> Iterator[Row]:
    """First fit into a few open rows; the fullest is yielded when none has room."""
    rows: list[list[Sequence[int]]] = []
    sizes: list[int] = []
    for document in documents:
        place = next((index for index, size in enumerate(sizes) if size + len(document) <= width), None)
        if place is None and len(rows) == _OPEN_ROWS:
            fullest = sizes.index(max(sizes))
            del sizes[fullest]
            yield _packed_row(rows.pop(fullest))
        if place is None:
            rows.append([])
            sizes.append(0)
            place = len(rows) - 1
        rows[place].append(document)
        sizes[place] += len(document)
    yield from map(_packed_row, rows)


def _packed_row(documents: Sequence[Sequence[int]]) -> Row:
    return {
        "input_ids": [token for document in documents for token in document],
        SEGMENTS: [number for number, document in enumerate(documents, 1) for _ in document],
        "position_ids": [position for document in documents for position in range(len(document))],
    }


class PackedCollator:
    """Packed rows -> ``input_ids``, ``attention_mask``, ``segment_ids`` and ``position_ids``, all ``[B, N]``.

    Padding is on the right: segment 0, attention mask 0, a valid position. The models need the block mask of
    :mod:`pydistill.packing` in the place of the attention mask, which `Distiller` gives them.

    Args:
        pad_token_id: the tokenizer's.
        first_position: of a text's first token, see :func:`pydistill.packing.first_position`.
        pad_to_multiple_of: round N up.
    """

    def __init__(self, pad_token_id: int, first_position: int = 0, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id = pad_token_id
        self.first_position = first_position
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        multiple = self.pad_to_multiple_of
        width = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
        batch: dict[str, Tensor] = {}
        for name, fill in (("input_ids", self.pad_token_id), (SEGMENTS, 0), ("position_ids", 0)):
            batch[name] = torch.full((len(rows), width), fill)
            for line, row in zip(batch[name], rows, strict=True):
                line[: len(row[name])] = torch.as_tensor(row[name])
        batch["position_ids"] += self.first_position
        batch["attention_mask"] = (batch[SEGMENTS] > 0).long()
        return batch
