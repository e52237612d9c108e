# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: kernels of the implementation PYDISTILL_TEST_IMPL, "triton" or "cuda", run on CPU tensors through
the PTX that their compiler makes of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

IMPLEMENTATION = os.environ["PYDISTILL_TEST_IMPL"]


def pytest_configure() -> None:
    if IMPLEMENTATION == "triton":
        from ptx import triton_device

        triton_device.register_ops()
    else:
        from ptx import cuda_device

        cuda_device.ops()
        cuda_device.stand_in_for_cuda()


@pytest.fixture(autouse=True)
def ptx_device() -> Iterator[Any]:
    """The device of a test."""
    if IMPLEMENTATION == "triton":
        from ptx.triton_device import Device

        with Device("sm_80") as device:
            yield device
    else:
        from ptx import cuda_device

        with cuda_device.ops().device() as device:
            yield device
