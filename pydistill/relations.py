# SPDX-License-Identifier: Apache-2.0
"""A model's attention relations for a text as whole matrices: to look at, where the losses never build them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pydistill.capture import capture
from pydistill.losses.attention_relation import SIGNALS, check_relations, split_heads


@torch.no_grad()
def relation_matrices(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    relations: Sequence[str] = ("qk", "vv"),
    *,
    layer: int | str = -1,
    relation_heads: int | None = None,
) -> dict[str, Tensor]:
    r"""Return :math:`R_a = \mathrm{softmax}(A_a B_a^\top / \sqrt{d})` for every relation and head of one layer.

    What `attention_relation_loss` compares, with the N x N matrices that it does without: for pictures of short texts.

    Args:
        model: run in eval mode and left as it was found.
        inputs: ``input_ids [1, N]`` and what else the model takes; one text without padding.
        relations: pairs of q, k, v, see `attention_relations_loss`.
        layer: see `capture`.
        relation_heads: join all heads and split them into this many; None takes the attention heads.

    Returns:
        by relation, fp32 ``[A, N, N]`` on the CPU; rows are the queries (the first letter) and sum to 1.

    Raises:
        ValueError: several texts, a relation that is none, or a layer that cannot be read.
    """
    names, _ = check_relations(relations, None)
    if inputs["input_ids"].size(0) != 1:
        raise ValueError(f"relation_matrices: inputs must hold one text, got {inputs['input_ids'].size(0)}")
    letters = sorted(set("".join(names)))
    training = model.training
    model.eval()
    try:
        read = capture(model, [f"{SIGNALS[letter]}@{layer}" for letter in letters])(**inputs)
    finally:
        model.train(training)
    sides = {letter: read[f"{SIGNALS[letter]}@{layer}"].float() for letter in letters}
    # One key or value head for each query head, in grouped-query models too.
    most = max(side.size(1) for side in sides.values())
    sides = {letter: side.repeat_interleave(most // side.size(1), dim=1) for letter, side in sides.items()}
    heads = {letter: split_heads(side, relation_heads)[0] for letter, side in sides.items()}  # [A, N, d]
    matrices = {}
    for name in names:
        a, b = heads[name[0]], heads[name[1]]
        matrices[name] = (a @ b.transpose(-1, -2) / math.sqrt(a.size(-1))).softmax(-1).cpu()
    return matrices


def token_labels(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Return a readable name for each token: its text, or its name in the vocabulary where it has none."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    return [str(tokenizer.decode([token])).strip() or name for token, name in zip(ids, names, strict=True)]
