# SPDX-License-Identifier: Apache-2.0
"""What top k leaves out, and how fast a teacher cache is written and read.

    python docs/teacher_cache.py                    errors of loss and gradient, the table of docs/teacher-cache.md
    python docs/teacher_cache.py --measure FILE     writing and reading on this machine, recorded as json

Written: a teacher of six layers of 384, with its signals kept and without. Read: queries, keys and values of texts of
128 tokens in batches, and the logits of a million texts, from the page cache and from the disk, beside the same files
read from one end to the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# --------------------------------------------------------------------------- top k

CLASSES, ROWS = 8192, 64
KEPT = (1, 8, 64, 512, 4096, 8191, 8192)
TEMPERATURES = (1.0, 2.0, 4.0)
# What is below is the rounding of fp32.
ROUNDING = 1e-5


def top_k_lines() -> list[tuple[str, ...]]:
    """Relative errors of loss and gradient against all logits, by k and temperature.

    The teacher's probabilities fall as those of words do, with the rank to the power of -1.7, and some noise; the
    student's logits are the teacher's with noise of deviation 1.
    """
    import numpy as np
    import torch

    from pydistill import soft_target_loss
    from pydistill.cache import _from_top_k, _to_top_k

    draw = np.random.default_rng(0)
    ranks = np.stack([draw.permutation(CLASSES) for _ in range(ROWS)]) + 1
    teacher = -1.7 * np.log(ranks) + 0.5 * draw.standard_normal(ranks.shape)
    student = teacher + draw.standard_normal(ranks.shape)
    teacher_logits, student_logits = (torch.from_numpy(one).float() for one in (teacher, student))

    def loss_and_gradient(target: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        logits = student_logits.clone().requires_grad_()
        loss = soft_target_loss(logits, target, temperature=temperature, impl="reference")
        return loss.detach(), torch.autograd.grad(loss, logits)[0]

    exact = {temperature: loss_and_gradient(teacher_logits, temperature) for temperature in TEMPERATURES}
    found: list[tuple[str, ...]] = [
        ("k", "probability of the others", *(f"T = {temperature:g}: loss, gradient" for temperature in TEMPERATURES))
    ]
    for k in KEPT:
        stored = _to_top_k(teacher_logits, k)
        dense = _from_top_k(**stored, classes=CLASSES)
        cells = []
        for temperature in TEMPERATURES:
            pairs = zip(loss_and_gradient(dense, temperature), exact[temperature], strict=True)
            errors = [float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs]
            cells.append(", ".join("exact" if error < ROUNDING else percent(error) for error in errors))
        found.append((f"{k:,}", percent(float(stored["tail"].exp().mean())), *cells))
    return found


def percent(share: float) -> str:
    return f"{100 * share:,.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


# --------------------------------------------------------------------------- a measured cache

TOKENS, MILLION = 8192, 1_000_000


def measure(target: Path, note: str) -> None:
    """Times writing and reading in a temporary folder beside `target`, and records them."""
    import torch

    from pydistill.bench import machine

    torch.manual_seed(0)
    # Beside the result: temporary folders may lie in memory.
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        record = {
            "machine": machine.line(machine.describe("cpu")),
            "threads": torch.get_num_threads(),
            "note": note,
            "writing": writing(Path(folder)),
            "reading": reading(Path(folder) / "signals"),
            "million": million(Path(folder) / "million"),
        }
    target.write_text(json.dumps(record, indent=1) + "\n")


def writing(folder: Path) -> dict[str, Any]:
    """Tokens per second of a teacher whose signals are kept, and of its forward alone, in turns."""
    import numpy as np
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from pydistill.cache import batches_of_one_length, write_cache

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    teacher = BertForSequenceClassification(config).eval()
    draw = np.random.default_rng(0)
    # Longest first, as the cache has them.
    lengths = np.array([length for length in (128, 96, 64, 32, 16) for _ in range(TOKENS // 5 // length)])
    rows = [draw.integers(1000, 30000, length) for length in lengths]

    def forward() -> None:
        with torch.inference_mode():
            for batch in batches_of_one_length(lengths, 4096):
                ids = torch.from_numpy(np.stack(rows[batch]))
                teacher(input_ids=ids, attention_mask=torch.ones_like(ids))

    def cache(signals: Sequence[str]) -> float:
        with tempfile.TemporaryDirectory(dir=folder) as new:
            return write_cache([{"input_ids": row} for row in rows], teacher, signals, new, progress=False).seconds

    kinds: dict[str, Callable[[], float]] = {
        "forward": lambda: seconds_of(forward),
        "logits": lambda: cache(["logits"]),
        "queries, keys and values": lambda: cache(["queries@-1", "keys@-1", "values@-1"]),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(4):
        for kind, run in kinds.items():
            times[kind].append(run())
    # The first of each warms up.
    return {kind: int(lengths.sum()) / statistics.median(taken[1:]) for kind, taken in times.items()}


def reading(folder: Path, texts: int = 512) -> dict[str, Any]:
    """Examples and bytes per second of batches of signals of tokens, in random order."""
    import torch
    from transformers import BertConfig, BertModel

    from pydistill.cache import CachedTeacher, TeacherCache, write_cache

    # One layer is enough to have signals of that size.
    teacher = BertModel(BertConfig(hidden_size=384, num_hidden_layers=1, num_attention_heads=12, intermediate_size=4))
    signals = ["queries@0", "keys@0", "values@0"]
    ids = torch.randint(1000, 30000, (texts, 128))
    write_cache([{"input_ids": row.numpy()} for row in ids], teacher, signals, folder, progress=False)
    order = torch.randperm(len(ids)).reshape(-1, 16)

    def read() -> None:
        # A new one, with nothing open, as in a worker that begins.
        cached = CachedTeacher(TeacherCache(folder))
        cached.check(frozenset(signals))
        for batch in order:
            cached.read({"input_ids": ids[batch]})

    size = size_of(folder)
    return {
        where: {"examples": len(ids) / seconds, "bytes": size / seconds, "plain": size / plain}
        for where, (seconds, plain) in both(folder, read).items()
    }


def million(folder: Path) -> dict[str, Any]:
    """A cache of the two logits of a million texts: opened, and read in one call."""
    import numpy as np
    import torch

    from pydistill.cache import Definition, TeacherCache, _open_folder, _Writer

    # Written without a teacher, whose pace is measured above.
    definition = Definition("none", None, ("logits",), "float32", None, False)
    writer = _Writer(folder, _open_folder(folder, definition))
    draw = np.random.default_rng(0)
    keys = np.frombuffer(draw.bytes(16 * MILLION), dtype="S16")
    for part in np.split(keys, 10):
        writer.add(part, 1, {"logits": torch.randn(len(part), 2)})
        writer.flush()
    wanted = keys[draw.permutation(MILLION)]
    before = resident()
    cache = TeacherCache(folder)
    memory = resident() - before
    del cache
    open_times = both(folder, lambda: TeacherCache(folder))
    read_times = both(folder, lambda: TeacherCache(folder).stack(wanted, "logits"))
    return {
        "rows": MILLION,
        "bytes": size_of(folder),
        "resident": memory,
        **{
            where: {"open": open_times[where][0], "read": read_times[where][0] - open_times[where][0]}
            for where in open_times
        },
    }


def both(folder: Path, read: Callable[[], Any]) -> dict[str, tuple[float, float]]:
    """Seconds of `read`, and of reading the folder's files plainly: from the disk, then from the page cache."""

    def plain() -> None:
        buffer = bytearray(1 << 20)
        for path in sorted(folder.iterdir()):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    found = {}
    for where, prepare in (("disk", forget), ("page cache", lambda folder: plain())):
        times = []
        for run in (read, plain):
            taken = []
            for _ in range(3):
                prepare(folder)
                taken.append(seconds_of(run))
            times.append(statistics.median(taken))
        found[where] = (times[0], times[1])
    return found


def forget(folder: Path) -> None:
    """Have the system drop the folder's files from its page cache, once they are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured_lines(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """Writing beside the teacher's forward, reading beside a plain read of the files."""
    forward = record["writing"]["forward"]
    found: list[tuple[str, ...]] = [("", "pace", "beside it")]
    for kind, pace in record["writing"].items():
        if kind != "forward":
            beside = f"{forward:,.0f} tokens/s, the forward alone: {100 * pace / forward:.0f} %"
            found.append((f"writing {kind}", f"{pace:,.0f} tokens/s", beside))
    for where, one in record["reading"].items():
        pace = f"{one['examples']:,.0f} texts/s, {one['bytes'] / 1e6:,.0f} MB/s"
        beside = f"{one['plain'] / 1e6:,.0f} MB/s, the files alone"
        found.append((f"reading queries, keys and values, {where}", pace, beside))
    many = record["million"]
    for where in record["reading"]:
        pace = f"opened in {many[where]['open']:.1f} s, all read in {many[where]['read']:.1f} s"
        beside = f"{many['bytes'] / 1e6:,.0f} MB of files, {many['resident'] / 1e6:,.0f} MB in memory when opened"
        found.append((f"logits of {many['rows']:,} texts, {where}", pace, beside))
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="What top k leaves out, and how fast a cache is written and read.")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure on this machine instead")
    parser.add_argument("--note", default="", help="recorded with the measurement, such as what else was running")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        measure(options.measure.absolute(), options.note)
        return 0
    for line in top_k_lines():
        print("  ".join(f"{cell:>26}" for cell in line))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
