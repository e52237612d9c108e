# SPDX-License-Identifier: Apache-2.0
"""`python -m pydistill.bench`: the same as `pydistill bench`."""

from __future__ import annotations

import sys

from pydistill.bench import main

if __name__ == "__main__":
    sys.exit(main())
