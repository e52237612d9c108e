# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: ``impl=PYDISTILL_TEST_IMPL``, "cuda" or "triton", runs on the GPU wherever a test says so.

The tests keep their tensors on the CPU. An op takes its arguments to the device PYDISTILL_TEST_DEVICE (a GPU, unless a
test of this plugin names another), runs there, and brings its results back; autograd and fake kernels are the
package's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from no_fp64 import pytest_pyfunc_call
from torch.utils._pytree import tree_map_only

from pydistill import _dispatch, _schemas
from pydistill.losses import attention_relation, projected_mse, soft_target

__all__ = ["pytest_collection_modifyitems", "pytest_pyfunc_call"]

# Of the tests of a loss, those of what an installation has, which is not this one.
ELSEWHERE = ("test_kernel_is_built", "test_without_native_code", "impl='cuda' does not run on device 'cpu'")

IMPLEMENTATION = os.environ["PYDISTILL_TEST_IMPL"]
DEVICE = torch.device(os.environ.get("PYDISTILL_TEST_DEVICE", "cuda"))
NAMESPACE = "pydistill_gpu"
OPS = [schema.partition("(")[0] for schema in _schemas.SCHEMAS]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if any(name in item.name for name in ELSEWHERE)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def on_device(op: str, namespace: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        there = tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), arguments)
        result = getattr(getattr(torch.ops, namespace), op)(*there)
        if op.endswith("_"):
            arguments[0].copy_(there[0])
        return tree_map_only(torch.Tensor, lambda tensor: tensor.cpu(), result)

    return call


library = _schemas.define(NAMESPACE)
for name in OPS:
    library.impl(name, on_device(name, _dispatch.NAMESPACES[IMPLEMENTATION]), "CPU")
for module in (attention_relation, projected_mse, soft_target):
    module._register(NAMESPACE)
for loss in _dispatch.LOSSES:
    # Without a GPU, in the test of this plugin, the CPU's kernels stand in for all.
    if DEVICE.type == "cpu" or _dispatch._on_device(loss, IMPLEMENTATION, DEVICE).available:
        _dispatch.BACKENDS[loss][IMPLEMENTATION] = _dispatch.Backend(True, f"on {DEVICE}, for the tests")
_dispatch.NAMESPACES[IMPLEMENTATION] = NAMESPACE
_dispatch.PREFERRED["cpu"] = (IMPLEMENTATION,)
