# SPDX-License-Identifier: Apache-2.0
"""The version of the package, written once: wheel, native module and `pydistill.__version__` take it from here."""

from __future__ import annotations

__version__ = "0.1.0"
