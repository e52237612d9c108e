# SPDX-License-Identifier: Apache-2.0
"""Texts in, logits out: the one forward pass that evaluation, timing and ``pydistill predict`` share."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import pydistill.students  # noqa: F401 (registers the student architectures with AutoModel)
from pydistill.config import UserError
from pydistill.students.multitask import MultiTaskConfig

# Padded tokens per batch: large enough to fill two cores, small enough to stay in cache.
BATCH_TOKENS = 8192


def class_names(config: PretrainedConfig) -> list[str]:
    """Return the names of a classifier's classes in the order of its logits."""
    names: dict[int, str] = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    return [names[index] for index in sorted(names)]


class ModelError(UserError):
    """A folder does not hold a classification model, or the texts do not fit the model."""


def load_tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or hub name.

    Raises:
        ModelError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None
    # Where the files are missing transformers makes up a tokenizer that knows nothing but its special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ModelError(f"{source}: holds no tokenizer files")
    return tokenizer


def load_classifier(folder: Path | str, task: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model with its tokenizer, in eval mode, on the GPU where there is one.

    Args:
        folder: where it is.
        task: which one is meant, of a model of several tasks.

    Raises:
        ModelError: the folder is missing or holds no classification model (names models further down if there are any),
            or the task is none of its tasks, or not given where there are several.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        found = sorted(entry.parent for entry in path.glob("*/*/config.json")) + sorted(
            entry.parent for entry in path.glob("*/config.json")
        )
        hint = f"; models in it: {', '.join(map(str, found))}" if found else ""
        raise ModelError(f"{folder}: holds no model (no config.json){hint}")
    try:
        model = AutoModelForSequenceClassification.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from None
    select_task(model.config, folder, task)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(path)


def select_task(config: PretrainedConfig, folder: Path | str, task: str | None) -> None:
    """Have a model of several tasks, of ``folder``, answer ``task``; None: the one that it is set to.

    Raises:
        ModelError: it has no such task, or several and is set to none; or it is of one task, and one is named.
    """
    if not isinstance(config, MultiTaskConfig):
        if task is not None:
            raise ModelError(f"{folder}: is a model of one task; leave the task out, got {task!r}")
        return
    task = task or config.task
    if task not in config.tasks:
        raise ModelError(f"{folder}: task must be one of {', '.join(config.tasks)}, got {task!r}; name it with --task")
    config.select(task)


def reads_pairs_apart(model: torch.nn.Module) -> bool:
    """Whether the model takes the second sentence as ``pair_input_ids`` instead of behind a separator."""
    return "pair_input_ids" in inspect.signature(model.forward).parameters


def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, ...]], max_length: int
) -> dict[str, Tensor]:
    """Return the padded inputs of ``rows`` (one or two texts each) as the model wants them.

    Raises:
        ModelError: rows of one text for a model of pairs, or the reverse.
    """
    columns = [list(column) for column in zip(*rows, strict=True)]
    if not reads_pairs_apart(model):
        return dict(tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt"))
    wanted = 2 if model.config.pair else 1
    if len(columns) != wanted:
        raise ModelError(
            f"this model classifies {'pairs' if wanted == 2 else 'single texts'}, got rows of {len(columns)}"
        )
    inputs: dict[str, Tensor] = {}
    for prefix, column in zip(("", "pair_"), columns, strict=False):
        coded = tokenizer(column, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        inputs |= {f"{prefix}{name}": coded[name] for name in ("input_ids", "attention_mask")}
    return inputs


def predict_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, ...]],
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Tensor:
    """Return fp32 logits ``[len(rows), classes]`` on the CPU, in the order of ``rows``."""
    logits = torch.empty(len(rows), len(class_names(model.config)))
    with torch.inference_mode():
        for batch, inputs in in_batches(model, tokenizer, rows, max_length, batch_tokens):
            logits[batch] = model(**inputs).logits.float().cpu()
    return logits


def in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[tuple[str, ...]],
    max_length: int,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yield the rows' numbers and inputs batch by batch, on the model's device.

    Rows of similar length share a batch, so that little of it is padding.
    """
    # White-space words stand in for tokens: exact lengths would cost a second tokenization.
    lengths = [sum(len(text.split()) for text in row) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    position = 0
    while position < len(order):
        size = max(1, batch_tokens // max(8, 2 * lengths[order[position]]))
        batch = order[position : position + size]
        position += size
        inputs = encode(model, tokenizer, [rows[index] for index in batch], max_length)
        yield batch, {name: tensor.to(model.device) for name, tensor in inputs.items()}
