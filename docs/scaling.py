# SPDX-License-Identifier: Apache-2.0
"""From one process to 1,024 GPUs: tokens per second, cost and bottleneck, with the teacher live or from a cache.

    python docs/scaling.py                   the tables of docs/scaling.md
    python docs/scaling.py --measure FILE    a step of this machine with a live and a cached teacher, recorded as json

A step of T tokens per GPU takes, in seconds, with S and L parameters of student and teacher (those that multiply, no
tables of embeddings), N GPUs, and everything else stated below:

    student   6 S T / (peak x utilization)     forward and backward, 2 S T + 4 S T
    teacher   2 L T / (peak x utilization)     forward, where it is live
    network   DDP: 2 (N - 1) / N x gradients / bandwidth; FSDP: 3 (N - 1) / N x weights / bandwidth (gathered for
              forward and backward, gradients scattered), and the live teacher's weights gathered once; plus
              latency x log2 N for each of the buckets
    storage   bytes per token x T x N / bandwidth of the store, where signals come from a cache

Communication of gradients hides behind the student's backward, two thirds of its time, and FSDP's behind all of the
step; reading hides behind the step before. What does not fit behind is added: the bottleneck is what a step would be
shortest without.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Cluster:
    """GPUs in nodes of eight. All figures are from data sheets but the utilization, which is an assumption."""

    peak: float = 989e12  # operations per second of dense bf16 products, H100
    utilization: float = 0.4
    memory: float = 80e9  # bytes per GPU
    inside: float = 450e9  # bytes per second and GPU within a node, NVLink
    between: float = 50e9  # bytes per second and GPU between nodes, 400 Gb/s each
    latency: float = 10e-6  # seconds per step of a collective
    node: int = 8
    store: float = 100e9  # bytes per second of a shared store, all nodes together
    price: float = 2.5  # per GPU and hour, in dollars

    def bandwidth(self, gpus: int) -> float:
        return self.inside if gpus <= self.node else self.between


@dataclass(frozen=True)
class Work:
    """What one training is.

    Attributes:
        student, teacher: parameters that multiply.
        tokens: per GPU and step.
        signal_bytes: of a cache, per token.
        buckets: of gradients, or layers that FSDP gathers one by one.
    """

    name: str
    student: float
    teacher: float
    tokens: int
    signal_bytes: float
    buckets: int

    @property
    def state_bytes(self) -> float:
        """Weights in bf16, gradients in bf16, master weights and Adam's moments in fp32."""
        return self.student * (2 + 2 + 12)


@dataclass(frozen=True)
class Step:
    """Seconds of one step, part by part."""

    student: float
    teacher: float
    network: float  # in all, hidden or not
    hidden: float  # how much of it hides behind arithmetic
    storage: float

    @property
    def seconds(self) -> float:
        arithmetic = self.student + self.teacher
        return max(arithmetic + max(0.0, self.network - self.hidden), self.storage)

    @property
    def bottleneck(self) -> str:
        """The part without which the step would be shortest."""
        without = {name: replace(self, **{name: 0.0}).seconds for name in ("student", "teacher", "network", "storage")}
        return min(without, key=without.__getitem__)


def step(work: Work, cluster: Cluster, gpus: int, *, cached: bool, sharded: bool) -> Step:
    """One step on `gpus`, with DDP or (`sharded`) FSDP."""
    pace = cluster.peak * cluster.utilization
    student = 6 * work.student * work.tokens / pace
    teacher = 0.0 if cached else 2 * work.teacher * work.tokens / pace
    network, hidden = 0.0, 0.0
    if gpus > 1:
        share, bandwidth = (gpus - 1) / gpus, cluster.bandwidth(gpus)
        waiting = work.buckets * cluster.latency * math.log2(gpus)
        if sharded:
            weights = 3 * 2 * work.student + (0 if cached else 2 * work.teacher)
            network, hidden = share * weights / bandwidth + 3 * waiting, student + teacher
        else:
            network, hidden = 2 * share * 2 * work.student / bandwidth + 2 * waiting, 2 / 3 * student
    storage = work.signal_bytes * work.tokens * gpus / cluster.store if cached else 0.0
    return Step(student, teacher, network, hidden, storage)


def tokens_per_second(work: Work, cluster: Cluster, gpus: int, *, cached: bool, sharded: bool) -> float:
    return gpus * work.tokens / step(work, cluster, gpus, cached=cached, sharded=sharded).seconds


def dollars_per_billion(work: Work, cluster: Cluster, gpus: int, *, cached: bool, sharded: bool) -> float:
    """Of training on a billion tokens; a cache is written besides, once, at the teacher's price."""
    pace = tokens_per_second(work, cluster, gpus, cached=cached, sharded=sharded)
    return 1e9 / pace / 3600 * gpus * cluster.price


def cache_dollars_per_billion(work: Work, cluster: Cluster) -> float:
    """Of writing a cache: the teacher's forward."""
    return 1e9 * 2 * work.teacher / (cluster.peak * cluster.utilization) / 3600 * cluster.price


def fits(work: Work, cluster: Cluster, gpus: int, *, cached: bool, sharded: bool) -> bool:
    """Whether weights and optimizer fit into nine tenths of a GPU's memory; activations are not counted."""
    teacher = 0 if cached else 2 * work.teacher
    return (work.state_bytes + teacher) / (gpus if sharded else 1) <= 0.9 * cluster.memory


# MiniLM: BERT-large to six layers of 384, queries, keys and values of one layer in bf16. A language model: 8 to 1
# billion parameters, the 64 largest of 128,256 log-probabilities (bf16, with their classes) and the tail.
WORKS = [
    Work("MiniLM, 302 M to 10.6 M", 10.6e6, 302e6, 65536, 3 * 1024 * 2, 4),
    Work("language model, 8 B to 1 B", 1.0e9, 7.5e9, 16384, 64 * (2 + 4) + 2, 16),
]
GPUS = (1, 8, 64, 256, 1024)
CLUSTER = Cluster()


def scaling_lines() -> list[tuple[str, ...]]:
    """Millions of tokens per second, dollars per billion tokens, and the bottleneck."""
    found: list[tuple[str, ...]] = [("training", "teacher", "by", *(f"{gpus:,}" for gpus in GPUS))]
    for work in WORKS:
        for cached in (False, True):
            for sharded in (False, True):
                cells = []
                for gpus in GPUS:
                    how = {"cached": cached, "sharded": sharded}
                    if not fits(work, CLUSTER, gpus, **how):
                        cells.append("does not fit")
                        continue
                    pace = tokens_per_second(work, CLUSTER, gpus, **how) / 1e6
                    price = dollars_per_billion(work, CLUSTER, gpus, **how)
                    cells.append(f"{pace:,.3g} M/s, ${price:,.2f}, {step(work, CLUSTER, gpus, **how).bottleneck}")
                found.append((work.name, "cache" if cached else "live", "FSDP" if sharded else "DDP", *cells))
    return found


def storage_lines() -> list[tuple[str, ...]]:
    """What a cache takes."""
    found: list[tuple[str, ...]] = [
        (
            "training",
            "bytes per token",
            "1 B tokens",
            "100 B tokens",
            "writing, per 1 B tokens",
            "reading at 1,024 GPUs",
        )
    ]
    for work in WORKS:
        # As fast as the arithmetic would want it.
        wanted = tokens_per_second(work, replace(CLUSTER, store=math.inf), 1024, cached=True, sharded=False)
        found.append(
            (
                work.name,
                f"{work.signal_bytes:,.0f}",
                f"{work.signal_bytes * 1e9 / 1e12:,.2f} TB",
                f"{work.signal_bytes * 1e11 / 1e12:,.0f} TB",
                f"${cache_dollars_per_billion(work, CLUSTER):,.2f}",
                f"{wanted * work.signal_bytes / 1e9:,.0f} GB/s",
            )
        )
    return found


# --------------------------------------------------------------------------- a measured step

STEP_TOKENS, LENGTH = 2048, 128


def measure(target: Path) -> None:
    """Times a MiniLM step with the teacher beside the student and from a cache, in turns, on this machine."""
    import statistics
    import tempfile

    import torch
    from transformers import BertConfig, BertModel

    from pydistill import AttentionRelation
    from pydistill.bench import machine
    from pydistill.cache import CachedTeacher, TeacherCache, write_cache
    from pydistill.distiller import Distiller
    from pydistill.teachers import OnlineTeacher

    torch.manual_seed(0)
    sizes = {"teacher": (384, 6), "student": (192, 3)}
    models = {
        name: BertModel(
            BertConfig(hidden_size=width, num_hidden_layers=depth, num_attention_heads=12, intermediate_size=4 * width)
        )
        for name, (width, depth) in sizes.items()
    }
    ids = torch.randint(1000, 30000, (STEP_TOKENS // LENGTH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with tempfile.TemporaryDirectory() as folder:
        signals = sorted(AttentionRelation().teacher_signals)
        summary = write_cache([{"input_ids": row.tolist()} for row in ids], models["teacher"], signals, folder,
                              dtype="bfloat16", progress=False)  # fmt: skip
        cached = CachedTeacher(TeacherCache(folder))
        teachers = {"live": OnlineTeacher(models["teacher"]), "cached": cached}
        steps = {kind: Distiller(models["student"], one, AttentionRelation()) for kind, one in teachers.items()}
        collate = cached.collator(lambda rows: dict(rows[0]))
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(8):
            for kind, distiller in steps.items():
                started = time.perf_counter()
                # Reading is part of it.
                given = collate([batch]) if kind == "cached" else batch
                distiller(**given).loss.backward()
                times[kind].append(time.perf_counter() - started)
                models["student"].zero_grad()
    counted = {
        name: sum(one.numel() for key, one in model.encoder.named_parameters()) for name, model in models.items()
    }
    record = {
        "machine": machine.line(machine.describe("cpu")),
        "threads": torch.get_num_threads(),
        "tokens": STEP_TOKENS,
        "parameters": counted,
        "bytes_per_token": summary.bytes / summary.tokens,
        # The first of each warms up.
        "seconds": {kind: statistics.median(taken[1:]) for kind, taken in times.items()},
    }
    target.write_text(json.dumps(record, indent=1) + "\n")


def measured_lines(record: dict) -> list[tuple[str, ...]]:
    """Tokens per second, and what the formulas make of the live step if the cached one is taken for the student's."""
    live, cached = record["seconds"]["live"], record["seconds"]["cached"]
    ratio = 1 + record["parameters"]["teacher"] / (3 * record["parameters"]["student"])
    tokens = record["tokens"]
    return [
        ("teacher", "tokens per second", "seconds of a step"),
        ("live", f"{tokens / live:,.0f}", f"{live:.2f}"),
        ("cache", f"{tokens / cached:,.0f}", f"{cached:.2f}"),
        ("live / cache", "", f"{live / cached:.2f} measured, {ratio:.2f} by formula"),
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Tokens per second, cost and bottleneck from 1 to 1,024 GPUs.")
    parser.add_argument("--measure", type=Path, metavar="FILE", help="measure a step on this machine instead")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        measure(options.measure)
        return 0
    for lines in (scaling_lines(), storage_lines()):
        for line in lines:
            print("  ".join(f"{cell:>26}" for cell in line))
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
