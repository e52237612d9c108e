# SPDX-License-Identifier: Apache-2.0
"""A hook for plugins that run CUDA kernels, which do not take fp64: a test in it is skipped."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    try:
        return (yield)
    except RuntimeError as error:
        # The package says it, or the op itself.
        if not re.search("CUDA kernels? takes? fp32, bf16 and fp16, got fp64", str(error)):
            raise
        pytest.skip("CUDA kernels do not take fp64")
