# SPDX-License-Identifier: Apache-2.0
"""What the report of a ``shared-projections`` run shows: its table, the losses, and how a sentence is cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydistill.report import COSTS, TEACHER_COLOUR, Page, Picture, cost_cells, draw_falls, draw_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the picture of a sentence is drawn from, beside metrics.json.
SEGMENTATION_FILE = "segmentation.json"
ARM_COLOURS = {"no_kd": "#CC79A7", "dual": "#E69F00", "down": "#0072B2", "up": "#009E73"}
ARMS = {
    "no_kd": "trains alone",
    "dual": "has its tables of embeddings tied to the teacher's by a projection",
    "down": "has every weight of the teacher projected to its size",
    "up": "has every weight projected to the teacher's size",
}
PARTS = {
    "student": "student: masked pieces",
    "teacher": "teacher: masked pieces",
    "projection": "projection, unweighted",
    "student_next": "student: next sentence",
    "teacher_next": "teacher: next sentence",
}
# Of the pieces of either vocabulary: edge and text, fill.
VOCABULARY_COLOURS = {"teacher": (TEACHER_COLOUR, "#EEEEEE"), "student": ("#0072B2", "#DCEBF5")}
# Letters of a fixed-width font in one line of the picture, and what a box has around its letters.
LINE, MARGIN = 88.0, 1.4
SIDES = ("teacher", "student")


def page(folder: Path, results: dict[str, Any]) -> Page:
    """Return what the page of the run in ``folder`` holds."""
    models = results["models"]
    colours = [TEACHER_COLOUR, *(ARM_COLOURS[model["name"]] for model in models[1:])]
    pictures = [
        Picture(
            "comparison.png",
            "Comparison",
            lambda: draw_falls(models, colours, "loss of the masked pieces, before and after the training"),
        ),
        Picture("curves.png", "Training", lambda: draw_curves(models[1:])),
    ]
    source = folder / SEGMENTATION_FILE
    if source.is_file():
        shown = json.loads(source.read_text(encoding="utf-8"))
        pictures.append(
            Picture(
                "segmentation.png",
                "One sentence",
                lambda: draw_segmentation(shown),
                "How it is cut and masked; the draw is another one in every pass. Another sentence: the same command "
                'with --resume --picture.sentence "...".',
            )
        )
    best = min(models[1:], key=lambda model: model["loss_after"])
    return Page(
        lead=_lead(results),
        table=table(results),
        measured=f"{results['measured']} In training: on the corpus, a mean of the last steps logged, with dropout.",
        pictures=pictures,
        next_step=(
            "pydistill evaluate --tasks.mine.data.train YOUR.tsv --tasks.mine.data.text_columns sentence "
            f"--model {folder / 'students' / best['name']} --output {folder / 'evaluation'}"
        ),
        details={"every arm": _every_arm(models[1:])},
    )


def table(results: dict[str, Any]) -> list[list[str]]:
    """Return the header and one row per model of the table that a run prints."""
    teacher = results["models"][0]
    losses = ("loss before", "after", "in training")
    rows = [["model", "layers x hidden", "pieces", *losses, *COSTS, "texts/s", "smaller", "faster"]]
    for model in results["models"]:
        found = (model.get("loss_before"), model.get("loss_after"), _last_in_training(model))
        cells = ["" if loss is None else f"{loss:.3f}" for loss in found]
        sizes = [f"{model['layers']} x {model['hidden_size']}", f"{model['vocabulary']:,}"]
        rows.append([model["name"], *sizes, *cells, *cost_cells(model, teacher)])
    return rows


def _last_in_training(model: Mapping[str, Any]) -> float | None:
    """The student's loss at the last steps that were logged; None for the teacher, and where none were."""
    logged = [entry["loss_student"] for entry in model.get("curve", ()) if "loss_student" in entry]
    return logged[-1] if logged else None


def _lead(results: dict[str, Any]) -> str:
    ranked = sorted(results["models"][1:], key=lambda model: model["loss_after"])
    losses = ", ".join(f"{model['name']} {model['loss_after']:.3f}" for model in ranked)
    arms = "; ".join(f"{model['name']} {ARMS[model['name']]}" for model in results["models"][1:])
    return (
        f"Loss per masked piece of the student on {results['evaluation_texts']:,} texts, lowest first: {losses}. "
        f"Of the arms, {arms}."
    )


def _every_arm(trained: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    parts = [part for part in PARTS if any(part in model["parts_after"] for model in trained)]
    rows = [["arm", "steps", "seconds", *(f"{PARTS[part]}, {when}" for part in parts for when in ("before", "after"))]]
    for model in trained:
        losses = [
            f"{model[f'parts_{when}'][part]:.3f}" if part in model["parts_after"] else ""
            for part in parts
            for when in ("before", "after")
        ]
        rows.append([model["name"], f"{model['steps']:,}", f"{model['seconds']:.0f}", *losses])
    return rows


def draw_curves(trained: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw each part of the training loss over the steps, a line for each arm that has it."""
    from matplotlib.figure import Figure

    parts = [part for part in PARTS if any(part in model["parts_after"] for model in trained)]
    columns = min(3, len(parts))
    lines = -(-len(parts) // columns)
    figure = Figure(figsize=(10, 3.7 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(parts) :]:
        axis.set_axis_off()
    for axis, part in zip(axes, parts, strict=False):
        for model in trained:
            draw_line(axis, model["curve"], f"loss_{part}", color=ARM_COLOURS[model["name"]], label=model["name"])
        axis.set_title(PARTS[part], loc="left", fontsize=10)
        if part == "projection":
            axis.set_yscale("log")
            axis.set_title(f"{PARTS[part]}, log scale", loc="left", fontsize=10)
        axis.set_xlabel("optimizer steps")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25, which="both")
        if axis.lines:  # a run shorter than one logging window has none
            axis.legend(frameon=False, fontsize=9)
    return figure


def draw_segmentation(shown: Mapping[str, Any]) -> Figure:
    """Draw how teacher and student read a sentence, as in the paper's first figure.

    Args:
        shown: what `pydistill.data.mixed_vocab.example` returns.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Patch

    words = _by_word(shown)
    lines = _lines([max(_width(word[side]) for side in SIDES) for word in words])
    figure = Figure(figsize=(10, 0.8 + 1.1 * len(lines)), layout="constrained")
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_xlim(-9, LINE)
    axis.set_ylim(-1.0 - 2.6 * (len(lines) - 1), 1.75)
    for number, line in enumerate(lines):
        for row, side in enumerate(SIDES):
            middle = 1.0 - row - 2.6 * number
            axis.text(-1, middle, side, ha="right", va="center", fontsize=9, color=VOCABULARY_COLOURS[side][0])
            for word, begin, width in line:
                pieces = words[word][side]
                left = begin
                # The row with fewer letters fills the same width, so that words stand above each other.
                stretch = (width - 0.6) / _width(pieces)
                for piece in pieces:
                    edge, fill = VOCABULARY_COLOURS[piece["vocabulary"]]
                    size = (len(piece["piece"]) + MARGIN) * stretch
                    masked = piece["masked"]
                    axis.add_patch(
                        FancyBboxPatch(
                            (left + 0.15, middle - 0.32),
                            size - 0.3,
                            0.64,
                            boxstyle="round,pad=0,rounding_size=0.15",
                            facecolor=edge if masked else fill,
                            edgecolor=edge,
                            linewidth=1,
                        )
                    )
                    axis.text(
                        left + size / 2,
                        middle,
                        piece["piece"],
                        ha="center",
                        va="center",
                        fontsize=8,
                        family="monospace",
                        color="white" if masked else edge,
                        parse_math=False,  # a dollar sign is a piece, not the beginning of a formula
                    )
                    left += size
    handles = []
    for name in SIDES:
        edge, fill = VOCABULARY_COLOURS[name]
        handles.append(Patch(facecolor=fill, edgecolor=edge, label=f"{name}'s vocabulary"))
    handles.append(Patch(facecolor=TEACHER_COLOUR, label="dark: masked, to be predicted"))
    axis.legend(handles=handles, loc="upper left", ncols=3, frameon=False, fontsize=8, borderaxespad=0)
    return figure


def _by_word(shown: Mapping[str, Any]) -> list[dict[str, list[dict[str, Any]]]]:
    """The pieces of each word, by side."""
    words: list[dict[str, list[dict[str, Any]]]] = []
    for side in SIDES:
        for piece in shown[side]:
            if piece["word"] == len(words):
                words.append({name: [] for name in SIDES})
            words[piece["word"]][side].append(piece)
    return words


def _width(pieces: Sequence[Mapping[str, Any]]) -> float:
    return sum(len(piece["piece"]) + MARGIN for piece in pieces)


def _lines(widths: Sequence[float]) -> list[list[tuple[int, float, float]]]:
    """Break the words into lines: of each word its number, where it begins, and its width with a gap."""
    lines: list[list[tuple[int, float, float]]] = [[]]
    begin = 0.0
    for number, width in enumerate(widths):
        size = min(width + 0.6, LINE)
        if begin + size > LINE and lines[-1]:
            lines.append([])
            begin = 0.0
        lines[-1].append((number, begin, size))
        begin += size
    return lines
