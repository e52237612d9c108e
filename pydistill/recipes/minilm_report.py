# SPDX-License-Identifier: Apache-2.0
"""What the report of a ``minilm`` run shows: its table, the curves, the attention relations, what to try next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydistill.report import COSTS, TEACHER_COLOUR, Page, Picture, cost_cells, draw_falls, draw_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the relations picture is drawn from, beside metrics.json.
RELATIONS_FILE = "relations.json"
COLOURS = {"teacher": TEACHER_COLOUR, "assistant": "#E69F00", "student": "#0072B2"}
RELATION_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#0072B2")
LETTERS = {"q": "queries", "k": "keys", "v": "values"}
# How the trainer logs the parts of the loss.
PART = "loss_attention_relation."


def page(folder: Path, results: dict[str, Any]) -> Page:
    """Return what the page of the run in ``folder`` holds."""
    pictures = [
        Picture("comparison.png", "Comparison", lambda: draw_comparison(results)),
        Picture("curves.png", "Training", lambda: draw_curves(results)),
    ]
    source = folder / RELATIONS_FILE
    if source.is_file():
        maps = json.loads(source.read_text(encoding="utf-8"))
        pictures.insert(
            1, Picture("relations.png", "Attention relations", lambda: draw_relations(maps), _caption(maps))
        )
    return Page(
        lead=_lead(results),
        table=table(results),
        measured=results["measured"],
        pictures=pictures,
        next_step=(
            f"pydistill evaluate --tasks.mine.data.train YOUR.tsv --tasks.mine.data.text_columns sentence "
            f"--model {folder / 'student'} --output {folder / 'evaluation'}"
        ),
        details={"every stage": _every_stage(results)},
    )


def table(results: dict[str, Any]) -> list[list[str]]:
    """Return the header and one row per model of the table that a run prints."""
    teacher, *trained = results["models"]
    between = len(trained) > 1  # an assistant: the student's own loss is against the assistant
    header = ["model", "layers x hidden", "held-out loss before", "after", *(["to the teacher"] if between else [])]
    header += [*COSTS, "texts/s", "smaller", "faster"]
    rows = [header]
    for model in results["models"]:
        losses = [_loss(model.get("loss_before")), _loss(model.get("loss_after"))]
        if between:
            losses.append(_loss(model.get("loss_to_teacher")))
        rows.append(
            [
                model["name"],
                f"{model['layers']} x {model['hidden_size']}",
                *losses,
                *cost_cells(model, teacher),
            ]
        )
    return rows


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _relation_names(results: Mapping[str, Any]) -> str:
    term = results["objective"]
    heads = "the attention heads" if term["relation_heads"] is None else f"{term['relation_heads']} relation heads"
    return f"{' + '.join(term['relations'])} over {heads}"


def _lead(results: dict[str, Any]) -> str:
    teacher, *trained = results["models"]
    loss = f"Loss: KL of the attention relations {_relation_names(results)} from those of"
    whom = f"the teacher's layer {teacher['layer']} of {teacher['layers']}"
    if len(trained) > 1:
        whom = f"the model that each learns from (the assistant: {whom})"
    texts = results["evaluation_texts"]
    where = f"; held out: {texts:,} texts." if texts else "; no text was held out to measure it on."
    student = trained[-1]
    fallen = ""
    if student["loss_before"]:
        fallen = f" The student's fell by {100 * (1 - student['loss_after'] / student['loss_before']):.0f} %."
    return f"{loss} {whom}{where}{fallen}"


def _every_stage(results: dict[str, Any]) -> list[list[str]]:
    rows = [["stage", "learns from", "steps", "seconds", "last training loss", "held-out loss before", "after"]]
    for model in results["models"][1:]:
        losses = [entry["loss"] for entry in model["curve"] if "loss" in entry]
        rows.append(
            [
                model["name"],
                "the assistant" if model["name"] == "student" and len(results["models"]) > 2 else "the teacher",
                f"{model['steps']:,}",
                f"{model['seconds']:.0f}",
                _loss(losses[-1] if losses else None),
                _loss(model["loss_before"]),
                _loss(model["loss_after"]),
            ]
        )
    return rows


# --------------------------------------------------------------------------- pictures


def draw_comparison(results: dict[str, Any]) -> Figure:
    """Draw how far each student's held-out loss fell (left) and what it costs beside its teacher (right)."""
    models = results["models"]
    colours = [COLOURS[model["name"]] for model in models]
    return draw_falls(models, colours, "held-out loss, before and after its training")


def draw_curves(results: dict[str, Any]) -> Figure:
    """Draw, for each stage, the training loss with its relations, and the loss on held-out texts, over the steps."""
    from matplotlib.figure import Figure

    trained = results["models"][1:]
    figure = Figure(figsize=(10, 0.4 + 3.3 * len(trained)), layout="constrained")
    for (left, right), model in zip(figure.subplots(len(trained), 2, squeeze=False), trained, strict=True):
        colour = COLOURS[model["name"]]
        parts = list(dict.fromkeys(key for entry in model["curve"] for key in entry if key.startswith(PART)))
        for key, shade in zip(parts, RELATION_COLOURS, strict=False):
            draw_line(left, model["curve"], key, color=shade, label=_name(key.removeprefix(PART)))
        draw_line(left, model["curve"], "loss", color=colour, label="the loss", lw=2)
        left.set_title(f"{model['name']}: training loss, log scale", loc="left", fontsize=10)
        held_out = [entry for entry in model["curve"] if "eval_loss" in entry]
        if model["loss_before"] is not None:
            last = {"step": model["steps"], "eval_loss": model["loss_after"]}
            held_out = [
                {"step": 0, "eval_loss": model["loss_before"]},
                *(entry for entry in held_out if 0 < entry["step"] < model["steps"]),
                last,
            ]
        draw_line(right, held_out, "eval_loss", color=colour, marker="o")
        right.set_title(f"{model['name']}: held-out loss, log scale", loc="left", fontsize=10)
        for axis in (left, right):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            axis.tick_params(axis="y", which="minor", labelsize=7)
            axis.set_xlabel("optimizer steps")
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.set_xlim(left=0)
            axis.grid(alpha=0.25, which="both")
        if left.lines:  # a run shorter than one logging window has none
            left.legend(frameon=False, fontsize=9)
    return figure


def _name(relation: str) -> str:
    return f"{relation.upper()} ({LETTERS[relation[0]]}-{LETTERS[relation[1]]})"


def draw_relations(maps: Mapping[str, Any]) -> Figure:
    """Draw the attention relations of every model for one text: a row per relation (and head), a column per model."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    models, tokens = maps["models"], maps["tokens"]
    heads = maps["heads"] or [None]
    shown = [(relation, place) for relation in models[0]["matrices"] for place in range(len(heads))]
    # The maps are small where tokens are few, and their labels stay readable where they are many.
    side = max(2.2, 0.145 * len(tokens))
    size = min(7.5, 72 * side / len(tokens) / 1.25)
    figure = Figure(figsize=(1.9 + side * len(models), 0.5 + (side + 0.35) * len(shown) + 0.5), layout="constrained")
    grid = figure.subplots(len(shown), len(models), squeeze=False, sharex=True, sharey=True)
    for number, (line, (relation, place)) in enumerate(zip(grid, shown, strict=True)):
        matrices = [model["matrices"][relation][place] for model in models]
        # One scale for the row; the root brings out what is small beside a strong diagonal.
        scale = PowerNorm(0.5, 0, max(max(map(max, matrix)) for matrix in matrices))
        for axis, model, matrix in zip(line, models, matrices, strict=True):
            image = axis.imshow(matrix, cmap="magma_r", norm=scale, interpolation="nearest")
            title = [model["name"]] if number == 0 else []
            # With several heads of a relation, the divergence of them all stands above the first.
            if place == 0 and model is not models[0]:
                title.append(f"KL {model['divergence'][relation]:.3f}")
            axis.set_title("\n".join(title), fontsize=9)
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0, pad=2)
            for ticks in (axis.set_xticks, axis.set_yticks):
                # A dollar sign is a token, not the beginning of a formula.
                ticks(range(len(tokens)), tokens, fontsize=size, parse_math=False)
            axis.tick_params(axis="x", rotation=90)
        which = f"mean of {maps['head_count']} heads" if heads[place] is None else f"head {heads[place]}"
        line[0].set_ylabel(f"{_name(relation)}\n{which}", fontsize=9)
        bar = figure.colorbar(image, ax=list(line), fraction=0.025, pad=0.01, shrink=0.8, aspect=22)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=2)
    return figure


def _caption(maps: Mapping[str, Any]) -> str:
    which = (
        f"the mean over all {maps['head_count']} heads"
        if maps["heads"] is None
        else f"heads {', '.join(map(str, maps['heads']))} of {maps['head_count']}"
    )
    cut = f" (its first {len(maps['tokens'])} tokens)" if maps["cut"] else ""
    return (
        f"Whom each token (row) looks at, softmax(A Bᵀ / √d): {which}, square root colour scale, for the text{cut} "
        f"“{maps['text']}”. KL: mean over rows and all heads of the divergence from the teacher's relation. Another "
        'text: the same command with --resume --picture.sentence "..."; single heads: --picture.heads 0 5.'
    )
