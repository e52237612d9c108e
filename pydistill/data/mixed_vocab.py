# SPDX-License-Identifier: Apache-2.0
"""Mixed-vocabulary rows of Zhao et al. 2019 (arXiv 1909.11687v1, section 3.1): a text as teacher and student read it.

The student sees its own vocabulary alone. In the teacher's row each word is cut by one vocabulary or the other, at
random. Whole words are masked, on either side by its own draw. Whatever is drawn for a text depends on ``(seed, pass,
index of the text)`` alone, so that rows are the same in any order, in any number of workers and after a resume.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pydistill.data.vocabulary import SPECIAL_TOKENS, VocabularyError, check_wordpiece, split_words

IGNORED = -100  # label of a piece that is not to be predicted
NO_WORD = -1  # word id of special tokens and padding
TEACHER, STUDENT = 0, 1  # which vocabulary a piece of the teacher's row is of

# Of the masked pieces (BERT, arXiv 1810.04805, section 3.1): 80 % become [MASK], 10 % another piece, 10 % stay.
_MASKED, _REPLACED = 0.8, 0.9
# Chunks of text between blanks whose pieces are remembered; a corpus repeats few of them very often.
_REMEMBERED = 1 << 18

# The pieces of one word: the teacher's, the student's.
Word = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Mixing:
    """The probability that a word of the teacher's row is cut by the student's vocabulary.

    Args:
        start: at the first row.
        end: at row ``rows`` and after it; None: as at the start. In between it is linear.
        rows: texts, counted over all passes (steps times rows per step).
    """

    start: float = 0.5
    end: float | None = None
    rows: int = 0

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if value is not None and not 0 <= value <= 1:
                raise VocabularyError(f"mixing: {name} must be a probability from 0 to 1, got {value}")
        if (self.end is None) != (self.rows == 0) or self.rows < 0:
            raise VocabularyError(f"mixing: a ramp needs both end and rows, got end {self.end} and rows {self.rows}")

    def at(self, position: int) -> float:
        """Return the probability for the row that ``position`` others came before."""
        if self.end is None:
            return self.start
        return self.start + (self.end - self.start) * min(1.0, position / self.rows)


class Side(NamedTuple):
    """One text as one model reads it: arrays ``[N]``, special tokens included.

    Attributes:
        input_ids: each within the vocabulary that cut its word.
        labels: of a masked piece, the id that was there; `IGNORED` elsewhere.
        word_ids: which word of the text a piece belongs to, the same number on both sides; `NO_WORD` for [CLS] and
            [SEP].
        vocabulary: `TEACHER` or `STUDENT`, whose ids these are. [CLS] and [SEP] are the reading model's own.
        token_type_ids: 1 in the second text of a pair, 0 elsewhere.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    word_ids: np.ndarray
    vocabulary: np.ndarray
    token_type_ids: np.ndarray

    @property
    def pieces(self) -> np.ndarray:
        """The ids before anything was masked, ``[N]``."""
        return np.where(self.labels == IGNORED, self.input_ids, self.labels)


class Segmenter:
    """Cuts texts into the rows of teacher and student, and masks whole words of each.

    Args:
        teacher_tokenizer, student_tokenizer: of BERT's kind, with the same special tokens, normalisation and
            idea of a word; see `pydistill.data.vocabulary`.
        max_length: longest row, special tokens included. A text is cut after the last word of which both rows hold
            every piece, so that both have the same words.
        mixing: how often the student's vocabulary cuts a word of the teacher's row; a number is a constant `Mixing`.
        masking: probability that a word is masked.
        seed: of all draws.

    Raises:
        VocabularyError: tokenizers that do not fit together, or a number out of its range.
    """

    def __init__(
        self,
        teacher_tokenizer: PreTrainedTokenizerBase,
        student_tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 128,
        mixing: Mixing | float = 0.5,
        masking: float = 0.15,
        seed: int = 0,
    ) -> None:
        if max_length < 3:
            raise VocabularyError(f"mixed_vocab: max_length must hold [CLS], a piece and [SEP], got {max_length}")
        if not 0 <= masking <= 1:
            raise VocabularyError(f"mixed_vocab: masking must be a probability from 0 to 1, got {masking}")
        teacher = check_wordpiece("teacher", teacher_tokenizer)
        student = check_wordpiece("student", student_tokenizer)
        for what, ours, theirs in (
            ("normaliser", str(student.normalizer), str(teacher.normalizer)),
            ("special tokens", _special(student_tokenizer), _special(teacher_tokenizer)),
        ):
            if ours != theirs:
                raise VocabularyError(
                    f"mixed_vocab: both tokenizers must have the same {what}, the student's are {ours} and the "
                    f"teacher's {theirs}; make the student's with pydistill vocab --teacher"
                )
        self.tokenizers = (teacher_tokenizer, student_tokenizer)
        self.max_length = max_length
        self.mixing = mixing if isinstance(mixing, Mixing) else Mixing(mixing)
        self.masking = masking
        self.seed = seed
        self._backend = teacher
        self._models = (teacher.model, student.model)
        self._remembered: dict[str, list[Word]] = {}
        # Indexed by TEACHER and STUDENT.
        self._cls, self._sep, self._mask = (
            np.array([getattr(tokenizer, f"{name}_token_id") for tokenizer in self.tokenizers])
            for name in ("cls", "sep", "mask")
        )
        self._ordinary = [
            np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids) for tokenizer in self.tokenizers
        ]

    def words(self, text: str) -> list[Word]:
        """Return the words of a text, each as the teacher's and as the student's pieces."""
        # A blank always ends a word, and nothing that the normaliser does reaches over one.
        remembered = self._remembered
        words: list[Word] = []
        for chunk in text.split(" "):
            found = remembered.get(chunk)
            if found is None:
                found = self._cut(chunk)
                if len(remembered) >= _REMEMBERED:
                    remembered.clear()
                remembered[chunk] = found
            words += found
        return words

    def _cut(self, chunk: str) -> list[Word]:
        teacher, student = self._models
        return [
            ([piece.id for piece in teacher.tokenize(word)], [piece.id for piece in student.tokenize(word)])
            for word in split_words(self._backend, chunk)
        ]

    def __call__(
        self, text: str, second: str | None = None, *, index: int = 0, number: int = 0, position: int = 0
    ) -> tuple[Side, Side]:
        """Return the teacher's and the student's row of a text, or of a pair: [CLS] text [SEP] second [SEP].

        Args:
            text: may be empty.
            second: of a pair. Of what is too long, the first text keeps half of the room, and what the second leaves.
            index: of the text in the corpus.
            number: of the pass over the corpus.
            position: rows before this one, which `Mixing` counts.
        """
        parts = [self.words(one)[: self.max_length - 2] for one in (text, second) if one is not None]
        words = [word for part in parts for word in part]
        generator = np.random.default_rng((self.seed, number, index))
        # Row by row: which vocabulary; the student's mask, the teacher's mask.
        draws = generator.random((3, len(words)))
        mixed = draws[0] < self.mixing.at(position)
        rows: list[list[list[int]]] = [
            [word[choice] for word, choice in zip(words, mixed.tolist(), strict=True)],
            [word[STUDENT] for word in words],
        ]
        lengths = np.array([[len(pieces) for pieces in row] for row in rows], dtype=np.int64)
        kept = self._fitting(lengths, [len(part) for part in parts])
        masked = draws[1:] < self.masking
        # The student's draws come first: they do not depend on how the teacher's row was mixed.
        of_student = np.ones(len(words), dtype=np.int64)
        student = self._side(STUDENT, rows[1], lengths[1], of_student, masked[0], kept, generator)
        teacher = self._side(TEACHER, rows[0], lengths[0], mixed.astype(int), masked[1], kept, generator)
        return teacher, student

    def _fitting(self, lengths: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """Return the numbers of the words that are kept of each text: those before the first that has no room."""
        room = self.max_length - 1 - len(counts)
        first = lengths[:, : counts[0]].cumsum(1).max(0)
        if len(counts) == 1:
            return [np.arange((first <= room).sum())]
        second = lengths[:, counts[0] :].cumsum(1).max(0)
        taken = second[-1] if len(second) else 0
        kept = int((first <= max(room // 2, room - taken)).sum())
        taken = first[kept - 1] if kept else 0
        return [np.arange(kept), counts[0] + np.arange((second <= room - taken).sum())]

    def _side(
        self,
        reader: int,
        words: Sequence[list[int]],
        lengths: np.ndarray,  # [W]
        vocabulary: np.ndarray,  # [W]
        masked: np.ndarray,  # [W]
        kept: Sequence[np.ndarray],  # numbers of words, of each text
        generator: np.random.Generator,
    ) -> Side:
        sizes = [int(lengths[part].sum()) for part in kept]
        count = 1 + sum(sizes) + len(sizes)
        of_word = np.full(count, NO_WORD)
        types = np.zeros(count, dtype=np.int64)
        ends = np.cumsum(np.array(sizes) + 1)  # where each [SEP] stands
        start = 1
        for number, (part, end) in enumerate(zip(kept, ends.tolist(), strict=True)):
            of_word[start:end] = np.repeat(part, lengths[part])
            types[start : end + 1] = number
            start = end + 1
        inside = of_word != NO_WORD
        numbers = np.concatenate(list(kept))
        ids = np.empty(count, dtype=np.int64)
        ids[0], ids[ends] = self._cls[reader], self._sep[reader]
        ids[inside] = np.fromiter(
            itertools.chain.from_iterable(words[number] for number in numbers.tolist()), np.int64, sum(sizes)
        )
        of_vocabulary = np.full(count, reader)
        of_vocabulary[inside] = vocabulary[of_word[inside]]
        labels = np.full(count, IGNORED)
        places = np.flatnonzero(inside)[masked[of_word[inside]]]
        labels[places] = ids[places]
        for which, ordinary in enumerate(self._ordinary):
            own = places[of_vocabulary[places] == which]
            fate, other = generator.random((2, len(own)))
            ids[own[fate < _MASKED]] = self._mask[which]
            replaced = (fate >= _MASKED) & (fate < _REPLACED)
            ids[own[replaced]] = ordinary[(other[replaced] * len(ordinary)).astype(int)]
        return Side(ids, labels, of_word, of_vocabulary, types)


def _special(tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(str(getattr(tokenizer, name)) for name in SPECIAL_TOKENS)


class MixedVocabularyCollator:
    """Texts -> the batch of `pydistill.students.mixed_vocab.DualTraining`.

    A row is what ``Corpus(packing="texts")`` yields: ``text``, ``index``, ``pass`` and ``position``; only the first is
    needed. The batch holds int64 tensors, padded on the right:

    - the student's ``input_ids``, ``attention_mask``, ``labels`` and ``word_ids``, ``[B, N]``;
    - the teacher's, under the same names with the prefix ``teacher_``, ``[B, M]``, and ``teacher_vocabulary``
      ``[B, M]``: 0 where ``teacher_input_ids`` and ``teacher_labels`` are ids of the teacher's vocabulary, 1 where they
      are the student's.

    ``labels`` are `IGNORED` and ``word_ids`` `NO_WORD` at padding; padding is of the teacher's vocabulary.

    With ``next_sentence`` a row is a pair, and what a pair is depends on the other texts of the batch: the two halves
    of a text, or, for one row in two, its first half and the second half of the row after it. The batch then has
    ``token_type_ids`` and ``teacher_token_type_ids``, and ``next_sentence`` ``[B]``: 0 for halves that belong together,
    1 for others, `IGNORED` for texts of a single word.
    """

    def __init__(self, segmenter: Segmenter, *, next_sentence: bool = False, pad_to_multiple_of: int = 1) -> None:
        self.segmenter = segmenter
        self.next_sentence = next_sentence
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        texts: list[tuple[str, ...]] = [(row["text"],) for row in rows]
        kinds: list[int] = []
        if self.next_sentence:
            texts, kinds = self._pairs(rows)
        pairs = [
            self.segmenter(*text, index=row.get("index", 0), number=row.get("pass", 0), position=row.get("position", 0))
            for text, row in zip(texts, rows, strict=True)
        ]
        batch: dict[str, Tensor] = {}
        for which, prefix in ((STUDENT, ""), (TEACHER, "teacher_")):
            sides = [pair[which] for pair in pairs]
            pad = int(self.segmenter.tokenizers[which].pad_token_id)
            batch[f"{prefix}input_ids"] = self._padded([side.input_ids for side in sides], pad)
            batch[f"{prefix}attention_mask"] = self._padded([np.ones_like(side.input_ids) for side in sides], 0)
            batch[f"{prefix}labels"] = self._padded([side.labels for side in sides], IGNORED)
            batch[f"{prefix}word_ids"] = self._padded([side.word_ids for side in sides], NO_WORD)
            if self.next_sentence:
                batch[f"{prefix}token_type_ids"] = self._padded([side.token_type_ids for side in sides], 0)
        batch["teacher_vocabulary"] = self._padded([teacher.vocabulary for teacher, _ in pairs], TEACHER)
        if self.next_sentence:
            batch["next_sentence"] = torch.tensor(kinds)
        return batch

    def _pairs(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, ...]], list[int]]:
        """Return two texts of each row, and whether the second is another row's."""
        halves: list[tuple[str, str]] = []
        for row in rows:
            chunks = row["text"].split(" ")
            half = len(chunks) // 2
            halves.append((" ".join(chunks[:half]), " ".join(chunks[half:])))
        texts: list[tuple[str, ...]] = []
        kinds: list[int] = []
        for place, (row, (first, second)) in enumerate(zip(rows, halves, strict=True)):
            draws = np.random.default_rng((self.segmenter.seed, row.get("pass", 0), row.get("index", 0), 1))
            other, beginning = halves[(place + 1) % len(rows)][1], first.strip()
            swapped = bool(draws.random() < 0.5) and other != second
            texts.append((first, other if swapped else second))
            kinds.append(int(swapped) if beginning else IGNORED)
        return texts, kinds

    def _padded(self, arrays: Sequence[np.ndarray], fill: int) -> Tensor:
        multiple = self.pad_to_multiple_of
        width = -(-max(map(len, arrays)) // multiple) * multiple
        out = np.full((len(arrays), width), fill, dtype=np.int64)
        for line, array in zip(out, arrays, strict=True):
            line[: len(array)] = array
        return torch.from_numpy(out)


def count_words(batch: Mapping[str, Tensor]) -> int:
    """Return how many words the rows of a `MixedVocabularyCollator`'s batch hold, the same on both sides."""
    ids = batch["word_ids"]
    # Every row begins with [CLS], which is no word.
    return int(((ids[:, 1:] != ids[:, :-1]) & (ids[:, 1:] != NO_WORD)).sum())


def example(segmenter: Segmenter, sentence: str) -> dict[str, Any]:
    """Return how one sentence is read, for a picture: plain lists, strings and numbers.

    It is the first draw that shows everything: words of both vocabularies in the teacher's row, and masked words on
    both sides. Where 200 draws have none (one word; a probability of 0), it is the last of them.

    Returns:
        ``sentence``; ``teacher`` and ``student``: the pieces of each row without [CLS] and [SEP], each with its
        ``piece``, ``word`` (a number), ``vocabulary`` (``"teacher"`` or ``"student"``) and ``masked``.
    """
    for draw in range(200):
        sides = segmenter(sentence, index=draw)
        mixed = sides[TEACHER].vocabulary[1:-1]
        if mixed.any() and not mixed.all() and all((side.labels != IGNORED).any() for side in sides):
            break
    return {"sentence": sentence} | {
        name: _shown(segmenter, side) for name, side in zip(("teacher", "student"), sides, strict=True)
    }


def _shown(segmenter: Segmenter, side: Side) -> list[dict[str, Any]]:
    return [
        {
            "piece": segmenter.tokenizers[vocabulary].convert_ids_to_tokens(piece),
            "word": word,
            "vocabulary": "student" if vocabulary == STUDENT else "teacher",
            "masked": label != IGNORED,
        }
        for piece, word, vocabulary, label in zip(
            side.pieces.tolist(), side.word_ids.tolist(), side.vocabulary.tolist(), side.labels.tolist(), strict=True
        )
        if word != NO_WORD
    ]
