# SPDX-License-Identifier: Apache-2.0
"""The page and the pictures of a finished run, made from the files in its folder alone.

What the page of a recipe shows is said beside the recipe (``recipes/<recipe>_report.py``); how a page is built, here.
"""

from __future__ import annotations

import base64
import html
import json
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydistill.config import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
TEACHER_COLOUR = "#444444"
OTHER_COLOUR = "#CC79A7"

Table = Sequence[Sequence[str]]  # the first row is the header


class ReportError(UserError):
    """The folder is not that of a finished run."""


@dataclass(frozen=True)
class Picture:
    """One picture of a run: a file in its folder, and a part of its page."""

    file: str  # its name, NAME.png
    heading: str
    draw: Callable[[], Figure]
    caption: str = ""


@dataclass(frozen=True)
class Page:
    """What a recipe shows of a finished run; every text is plain text."""

    lead: str  # what came out, in a sentence or two
    table: Table  # that the run prints
    measured: str  # how the numbers of the table came about
    pictures: Sequence[Picture]
    next_step: str  # a command to try
    notes: Sequence[str] = ()
    details: Mapping[str, Table] = field(default_factory=dict)  # further tables by title, folded


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
        for key in ("recipe", "models", "stages", "environment", "plan"):
            results[key]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: is not the metrics of a run: {type(error).__name__}: {error}") from None
    return results


def mean_and_spread(values: Sequence[float]) -> str:
    """Format a mean, with the sample standard deviation where there is more than one value."""
    mean = statistics.fmean(values)
    return f"{mean:.1f}" if len(values) < 2 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def times(ratio: float) -> str:
    """Format how many times smaller or faster, with two digits or more."""
    return f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"


COSTS = ("parameters", "without embeddings", "file")


def cost_cells(model: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    """Format what a model costs, for the columns `COSTS`, rows per second, smaller and faster than its teacher."""
    cells = [
        f"{model['parameters']:,}",
        f"{model['parameters_without_embeddings']:,}",
        f"{model['file_bytes'] / 1e6:.1f} MB",
        f"{model['sentences_per_second']:,.0f}",
    ]
    if model is teacher:
        return [*cells, "", ""]
    smaller = teacher["file_bytes"] / model["file_bytes"]
    faster = model["sentences_per_second"] / teacher["sentences_per_second"]
    return [*cells, times(smaller), times(faster)]


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


def write_report(folder: Path, make_page: Callable[[Path, dict[str, Any]], Page]) -> tuple[Path, Page]:
    """Draw the pictures and write the self-contained page of a run; return where it is and what it shows.

    Args:
        folder: the output folder of a run with ``metrics.json`` and ``config.yaml``.
        make_page: folder, results -> what the recipe shows.

    Raises:
        ReportError: the folder is not that of a finished run.
    """
    results = read_results(folder)
    try:
        page = make_page(folder, results)
    except (KeyError, IndexError, TypeError) as error:
        raise ReportError(
            f"{folder / METRICS_FILE}: lacks what the report of {results['recipe']} shows ({type(error).__name__}: "
            f"{error}); continue the run with this version: pydistill run {folder / 'config.yaml'} --resume"
        ) from None
    pictures = {}
    for picture in page.pictures:
        with replacing(folder / picture.file) as temporary:
            save_figure(picture.draw, temporary)
            pictures[picture.file] = temporary.read_bytes()
    config = folder / "config.yaml"
    content = _html(results, page, pictures, config.read_text(encoding="utf-8") if config.is_file() else "")
    write_text(folder / REPORT_FILE, content)
    return folder / REPORT_FILE, page


def save_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a figure in the style of the reports and save it as png."""
    import matplotlib

    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        draw().savefig(path, dpi=144, format="png")


def draw_speeds(axis: Axes, models: Sequence[Mapping[str, Any]], colours: Sequence[str]) -> None:
    """Draw what each model costs: a bar of its sentences per second, with the number of its parameters."""
    places = range(len(models))
    speeds = [model["sentences_per_second"] for model in models]
    axis.barh(list(places), speeds, color=list(colours), height=0.5)
    for place, model, speed in zip(places, models, speeds, strict=True):
        label = f" {speed:,.0f}/s, {model['parameters'] / 1e6:.1f} M parameters"
        axis.annotate(label, (speed, place), va="center", fontsize=9)
    axis.set_xscale("log")
    axis.set_xlim(min(speeds) / 4, max(speeds) * 40)
    axis.tick_params(axis="y", length=0)
    axis.set_title("sentences per second, log scale", loc="left", fontsize=10)


def draw_falls(models: Sequence[Mapping[str, Any]], colours: Sequence[str], title: str) -> Figure:
    """Draw how far the loss of each trained model fell (left) and what each costs (right).

    Args:
        models: with ``name``, ``layers`` and ``hidden_size``, what `draw_speeds` reads, and where there is a loss,
            ``loss_before`` and ``loss_after``.
        colours: of each.
        title: of the losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.9 + 0.62 * len(models)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for place, (model, colour) in enumerate(zip(models, colours, strict=True)):
        before, after = model.get("loss_before"), model.get("loss_after")
        if before is None or after is None:
            continue
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 5, "shrinkB": 5}
        left.annotate("", (after, place), (before, place), arrowprops=arrow)
        left.plot(before, place, "o", color="white", markeredgecolor=colour, markeredgewidth=1.5, markersize=8)
        left.plot(after, place, "o", color=colour, markersize=8)
        # Outwards, or two numbers that are close would be written over each other.
        for value, other in ((before, after), (after, before)):
            side = "left" if value >= other else "right"
            left.annotate(f"{value:.3f}", (value, place), (0, 9), textcoords="offset points", ha=side)
    names = [f"{model['name']}\n{model['layers']} x {model['hidden_size']}" for model in models]
    left.set_yticks(range(len(models)), names)
    left.set_ylim(len(models) - 0.5, -0.7)
    measured = [value for model in models for key in ("loss_before", "loss_after") if (value := model.get(key))]
    left.set_xlim(0, 1.15 * max(measured, default=1))
    left.axvline(0, color=TEACHER_COLOUR, linewidth=0.8, linestyle=":")
    left.tick_params(axis="y", length=0)
    left.grid(axis="x", alpha=0.25)
    left.set_title(title, loc="left", fontsize=10)
    draw_speeds(right, models, colours)
    right.set_title("texts per second, log scale", loc="left", fontsize=10)
    return figure


def draw_line(axis: Axes, curve: Sequence[Mapping[str, Any]], key: str, **options: Any) -> None:
    """Draw what a training logged under ``key`` over its steps; a single value as a point, none as nothing."""
    points = [(entry["step"], entry[key]) for entry in curve if key in entry]
    if points:
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, **{"lw": 1.5, "marker": "" if len(points) > 1 else "o"} | options)


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


def _html(results: dict[str, Any], page: Page, pictures: Mapping[str, bytes], config: str) -> str:
    title = f"pydistill run: {results['recipe']}"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in page.notes)
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f'<p class="lead">{html.escape(results.get("description", ""))}</p>',
            f"<p>{html.escape(page.lead)}</p>",
            f'<div class="scroll">{_html_table(page.table)}</div>',
            f"<p>{html.escape(page.measured)}</p>",
            f"<ul>{notes}</ul>" if notes else "",
            *(_html_picture(picture, pictures[picture.file]) for picture in page.pictures),
            "<h2>Stages</h2>",
            _html_table([["stage", "time", "rows or steps"], *_stages(results)]),
            f"<h2>Try it</h2><pre>{html.escape(page.next_step)}</pre>",
            f"<h2>Details</h2><details><summary>plan</summary><pre>{html.escape(results['plan'])}</pre></details>",
            "<details><summary>configuration (again: pydistill run config.yaml --output ANOTHER_FOLDER)</summary>",
            f"<pre>{html.escape(config)}</pre></details>",
            *(_folded(title, rows) for title, rows in page.details.items()),
            "<details><summary>environment</summary>",
            _html_table([["", ""], *([key, str(value)] for key, value in results["environment"].items())], "facts"),
            "</details></body></html>\n",
        ]
    )


def _html_picture(picture: Picture, data: bytes) -> str:
    caption = f"<p>{html.escape(picture.caption)}</p>" if picture.caption else ""
    alternative = html.escape(picture.file.removesuffix(".png"))
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<h2>{html.escape(picture.heading)}</h2>{caption}<img alt="{alternative}" src="{source}">'


def _folded(title: str, rows: Table) -> str:
    return f'<details><summary>{html.escape(title)}</summary><div class="scroll">{_html_table(rows)}</div></details>'


def _html_table(rows: Sequence[Sequence[str]], kind: str = "") -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    head = f"<thead><tr>{cells(rows[0], 'th')}</tr></thead>" if any(rows[0]) else ""
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows[1:])
    return f'<table class="{kind}">{head}<tbody>{body}</tbody></table>'


def _stages(results: dict[str, Any]) -> list[list[str]]:
    return [[stage["name"], f"{stage['seconds']:.1f} s", f"{stage['rows']:,}"] for stage in results["stages"]]
