# SPDX-License-Identifier: Apache-2.0
"""The measured tables of the documents, and the script that measures those of the recipe minilm."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pydistill.config import find_recipe, load_config, load_section, parse_overrides

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "benchmarks" / "minilm.sh"

pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="needs the source tree around the tests")


def evaluated(**averages: float) -> dict[str, Any]:
    """The metrics.json of `pydistill evaluate` on one task with two seeds."""
    models = []
    for name, average in averages.items():
        runs = [{"seed": seed, "numbers": {"accuracy": average + shift}} for seed, shift in ((1, -0.01), (2, 0.01))]
        task = {"metric": "accuracy", "rows": {"train": 8000, "test": 1872}, "runs": runs}
        models.append({"model": f"runs/all/{name}/student", "tasks": {"sst2": task}, "average": average})
    return {"models": models}


def test_evaluate_table_joins_its_files_and_measures_the_gap(tmp_path: Path) -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    (tmp_path / "teacher.json").write_text(json.dumps(evaluated(teacher=0.9)))
    (tmp_path / "students.json").write_text(json.dumps(evaluated(distilled=0.8, undistilled=0.7)))
    page = f"<!-- table: evaluate {tmp_path}/teacher.json,{tmp_path}/students.json -->\nold\n<!-- end of table -->\n"
    filled = tables["fill"](tmp_path / "page.md", page)
    assert "old" not in filled
    assert "| teacher | 90.0 ± 1.4 | 100 % |" in filled  # sample deviation of 89 and 91
    assert "| distilled | 80.0 ± 1.4 | 50 % |" in filled and "| undistilled | 70.0 ± 1.4 | 0 % |" in filled
    assert "2 seeds. Rows: sst2: 8,000 train, 1,872 test. Gap closed: of the average between undistilled and" in filled
    assert tables["fill"](tmp_path / "page.md", filled) == filled

    (tmp_path / "students.json").unlink()
    missing = tables["fill"](tmp_path / "page.md", filled)
    assert "Not measured yet." in missing and "90.0" not in missing
    with pytest.raises(ValueError, match="a table is one of speed, bench, run, evaluate, got 'evaluated'"):
        tables["fill"](tmp_path / "page.md", page.replace("evaluate ", "evaluated "))


def test_documents_name_the_script_and_its_files() -> None:
    page = (ROOT / "docs" / "recipes" / "minilm.md").read_text(encoding="utf-8")
    assert "docs/benchmarks/minilm.sh DATA OUTPUT" in page
    script = SCRIPT.read_text(encoding="utf-8")
    for side in ("teacher", "students"):
        assert f"docs/benchmarks/minilm-{side}.json" in page and side in script


def test_benchmark_script_gives_commands_that_the_configuration_takes(tmp_path: Path) -> None:
    from pydistill.evaluate import EvaluateConfig

    # Stands for pydistill: notes the words it is given.
    recorder = tmp_path / "recorder.py"
    recorder.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]), file=open(sys.argv[0] + '.log', 'a'))\n")
    environment = {**os.environ, "PYDISTILL": f"{sys.executable} {recorder}", "STEPS": "7"}
    subprocess.run(["bash", str(SCRIPT), str(tmp_path), str(tmp_path / "out")], env=environment, check=True, timeout=60)
    calls = [json.loads(line) for line in Path(f"{recorder}.log").read_text().splitlines()]
    distilled = {}
    for words in calls[:-2]:
        assert words[:3] == ["run", "minilm", "--resume"]
        config: Any = load_config(find_recipe("minilm"), parse_overrides(words[3:]))
        distilled[Path(config.output).name] = config
    variants = ("v1", "v1-assistant", "v2-12", "v2-48", "v1-qk", "undistilled")
    assert set(distilled) == {f"{name}-{start}" for name in variants for start in ("svd", "random")}
    assert all(config.student.initialization == name.rsplit("-", 1)[1] for name, config in distilled.items())
    assert distilled["v2-48-svd"].objective.relation_heads == 48
    assert distilled["v1-qk-svd"].objective.relations == ["qk"]
    assert distilled["v1-assistant-random"].assistant.hidden_size == 192
    assert distilled["v1-svd"].train["max_steps"] == 7
    assert distilled["undistilled-svd"].train["learning_rate"] == 0

    teacher, students = (
        load_section(EvaluateConfig, Path(words[1]), parse_overrides(words[2:]))
        for words in calls[-2:]
        if words[0] == "evaluate"
    )
    assert len(teacher.model) == 1 and teacher.train["learning_rate"] == 1e-4
    # Every student, the untrained one last: the table measures the gap from it.
    assert [Path(name).parent.name for name in students.model][-1] == "undistilled-random"
    assert {Path(name).parent.name for name in students.model} == set(distilled)
    assert students.seeds == [1, 2, 3] and students.tasks["mrpc"].data.dev_rows == 408


def test_benchmark_script_needs_its_data(tmp_path: Path) -> None:
    done = subprocess.run(["bash", str(SCRIPT), str(tmp_path / "none"), "out"], capture_output=True, text=True)
    assert done.returncode == 2 and "DATA must be a folder" in done.stderr


def test_reports_are_drawn_without_transformers() -> None:
    code = "import sys, pydistill.recipes as all; [all._imported(place) for place in all.PAGES.values()]"
    code += "; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
