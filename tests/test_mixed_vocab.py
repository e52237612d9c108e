# SPDX-License-Identifier: Apache-2.0
"""Mixed-vocabulary rows: segmentation, masks, determinism, batches."""

from __future__ import annotations

import itertools
import pickle
import time
from typing import Any

import numpy as np
import pytest
import torch
from mixed_vocab_data import SENTENCES, student_tokenizer, teacher_tokenizer
from torch.utils.data import DataLoader
from transformers import BertTokenizer

from pydistill.data.corpus import Corpus
from pydistill.data.mixed_vocab import (
    IGNORED,
    NO_WORD,
    STUDENT,
    TEACHER,
    MixedVocabularyCollator,
    Mixing,
    Segmenter,
    Side,
    count_words,
    example,
)
from pydistill.data.vocabulary import VocabularyError, split_words, train_vocabulary


def segmenter(**options: Any) -> Segmenter:
    return Segmenter(teacher_tokenizer(), student_tokenizer(), **{"max_length": 64} | options)


def tokens(side: Side) -> list[str]:
    """The pieces that were there before masking, without [CLS] and [SEP]."""
    both = (teacher_tokenizer(), student_tokenizer())
    pairs = zip(side.pieces.tolist(), side.vocabulary.tolist(), strict=True)
    return [both[which].convert_ids_to_tokens(piece) for piece, which in pairs][1:-1]


def rows_of(cut: Segmenter, count: int, **options: Any) -> list[tuple[Side, Side]]:
    texts = itertools.islice(itertools.cycle(SENTENCES), count)
    return [cut(text, index=index, **options) for index, text in enumerate(texts)]


# ------------------------------------------------------------------------- segmentation


@pytest.mark.parametrize(("mixing", "vocabulary"), [(0.0, TEACHER), (1.0, STUDENT)])
def test_without_mixing_rows_are_those_of_one_tokenizer(mixing: float, vocabulary: int) -> None:
    cut = segmenter(mixing=mixing, masking=0)
    for text in [*SENTENCES, "", "Ünknown œuvre [MASK]\u7ef4\t\u00a0x\x07y  z"]:
        teacher, student = cut(text)
        assert tokens(teacher) == (teacher_tokenizer(), student_tokenizer())[vocabulary].tokenize(
            text, split_special_tokens=True
        )
        assert tokens(student) == student_tokenizer().tokenize(text, split_special_tokens=True)
        assert (teacher.vocabulary[1:-1] == vocabulary).all() and (student.vocabulary == STUDENT).all()
        for side, tokenizer in ((teacher, teacher_tokenizer()), (student, student_tokenizer())):
            # The ends of a row are the reading model's own.
            assert side.input_ids[[0, -1]].tolist() == [tokenizer.cls_token_id, tokenizer.sep_token_id]
            assert side.word_ids[[0, -1]].tolist() == [NO_WORD, NO_WORD]
        assert teacher.vocabulary[[0, -1]].tolist() == [TEACHER, TEACHER]


def test_each_word_is_cut_whole_by_one_vocabulary() -> None:
    both = (teacher_tokenizer(), student_tokenizer())
    shares = []
    for teacher, student in rows_of(segmenter(mixing=0.3), 400):
        text = SENTENCES[len(shares) % len(SENTENCES)]
        for number, word in enumerate(split_words(both[0].backend_tokenizer, text)):
            for side in (teacher, student):
                (places,) = np.nonzero(side.word_ids == number)
                (which,) = set(side.vocabulary[places].tolist())
                pieces = both[which].convert_ids_to_tokens(side.pieces[places].tolist())
                assert pieces == both[which].tokenize(word)
        shares.append(teacher.vocabulary[1:-1][np.diff(teacher.word_ids[:-1]) > 0].mean())
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)


def test_both_rows_hold_the_same_words_and_fit() -> None:
    long = " ".join(SENTENCES)
    for max_length in (3, 4, 9, 20, 64, 500):
        for index in range(20):
            teacher, student = segmenter(max_length=max_length)(long, index=index)
            assert max(len(teacher.input_ids), len(student.input_ids)) <= max_length
            words = [[word for word, _ in itertools.groupby(side.word_ids[1:-1])] for side in (teacher, student)]
            assert words[0] == words[1] == list(range(len(words[0])))
            assert max_length < 20 or words[0]
    # No word less than fits, be it the teacher's row or the student's that is full.
    teacher, student = segmenter(max_length=9)("the " * 20)
    assert len(teacher.input_ids) == len(student.input_ids) == 9
    teacher, student = segmenter(max_length=20, mixing=0)("the harbour " * 20)
    assert len(teacher.input_ids) < len(student.input_ids) == 20 - 1
    assert student_tokenizer().tokenize("the harbour") == ["the", "har", "##bo", "##ur"]


# ------------------------------------------------------------------------- masks


def test_whole_words_are_masked_independently_on_both_sides() -> None:
    both = np.zeros((2, 2))
    for teacher, student in rows_of(segmenter(masking=0.25), 3000):
        masked = []
        for side in (teacher, student):
            hidden = side.labels != IGNORED
            assert not hidden[side.word_ids == NO_WORD].any()
            by_word = [set(hidden[side.word_ids == word].tolist()) for word in range(side.word_ids.max() + 1)]
            assert all(len(found) == 1 for found in by_word)
            masked.append([int(found.pop()) for found in by_word])
        for pair in zip(*masked, strict=True):
            both[pair] += 1
    share = both / both.sum()
    assert share[1].sum() == pytest.approx(0.25, abs=0.01) and share[:, 1].sum() == pytest.approx(0.25, abs=0.01)
    assert share[1, 1] == pytest.approx(0.25**2, abs=0.005)  # independent


def test_masked_pieces_become_masks_other_pieces_or_stay() -> None:
    both = (teacher_tokenizer(), student_tokenizer())
    counts = np.zeros((2, 3))
    replaced: list[set[int]] = [set(), set()]
    for teacher, student in rows_of(segmenter(masking=0.5), 3000):
        assert (teacher.input_ids == teacher.pieces)[teacher.labels == IGNORED].all()
        for side in (teacher, student):
            for which, tokenizer in enumerate(both):
                places = (side.labels != IGNORED) & (side.vocabulary == which)
                ids, labels = side.input_ids[places], side.labels[places]
                # Each vocabulary has a mask of its own.
                mask, same = ids == tokenizer.mask_token_id, ids == labels
                counts[which] += [mask.sum(), (~mask & ~same).sum(), same.sum()]
                replaced[which] |= set(ids[~mask & ~same].tolist())
    shares = counts / counts.sum(1, keepdims=True)
    assert shares == pytest.approx(np.array([[0.8, 0.1, 0.1]] * 2), abs=0.01)
    for found, tokenizer in zip(replaced, both, strict=True):
        # Any piece of the same vocabulary but the special ones.
        assert not found & set(tokenizer.all_special_ids) and max(found) < len(tokenizer)
        assert len(found) > 0.9 * (len(tokenizer) - 5)


def test_ids_are_within_the_vocabulary_that_cut_the_word() -> None:
    for teacher, student in rows_of(segmenter(), 300):
        assert student.input_ids.max() < 90 and student.labels.max() < 90
        of_student = teacher.vocabulary == STUDENT
        assert teacher.input_ids[of_student].max(initial=0) < 90


# ------------------------------------------------------------------------- draws


def same(one: tuple[Side, Side], other: tuple[Side, Side]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(itertools.chain(*one), itertools.chain(*other), strict=True))


def test_draws_follow_seed_pass_and_text_alone() -> None:
    text = " ".join(SENTENCES)
    cut = segmenter()
    first = cut(text, index=7, number=2)
    for other in SENTENCES:
        cut(other)
    assert same(first, cut(text, index=7, number=2, position=99))
    assert same(first, pickle.loads(pickle.dumps(segmenter()))(text, index=7, number=2))
    others = [cut(text, index=8, number=2), cut(text, index=7, number=1), segmenter(seed=1)(text, index=7, number=2)]
    assert not any(same(first, other) for other in others)
    # How the teacher's row is mixed changes nothing about the student's.
    student = first[1]
    for mixing in (0.0, 1.0):
        assert same((student, student), (segmenter(mixing=mixing)(text, index=7, number=2)[1],) * 2)


def test_what_is_remembered_of_words_does_not_change_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydistill.data.mixed_vocab._REMEMBERED", 3)
    forgetful = segmenter()
    assert all(same(a, b) for a, b in zip(rows_of(forgetful, 50), rows_of(segmenter(), 50), strict=True))
    assert len(forgetful._remembered) <= 3


def test_a_ramp_is_linear_in_rows() -> None:
    ramp = Mixing(0.0, 0.8, rows=100)
    assert [ramp.at(position) for position in (0, 25, 100, 10_000)] == pytest.approx([0, 0.2, 0.8, 0.8])
    assert Mixing(0.8, 0.2, rows=10).at(5) == pytest.approx(0.5) and Mixing().at(10**9) == 0.5
    cut = segmenter(mixing=Mixing(0, 1, rows=1000), masking=0)
    shares = []
    for position in (0, 500, 1000):
        rows = rows_of(cut, 200, position=position)
        shares.append(np.mean([teacher.vocabulary[1:-1].mean() for teacher, _ in rows]))
    assert shares[0] == 0 and 0.4 < shares[1] < 0.75 and shares[2] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(workers: int) -> None:
    rows = [{"text": text, "index": index, "pass": 0} for index, text in enumerate(SENTENCES * 3)]

    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        loader = DataLoader(
            rows,  # type: ignore[arg-type]  # any sequence is a data set
            batch_size=5,
            num_workers=workers,
            collate_fn=MixedVocabularyCollator(segmenter()),
        )
        return list(loader)

    expected = batches(0)
    for batch, other in zip(expected, batches(workers), strict=True):
        assert batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


def test_a_corpus_of_texts_numbers_them_for_the_draws() -> None:
    def stream(**options: Any) -> Corpus:
        return Corpus(SENTENCES, student_tokenizer(), max_length=9, packing="texts", shuffle_buffer=3, **options)

    rows = list(itertools.islice(stream(), 20))
    assert [row["position"] for row in rows] == list(range(20))
    assert [row["pass"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 4
    assert all(row["text"] == SENTENCES[row["index"]] for row in rows)
    assert sorted(row["index"] for row in rows[:8]) == list(range(8))
    # What a resumed trainer throws away costs nothing; what follows is the same.
    again = list(itertools.islice(stream().seen(11), 20))
    assert again[11:] == rows[11:] and all(row["text"] == "" for row in again[:11])
    held = list(stream(every=4, held_out=True, endless=False))
    assert sorted(row["index"] for row in held) == [3, 7]
    collate = MixedVocabularyCollator(segmenter())
    full, skipped = collate(rows[:4]), collate(again[:4])
    assert full.keys() == skipped.keys() and skipped["input_ids"].shape == (4, 2)


# ------------------------------------------------------------------------- batches


def test_batches_are_padded_rows() -> None:
    cut = segmenter()
    rows = [{"text": text, "index": index} for index, text in enumerate(["", *SENTENCES[:3]])]
    batch = MixedVocabularyCollator(cut, pad_to_multiple_of=8)(rows)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED, "word_ids": NO_WORD, "vocabulary": TEACHER}
    names = {"input_ids", "attention_mask", "labels", "word_ids"}
    assert batch.keys() == names | {f"teacher_{name}" for name in (*names, "vocabulary")}
    for number, row in enumerate(rows):
        for side, prefix in zip(cut(row["text"], index=row["index"]), ("teacher_", ""), strict=True):
            expected = side._asdict() | {"attention_mask": np.ones(len(side.input_ids))}
            for name, fill in fills.items():
                if prefix + name not in batch:
                    continue
                line = batch[prefix + name][number]
                assert line.dtype == torch.int64 and len(line) % 8 == 0
                assert line[: len(side.input_ids)].tolist() == expected[name].tolist()
                assert set(line[len(side.input_ids) :].tolist()) <= {fill}


@pytest.mark.parametrize("pairs", [False, True])
def test_words_of_a_batch_are_those_that_have_room_in_its_rows(pairs: bool) -> None:
    batch = MixedVocabularyCollator(segmenter(max_length=16), next_sentence=pairs)(
        [{"text": text, "index": index} for index, text in enumerate([*SENTENCES, "", "the the"])]
    )
    for prefix in ("", "teacher_"):
        rows = batch[f"{prefix}word_ids"].tolist()
        assert count_words(batch) == sum(len(set(row) - {NO_WORD}) for row in rows)


def test_segmentation_is_fast() -> None:
    texts = [" ".join(SENTENCES[shift:] + SENTENCES[:shift]) for shift in range(8)] * 12
    collate = MixedVocabularyCollator(segmenter(max_length=512))
    words = sum(len(collate.segmenter.words(text)) for text in texts)

    def once() -> float:
        begin = time.process_time()
        for start in range(0, len(texts), 32):
            collate([{"text": text, "index": index} for index, text in enumerate(texts[start : start + 32])])
        return time.process_time() - begin

    # The best of several: the machine does other things too. One core manages several times as much.
    assert words / min(once() for _ in range(5)) > 100_000


# ------------------------------------------------------------------------- pictures, refusals


def test_the_example_shows_both_vocabularies_and_masks_of_both_sides() -> None:
    shown = example(segmenter(), SENTENCES[0])
    assert shown == example(segmenter(), SENTENCES[0]) and shown["sentence"] == SENTENCES[0]
    assert {piece["vocabulary"] for piece in shown["teacher"]} == {"teacher", "student"}
    assert {piece["vocabulary"] for piece in shown["student"]} == {"student"}
    for side in ("teacher", "student"):
        assert {piece["masked"] for piece in shown[side]} == {True, False}
        assert shown[side][0] == {"piece": "i", "word": 0} | shown[side][0]
    assert "[MASK]" not in {piece["piece"] for piece in shown["teacher"]}
    # Where there is nothing to find, it gives up.
    assert [piece["piece"] for piece in example(segmenter(masking=0), "machine")["student"]] == ["machine"]


def test_what_is_refused() -> None:
    teacher, student = teacher_tokenizer(), student_tokenizer()
    cased = BertTokenizer(vocab=teacher.get_vocab(), do_lower_case=False)
    with pytest.raises(VocabularyError, match="must have the same normaliser, .*lowercase=True.*lowercase=False"):
        Segmenter(cased, student)
    other = BertTokenizer(vocab=teacher.get_vocab() | {"<mask>": 500}, mask_token="<mask>")
    with pytest.raises(VocabularyError, match=r"same special tokens, .*\[MASK\] and the teacher.s .*<mask>; make"):
        Segmenter(other, student)
    for options, rule in (
        ({"max_length": 2}, r"max_length must hold \[CLS\], a piece and \[SEP\], got 2"),
        ({"masking": 1.5}, "masking must be a probability from 0 to 1, got 1.5"),
        ({"mixing": -0.1}, "start must be a probability from 0 to 1, got -0.1"),
    ):
        with pytest.raises(VocabularyError, match=rule):
            segmenter(**options)
    for given in ((0.5, 1.0), (0.5, None, 10), (0.5, 1.0, -1)):
        with pytest.raises(VocabularyError, match="a ramp needs both end and rows"):
            Mixing(*given)
    assert train_vocabulary(SENTENCES, teacher, size=90, min_frequency=1).get_vocab() == student.get_vocab()


# ------------------------------------------------------------------------- pairs


def test_a_pair_is_two_texts_with_one_count_of_words() -> None:
    cut = segmenter(masking=0.3, mixing=0.5)
    first, second = "The winter was long", "and the keeper was content"
    for side in cut(first, second, index=3):
        ends = np.flatnonzero(side.word_ids == NO_WORD)
        assert len(ends) == 3 and ends[0] == 0 and ends[-1] == len(side.input_ids) - 1
        assert np.array_equal(side.token_type_ids, (np.arange(len(side.input_ids)) > ends[1]).astype(int))
        words = side.word_ids[side.word_ids != NO_WORD]
        assert sorted(set(words.tolist())) == list(range(9)) and (np.diff(words) >= 0).all()
        assert set(side.word_ids[: ends[1]].tolist()) == {NO_WORD, 0, 1, 2, 3}
        assert (side.labels[ends] == IGNORED).all()
        # A word is masked whole or not at all.
        for word in range(9):
            assert len(set((side.labels[side.word_ids == word] != IGNORED).tolist())) == 1
    single = cut(f"{first} {second}", index=3)
    for pair, alone in zip(cut(first, second, index=3), single, strict=True):
        inside, within = pair.word_ids != NO_WORD, alone.word_ids != NO_WORD
        # The same draws as for one text: whatever is masked, and which vocabulary cuts a word.
        for name in ("pieces", "labels", "vocabulary", "word_ids", "input_ids"):
            assert np.array_equal(getattr(pair, name)[inside], getattr(alone, name)[within]), name


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        ((3, 3), (3, 3)),
        ((20, 3), (10, 3)),
        ((3, 20), (3, 10)),
        ((20, 20), (6, 7)),
        ((0, 20), (0, 13)),
        ((20, 0), (13, 0)),
    ],
)
def test_what_is_too_long_leaves_room_for_both(words: tuple[int, int], kept: tuple[int, int]) -> None:
    # One piece each, in either vocabulary: 16 - 3 of them have room.
    for side in segmenter(max_length=16)(*(" ".join(["the"] * count) for count in words)):
        inside = side.word_ids != NO_WORD
        first = side.token_type_ids == 0
        assert (int((inside & first).sum()), int((inside & ~first).sum())) == kept
        assert len(side.input_ids) == sum(kept) + 3


def test_half_of_the_pairs_are_of_two_texts() -> None:
    texts = [f"the {' '.join(['machine'] * number)} and {' '.join(['keeper'] * number)}" for number in range(1, 41)]
    rows = [{"text": text, "index": index} for index, text in enumerate(texts)] + [{"text": "winter", "index": 40}]
    cut = segmenter(max_length=128, masking=0.0)
    batch = MixedVocabularyCollator(cut, next_sentence=True)(rows)
    kinds = batch["next_sentence"].tolist()
    assert set(kinds[:-1]) == {0, 1} and 10 < sum(kinds[:-1]) < 30 and kinds[-1] == IGNORED
    halves = [text.split(" ") for text in texts]
    for place, kind in enumerate(kinds[:-2]):
        own, other = halves[place], halves[place + 1]
        second = (other if kind else own)[len(other if kind else own) // 2 :]
        first = own[: len(own) // 2]
        expected = cut(" ".join(first), " ".join(second), index=place)[STUDENT]
        length = len(expected.input_ids)
        assert np.array_equal(batch["input_ids"][place, :length], expected.input_ids)
        assert np.array_equal(batch["token_type_ids"][place, :length], expected.token_type_ids)
        assert not batch["token_type_ids"][place, length:].any()
    assert batch["teacher_token_type_ids"].shape == batch["teacher_input_ids"].shape
    # The draw is the text's own, another one in every pass.
    again = MixedVocabularyCollator(cut, next_sentence=True)([row | {"pass": 1} for row in rows])["next_sentence"]
    assert again.tolist() != kinds
    # Nothing to exchange with.
    assert MixedVocabularyCollator(cut, next_sentence=True)(rows[:1])["next_sentence"].tolist() == [0]
