# SPDX-License-Identifier: Apache-2.0
"""Fills the measured tables of README.md and docs/ from raw files: `python docs/tables.py [--check]`.

A page says where a table goes and what it is made from, paths relative to the root of the repository::

    <!-- table: speed docs/benchmarks/soft_target.csv -->
    (this part is generated)
    <!-- end of table -->

`speed` is a csv of `pydistill bench`, in short; `bench` is all of it; `run` is the metrics.json of a finished run.
The last two come with the picture of the same name beside the raw file. Made of several files, with commas between
them: `variants` has the last student of each of several runs, `evaluate` all models of the metrics.json of calls of
`pydistill evaluate`; `steps` is the json of minilm_step.py. `gpu_code` and `gpu_traffic` are of gpu-static.json, which
tests/ptx/budgets.py writes, `gpu_floors`, `scaling`, `storage` and `top_k` are computed by the file, `measured_scaling`
and `teacher_cache` are what scaling.py and teacher_cache.py recorded. A table of which a raw file is missing says so.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydistill.bench import benchmarks, rows
from pydistill.recipes import page_of
from pydistill.report import mean_and_spread, times

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MISSING = "Not measured yet."
PLACE = re.compile(r"(<!-- table: (\w+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def main(arguments: Sequence[str]) -> int:
    """Rewrites the pages; with --check only says which ones differ from their raw files, as exit status 1."""
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = fill(page, text)
        if filled != text:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in arguments:
                temporary = page.with_name(page.name + ".tmp")
                temporary.write_text(filled, encoding="utf-8")
                os.replace(temporary, page)
    if stale and "--check" in arguments:
        print(f"tables differ from their raw files in {', '.join(stale)}: run `make docs`", file=sys.stderr)
        return 1
    print(f"tables: {', '.join(stale) or 'nothing to change'}")
    return 0


def fill(page: Path, text: str) -> str:
    """The text of a page with every table made anew."""
    return PLACE.sub(
        lambda place: place[1] + content(page, place[2], [ROOT / name for name in place[3].split(",")]) + place[4], text
    )


def content(page: Path, kind: str, sources: Sequence[Path]) -> str:
    """What stands between the two comments."""
    if kind not in KINDS:
        raise ValueError(f"{page}: a table is one of {', '.join(KINDS)}, got {kind!r}")
    if not all(source.exists() for source in sources):
        return f"\n{MISSING}\n\n"
    return "\n" + KINDS[kind](page, *sources).strip() + "\n\n"


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A markdown table; the first line is its head, all columns but the first are aligned right."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


SPEED_PROVIDERS = {"eager": "eager", "compile": "torch.compile", "ours": "ours", "ours in place": "ours, in place"}


def speed(page: Path, source: Path) -> str:
    """One line per problem: the first workload, default page setting, the largest thread count."""
    machine, measured = rows.read_csv(source)
    threads = max(row.threads for row in measured)
    first = measured[0]
    names = [name for name in SPEED_PROVIDERS if any(row.provider == name for row in measured)]
    lines: list[tuple[str, ...]] = [
        (
            " x ".join(benchmarks()[first.loss].SIZE_NAMES),
            "dtype",
            *(SPEED_PROVIDERS[name] for name in names),
            "faster than",
            "extra memory, MiB",
        ),
    ]
    for group in rows.by_problem(row for row in measured if row.threads == threads and not row.thp_alloc):
        by = {row.provider: row for row in group}
        best = by.get(names[-1])
        if group[0].workload != first.workload or best is None:
            continue
        lines.append(
            (
                group[0].shape.replace("x", " x "),
                group[0].dtype,
                *(f"{by[name].median_ms:.3g} ms" if name in by else "-" for name in names),
                " / ".join("-" if ratio is None else times(ratio) for ratio in (best.vs_eager, best.vs_compile)),
                " / ".join(f"{by[name].extra_mib or 0:.0f}" if name in by else "-" for name in names),
            )
        )
    return grid(lines) + f"\n\nMeasured on: {machine}; {threads} threads."


def bench(page: Path, source: Path) -> str:
    """Every row of the csv, and the picture beside it."""
    return picture(page, source) + rows.markdown(*rows.read_csv(source))


def run(page: Path, source: Path) -> str:
    """The table that the run printed, and its comparison picture."""
    results = json.loads(source.read_text(encoding="utf-8"))
    shown = page_of(source.parent, results)
    return picture(page, source) + grid(shown.table) + f"\n\n{shown.measured}"


def variants(page: Path, *sources: Path) -> str:
    """The last student of every run, named as its file is."""
    runs = {source.stem: json.loads(source.read_text(encoding="utf-8")) for source in sources}
    lines: list[tuple[str, ...]] = []
    for name, results in runs.items():
        metric, student = results["metric"], results["models"][-1]
        if not lines:
            lines.append(("run", "training rows", "steps", f"{metric}, %"))
        score = mean_and_spread([100 * one[results["split"]][metric] for one in student["runs"]])
        lines.append((name, f"{student['runs'][0]['rows']:,}", f"{student['runs'][0]['steps']:,}", score))
    return grid(lines)


def steps(page: Path, source: Path) -> str:
    """One line per problem and provider of a measurement of whole training steps."""
    results = json.loads(source.read_text(encoding="utf-8"))
    lines = [("rows x tokens", "relation heads", "loss by", "ms per step", "p20 .. p80", "ours is faster", "extra MiB")]
    for problem in results["problems"]:
        ours = problem["providers"]["ours"]
        for name, one in problem["providers"].items():
            lines.append(
                (
                    f"{problem['rows']} x {problem['positions']}",
                    str(problem["relation_heads"]),
                    name,
                    f"{one['median_ms']:.0f}",
                    f"{one['p20_ms']:.0f} .. {one['p80_ms']:.0f}",
                    "" if name == "ours" else times(one["median_ms"] / ours["median_ms"]),
                    f"{one['extra_mib']:.0f}",
                )
            )
    return f"{grid(lines)}\n\nMeasured on: {results['machine']}; {results['threads']} threads."


def evaluate(page: Path, *sources: Path) -> str:
    """All models of all files, and which part of the gap between the last and the first model each closes."""
    from pydistill.evaluate import table  # with PyTorch, which no other table needs

    results = [json.loads(source.read_text(encoding="utf-8")) for source in sources]
    together = {"models": [model for one in results for model in one["models"]]}
    top, bottom = (together["models"][place]["average"] for place in (0, -1))
    header, *lines = table(together)
    lines = [
        [short_name(line[0]), *line[1:], f"{100 * (model['average'] - bottom) / (top - bottom):.0f} %"]
        for line, model in zip(lines, together["models"], strict=True)
    ]
    tasks = results[0]["models"][0]["tasks"]
    rows = "; ".join(
        f"{name}: {', '.join(f'{count:,} {split}' for split, count in one['rows'].items())}"
        for name, one in tasks.items()
    )
    seeds = len(next(iter(tasks.values()))["runs"])
    closed = f"Gap closed: of the average between {short_name(lines[-1][0])} and {short_name(lines[0][0])}."
    return f"{grid([[*header, 'gap closed'], *lines])}\n\nMean ± deviation of {seeds} seeds. Rows: {rows}. {closed}"


def short_name(model: str) -> str:
    """What tells a model from the others: OUTPUT/v1-svd/student -> v1-svd, OUTPUT/96/students/down -> 96-down."""
    parts = [part for part in model.removeprefix("package:").split("/") if part not in ("", "student", "model")]
    if "students" in parts[1:-1]:
        place = parts.index("students", 1)
        return f"{parts[place - 1]}-{parts[place + 1]}"
    return parts[-1] if parts else model


GPU_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def gpu_code(page: Path, source: Path) -> str:
    """One line per kernel and workload: what the compilers made of it, by target."""
    results = json.loads(source.read_text(encoding="utf-8"))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for one in results["kernels"]:
        name = f"{one['implementation']}: {one['op']} {one['workload']}"
        cells = found.setdefault((name, one["kernel"]), dict.fromkeys(GPU_TARGETS, ""))
        wide = one["loads_128"] + one["stores_128"]
        cells[one["target"]] = (
            f"{one['registers']} / {one['spills']} / {one['shared'] / 1024:.0f} K / {100 * one['occupancy']:.0f} % / "
            f"{wide} / {one['matrix']}"
        )
    lines = [("workload", "kernel", *GPU_TARGETS)]
    lines += [(name, f"`{kernel}`", *cells.values()) for (name, kernel), cells in found.items()]
    compilers = ", ".join(f"{name} {version}" for name, version in results["compilers"].items())
    return (
        f"{grid(lines)}\n\nRegisters per thread / spills / shared memory per block / warps that can be resident / "
        f"loads and stores of 16 bytes / instructions of tensor cores. Compilers: {compilers}."
    )


def gpu_traffic(page: Path, source: Path) -> str:
    """One line per workload: bytes that the interpreted sm_80 code moved."""
    results = json.loads(source.read_text(encoding="utf-8"))
    lines = [("workload", "kB moved", "of every input and output once", "of the formula")]
    lines += [
        (
            f"{one['implementation']}: {one['op']} {one['workload']}",
            f"{one['moved'] / 1000:,.0f}",
            f"{one['moved'] / one['minimum']:.2f}",
            f"{one['moved'] / one['formula']:.2f}",
        )
        for one in results["traffic"]
    ]
    return grid(lines)


def gpu_floors(page: Path, source: Path) -> str:
    """Computed by the source itself."""
    from gpu_floors import lines

    return f"{grid(lines())}\n\nMicroseconds: floor (what bounds it) / below which our kernels cannot be."


def scaling(page: Path, source: Path) -> str:
    """Computed by the source itself."""
    from scaling import scaling_lines

    return grid(scaling_lines())


def storage(page: Path, source: Path) -> str:
    """Computed by the source itself."""
    from scaling import storage_lines

    return grid(storage_lines())


def measured_scaling(page: Path, source: Path) -> str:
    """What docs/scaling.py recorded."""
    from scaling import measured_lines

    record = json.loads(source.read_text(encoding="utf-8"))
    return f"{grid(measured_lines(record))}\n\nMeasured on: {record['machine']}, {record['threads']} threads."


def top_k(page: Path, source: Path) -> str:
    """Computed by the source itself, with PyTorch."""
    from teacher_cache import top_k_lines

    return grid(top_k_lines())


def teacher_cache(page: Path, source: Path) -> str:
    """What docs/teacher_cache.py recorded."""
    from teacher_cache import measured_lines

    record = json.loads(source.read_text(encoding="utf-8"))
    note = f"; {record['note']}" if record["note"] else ""
    return f"{grid(measured_lines(record))}\n\nMeasured on: {record['machine']}, {record['threads']} threads{note}."


def picture(page: Path, source: Path) -> str:
    """The png of the same name, where there is one."""
    image = source.with_suffix(".png")
    return f"![{source.stem}]({os.path.relpath(image, page.parent)})\n\n" if image.exists() else ""


KINDS: dict[str, Callable[..., str]] = {
    "speed": speed,
    "bench": bench,
    "run": run,
    "variants": variants,
    "steps": steps,
    "evaluate": evaluate,
    "gpu_code": gpu_code,
    "gpu_traffic": gpu_traffic,
    "gpu_floors": gpu_floors,
    "scaling": scaling,
    "storage": storage,
    "measured_scaling": measured_scaling,
    "top_k": top_k,
    "teacher_cache": teacher_cache,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
