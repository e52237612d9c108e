# SPDX-License-Identifier: Apache-2.0
"""The measured tables of the documents, and the scripts that measure those of two recipes."""

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
SCRIPTS = ROOT / "docs" / "benchmarks"

pytestmark = pytest.mark.skipif(not SCRIPTS.exists(), reason="needs the source tree around the tests")


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
    with pytest.raises(ValueError, match="a table is one of speed, .*, teacher_cache, got 'evaluated'"):
        tables["fill"](tmp_path / "page.md", page.replace("evaluate ", "evaluated "))


def test_variants_table_has_the_last_student_of_every_run(tmp_path: Path) -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    for name, accuracies in (("all", [0.8, 0.9]), ("no-masking", [0.7])):
        runs = [{"rows": 1234, "steps": 50, "dev": {"accuracy": accuracy}} for accuracy in accuracies]
        results = {"metric": "accuracy", "split": "dev", "models": [{"runs": []}, {"runs": runs}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    page = f"<!-- table: variants {tmp_path}/all.json,{tmp_path}/no-masking.json -->\n<!-- end of table -->\n"
    filled = tables["fill"](tmp_path / "page.md", page)
    assert "| all | 1,234 | 50 | 85.0 ± 7.1 |\n| no-masking | 1,234 | 50 | 70.0 |" in filled


def test_steps_table_says_how_many_times_ours_is_faster(tmp_path: Path) -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))
    providers = {
        name: {"median_ms": ms, "p20_ms": ms - 1, "p80_ms": ms + 1, "extra_mib": ms / 2}
        for name, ms in (("eager", 900), ("ours", 200))
    }
    problem = {"rows": 32, "positions": 128, "relation_heads": 48, "providers": providers}
    (tmp_path / "steps.json").write_text(json.dumps({"machine": "cpu X", "threads": 2, "problems": [problem]}))
    page = f"<!-- table: steps {tmp_path}/steps.json -->\n<!-- end of table -->\n"
    filled = tables["fill"](tmp_path / "page.md", page)
    assert "| 32 x 128 | 48 | eager | 900 | 899 .. 901 | 4.5x | 450 |" in filled
    assert "| 32 x 128 | 48 | ours | 200 | 199 .. 201 |  | 100 |" in filled and "cpu X; 2 threads" in filled


@pytest.mark.parametrize(
    ("recipe", "files"),
    [("minilm", ["teacher", "students"]), ("shared-projections", ["teacher", "students", "96", "48"])],
)
def test_documents_name_the_scripts_and_their_files(recipe: str, files: list[str]) -> None:
    page = (ROOT / "docs" / "recipes" / f"{recipe}.md").read_text(encoding="utf-8")
    assert f"docs/benchmarks/{recipe}.sh DATA OUTPUT" in page
    script = (SCRIPTS / f"{recipe}.sh").read_text(encoding="utf-8")
    for name in files:
        assert f"docs/benchmarks/{recipe}-{name}.json" in page and name in script


def words_of(script: Path, folder: Path) -> list[list[str]]:
    """Run a script with a stand-in for pydistill; return the words of each call."""
    recorder = folder / "recorder.py"
    recorder.write_text("import json, sys\nprint(json.dumps(sys.argv[1:]), file=open(sys.argv[0] + '.log', 'a'))\n")
    environment = {**os.environ, "PYDISTILL": f"{sys.executable} {recorder}", "STEPS": "7"}
    subprocess.run(["bash", str(script), str(folder), str(folder / "out")], env=environment, check=True, timeout=60)
    return [json.loads(line) for line in Path(f"{recorder}.log").read_text().splitlines()]


def evaluations(calls: list[list[str]]) -> list[Any]:
    """The configurations of the two last calls: of the teacher, and of the students."""
    from pydistill.evaluate import EvaluateConfig

    assert [words[0] for words in calls] == ["evaluate"] * 2
    return [load_section(EvaluateConfig, Path(words[1]), parse_overrides(words[2:])) for words in calls]


def test_script_of_minilm_gives_commands_that_the_configuration_takes(tmp_path: Path) -> None:
    calls = words_of(SCRIPTS / "minilm.sh", tmp_path)
    distilled = {}
    for words in calls[:-2]:
        assert words[:3] == ["run", "minilm", "--resume"]
        config: Any = load_config(find_recipe("minilm"), parse_overrides(words[3:]))
        distilled[Path(config.output).name] = config
    variants = ("v1", "v1-assistant", "v2-12", "v2-48", "v1-qk", "undistilled")
    assert set(distilled) == {f"{name}-svd" for name in variants} | {"v1-random", "undistilled-random"}
    assert all(config.student.initialization == name.rsplit("-", 1)[1] for name, config in distilled.items())
    assert distilled["v2-48-svd"].objective.relation_heads == 48
    assert distilled["v1-qk-svd"].objective.relations == ["qk"]
    assert distilled["v1-assistant-svd"].assistant.hidden_size == 192
    assert distilled["v1-svd"].train["max_steps"] == 7
    assert distilled["undistilled-svd"].train["learning_rate"] == 0

    teacher, students = evaluations(calls[-2:])
    assert len(teacher.model) == 1 and teacher.train["learning_rate"] == 1e-4
    # Every student, the untrained one last: the table measures the gap from it.
    assert [Path(name).parent.name for name in students.model][-1] == "undistilled-random"
    assert {Path(name).parent.name for name in students.model} == set(distilled)
    assert students.seeds == [1, 2, 3] and students.tasks["mrpc"].data.dev_rows == 408


def test_script_of_shared_projections_gives_commands_that_the_configuration_takes(tmp_path: Path) -> None:
    calls = words_of(SCRIPTS / "shared-projections.sh", tmp_path)
    runs = {}
    for words in calls[:-2]:
        assert words[:3] == ["run", "shared-projections", "--resume"]
        config: Any = load_config(find_recipe("shared-projections"), parse_overrides(words[3:]))
        runs[Path(config.output).name] = config
    assert list(runs) == ["96", "48", "untrained-96"]
    assert runs["48"].student.hidden_size == 48 and runs["48"].arms == ["no_kd", "dual", "down", "up"]
    assert runs["96"].train["max_steps"] == 7 and runs["96"].evaluation_corpus.files[0].endswith("wikitext2.valid.txt")
    assert runs["untrained-96"].train["learning_rate"] == 0 and runs["untrained-96"].arms == ["no_kd"]

    teacher, students = evaluations(calls[-2:])
    assert len(teacher.model) == 1 and len(students.model) == 9
    assert students.tasks["snips"].data.text_columns == ["text"] and students.seeds == [1, 2, 3]
    short_name = runpy.run_path(str(ROOT / "docs" / "tables.py"))["short_name"]
    names = [f"{width}-{arm}" for width in (96, 48) for arm in ("no_kd", "dual", "down", "up")]
    assert [short_name(name) for name in students.model] == [*names, "untrained-96-no_kd"]


@pytest.mark.parametrize("recipe", ["minilm", "shared-projections"])
def test_benchmark_scripts_need_their_data(recipe: str, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPTS / f"{recipe}.sh"), str(tmp_path / "none"), "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "DATA must be a folder" in done.stderr


def test_reports_are_drawn_without_transformers() -> None:
    code = "import sys, pydistill.recipes as all; [all._imported(place) for place in all.PAGES.values()]"
    code += "; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
