# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network, and memory that shows when nobody wrote to it."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before any test module imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from poison import poisoned_memory

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import mend_bf16

    mend_bf16()
    if os.environ.get("PYDISTILL_TEST_BLOCKS") == "small":
        from pydistill.kernels import soft_target

        # So that short rows are walked in blocks, as only long ones are otherwise.
        soft_target.WHOLE_CLASSES, soft_target.ROW_BLOCK = 512, 256


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "numerics: values and gradients of a kernel; run again for every instruction set and without kernels",
    )


@pytest.fixture(name="poisoned_memory")
def _poisoned_memory() -> Iterator[None]:
    with poisoned_memory():
        yield


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """Puts torch's thread count back after a test that changes it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
