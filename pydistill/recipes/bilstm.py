# SPDX-License-Identifier: Apache-2.0
"""Tang et al. 2019 (arXiv 1903.12136): a fine-tuned Transformer teaches a BiLSTM its logits on real and synthetic rows.

Each stage writes its own folder and appears under its name only when it is complete, so a run that was interrupted goes
on where it stopped: ``teacher/``, ``transfer/augmented/``, ``transfer/*-logits/``, ``students/ARM-seedN/``. The
teacher's logits are a cache, ``transfer/cache/`` or another folder; a stage keeps under which keys its rows are found.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, load_from_disk
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pydistill import SoftTarget, _dispatch
from pydistill.cache import TeacherCache, TeacherCacheError, record_logits, with_logits
from pydistill.config import Arm, OptimizerSection
from pydistill.data.augment import AugmentConfig, augment_dataset
from pydistill.data.tasks import example_row
from pydistill.distiller import Distiller
from pydistill.inference import predict_logits
from pydistill.metrics import classification_metrics
from pydistill.plan import CONFIG_FILE, DATA_FILE, Plan, PlanError, data_fingerprint, quiet
from pydistill.recipes.bilstm_report import best_student, page
from pydistill.recipes.costs import costs_of, how_speed_is_measured
from pydistill.recipes.stages import WORK, Stages, attach_progress, checkpoint_in, open_output
from pydistill.report import METRICS_FILE, REPORT_FILE, text_table, write_report, write_text
from pydistill.students.bilstm import BiLSTMConfig, BiLSTMForSequenceClassification
from pydistill.students.words import build_word_tokenizer, word_vectors
from pydistill.teachers import RECORDED_LOGITS, RecordedTeacher
from pydistill.trainer import DistillationTrainer, OptimizerConfig

# What a run writes into its output folder; --overwrite removes these and nothing else.
OWN_ENTRIES = ("teacher", "transfer", "students", WORK, METRICS_FILE, REPORT_FILE, CONFIG_FILE, DATA_FILE)
OWN_PICTURES = ("comparison.png", "curves.png")
MASK = AugmentConfig().mask_token
# Rows that time a model.
TIMED_ROWS = {"teacher": 200, "student": 1000}


def run(plan: Plan) -> dict[str, Any]:
    """Carry out the plan and return its results, the content of ``metrics.json``."""
    with quiet():
        return _run(plan)


def _run(plan: Plan) -> dict[str, Any]:
    open_output(plan, (*OWN_ENTRIES, *OWN_PICTURES))
    write_text(plan.output / DATA_FILE, data_fingerprint(plan.task))
    stages = Stages(plan.output)
    teacher = _teacher(plan, stages)
    transfer = _transfer_set(plan, stages, teacher)
    students = _train_students(plan, stages, teacher, transfer)
    results = _evaluate(plan, stages, teacher, students)
    write_text(plan.output / METRICS_FILE, json.dumps(results, indent=1))
    stages.clear()
    report, shown = write_report(plan.output, page)
    print(f"\n{text_table(shown.table)}\n{shown.measured}\n")
    print(f"report:  {report}\nstudent: {plan.output / best_student(results)['folder']}")
    print(f"try it:  {shown.next_step}")
    return results


@dataclass
class TeacherHandle:
    """The fine-tuned teacher: where it is, loaded when first needed."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    _model: PreTrainedModel | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model in eval mode, on the GPU where there is one."""
        if self._model is None:
            self._model = AutoModelForSequenceClassification.from_pretrained(self.source)
            self._model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        return self._model


def _teacher(plan: Plan, stages: Stages) -> TeacherHandle:
    config = plan.config
    if config.teacher.fine_tune is None:
        return TeacherHandle(plan.teacher, plan.tokenizer)

    def make(folder: Path) -> int:
        return _fine_tune(plan, folder, stages.scratch("teacher"))

    folder = stages.build("teacher", make, f"fine-tune {config.teacher.model} on {plan.task.counts['train']:,} rows")
    return TeacherHandle(str(folder), AutoTokenizer.from_pretrained(folder))


def _fine_tune(plan: Plan, folder: Path, scratch: Path) -> int:
    config, task = plan.config, plan.task
    assert config.teacher.fine_tune is not None
    set_seed(config.teacher.fine_tune_seed)
    labels = dict(enumerate(task.label_names))
    model = AutoModelForSequenceClassification.from_pretrained(
        plan.teacher, id2label=labels, label2id={name: index for index, name in labels.items()}
    )

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        texts = [batch[column] for column in task.text_columns]
        return dict(plan.tokenizer(*texts, truncation=True, max_length=config.teacher.max_length))

    splits = {
        split: task.splits[split].map(encode, batched=True, remove_columns=list(task.text_columns))
        for split in ("train", "dev")
    }
    # Mixed precision: the weights and the optimizer stay in float32.
    block = {"bf16": plan.dtype == torch.bfloat16} | config.teacher.fine_tune
    arguments = _arguments(block, scratch, config.teacher.fine_tune_seed, config.metric)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["dev"],
        data_collator=DataCollatorWithPadding(plan.tokenizer),
        compute_metrics=_compute_metrics,
    )
    attach_progress(trainer, config.metric)
    trainer.train(resume_from_checkpoint=checkpoint_in(scratch))
    model.save_pretrained(folder)
    plan.tokenizer.save_pretrained(folder)
    return trainer.state.global_step


def _arguments(block: Mapping[str, Any], scratch: Path, seed: int, metric: str) -> TrainingArguments:
    """``TrainingArguments`` of the configuration, with what a run needs where the configuration is silent."""
    defaults: dict[str, Any] = {
        "eval_strategy": "epoch",
        "save_strategy": block.get("eval_strategy", "epoch"),
        "logging_steps": 100,
        "report_to": "none",
        "disable_tqdm": True,  # Progress below says it in a line
        "use_cpu": not torch.cuda.is_available(),  # otherwise bf16 is taken for a GPU's and refused
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if block.get("eval_strategy", "epoch") != "no":
        defaults |= {"load_best_model_at_end": True, "metric_for_best_model": metric, "save_total_limit": 1}
    settings = defaults | dict(block)
    return TrainingArguments(output_dir=str(scratch), seed=seed, data_seed=seed, **settings)


def _compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = np.asarray(prediction.label_ids)
    return classification_metrics(logits.argmax(-1), labels, logits.shape[-1])


def _transfer_set(plan: Plan, stages: Stages, teacher: TeacherHandle) -> dict[str, Dataset]:
    """Return the rows with teacher logits: ``train`` (true labels) and ``augmented`` (the teacher's labels)."""
    parts: dict[str, Dataset] = {}
    if set(plan.config.arms) != {"hard"}:
        parts["train"] = _label(plan, stages, teacher, "train", plan.task.splits["train"])
    if "augmented" in plan.config.arms:
        rows = _augment(plan, stages)
        labelled = _label(plan, stages, teacher, "augmented", rows.remove_columns("source"))
        answers = np.asarray(labelled.with_format("numpy")[RECORDED_LOGITS][:]).argmax(-1)
        feature = plan.task.splits["train"].features["labels"]
        parts["augmented"] = labelled.add_column("labels", answers.tolist()).cast_column("labels", feature)
    return parts


def _augment(plan: Plan, stages: Stages) -> Dataset:
    section = plan.config.augment

    def make(folder: Path) -> int:
        config = AugmentConfig(**section.model_dump(exclude={"workers"}))
        rows = augment_dataset(
            plan.task.splits["train"],
            plan.task.text_columns,
            config,
            num_proc=section.workers,
            progress=sys.stderr.isatty(),
        )
        rows.save_to_disk(folder / "rows")
        return len(rows)

    folder = stages.build("transfer/augmented", make, f"augment {plan.task.counts['train']:,} rows")
    return load_from_disk(str(folder / "rows"))


def _label(plan: Plan, stages: Stages, teacher: TeacherHandle, name: str, rows: Dataset) -> Dataset:
    """`rows` with the teacher's logits, from the cache once it has them all."""
    config = plan.config.teacher
    cache = Path(config.cache).expanduser() if config.cache else plan.output / "transfer" / "cache"

    def make(folder: Path) -> int:
        columns = plan.task.text_columns
        texts = _texts(_with_mask_token(rows, columns, teacher.tokenizer), columns)
        try:
            keys = record_logits(
                texts,
                _in_dtype(teacher.model, plan.dtype),
                teacher.tokenizer,
                cache,
                max_length=config.max_length,
                batch_size_tokens=config.batch_tokens,
                progress=sys.stderr.isatty(),
            )
        except ValueError as error:
            raise PlanError(f"teacher.cache: {error}") from None
        np.save(folder / "keys.npy", keys)
        return len(rows)

    folder = stages.build(f"transfer/{name}-logits", make, f"the teacher labels {len(rows):,} rows")
    try:
        return with_logits(rows, TeacherCache(cache), np.load(folder / "keys.npy"))
    except TeacherCacheError as error:
        raise PlanError(f"teacher.cache: {error}; delete {folder} to compute again what is missing") from None


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """`model` itself where it has that dtype, otherwise a copy."""
    return model if model.dtype == dtype else copy.deepcopy(model).to(dtype)  # type: ignore[arg-type]


def _with_mask_token(rows: Dataset, columns: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Write the teacher's own mask token where augmentation wrote ``[MASK]``."""
    token = tokenizer.mask_token or tokenizer.unk_token
    if token in (MASK, None):
        return rows

    def translate(batch: dict[str, list[str]]) -> dict[str, list[str]]:
        return {column: [text.replace(MASK, str(token)) for text in batch[column]] for column in columns}

    return rows.map(translate, batched=True)


def _train_students(
    plan: Plan, stages: Stages, teacher: TeacherHandle, transfer: Mapping[str, Dataset]
) -> dict[str, dict[int, Path]]:
    """Train every arm with every seed; return their folders."""
    config, task = plan.config, plan.task
    train = task.splits["train"]
    sentences = [text for column in task.text_columns for text in train[column]]
    tokenizer = build_word_tokenizer(
        sentences,
        max_size=config.student.vocabulary_size,
        min_count=config.student.min_count,
        lowercase=config.student.lowercase,
    )
    vectors = _vectors(plan, teacher, tokenizer)
    folders: dict[str, dict[int, Path]] = {}
    encoded: dict[str, Dataset] = {}

    def rows_of(arm: Arm) -> Dataset:
        for part in {"hard": ["plain"], "distilled": ["train"], "augmented": ["train", "augmented"]}[arm]:
            if part not in encoded:
                encoded[part] = _encode(plan, tokenizer, train if part == "plain" else transfer[part])
        if arm == "augmented":
            return concatenate_datasets([encoded["train"], encoded["augmented"]])
        return encoded["plain" if arm == "hard" else "train"]

    dev = _encode(plan, tokenizer, task.splits["dev"])
    for arm in config.arms:
        for seed in config.seeds:

            def make(folder: Path, arm: Arm = arm, seed: int = seed) -> int:
                student = _new_student(plan, tokenizer, vectors, seed)
                scratch = stages.scratch(f"students/{arm}-seed{seed}")
                return _train(plan, arm, seed, student, tokenizer, rows_of(arm), dev, folder, scratch)

            name = f"students/{arm}-seed{seed}"
            folders.setdefault(arm, {})[seed] = stages.build(name, make, "train")
    return folders


def _vectors(plan: Plan, teacher: TeacherHandle, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor | None:
    source, std = plan.config.student.vectors, plan.config.student.vectors_std
    if source == "random":
        return None
    if source == "teacher":
        return word_vectors(tokenizer, teacher=teacher.model, teacher_tokenizer=teacher.tokenizer, std=std)
    return word_vectors(tokenizer, path=Path(source).expanduser(), std=std)


def _new_student(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, vectors: torch.Tensor | None, seed: int
) -> BiLSTMForSequenceClassification:
    section = plan.config.student
    set_seed(seed)
    labels = dict(enumerate(plan.task.label_names))
    width = vectors.shape[1] if vectors is not None else section.embedding_size
    assert width is not None  # the plan asks for a width where vectors are random
    student = BiLSTMForSequenceClassification(
        BiLSTMConfig(
            vocab_size=len(tokenizer),
            embedding_size=width,
            multichannel=section.multichannel,
            hidden_size=section.hidden_size,
            classifier_size=section.classifier_size,
            pair=plan.task.pair,
            dropout=section.dropout,
            pad_token_id=tokenizer.pad_token_id,
            unk_token_id=tokenizer.unk_token_id,
            id2label=labels,
            label2id={name: index for index, name in labels.items()},
        )
    )
    if vectors is not None:
        student.embeddings_from(vectors)
    return student


def _encode(plan: Plan, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Dataset:
    """Turn texts into the word ids that the student reads, ``pair_*`` for the second text."""

    def encode(batch: Mapping[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for prefix, column in zip(("", "pair_"), plan.task.text_columns, strict=False):
            coded = tokenizer(batch[column], truncation=True, max_length=plan.config.student.max_length)
            inputs[f"{prefix}input_ids"] = coded["input_ids"]
        return inputs

    return rows.map(encode, batched=True, remove_columns=list(plan.task.text_columns))


def _train(
    plan: Plan,
    arm: Arm,
    seed: int,
    student: BiLSTMForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    dev: Dataset,
    folder: Path,
    scratch: Path,
) -> int:
    config = plan.config
    if arm == "hard":
        distiller = Distiller(student, None, SoftTarget(hard_weight=1.0, name="hard"))
    else:
        distiller = Distiller(student, RecordedTeacher(), SoftTarget(**config.objective.model_dump()))
    block = config.train | config.train_per_arm.get(arm, {})
    arguments = _arguments(block, scratch, seed, config.metric)
    optimizer = _optimizer(config.optimizer, block, arguments)
    trainer = DistillationTrainer(
        distiller,
        arguments,
        train_dataset=rows,
        eval_dataset=dev,
        processing_class=tokenizer,
        compute_metrics=_compute_metrics,
        optimizer=optimizer,
        callbacks=[EarlyStoppingCallback(config.patience)] if config.patience else None,
    )
    attach_progress(trainer, config.metric)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint_in(scratch))
    seconds = time.perf_counter() - start
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    state = trainer.state
    record = {
        "seed": seed,
        "steps": state.global_step,
        "best_step": state.best_global_step or state.global_step,
        "seconds": round(seconds, 1),
        "rows": len(rows),
        "curve": [entry for entry in state.log_history if "loss" in entry or f"eval_{config.metric}" in entry],
    }
    write_text(folder / "training.json", json.dumps(record))
    return state.global_step


def _optimizer(
    section: OptimizerSection, block: Mapping[str, Any], arguments: TrainingArguments
) -> OptimizerConfig | None:
    """Return AdaDelta with the run's learning rate (1.0 where none is given); None is the AdamW of ``arguments``."""
    if section.name == "adadelta":
        return OptimizerConfig("adadelta", block.get("learning_rate"), section.rho, section.eps)
    # TrainingArguments' own AdamW is the fused one: ten times faster on tables of word vectors.
    if section.eps is not None:
        arguments.adam_epsilon = section.eps
    return None


def _evaluate(
    plan: Plan, stages: Stages, teacher: TeacherHandle, students: Mapping[str, Mapping[int, Path]]
) -> dict[str, Any]:
    config, task = plan.config, plan.task
    print("[evaluate] teacher and students on the held-out rows", flush=True)
    split = "dev" if task.test_is_dev else "test"
    rows = {name: _texts(task.splits[name], task.text_columns) for name in dict.fromkeys(["dev", split])}
    labels = {name: np.asarray(task.splits[name]["labels"][:]) for name in rows}
    classes = len(task.label_names)

    def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, Any]:
        found = {}
        for name in rows:
            answers = predict_logits(model, tokenizer, rows[name], max_length).argmax(-1).numpy()
            found[name] = classification_metrics(answers, labels[name], classes)
        return found

    run_of_teacher = {
        "seed": config.teacher.fine_tune_seed,
        "folder": teacher.source.removeprefix(f"{plan.output}/"),
        "curve": [],
    }
    run_of_teacher |= measure(teacher.model, teacher.tokenizer, config.teacher.max_length)
    models = [
        {"name": "teacher", "runs": [run_of_teacher]}
        | costs_of(
            teacher.model,
            teacher.tokenizer,
            Path(teacher.source),
            rows[split],
            config.teacher.max_length,
            TIMED_ROWS["teacher"],
        )
    ]
    costs: dict[str, Any] = {}
    for arm, folders in students.items():
        runs = []
        for folder in folders.values():
            student = BiLSTMForSequenceClassification.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
            record |= measure(student, tokenizer, config.student.max_length)
            record["folder"] = str(folder.relative_to(plan.output))
            runs.append(record)
            # One architecture and vocabulary for all students: timing each would only show the noise of the machine.
            costs = costs or costs_of(
                student, tokenizer, folder, rows[split], config.student.max_length, TIMED_ROWS["student"]
            )
            _write_card(plan, folder, arm, record, split)
        models.append({"name": arm, "runs": runs} | costs)
    return {
        "recipe": config.recipe,
        "description": config.description,
        "metric": config.metric,
        "split": split,
        "task": task.counts
        | {"labels": list(task.label_names), "notes": list(task.notes), "example": list(example_row(rows[split]))},
        "models": models,
        "stages": stages.done,
        "measured": (
            f"{split}: {task.counts[split]:,} rows. {how_speed_is_measured()} Parameters count what training changes "
            "plus the frozen word vectors; without embeddings: everything but the embedding tables."
        ),
        "environment": _dispatch.environment(),
        "plan": str(plan),
    }


def _texts(rows: Dataset, columns: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(*(rows[column][:] for column in columns), strict=True))


def _write_card(plan: Plan, folder: Path, arm: str, record: Mapping[str, Any], split: str) -> None:
    config = plan.config
    pair = ', "and the second"' if plan.task.pair else ""
    write_text(
        folder / "README.md",
        f"""---
library_name: pydistill
pipeline_tag: text-classification
---
# BiLSTM student ({arm}, seed {record["seed"]})

Distilled with [Tang et al. 2019](https://arxiv.org/abs/1903.12136) by pydistill.

- teacher: `{config.teacher.model}`
- classes: {", ".join(plan.task.label_names)}
- {config.metric} on {split}: {100 * record[split][config.metric]:.2f} %
- {record["steps"]:,} steps on {record["rows"]:,} rows

```
pydistill predict FOLDER "some text"{pair}
```

```python
import pydistill.students  # registers the architecture
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```
""",
    )
