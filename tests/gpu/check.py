# SPDX-License-Identifier: Apache-2.0
"""`make gpu-check`: the kernels on the GPU of this machine, tested, then timed, in ten minutes and without questions.

    python tests/gpu/check.py [--out FOLDER]

Every step is a process of its own with a limit of time; what fails does not keep the next from running. The exit
status is 0 where all tests passed and all benchmarks were made. FOLDER (gpu-results) receives the log of every step,
and of the benchmarks csv, tables and pictures.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pydistill import _dispatch
from pydistill.bench import benchmarks

TESTS = Path(__file__).resolve().parents[1]
IMPLEMENTATIONS = ("cuda", "triton")
SECONDS = 600
# The most of what is left of the time that a step may take.
TEST_SHARE, BENCH_SHARE = 0.35, 0.8


@dataclass(frozen=True)
class Step:
    name: str
    arguments: list[str]  # of Python
    environment: dict[str, str]
    share: float


@dataclass(frozen=True)
class Result:
    step: Step
    said: str
    fine: bool
    seconds: float


def steps(out: Path) -> Iterator[Step]:
    """Tests of every loss and implementation that this device runs, then the benchmarks."""
    device = torch.device("cuda")
    for implementation in IMPLEMENTATIONS:
        for loss, benchmark in benchmarks().items():
            if _dispatch._on_device(benchmark.OP, implementation, device).available:
                arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "gpu.plugin"]
                arguments += ["-m", "not slow and not gpu_proof"]
                yield Step(
                    f"test {loss} {implementation}",
                    [*arguments, f"test_{loss}.py"],
                    {"PYDISTILL_TEST_IMPL": implementation},
                    TEST_SHARE,
                )
    for loss in benchmarks():
        command = ["-m", "pydistill.bench", loss, "--device", "cuda", "--quick", "--out", str(out)]
        yield Step(f"bench {loss}", command, {}, BENCH_SHARE)


def run(step: Step, out: Path, left: float) -> Result:
    log, started = out / f"{step.name.replace(' ', '-')}.log", time.monotonic()
    path = os.pathsep.join(filter(None, [str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH")]))
    with log.open("w") as file:
        try:
            status: int | None = subprocess.run(
                [sys.executable, *step.arguments], stdout=file, stderr=subprocess.STDOUT, cwd=TESTS,
                env={**os.environ, "PYTHONPATH": path, **step.environment}, timeout=max(10.0, step.share * left),
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = None
    return Result(step, summary(step, log.read_text(), status), status == 0, time.monotonic() - started)


def summary(step: Step, printed: str, status: int | None) -> str:
    """One line: how many tests, or how much faster."""
    said = "stopped, its time was over; " if status is None else ""
    if step.name.startswith("test"):
        counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)\b", printed)
        return said + (", ".join(counts[-4:]) or "no result")
    faster = [
        f"{line.split()[-2]}x / {line.split()[-1]}x" for line in printed.splitlines() if line.startswith("  ours ")
    ]
    return said + ("ours against eager / compile: " + ", ".join(faster) if faster else "no result")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of logs, csv, tables, pictures")
    out: Path = parser.parse_args().out.resolve()
    for key, value in _dispatch.environment().items():
        print(f"{key:32} {value}")
    if not torch.cuda.is_available():
        print("\ngpu-check: this PyTorch sees no GPU (torch.cuda.is_available() is false)", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    started, results = time.monotonic(), []
    for step in steps(out):
        print(f"{step.name} ...", flush=True)
        results.append(run(step, out, SECONDS - (time.monotonic() - started)))
    print(f"\n{torch.cuda.get_device_name()}, logs in {out}")
    for result in results:
        print(f"{'ok  ' if result.fine else 'FAIL'} {result.step.name:34} {result.seconds:5.0f} s  {result.said}")
    return int(not all(result.fine for result in results))


if __name__ == "__main__":
    sys.exit(main())
