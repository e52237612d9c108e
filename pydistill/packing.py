# SPDX-License-Identifier: Apache-2.0
"""Rows that hold several texts, inside models: who sees whom, where positions begin, and which models can do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Batch key of packed rows [B, N]: 1 for the tokens of a row's first text, 2 for the second, ...; 0 is padding.
SEGMENTS = "segment_ids"


def block_mask(segment_ids: Tensor) -> Tensor:
    """Return the attention mask of packed rows: ``[B, N]`` segments -> bool ``[B, 1, N, N]``, True where allowed.

    A token sees the tokens of its own text. Padding sees padding, so that no row of a softmax is empty; nothing else
    sees it.
    """
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]


def model_inputs(inputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's ``inputs`` from ``batch``: of packed rows, with the block mask as the attention mask."""
    given = {name: value for name, value in inputs.items() if name != SEGMENTS}
    if SEGMENTS in batch:
        given["attention_mask"] = block_mask(batch[SEGMENTS])
    return given


def first_position(model: nn.Module) -> int:
    """Return the position id of a text's first token: RoBERTa and its kin count from behind their padding row."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> None:
    """Refuse a model that does not keep the texts of a packed row apart, by running one.

    Raises:
        ValueError: the model's attention is not PyTorch's (a boolean block mask means nothing to others), some of its
            layers look only at a window, or a packed row gives other hidden states than its texts one by one.
    """
    name, implementation = type(model).__name__, model.config._attn_implementation
    if implementation != "sdpa":
        _refuse(name, f"its attention is {implementation!r}; load it with attn_implementation='sdpa'")
    if any("sliding" in kind for kind in getattr(model.config, "layer_types", None) or ()):
        _refuse(name, "some of its layers attend within a window, which a block mask would replace")
    # RoBERTa gives its padding token no position of its own.
    ids = [token for token in range(model.config.vocab_size) if token != model.config.pad_token_id]
    texts = [ids[:5], ids[3:0:-1]]
    first = first_position(model)
    inputs = {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.tensor([[first + position for text in texts for position in range(len(text))]]),
        SEGMENTS: torch.tensor([[number for number, text in enumerate(texts) for _ in text]]),
    }
    inputs = model_inputs(inputs, inputs)
    training, device = model.training, model.device
    model.eval()
    try:
        joined = _hidden(model, {key: value.to(device) for key, value in inputs.items()})
        alone = [_hidden(model, {"input_ids": torch.tensor([text], device=device)}) for text in texts]
    except (TypeError, ValueError, RuntimeError) as error:
        _refuse(name, f"it cannot run one: {str(error).splitlines()[0]}")
    finally:
        model.train(training)
    expected = torch.cat(alone, dim=1)
    tolerance = 1e-4 if expected.dtype == torch.float32 else 5e-2
    if not torch.allclose(joined, expected, atol=tolerance * float(expected.abs().max()), rtol=0):
        _refuse(name, "its hidden states differ from those of the texts one by one")


def _hidden(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    base: Any = model.base_model
    return base(**inputs).last_hidden_state


def _refuse(name: str, reason: str) -> NoReturn:
    raise ValueError(f"packing: {name} cannot read packed rows: {reason}; or set corpus.packing to truncate")
