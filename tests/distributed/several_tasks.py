# SPDX-License-Identifier: Apache-2.0
"""Trains tiny students of several tasks in as many processes as there are, then has them wait for the first:

torchrun --nproc-per-node N -m distributed.several_tasks FOLDER
"""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_models import tiny_bert, tiny_sentences, tiny_tokenizer
from transformers import BertForSequenceClassification

from pydistill import DistillationTrainer, Distiller
from pydistill.multitask import TaskCollator, TaskLoss, TaskMixture
from pydistill.recipes import mtdnn
from pydistill.recipes.stages import once
from pydistill.students.multitask import MultiTaskModel, task_settings

ROWS_PER_STEP = 4
# Seconds that a process waits for another, and for how long the first one is busy.
TIMEOUT, BUSY = 10, 14


def encoder() -> BertForSequenceClassification:
    """Without dropout: two processes draw other masks than one."""
    model = tiny_bert(3, layers=2)
    config = model.config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.classifier_dropout = 0.0
    same = BertForSequenceClassification(config)
    same.load_state_dict(model.state_dict())
    return same


def rows(count: int, seed: int) -> Dataset:
    sentences = tiny_sentences(2 * count, seed)
    coded = tiny_tokenizer()(sentences[:count], sentences[count:])
    columns = {name: coded[name] for name in ("input_ids", "token_type_ids")}
    return Dataset.from_dict(columns | {"labels": [number % 2 for number in range(count)]})


def train(folder: Path, tasks: dict[str, Any], sizes: dict[str, int], processes: int) -> dict[str, torch.Tensor]:
    """Two epochs of tasks of these sizes, and the weights that came out."""
    model = MultiTaskModel.from_encoder(encoder(), tasks, seed=1)
    block = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.05, "save_strategy": "no"}
    block |= {"per_device_train_batch_size": ROWS_PER_STEP // processes}
    mixture = TaskMixture({name: rows(size, seed) for seed, (name, size) in enumerate(sizes.items())})
    trainer = DistillationTrainer(
        Distiller(model, None, TaskLoss(dict.fromkeys(tasks, "classification"))),
        mtdnn._arguments(block, folder, 3, unused=mtdnn._leaves_parameters_unused(model.config)),
        train_dataset=mixture,  # type: ignore[arg-type]
        processing_class=tiny_tokenizer(),
        data_collator=TaskCollator(tiny_tokenizer()),
    )
    trainer.train()
    return model.state_dict()


UNEVEN = {name: task_settings(labels=["no", "yes"], pair=True) for name in ("many", "few")}
UNEVEN_SIZES = {"many": 13, "few": 1}


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    weights = train(folder / "uneven", UNEVEN, UNEVEN_SIZES, processes)
    # An answer module leaves the pooler out.
    train(folder / "san", {"pair": task_settings(labels=["no", "yes"], pair=True, head="san")}, {"pair": 9}, processes)
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=TIMEOUT))
    said = once(lambda: [time.sleep(BUSY), "done"][1])
    torch.save({"weights": weights, "said": said}, folder / f"of-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
