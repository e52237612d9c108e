# SPDX-License-Identifier: Apache-2.0
"""The report: numbers of the table, a page that needs no other file, pictures that show every model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pydistill import recipes, report
from pydistill.recipes import bilstm_report


def make_results() -> dict[str, Any]:
    """A finished run of a teacher and three students with three seeds, numbers chosen to be easy to check by hand."""

    def model(name: str, accuracies: list[float], parameters: int, speed: float) -> dict[str, Any]:
        curve = [{"step": step, "loss": 1 / step, "eval_accuracy": 0.5 + step / 1000} for step in (100, 200, 300)]
        runs = [
            {
                "seed": seed,
                "folder": f"students/{name}-seed{seed}",
                "dev": {"accuracy": accuracy - 0.01},
                "test": {"accuracy": accuracy},
                "curve": curve if name != "teacher" else [],
                "steps": 300,
                "best_step": 200,
                "seconds": 12.5,
            }
            for seed, accuracy in enumerate(accuracies, 1)
        ]
        return {
            "name": name,
            "runs": runs,
            "parameters": parameters,
            "parameters_without_embeddings": parameters // 10,
            "file_bytes": 4 * parameters,
            "sentences_per_second": speed,
        }

    return {
        "recipe": "bilstm",
        "description": "a <b>description</b>",
        "metric": "accuracy",
        "split": "test",
        "task": {"train": 1000, "dev": 100, "test": 100, "notes": ["dev & test differ"], "example": ["a fine film"]},
        "models": [
            model("teacher", [0.80], 20_000_000, 100.0),
            model("hard", [0.60, 0.62, 0.64], 5_000_000, 2000.0),
            model("distilled", [0.66, 0.68, 0.70], 5_000_000, 2000.0),
            model("augmented", [0.75, 0.76, 0.77], 5_000_000, 2000.0),
        ],
        "stages": [{"name": "augment", "seconds": 3.2, "rows": 20000}],
        "environment": {"torch": "2.13.0"},
        "measured": "Speed on one machine.",
        "plan": "run\n  recipe  bilstm",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.json").write_text(json.dumps(make_results()))
    (tmp_path / "config.yaml").write_text("recipe: bilstm\n")
    return tmp_path


def test_table_holds_means_spreads_and_ratios() -> None:
    rows = bilstm_report.table(make_results())
    assert [row[0] for row in rows[1:]] == [
        bilstm_report.TITLES[name] for name in ("teacher", "hard", "distilled", "augmented")
    ]
    assert rows[1][1] == "80.0"
    assert rows[2][1] == "62.0 ± 2.0"  # sample deviation of 60, 62, 64
    assert rows[4][2] == "95.0 %"  # 76 of 80
    assert rows[4][5:] == ["20.0 MB", "2,000", "4.0x", "20x"]
    assert rows[1][7:] == ["", ""]


def test_text_table_is_aligned() -> None:
    lines = report.text_table([["model", "x"], ["a", "1"], ["longer", "12.5"]]).splitlines()
    assert lines == ["model      x", "------  ----", "a          1", "longer  12.5"]


def test_page_is_self_contained_and_escaped(folder: Path) -> None:
    page = recipes.report(folder)[0]
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<b>description</b>" not in text and "&lt;b&gt;description" in text
    assert "dev &amp; test differ" in text
    assert "distillation +6.0, distillation with augmentation +14.0" in text
    for row in bilstm_report.table(make_results()):
        for cell in row:
            assert cell.replace("&", "&amp;") in text
    assert not list(folder.glob("*.tmp*")) and not list(folder.glob(".*"))


def test_pictures_show_every_model() -> None:
    results = make_results()
    left, right = bilstm_report.draw_comparison(results).axes
    assert [label.get_text().replace("\n", " ") for label in left.get_yticklabels()] == list(
        bilstm_report.TITLES.values()
    )
    assert len(right.patches) == 4
    curves, losses = bilstm_report.draw_curves(results).axes
    assert len(curves.lines) == 9 + 1  # three students with three seeds, and the teacher's level
    assert len(losses.lines) == 9
    assert curves.lines[0].get_ydata()[-1] == pytest.approx(80.0)
    assert curves.get_xscale() == "linear"
    results["models"][3]["runs"][0]["steps"] = 3000
    assert bilstm_report.draw_curves(results).axes[0].get_xscale() == "log"


def test_best_student_is_chosen_on_dev_not_on_test() -> None:
    results = make_results()
    results["models"][1]["runs"][0]["dev"]["accuracy"] = 0.99
    assert bilstm_report.best_student(results)["folder"] == "students/hard-seed1"
    assert bilstm_report.predict_line(Path("runs/x"), results).startswith(
        'pydistill predict runs/x/students/hard-seed1 "a fine film"'
    )


def test_single_seed_has_no_spread() -> None:
    assert report.mean_and_spread([71.25]) == "71.2"


@pytest.mark.parametrize(
    "content",
    [None, "{", '{"models": []}', "[]", '{"recipe": "bilstm", "models": [], "stages": [], "environment": {}}'],
)
def test_folder_without_metrics_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(report.ReportError, match=r"metrics"):
        recipes.report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (
            {"recipe": "other"},
            "is a run of 'other', and only those of bilstm, minilm, mtdnn, shared-projections have a report",
        ),
        ({"task": {}}, "lacks what the report of bilstm shows (KeyError: 'train'); continue the run with this version"),
        ({"models": []}, "lacks what the report of bilstm shows"),
    ],
)
def test_run_of_another_kind_is_refused(folder: Path, change: dict[str, Any], rule: str) -> None:
    (folder / "metrics.json").write_text(json.dumps(make_results() | change))
    with pytest.raises(report.ReportError) as caught:
        recipes.report(folder)
    assert rule in str(caught.value)
    assert not (folder / "report.html").exists()


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    report.write_text(target, "old")
    with pytest.raises(RuntimeError), report.replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
