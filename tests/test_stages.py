# SPDX-License-Identifier: Apache-2.0
"""Stages of a recipe: built once, and what a finished one says when it is found again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import in_a_new_process

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


def test_two_runs_do_not_build_the_same_stage(tmp_path: Path) -> None:
    """The other run, in a process of its own, comes while the first is at work, does another stage, and ends."""
    other = f"""
from pathlib import Path
from types import SimpleNamespace
from pydistill.recipes.stages import StageError, Stages, open_output
output = Path({str(tmp_path)!r})
found = Stages(output)
found.build("other", lambda folder: 1, "train")
for attempt in (
    lambda: found.build("student", lambda folder: 1, "train"),
    lambda: open_output(SimpleNamespace(output=output, overwrite=True), ["student", "work"]),
):
    try:
        attempt()
    except StageError as error:
        print(error)
found.clear()
"""

    def slowly(folder: Path) -> int:
        (folder / "half").write_text("mine", encoding="utf-8")
        built.scratch("student").mkdir()
        printed = in_a_new_process(["-c", other])
        assert f"{tmp_path / 'student'} is being built by another run in the same folder" in printed
        assert "--resume" in printed
        assert f"--overwrite: another run is building student in {tmp_path}" in printed
        assert (folder / "half").read_text(encoding="utf-8") == "mine"
        assert {path.name for path in (tmp_path / "work").iterdir()} == {"student", "student.new", "student.lock"}
        return 1

    built = Stages(tmp_path)
    built.build("student", slowly, "train")
    assert (tmp_path / "student" / "half").is_file()
    assert built.has("other")
    built.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "student"]


def test_what_another_run_has_just_built_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was not there at the first look, and is when the lock is."""
    Stages(tmp_path).build("student", make, "train")
    looks = iter([False, True])
    monkeypatch.setattr(Stages, "has", lambda self, name: next(looks))
    late = Stages(tmp_path)
    late.build("student", lambda folder: pytest.fail("it is there"), "train")
    assert capsys.readouterr().out.endswith("[student] kept from before\n")
    late.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_a_stage_that_failed_can_be_built_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> int:
        raise RuntimeError("the disk is full")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="the disk is full"):
            Stages(tmp_path).build("student", fail, "train")
    Stages(tmp_path).build("student", make, "train")
