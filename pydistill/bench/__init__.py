# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the losses: `pydistill bench soft_target`, or `main(argv)` from Python."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

THP_SWITCH = "THP_MEM_ALLOC_ENABLE"  # read by torch's CPU allocator: asks the kernel for transparent huge pages


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns the exit status: 0, or 1 if the correctness gate is red."""
    arguments = _parser().parse_args(argv)

    import torch

    from pydistill import _dispatch
    from pydistill.bench import machine, rows, soft_target

    if arguments.from_csv is not None:
        line, measured = rows.read_csv(arguments.from_csv)
        _print_tables(measured)
        return _finish(arguments, line, measured)

    sizes = arguments.sizes or (soft_target.QUICK_SIZES if arguments.quick else soft_target.SIZES)
    threads = arguments.threads or [torch.get_num_threads()]
    line = machine.line(machine.describe())
    thp_alloc = int(os.environ.get(THP_SWITCH, "0") == "1")
    providers = arguments.providers or soft_target.providers_here()
    ours = _dispatch.resolve(soft_target.LOSS, torch.device("cpu"))
    print(f"machine: {line}\nours: {ours}; limit: {soft_target.limit_name()}", flush=True)
    measured = []
    try:
        for group in soft_target.measure(
            sizes,
            arguments.dtypes,
            threads,
            arguments.workloads,
            providers,
            thp_alloc=thp_alloc,
            repetitions=arguments.repetitions or (3 if arguments.quick else 7),
            budget_seconds=arguments.budget if arguments.budget is not None else 3.0 if arguments.quick else 60.0,
        ):
            print("\n" + rows.table(group, bold=sys.stdout.isatty()), flush=True)
            measured.extend(group)
    except soft_target.GateError as error:
        print(f"the correctness gate is red, so no time is reported: {error}", file=sys.stderr)
        return 1
    if arguments.thp and not thp_alloc:
        status, repeated = _again_with_huge_pages(list(argv if argv is not None else sys.argv[1:]))
        if status != 0:
            return status
        measured.extend(repeated)
    return _finish(arguments, line, measured)


def _parser() -> argparse.ArgumentParser:
    from pydistill.bench import soft_target

    parser = argparse.ArgumentParser(
        prog="pydistill bench",
        description="Time, memory and error of a loss, against eager, torch.compile and memory speed.",
        epilog="A median marked with ! is over samples during which other processes used the CPU.",
    )
    add = parser.add_argument
    add("loss", choices=["soft_target"])
    add("--sizes", type=_sizes, metavar="RxC,...", help="rows x classes, e.g. 4096x30522,65536x3")
    add("--dtypes", type=_names(soft_target.DTYPES), default=["fp32", "bf16"], help="of fp32,bf16,fp16")
    add("--threads", type=_integers, metavar="N,...", help="thread counts (default: what torch uses)")
    add(
        "--workloads", type=_names(soft_target.WORKLOADS), default=list(soft_target.WORKLOADS),
        help="kl: KL alone at T=2; kl+ce: half hard-label cross-entropy",
    )  # fmt: skip
    add(
        "--providers", type=_names(soft_target.PROVIDERS),
        help="of " + ",".join(soft_target.PROVIDERS) + " (default: all that this installation has)",
    )  # fmt: skip
    add(
        "--repetitions",
        type=_positive,
        help="undisturbed samples wanted of each provider (default 7, quick 3)",
    )
    add(
        "--budget",
        type=float,
        help="seconds per problem after which three samples must do (default 60, quick 3)",
    )
    add("--quick", action="store_true", help="fewer rows and samples: minutes instead of a quarter of an hour")
    add("--thp", action="store_true", help=f"measure again in a process with {THP_SWITCH}=1")
    add("--out", type=Path, default=Path("bench-results"), help="folder for csv, markdown and png")
    add("--from-csv", type=Path, metavar="FILE", help="measure nothing: tables and picture of an earlier csv")
    return parser


def _finish(arguments: argparse.Namespace, line: str, measured: list) -> int:
    from pydistill.bench import rows, soft_target

    judged = soft_target.targets(measured)
    if judged:
        print("\ntargets")
        for target in judged:
            print(f"  {target}")
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    if arguments.from_csv is None:
        written.append(folder / f"{arguments.loss}.csv")
        rows.write_csv(written[-1], line, measured)
    written.append(folder / f"{arguments.loss}.md")
    temporary = written[-1].with_name(written[-1].name + ".tmp")
    temporary.write_text(rows.markdown(line, measured))
    os.replace(temporary, written[-1])
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
    else:
        written.append(folder / f"{arguments.loss}.png")
        rows.plot(written[-1], line, measured)
    print("\nwritten: " + ", ".join(map(str, written)))
    return 0


def _print_tables(measured: list) -> None:
    from pydistill.bench import rows

    for group in rows.by_problem(measured):
        print("\n" + rows.table(group, bold=sys.stdout.isatty()))


def _again_with_huge_pages(argv: list[str]) -> tuple[int, list]:
    """The same benchmark in a process of its own, because torch reads the switch once; returns its rows."""
    from pydistill.bench import rows

    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pydistill.bench", *argv, "--out", folder]
        print(f"\nagain with {THP_SWITCH}=1", flush=True)
        done = subprocess.run(command, env={**os.environ, THP_SWITCH: "1", "PYTHONPATH": path})
        if done.returncode != 0:
            return done.returncode, []
        return 0, rows.read_csv(next(Path(folder).glob("*.csv")))[1]


def _sizes(text: str) -> list[tuple[int, int]]:
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in text.split(",")]
        if not all(len(size) == 2 and min(size) > 0 for size in sizes):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ROWSxCLASSES[,...] such as 4096x30522, got {text!r}") from None
    return [(rows, classes) for rows, classes in sizes]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _integers(text: str) -> list[int]:
    return [_positive(part) for part in text.split(",")]


def _names(allowed: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(allowed)}, got {name!r}")
        return names

    return parse
