# SPDX-License-Identifier: Apache-2.0
"""What a model costs: its parameters, the bytes of its file, and how many sentences it reads in a second."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pydistill.inference import in_batches

# The best of the repeats is the least disturbed by other work on the machine.
TIMED_REPEATS = 3


def costs_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    rows: Sequence[tuple[str, ...]],
    max_length: int,
    timed_rows: int,
) -> dict[str, Any]:
    """Return parameters with and without embedding tables, bytes of the weights, and sentences per second on the CPU.

    Args:
        model: with or without a head; left as it was found.
        folder: that it was loaded from.
        rows: one or two texts each, repeated up to four times where there are fewer than ``timed_rows``.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    outside = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in tables)
    frozen = sum(
        tensor.numel() for name, tensor in model.named_buffers() if "embeddings" in name and tensor.is_floating_point()
    )
    total = sum(tensor.numel() for tensor in model.parameters()) + frozen
    files = list(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model*.bin"))
    device, training = model.device, model.training
    nn.Module.to(model.eval(), "cpu")
    timed = [rows[index % len(rows)] for index in range(min(timed_rows, 4 * len(rows)))]
    _read(model, tokenizer, timed[:64], max_length)
    seconds = []
    for _ in range(TIMED_REPEATS):
        start = time.perf_counter()
        _read(model, tokenizer, timed, max_length)
        seconds.append(time.perf_counter() - start)
    nn.Module.to(model.train(training), device)
    return {
        "parameters": total,
        "parameters_without_embeddings": outside,
        # A teacher that came from the hub lies in its cache: the size of its parameters stands for that of its file.
        "file_bytes": sum(file.stat().st_size for file in files) or sum(p.nbytes for p in model.parameters()),
        "sentences_per_second": len(timed) / min(seconds),
    }


def _read(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[tuple[str, ...]], max_length: int
) -> None:
    with torch.inference_mode():
        for _, inputs in in_batches(model, tokenizer, rows, max_length):
            model(**inputs)


def how_speed_is_measured() -> str:
    """Say in a sentence how and where `costs_of` timed."""
    return (
        f"Speed: tokenization and forward pass in float32 on the CPU ({_cpu_name()}, threads: "
        f"{torch.get_num_threads()}), rows in batches of similar length, best of {TIMED_REPEATS}."
    )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
