# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the losses: `pydistill bench LOSS`, or `main(argv)` from Python."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydistill.bench.compare import Benchmark, Size
    from pydistill.bench.rows import Row

THP_SWITCH = "THP_MEM_ALLOC_ENABLE"  # read by torch's CPU allocator: asks the kernel for transparent huge pages
EPILOG = "A median marked with ! is over samples during which other processes used the CPU."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one benchmark and returns the exit status: 0, or 1 if the correctness gate is red."""
    parser = _parser()
    arguments = parser.parse_args(argv)

    import torch

    from pydistill import _dispatch
    from pydistill.bench import compare, machine, rows

    benchmark = benchmarks()[arguments.loss]
    if arguments.from_csv is not None:
        line, measured = rows.read_csv(arguments.from_csv)
        _print_tables(measured)
        return _finish(arguments, benchmark, line, measured)

    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no GPU (torch.cuda.is_available() is false)")
    here = benchmark.providers_here(device)
    providers = arguments.providers or here
    for provider in providers:
        if provider in here:
            continue
        if provider == "liger":
            parser.error("provider 'liger' needs --device cuda, and the package liger-kernel installed")
        if device.type == "cpu":
            parser.error(f"provider {provider!r} needs the compiled extension: {_dispatch.native_reason}")
        parser.error(f"provider {provider!r} is not measured on a GPU; there are {', '.join(here)}")
    threads = arguments.threads or [torch.get_num_threads()]
    line = machine.line(machine.describe(device.type))
    thp_alloc = int(os.environ.get(THP_SWITCH, "0") == "1")
    ours = _dispatch.resolve(benchmark.OP, device)
    print(f"machine: {line}\nours: {ours}; limit: {benchmark.limit_name(device)}", flush=True)
    measured = []
    try:
        for group in compare.measure(
            benchmark,
            benchmark.cases(arguments.sizes, arguments.workloads, quick=arguments.quick),
            arguments.dtypes,
            threads,
            providers,
            thp_alloc=thp_alloc,
            repetitions=arguments.repetitions or (3 if arguments.quick else 7),
            budget_seconds=arguments.budget if arguments.budget is not None else 3.0 if arguments.quick else 60.0,
            device=device,
        ):
            print("\n" + rows.table(group, bold=sys.stdout.isatty()), flush=True)
            measured.extend(group)
    except compare.GateError as error:
        print(f"the correctness gate is red, so no time is reported: {error}", file=sys.stderr)
        return 1
    if arguments.thp and not thp_alloc:
        status, repeated = _again_with_huge_pages(list(argv if argv is not None else sys.argv[1:]))
        if status != 0:
            return status
        measured.extend(repeated)
    return _finish(arguments, benchmark, line, measured)


def benchmarks() -> dict[str, Benchmark]:
    """The benchmark of each loss."""
    from pydistill.bench import attention_relation, linear_soft_target, projected_mse, soft_target

    found: list[Benchmark] = [soft_target, linear_soft_target, attention_relation, projected_mse]
    return {benchmark.LOSS: benchmark for benchmark in found}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pydistill bench",
        description="Time, memory and error of a loss, against eager, torch.compile and what the machine can do.",
        epilog="`pydistill bench LOSS --help` lists the options.",
    )
    losses = parser.add_subparsers(dest="loss", required=True, metavar="LOSS")
    for loss, benchmark in benchmarks().items():
        _add_options(losses.add_parser(loss, help=f"benchmark of {loss}_loss", epilog=EPILOG), benchmark)
    return parser


def _add_options(parser: argparse.ArgumentParser, benchmark: Benchmark) -> None:
    from pydistill.bench.compare import DTYPES

    add = parser.add_argument
    names = " x ".join(benchmark.SIZE_NAMES)
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where (default: cpu); a GPU of AMD is cuda too")
    add("--sizes", type=_sizes(benchmark), metavar="SIZE,...", help=f"{names}, e.g. {benchmark.EXAMPLE_SIZE}")
    add("--dtypes", type=_names(DTYPES), default=["fp32", "bf16"], help="of " + ",".join(DTYPES))
    add("--threads", type=_integers, metavar="N,...", help="thread counts (default: what torch uses)")
    add(
        "--workloads", type=_names(benchmark.WORKLOADS), default=list(benchmark.WORKLOADS),
        help="; ".join(f"{name}: {what}" for name, what in benchmark.WORKLOADS.items()),
    )  # fmt: skip
    add(
        "--providers", type=_names(benchmark.PROVIDERS),
        help="of " + ",".join(benchmark.PROVIDERS) + " (default: all that this installation has)",
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
    add("--quick", action="store_true", help="smaller problems, fewer samples: minutes instead of a quarter of an hour")
    add("--thp", action="store_true", help=f"measure again in a process with {THP_SWITCH}=1")
    add("--out", type=Path, default=Path("bench-results"), help="folder for csv, markdown and png")
    add("--from-csv", type=Path, metavar="FILE", help="measure nothing: tables and picture of an earlier csv")


def _finish(arguments: argparse.Namespace, benchmark: Benchmark, line: str, measured: list[Row]) -> int:
    from pydistill.bench import rows

    judged = benchmark.targets([row for row in measured if row.device == "cpu"])
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


def _print_tables(measured: list[Row]) -> None:
    from pydistill.bench import rows

    for group in rows.by_problem(measured):
        print("\n" + rows.table(group, bold=sys.stdout.isatty()))


def _again_with_huge_pages(argv: list[str]) -> tuple[int, list[Row]]:
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


def _sizes(benchmark: Benchmark) -> Callable[[str], list[Size]]:
    form = "x".join(name.upper() for name in benchmark.SIZE_NAMES)

    def parse(text: str) -> list[Size]:
        try:
            sizes = [tuple(map(int, size.split("x"))) for size in text.split(",")]
            if not all(len(size) == len(benchmark.SIZE_NAMES) and min(size) > 0 for size in sizes):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected {form}[,...] such as {benchmark.EXAMPLE_SIZE}, got {text!r}"
            ) from None
        return sizes

    return parse


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
