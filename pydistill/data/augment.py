# SPDX-License-Identifier: Apache-2.0
"""Transfer-set augmentation of Tang et al. 2019 (arXiv 1903.12136, section 3.3): masking, POS-guided word
replacement and n-gram sampling of unlabelled sentences or sentence pairs, which the teacher labels
afterwards.

Library: `Augmenter`; `datasets`: `augment_dataset`; files: `augment_file`. Every sample depends on `(seed,
row)` alone, so the result is the same for any number of workers.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import sys
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import datasets

__all__ = [
    "AugmentConfig",
    "AugmentCounts",
    "Augmenter",
    "PairMode",
    "Tagger",
    "augment_dataset",
    "augment_file",
    "split_words",
    "textblob_tagger",
]

Tagger = Callable[[list[str]], list[str]]
"""Words of one sentence -> one part-of-speech tag per word. Any tag set will do: tags are only compared."""

PairMode = Literal["cycle", "draw", "first", "second", "both"]

SOURCE_COLUMN = "source"
"""Column of the output that holds the row index of the original."""


@dataclass(frozen=True)
class AugmentConfig:
    """What is done to a sentence, how often, and from which seed. Defaults: the paper's values for SST-2.

    Args:
        n_iter: samples per row (the paper: 20 for SST-2, 10 for QQP and MNLI).
        p_mask: probability that a word becomes `mask_token`.
        p_pos: probability that a word is replaced by one with the same part of speech. `p_mask + p_pos <= 1`.
        p_ng: probability that only one contiguous n-gram of the sample is kept.
        max_ngram: n is uniform in {1, ..., max_ngram}. A sentence of fewer than n words is kept whole, as the
            longest n-gram that it has. (The paper leaves this open. So n keeps its distribution at every
            length, and where the rule applies, a sentence of L <= max_ngram words stays whole with chance
            (max_ngram - L + 1) / max_ngram. The authors' script for pairs does likewise; the one for single
            sentences abandons the sentence, and neither ever takes the last window.)
        mask_token: written for a masked word; the teacher's mask token.
        masking, pos_replacement, ngram: ablation switches, one per rule. A rule that is switched off leaves
            every random decision of the others as it was; the words it would have touched stay.
        drop_all_replaced: discard a sample of a single sentence if each of its words was masked or replaced
            (judged before the n-gram rule), as the authors' code does. Their code for pairs does not, and so
            this has no effect on pairs.
        pair_mode: which side of a pair is augmented, while the other stays: `"first"`, `"second"`, `"both"`;
            `"cycle"` (the paper's) takes these three in turn: sample k of row i uses mode (i + k) mod 3, so
            that over the rows they are equally frequent for any `n_iter`; `"draw"` chooses one of the three
            per sample with equal probability, as the authors' code does. The mode changes no random decision
            within a side. `n_iter` counts the samples of all modes together; triple it for `n_iter` each.
        seed: non-negative integer; with the row index the only source of randomness.

    Raises:
        ValueError: for a value outside these ranges.
        TypeError: for a value of the wrong type.
    """

    n_iter: int = 20
    p_mask: float = 0.1
    p_pos: float = 0.1
    p_ng: float = 0.25
    max_ngram: int = 5
    mask_token: str = "[MASK]"
    masking: bool = True
    pos_replacement: bool = True
    ngram: bool = True
    drop_all_replaced: bool = True
    pair_mode: PairMode = "cycle"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (("n_iter", 1), ("max_ngram", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"AugmentConfig: {name} must be an integer, got {value!r}")
            if value < minimum:
                raise ValueError(f"AugmentConfig: {name} must be at least {minimum}, got {value}")
        for name in ("p_mask", "p_pos", "p_ng"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"AugmentConfig: {name} must be a number, got {value!r}")
            if not 0 <= value <= 1:
                raise ValueError(f"AugmentConfig: {name} is a probability, must be in [0, 1], got {value}")
        if self.p_mask + self.p_pos > 1:
            raise ValueError(
                "AugmentConfig: p_mask + p_pos must be at most 1 (a word is masked or replaced, not both), "
                f"got {self.p_mask} + {self.p_pos}"
            )
        for name in ("masking", "pos_replacement", "ngram", "drop_all_replaced"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"AugmentConfig: {name} must be true or false, got {getattr(self, name)!r}")
        if not isinstance(self.mask_token, str) or self.mask_token.split() != [self.mask_token]:
            raise ValueError(f"AugmentConfig: mask_token must be one word without white space, got {self.mask_token!r}")
        modes = get_args(PairMode)
        if self.pair_mode not in modes:
            raise ValueError(f"AugmentConfig: pair_mode must be one of {', '.join(modes)}, got {self.pair_mode!r}")

    @property
    def needs_tags(self) -> bool:
        """Whether any word can be replaced, that is, whether a tagger is needed at all."""
        return self.pos_replacement and self.p_pos > 0


# Punctuation at the edges of a white-space separated chunk. Inside a chunk nothing is split ("don't", "3.5",
# "and/or").
_QUOTES = r"\"'`\u2018\u2019\u201c\u201d"
_EDGES = re.compile(rf"([{_QUOTES}(\[{{<¿¡]*)(.*?)([{_QUOTES})\]}}>.,;:!?…]*)", re.DOTALL)
_RUNS = re.compile(r"(.)\1*", re.DOTALL)
_CLITIC = re.compile(r"['\u2019](?:s|t|d|m|re|ve|ll|em|n|til|cause)", re.IGNORECASE)
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+")


def split_words(text: str) -> tuple[list[str], list[str]]:
    """Words of a text, and the separator before each (`" "`, or `""` where a punctuation mark was split off).

    White space separates; then quotes, brackets and sentence marks at the edges of a chunk become words of
    their own, a run of the same mark ("...") one word. Chunks of punctuation only, clitics ("'s"), initials
    ("U.S.") and everything inside a chunk stay whole. Text that is tokenised already (SST-2) therefore splits
    at its spaces. Concatenating separators and words gives the text back with white space collapsed.
    """
    words: list[str] = []
    glue: list[str] = []
    for chunk in text.split():
        parts = [chunk] if chunk.isalnum() else _split_chunk(chunk)
        words += parts
        glue.append(" ")
        glue += [""] * (len(parts) - 1)
    if glue:
        glue[0] = ""
    return words, glue


def _split_chunk(chunk: str) -> list[str]:
    if _CLITIC.fullmatch(chunk) or not any(map(str.isalnum, chunk)):
        return [chunk]
    match = _EDGES.fullmatch(chunk)
    assert match is not None  # all three groups may be empty or take anything
    head, core, tail = match.groups()
    if tail.startswith(".") and _INITIALS.fullmatch(core + "."):
        core, tail = core + ".", tail[1:]
    return [run.group() for run in _RUNS.finditer(head)] + [core] + [run.group() for run in _RUNS.finditer(tail)]


class _TextBlobTagger:
    """The lexicon tagger behind TextBlob's `PatternTagger`, applied to words that are split already.

    (`PatternTagger.tag` itself takes a string, and rewrites some words while tokenising it.)
    """

    def __init__(self) -> None:
        try:
            from textblob.en import parser
        except ImportError as error:
            raise ImportError(
                "POS-guided replacement needs a tagger; the default one needs textblob, which is not "
                "installed. Install it with: pip install textblob   (or pass tagger=..., a callable words -> "
                "tags, or switch the rule off with pos_replacement=False)"
            ) from error
        self._find_tags = parser.find_tags

    def __call__(self, words: list[str]) -> list[str]:
        return [tag for _, tag in self._find_tags(words)]

    def __reduce__(self) -> tuple[Any, ...]:  # workers load the lexicon themselves
        return _TextBlobTagger, ()


def textblob_tagger() -> Tagger:
    """The default tagger: TextBlob's English lexicon and suffix rules, Penn Treebank tags, no nltk data.

    Raises:
        ImportError: if textblob is not installed; the message holds the command to install it.
    """
    return _TextBlobTagger()


class _Unigrams(NamedTuple):
    """Words of one tag and the running sum of their counts: the unigram distribution within the tag."""

    words: list[str]
    cumulative: list[int]


class _Sentence(NamedTuple):
    """A sentence made ready for sampling. `pieces[i]` is word i with its separator before it."""

    pieces: list[str]
    glue: list[str]
    masked: list[str]
    unigrams: list[_Unigrams | None]


class Augmenter:
    """Draws synthetic sentences (Tang et al. 2019, section 3.3).

    One sample of the words w_1..w_n:

    1. for each i, X_i ~ U[0, 1): X_i < p_mask: w_i becomes `mask_token`; p_mask <= X_i < p_mask + p_pos: w_i
       is replaced by a word drawn from the training unigram distribution renormalised within w_i's tag (which
       may be w_i again); else w_i stays;
    2. with probability p_ng: n ~ U{1..max_ngram}, and one contiguous n-gram, uniform over all its positions
       including the last, is kept; a sentence of fewer than n words is kept whole.

    Each sample takes a fixed number of draws (n + 3 per sentence) from a generator seeded by `(seed, index)`,
    whatever the rules do with them. So samples do not depend on the order in which sentences are visited, the
    first ten samples of `n_iter=20` are those of `n_iter=10`, and switching off a rule leaves the decisions
    of the others unchanged.

    Args:
        config: the procedure's parameters.
        unigrams: tag -> word -> count in the training split. Counts must be positive.
        tagger: needed where `config.needs_tags`. A word whose tag `unigrams` does not hold is kept.

    Raises:
        ValueError: if a tagger is needed and missing, or a count is not positive.
    """

    def __init__(
        self, config: AugmentConfig, unigrams: Mapping[str, Mapping[str, int]], tagger: Tagger | None = None
    ) -> None:
        if config.needs_tags and tagger is None:
            raise ValueError(
                "Augmenter: tagger is needed for POS-guided replacement, got None; pass textblob_tagger() or "
                "another callable words -> tags, or switch the rule off with pos_replacement=False"
            )
        self.config = config
        self.tagger = tagger
        self._unigrams: dict[str, _Unigrams] = {}
        for tag, counts in unigrams.items():
            if any(count < 1 for count in counts.values()):
                raise ValueError(f"Augmenter: unigrams must hold positive counts, got {dict(counts)} for tag {tag!r}")
            if counts:
                # Sorted, so that the draw does not depend on the order in which words were counted.
                words = sorted(counts)
                self._unigrams[tag] = _Unigrams(words, list(accumulate(counts[word] for word in words)))

    @classmethod
    def from_corpus(
        cls,
        sentences: Iterable[str],
        config: AugmentConfig,
        tagger: Tagger | None = None,
        *,
        progress: bool = False,
    ) -> Augmenter:
        """Counts words per tag in the training split; tags nothing where the replacement rule is off.

        Args:
            sentences: the training split's texts (both sides of pairs).
            config: the procedure's parameters.
            tagger: words -> tags; `textblob_tagger()` if None.
            progress: show a progress bar on stderr.

        Raises:
            ImportError: if the default tagger is needed and textblob is missing.
            ValueError: if the tagger does not give one tag per word.
        """
        unigrams: dict[str, Counter[str]] = {}
        if config.needs_tags:
            tagger = textblob_tagger() if tagger is None else tagger
            for sentence in _bar("count words by tag", "text", progress, items=sentences):
                words, _ = split_words(sentence)
                for word, tag in zip(words, _tags(tagger, words), strict=True):
                    unigrams.setdefault(tag, Counter())[word] += 1
        return cls(config, unigrams, tagger)

    def augment(self, sentence: str, index: int) -> list[str]:
        """`n_iter` samples of one sentence, in order, before any removal of duplicates.

        Shorter where `drop_all_replaced` dropped samples; empty for a sentence without words.

        Args:
            sentence: the text.
            index: its row in the data set; with the seed it determines the samples.

        Raises:
            ValueError: if the index is negative or the tagger does not give one tag per word.
        """
        prepared = self._prepare(sentence)
        if not prepared.pieces:
            return []
        draw = self._generator(index)
        samples = []
        for _ in range(self.config.n_iter):
            text, all_replaced = self._sample(prepared, draw)
            if not (all_replaced and self.config.drop_all_replaced):
                samples.append(text)
        return samples

    def augment_pair(self, first: str, second: str, index: int) -> list[tuple[str, str]]:
        """`n_iter` samples of one pair, in order, before any removal of duplicates; `config.pair_mode` says
        which sides change. Empty where a side has no words.

        Args:
            first: the first text.
            second: the second text.
            index: the pair's row in the data set; with the seed it determines the samples.

        Raises:
            ValueError: if the index is negative or the tagger does not give one tag per word.
        """
        sides = self._prepare(first), self._prepare(second)
        if not all(side.pieces for side in sides):
            return []
        originals = ["".join(side.pieces) for side in sides]
        draw = self._generator(index)
        mode = self.config.pair_mode
        samples = []
        for iteration in range(self.config.n_iter):
            # Everything is drawn in every mode, so that the mode changes no decision inside a side.
            drawn_mode = _CYCLE[int(draw() * len(_CYCLE))]
            texts = [self._sample(side, draw)[0] for side in sides]
            if mode == "cycle":
                now = _CYCLE[(index + iteration) % len(_CYCLE)]
            else:
                now = drawn_mode if mode == "draw" else mode
            samples.append(
                (
                    texts[0] if now != "second" else originals[0],
                    texts[1] if now != "first" else originals[1],
                )
            )
        return samples

    def _generator(self, index: int) -> Callable[[], float]:
        if index < 0:
            raise ValueError(f"Augmenter: index must be the row's non-negative number, got {index}")
        # Python promises the same random() for the same integer seed in every version, and promises it for
        # nothing else.
        return Random((self.config.seed << 64) | index).random

    def _prepare(self, sentence: str) -> _Sentence:
        words, glue = split_words(sentence)
        tables: list[_Unigrams | None] = []
        if words and self.config.needs_tags:
            assert self.tagger is not None  # checked by the constructor
            tables = [self._unigrams.get(tag) for tag in _tags(self.tagger, words)]
        pieces = [before + word for before, word in zip(glue, words, strict=True)]
        return _Sentence(pieces, glue, [before + self.config.mask_token for before in glue], tables)

    def _sample(self, sentence: _Sentence, draw: Callable[[], float]) -> tuple[str, bool]:
        """One sample, and whether each of its words was masked or replaced. Always words + 3 draws."""
        config = self.config
        p_mask, p_edit = config.p_mask, config.p_mask + config.p_pos
        pieces = sentence.pieces.copy()
        replaced = 0
        for i in range(len(pieces)):
            x = draw()
            if x >= p_edit:
                continue
            if x < p_mask:
                if config.masking:
                    pieces[i] = sentence.masked[i]
                    replaced += 1
            elif config.pos_replacement:
                unigrams = sentence.unigrams[i]
                if unigrams is not None:
                    # Given that x lies in [p_mask, p_edit), its place in there is uniform: no further draw.
                    total = unigrams.cumulative[-1]
                    share = (x - p_mask) / config.p_pos
                    rank = min(int(share * total), total - 1)  # rounding may take the share to 1
                    word = unigrams.words[bisect_right(unigrams.cumulative, rank)]
                    pieces[i] = sentence.glue[i] + word
                    replaced += 1
        all_replaced = replaced == len(pieces)
        chosen, size, start = draw(), draw(), draw()
        if config.ngram and chosen < config.p_ng:
            n = min(1 + int(size * config.max_ngram), len(pieces))
            first = int(start * (len(pieces) - n + 1))
            pieces = pieces[first : first + n]
        return "".join(pieces).lstrip(), all_replaced


_CYCLE: tuple[PairMode, ...] = ("first", "second", "both")


def _tags(tagger: Tagger, words: list[str]) -> list[str]:
    tags = tagger(words) if words else []
    if len(tags) != len(words):
        raise ValueError(
            f"Augmenter: tagger must return one tag per word, got {len(tags)} tags for {len(words)} words: {words}"
        )
    return tags


@dataclass
class AugmentCounts:
    """What happened to the samples: drawn = all_replaced + copies + duplicates + written."""

    rows: int = 0
    """rows of the input"""
    empty: int = 0
    """of these, rows with a text without words, which give no samples"""
    drawn: int = 0
    """samples drawn: n_iter for each row that is not empty"""
    all_replaced: int = 0
    """samples without an original word, dropped (see `AugmentConfig.drop_all_replaced`)"""
    copies: int = 0
    """samples equal to an original anywhere in the input, dropped"""
    duplicates: int = 0
    """samples equal to an earlier sample, dropped"""
    written: int = 0
    """samples kept"""


# Rows given to a worker at a time. No result depends on it.
_CHUNK_ROWS = 256

_Sample = tuple[str, ...]
_Row = tuple[str, ...]


@dataclass
class _Filter:
    """Removes copies of originals and duplicates over the whole data set.

    Keeps 16-byte digests, not texts: at a hundred million samples the chance of one wrong match is below
    1e-22.
    """

    counts: AugmentCounts
    originals: set[bytes] = field(default_factory=set)
    seen: set[bytes] = field(default_factory=set)

    @staticmethod
    def digest(texts: _Sample) -> bytes:
        # No text holds a tab: white space was collapsed.
        return blake2b("\t".join(texts).encode(), digest_size=16).digest()

    def add_original(self, row: _Row) -> None:
        texts = tuple(" ".join(text.split()) for text in row)  # the form that samples have
        self.counts.rows += 1
        self.counts.empty += not all(texts)
        self.originals.add(self.digest(texts))

    def keep(self, samples: list[_Sample]) -> list[_Sample]:
        kept = []
        for sample in samples:
            digest = self.digest(sample)
            if digest in self.originals:
                self.counts.copies += 1
            elif digest in self.seen:
                self.counts.duplicates += 1
            else:
                self.seen.add(digest)
                kept.append(sample)
        self.counts.written += len(kept)
        return kept


def _augment_chunk(augmenter: Augmenter, first_index: int, rows: list[_Row]) -> list[list[_Sample]]:
    """Samples of each row of a chunk, before any removal."""
    if rows and len(rows[0]) == 2:
        return [
            list[_Sample](augmenter.augment_pair(row[0], row[1], index)) for index, row in enumerate(rows, first_index)
        ]
    return [[(text,) for text in augmenter.augment(row[0], index)] for index, row in enumerate(rows, first_index)]


_worker_augmenter: Augmenter


def _start_worker(augmenter: Augmenter) -> None:
    global _worker_augmenter
    _worker_augmenter = augmenter


def _work(first_index: int, rows: list[_Row]) -> list[list[_Sample]]:
    return _augment_chunk(_worker_augmenter, first_index, rows)


def _chunks(augmenter: Augmenter, rows: list[_Row], num_proc: int) -> Iterator[tuple[int, list[list[_Sample]]]]:
    """`(index of the first row, samples per row)` of consecutive chunks, in order."""
    starts = range(0, len(rows), _CHUNK_ROWS)
    if num_proc == 1:
        for start in starts:
            yield start, _augment_chunk(augmenter, start, rows[start : start + _CHUNK_ROWS])
        return
    # Forked workers inherit the augmenter, so a tagger need not be picklable. Elsewhere than on Linux fork is
    # absent or unsafe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(
        min(num_proc, max(len(starts), 1)), context, initializer=_start_worker, initargs=(augmenter,)
    )
    pending: deque[tuple[int, Future[list[list[_Sample]]]]] = deque()
    try:
        for start in starts:
            pending.append((start, pool.submit(_work, start, rows[start : start + _CHUNK_ROWS])))
            if len(pending) >= 4 * num_proc:  # bounds what waits in memory
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _augment_rows(
    rows: list[_Row],
    config: AugmentConfig,
    tagger: Tagger | None,
    num_proc: int,
    progress: bool,
    counts: AugmentCounts,
) -> Iterator[tuple[list[int], list[_Sample]]]:
    """New samples chunk by chunk with the rows they come from; fills in `counts` on the way."""
    augmenter = Augmenter.from_corpus((text for row in rows for text in row), config, tagger, progress=progress)
    distinct = _Filter(counts)
    for row in rows:
        distinct.add_original(row)
    counts.drawn = (counts.rows - counts.empty) * config.n_iter
    with _bar("augment", "row", progress, total=len(rows)) as bar:
        for first_index, chunk in _chunks(augmenter, rows, num_proc):
            sources: list[int] = []
            kept: list[_Sample] = []
            for index, samples in enumerate(chunk, first_index):
                new = distinct.keep(samples)
                kept += new
                sources += [index] * len(new)
            bar.update(len(chunk))
            yield sources, kept
    counts.all_replaced = counts.drawn - counts.copies - counts.duplicates - counts.written


def _bar(what: str, unit: str, show: bool, *, items: Iterable[str] | None = None, total: int | None = None) -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc=what, unit=unit, disable=not show)


def _check_columns(where: str, text_columns: Sequence[str], present: Sequence[str]) -> list[str]:
    """The text columns as a list, or an error that says what is wrong with them."""
    if isinstance(text_columns, str) or len(text_columns) not in (1, 2) or len(set(text_columns)) != len(text_columns):
        raise ValueError(
            f"{where}: text_columns must be a list of one column name, or of two different ones for pairs, "
            f"got {text_columns!r}"
        )
    for column in text_columns:
        if column not in present:
            raise ValueError(
                f"{where}: text_columns names {column!r}, which is not a column; the columns are: {', '.join(present)}"
            )
        if column == SOURCE_COLUMN:
            raise ValueError(
                f"{where}: text_columns must not name {SOURCE_COLUMN!r}, the result's column of row indices; "
                "rename the column"
            )
    return list(text_columns)


def _check_rows(where: str, columns: list[str], values: Sequence[Sequence[Any]]) -> list[_Row]:
    """Rows of texts from columns of values."""
    for column, texts in zip(columns, values, strict=True):
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"{where}: column {column!r} must hold text, got {text!r} in row {index}; remove or fill such rows"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:  # a lone surrogate, which json can spell and no file can hold
                raise ValueError(
                    f"{where}: column {column!r} must hold Unicode text, got {text!r} in row {index} "
                    f"({error.reason}); remove or mend such rows"
                ) from error
    rows: list[_Row] = list(zip(*values, strict=True))
    if not rows:
        raise ValueError(f"{where}: there are no rows to augment")
    return rows


def _check_num_proc(where: str, num_proc: int) -> None:
    if num_proc < 1:
        raise ValueError(f"{where}: num_proc must be at least 1, got {num_proc}")


def augment_dataset(
    dataset: datasets.Dataset,
    text_columns: Sequence[str],
    config: AugmentConfig,
    *,
    tagger: Tagger | None = None,
    num_proc: int = 1,
    progress: bool = True,
) -> datasets.Dataset:
    """The synthetic rows of a training split, ready for the teacher: no originals, no duplicates, no labels.

    Args:
        dataset: the training split; the unigram distributions are counted in it.
        text_columns: one column, or two for pairs.
        config: the procedure's parameters.
        tagger: words -> tags; `textblob_tagger()` if None and the replacement rule is on. On systems without
            fork, several workers need a tagger that can be pickled.
        num_proc: worker processes. The result does not depend on it.
        progress: show progress bars on stderr.

    Returns:
        A dataset with the text columns and `source` (int64), the row index of the original, ordered by it.

    Raises:
        ValueError: for columns that are missing or do not hold text, a dataset without rows, or a tagger that
            does not give one tag per word.
        TypeError: if `dataset` is not a `datasets.Dataset`.
        ImportError: if the default tagger is needed and textblob is missing.
    """
    import datasets
    import pyarrow as pa

    where = "augment_dataset"
    if not isinstance(dataset, datasets.Dataset):
        raise TypeError(f"{where}: dataset must be one split, a datasets.Dataset, got {type(dataset).__name__}")
    _check_num_proc(where, num_proc)
    columns = _check_columns(where, text_columns, dataset.column_names)
    plain = dataset.with_format(None)
    rows = _check_rows(where, columns, [plain[column][:] for column in columns])

    schema = pa.schema([*((column, pa.string()) for column in columns), (SOURCE_COLUMN, pa.int64())])
    batches = []
    for sources, samples in _augment_rows(rows, config, tagger, num_proc, progress, AugmentCounts()):
        texts = [pa.array([sample[side] for sample in samples], pa.string()) for side in range(len(columns))]
        batches.append(pa.record_batch([*texts, pa.array(sources, pa.int64())], schema=schema))
    return datasets.Dataset(pa.Table.from_batches(batches, schema=schema))


def augment_file(
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    text_columns: Sequence[str],
    config: AugmentConfig,
    *,
    tagger: Tagger | None = None,
    num_proc: int = 1,
    progress: bool = True,
    overwrite: bool = False,
) -> AugmentCounts:
    """Reads a training table, writes its synthetic rows: the text columns and `source`, the row index of the
    original.

    Formats by suffix, UTF-8: `.tsv` (tab separated, header, no quoting), `.csv` (header, quoted where
    needed), `.jsonl` (an object a line), `.json` (a list of objects). The output appears under its name only
    when it is complete.

    Args:
        input: the training split.
        output: file to write; its suffix says the format.
        text_columns: one column, or two for pairs.
        config: the procedure's parameters.
        tagger: as in `augment_dataset`.
        num_proc: worker processes. The result does not depend on it.
        progress: show progress bars on stderr.
        overwrite: replace an output file that exists.

    Returns:
        How many rows were read and what became of the samples.

    Raises:
        ValueError: for an unknown suffix, a file that is not in the format its suffix says, and as
            `augment_dataset`.
        FileNotFoundError: if there is no input.
        FileExistsError: if the output exists and `overwrite` is not set.
        ImportError: if the default tagger is needed and textblob is missing.
    """
    source, target = Path(input), Path(output)
    for name, path in (("input", source), ("output", target)):
        if path.suffix.lower() not in READERS:
            raise ValueError(f"augment_file: {name} must end in one of {', '.join(READERS)}, got {path}")
    _check_num_proc("augment_file", num_proc)
    if not source.is_file():
        raise FileNotFoundError(f"augment_file: input: no such file: {source}")
    if target.exists():
        if target.samefile(source):
            raise ValueError(f"augment_file: output must be another file than input, got {target} for both")
        if not overwrite:
            raise FileExistsError(
                f"augment_file: output exists already: {target}; "
                "choose another name or pass overwrite=True (--overwrite)"
            )
    try:
        present, table = READERS[source.suffix.lower()](source)
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not UTF-8 text ({error}); convert the file first") from error
    columns = _check_columns(str(source), text_columns, present)
    rows = _check_rows(str(source), columns, [table[column] for column in columns])

    counts = AugmentCounts()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(target) as file:
        write = _WRITERS[target.suffix.lower()]
        write(file, [*columns, SOURCE_COLUMN], _records(rows, config, tagger, num_proc, progress, counts))
    return counts


def _records(rows: list[_Row], *arguments: Any) -> Iterator[list[Any]]:
    for sources, samples in _augment_rows(rows, *arguments):
        for index, sample in zip(sources, samples, strict=True):
            yield [*sample, index]


@contextmanager
def _replacing(target: Path) -> Iterator[IO[str]]:
    """A text file that takes the target's name when the block ends without an exception, and else is
    removed."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


_Table = tuple[list[str], dict[str, list[Any]]]


def _to_table(path: Path, records: Iterable[tuple[int, list[str]]]) -> _Table:
    """Header and columns from numbered records, of which the first is the header. Blank lines are left
    out."""
    numbered = ((line, record) for line, record in records if record)
    _, header = next(numbered, (0, []))
    if not header:
        raise ValueError(f"{path}: empty file; expected a header row with the names of the columns")
    if len(set(header)) != len(header):
        raise ValueError(f"{path}: the header names a column twice: {', '.join(header)}")
    table: dict[str, list[Any]] = {name: [] for name in header}
    for line, record in numbered:
        if len(record) != len(header):
            raise ValueError(
                f"{path}, line {line}: expected {len(header)} fields ({', '.join(header)}), got {len(record)}"
            )
        for name, value in zip(header, record, strict=True):
            table[name].append(value)
    return header, table


def _read_tsv(path: Path) -> _Table:
    # Not the csv module: it ends a row at a lone carriage return, and limits the length of a field.
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        lines = ((number, line.rstrip("\r\n")) for number, line in enumerate(file, 1))
        return _to_table(path, ((number, line.split("\t") if line else []) for number, line in lines))


def _read_csv(path: Path) -> _Table:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            return _to_table(path, ((reader.line_num, record) for record in reader))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid csv: {error}") from error


def _read_jsonl(path: Path) -> _Table:
    objects = []
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    objects.append((f"line {number}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not valid json: {error}") from error
    return _objects_to_table(path, objects)


def _read_json(path: Path) -> _Table:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        hint = "; a file with one object a line must end in .jsonl" if error.msg == "Extra data" else ""
        raise ValueError(f"{path}: not valid json: {error}{hint}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: expected a list of objects, got {type(content).__name__}")
    return _objects_to_table(path, [(f"entry {number}", entry) for number, entry in enumerate(content)])


def _objects_to_table(path: Path, objects: list[tuple[str, Any]]) -> _Table:
    names: dict[str, None] = {}
    for place, entry in objects:
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, {place}: expected an object, got {type(entry).__name__}")
        names.update(dict.fromkeys(entry))
    # A key that an object lacks reads as null, and null is refused in a text column.
    return list(names), {name: [entry.get(name) for _, entry in objects] for name in names}


def _write_tsv(file: IO[str], header: list[str], records: Iterable[list[Any]]) -> None:
    file.write("\t".join(header) + "\n")
    for record in records:
        file.write("\t".join(map(str, record)) + "\n")


def _write_csv(file: IO[str], header: list[str], records: Iterable[list[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(records)


def _write_jsonl(file: IO[str], header: list[str], records: Iterable[list[Any]]) -> None:
    for record in records:
        file.write(json.dumps(dict(zip(header, record, strict=True)), ensure_ascii=False) + "\n")


def _write_json(file: IO[str], header: list[str], records: Iterable[list[Any]]) -> None:
    file.write("[")
    for number, record in enumerate(records):
        file.write(",\n" if number else "\n")
        file.write(json.dumps(dict(zip(header, record, strict=True)), ensure_ascii=False))
    file.write("\n]\n")


READERS: dict[str, Callable[[Path], _Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}
_WRITERS: dict[str, Callable[[IO[str], list[str], Iterable[list[Any]]], None]] = {
    ".tsv": _write_tsv,
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".json": _write_json,
}
