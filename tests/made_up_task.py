# SPDX-License-Identifier: Apache-2.0
"""A task that a small model learns in seconds, and an untrained teacher for it; tests of recipe, plan and commands."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

GOOD, BAD = ["fine", "lovely", "great", "warm"], ["dull", "awful", "cold", "bad"]
NEUTRAL = ["the", "film", "is", "a", "very", "story", "with", "music", "and", "plot"]


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """Neutral words around one good or bad word, which decides the label."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        words = draw.choices(NEUTRAL, k=draw.randint(3, 9))
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if number % 2 else BAD))
        rows.append((" ".join(words), "good" if number % 2 else "bad"))
    return rows


def write_table(path: Path, header: list[str], rows: list[tuple[str, ...]]) -> str:
    path.write_text("\n".join("\t".join(row) for row in [tuple(header), *rows]) + "\n")
    return str(path)


def make_teacher(folder: Path, *, classes: int = 2, labels: list[str] | None = None) -> str:
    """A BERT of one layer with a WordPiece vocabulary of the sentences' words, not trained yet."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *NEUTRAL, *GOOD, *BAD]
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64).save_pretrained(folder)
    names = labels or [f"LABEL_{index}" for index in range(classes)]
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)
