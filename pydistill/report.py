# SPDX-License-Identifier: Apache-2.0
"""The page and the pictures of a finished run, made from its ``metrics.json`` and ``config.yaml`` alone."""

from __future__ import annotations

import base64
import html
import json
import os
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydistill.config import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
TITLES = {
    "teacher": "teacher",
    "hard": "student, hard labels",
    "distilled": "student, distilled",
    "augmented": "student, distilled + augmentation",
}
# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = {"teacher": "#444444", "hard": "#E69F00", "distilled": "#56B4E9", "augmented": "#009E73"}
METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation"}


class ReportError(UserError):
    """The folder is not that of a finished run."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``target`` and move the file there when the block ends without an exception."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file that is never seen half-written."""
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_results(folder: Path) -> dict[str, Any]:
    """Read the ``metrics.json`` of a run folder.

    Raises:
        ReportError: there is none, or it is not that of a run.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ReportError(f"{folder}: holds no {METRICS_FILE}: it is not the folder of a finished run")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["models"], results["metric"], results["split"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: is not the metrics of a run: {type(error).__name__}: {error}") from None
    return results


def scores(model: dict[str, Any], results: dict[str, Any]) -> list[float]:
    """Return a model's reported metric in percent, one per seed."""
    return [100 * run[results["split"]][results["metric"]] for run in model["runs"]]


def mean_and_spread(values: Sequence[float]) -> str:
    """Format a mean, with the sample standard deviation where there is more than one value."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def table(results: dict[str, Any]) -> list[list[str]]:
    """Return the header and one row per model of the table that a run prints."""
    teacher = results["models"][0]
    teacher_score = statistics.fmean(scores(teacher, results))
    header = [
        "model",
        f"{METRIC_NAMES[results['metric']]}, %",
        "of teacher",
        "parameters",
        "without embeddings",
        "file",
        "sentences/s",
        "smaller",
        "faster",
    ]
    rows = [header]
    for model in results["models"]:
        values = scores(model, results)
        own = model is teacher
        rows.append(
            [
                TITLES.get(model["name"], model["name"]),
                mean_and_spread(values),
                "" if own or teacher_score <= 0 else f"{100 * statistics.fmean(values) / teacher_score:.1f} %",
                f"{model['parameters']:,}",
                f"{model['parameters_without_embeddings']:,}",
                f"{model['file_bytes'] / 1e6:.1f} MB",
                f"{model['sentences_per_second']:,.0f}",
                "" if own else _times(teacher["file_bytes"] / model["file_bytes"]),
                "" if own else _times(model["sentences_per_second"] / teacher["sentences_per_second"]),
            ]
        )
    return rows


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Align a table for the terminal: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def write_report(folder: Path) -> Path:
    """Draw the pictures and write the self-contained page of a run; return the page.

    Args:
        folder: the output folder of a run with ``metrics.json`` and ``config.yaml``.

    Raises:
        ReportError: the folder is not that of a finished run.
    """
    results = read_results(folder)
    pictures = {}
    for name, draw in (("comparison.png", draw_comparison), ("curves.png", draw_curves)):
        with replacing(folder / name) as temporary:
            _save(draw, results, temporary)
            pictures[name] = temporary.read_bytes()
    config = folder / "config.yaml"
    page = _page(folder, results, pictures, config.read_text(encoding="utf-8") if config.is_file() else "")
    write_text(folder / REPORT_FILE, page)
    return folder / REPORT_FILE


def _save(draw: Callable[[dict[str, Any]], Figure], results: dict[str, Any], path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        draw(results).savefig(path, dpi=144, format="png")


def draw_comparison(results: dict[str, Any]) -> Figure:
    """Draw what each way of training bought (left) and what the student costs beside its teacher (right)."""
    from matplotlib.figure import Figure

    models = results["models"]
    names = [TITLES.get(model["name"], model["name"]).replace(" + ", "\n+ ") for model in models]
    colours = [COLOURS.get(model["name"], "#CC79A7") for model in models]
    figure = Figure(figsize=(10, 0.8 + 0.62 * len(models)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))

    places = range(len(models))
    for place, model, colour in zip(places, models, colours, strict=True):
        values = scores(model, results)
        mean = statistics.fmean(values)
        if len(values) > 1:
            left.plot(values, [place] * len(values), "|", color=colour, markersize=14, alpha=0.8)
        left.plot(mean, place, "o", color=colour, markersize=9)
        left.annotate(
            mean_and_spread(values),
            (mean, place),
            (0, 10),
            textcoords="offset points",
            ha="center",
            bbox={"boxstyle": "square,pad=0.1", "color": "white"},
        )
    left.axvline(statistics.fmean(scores(models[0], results)), color=COLOURS["teacher"], linewidth=0.8, linestyle=":")
    left.margins(x=0.15)
    left.set_ylim(len(models) - 0.5, -0.7)
    left.set_yticks(list(places), names)
    left.tick_params(axis="y", length=0)
    left.grid(axis="x", alpha=0.25)
    seeds = max(len(model["runs"]) for model in models)
    spread = f"; point: mean of {seeds} seeds, bars: each seed" if seeds > 1 else ""
    left.set_title(f"{METRIC_NAMES[results['metric']]} on {results['split']}, %{spread}", loc="left", fontsize=10)

    speeds = [model["sentences_per_second"] for model in models]
    right.barh(list(places), speeds, color=colours, height=0.5)
    for place, model, speed in zip(places, models, speeds, strict=True):
        label = f" {speed:,.0f}/s, {model['parameters'] / 1e6:.1f} M parameters"
        right.annotate(label, (speed, place), va="center", fontsize=9)
    right.set_xscale("log")
    right.set_xlim(min(speeds) / 4, max(speeds) * 40)
    right.tick_params(axis="y", length=0)
    right.set_title("sentences per second, log scale", loc="left", fontsize=10)
    return figure


def draw_curves(results: dict[str, Any]) -> Figure:
    """Draw the metric on dev and the training loss over the steps, one line per student."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model in results["models"]:
        colour = COLOURS.get(model["name"], "#CC79A7")
        for number, run in enumerate(model["runs"]):
            label = TITLES.get(model["name"], model["name"]) if number == 0 else None
            for axis, key, scale in ((left, f"eval_{results['metric']}", 100), (right, "loss", 1)):
                points = [(entry["step"], scale * entry[key]) for entry in run.get("curve", []) if key in entry]
                if points:
                    steps, values = zip(*points, strict=True)
                    # Evaluations are few: their points are shown.
                    marker = "o" if axis is left else ""
                    axis.plot(steps, values, f"{marker}-", ms=4, lw=1.5, color=colour, alpha=0.85, label=label)
    teacher = results["models"][0]
    level = 100 * statistics.fmean(run["dev"][results["metric"]] for run in teacher["runs"])
    left.axhline(level, color=COLOURS["teacher"], linewidth=0.8, linestyle=":", label="teacher, final")
    left.set_title(f"{METRIC_NAMES[results['metric']]} on dev, %", loc="left", fontsize=10)
    right.set_title("training loss, log scale (each way of training has its own loss)", loc="left", fontsize=10)
    right.set_yscale("log")
    ends = [run["steps"] for model in results["models"] for run in model["runs"] if run.get("curve")]
    # Augmented students take many more steps; on one linear scale the others would be a vertical line.
    spread_out = bool(ends) and max(ends) > 4 * min(ends)
    for axis in (left, right):
        axis.set_xlabel("optimizer steps, log scale" if spread_out else "optimizer steps")
        if spread_out:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 1160px; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
.lead { color: #555; margin-top: .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e5e5e5; }
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; white-space: normal; }
th { font-weight: 600; border-bottom: 2px solid #bbb; }
img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: .8rem; white-space: pre-wrap; font-size: 13px; line-height: 1.4; }
summary { cursor: pointer; font-weight: 600; margin: .6rem 0; }
"""


def _page(folder: Path, results: dict[str, Any], pictures: dict[str, bytes], config: str) -> str:
    title = f"pydistill run: {results['recipe']}"
    task = results["task"]
    rows = f"{task['train']:,} training rows, {task['dev']:,} dev"
    rows += f", {task['test']:,} test." if results["split"] == "test" else "."
    images = {
        name: f'<img alt="{name.removesuffix(".png")}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in pictures.items()
    }
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in results["task"]["notes"])
    sentence = html.escape(_sentence(results))
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="lead">{html.escape(results.get("description", ""))}</p>',
            f"<p>{rows} {sentence}</p>",
            f'<div class="scroll">{_html_table(table(results))}</div>',
            f"<p>{html.escape(results['measured'])}</p>",
            f"<ul>{notes}</ul>" if notes else "",
            f"<h2>Comparison</h2>{images['comparison.png']}",
            f"<h2>Training</h2>{images['curves.png']}",
            "<h2>Stages</h2>",
            _html_table([["stage", "time", "rows or steps"], *_stages(results)]),
            f"<h2>Try it</h2><pre>{html.escape(predict_line(folder, results))}</pre>",
            f"<h2>Details</h2><details><summary>plan</summary><pre>{html.escape(results['plan'])}</pre></details>",
            "<details><summary>configuration (again: pydistill run config.yaml --output ANOTHER_FOLDER)</summary>",
            f"<pre>{html.escape(config)}</pre></details>",
            "<details><summary>every run</summary>",
            f'<div class="scroll">{_html_table(_every_run(results))}</div></details>',
            "<details><summary>environment</summary>",
            _html_table([["", ""], *([key, str(value)] for key, value in results["environment"].items())], "facts"),
            "</details></body></html>\n",
        ]
    )


def _html_table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    head = f"<thead><tr>{cells(rows[0], 'th')}</tr></thead>" if any(rows[0]) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f'<table class="{kind}">{head}<tbody>{body}</tbody></table>'


def _stages(results: dict[str, Any]) -> list[list[str]]:
    return [[stage["name"], f"{stage['seconds']:.1f} s", f"{stage['rows']:,}"] for stage in results["stages"]]


def _every_run(results: dict[str, Any]) -> list[list[str]]:
    metric, splits = results["metric"], list(dict.fromkeys(["dev", results["split"]]))
    rows = [["model", "seed", *(f"{metric} on {split}" for split in splits), "steps", "best step", "seconds"]]
    for model in results["models"]:
        for run in model["runs"]:
            values = [f"{100 * run[split][metric]:.2f}" for split in splits]
            facts = [str(run.get(key, "")) for key in ("steps", "best_step", "seconds")]
            rows.append([TITLES.get(model["name"], model["name"]), str(run["seed"]), *values, *facts])
    return rows


def _sentence(results: dict[str, Any]) -> str:
    """Say in one sentence what distillation and augmentation bought."""
    means = {model["name"]: statistics.fmean(scores(model, results)) for model in results["models"]}
    parts = []
    if "hard" in means:
        for name, what in (("distilled", "distillation"), ("augmented", "distillation with augmentation")):
            if name in means:
                parts.append(f"{what} {means[name] - means['hard']:+.1f}")
    if not parts:
        return f"Reported on {results['split']}."
    return f"Points over hard labels, on {results['split']}: {', '.join(parts)}."


def best_student(results: dict[str, Any]) -> dict[str, Any]:
    """Return the student run with the best metric on dev."""
    runs = [run for model in results["models"][1:] for run in model["runs"]]
    return max(runs, key=lambda run: run["dev"][results["metric"]])


def predict_line(folder: Path, results: dict[str, Any]) -> str:
    """Return a command that tries the best student."""
    model = folder / best_student(results)["folder"]
    special = set('"\\$`!')
    texts = [shlex.quote(text) if special & set(text) else f'"{text}"' for text in results["task"]["example"]]
    return f"pydistill predict {model} {' '.join(texts)}"
