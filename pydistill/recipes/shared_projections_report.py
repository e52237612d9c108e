# SPDX-License-Identifier: Apache-2.0
"""What the report of a ``shared-projections`` run shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydistill.report import TEACHER_COLOUR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the pieces of either vocabulary: edge and text, fill.
VOCABULARY_COLOURS = {"teacher": (TEACHER_COLOUR, "#EEEEEE"), "student": ("#0072B2", "#DCEBF5")}
# Letters of a fixed-width font in one line of the picture, and what a box has around its letters.
LINE, MARGIN = 88.0, 1.4
SIDES = ("teacher", "student")


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
