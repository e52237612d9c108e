# SPDX-License-Identifier: Apache-2.0
"""The picture of a mixed-vocabulary sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixed_vocab_data import SENTENCES, student_tokenizer, teacher_tokenizer

from pydistill.data.mixed_vocab import Segmenter, example
from pydistill.recipes.shared_projections_report import VOCABULARY_COLOURS, draw_segmentation

matplotlib = pytest.importorskip("matplotlib")


@pytest.mark.parametrize("text", [SENTENCES[0], " ".join(SENTENCES), "costs $5 and $6", "a" * 99, ""])
def test_every_piece_is_drawn_once_in_its_colour_with_words_above_each_other(text: str, tmp_path: Path) -> None:
    from matplotlib.colors import to_hex
    from matplotlib.patches import FancyBboxPatch

    shown = example(Segmenter(teacher_tokenizer(), student_tokenizer(), max_length=512), text)
    figure = draw_segmentation(shown)
    figure.savefig(tmp_path / "picture.png")
    (axis,) = figure.axes
    texts = [item for item in axis.texts if item.get_family() == ["monospace"]]
    pieces = [*shown["teacher"], *shown["student"]]
    assert sorted(item.get_text() for item in texts) == sorted(piece["piece"] for piece in pieces)
    boxes = [patch for patch in axis.patches if isinstance(patch, FancyBboxPatch)]
    drawn = sorted((to_hex(box.get_edgecolor()), to_hex(box.get_facecolor())) for box in boxes)
    colours = VOCABULARY_COLOURS
    expected = [(colours[p["vocabulary"]][0], colours[p["vocabulary"]][p["masked"] is False]) for p in pieces]
    assert drawn == sorted((edge.lower(), fill.lower()) for edge, fill in expected)
    low, high = axis.get_xlim()
    assert all(low < box.get_x() and box.get_x() + box.get_width() <= high for box in boxes)
    # The rows of both sides end at the same place, line by line.
    ends: dict[float, float] = {}
    for box in boxes:
        ends[box.get_y()] = max(ends.get(box.get_y(), 0), box.get_x() + box.get_width())
    rows = [ends[y] for y in sorted(ends, reverse=True)]
    assert rows[::2] == pytest.approx(rows[1::2])
    assert len(rows) > 2 or text != " ".join(SENTENCES)
