# SPDX-License-Identifier: Apache-2.0
"""Relation matrices: they are what the loss compares, of every layer and number of heads."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from pydistill import attention_relation_loss
from pydistill.capture import capture
from pydistill.losses.attention_relation import SIGNALS
from pydistill.relations import relation_matrices, token_labels


def encoder(hidden_size: int, seed: int) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    return BertModel(config)


@pytest.mark.parametrize("relation_heads", [None, 8])
@pytest.mark.parametrize("relation", ["qk", "vv"])
def test_divergence_of_the_matrices_is_the_loss(relation: str, relation_heads: int | None) -> None:
    student, teacher = encoder(16, seed=0), encoder(32, seed=1)  # heads of size 4 and 8: each side has its own scale
    inputs = {"input_ids": torch.randint(0, 40, (1, 9), generator=torch.Generator().manual_seed(2))}
    p, q = (
        relation_matrices(model, inputs, [relation], layer=1, relation_heads=relation_heads)[relation]
        for model in (teacher, student)
    )
    assert p.shape == (relation_heads or 4, 9, 9)
    torch.testing.assert_close(p.sum(-1), torch.ones(p.shape[:2]))
    signals = [f"{SIGNALS[letter]}@1" for letter in relation]
    sides = []
    for model in (student.eval(), teacher.eval()):
        with torch.no_grad():
            read = capture(model, dict.fromkeys(signals))(**inputs)
        sides += [read[signals[0]], None if relation[0] == relation[1] else read[signals[1]]]
    loss = attention_relation_loss(*sides, relation_heads=relation_heads, impl="reference")
    torch.testing.assert_close((p * (p / q).log()).sum(-1).mean(), loss, rtol=1e-4, atol=1e-6)


def test_model_is_left_as_it_was_and_dropout_is_off() -> None:
    model = encoder(16, seed=0).train()
    inputs = {"input_ids": torch.arange(8)[None]}
    first, second = (relation_matrices(model, inputs)["qk"] for _ in range(2))
    assert torch.equal(first, second) and model.training


def test_grouped_keys_and_values_are_repeated() -> None:
    torch.manual_seed(0)
    model = Qwen2Model(
        Qwen2Config(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=16,
        )
    )
    matrices = relation_matrices(model, {"input_ids": torch.arange(6)[None]}, ["qk", "vv"])
    assert matrices["qk"].shape == matrices["vv"].shape == (4, 6, 6)
    assert torch.equal(matrices["vv"][0], matrices["vv"][1]) and not torch.equal(matrices["qk"][0], matrices["qk"][1])


def test_several_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="inputs must hold one text, got 2"):
        relation_matrices(encoder(16, seed=0), {"input_ids": torch.zeros(2, 4, dtype=torch.long)})


def test_labels_are_the_tokens_texts() -> None:
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<pad>": 0, "Ġfilm": 1, "Ã©": 2, "Ġ": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    # A space alone has no text to show: its name in the vocabulary stands for it.
    assert token_labels(PreTrainedTokenizerFast(tokenizer_object=tokenizer), [1, 2, 3]) == ["film", "é", "Ġ"]
