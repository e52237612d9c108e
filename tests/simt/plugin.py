# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the CUDA kernels in the library PYDISTILL_SIMT_LIBRARY run wherever a test says ``impl="cuda"``."""

from __future__ import annotations

import os

from no_fp64 import pytest_pyfunc_call
from simt import library

__all__ = ["pytest_pyfunc_call"]

library.load(os.environ["PYDISTILL_SIMT_LIBRARY"])
library.stand_in_for_cuda()
