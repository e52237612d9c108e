# SPDX-License-Identifier: Apache-2.0
"""Trains a tiny student in as many processes as there are, once for each case, and leaves its weights and logs:

torchrun --nproc-per-node N -m distributed.train CASES_AS_JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny_models import tiny_bert, tiny_rows, tiny_tokenizer
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from pydistill import AttentionRelation, ProjectedMSE, SoftTarget
from pydistill.distiller import Distiller
from pydistill.objective import Objective
from pydistill.teachers import OnlineTeacher
from pydistill.trainer import DistillationTrainer

STEPS = 5


@dataclass
class Case:
    """One training; the folder is that of its results and checkpoints."""

    folder: str
    objective: str = "all"
    rows: int = 64
    batch: int = 8
    accumulation: int = 1
    fsdp: bool = False
    save_steps: int = 0
    resume: str | None = None  # a checkpoint
    evaluates: bool = False  # before it trains
    folder_each: bool = False  # to see what every process writes
    dies: int = 0  # the last process, after this step
    options: dict[str, Any] = field(default_factory=dict)  # further arguments


class Dies(TrainerCallback):
    """Kills the process, as a machine that is out of memory would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def terms_of(objective: str) -> list[nn.Module]:
    """`relations` reaches only a part of the student; the rest has to be frozen, or data parallelism fails on it."""
    relations = AttentionRelation(reduction="token_mean")
    if objective == "relations":
        return [relations]
    return [SoftTarget(temperature=2.0, hard_weight=0.5), relations, ProjectedMSE(16, 32)]


def student_at_start() -> nn.Module:
    return tiny_bert(seed=0)


def train(case: Case) -> DistillationTrainer:
    folder = Path(case.folder)
    folder.mkdir(exist_ok=True)
    teacher = OnlineTeacher(tiny_bert(seed=1, layers=2, hidden_size=32))
    # Whether it shards is decided once in a process; here it is once in a case.
    AcceleratorState._reset_state(reset_partial_state=True)
    rank = os.environ.get("RANK", "0")
    options: dict[str, Any] = {
        "output_dir": str(folder / (f"checkpoints-of-{rank}" if case.folder_each else "checkpoints")),
        "per_device_train_batch_size": case.batch,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": case.accumulation,
        "max_steps": STEPS,
        "learning_rate": 0.1,
        "optim": "sgd",
        "optim_args": "momentum=0.5",  # something to resume
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_strategy": "steps" if case.save_steps else "no",
        "save_steps": case.save_steps or STEPS,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        # Whoever gets no gradient would be waited for.
        "ddp_find_unused_parameters": False,
        "fsdp": case.fsdp,
        "fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"], "reshard_after_forward": False},
        "seed": 3,
    }
    arguments = TrainingArguments(**options | case.options)
    if case.fsdp:
        # accelerate shards on accelerators alone. Told that this is one, it does what it does there, over gloo.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = DistillationTrainer(
        Distiller(student_at_start(), teacher, Objective(terms_of(case.objective))),
        arguments,
        tiny_rows(case.rows),
        tiny_rows(13, seed=1),
        processing_class=tiny_tokenizer(),
    )
    if case.dies and trainer.args.process_index == trainer.args.world_size - 1:
        trainer.add_callback(Dies(case.dies))
    if case.evaluates:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=case.resume)
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        torch.save(state, folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history))
    return trainer


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for case in json.loads(sys.argv[1]):
        try:
            train(Case(**case))
        except ValueError as error:
            (Path(case["folder"]) / "refused.txt").write_text(str(error))
    torch.distributed.destroy_process_group()
