# SPDX-License-Identifier: Apache-2.0
"""What a benchmark leaves behind: rows, and the csv, terminal table, markdown and picture made from them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One provider on one problem. Ratios are how many times faster than eager and torch.compile on the same
    problem."""

    loss: str
    workload: str
    shape: str
    dtype: str
    threads: int
    thp_alloc: int
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    samples: int
    clean: int
    extra_mib: float | None
    value_error: float | None
    gradient_error: float | None
    megabytes: float | None
    gb_per_s: float | None
    percent_of_limit: float | None
    vs_eager: float | None
    vs_compile: float | None
    # Of losses that compute more than they move.
    gigaflop: float | None = None
    gflop_per_s: float | None = None
    percent_of_exponentials: float | None = None
    device: str = "cpu"

    @property
    def problem(self) -> tuple[str, str, str, str, int, int, str]:
        """Everything but the provider: rows with the same problem can be compared."""
        return self.loss, self.workload, self.shape, self.dtype, self.threads, self.thp_alloc, self.device

    @property
    def place(self) -> str:
        """Where it was computed."""
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.device == "cpu" else self.device


def write_csv(path: Path, machine: str, rows: Iterable[Row]) -> None:
    """Raw numbers, every digit of them: tables made of the file are those made of the rows. Before them one comment
    line that says which machine and versions they come from."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        file.write(f"# {machine}\n")
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    os.replace(temporary, path)


def read_csv(path: Path) -> tuple[str, list[Row]]:
    """The machine line and the rows of a file that `write_csv` wrote."""
    with path.open(newline="") as file:
        first = file.readline()
        if not first.startswith("# "):
            raise ValueError(f"{path}: the first line must be '# <machine>', got {first[:60]!r}")
        return first[2:].strip(), [_parsed(record) for record in csv.DictReader(file)]


def _parsed(record: dict[str, str]) -> Row:
    values: dict[str, Any] = {}
    for field in fields(Row):
        text = record.get(field.name, "")  # older files lack the later columns
        if field.type == "str":
            values[field.name] = text or "cpu" if field.name == "device" else text
        elif field.type == "int":
            values[field.name] = int(text)
        else:
            values[field.name] = float(text) if text else None
    return Row(**values)


def headings(row: Row) -> tuple[str, ...]:
    """The columns of a row's table: bytes or floating-point operations, and exponentials where they are a limit."""
    return (
        *("provider", "median ms", "p20 .. p80", "clean", "extra MiB", "value err", "grad err"),
        *(("GB/s", "% limit") if row.gigaflop is None else ("GFLOP/s", "% limit", "% exp")),
        *("x eager", "x compile"),
    )


def cells(row: Row) -> tuple[str, ...]:
    """The printed form of a row, in the order of its headings. A `!` marks a median over disturbed samples."""
    mark = "" if row.clean >= 3 else "!"
    limit = _optional(row.percent_of_limit, ".0f")
    return (
        row.provider,
        _significant(row.median_ms) + mark,
        f"{_significant(row.p20_ms)} .. {_significant(row.p80_ms)}",
        f"{row.clean}/{row.samples}",
        _optional(row.extra_mib, ".0f"),
        _optional(row.value_error, ".0e"),
        _optional(row.gradient_error, ".0e"),
        *(
            (_rate(row.gb_per_s), limit)
            if row.gigaflop is None
            else (_rate(row.gflop_per_s), limit, _optional(row.percent_of_exponentials, ".0f"))
        ),
        _optional(row.vs_eager, ".1f"),
        _optional(row.vs_compile, ".1f"),
    )


def _significant(value: float) -> str:
    """Three digits, never in exponent form."""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else _significant(value)


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def heading(row: Row) -> str:
    """One line that names the problem."""
    work = f"{row.megabytes or 0:.1f} MB to move" if row.gigaflop is None else f"{row.gigaflop:.3g} GFLOP"
    return f"{row.loss} {row.workload}, {row.dtype} ({row.shape.replace('x', ', ')}), {row.place}, {work}" + (
        ", THP_MEM_ALLOC_ENABLE=1" if row.thp_alloc else ""
    )


def table(rows: Sequence[Row], *, bold: bool = False) -> str:
    """The rows of one problem, for a terminal of 110 columns (130 where operations are counted); ours in bold."""
    grid = [headings(rows[0]), *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    lines = [heading(rows[0])]
    for index, line in enumerate(grid):
        text = "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        ours = index > 0 and line[0].startswith("ours")
        lines.append(f"  \033[1m{text}\033[0m" if bold and ours else f"  {text}")
    return "\n".join(lines)


def by_problem(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows grouped by problem, in order of first appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.problem, []).append(row)
    return list(groups.values())


def markdown(machine: str, rows: Sequence[Row]) -> str:
    """The tables as they go into the documentation."""
    parts = [f"Measured on: {machine}\n"]
    for group in by_problem(rows):
        parts.append(f"**{heading(group[0])}**\n")
        columns = headings(group[0])
        parts.append("| " + " | ".join(columns) + " |")
        parts.append("|---" + "|---:" * (len(columns) - 1) + "|")
        parts.extend("| " + " | ".join(cells(row)) + " |" for row in group)
        parts.append("")
    return "\n".join(parts)


COLOURS = {
    "eager": "#9aa0a6",
    "compile": "#f29900",
    "ours": "#1a73e8",
    "ours in place": "#0b8043",
    "ours as cross": "#8ab4f8",
    "limit": "#d0d0d0",
    "exponentials": "#e8d5b5",
}


def _axis_label(shape: str) -> str:
    """`4096 x 30522`; of more numbers, the third and what follows on lines of their own."""
    parts = shape.split("x")
    lines = [parts[:2], parts[2:3], parts[3:]]
    return "\n".join(" x ".join(line) for line in lines if line)


def plot(path: Path, machine: str, rows: Sequence[Row]) -> None:
    """Bars of milliseconds per call, one panel per workload, data type, thread count and page setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.loss, row.workload, row.dtype, row.place, row.thp_alloc), []).append(row)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 3.4 * lines + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    for index, members in enumerate(panels.values()):
        axes = figure.add_subplot(lines, columns, index + 1)
        shapes = list(dict.fromkeys(row.shape for row in members))
        providers = list(dict.fromkeys(row.provider for row in members))
        width = 0.84 / len(providers)
        for place, provider in enumerate(providers):
            mine = [row for row in members if row.provider == provider]
            where = [shapes.index(row.shape) + (place - (len(providers) - 1) / 2) * width for row in mine]
            times = [row.median_ms for row in mine]
            spread = [
                [max(0.0, row.median_ms - row.p20_ms) for row in mine],
                [max(0.0, row.p80_ms - row.median_ms) for row in mine],
            ]
            colour = COLOURS.get(provider)
            bars = axes.bar(where, times, width, yerr=spread, label=provider, color=colour, ecolor="#555555")
            crowded = len(shapes) * len(providers) > 20
            labels = [_significant(value) for value in times]
            axes.bar_label(bars, labels=labels, fontsize=4.5 if crowded else 6, padding=1)
        first = members[0]
        title = f"{first.workload}, {first.dtype}, {first.place}"
        axes.set_title(title + (", THP_MEM_ALLOC_ENABLE=1" if first.thp_alloc else ""), fontsize=9)
        axes.set_yscale("log")
        axes.set_ylabel("ms, forward + backward", fontsize=8)
        axes.set_xticks(range(len(shapes)), [_axis_label(shape) for shape in shapes], fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    figure.suptitle(rows[0].loss, fontsize=11, x=0.02, ha="left")
    found = (axes.get_legend_handles_labels() for axes in figure.axes)
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside upper right" if columns > 1 else "outside lower right",  # or it would cover the title
        fontsize=7,
        frameon=False,
        ncols=len(handles),
    )
    figure.supxlabel(machine, fontsize=5, color="#777777")
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    os.replace(temporary, path)
