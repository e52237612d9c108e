# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation, of every term: 1 x 32 rows, 4 x 8 and 32 x 1 have the same loss and the same gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from mixed_vocab_data import SENTENCES, student_tokenizer, teacher_tokenizer
from test_causal import tiny_llama
from test_dual_training import student_of, teacher_of
from tiny_models import tiny_bert, tiny_rows, tiny_sentences, tiny_tokenizer
from torch import Tensor
from transformers import DataCollatorForLanguageModeling

from pydistill import AttentionRelation, ProjectedMSE, SoftTarget
from pydistill.data.corpus import Corpus, PackedCollator
from pydistill.data.mixed_vocab import MixedVocabularyCollator, Segmenter
from pydistill.distiller import Distiller
from pydistill.losses.soft_target import DIVERGENCES
from pydistill.objective import Objective
from pydistill.students.mixed_vocab import DualTraining
from pydistill.trainer import DistillationCollator

ROWS = 32


def ragged_rows(labels: bool = True) -> list[dict[str, Any]]:
    """Of 3 to 14 tokens, some with a hole; one row in five has no label, so that some micro-batches have nothing."""
    rows = tiny_rows(ROWS).remove_columns("sentence").to_list()
    for index, row in enumerate(rows):
        if index % 3 == 0:
            row["attention_mask"][1] = 0
        if index % 5 == 0:
            row["labels"] = -100
        if not labels:
            del row["labels"]
    return rows


def teacher_bert() -> Any:
    return tiny_bert(1, layers=2, hidden_size=32).double()


def padded(term: Any, *sizes: int, labels: bool = True, **options: Any) -> dict[str, Any]:
    step = Distiller(tiny_bert(0), teacher_bert(), Objective([term(*sizes, **options)]))
    return {"step": step, "rows": ragged_rows(labels), "collate": DistillationCollator(tiny_tokenizer())}


def packed(term: Any, *sizes: int, **options: Any) -> dict[str, Any]:
    """Rows of different numbers of texts."""
    step = Distiller(tiny_bert(0), teacher_bert(), Objective([term(*sizes, **options)]))
    stream = Corpus(tiny_sentences(100), tiny_tokenizer(), max_length=20, packing="packed")
    return {"step": step, "rows": list(itertools.islice(stream, ROWS)), "collate": PackedCollator(0)}


def causal(**options: Any) -> dict[str, Any]:
    """The labels are the tokens, whose padding counts nothing."""
    step = Distiller(tiny_llama(0), tiny_llama(1, 32).double(), Objective([SoftTarget(shift=True, **options)]))
    rows = [{"input_ids": row["input_ids"], "attention_mask": row["attention_mask"]} for row in tiny_rows(ROWS)]
    return {"step": step, "rows": rows, "collate": DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)}


def dual(**options: Any) -> dict[str, Any]:
    teacher = teacher_of()
    cut = Segmenter(teacher_tokenizer(), student_tokenizer(), max_length=32, masking=0.3)
    rows = [{"text": SENTENCES[index % 8][: 10 + index], "index": index} for index in range(ROWS)]
    step = DualTraining(student_of(teacher), teacher, **options)
    return {"step": step, "rows": rows, "collate": MixedVocabularyCollator(cut)}


SIZES = (16, 32)  # hidden sizes of student and teacher
REDUCTIONS = ("sequence_mean", "token_mean", "sum")
CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"{one}": partial(padded, SoftTarget, divergence=one) for one in DIVERGENCES},
    **{f"{one}, no labels": partial(padded, SoftTarget, divergence=one, labels=False) for one in DIVERGENCES},
    **{f"{one} and labels": partial(padded, SoftTarget, divergence=one, hard_weight=0.3) for one in DIVERGENCES},
    "labels alone": partial(padded, SoftTarget, hard_weight=1.0),
    "in place": partial(padded, SoftTarget, temperature=2.0, inplace=True),
    **{f"causal, labels {weight}": partial(causal, hard_weight=weight) for weight in (0.0, 0.5, 1.0)},
    **{f"relations, {one}": partial(padded, AttentionRelation, reduction=one) for one in REDUCTIONS},
    **{f"relations, {one}, packed": partial(packed, AttentionRelation, reduction=one) for one in REDUCTIONS},
    **{f"projected, {one}": partial(padded, ProjectedMSE, *SIZES, reduction=one) for one in ("mean", "sum")},
    "projected down": partial(padded, ProjectedMSE, *SIZES, direction="down", normalize=True),
    "projected, packed": partial(packed, ProjectedMSE, *SIZES),
    "dual": partial(dual, direction=None),
    "dual, parameters": partial(dual, direction="down"),
    "dual, hidden states": partial(dual, direction="up", projected="hidden_states"),
}


def one_step(case: dict[str, Any], size: int) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """The gradients of a step in micro-batches of a size, and the loss with its parts, added up as the trainer does."""
    step: Distiller = case["step"].double()
    rows = case["rows"]
    batches = [case["collate"](rows[start : start + size]) for start in range(0, ROWS, size)]
    items = torch.stack([step.objective.count_items(batch) for batch in batches]).sum(0).clamp(min=1)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        output = step(**batch, num_items_in_batch=items)
        output.loss.backward()
        for name, value in {"loss": output.loss.detach(), **output.parts}.items():
            sums[name] = sums.get(name, 0) + value
    return {name: parameter.grad for name, parameter in step.named_parameters()}, sums


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up(name: str) -> None:
    """In double precision, in which what is left is rounding."""
    torch.manual_seed(0)
    whole, losses = one_step(CASES[name](), ROWS)
    assert any(value is not None and value.abs().max() > 1e-3 for value in whole.values())
    for size in (8, 1):
        torch.manual_seed(0)
        parts, their_losses = one_step(CASES[name](), size)
        torch.testing.assert_close(their_losses, losses, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
