# SPDX-License-Identifier: Apache-2.0
"""pydistill: teacher signals in, student gradients out, exactly and fast.

Importing the package loads torch and the compiled kernels, nothing else: transformers, datasets and triton are
imported by the parts that use them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pydistill._version import __version__

MINIMUM_TORCH = (2, 10)

try:
    import torch
except ImportError:
    raise ImportError(
        "pydistill needs PyTorch, which is not installed. Install it with: pip install 'torch>=2.10'"
    ) from None

if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MINIMUM_TORCH:
    raise ImportError(
        f"pydistill {__version__} needs torch >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}, found torch "
        f"{torch.__version__}. Upgrade it with: pip install --upgrade 'torch>=2.10'"
    )

from pydistill.losses.attention_relation import (  # noqa: E402 (the checks above must come first)
    AttentionRelation,
    attention_relation_loss,
)
from pydistill.losses.linear_soft_target import linear_soft_target_loss  # noqa: E402 (the checks above must come first)
from pydistill.losses.projected_mse import (  # noqa: E402 (the checks above must come first)
    ProjectedMSE,
    projected_mse_loss,
)
from pydistill.losses.soft_target import SoftTarget, soft_target_loss  # noqa: E402 (the checks above must come first)

if TYPE_CHECKING:
    from pydistill.capture import capture
    from pydistill.distiller import Distiller
    from pydistill.plan import plan
    from pydistill.recipes import run
    from pydistill.trainer import DistillationTrainer

__all__ = [
    "AttentionRelation",
    "DistillationTrainer",
    "Distiller",
    "ProjectedMSE",
    "SoftTarget",
    "__version__",
    "attention_relation_loss",
    "capture",
    "linear_soft_target_loss",
    "plan",
    "projected_mse_loss",
    "run",
    "soft_target_loss",
]

# Public names whose modules import transformers: resolved on first use, so that the kernels alone stay light.
_LAZY = {
    "DistillationTrainer": "pydistill.trainer",
    "Distiller": "pydistill.distiller",
    "capture": "pydistill.capture",
    "plan": "pydistill.plan",
    "run": "pydistill.recipes",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'pydistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
