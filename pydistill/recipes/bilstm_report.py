# SPDX-License-Identifier: Apache-2.0
"""What the report of a ``bilstm`` run shows: its table, its pictures, and the command to try next."""

from __future__ import annotations

import shlex
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydistill.report import (
    COSTS,
    OTHER_COLOUR,
    TEACHER_COLOUR,
    Page,
    Picture,
    cost_cells,
    draw_speeds,
    mean_and_spread,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "teacher": "teacher",
    "hard": "student, hard labels",
    "distilled": "student, distilled",
    "augmented": "student, distilled + augmentation",
}
# Okabe and Ito's palette: told apart with every kind of colour vision.
COLOURS = {"teacher": TEACHER_COLOUR, "hard": "#E69F00", "distilled": "#56B4E9", "augmented": "#009E73"}
METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews correlation"}


def page(folder: Path, results: dict[str, Any]) -> Page:
    """Return what the page of the run in ``folder`` holds."""
    task = results["task"]
    rows = f"{task['train']:,} training rows, {task['dev']:,} dev"
    rows += f", {task['test']:,} test." if results["split"] == "test" else "."
    return Page(
        lead=f"{rows} {_sentence(results)}",
        table=table(results),
        measured=results["measured"],
        notes=task["notes"],
        pictures=[
            Picture("comparison.png", "Comparison", lambda: draw_comparison(results)),
            Picture("curves.png", "Training", lambda: draw_curves(results)),
        ],
        next_step=predict_line(folder, results),
        details={"every run": _every_run(results)},
    )


def scores(model: dict[str, Any], results: dict[str, Any]) -> list[float]:
    """Return a model's reported metric in percent, one per seed."""
    return [100 * run[results["split"]][results["metric"]] for run in model["runs"]]


def table(results: dict[str, Any]) -> list[list[str]]:
    """Return the header and one row per model of the table that a run prints."""
    teacher = results["models"][0]
    teacher_score = statistics.fmean(scores(teacher, results))
    header = [
        "model",
        f"{METRIC_NAMES[results['metric']]}, %",
        "of teacher",
        *COSTS,
        "sentences/s",
        "smaller",
        "faster",
    ]
    rows = [header]
    for model in results["models"]:
        values = scores(model, results)
        rows.append(
            [
                TITLES.get(model["name"], model["name"]),
                mean_and_spread(values),
                ""
                if model is teacher or teacher_score <= 0
                else f"{100 * statistics.fmean(values) / teacher_score:.1f} %",
                *cost_cells(model, teacher),
            ]
        )
    return rows


def draw_comparison(results: dict[str, Any]) -> Figure:
    """Draw what each way of training bought (left) and what the student costs beside its teacher (right)."""
    from matplotlib.figure import Figure

    models = results["models"]
    names = [TITLES.get(model["name"], model["name"]).replace(" + ", "\n+ ") for model in models]
    colours = [COLOURS.get(model["name"], OTHER_COLOUR) for model in models]
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
    left.axvline(statistics.fmean(scores(models[0], results)), color=TEACHER_COLOUR, linewidth=0.8, linestyle=":")
    left.margins(x=0.15)
    left.set_ylim(len(models) - 0.5, -0.7)
    left.set_yticks(list(places), names)
    left.tick_params(axis="y", length=0)
    left.grid(axis="x", alpha=0.25)
    seeds = max(len(model["runs"]) for model in models)
    spread = f"; point: mean of {seeds} seeds, bars: each seed" if seeds > 1 else ""
    left.set_title(f"{METRIC_NAMES[results['metric']]} on {results['split']}, %{spread}", loc="left", fontsize=10)

    draw_speeds(right, models, colours)
    return figure


def draw_curves(results: dict[str, Any]) -> Figure:
    """Draw the metric on dev and the training loss over the steps, one line per student."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for model in results["models"]:
        colour = COLOURS.get(model["name"], OTHER_COLOUR)
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
    left.axhline(level, color=TEACHER_COLOUR, linewidth=0.8, linestyle=":", label="teacher, final")
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
