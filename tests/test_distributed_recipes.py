# SPDX-License-Identifier: Apache-2.0
"""Recipes in two processes, each interrupted once: the same student and results as in one that sees the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import test_recipe_minilm
import test_recipe_mtdnn
import test_recipe_shared_projections
import torch
from distributed import several_tasks
from processes import launch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from pydistill.config import load_config
from pydistill.recipes import run

pytestmark = pytest.mark.slow

minilm_files = test_recipe_minilm.shared
mtdnn_files = test_recipe_mtdnn.shared
shared_projections_files = test_recipe_shared_projections.shared

FEW: dict[str, Any] = {
    "train.max_steps": 8,
    "train.save_steps": 3,
    "train.logging_steps": 2,
    # Or Adam makes a step of a gradient that is rounding alone.
    "train.adam_epsilon": 1e-3,
    "train.lr_scheduler_type": "constant",
}
TEXTS = {"evaluation_texts": 21}
STUDENTS = {"minilm": "student", "shared-projections": "students/down", "mtdnn": "mtdnn_kd/seed1"}


def without_dropout(folder: Path, target: Path) -> str:
    """Two processes draw other masks than one."""
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    AutoModel.from_pretrained(folder, **rates).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    return str(target)


@pytest.fixture(scope="module")
def recipes(
    minilm_files: Path, shared_projections_files: Path, mtdnn_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The recipes in one process, and in two with half as many rows each."""
    folder = tmp_path_factory.mktemp("recipes")
    keys = [
        test_recipe_minilm.settings(
            minilm_files,
            folder,
            corpus__packing="packed",
            corpus__max_length=32,
            assistant={"hidden_size": 16},
            student__initialization="layers",
            objective__relation_heads=8,
            **FEW | TEXTS,
        ),
        test_recipe_shared_projections.settings(shared_projections_files, folder, **FEW | TEXTS),
        test_recipe_mtdnn.settings(
            mtdnn_files, folder, tasks__second__train_teachers=1, train__save_strategy="steps", **FEW
        ),
    ]
    for one in keys:
        source = "encoder.model" if one["recipe"] == "mtdnn" else "teacher.model"
        one[source] = without_dropout(one[source], folder / f"model of {one['recipe']}")
    for one in keys:
        run(load_config(None, one | {"output": str(folder / one["recipe"] / "alone")}))
    rows = "train.per_device_train_batch_size"
    halves = json.dumps([one | {rows: one[rows] // 2} for one in keys])
    (folder / "printed.txt").write_text(launch(2, "distributed.recipe", str(folder), halves))
    return folder


@pytest.mark.parametrize("recipe", STUDENTS)
def test_the_student_is_that_of_one_process(recipes: Path, recipe: str) -> None:
    """Each process has its own rows of the stream, and goes on with those that it has not seen."""
    together, alone = (recipes / recipe / name / STUDENTS[recipe] for name in ("together", "alone"))
    found, expected = (load_file(folder / "model.safetensors") for folder in (together, alone))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recipe", STUDENTS)
def test_the_results_are_those_of_one_process(recipes: Path, recipe: str) -> None:
    together, alone = (
        json.loads((recipes / recipe / name / "metrics.json").read_text()) for name in ("together", "alone")
    )
    # All processes return what one of them has found out.
    for rank in (0, 1):
        assert json.loads((recipes / recipe / f"results-of-{rank}.json").read_text()) == together
    assert "in each of 2 processes" in together["plan"]
    for mine, theirs in zip(together["models"], alone["models"], strict=True):
        numbers = [name for name in theirs if name.startswith("loss") or name == "average"]
        assert numbers or theirs["name"] == "teacher"
        assert {name: mine[name] for name in numbers} == pytest.approx(
            {name: theirs[name] for name in numbers}, rel=1e-4
        )
    # Nothing is left of what the processes worked with; parts of a cache are named by the bits of what they hold.
    entries = [
        {path.name for path in (recipes / recipe / name).rglob("*") if not path.name.startswith("signals-")}
        for name in ("together", "alone")
    ]
    assert entries[0] == entries[1]


def test_every_line_is_printed_once(recipes: Path) -> None:
    printed = (recipes / "printed.txt").read_text()
    assert printed.count("[student] learn from") == 1 and printed.count("[assistant] learn from") == 2  # begun twice
    assert printed.count("[vocabulary] kept from before") == 1
    assert printed.count("[mtdnn/seed1] train on 2 tasks") == 2  # begun twice
    assert printed.count("[targets/second] 1 teacher labels") == 1
    assert printed.count("report:") == len(STUDENTS)


def test_several_tasks_in_several_processes(tmp_path: Path) -> None:
    """A task with fewer rows than processes is trained as in one process; an answer module leaves no process waiting;
    and the others wait for the first for longer than a collective operation would."""
    launch(2, "distributed.several_tasks", str(tmp_path))
    expected = several_tasks.train(tmp_path / "alone", several_tasks.UNEVEN, several_tasks.UNEVEN_SIZES, 1)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"of-{rank}.pt")
        assert found["said"] == "done"
        torch.testing.assert_close(found["weights"], dict(expected), rtol=1e-5, atol=1e-6)
