# SPDX-License-Identifier: Apache-2.0
"""Loads a library that tests/simt/CMakeLists.txt builds: the CUDA ops of the product, running on CPU tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from pydistill import _dispatch, _schemas
from pydistill.losses import attention_relation, projected_mse, soft_target

NAMESPACE = "pydistill_simt"
_loaded: list[torch.library.Library] = []  # a schema lasts as long as its library


def load(path: Path | str) -> None:
    """Makes the library's ops ``torch.ops.pydistill_simt``, with fake kernels and autograd as the product has them."""
    _loaded.append(_schemas.define(NAMESPACE))
    torch.ops.load_library(str(path))
    for loss in (attention_relation, projected_mse, soft_target):
        loss._register(NAMESPACE)


def stand_in_for_cuda() -> None:
    """From here on, ``impl="cuda"`` on CPU tensors calls the library's ops."""
    for loss in _dispatch.CUDA_LOSSES:
        _dispatch.BACKENDS[loss]["cuda"] = _dispatch.Backend(True, "CUDA kernels run on the CPU by tests/simt")
    _dispatch.NAMESPACES["cuda"] = NAMESPACE
    _dispatch.PREFERRED["cpu"] = ("cuda",)
