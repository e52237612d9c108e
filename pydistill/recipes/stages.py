# SPDX-License-Identifier: Apache-2.0
"""What the recipes share: stages that are built once and resumed, and the line that tells how far a training is."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pydistill.plan import CONFIG_FILE, PlanBase, duration
from pydistill.report import write_text
from pydistill.trainer import last_checkpoint

# Folder of the unfinished work of a run.
WORK = "work"
STAGE_FILE = "stage.json"


def open_output(plan: PlanBase, entries: Sequence[str]) -> None:
    """Make the output folder this run's own: remove ``entries`` if told to, and say whose configuration it is."""
    if plan.overwrite:
        for name in entries:
            path = plan.output / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    plan.output.mkdir(parents=True, exist_ok=True)
    write_text(plan.output / CONFIG_FILE, plan.config.to_yaml())


class Stages:
    """Folders that are built once: under ``work/`` first, under their own name when complete."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.done: list[dict[str, Any]] = []

    def build(self, name: str, make: Callable[[Path], int], what: str) -> Path:
        """Return the folder ``name``; ``make(folder)`` fills it and returns how many rows or steps that took.

        ``make`` may find its own earlier, interrupted work in ``self.scratch(name)``.
        """
        final = self.output / name
        if self.has(name):
            record = json.loads((final / STAGE_FILE).read_text(encoding="utf-8"))
            print(f"[{name}] kept from before", flush=True)
        else:
            print(f"[{name}] {what}", flush=True)
            building = self.scratch(f"{name}.new")
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            start = time.perf_counter()
            rows = make(building)
            record = {"name": name, "seconds": round(time.perf_counter() - start, 2), "rows": rows}
            write_text(building / STAGE_FILE, json.dumps(record))
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(building, final)
            shutil.rmtree(self.scratch(name), ignore_errors=True)
            print(f"[{name}] {record['seconds']:.1f} s", flush=True)
        self.done.append(record)
        return final

    def has(self, name: str) -> bool:
        """Whether the stage ``name`` is finished."""
        return (self.output / name / STAGE_FILE).is_file()

    def scratch(self, name: str) -> Path:
        """Return the folder where the unfinished work of a stage lies."""
        return self.output / WORK / name.replace("/", "-")


def checkpoint_in(folder: Path) -> str | None:
    """Return the last complete checkpoint of an interrupted training, as ``Trainer.train`` wants it."""
    found = last_checkpoint(folder)
    return None if found is None else str(found)


class Progress(TrainerCallback):
    """One line that is rewritten on a terminal, one line per evaluation elsewhere."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.loss = ""
        self.score = ""
        self.shown = time.monotonic()
        self.started = (0, 0.0)  # step, time: a resumed training starts in the middle

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of the time that is left."""
        self.started = (state.global_step, time.monotonic())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Take over the loss or the score and show it."""
        logs = logs or {}
        if not state.max_steps:  # an evaluation before the training
            return
        if "loss" in logs:
            self.loss = f"  loss {logs['loss']:.4f}"
        evaluated = f"eval_{self.metric}" in logs
        if evaluated:
            value = logs[f"eval_{self.metric}"]
            shown = f"{value:.4f}" if self.metric == "loss" else f"{100 * value:.1f} %"
            self.score = f"  dev {self.metric} {shown}"
        step, since = self.started
        pace = (time.monotonic() - since) / max(1, state.global_step - step)
        left = f"  {duration(pace * (state.max_steps - state.global_step))} left"
        line = f"  step {state.global_step:,}/{state.max_steps:,}{self.loss}{self.score}{left}"
        if sys.stdout.isatty():
            print(f"\r{line}\x1b[K", end="", flush=True)
        elif evaluated or ("loss" in logs and time.monotonic() - self.shown > 30):
            print(line, flush=True)
            self.shown = time.monotonic()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the last line standing."""
        if sys.stdout.isatty():
            print(flush=True)


def attach_progress(trainer: Trainer, metric: str) -> None:
    """Let a trainer say its progress in a line."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(metric))
