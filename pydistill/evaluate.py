# SPDX-License-Identifier: Apache-2.0
"""How good an encoder is: it is fine-tuned on labelled tasks with several seeds and scored on held-out rows."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pydistill import _dispatch
from pydistill.config import DataConfig, Distinct, OneOrMore, Section, TaskName, TrainBlock, UserError, resolve_path
from pydistill.data.tasks import Task, load_task
from pydistill.inference import ModelError, load_tokenizer, predict_logits
from pydistill.metrics import metrics_of
from pydistill.plan import CONFIG_FILE, data_fingerprint, quiet, resolve_model
from pydistill.report import METRICS_FILE, mean_and_spread, text_table, write_text

SCORE_METRICS = ("pearson", "spearman", "pearson_spearman")
# Folder of the finished fine-tunings inside the output folder.
RUNS = "runs"
# What fine-tuning does where the configuration is silent: the usual recipe for encoders of BERT's kind.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
}


class EvaluateError(UserError):
    """A model cannot be loaded, or a fine-tuning ended without usable numbers."""


class TaskSection(Section):
    """One labelled task."""

    data: DataConfig
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman", "pearson_spearman"] = Field(
        "accuracy", description="the correlations take the labels as scores, and pearson_spearman is the mean of two"
    )
    train: TrainBlock = Field(default_factory=dict, description="TrainingArguments of this task alone")


class EvaluateConfig(Section):
    """What ``pydistill evaluate`` does."""

    model: Annotated[OneOrMore[str], Field(min_length=1), Distinct]
    tokenizer: str | None = Field(None, description="when it is not in the model's folder")
    tasks: Annotated[dict[TaskName, TaskSection], Field(min_length=1)]
    output: str
    seeds: Annotated[OneOrMore[int], Distinct] = Field([1, 2, 3], min_length=1)
    max_length: int = Field(128, gt=1, description="sub-word tokens kept per row, special tokens included")
    train: TrainBlock = Field(default_factory=dict, description="TrainingArguments of all tasks")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Fine-tune every model on every task with every seed, and score it after the last step.

    The reported rows are the task's test rows, or its dev rows where there are none; nothing is selected on them.
    Every finished fine-tuning is a file under ``runs/`` of the output folder that holds its settings with its numbers:
    the same settings are not done again, others replace it.

    Returns:
        The content of ``metrics.json``: for each model and task the metric, and the numbers of every seed.

    Raises:
        DataError: a task's files, see :func:`pydistill.data.tasks.load_task`.
        PlanError: a model's folder does not exist.
        EvaluateError: a model or its tokenizer cannot be loaded, or the logits are not finite.
    """
    # Everything that can be wrong comes before the first fine-tuning.
    tasks = {name: load_task(one.data, scores=one.metric in SCORE_METRICS) for name, one in config.tasks.items()}
    models = {name: resolve_model(name, "model") for name in config.model}
    tokenizers = {name: _tokenizer(config, source) for name, source in models.items()}
    output = Path(config.output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / CONFIG_FILE, config.to_yaml())

    rows = []
    for name, source in models.items():
        identity = {"model": name, "weights": _weights_hash(source), "tokenizer": _tokenizer_hash(tokenizers[name])}
        scores: dict[str, Any] = {}
        for task_name, section in config.tasks.items():
            task = tasks[task_name]
            arguments = DEFAULTS | config.train | section.train
            runs = []
            for seed in config.seeds:
                settings = identity | {
                    "data": data_fingerprint(task),
                    "train": arguments,
                    "max_length": config.max_length,
                    "seed": seed,
                }
                label = f"{_folder_name(name)}/{task_name}-seed{seed}"
                path = output / RUNS / f"{label}.json"
                found = _finished(path, settings)
                if found is not None:
                    print(f"[{label}] kept from before", flush=True)
                else:
                    start = time.perf_counter()
                    with quiet():
                        numbers = _fine_tune(source, tokenizers[name], task, arguments, config.max_length, seed, label)
                    found = {"numbers": numbers, "seconds": round(time.perf_counter() - start, 1)}
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, json.dumps({"settings": settings} | found, indent=1))
                    print(
                        f"[{label}] {section.metric} {100 * numbers[section.metric]:.1f}, {found['seconds']:.1f} s",
                        flush=True,
                    )
                runs.append({"seed": seed} | found)
            values = [run["numbers"][section.metric] for run in runs]
            split = "dev" if task.test_is_dev else "test"
            scores[task_name] = {
                "metric": section.metric,
                "rows": {"train": task.counts["train"], split: task.counts[split]},
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "runs": runs,
            }
        average = statistics.fmean(score["mean"] for score in scores.values())
        rows.append({"model": name, "tasks": scores, "average": average})
    results = {
        "config": config.model_dump(mode="json"),
        "models": rows,
        "notes": {name: list(task.notes) for name, task in tasks.items() if task.notes},
        "environment": _dispatch.environment(),
    }
    write_text(output / METRICS_FILE, json.dumps(results, indent=1))
    print(f"\n{text_table(table(results))}\n\nnumbers: {output / METRICS_FILE}")
    return results


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the header and one row per model: mean and sample deviation over the seeds, times 100."""
    first = results["models"][0]["tasks"]
    rows = [["model", *(f"{name}, {score['metric']}" for name, score in first.items())]]
    for model in results["models"]:
        cells = []
        for score in model["tasks"].values():
            cells.append(mean_and_spread([100 * run["numbers"][score["metric"]] for run in score["runs"]]))
        rows.append([model["model"], *cells])
    if len(first) > 1:
        rows[0].append("average")
        for row, model in zip(rows[1:], results["models"], strict=True):
            row.append(f"{100 * model['average']:.1f}")
    return rows


def _tokenizer(config: EvaluateConfig, model: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(resolve_path(config.tokenizer) if config.tokenizer else model)
    except ModelError as error:
        raise EvaluateError(f"tokenizer: {error}; name one with --tokenizer FOLDER") from None


def _weights_hash(source: str) -> str | None:
    """A hash of the weights in a folder: a student that was trained again is another model under the same name."""
    digest = hashlib.sha256()
    files = sorted(Path(source).glob("*.safetensors")) or sorted(Path(source).glob("pytorch_model*.bin"))
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of how texts are cut: before the first of them, since cutting leaves its settings in the tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _folder_name(model: str) -> str:
    # Readable, and still another one for another model of the same last name.
    last = re.sub(r"[^\w.-]+", "-", Path(model).name) or "model"
    return f"{last}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def _finished(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    # Through json and back: tuples and numbers compare as they were written.
    if record.pop("settings") != json.loads(json.dumps(settings)):
        print(f"[{path.parent.name}/{path.stem}] its settings have changed: done again", flush=True)
        return None
    return record


def _fine_tune(
    source: str, tokenizer: Any, task: Task, arguments: Mapping[str, Any], max_length: int, seed: int, label: str
) -> dict[str, float]:
    set_seed(seed)
    labels = dict(enumerate(task.label_names)) or {0: "score"}
    try:
        # A head for other classes is replaced by a new one.
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
            problem_type="single_label_classification" if task.label_names else "regression",
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError) as error:
        raise EvaluateError(f"model: {source}: cannot be loaded: {str(error).splitlines()[0]}") from None

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in task.text_columns]
        return dict(tokenizer(*texts, truncation=True, max_length=max_length))

    train = task.splits["train"].map(encode, batched=True, remove_columns=list(task.text_columns))
    settings: dict[str, Any] = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    settings |= arguments
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(output_dir=scratch, seed=seed, data_seed=seed, **settings),
            train_dataset=train,
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rows = task.splits["dev" if task.test_is_dev else "test"]
    texts = list(zip(*(rows[column][:] for column in task.text_columns), strict=True))
    logits = predict_logits(model.eval(), tokenizer, texts, max_length)
    if not torch.isfinite(logits).all():
        raise EvaluateError(f"{label}: the fine-tuned model's logits are not finite; lower train.learning_rate")
    return metrics_of(logits.numpy(), np.asarray(rows["labels"][:]), len(task.label_names))
