# SPDX-License-Identifier: Apache-2.0
"""What the recipes share: stages, built once and resumed, in one process or several; the line of progress."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pydistill.config import UserError
from pydistill.plan import CONFIG_FILE, PlanBase, duration
from pydistill.report import write_text
from pydistill.trainer import last_checkpoint

# Folder of the unfinished work of a run.
WORK = "work"
STAGE_FILE = "stage.json"


Result = TypeVar("Result")


class StageError(UserError):
    """A stage is being built by someone else; the message says which one and what to do."""


def processes() -> PartialState:
    """The processes that carry out this run, and which one this is."""
    return PartialState(cpu=not torch.cuda.is_available())


def once(work: Callable[[], Result]) -> Result:
    """Have the first process do it when all are there, while the others wait; every one returns what came out.

    They wait as long as it takes, where a collective operation would give up after half an hour.
    """
    state = processes()
    state.wait_for_everyone()
    results = [work() if state.is_main_process else None]
    if torch.distributed.is_initialized():
        torch.distributed.barrier(group=_patient_group())
    return broadcast_object_list(results)[0]


@functools.cache
def _patient_group() -> Any:
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))


def say(*lines: str) -> None:
    """Print, in the first process."""
    if processes().is_main_process:
        print(*lines, sep="\n", flush=True)


def open_output(plan: PlanBase, entries: Sequence[str]) -> None:
    """Make the output folder this run's own: remove ``entries`` if told to, and say whose configuration it is.

    Raises:
        StageError: ``entries`` are to be removed while another run is building a stage there.
    """

    def open_it() -> None:
        if plan.overwrite:
            for lock in (plan.output / WORK).glob("*.lock"):
                busy = f"--overwrite: another run is building {lock.stem} in {plan.output}; wait for it, or end it"
                with _held(lock, busy):
                    pass
            for name in entries:
                path = plan.output / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        plan.output.mkdir(parents=True, exist_ok=True)
        write_text(plan.output / CONFIG_FILE, plan.config.to_yaml())

    once(open_it)


@contextmanager
def _held(lock: Path, busy: str) -> Iterator[None]:
    """Hold a lock, which goes with the process that has it, however that ends.

    Raises:
        StageError: with the message ``busy``: another process has it.
    """
    try:
        held = FileLock(lock).acquire(timeout=0)
    except Timeout:
        raise StageError(busy) from None
    with held:
        yield


class Stages:
    """Folders that are built once: under ``work/`` first, under their own name when complete."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.done: list[dict[str, Any]] = []

    def build(self, name: str, make: Callable[[Path], int], what: str, *, alone: bool = False) -> Path:
        """Return the folder ``name``; ``make(folder)`` fills it and returns how many rows or steps that took.

        ``make`` may find its own earlier, interrupted work in ``self.scratch(name)``. Several processes carry it out
        together, as a training wants it, each in a folder of its own, of which the first one's is kept; with ``alone``
        the first does, and the others wait. Several runs may fill one output, as long as each builds stages of its own.

        Raises:
            StageError: another run is building this stage.
        """
        final = self.output / name
        hands = 1 if alone else processes().num_processes
        record = once(lambda: self._record(name))
        if record is None:
            with self._building(name) as folder:
                # Another run may have built it between the look and the lock.
                record = once(lambda: self._record(name))
                if record is None:
                    say(f"[{name}] {what}")
                    start = time.perf_counter()
                    rows = once(lambda: make(folder)) if alone else make(folder)
                    seconds = round(time.perf_counter() - start, 2)
                    taken = {"name": name, "seconds": seconds, "rows": rows, "processes": hands}
                    once(lambda: self._publish(folder, final, taken))
                    say(f"[{name}] {seconds:.1f} s")
                    self.done.append(taken)
                    return final
        # Each process has batches of its own: a training by another number of them had steps of another size.
        # A run of an older version does not say how many.
        made = record.get("processes", hands)
        other = "" if made == hands else f", made by {made} processes, not {hands}"
        say(f"[{name}] kept from before{other}")
        self.done.append(record)
        return final

    def _record(self, name: str) -> dict[str, Any] | None:
        found = self.output / name / STAGE_FILE
        return json.loads(found.read_text(encoding="utf-8")) if self.has(name) else None

    def has(self, name: str) -> bool:
        """Whether the stage ``name`` is finished."""
        return (self.output / name / STAGE_FILE).is_file()

    @contextmanager
    def _building(self, name: str) -> Iterator[Path]:
        """An empty folder; what other processes than the first leave in theirs is thrown away."""
        if not processes().is_main_process:
            with tempfile.TemporaryDirectory() as folder:
                yield Path(folder)
            return
        building = self.scratch(f"{name}.new")
        building.parent.mkdir(parents=True, exist_ok=True)
        busy = (
            f"{self.output / name} is being built by another run in the same folder, whose work this one would "
            "destroy. Wait for that one, then the same command with --resume goes on; or name another --output"
        )
        with _held(self.scratch(f"{name}.lock"), busy):
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir()
            yield building

    def _publish(self, building: Path, final: Path, record: Mapping[str, Any]) -> None:
        write_text(building / STAGE_FILE, json.dumps(record))
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(building, final)
        shutil.rmtree(self.scratch(str(record["name"])), ignore_errors=True)

    def clear(self) -> None:
        """Remove what the stages of this run have left of their work; that of another run stays."""
        for record in self.done:
            for leftover in (self.scratch(record["name"]), self.scratch(f"{record['name']}.new")):
                shutil.rmtree(leftover, ignore_errors=True)
            self.scratch(f"{record['name']}.lock").unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or never made
            (self.output / WORK).rmdir()

    def scratch(self, name: str) -> Path:
        """Return the folder where the unfinished work of a stage lies."""
        return self.output / WORK / name.replace("/", "-")


def checkpoint_in(folder: Path) -> str | None:
    """Return the last complete checkpoint of an interrupted training, as ``Trainer.train`` wants it."""
    found = once(lambda: last_checkpoint(folder))
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
    """Let a trainer say its progress in a line, in the first process."""
    trainer.remove_callback(PrinterCallback)
    if trainer.is_world_process_zero():
        trainer.add_callback(Progress(metric))
