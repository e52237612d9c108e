# SPDX-License-Identifier: Apache-2.0
"""Stages of a recipe: built once, and what a finished one says when it is found again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pydistill.recipes import stages
from pydistill.recipes.stages import Stages


def make(folder: Path) -> int:
    (folder / "made").write_text("yes", encoding="utf-8")
    return 3


def test_a_stage_is_built_once_and_says_by_how_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched:
        # The first of two processes, as far as stages ask.
        first = SimpleNamespace(num_processes=2, is_main_process=True, wait_for_everyone=lambda: None)
        patched.setattr(stages, "processes", lambda: first)
        Stages(tmp_path).build("student", make, "train")
        Stages(tmp_path).build("rows", make, "cut", alone=True)
    capsys.readouterr()
    again = Stages(tmp_path)
    for name in ("student", "rows"):
        folder = again.build(name, lambda folder: pytest.fail("it is there"), "again", alone=name == "rows")
        assert (folder / "made").is_file()
    assert capsys.readouterr().out.splitlines() == [
        "[student] kept from before, made by 2 processes, not 1",
        "[rows] kept from before",
    ]
    assert [record["rows"] for record in again.done] == [3, 3]
