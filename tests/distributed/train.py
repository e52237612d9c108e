# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny student in as many processes as there are, and leaves its weights and logs:

torchrun --nproc-per-node N -m distributed.train FOLDER OBJECTIVE BATCH_PER_PROCESS ACCUMULATION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tiny_models import tiny_bert, tiny_rows, tiny_tokenizer
from torch import nn
from transformers import TrainingArguments

from pydistill import AttentionRelation, ProjectedMSE, SoftTarget
from pydistill.distiller import Distiller
from pydistill.objective import Objective
from pydistill.teachers import OnlineTeacher
from pydistill.trainer import DistillationTrainer

STEPS = 5


def terms_of(objective: str) -> list[nn.Module]:
    """`relations` reaches only a part of the student; the rest has to be frozen, or data parallelism fails on it."""
    relations = AttentionRelation(reduction="token_mean")
    if objective == "relations":
        return [relations]
    return [SoftTarget(temperature=2.0, hard_weight=0.5), relations, ProjectedMSE(16, 32)]


def student_at_start() -> nn.Module:
    return tiny_bert(seed=0)


def main(folder: Path, objective: str, batch: int, accumulation: int) -> None:
    teacher = OnlineTeacher(tiny_bert(seed=1, layers=2, hidden_size=32))
    trainer = DistillationTrainer(
        Distiller(student_at_start(), teacher, Objective(terms_of(objective))),
        TrainingArguments(
            str(folder / "checkpoints"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=STEPS,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            # Whoever gets no gradient would be waited for.
            ddp_find_unused_parameters=False,
            seed=3,
        ),
        tiny_rows(64),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(trainer.distiller.state_dict(), folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
