# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the CUDA kernels in the library PYDISTILL_SIMT_LIBRARY run wherever a test says ``impl="cuda"``."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from simt import library

library.load(os.environ["PYDISTILL_SIMT_LIBRARY"])
library.stand_in_for_cuda()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """A test in fp64 is skipped."""
    try:
        return (yield)
    except RuntimeError as error:
        if "the CUDA kernel takes fp32, bf16 and fp16, got fp64" not in str(error):
            raise
        pytest.skip("CUDA kernels do not take fp64")
