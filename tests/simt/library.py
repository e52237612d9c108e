# SPDX-License-Identifier: Apache-2.0
"""Loads a library that tests/simt/CMakeLists.txt builds: the CUDA ops of the product, running on CPU tensors."""

from __future__ import annotations

from pathlib import Path

import torch

from pydistill import _dispatch, _schemas
from pydistill.losses import soft_target

_loaded: list[torch.library.Library] = []  # a schema lasts as long as its library


def load(path: Path | str, namespace: str = "pydistill_simt") -> None:
    """Makes the library's ops ``torch.ops.<namespace>``, with fake kernels and autograd as the product has them."""
    _loaded.append(_schemas.define(namespace))
    torch.ops.load_library(str(path))
    soft_target._register(namespace)


def stand_in_for_cuda(namespace: str = "pydistill_simt") -> None:
    """From here on, ``impl="cuda"`` on CPU tensors calls the library's ops."""
    for loss in ("soft_target",):
        _dispatch.BACKENDS[loss]["cuda"] = _dispatch.Backend(True, "CUDA kernels run on the CPU by tests/simt")
    _dispatch.NAMESPACES["cuda"] = namespace
    _dispatch.PREFERRED["cpu"] = ("cuda",)
