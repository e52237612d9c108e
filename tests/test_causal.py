# SPDX-License-Identifier: Apache-2.0
"""Causal language models: labels are the next tokens, prompts and other texts do not count; cached teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_bert, tiny_rows, tiny_tokenizer
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, TrainingArguments

from pydistill import SoftTarget, soft_target_loss
from pydistill.cache import CachedTeacher, TeacherCache, write_cache
from pydistill.distiller import Distiller
from pydistill.trainer import DistillationTrainer

CLASSES = 45


def tiny_llama(seed: int, hidden_size: int = 16, classes: int = CLASSES) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=classes, hidden_size=hidden_size, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch_of(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, CLASSES, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100  # a prompt
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("hard_weight", [0.0, 0.5, 1.0])
def test_logits_meet_the_next_token(hard_weight):
    """By hand: positions whose next label counts, as transformers' own loss has it."""
    student, teacher, batch = tiny_llama(0), tiny_llama(1, 32), batch_of()
    distiller = Distiller(student, teacher, SoftTarget(temperature=2.0, hard_weight=hard_weight, shift=True))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, targets = (model(**inputs).logits[:, :-1].flatten(0, 1) for model in (student, teacher))
    labels = batch["labels"][:, 1:].flatten()
    if hard_weight == 1:
        expected = student(**batch).loss
        torch.testing.assert_close(expected, F.cross_entropy(logits, labels))
    else:
        expected = soft_target_loss(logits, targets.detach(), labels, temperature=2.0, hard_weight=hard_weight)
    found = distiller(**batch)
    torch.testing.assert_close(found.loss, expected)
    assert int(distiller.objective.count_items(batch)[0]) == int((labels != -100).sum()) == 5 + 5 + 8


def test_the_last_token_of_a_text_predicts_nothing():
    """Of packed rows, whose next token is another text's."""
    batch = {"labels": torch.arange(8).reshape(1, 8), "segment_ids": torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3]])}
    term = SoftTarget(shift=True)
    assert term._labels(batch).tolist() == [[1, 2, -100, 4, -100, 6, 7, -100]]
    assert int(term.count_items(batch)) == 5


def test_training_with_a_cached_top_k_teacher(tmp_path: Path):
    """All classes: the losses of the teacher beside the student. A few: close to them, for a peaked teacher."""
    teacher, rows = tiny_llama(1, 32), tiny_rows(16).remove_columns(["labels", "sentence"])
    teacher.lm_head.weight.data *= 4
    losses = {}
    for k in (None, CLASSES, 8):
        source: Any = teacher
        if k is not None:
            write_cache(rows, teacher, ["logits"], tmp_path / str(k), top_k=k, progress=False)
            source = CachedTeacher(TeacherCache(tmp_path / str(k), model=teacher))
        arguments = TrainingArguments(
            str(tmp_path / "run"), per_device_train_batch_size=4, num_train_epochs=2, learning_rate=0.05, optim="sgd",
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        trainer = DistillationTrainer(
            Distiller(tiny_llama(0), source, SoftTarget(shift=True)), arguments, rows,
            data_collator=DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False),
        )  # fmt: skip
        trainer.train()
        losses[k] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses[None]) == 8 and losses[None][-1] < losses[None][0]
    assert losses[CLASSES] == pytest.approx(losses[None], rel=1e-4)
    assert losses[8] == pytest.approx(losses[None], rel=0.05)


def test_what_cannot_be_meant():
    with pytest.raises(ValueError, match="LlamaForCausalLM is a causal language model: give soft_target shift=True"):
        Distiller(tiny_llama(0), tiny_llama(1), SoftTarget())
    with pytest.raises(ValueError, match="BertForSequenceClassification is no causal language model: .* shift=False"):
        Distiller(tiny_bert(), tiny_bert(), SoftTarget(shift=True))
    with pytest.raises(ValueError, match=r"shift=True needs integer labels \[B, N\]"):
        SoftTarget(shift=True).count_items({"labels": torch.tensor([1, 2])})
    distiller = Distiller(tiny_llama(0), tiny_llama(1, classes=50), SoftTarget(shift=True))
    with pytest.raises(ValueError, match="classes"):
        distiller(**batch_of())
