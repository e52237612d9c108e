# SPDX-License-Identifier: Apache-2.0
"""Models, tokenizers and data small enough that a training step takes milliseconds."""

from __future__ import annotations

import random
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def tiny_bert(seed: int = 0, num_labels: int = 2, dropout: float = 0.0, layers: int = 1, hidden_size: int = 16) -> Any:
    """A BERT classifier of a few thousand parameters, in training mode as its constructor leaves it."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "vocab_size": len(WORDS) + len(SPECIAL),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        # The usual 0.02 makes logits of a tiny model indistinguishable.
        "initializer_range": 0.5,
        "num_labels": num_labels,
    }
    return BertForSequenceClassification(BertConfig(**options))


class MatchSignal(nn.Module):
    """A term of an objective: squared distance between one signal of the student and one of the teacher."""

    def __init__(self, signal: str = "values@-1", teacher_signal: str | None = None, name: str = "match") -> None:
        super().__init__()
        self.name, self.weight = name, 1.0
        self.signal, self.teacher_signal = signal, teacher_signal or signal
        self.student_signals = frozenset({self.signal})
        self.teacher_signals = frozenset({self.teacher_signal})

    def count_items(self, batch: Any) -> Any:
        """Tokens that are not padding."""
        return batch["attention_mask"].sum()

    def forward(self, student: Any, teacher: Any, batch: Any, num_items: Any = None) -> Any:
        distance = student[self.signal] - teacher[self.teacher_signal]  # [B, H, N, d] or [B, N, D]
        mask = batch["attention_mask"].view(len(distance), *[1] * (distance.dim() - 3), -1, 1)
        return (distance * mask).square().sum() / (mask.sum() if num_items is None else num_items)


def tiny_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One token per word, with BERT's special tokens; reads single sentences and pairs."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        padding_side=padding_side,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_sentences(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    """Distinct sentences of 1 to `longest` words."""
    generator = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(generator.choices(WORDS, k=generator.randint(1, longest)))] = None
    return list(found)


def tiny_rows(count: int, seed: int = 0) -> Dataset:
    """Tokenized sentences of different lengths; the label says of which half of the words the first is."""
    tokenizer = tiny_tokenizer()
    sentences = tiny_sentences(count, seed)
    encoded = tokenizer(sentences)
    labels = [int(WORDS.index(sentence.split()[0]) >= len(WORDS) // 2) for sentence in sentences]
    columns = {"sentence": sentences, "input_ids": encoded["input_ids"], "labels": labels}
    return Dataset.from_dict(columns | {"attention_mask": encoded["attention_mask"]})
