# SPDX-License-Identifier: Apache-2.0
"""What the report of an ``mtdnn`` run shows: the scores of every arm on every task, and how the trainings went."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydistill.report import TEACHER_COLOUR, Page, Picture, draw_line, mean_and_spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {
    "single": ("one model per task", "#E69F00"),
    "mtdnn": ("all tasks, hard labels", "#0072B2"),
    "mtdnn_kd": ("all tasks, with soft targets", "#009E73"),
    "teachers": ("teachers, as an ensemble", TEACHER_COLOUR),
}
TUNED = ", fine-tuned"


def page(folder: Path, results: dict[str, Any]) -> Page:
    """Return what the page of the run in ``folder`` holds."""
    example = results["example"]
    texts = " ".join(shlex.quote(text) for text in example["texts"])
    pair = " --pair" if len(example["texts"]) == 2 else ""
    pictures = [Picture("comparison.png", "Comparison", lambda: draw_scores(results))]
    if results["curves"]:
        pictures.append(
            Picture("curves.png", "Training", lambda: draw_curves(results), "Training loss of each task, first seed.")
        )
    return Page(
        lead=_lead(results),
        table=table(results),
        measured=_measured(results),
        pictures=pictures,
        next_step=f"pydistill predict {folder / results['student']} --task {example['task']}{pair} {texts}",
        notes=[f"{name}: {note}" for name, notes in results["notes"].items() for note in notes],
        details={"every seed": _every_seed(results)},
    )


def title(name: str) -> str:
    """What a model is called in tables and pictures."""
    base = name.removesuffix(TUNED)
    return ARMS[base][0] + name[len(base) :]


def table(results: Mapping[str, Any]) -> list[list[str]]:
    """Return the header and one row per model: mean and deviation over the seeds, times 100."""
    tasks, taught = list(results["rows"]), results["taught"]
    metrics = _metrics(results)
    rows = [["model", *(f"{name}, {metrics[name]}" for name in tasks), "average"]]
    apart = 0 < len(taught) < len(tasks)
    if apart:
        rows[0] += ["with a teacher", "without"]
    for model in results["models"]:
        scores = {name: [100 * value for value in _values(one)] for name, one in model["tasks"].items()}
        cells = [mean_and_spread(scores[name]) if name in scores else "" for name in tasks]
        groups = [tasks, taught, [name for name in tasks if name not in taught]]
        averages = [
            # As the results' own average is made: the same numbers round alike wherever they are said.
            f"{100 * statistics.fmean(model['tasks'][name]['mean'] for name in group):.1f}"
            if all(name in scores for name in group)
            else ""
            for group in groups[: 3 if apart else 1]
        ]
        rows.append([title(model["name"]), *cells, *averages])
    return rows


def _values(entry: Mapping[str, Any]) -> list[float]:
    return [run["numbers"][entry["metric"]] for run in entry["runs"]]


def _metrics(results: Mapping[str, Any]) -> dict[str, str]:
    return {name: one["metric"] for model in results["models"] for name, one in model["tasks"].items()}


def _lead(results: Mapping[str, Any]) -> str:
    averages = {model["name"]: 100 * model["average"] for model in results["models"] if model["name"] != "teachers"}
    said = ", ".join(f"{title(name)} {value:.1f}" for name, value in averages.items())
    taught = ", ".join(results["taught"])
    return f"Average over the tasks: {said}.{f' Tasks with a teacher: {taught}.' if taught else ''}"


def _measured(results: Mapping[str, Any]) -> str:
    rows = "; ".join(
        f"{name}: {counts['train']:,} train, {counts['test']:,} held out" for name, counts in results["rows"].items()
    )
    seeds = max(len(one["runs"]) for model in results["models"] for one in model["tasks"].values())
    of = f"Mean ± deviation of {seeds} seeds" if seeds > 1 else "One seed"
    return f"{of}, times 100, after the last step. Rows: {rows}. Parameters: {results['parameters']:,}."


def _every_seed(results: Mapping[str, Any]) -> list[list[str]]:
    rows = [["model", "task", "seed", "metrics"]]
    for model in results["models"]:
        for name, entry in model["tasks"].items():
            for run in entry["runs"]:
                numbers = ", ".join(f"{metric} {100 * value:.2f}" for metric, value in run["numbers"].items())
                seed = "" if run["seed"] is None else str(run["seed"])
                rows.append([title(model["name"]), name, seed, numbers])
    return rows


def _colour(name: str) -> str:
    return ARMS[name.removesuffix(TUNED)][1]


def draw_scores(results: Mapping[str, Any]) -> Figure:
    """Draw the scores of every model on every task, with the deviation over the seeds."""
    from matplotlib.figure import Figure

    tasks, models = list(results["rows"]), results["models"]
    metrics = _metrics(results)
    figure = Figure(figsize=(10, 1.4 + (0.25 + 0.17 * len(models)) * len(tasks)), layout="constrained")
    axis = figure.subplots()
    for row, model in enumerate(models):
        offset = 0.66 * ((row + 0.5) / len(models) - 0.5)
        means, spreads, places = [], [], []
        for place, name in enumerate(tasks):
            if name in model["tasks"]:
                means.append(100 * model["tasks"][name]["mean"])
                spreads.append(100 * (model["tasks"][name]["deviation"] or 0))
                places.append(place + offset)
        axis.errorbar(
            means,
            places,
            xerr=spreads if any(spreads) else None,
            fmt="D" if model["name"] == "teachers" else "o",
            color=_colour(model["name"]),
            markerfacecolor="white" if model["name"].endswith(TUNED) else _colour(model["name"]),
            label=title(model["name"]),
            markersize=6,
            capsize=2,
        )
    taught = set(results["taught"])
    axis.set_yticks(
        range(len(tasks)), [f"{name}, {metrics[name]}{' (has a teacher)' if name in taught else ''}" for name in tasks]
    )
    axis.set_ylim(len(tasks) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.25)
    axis.set_title("on held-out rows, times 100", loc="left", fontsize=10)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def draw_curves(results: Mapping[str, Any]) -> Figure:
    """Draw the training loss of each task over the steps, a line for each arm that trains on all of them."""
    from matplotlib.figure import Figure

    tasks = list(results["rows"])
    columns = min(4, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(10, 2.6 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(tasks) :]:
        axis.set_axis_off()
    for axis, name in zip(axes, tasks, strict=False):
        for arm, curve in results["curves"].items():
            draw_line(axis, curve, f"loss_task.{name}", color=ARMS[arm][1], label=ARMS[arm][0])
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel("optimizer steps")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure
