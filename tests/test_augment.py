# SPDX-License-Identifier: Apache-2.0
"""Augmentation: probabilities, seeds, workers, ablations, pairs, removal of duplicates, files."""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from pydistill.data import augment as module
from pydistill.data.augment import (
    AugmentConfig,
    Augmenter,
    augment_dataset,
    augment_file,
    split_words,
    textblob_tagger,
)

# Words and tags of the statistical tests. No original word is in the unigram tables: a replacement shows.
WORDS = [f"w{i}" for i in range(10)]
SENTENCE = " ".join(WORDS)
UNIGRAMS = {"even": {"x1": 1, "x2": 2, "x7": 7}, "odd": {"y": 5}}


def parity(words: list[str]) -> list[str]:
    return ["even" if i % 2 == 0 else "odd" for i in range(len(words))]


def one_tag(words: list[str]) -> list[str]:
    return ["X"] * len(words)


def corpus(rows: int, seed: int = 0) -> list[str]:
    """Sentences of 0 to 14 words from a vocabulary of 400, some of them equal."""
    random = Random(seed)
    return [" ".join(f"v{random.randrange(400)}" for _ in range(random.randrange(15))) for _ in range(rows)]


def chi_square(observed: Sequence[int], probabilities: Sequence[float]) -> tuple[float, float]:
    """The statistic, and its bound at five standard deviations (Wilson and Hilferty's approximation)."""
    assert math.isclose(sum(probabilities), 1)
    total = sum(observed)
    value = sum((o - total * p) ** 2 / (total * p) for o, p in zip(observed, probabilities, strict=True))
    k = len(observed) - 1
    return value, k * (1 - 2 / (9 * k) + 5 * math.sqrt(2 / (9 * k))) ** 3


def assert_distribution(observed: Counter, expected: dict) -> None:
    assert set(observed) <= set(expected), f"impossible outcomes: {set(observed) - set(expected)}"
    assert set(observed) == set(expected), f"never seen: {set(expected) - set(observed)}"
    if len(expected) > 1:
        value, bound = chi_square([observed[key] for key in expected], list(expected.values()))
        assert value < bound, (value, bound, observed)


def test_defaults_are_the_papers():
    config = AugmentConfig()
    assert (config.n_iter, config.p_mask, config.p_pos, config.p_ng, config.max_ngram) == (
        20,
        0.1,
        0.1,
        0.25,
        5,
    )
    assert config.mask_token == "[MASK]" and config.pair_mode == "cycle"


@pytest.mark.parametrize("p_mask, p_pos", [(0.1, 0.1), (0.3, 0.05), (0.0, 0.5), (0.4, 0.0), (0.6, 0.4)])
def test_each_word_is_masked_replaced_or_kept_with_the_given_probabilities(p_mask, p_pos):
    config = AugmentConfig(n_iter=20_000, p_mask=p_mask, p_pos=p_pos, p_ng=0, drop_all_replaced=False, seed=1)
    samples = Augmenter(config, UNIGRAMS, parity).augment(SENTENCE, 0)
    assert len(samples) == config.n_iter
    split = [sample.split() for sample in samples]
    even = {"x1": p_pos * 0.1, "x2": p_pos * 0.2, "x7": p_pos * 0.7}  # unigram counts within the tag
    for i, word in enumerate(WORDS):
        replacements = even if i % 2 == 0 else {"y": p_pos}
        expected = {"[MASK]": p_mask, **replacements, word: 1 - p_mask - p_pos}
        observed = Counter(words[i] for words in split)
        assert_distribution(observed, {key: p for key, p in expected.items() if p > 1e-12})
    # Independent words: the number of masks in a sentence is binomial.
    masks = Counter(min(words.count("[MASK]"), 4) for words in split)
    binomial = [math.comb(10, k) * p_mask**k * (1 - p_mask) ** (10 - k) for k in range(4)]
    expected_masks = {k: p for k, p in enumerate([*binomial, 1 - sum(binomial)]) if p > 1e-12}
    assert_distribution(masks, expected_masks)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 9])
def test_every_window_has_its_probability(length):
    # Lengths 1..4: n may exceed the sentence. 5: full window only by n = 5. 6 and 9: only proper windows.
    p_ng, max_ngram = 0.25, 5
    config = AugmentConfig(n_iter=40_000, masking=False, pos_replacement=False, p_ng=p_ng, seed=2)
    words = WORDS[:length]
    samples = Augmenter(config, {}).augment(" ".join(words), 3)
    assert len(samples) == config.n_iter
    expected = Counter({" ".join(words): 1 - p_ng})
    for n in range(1, max_ngram + 1):
        kept = min(n, length)
        for start in range(length - kept + 1):  # includes the last window
            window = " ".join(words[start : start + kept])
            expected[window] += p_ng / max_ngram / (length - kept + 1)
    assert_distribution(Counter(samples), dict(expected))


def test_the_last_and_the_full_window_are_reached():
    config = AugmentConfig(n_iter=2000, masking=False, pos_replacement=False, p_ng=1, seed=0)
    windows = set(Augmenter(config, {}).augment(" ".join(WORDS), 0))
    assert {" ".join(WORDS[-n:]) for n in range(1, 6)} <= windows
    assert {" ".join(WORDS[:n]) for n in range(1, 6)} <= windows
    assert max(len(window.split()) for window in windows) == 5
    five = " ".join(WORDS[:5])
    counts = Counter(Augmenter(config, {}).augment(five, 0))
    assert abs(counts[five] / 2000 - 1 / 5) < 5 * math.sqrt(0.2 * 0.8 / 2000)


def test_the_ngram_is_taken_after_masking_and_replacement_and_independently_of_them():
    config = AugmentConfig(n_iter=20_000, p_mask=0.3, p_pos=0.3, p_ng=1, drop_all_replaced=False, seed=4)
    samples = Augmenter(config, UNIGRAMS, parity).augment(SENTENCE, 0)
    kinds = Counter(
        "mask" if word == "[MASK]" else "keep" if word.startswith("w") else "replace"
        for sample in samples
        for word in sample.split()
    )
    assert_distribution(kinds, {"mask": 0.3, "replace": 0.3, "keep": 0.4})


def test_unigrams_are_counted_per_tag_in_the_corpus():
    sentences = ["a b a", "c b", "a, d"]
    tags = {"a": "V", "b": "C", "c": "C", ",": "P", "d": "C"}
    config = AugmentConfig(n_iter=20_000, p_mask=0, p_pos=1, p_ng=0, drop_all_replaced=False, seed=5)
    augmenter = Augmenter.from_corpus(sentences, config, lambda words: [tags[word] for word in words])
    samples = [sample.split() for sample in augmenter.augment("d a ,", 0)]
    assert_distribution(Counter(words[0] for words in samples), {"b": 0.5, "c": 0.25, "d": 0.25})
    assert {tuple(words[1:]) for words in samples} == {("a", ",")}


def test_the_order_of_the_corpus_does_not_matter():
    config = AugmentConfig(p_pos=0.5)
    samples = [
        Augmenter.from_corpus(texts, config, parity).augment(SENTENCE, 0)
        for texts in (["a b", "c d", "e f"], ["e f", "c d", "a b"])
    ]
    assert samples[0] == samples[1]


def test_a_word_with_an_unknown_tag_is_kept():
    config = AugmentConfig(n_iter=200, p_mask=0, p_pos=1, p_ng=0)
    assert set(Augmenter(config, {"other": {"z": 1}}, one_tag).augment("p q", 0)) == {"p q"}


def test_a_sample_without_an_original_word_is_dropped_unless_told_otherwise():
    config = AugmentConfig(n_iter=5000, p_mask=0.5, p_pos=0, p_ng=0.5, pos_replacement=False, seed=6)
    kept = Augmenter(config, {}).augment("p q", 0)
    every = Augmenter(AugmentConfig(**{**vars(config), "drop_all_replaced": False}), {}).augment("p q", 0)
    assert len(every) == 5000 and "[MASK] [MASK]" in every
    # Judged before the n-gram rule: a lone mask cut out of "[MASK] q" stays.
    assert "[MASK] [MASK]" not in kept and "[MASK]" in kept
    assert abs(len(kept) / 5000 - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 5000)


@pytest.mark.parametrize("text", ["", " ", "\t\n\u00a0"])
def test_texts_without_words_give_nothing(text):
    augmenter = Augmenter(AugmentConfig(), UNIGRAMS, parity)
    assert augmenter.augment(text, 0) == []
    assert augmenter.augment_pair(text, SENTENCE, 0) == augmenter.augment_pair(SENTENCE, text, 0) == []


def test_samples_depend_on_seed_and_index_only():
    augmenter = Augmenter(AugmentConfig(seed=7), UNIGRAMS, parity)
    forwards = [augmenter.augment(SENTENCE, index) for index in range(5)]
    backwards = [augmenter.augment(SENTENCE, index) for index in reversed(range(5))][::-1]
    assert forwards == backwards
    assert len({tuple(samples) for samples in forwards}) == 5
    other_seed = Augmenter(AugmentConfig(seed=8), UNIGRAMS, parity)
    assert other_seed.augment(SENTENCE, 0) != forwards[0]
    # A seed is no offset of the index.
    assert other_seed.augment(SENTENCE, 0) != augmenter.augment(SENTENCE, 1)


def test_draws_of_different_rows_are_independent():
    # One draw per row, over many consecutive rows: the generator's seeding must not leave a pattern.
    config = AugmentConfig(n_iter=1, p_mask=0.5, pos_replacement=False, ngram=False, drop_all_replaced=False)
    augmenter = Augmenter(config, {})
    masked = ["[MASK]" in augmenter.augment("word", index)[0] for index in range(20_000)]
    assert_distribution(
        Counter(zip(masked[::2], masked[1::2], strict=True)),
        {(a, b): 0.25 for a in (False, True) for b in (False, True)},
    )


def test_fewer_iterations_are_a_prefix_of_more():
    few = Augmenter(AugmentConfig(n_iter=10), UNIGRAMS, parity)
    many = Augmenter(AugmentConfig(n_iter=20), UNIGRAMS, parity)
    assert many.augment(SENTENCE, 4)[:10] == few.augment(SENTENCE, 4)
    assert many.augment_pair(SENTENCE, "a b c", 4)[:10] == few.augment_pair(SENTENCE, "a b c", 4)


def test_golden_samples():
    # Pins seeding and draw order: a change here makes every published transfer set irreproducible.
    samples = Augmenter(AugmentConfig(n_iter=6, seed=3), UNIGRAMS, parity).augment(SENTENCE, 11)
    assert samples == [
        "[MASK] w1 w2 w3 w4 w5 w6 w7 w8 w9",
        "[MASK] w1 w2 w3 w4 y w6 [MASK] x2 w9",
        "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9",
        "y w2 w3",
        "w0 w1 w2 y w4 w5 w6 w7 w8 [MASK]",
        "w0 w1 w2 w3 x7 y x7 w7 w8 w9",
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_rule_switched_off_leaves_the_decisions_of_the_others(seed):
    base: dict[str, Any] = {"n_iter": 300, "p_mask": 0.2, "p_pos": 0.2, "p_ng": 0.5, "seed": seed}
    base["drop_all_replaced"] = False  # or samples would be missing in some settings and not in others

    def draw(**switches: Any) -> list[list[str]]:
        augmenter = Augmenter(AugmentConfig(**base, **switches), UNIGRAMS, parity)
        return [sample.split() for sample in augmenter.augment(SENTENCE, 5)]

    everything = draw()
    no_mask, no_pos, no_ngram = draw(masking=False), draw(pos_replacement=False), draw(ngram=False)
    plain = draw(masking=False, pos_replacement=False)
    seen: Counter[str] = Counter()
    for full, unmasked, unreplaced, whole, window in zip(everything, no_mask, no_pos, no_ngram, plain, strict=True):
        assert len(whole) == 10 and window == WORDS[(start := WORDS.index(window[0])) :][: len(window)]
        assert full == whole[start : start + len(window)]
        for word, without_mask, without_pos, original in zip(full, unmasked, unreplaced, window, strict=True):
            seen[kind := "mask" if word == "[MASK]" else "keep" if word == original else "pos"] += 1
            assert without_mask == (original if kind == "mask" else word)
            assert without_pos == (original if kind == "pos" else word)
    assert min(seen.values()) > 100 and len(seen) == 3


def test_with_every_rule_off_nothing_changes_and_no_tagger_is_called():
    def forbidden(words: list[str]) -> list[str]:
        raise AssertionError("called")

    config = AugmentConfig(n_iter=3, masking=False, pos_replacement=False, ngram=False)
    assert Augmenter.from_corpus(["a b"], config, forbidden).augment("a  b", 0) == ["a b"] * 3
    config = AugmentConfig(n_iter=3, p_pos=0)
    assert len(Augmenter.from_corpus(["a b"], config, forbidden).augment("a b c d", 0)) == 3


def modes(samples: list[tuple[str, str]], first: str, second: str) -> list[str]:
    names = {(True, False): "first", (False, True): "second", (True, True): "both", (False, False): "none"}
    return [names[a != first, b != second] for a, b in samples]


# Every word is masked, so that a side that is augmented always differs from the original.
MASK_ALL: dict[str, Any] = {"p_mask": 1.0, "p_pos": 0.0, "p_ng": 0.0}


@pytest.mark.parametrize("mode", ["first", "second", "both"])
def test_fixed_pair_modes(mode):
    augmenter = Augmenter(AugmentConfig(n_iter=7, pair_mode=mode, **MASK_ALL), {})
    assert modes(augmenter.augment_pair("a b", "c d", 1), "a b", "c d") == [mode] * 7


def test_cycled_pair_mode_is_balanced_over_rows_whatever_n_iter():
    augmenter = Augmenter(AugmentConfig(n_iter=10, **MASK_ALL), {})
    rows = [modes(augmenter.augment_pair("a b", "c d", index), "a b", "c d") for index in range(3)]
    assert rows[0][:4] == ["first", "second", "both", "first"] and rows[1][0] == "second"
    assert Counter(mode for row in rows for mode in row) == {"first": 10, "second": 10, "both": 10}


def test_drawn_pair_mode_is_uniform():
    augmenter = Augmenter(AugmentConfig(n_iter=10_000, pair_mode="draw", seed=1, **MASK_ALL), {})
    observed = Counter(modes(augmenter.augment_pair("a b", "c d", 0), "a b", "c d"))
    assert_distribution(observed, dict.fromkeys(["first", "second", "both"], 1 / 3))


def test_the_pair_mode_changes_no_decision_within_a_side():
    def draw(mode: str) -> list[tuple[str, str]]:
        config = AugmentConfig(n_iter=60, pair_mode=mode, seed=9)  # type: ignore[arg-type]
        return Augmenter(config, UNIGRAMS, parity).augment_pair(SENTENCE, "k l m", 2)

    both = draw("both")
    assert draw("first") == [(a, "k l m") for a, _ in both]
    assert draw("second") == [(SENTENCE, b) for _, b in both]
    for mode in ("cycle", "draw"):
        for (a, b), sample in zip(both, draw(mode), strict=True):
            assert sample in {(a, b), (a, "k l m"), (SENTENCE, b)}


def test_the_sides_of_a_pair_are_augmented_independently():
    config = AugmentConfig(n_iter=10_000, p_mask=0.5, p_pos=0, p_ng=0, pair_mode="both", drop_all_replaced=False)
    observed = Counter(Augmenter(config, {}).augment_pair("a", "a", 0))
    assert_distribution(observed, {(a, b): 0.25 for a in ("a", "[MASK]") for b in ("a", "[MASK]")})


@pytest.mark.parametrize(
    "text, words",
    [
        ("Is it here?", ["Is", "it", "here", "?"]),
        ('He said "no" (twice)...', ["He", "said", '"', "no", '"', "(", "twice", ")", "..."]),
        ("don't well-made and/or 3.5 U.S. e.g.", ["don't", "well-made", "and/or", "3.5", "U.S.", "e.g."]),
        ("does n't it 's -lrb- `` -- ?!", ["does", "n't", "it", "'s", "-lrb-", "``", "--", "?!"]),
        (
            "naïve, cafe\u0301! \u201cЖил?\u201d 日本語 👍",
            ["naïve", ",", "cafe\u0301", "!", "\u201c", "Жил", "?", "\u201d", "日本語", "👍"],
        ),
        (" two  spaces\u00a0and\ttabs\n", ["two", "spaces", "and", "tabs"]),
        ("", []),
    ],
)
def test_split_words(text, words):
    found, glue = split_words(text)
    assert found == words
    assert "".join(map("".join, zip(glue, found, strict=True))) == " ".join(text.split())


def test_split_words_gives_any_text_back():
    random = Random(0)
    alphabet = "ab1é字\u0301 \t.,!?'\"()[]-\u2019\u201c👍\u00a0"
    for _ in range(3000):
        text = "".join(random.choice(alphabet) for _ in range(random.randrange(12)))
        words, glue = split_words(text)
        assert all(words) and not any(c.isspace() for word in words for c in word)
        assert "".join(map("".join, zip(glue, words, strict=True))) == " ".join(text.split())


def test_samples_keep_the_spacing_of_the_original():
    config = AugmentConfig(n_iter=300, p_mask=0.3, p_pos=0, p_ng=0.5, seed=0)
    samples = set(Augmenter(config, {}).augment("Is (it) here?", 0))
    assert {"Is ([MASK]) here?", "Is (it) [MASK]?", "here?", "(it)", "it) here?"} <= samples
    assert not any(sample != sample.strip() for sample in samples)


def test_a_tagger_must_give_one_tag_per_word():
    def short(words: list[str]) -> list[str]:
        return ["X"] * (len(words) - 1)

    with pytest.raises(ValueError, match=r"tagger must return one tag per word, got 1 tags for 2 words"):
        Augmenter.from_corpus(["a b"], AugmentConfig(), short)
    with pytest.raises(ValueError, match="one tag per word"):
        Augmenter(AugmentConfig(), {"X": {"a": 1}}, short).augment("a b", 0)


def test_a_missing_tagger_or_a_bad_table_is_refused():
    with pytest.raises(ValueError, match=r"tagger is needed .* pos_replacement=False"):
        Augmenter(AugmentConfig(), UNIGRAMS)
    with pytest.raises(ValueError, match="positive counts"):
        Augmenter(AugmentConfig(), {"X": {"a": 0}}, one_tag)


def test_textblob_tagger_is_the_default_and_can_be_pickled():
    pytest.importorskip("textblob", reason="the augment extra is not installed")
    tagger = textblob_tagger()
    words = "the cat does n't purr loudly".split()
    assert tagger(words) == ["DT", "NN", "VBZ", "RB", "NN", "RB"]
    assert pickle.loads(pickle.dumps(tagger))(words) == tagger(words)
    assert tagger([]) == []
    config = AugmentConfig(n_iter=200, p_mask=0, p_pos=0.5, p_ng=0)
    sentences = ["the dog sleeps", "a cat runs quickly", "the bird sings"]
    default = Augmenter.from_corpus(sentences, config).augment(sentences[0], 0)
    assert default == Augmenter.from_corpus(sentences, config, tagger).augment(sentences[0], 0)
    assert {sample.split()[0] for sample in default} == {"the", "a"}  # a determiner stays one
    assert {sample.split()[1] for sample in default} == {"dog", "cat", "bird"}


def test_without_textblob_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "textblob", None)
    monkeypatch.setitem(sys.modules, "textblob.en", None)
    with pytest.raises(ImportError, match="pip install textblob"):
        Augmenter.from_corpus(["a b"], AugmentConfig())
    Augmenter.from_corpus(["a b"], AugmentConfig(pos_replacement=False))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"n_iter": 0}, ValueError, "n_iter must be at least 1, got 0"),
        ({"n_iter": 2.0}, TypeError, "n_iter must be an integer"),
        ({"max_ngram": 0}, ValueError, "max_ngram must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"p_ng": 1.5}, ValueError, r"p_ng is a probability, must be in \[0, 1\], got 1.5"),
        ({"p_mask": float("nan")}, ValueError, "p_mask"),
        ({"p_mask": "0.1"}, TypeError, "p_mask must be a number"),
        ({"p_mask": 0.6, "p_pos": 0.5}, ValueError, r"p_mask \+ p_pos must be at most 1"),
        ({"masking": 1}, TypeError, "masking must be true or false"),
        ({"mask_token": "a b"}, ValueError, "mask_token must be one word"),
        ({"mask_token": ""}, ValueError, "mask_token must be one word"),
        ({"pair_mode": "third"}, ValueError, "pair_mode must be one of cycle, draw, first, second, both"),
    ],
)
def test_configuration_errors(changes, error, message):
    with pytest.raises(error, match=message):
        AugmentConfig(**changes)


def test_dataset_has_new_distinct_rows_and_their_sources():
    datasets = pytest.importorskip("datasets")
    texts = corpus(300)
    texts[7] = texts[3]
    data = datasets.Dataset.from_dict({"id": list(range(300)), "text": texts, "label": [0] * 300})
    config = AugmentConfig(n_iter=8, seed=1)
    result = augment_dataset(data, ["text"], config, tagger=one_tag, progress=False)
    assert result.column_names == ["text", "source"]
    assert [str(result.features[name].dtype) for name in result.column_names] == ["string", "int64"]
    out, sources = list(result["text"]), list(result["source"])
    assert len(set(out)) == len(out) > 1000
    assert not set(out) & set(texts) and all(out)
    assert sources == sorted(sources)
    # Exactly what the samples are with everything seen before taken out, in order.
    augmenter = Augmenter.from_corpus(texts, config, one_tag)
    seen, expected = set(texts), []
    for index, text in enumerate(texts):
        for sample in augmenter.augment(text, index):
            if sample not in seen:
                seen.add(sample)
                expected.append((sample, index))
    assert list(zip(out, sources, strict=True)) == expected


def test_copies_of_any_original_are_removed_whatever_their_spacing():
    datasets = pytest.importorskip("datasets")
    # "b" and "a" are n-grams of row 0 and, oddly spaced, originals of other rows.
    data = datasets.Dataset.from_dict({"text": ["a b", " b", "a\t", "", "c"]})
    config = AugmentConfig(n_iter=200, masking=False, pos_replacement=False, p_ng=1)
    assert len(augment_dataset(data, ["text"], config, progress=False)) == 0
    without = augment_dataset(data.select([0]), ["text"], config, progress=False)
    assert sorted(without["text"]) == ["a", "b"]


def test_pairs_are_compared_as_pairs():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"q": ["a b", "b a"], "r": ["c", "c"]})
    config = AugmentConfig(n_iter=300, masking=False, pos_replacement=False, p_ng=1, pair_mode="first")
    result = augment_dataset(data, ["q", "r"], config, progress=False)
    # ("b a", "c") and ("a b", "c") are originals; each new pair belongs to the row that produced it first.
    assert sorted(zip(result["q"], result["r"], result["source"], strict=True)) == [
        ("a", "c", 0),
        ("b", "c", 0),
    ]


@pytest.mark.parametrize("columns", [["first"], ["first", "second"]])
def test_the_number_of_workers_does_not_matter(columns):
    datasets = pytest.importorskip("datasets")
    rows = 3 * module._CHUNK_ROWS + 17  # several chunks, the last one ragged
    data = datasets.Dataset.from_dict({"first": corpus(rows, 1), "second": corpus(rows, 2)})
    config = AugmentConfig(n_iter=3, seed=5)
    results = [
        augment_dataset(data, columns, config, tagger=lambda w: one_tag(w), num_proc=n, progress=False).to_dict()
        for n in (1, 2, 3)
    ]
    assert results[0] == results[1] == results[2]
    assert len(results[0]["source"]) > rows


@pytest.mark.parametrize("columns", [["first"], ["first", "second"]])
def test_the_size_of_a_chunk_does_not_matter(columns, monkeypatch):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"first": corpus(40, 1), "second": corpus(40, 2)})
    config = AugmentConfig(n_iter=3)
    whole = augment_dataset(data, columns, config, tagger=one_tag, progress=False).to_dict()
    monkeypatch.setattr(module, "_CHUNK_ROWS", 7)
    assert augment_dataset(data, columns, config, tagger=one_tag, progress=False).to_dict() == whole


def test_an_error_in_a_worker_reaches_the_caller():
    datasets = pytest.importorskip("datasets")
    parent = os.getpid()

    def broken(words: list[str]) -> list[str]:
        return one_tag(words) if os.getpid() == parent else []

    data = datasets.Dataset.from_dict({"text": ["a b"] * 600})
    with pytest.raises(ValueError, match="one tag per word"):
        augment_dataset(data, ["text"], AugmentConfig(), tagger=broken, num_proc=2, progress=False)


def test_selected_and_formatted_datasets_are_read_as_they_look():
    datasets = pytest.importorskip("datasets")
    texts = corpus(30)
    data = datasets.Dataset.from_dict({"text": texts})
    view = data.select(range(29, 9, -1)).with_format("arrow")
    config = AugmentConfig(n_iter=4)
    expected = datasets.Dataset.from_dict({"text": texts[29:9:-1]})
    assert (
        augment_dataset(view, ["text"], config, tagger=one_tag, progress=False).to_dict()
        == augment_dataset(expected, ["text"], config, tagger=one_tag, progress=False).to_dict()
    )


def test_dataset_errors():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["a", None], "number": [1, 2], "source": ["a", "b"]})
    config = AugmentConfig(pos_replacement=False)

    def check(columns, message, data=data, **more):
        with pytest.raises(ValueError, match=message):
            augment_dataset(data, columns, config, progress=False, **more)

    check(["sentence"], "names 'sentence', which is not a column; the columns are: text, number, source")
    check(["text"], "column 'text' must hold text, got None in row 1")
    check(["number"], "column 'number' must hold text, got 1 in row 0")
    check(["source"], "must not name 'source'")
    check("text", "must be a list of one column name")
    check([], "must be a list of one column name")
    check(["text", "text"], "two different ones")
    check(["text"], "no rows", data=data.select([]))
    check(["text"], "num_proc must be at least 1, got 0", num_proc=0)
    with pytest.raises(TypeError, match=r"one split, a datasets\.Dataset, got DatasetDict"):
        augment_dataset(datasets.DatasetDict(train=data), ["text"], config)


def write_tsv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    path.write_text("".join("\t".join(row) + "\n" for row in [header, *rows]), encoding="utf-8")


def write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_jsonl(path: Path, header: list[str], rows: list[list[str]]) -> None:
    lines = [json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


def write_json(path: Path, header: list[str], rows: list[list[str]]) -> None:
    path.write_text(json.dumps([dict(zip(header, row, strict=True)) for row in rows]), encoding="utf-8")


def read(path: Path) -> list[dict[str, str]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        entries = json.loads(text)
    elif path.suffix == ".jsonl":
        entries = [json.loads(line) for line in text.split("\n")[:-1]]
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as file:
            entries = list(csv.DictReader(file))
    else:
        header, *lines = [line.split("\t") for line in text.split("\n")[:-1]]
        entries = [dict(zip(header, line, strict=True)) for line in lines]
    return [{key: str(value) for key, value in entry.items()} for entry in entries]


WRITE: dict[str, Callable[[Path, list[str], list[list[str]]], None]] = {
    ".tsv": write_tsv,
    ".csv": write_csv,
    ".jsonl": write_jsonl,
    ".json": write_json,
}
# Quotes, commas, marks that only some readers take for the end of a line, scripts beyond the BMP.
TEXTS = [
    'He said ""no"", twice, and left "early"',
    "line\u2028separator and next\u0085line stay one row",
    "a lone carriage\rreturn does not end a row",
    "naïve café, Жил 日本語 👍 😀 e\u0301",
    "plain words of an ordinary sentence here",
]


@pytest.mark.parametrize("suffix", list(WRITE))
@pytest.mark.parametrize("pair", [False, True])
def test_files_give_what_the_data_set_gives(tmp_path, suffix, pair):
    datasets = pytest.importorskip("datasets")
    texts = TEXTS + [text for text in corpus(50) if text]
    header, columns = ["id", "text", "other", "label"], ["text", "other"] if pair else ["text"]
    rows = [[str(i), text, text[::-1], "1"] for i, text in enumerate(texts)]
    source, target = tmp_path / f"in{suffix}", tmp_path / "new" / f"out{suffix}"
    WRITE[suffix](source, header, rows)
    config = AugmentConfig(n_iter=6, seed=2)
    counts = augment_file(source, target, columns, config, tagger=one_tag, progress=False)

    table = datasets.Dataset.from_dict({"text": texts, "other": [text[::-1] for text in texts]})
    expected = augment_dataset(table, columns, config, tagger=one_tag, progress=False)
    found = read(target)
    assert found == [{key: str(value) for key, value in row.items()} for row in expected]
    assert list(found[0]) == [*columns, "source"]
    assert counts.rows == len(texts) and counts.empty == 0 and counts.drawn == 6 * len(texts)
    assert counts.written == len(found) and counts.copies > 0 and (pair or counts.duplicates > 0)
    total = counts.all_replaced + counts.copies + counts.duplicates + counts.written
    assert total == counts.drawn and counts.all_replaced >= 0
    assert [path.name for path in target.parent.iterdir()] == [target.name]

    again = tmp_path / f"again{suffix}"
    assert augment_file(source, again, columns, config, tagger=one_tag, num_proc=2, progress=False) == counts
    assert again.read_bytes() == target.read_bytes()


def test_formats_can_be_converted_on_the_way(tmp_path):
    write_tsv(tmp_path / "in.tsv", ["text", "label"], [[text, "0"] for text in TEXTS])
    config = AugmentConfig(n_iter=5)
    outputs = [tmp_path / f"out{suffix}" for suffix in WRITE]
    for output in outputs:
        augment_file(str(tmp_path / "in.tsv"), str(output), ["text"], config, tagger=one_tag, progress=False)
    assert read(outputs[0]) == read(outputs[1]) == read(outputs[2]) == read(outputs[3])


def test_tsv_is_read_without_quoting_and_with_windows_line_ends_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "in.tsv"
    path.write_bytes('\ufefftext\tlabel\r\n"unbalanced quote\t1\r\n\r\nsecond row\t0\r\n'.encode())
    config = AugmentConfig(n_iter=400, masking=False, pos_replacement=False, p_ng=1)
    augment_file(path, tmp_path / "out.tsv", ["text"], config, progress=False)
    rows = read(tmp_path / "out.tsv")
    assert {row["text"] for row in rows} == {
        '"',
        "unbalanced",
        "quote",
        '"unbalanced',
        "unbalanced quote",
        "second",
        "row",
    }
    assert {row["source"] for row in rows if row["text"] in ("second", "row")} == {"1"}


def test_rows_without_words_are_counted_and_skipped(tmp_path):
    write_csv(tmp_path / "in.csv", ["a", "b"], [["x y z", "u v"], ["", "u"], ["x", "  "]])
    config = AugmentConfig(n_iter=30, pos_replacement=False)
    counts = augment_file(tmp_path / "in.csv", tmp_path / "out.csv", ["a", "b"], config, progress=False)
    assert (counts.rows, counts.empty, counts.drawn) == (3, 2, 30)
    assert {row["source"] for row in read(tmp_path / "out.csv")} == {"0"}


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.tsv",
            "sentence\tlabel\nx\t1\n",
            "names 'text', which is not a column; the columns are: sentence, label",
        ),
        ("a.tsv", "text\tlabel\nx\t1\ny\n", r"a.tsv, line 3: expected 2 fields \(text, label\), got 1"),
        ("a.csv", 'text,label\nx,1\n"y,2\n', r"a.csv, line 3: not valid csv"),
        ("a.csv", "text,label\nx,1,2\n", "line 2: expected 2 fields"),
        ("a.csv", "text,text\nx,1\n", "names a column twice"),
        ("a.tsv", "", "empty file; expected a header row"),
        ("a.tsv", "text\n", "no rows"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid json"),
        ("a.jsonl", '["x"]\n', "line 1: expected an object, got list"),
        ("a.jsonl", '{"text": "x"}\n{"label": 1}\n', "column 'text' must hold text, got None in row 1"),
        ("a.json", '{"text": "x"}\n{"text": "y"}\n', "must end in .jsonl"),
        ("a.json", '{"text": ["x"]}', "expected a list of objects, got dict"),
        ("a.json", '[{"text": 3}]', "must hold text, got 3 in row 0"),
        ("a.json", r'[{"text": "\ud83d"}]', "must hold Unicode text, got '.ud83d' in row 0"),
        ("a.parquet", "", "input must end in one of .tsv, .csv, .jsonl, .json"),
    ],
)
def test_file_errors_name_file_rule_and_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        augment_file(path, tmp_path / "out.tsv", ["text"], AugmentConfig(pos_replacement=False), progress=False)
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_neither_missed_nor_overwritten(tmp_path):
    config = AugmentConfig(n_iter=3, pos_replacement=False)
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*in\.tsv"):
        augment_file(source, target, ["text"], config, progress=False)
    source.write_bytes("text\ncaf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        augment_file(source, target, ["text"], config, progress=False)
    write_tsv(source, ["text"], [["some words to change"]])
    with pytest.raises(ValueError, match="must be another file"):
        augment_file(source, tmp_path / "." / "in.tsv", ["text"], config, progress=False, overwrite=True)
    target.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        augment_file(source, target, ["text"], config, progress=False)
    assert target.read_text() == "mine"
    augment_file(source, target, ["text"], config, progress=False, overwrite=True)
    assert target.read_text().startswith("text\tsource\n")


def test_an_interrupted_run_leaves_the_old_file_and_no_rubbish(tmp_path):
    source, target = tmp_path / "in.tsv", tmp_path / "out.tsv"
    write_tsv(source, ["text"], [[text] for text in corpus(600, 3) if text])
    target.write_text("old")
    calls = 0

    def interrupted(words: list[str]) -> list[str]:
        nonlocal calls
        calls += 1
        if calls > 900:  # past counting and past the first chunk
            raise KeyboardInterrupt
        return one_tag(words)

    with pytest.raises(KeyboardInterrupt):
        augment_file(source, target, ["text"], AugmentConfig(), tagger=interrupted, progress=False, overwrite=True)
    assert target.read_text() == "old" and sorted(tmp_path.iterdir()) == [source, target]


def test_progress_is_shown_on_stderr_only_if_wanted(tmp_path, capfd):
    write_tsv(tmp_path / "in.tsv", ["text"], [[text] for text in corpus(40) if text])
    for progress in (True, False):
        augment_file(
            tmp_path / "in.tsv",
            tmp_path / "out.tsv",
            ["text"],
            AugmentConfig(),
            tagger=one_tag,
            progress=progress,
            overwrite=True,
        )
        captured = capfd.readouterr()
        assert captured.out == ""
        assert ("count words by tag" in captured.err and "augment: 100%" in captured.err) == progress
        assert progress or captured.err == ""


def test_importing_the_module_loads_no_library():
    code = (
        "import sys; import pydistill.data.augment; "
        "print([m for m in ('datasets', 'pandas', 'textblob', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_throughput(tmp_path):
    # Process time, file reading and duplicate removal included. The target is 20,000 a second on one core;
    # the bound here leaves room for slow shared machines.
    random = Random(0)
    texts = [" ".join(f"v{random.randrange(400)}" for _ in range(12)) for _ in range(2000)]
    write_tsv(tmp_path / "in.tsv", ["text"], [[text] for text in texts])
    start = time.process_time()
    counts = augment_file(
        tmp_path / "in.tsv", tmp_path / "out.tsv", ["text"], AugmentConfig(), tagger=one_tag, progress=False
    )
    rate = counts.written / (time.process_time() - start)
    print(f"{rate:,.0f} new sentences a second")
    assert rate > 5000
