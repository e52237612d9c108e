# SPDX-License-Identifier: Apache-2.0
"""What a teacher is, as hashes: its class, configuration and weights, and the tokenizer that makes its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a configuration says about where it came from or how it is run, not about what the model computes.
_VOLATILE_CONFIG = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation_internal",
)


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Padding and truncation are set by every call.
        state = {name: value for name, value in state.items() if name not in ("padding", "truncation")}
    else:
        state = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            **tokenizer.init_kwargs,
        }
    sides = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id)
    return hash_json([state, sides])


def hash_model(model: PreTrainedModel, without: Collection[str] = ()) -> str:
    """Of a model's class, configuration and weights, those `without` excepted."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE_CONFIG}
    digest = hashlib.sha256(hash_json([type(model).__name__, config]).encode())
    for name, tensor in model.state_dict().items():
        if name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
