# SPDX-License-Identifier: Apache-2.0
"""What the recipes share that train encoders on a stream of plain texts: configuration, plan, arguments."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from pydistill import _dispatch
from pydistill.config import BaseRun, TrainBlock
from pydistill.data.corpus import CorpusSection, load_corpus
from pydistill.plan import DATA_FILE, PlanBase, PlanError, length_limit, process_count
from pydistill.recipes.stages import Stages
from pydistill.report import METRICS_FILE, Page, text_table, write_report, write_text
from pydistill.trainer import TRAINER_STATE, rows_per_step

# What a finished training says of itself, beside its weights.
TRAINING_FILE = "training.json"
# How many of the first texts tell one corpus from another: a stream is not read to its end for that.
FINGERPRINT_TEXTS = 256
# Batches that a plan times, after one that warms up.
TIMED_BATCHES = 2
# Rows of a batch where no batch size is configured.
ROWS_PER_BATCH = 32
# Longest texts that time a finished model: those of a corpus for 512 tokens would take minutes.
TIMED_LENGTH = 128


class CorpusRun(BaseRun):
    """A run that trains encoders on plain texts."""

    seed: int = 1
    corpus: CorpusSection
    sample_tokens: int = Field(8192, gt=0, description="tokens of the corpus that the initialisation svd looks at")
    evaluation_texts: int = Field(256, gt=0, description="texts, at most, that losses are measured on")
    train: TrainBlock = Field(default_factory=dict, description="TrainingArguments of every training")

    @property
    def timed_length(self) -> int:
        """The longest texts that time a finished model, in tokens."""
        return min(self.corpus.max_length, TIMED_LENGTH)


def check_steps(block: Mapping[str, Any], what: str) -> list[str]:
    """Return what keeps a training on an endless stream from ending."""
    if block.get("max_steps", -1) > 0:
        return []
    return [f"train.max_steps: the corpus is read as an endless stream: say how many steps {what} takes"]


def check_workers(block: Mapping[str, Any], key: str) -> list[str]:
    """Return whether more processes are to read the stream than can."""
    count = block.get("dataloader_num_workers", 0)
    if count <= 1:
        return []
    return [
        f"{key}.dataloader_num_workers: the corpus is one stream, which several workers cannot share: set it to 0 or "
        f"1, got {count}"
    ]


def check_length(config: CorpusRun, named: str, model: PretrainedConfig, tokenizer: Any) -> list[str]:
    """Return whether texts are longer than the model that is ``named`` so reads."""
    limit = length_limit(model, tokenizer)
    if limit is None or config.corpus.max_length <= limit:
        return []
    return [f"corpus.max_length: must be at most {limit}, the limit of {named}, got {config.corpus.max_length}"]


def corpus_sources(config: CorpusRun) -> dict[str, str | None]:
    """Return the files of the corpus, by key."""
    return {f"corpus.files ({name})": name for name in config.corpus.files or ()}


def first_texts(corpus: CorpusSection, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts that tell the corpus from another.

    Raises:
        CorpusError: it cannot be read, or a part of it holds no text.
    """
    if corpus.held_out:
        load_corpus(corpus, tokenizer, part="held_out").first_texts(1)
    return load_corpus(corpus, tokenizer).first_texts(FINGERPRINT_TEXTS)


def first_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, count: int, max_length: int
) -> dict[str, Tensor]:
    """Return as many of the first ``texts`` as have ``count`` tokens, in one batch."""
    rows = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
    reached = itertools.accumulate(map(len, rows))
    needed = 1 + sum(1 for total in reached if total < count)
    return dict(tokenizer.pad({"input_ids": rows[:needed]}, return_tensors="pt"))


def fingerprint(corpus: CorpusSection, texts: Sequence[str]) -> str:
    """Return a hash of the sources and of the first texts."""
    return hashlib.sha256("\n".join([*(corpus.files or ()), *texts]).encode("utf-8", "surrogatepass")).hexdigest()


def check_same_corpus(corpus: CorpusSection, output: Path, texts: Sequence[str]) -> None:
    """Refuse to continue a run whose corpus has changed since."""
    recorded = output / DATA_FILE
    if recorded.is_file() and recorded.read_text(encoding="utf-8") != fingerprint(corpus, texts):
        raise PlanError(
            f"output: the corpus has changed since the run in {output} was started; choose another folder, or "
            "--overwrite"
        )


def describe_run(result: PlanBase, corpus: CorpusSection) -> None:
    """Begin the table of a plan: the recipe, where it writes, what it reads."""
    result.add("run", "recipe", result.config.recipe)
    result.add("run", "output", f"{result.output}{' (continued)' if result.resume and result.output.exists() else ''}")
    result.add("corpus", "texts", corpus.dataset or ", ".join(corpus.files or ()))
    kept = f"; every {corpus.held_out}th text held out" if corpus.held_out else ""
    result.add("corpus", "rows", f"{corpus.packing}, at most {corpus.max_length} tokens{kept}")


def describe_machine(result: PlanBase, loss: str | None = None) -> None:
    """End the table of a plan: the device, and the kernel of ``loss``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shared = f", in each of {process_count()} processes" if process_count() > 1 else ""
    result.add("machine", "device", f"{device}, {torch.get_num_threads()} threads{shared}")
    if loss is not None:
        chosen = _dispatch.resolve(loss, torch.device(device))
        result.add("machine", "kernel", f"{chosen}: {_dispatch.BACKENDS[loss][chosen].reason}")


def describe_sizes(config: PretrainedConfig) -> str:
    """Say how large an encoder is."""
    return f"{config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads"


def describe_block(block: Mapping[str, Any]) -> str:
    """Say what ``TrainingArguments`` a training has."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in block.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items())


def seconds_per_step(
    step: nn.Module,
    stream: Iterator[Any],
    collate: Callable[[list[Any]], Mapping[str, Tensor]],
    block: Mapping[str, Any],
) -> float:
    """Return how long an optimizer step of a `Distiller` takes, timed on a few batches of the stream."""
    device = next(step.parameters()).device
    rows = block.get("per_device_train_batch_size", ROWS_PER_BATCH)
    for number in range(1 + TIMED_BATCHES):
        if number == 1:
            start = time.perf_counter()
        batch = collate(list(itertools.islice(stream, rows)))
        loss = step(**{name: value.to(device) for name, value in batch.items()}).loss
        assert loss is not None
        loss.backward()
    return (time.perf_counter() - start) / TIMED_BATCHES * block.get("gradient_accumulation_steps", 1)


def finish(
    stages: Stages, results: Mapping[str, Any], page: Callable[[Path, dict[str, Any]], Page], students: str
) -> None:
    """Write the results and the report of a run, drop its unfinished work, and say what came out.

    Args:
        stages: of the run, all built.
        results: the content of ``metrics.json``.
        page: see `pydistill.report.write_report`.
        students: the entry of the folder that holds what was trained.
    """
    output = stages.output
    write_text(output / METRICS_FILE, json.dumps(results, indent=1))
    stages.clear()
    report, shown = write_report(output, page)
    print(f"\n{text_table(shown.table)}\n{shown.lead}\n{shown.measured}\n")
    lines = {"report": report, students: output / students, "try it": shown.next_step}
    width = 1 + max(map(len, lines))
    print("\n".join(f"{name + ':':<{width}} {value}" for name, value in lines.items()))


def stream_arguments(block: Mapping[str, Any], scratch: Path, seed: int) -> TrainingArguments:
    """``TrainingArguments`` of the configuration, with what a run needs where the configuration is silent."""
    defaults: dict[str, Any] = {
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        # The rows of packed batches differ in length: each process takes its own from the stream.
        "accelerator_config": {"dispatch_batches": False},
    }
    return TrainingArguments(
        output_dir=str(scratch), seed=seed, data_seed=seed, remove_unused_columns=False, **defaults | dict(block)
    )


def rows_until(checkpoint: str, arguments: TrainingArguments) -> int:
    """How many rows of the stream the trainer is about to skip."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE).read_text(encoding="utf-8"))
    return state["global_step"] * rows_per_step(arguments)
