# SPDX-License-Identifier: Apache-2.0
"""docs/teacher_cache.py: the table of top k, and what a measurement is shown as."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "teacher_cache.py"
if not SCRIPT.exists():
    pytest.skip("needs the source tree around the tests", allow_module_level=True)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_top_k_is_exact_at_the_end_of_the_table_and_nowhere_else(script):
    header, *lines = script["top_k_lines"]()
    assert len(lines) == len(script["KEPT"]) and all(len(line) == len(header) for line in lines)
    for line, k in zip(lines, script["KEPT"], strict=True):
        assert (line[2:] == ("exact, exact",) * 3) == (k >= script["CLASSES"] - 1)
        assert "exact" not in line[2] or k >= script["CLASSES"] - 1


def test_the_measurement_runs_and_is_shown(script, tmp_path, monkeypatch):
    """In small: the numbers mean nothing, but that there are some."""
    scope = script["measure"].__globals__
    monkeypatch.setitem(scope, "MILLION", 100)
    monkeypatch.setitem(scope, "writing", lambda folder: {"forward": 200.0, "logits": 150.0})
    record = {
        "writing": scope["writing"](tmp_path),
        "reading": script["reading"](tmp_path / "signals", texts=16),
        "million": script["million"](tmp_path / "million"),
    }
    lines = script["measured_lines"](record)
    assert lines[1] == ("writing logits", "150 tokens/s", "200 tokens/s, the forward alone: 75 %")
    assert [line[0] for line in lines[2:]] == [
        f"{what}, {where}"
        for what in ("reading queries, keys and values", "logits of 100 texts")
        for where in ("disk", "page cache")
    ]
    assert all(value > 0 for one in record["reading"].values() for value in one.values())
