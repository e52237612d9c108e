# SPDX-License-Identifier: Apache-2.0
"""Liu et al. 2019 (arXiv 1904.09482), MT-DNN-KD: several tasks, a teacher or an ensemble for some, one student for all.

Stages, each in a folder that appears under its name only when it is complete: ``single/TASK-seedN``, ``mtdnn/seedN``,
``teachers/TASK-N``, ``targets/TASK``, ``mtdnn_kd/seedN``, ``fine_tuned/ARM-seedN-TASK``. A run that was interrupted
goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset, load_from_disk
from pydantic import Field, model_validator
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from pydistill import _dispatch
from pydistill.cache import TeacherCache, record_logits, whole_logits
from pydistill.capture import LOGITS
from pydistill.config import BaseRun, DataConfig, Distinct, OneOrMore, Section, TaskName, TrainBlock
from pydistill.data.tasks import Task, example_row, load_task
from pydistill.distiller import Distiller
from pydistill.evaluate import SCORE_METRICS
from pydistill.inference import class_names, load_tokenizer, predict_logits
from pydistill.metrics import metrics_of, ranking_metrics
from pydistill.multitask import Strategy, TaskCollator, TaskLoss, TaskMixture
from pydistill.plan import (
    CONFIG_FILE,
    DATA_FILE,
    PlanBase,
    PlanError,
    check_labels,
    check_output,
    collect,
    data_fingerprint,
    duration,
    length_limit,
    load_model_config,
    quiet,
    refused_arguments,
    resolve_model,
    teacher_tokenizer,
)
from pydistill.recipes.mtdnn_report import page
from pydistill.recipes.pretraining import TRAINING_FILE, describe_block, describe_machine, finish
from pydistill.recipes.stages import WORK, Stages, attach_progress, checkpoint_in, once, open_output
from pydistill.report import METRICS_FILE, REPORT_FILE, write_text
from pydistill.students.multitask import Head, Kind, MultiTaskConfig, MultiTaskModel, task_settings
from pydistill.teachers import RECORDED_LOGITS, mean_prediction
from pydistill.trainer import DistillationTrainer

Arm = Literal["single", "mtdnn", "mtdnn_kd"]
RANK_METRICS = ("hits", "mrr")
OWN_PICTURES = ("comparison.png", "curves.png")
OWN_ENTRIES = (
    *("single", "mtdnn", "teachers", "cache", "targets", "mtdnn_kd", "fine_tuned", WORK),
    *(METRICS_FILE, REPORT_FILE, CONFIG_FILE, DATA_FILE),
    *OWN_PICTURES,
)
# Where the configuration is silent; the paper's, with AdamW for its Adamax.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 32,
    "warmup_steps": 0.1,  # below 1: a share of all steps
    "train_sampling_strategy": "group_by_length",
}


class EncoderSection(Section):
    """What all models begin as: a hub name, a folder, or ``package:NAME/FOLDER`` of an installed package."""

    model: str
    tokenizer: str | None = Field(None, description="when it is not in the model's folder")
    max_length: int = Field(128, gt=1, description="sub-word tokens kept per row, special tokens included")


class TaskSection(Section):
    """One labelled task: of single texts, or of pairs where data.text_columns names two."""

    data: DataConfig
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman", "pearson_spearman", "hits", "mrr"] = Field(
        "accuracy",
        description="correlations make it a regression; hits (the first candidate is right) and mrr a ranking: rows "
        "with the same first text compete, and the second of data.labels marks the right one",
    )
    head: Head = Field("linear", description="san: the stochastic answer module, for pairs")
    dropout: float | None = Field(None, ge=0, lt=1, description="of its head; absent: the architecture's own")
    teachers: OneOrMore[str] = Field(
        default_factory=list, description="fine-tuned models; several are an ensemble, the mean of their probabilities"
    )
    train_teachers: int = Field(0, ge=0, description="fine-tune so many teachers in this run instead")
    hard_weight: float | None = Field(
        None, ge=0, le=1, description="where it has a teacher; absent: objective.hard_weight"
    )

    @model_validator(mode="after")
    def _one_kind_of_teacher(self) -> TaskSection:
        if self.teachers and self.train_teachers:
            raise ValueError("give teachers, which are fine-tuned already, or train_teachers; not both")
        return self

    @property
    def kind(self) -> Kind:
        """What its metric makes of it."""
        if self.metric in SCORE_METRICS:
            return "regression"
        return "ranking" if self.metric in RANK_METRICS else "classification"

    @property
    def taught(self) -> bool:
        """Whether it has a teacher."""
        return bool(self.teachers or self.train_teachers)


class TeachersSection(Section):
    """How teachers are fine-tuned that the run trains itself, and how they label the rows."""

    start: Literal["mtdnn", "encoder"] = Field(
        "mtdnn", description="mtdnn: the encoder of the arm mtdnn, trained on all tasks (the paper), under a new head"
    )
    train: TrainBlock = Field(default_factory=dict, description="TrainingArguments that differ from train")
    batch_tokens: int = Field(4096, gt=0, description="tokens per batch of the labelling pass")
    cache: str | None = Field(
        None,
        description="folder with a cache of logits for each teacher, TASK-1, TASK-2, ...: what one lacks is computed "
        "and added; absent: the run's own",
    )


class MixingSection(Section):
    """How the batches of an epoch, each of one task, are put together; see `pydistill.multitask.TaskMixture`."""

    strategy: Strategy = Field("proportional", description="rows per epoch: all, or of as many in all, or capped")
    cap: int | None = Field(None, gt=0, description="most rows of a task per epoch; strategy capped")
    pack_once: bool = Field(False, description="the same rows share a batch in every epoch (the paper's algorithm)")

    @model_validator(mode="after")
    def _cap_where_capped(self) -> MixingSection:
        if (self.strategy == "capped") != (self.cap is not None):
            raise ValueError("cap goes with strategy capped, and that one needs it")
        if self.pack_once and self.strategy != "proportional":
            raise ValueError(
                f"pack_once goes with strategy proportional: {self.strategy} reads tasks in part, and the rest of "
                "their rows would never be seen"
            )
        return self


class ObjectiveSection(Section):
    """``hard_weight * loss of the labels + (1 - hard_weight) * loss of the soft targets``, where there is a teacher."""

    hard_weight: float = Field(0.5, ge=0, le=1)


class MTDNNConfig(BaseRun):
    """The recipe ``mtdnn``."""

    encoder: EncoderSection
    tasks: Annotated[dict[TaskName, TaskSection], Field(min_length=1)]
    arms: Annotated[OneOrMore[Arm], Distinct] = Field(
        ["mtdnn", "mtdnn_kd"],
        min_length=1,
        description="single: a model per task; mtdnn: one for all; mtdnn_kd: the same with soft targets",
    )
    seeds: Annotated[OneOrMore[int], Distinct] = Field([1], min_length=1)
    teachers: TeachersSection = Field(default_factory=TeachersSection)
    mixing: MixingSection = Field(default_factory=MixingSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    train: TrainBlock = Field(default_factory=dict, description="TrainingArguments of every training")
    fine_tune: TrainBlock | None = Field(
        None, description="TrainingArguments, beside train's, for tuning mtdnn and mtdnn_kd on each task; absent: none"
    )

    @model_validator(mode="after")
    def _teaches_something(self) -> MTDNNConfig:
        if "mtdnn_kd" in self.arms and not any(task.taught for task in self.tasks.values()):
            raise ValueError("the arm mtdnn_kd needs a task with a teacher: give tasks.NAME.teachers or train_teachers")
        return self

    @property
    def taught(self) -> list[str]:
        """The tasks that have a teacher."""
        return [name for name, section in self.tasks.items() if section.taught]


@dataclass
class MTDNNPlan(PlanBase):
    """A run that can start: its tasks, its encoder and the teachers that exist already."""

    config: MTDNNConfig
    encoder: str
    tokenizer: PreTrainedTokenizerBase
    tasks: dict[str, Task]
    teachers: dict[str, list[str]]  # folders or hub names, of tasks whose teachers are given

    def settings(self, name: str) -> dict[str, Any]:
        """What the model knows of a task."""
        return _settings(self.config.tasks[name], self.tasks[name])


# --------------------------------------------------------------------------- plan


def plan_mtdnn(config: MTDNNConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> MTDNNPlan:
    """Check everything that can be checked without working, and say what the run will do.

    Raises:
        PlanError: listing every reason: data that cannot be read or does not fit its metric, teachers with other labels
            than the data, heads that the encoder cannot have, texts longer than its limit, an output folder that holds
            another run, training arguments that contradict each other.
    """
    problems: list[str] = []
    output = Path(config.output).expanduser()
    sources: dict[str, str | None] = {
        "encoder.model": config.encoder.model,
        "encoder.tokenizer": config.encoder.tokenizer,
        "teachers.cache": config.teachers.cache,
    }
    for name, section in config.tasks.items():
        sources |= {f"tasks.{name}.data.{split}": getattr(section.data, split) for split in ("train", "dev", "test")}
        sources |= {f"tasks.{name}.teachers ({one})": one for one in section.teachers}
    collect(problems, check_output, config, output, resume, overwrite, sources)
    blocks = {"train": config.train, "teachers.train": config.teachers.train, "fine_tune": config.fine_tune or {}}
    problems += refused_arguments({key: _block(config, own) for key, own in blocks.items()})
    problems += [
        f"{key}.eval_strategy: must be no, got {block['eval_strategy']!r}: models are scored after the last step"
        for key, block in blocks.items()
        if block.get("eval_strategy", "no") != "no"
    ]
    problems += [
        f"{key}.save_strategy: must not be best: nothing is evaluated before the last step"
        for key, block in blocks.items()
        if block.get("save_strategy") == "best"
    ]
    tasks = {name: collect(problems, _load, name, section) for name, section in config.tasks.items()}
    encoder = collect(problems, resolve_model, config.encoder.model, "encoder.model")
    model_config = collect(problems, _encoder_config, encoder) if encoder is not None else None
    tokenizer = None
    if model_config is not None:
        tokenizer = collect(problems, teacher_tokenizer, config.encoder.tokenizer, encoder, "encoder.tokenizer")
        limit = length_limit(model_config, tokenizer)
        if limit is not None and config.encoder.max_length > limit:
            problems.append(
                f"encoder.max_length: must be at most {limit}, the limit of {config.encoder.model}, got "
                f"{config.encoder.max_length}"
            )
        for name, section in config.tasks.items():
            if tasks[name] is not None:
                problems += _check_head(name, section, tasks[name], model_config, tokenizer)
    teachers = {}
    for name, section in config.tasks.items():
        found = [collect(problems, _teacher, name, one, section, tasks[name]) for one in section.teachers]
        teachers[name] = [one for one in found if one is not None]
        if section.taught and "mtdnn_kd" in config.arms and config.teachers.cache is not None:
            kept = None if overwrite else output
            problems += _check_caches(name, section, Path(config.teachers.cache).expanduser(), kept)
        if resume and section.train_teachers:
            problems += _check_starts(config, name, output)
    complete = {name: task for name, task in tasks.items() if task is not None}
    if resume and len(complete) == len(tasks):
        collect(problems, _check_same_rows, complete, output)
    if problems or encoder is None or tokenizer is None:
        raise PlanError("\n".join(problems))

    result = MTDNNPlan(config, output, encoder, tokenizer, complete, teachers, resume=resume, overwrite=overwrite)
    _describe(result)
    if dry_run:
        with quiet():
            _dry_run(result)
    return result


def _load(name: str, section: TaskSection) -> Task:
    try:
        task = load_task(section.data, scores=section.kind == "regression", by_first_text=section.kind == "ranking")
    except ValueError as error:
        raise PlanError(f"tasks.{name}: {error}") from None
    if section.kind == "ranking":
        if not task.pair or len(task.label_names) != 2:
            raise PlanError(
                f"tasks.{name}: a ranking needs pairs of texts with two labels, got {len(task.text_columns)} text "
                f"columns and the labels {', '.join(task.label_names)}; or choose another metric"
            )
        for split in ("train", "dev", "test"):
            if not queries(task.splits[split], task.text_columns[0]):
                raise PlanError(
                    f"tasks.{name}: no query of {split} has two candidates or more of which one is right; the second "
                    f"of data.labels ({task.label_names[1]}) marks the right one"
                )
    return task


def _encoder_config(source: str) -> PretrainedConfig:
    """Of the encoder alone, where a model of several tasks is named."""
    config = load_model_config(source, "encoder.model")
    return AutoConfig.for_model(**config.encoder) if isinstance(config, MultiTaskConfig) else config


def _check_head(name: str, section: TaskSection, task: Task, encoder: PretrainedConfig, tokenizer: Any) -> list[str]:
    problems = []
    typed = getattr(encoder, "type_vocab_size", 0) >= 2
    if tokenizer is not None:
        typed = typed and "token_type_ids" in tokenizer.model_input_names
    if section.head == "san" and task.pair and not typed:
        problems.append(
            f"tasks.{name}.head: san reads from token types which text is which, and {encoder.model_type} has none; "
            "use linear"
        )
    try:
        MultiTaskConfig(encoder=encoder.to_dict(), tasks={name: _settings(section, task)}).classifier(name)
    except ValueError as error:
        problems.append(f"tasks.{name}: {error}")
    return problems


def _settings(section: TaskSection, task: Task) -> dict[str, Any]:
    labels = task.label_names if section.kind == "classification" else ()
    return task_settings(section.kind, labels=labels, pair=task.pair, head=section.head, dropout=section.dropout)


def _teacher(name: str, source: str, section: TaskSection, task: Task | None) -> str:
    """Where a teacher is that exists already.

    Raises:
        PlanError: it does not, it has no head for this task, or other labels.
    """
    key = f"tasks.{name}.teachers"
    found = resolve_model(source, key)
    config = load_model_config(found, key)
    if isinstance(config, MultiTaskConfig):
        if name not in config.tasks:
            raise PlanError(f"{key}: {source} knows the tasks {', '.join(config.tasks)}, not {name}")
        config.select(name)
    elif not any(one.endswith("ForSequenceClassification") for one in config.architectures or []):
        raise PlanError(
            f"{key}: {source} has no classification head ({', '.join(config.architectures or ['unknown'])}); name a "
            "fine-tuned model, or let the run fine-tune some: train_teachers"
        )
    load_tokenizer(found)
    if section.kind != "classification":
        if config.num_labels != 1:
            raise PlanError(f"{key}: {source} must have one output, a score, got {config.num_labels}")
    elif task is not None and (problems := check_labels(key, source, class_names(config), task)):
        raise PlanError("\n".join(problems))
    return found


def _check_caches(name: str, section: TaskSection, folder: Path, kept: Path | None) -> list[str]:
    """Return why a task's caches cannot be those of its teachers, of which finished ones are ``kept`` there."""
    problems = []
    for number in range(1, (section.train_teachers or len(section.teachers)) + 1):
        cache = folder / f"{name}-{number}"
        trained = kept is not None and Stages(kept).has(f"teachers/{name}-{number}")
        try:
            found = whole_logits(cache)
        except ValueError as error:
            problems.append(f"teachers.cache: {error}")
            continue
        if found is not None and section.train_teachers and not trained:
            problems.append(
                f"teachers.cache: {cache} is of another teacher: that of this run is yet to be trained. Choose another "
                f"folder, or give that teacher (tasks.{name}.teachers) instead of train_teachers"
            )
    return problems


def _start_seed(config: MTDNNConfig, number: int) -> int | None:
    """The seed of the model that the ``number``-th teacher of a task, from 1, goes on from: as many different ones as
    there are; None: the encoder."""
    return config.seeds[(number - 1) % len(config.seeds)] if config.teachers.start == "mtdnn" else None


def _start(seed: int | None) -> str:
    """What the record of a teacher calls its start."""
    return "encoder" if seed is None else f"mtdnn/seed{seed}"


def _check_starts(config: MTDNNConfig, name: str, output: Path) -> list[str]:
    """Return whether teachers that are finished would be others in a run of these seeds from its beginning."""
    problems = []
    for number in range(1, config.tasks[name].train_teachers + 1):
        folder, now = output / f"teachers/{name}-{number}", _start(_start_seed(config, number))
        if (folder / TRAINING_FILE).is_file() and (before := _record(folder).get("start", now)) != now:
            problems.append(
                f"seeds: the teacher {folder} was fine-tuned from {before}, and would be from {now} with the seeds "
                f"{', '.join(map(str, config.seeds))}: take another output, or teachers.start encoder"
            )
    return problems


def _check_same_rows(tasks: Mapping[str, Task], output: Path) -> None:
    recorded = output / DATA_FILE
    if recorded.is_file() and recorded.read_text(encoding="utf-8") != _fingerprint(tasks):
        raise PlanError(
            f"output: the rows have changed since the run in {output} was started; choose another folder, or "
            "--overwrite"
        )


def _fingerprint(tasks: Mapping[str, Task]) -> str:
    parts = [f"{name} {data_fingerprint(task)}" for name, task in tasks.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _block(config: MTDNNConfig, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return DEFAULTS | config.train | dict(own or {})


def _describe(result: MTDNNPlan) -> None:
    config = result.config
    result.add("run", "recipe", config.recipe)
    result.add("run", "output", f"{result.output}{' (continued)' if result.resume and result.output.exists() else ''}")
    result.add("run", "arms", f"{', '.join(config.arms)}; seeds {', '.join(map(str, config.seeds))}")
    result.add("encoder", "model", config.encoder.model)
    for name, section in config.tasks.items():
        task = result.tasks[name]
        what = f"{section.kind} of {'pairs' if task.pair else 'texts'}"
        classes = f": {', '.join(task.label_names)}" if section.kind == "classification" else ""
        split = "dev" if task.test_is_dev else "test"
        result.add("tasks", name, f"{what}{classes}; {section.metric}; {section.head} head")
        result.add("tasks", "", f"{task.counts['train']:,} rows, {task.counts[split]:,} held out")
        if section.kind == "ranking":
            asked = queries(task.splits["train"], task.text_columns[0])
            result.add("tasks", "", f"{len(asked):,} queries, {sum(len(one.rows) for one in asked):,} candidates")
        if section.taught:
            count = section.train_teachers or len(section.teachers)
            how = f"fine-tuned here, from {config.teachers.start}" if section.train_teachers else "given"
            weight = config.objective.hard_weight if section.hard_weight is None else section.hard_weight
            result.add("tasks", "", f"teachers: {count}, {how}; weight of the hard labels {weight:g}")
        for note in task.notes:
            result.add("tasks", "", note)
    mixing = config.mixing
    result.add(
        "training", "mixing", f"{mixing.strategy}{f', at most {mixing.cap:,} rows' if mixing.cap is not None else ''}"
    )
    result.add("training", "arguments", describe_block(_block(config)))
    if config.fine_tune is not None:
        result.add("training", "fine-tuning", describe_block(config.fine_tune) or "the same arguments")
    describe_machine(result, "soft_target")


def _dry_run(result: MTDNNPlan) -> None:
    """Time a step of each task: what an epoch takes, and the run."""
    config = result.config
    model = _new_model(result, result.encoder, list(config.tasks), seed=0)
    step = Distiller(model, None, TaskLoss(_kinds(config))).to("cuda" if torch.cuda.is_available() else "cpu").train()
    collate = TaskCollator(result.tokenizer)
    arguments = _arguments(_block(config), result.output, 0, unused=False)
    size = arguments.train_batch_size
    seconds: dict[str, float] = {}
    for name in config.tasks:
        rows = encode_rows(result, name, _first_rows(result, name, size))
        batches = [collate([dict(row) | {"task": name} for row in rows])] * 2
        for number, batch in enumerate(batches):
            start = time.perf_counter()
            given = {key: value if isinstance(value, str) else value.to(model.device) for key, value in batch.items()}
            loss = step(**given).loss
            assert loss is not None
            loss.backward()
            if number:
                seconds[name] = time.perf_counter() - start
    parameters = sum(tensor.numel() for tensor in model.parameters())
    result.add("encoder", "parameters", f"{parameters:,}, with the heads of all tasks")
    epochs = _epochs(arguments, result)
    total = 0.0
    for name, each in seconds.items():
        steps = -(-result.tasks[name].counts["train"] // size)
        result.add("tasks", f"pace of {name}", f"{each:.2f} s a step, {steps:,} steps in all its rows")
        trainings = len(config.seeds) * len(config.arms) + config.tasks[name].train_teachers
        total += trainings * epochs * steps * each
    result.add("run", "time", f"about {duration(total)}, at this pace")


def _first_rows(result: MTDNNPlan, name: str, count: int) -> Dataset:
    """The first rows of a task, or those of its first queries."""
    rows = result.tasks[name].splits["train"]
    if result.config.tasks[name].kind != "ranking":
        return rows.select(range(min(count, len(rows))))
    asked = queries(rows, result.tasks[name].text_columns[0])[:count]
    return rows.select(sorted(number for query in asked for number in query.rows))


def _epochs(arguments: TrainingArguments, result: MTDNNPlan) -> float:
    if arguments.max_steps <= 0:
        return float(arguments.num_train_epochs)
    size = arguments.train_batch_size
    return arguments.max_steps / sum(-(-task.counts["train"] // size) for task in result.tasks.values())


# --------------------------------------------------------------------------- rows


class Query(NamedTuple):
    """A query of a ranking: its rows in the data, and which of them is right."""

    rows: list[int]
    right: int


def queries(rows: Dataset, column: str) -> list[Query]:
    """Rows with the same text in ``column``: the queries with two candidates or more of which exactly one is right."""
    found: dict[str, list[int]] = {}
    for number, text in enumerate(rows[column][:]):
        found.setdefault(text, []).append(number)
    labels = rows["labels"][:]
    asked = []
    for numbers in found.values():
        right = [place for place, number in enumerate(numbers) if labels[number] == 1]
        if len(numbers) > 1 and len(right) == 1:
            asked.append(Query(numbers, right[0]))
    return asked


def encode_rows(plan: MTDNNPlan, name: str, rows: Dataset, targets: Sequence[Any] | None = None) -> Dataset:
    """Token ids, labels and, where there are any, soft targets of a task; a row of a ranking is a query."""
    task, tokenizer = plan.tasks[name], plan.tokenizer

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in task.text_columns]
        coded = tokenizer(*texts, truncation=True, max_length=plan.config.encoder.max_length)
        return {key: coded[key] for key in coded if key != "attention_mask"}

    encoded = rows.map(encode, batched=True, remove_columns=list(task.text_columns))
    columns = {key: encoded[key][:] for key in encoded.column_names}
    if targets is not None:
        columns[RECORDED_LOGITS] = list(targets)
    if plan.config.tasks[name].kind == "ranking":
        asked = queries(rows, task.text_columns[0])
        columns = {
            key: [[values[number] for number in query.rows] for query in asked]
            for key, values in columns.items()
            if key != "labels"
        }
        columns["labels"] = [query.right for query in asked]
        if targets is not None:
            columns[RECORDED_LOGITS] = [_softened(scores) for scores in columns[RECORDED_LOGITS]]
    return Dataset.from_dict(columns)


def _softened(scores: Sequence[Any]) -> list[list[float]]:
    """Scores of K teachers for the candidates of a query ``[C, K]`` -> the logarithm of the mean of their softmaxes
    ``[C, 1]``."""
    by_teacher = torch.tensor(np.asarray(scores)).T  # [K, C]
    return mean_prediction(by_teacher).unsqueeze(-1).tolist()


# --------------------------------------------------------------------------- run


def run(plan: MTDNNPlan) -> dict[str, Any]:
    """Carry out the plan and return its results, the content of ``metrics.json``."""
    with quiet():
        return _Run(plan).whole()


def _kinds(config: MTDNNConfig) -> dict[str, Kind]:
    return {name: section.kind for name, section in config.tasks.items()}


def _new_model(plan: MTDNNPlan, source: str, tasks: Sequence[str], seed: int) -> MultiTaskModel:
    return MultiTaskModel.from_encoder(source, {name: plan.settings(name) for name in tasks}, seed=seed)


def _leaves_parameters_unused(config: PretrainedConfig) -> bool:
    """Whether a step does not reach all parameters: the heads of other tasks, or, by an answer module, the pooler."""
    return len(config.tasks) > 1 or any(settings["head"] == "san" for settings in config.tasks.values())


def _arguments(block: Mapping[str, Any], scratch: Path, seed: int, *, unused: bool) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": unused,
    }
    return TrainingArguments(
        output_dir=str(scratch), seed=seed, data_seed=seed, remove_unused_columns=False, **defaults | dict(block)
    )


class _Run:
    """The stages of a run; each is asked for by those that need it."""

    def __init__(self, plan: MTDNNPlan) -> None:
        self.plan, self.config = plan, plan.config
        self.stages = Stages(plan.output)
        self._built: dict[str, Path] = {}
        self._encoded: dict[tuple[str, bool], Dataset] = {}

    def whole(self) -> dict[str, Any]:
        plan, config = self.plan, self.config
        open_output(plan, OWN_ENTRIES)
        once(lambda: write_text(plan.output / DATA_FILE, _fingerprint(plan.tasks)))
        models: list[dict[str, Any]] = []
        if "mtdnn_kd" in config.arms:
            models.append({"name": "teachers", "tasks": self._teacher_scores()})
        for arm in config.arms:
            models.append({"name": arm, "tasks": self._scores(arm)})
            if config.fine_tune is not None and arm != "single":
                models.append({"name": f"{arm}, fine-tuned", "tasks": self._scores(arm, tuned=True)})
        curves: dict[str, Any] = {arm: self._curves(arm) for arm in config.arms if arm != "single"}
        # What the stages made is the same for all processes, what they timed is not: one of them says it.
        return once(lambda: self._results(models, curves))

    def _results(self, models: Sequence[Mapping[str, Any]], curves: Mapping[str, Any]) -> dict[str, Any]:
        plan, config = self.plan, self.config
        any_folder = self._folders(config.arms[-1], config.seeds[0])[next(iter(config.tasks))]
        model = AutoModelForSequenceClassification.from_pretrained(any_folder)
        results = {
            "recipe": config.recipe,
            "description": config.description,
            "taught": config.taught,
            "rows": {name: task.counts for name, task in plan.tasks.items()},
            "parameters": sum(tensor.numel() for tensor in model.parameters()),
            "models": [dict(model) | {"average": _average(model["tasks"])} for model in models],
            "curves": curves,
            "student": str(any_folder.relative_to(plan.output)),
            "example": self._example(),
            "notes": {name: list(task.notes) for name, task in plan.tasks.items() if task.notes},
            "stages": self.stages.done,
            "environment": _dispatch.environment(),
            "plan": str(plan),
        }
        finish(self.stages, results, page, config.arms[-1])
        return results

    # ---- data

    def _rows(self, name: str, soft: bool) -> Dataset:
        soft = soft and self.config.tasks[name].taught
        if (name, soft) not in self._encoded:
            targets = load_from_disk(str(self._targets(name) / "rows"))[RECORDED_LOGITS][:] if soft else None
            rows = self.plan.tasks[name].splits["train"]
            self._encoded[name, soft] = encode_rows(self.plan, name, rows, targets)
        return self._encoded[name, soft]

    def _example(self) -> dict[str, Any]:
        """A held-out row to try."""
        name, task = next(iter(self.plan.tasks.items()))
        columns = [task.splits["dev"][column][:] for column in task.text_columns]
        return {"task": name, "texts": list(example_row(list(zip(*columns, strict=True))))}

    # ---- stages

    def _folders(self, arm: Arm, seed: int) -> dict[str, Path]:
        """The folder of the model that answers each task."""
        if arm == "single":
            return {name: self._single(name, seed) for name in self.config.tasks}
        return dict.fromkeys(self.config.tasks, self._multi(arm, seed))

    def _single(self, name: str, seed: int) -> Path:
        stage = f"single/{name}-seed{seed}"
        model = self._maker(self.plan.encoder, [name], seed)
        return self._training(stage, f"fine-tune on {name} alone", model, [name], False, _block(self.config), seed)

    def _multi(self, arm: Arm, seed: int) -> Path:
        names = list(self.config.tasks)
        what = f"train on {len(names)} tasks{' with soft targets' if arm == 'mtdnn_kd' else ''}"
        model = self._maker(self.plan.encoder, names, seed)
        return self._training(f"{arm}/seed{seed}", what, model, names, arm == "mtdnn_kd", _block(self.config), seed)

    def _teachers(self, name: str) -> list[str]:
        """Folders of the teachers of a task; trained here where the task says so."""
        section, config = self.config.tasks[name], self.config
        if not section.train_teachers:
            return self.plan.teachers[name]
        folders = []
        block = _block(config, config.teachers.train)
        for number in range(1, section.train_teachers + 1):
            start = _start_seed(config, number)
            source = self.plan.encoder if start is None else str(self._multi("mtdnn", start))
            model = self._maker(source, [name], number)
            stage, what = f"teachers/{name}-{number}", f"from {source}"
            folder = self._training(stage, what, model, [name], False, block, number, start=_start(start))
            folders.append(str(folder))
        # Another run in the same folder, of other seeds, may have come first.
        if problems := _check_starts(config, name, self.plan.output):
            raise PlanError("\n".join(problems))
        return folders

    def _targets(self, name: str) -> Path:
        """The teachers' answers to a task's training rows, and what they are worth."""
        section, task = self.config.tasks[name], self.plan.tasks[name]
        teachers = self._teachers(name)
        rows = task.splits["train"]

        def make(folder: Path) -> int:
            answers, held_out = [], []
            for number, source in enumerate(teachers, 1):
                model, tokenizer = _load_teacher(source, name)
                answers.append(self._logits(name, number, model, tokenizer))
                held_out.append(_answers(model, tokenizer, task, self.config.encoder.max_length))
            stacked = torch.stack(answers)  # [K, rows, C]
            # The softmax of a ranking's scores is one over candidates: the mean waits until they are together.
            mean = stacked.squeeze(-1).T if section.kind == "ranking" else mean_prediction(stacked)
            Dataset.from_dict({RECORDED_LOGITS: mean.tolist()}).save_to_disk(folder / "rows")
            scores = {
                "ensemble": _numbers(mean_prediction(torch.stack(held_out)), task, section.kind),
                "members": [_numbers(one, task, section.kind) for one in held_out],
            }
            write_text(folder / TRAINING_FILE, json.dumps(scores))
            return len(rows)

        what = f"{'1 teacher labels' if len(teachers) == 1 else f'{len(teachers)} teachers label'} {len(rows):,} rows"
        return self._stage(f"targets/{name}", make, what, alone=True)

    def _logits(
        self, name: str, number: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> torch.Tensor:
        """A teacher's logits for the training rows of a task, fp32 ``[rows, C]``: what the cache lacks is computed."""
        section, task = self.config.teachers, self.plan.tasks[name]
        rows = task.splits["train"]
        folder = Path(section.cache or self.plan.output / "cache").expanduser() / f"{name}-{number}"
        try:
            keys = record_logits(
                zip(*(rows[column] for column in task.text_columns), strict=True),
                model,
                tokenizer,
                folder,
                max_length=self.config.encoder.max_length,
                batch_size_tokens=section.batch_tokens,
                progress=sys.stderr.isatty(),
            )
            return TeacherCache(folder).stack(keys, LOGITS).float()
        except ValueError as error:
            raise PlanError(f"teachers.cache: {error}") from None

    def _tuned(self, arm: Arm, seed: int, name: str) -> Path:
        source = self._multi(arm, seed)
        block = _block(self.config, self.config.fine_tune)
        model = lambda: MultiTaskModel.from_pretrained(source, dtype=torch.float32)  # noqa: E731
        stage = f"fine_tuned/{arm}-seed{seed}-{name}"
        what, start = f"tune on {name} alone", f"{arm}/seed{seed}"
        return self._training(stage, what, model, [name], arm == "mtdnn_kd", block, seed, start=start)

    def _maker(self, source: str, tasks: Sequence[str], seed: int) -> Callable[[], MultiTaskModel]:
        return lambda: _new_model(self.plan, source, tasks, seed)

    def _training(
        self,
        stage: str,
        what: str,
        model: Callable[[], MultiTaskModel],
        tasks: Sequence[str],
        soft: bool,
        block: Mapping[str, Any],
        seed: int,
        *,
        start: str = "encoder",
    ) -> Path:
        """A stage that trains a model on some tasks, and scores it on each; ``start``: what the model was before."""
        # Their targets are stages of their own.
        rows = {} if self.stages.has(stage) else {name: self._rows(name, soft) for name in tasks}

        def make(folder: Path) -> int:
            return self._train(model(), rows, block, seed, folder, self.stages.scratch(stage), start)

        return self._stage(stage, make, what)

    def _stage(self, name: str, make: Callable[[Path], int], what: str, *, alone: bool = False) -> Path:
        """A stage, built or found when it is asked for first."""
        if name not in self._built:
            self._built[name] = self.stages.build(name, make, what, alone=alone)
        return self._built[name]

    def _train(
        self,
        model: MultiTaskModel,
        rows: Mapping[str, Dataset],
        block: Mapping[str, Any],
        seed: int,
        folder: Path,
        scratch: Path,
        start: str,
    ) -> int:
        plan, config = self.plan, self.config
        weights = {
            name: config.objective.hard_weight if section.hard_weight is None else section.hard_weight
            for name, section in config.tasks.items()
        }
        mixing = config.mixing.model_dump() if len(rows) > 1 else {"pack_once": config.mixing.pack_once}
        trainer = DistillationTrainer(
            Distiller(model, None, TaskLoss(_kinds(config), hard_weight=weights)),
            _arguments(block, scratch, seed, unused=_leaves_parameters_unused(model.config)),
            train_dataset=cast(Any, TaskMixture(rows, **mixing)),
            processing_class=plan.tokenizer,
            data_collator=TaskCollator(plan.tokenizer),
        )
        attach_progress(trainer, "loss")
        began = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint_in(scratch))
        seconds = time.perf_counter() - began
        model.eval()
        scores = {}
        for name in rows:
            model.config.select(name)
            answers = _answers(model, plan.tokenizer, plan.tasks[name], config.encoder.max_length)
            scores[name] = _numbers(answers, plan.tasks[name], config.tasks[name].kind)
        # A folder says which task it means where it is of one; one of several is asked by name.
        if len(rows) > 1:
            model.config.task = None
        model.save_pretrained(folder)
        plan.tokenizer.save_pretrained(folder)
        record = {
            "start": start,
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 1),
            "scores": scores,
            "curve": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        write_text(folder / TRAINING_FILE, json.dumps(record))
        return trainer.state.global_step

    # ---- results

    def _scores(self, arm: Arm, tuned: bool = False) -> dict[str, Any]:
        """Of each task the metric, over the seeds."""
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in self.config.tasks}
        for seed in self.config.seeds:
            if tuned:
                folders = {name: self._tuned(arm, seed, name) for name in self.config.tasks}
            else:
                folders = self._folders(arm, seed)
            for name, folder in folders.items():
                runs[name].append({"seed": seed, "numbers": _record(folder)["scores"][name]})
        return {name: _entry(self.config.tasks[name].metric, found) for name, found in runs.items()}

    def _teacher_scores(self) -> dict[str, Any]:
        found = {}
        for name in self.config.taught:
            record = _record(self._targets(name))
            entry = _entry(self.config.tasks[name].metric, [{"seed": None, "numbers": record["ensemble"]}])
            found[name] = entry | {"members": record["members"]}
        return found

    def _curves(self, arm: Arm) -> list[dict[str, Any]]:
        return _record(self._multi(arm, self.config.seeds[0]))["curve"]


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8"))


def _entry(metric: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    values = [run["numbers"][metric] for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"metric": metric, "mean": statistics.fmean(values), "deviation": deviation, "runs": runs}


def _average(tasks: Mapping[str, Mapping[str, Any]]) -> float:
    return statistics.fmean(one["mean"] for one in tasks.values())


def _load_teacher(source: str, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
    if isinstance(model.config, MultiTaskConfig):
        model.config.select(name)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(source)


def _answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int) -> torch.Tensor:
    """Logits of the held-out rows, ``[N, C]`` or ``[N, 1]``."""
    rows = task.splits["dev" if task.test_is_dev else "test"]
    texts = list(zip(*(rows[column][:] for column in task.text_columns), strict=True))
    return predict_logits(model, tokenizer, texts, max_length)


def _numbers(logits: torch.Tensor, task: Task, kind: Kind) -> dict[str, float]:
    """The metrics of the held-out rows."""
    rows = task.splits["dev" if task.test_is_dev else "test"]
    if kind == "ranking":
        asked = queries(rows, task.text_columns[0])
        scores = [logits[query.rows, 0].numpy() for query in asked]
        return ranking_metrics(scores, [query.right for query in asked])
    return metrics_of(logits.numpy(), np.asarray(rows["labels"][:]), len(task.label_names))
