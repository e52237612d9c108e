# SPDX-License-Identifier: Apache-2.0
"""docs/scaling.py: the formulas against sums by hand."""

from __future__ import annotations

import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "scaling.py"
if not SCRIPT.exists():
    pytest.skip("needs the source tree around the tests", allow_module_level=True)


@pytest.fixture(scope="module")
def scaling() -> Any:
    # Dataclasses look up the module of their annotations.
    name = "scaling_under_test"
    module = type(sys)(name)
    sys.modules[name] = module
    module.__dict__.update(runpy.run_path(str(SCRIPT), run_name=name))
    return module


def simple(scaling: Any) -> tuple[Any, Any]:
    work = scaling.Work("w", student=1e9, teacher=4e9, tokens=1000, signal_bytes=100.0, buckets=2)
    cluster = scaling.Cluster(
        peak=1e15, utilization=0.5, inside=1e11, between=1e10, latency=1e-5, store=1e9, price=3.6, memory=1e11
    )
    return work, cluster


def test_one_gpu_is_arithmetic(scaling):
    work, cluster = simple(scaling)
    live = scaling.step(work, cluster, 1, cached=False, sharded=False)
    assert (live.student, live.teacher) == pytest.approx((0.012, 0.016))
    assert live.network == 0 and live.seconds == pytest.approx(0.028) and live.bottleneck == "teacher"
    cached = scaling.step(work, cluster, 1, cached=True, sharded=False)
    assert cached.seconds == pytest.approx(0.012) and cached.bottleneck == "student"
    how = {"cached": False, "sharded": False}
    assert scaling.tokens_per_second(work, cluster, 1, **how) == pytest.approx(1000 / 0.028)
    # 28,000 seconds at a tenth of a cent.
    assert scaling.dollars_per_billion(work, cluster, 1, **how) == pytest.approx(28.0)
    assert scaling.cache_dollars_per_billion(work, cluster) == pytest.approx(16.0)


def test_communication(scaling):
    work, cluster = simple(scaling)
    ddp = scaling.step(work, cluster, 8, cached=True, sharded=False)
    assert ddp.network == pytest.approx(2 * 7 / 8 * 2e9 / 1e11 + 2 * 2 * 1e-5 * 3)
    assert ddp.seconds == pytest.approx(0.012 + ddp.network - 0.008) and ddp.bottleneck == "network"
    fsdp = scaling.step(work, cluster, 16, cached=False, sharded=True)
    assert fsdp.network == pytest.approx(15 / 16 * (6e9 + 8e9) / 1e10 + 3 * 2 * 1e-5 * 4)
    assert fsdp.seconds == pytest.approx(0.028 + fsdp.network - 0.028)
    # Hidden behind arithmetic, it costs nothing.
    quick = replace(cluster, inside=math.inf, between=math.inf, latency=0.0)
    for gpus in (8, 1024):
        for sharded in (False, True):
            how = {"cached": False, "sharded": sharded}
            one = scaling.tokens_per_second(work, quick, 1, **how)
            assert scaling.tokens_per_second(work, quick, gpus, **how) == pytest.approx(gpus * one)


def test_storage(scaling):
    """A thousand tokens of 100 bytes for each of 512 GPUs take 0.0512 s of a store of 1 GB/s."""
    work, cluster = simple(scaling)
    step = scaling.step(work, replace(cluster, between=math.inf), 512, cached=True, sharded=False)
    assert step.storage == pytest.approx(0.0512) and step.seconds == step.storage and step.bottleneck == "storage"
    pace = scaling.tokens_per_second(work, replace(cluster, between=math.inf), 4096, cached=True, sharded=False)
    assert pace == pytest.approx(1e9 / 100)


def test_what_fits(scaling):
    work, cluster = simple(scaling)
    large = replace(work, student=6e9)  # 96 GB of weights and optimizer
    assert not scaling.fits(large, cluster, 8, cached=True, sharded=False)
    assert scaling.fits(large, cluster, 8, cached=True, sharded=True)
    assert scaling.fits(replace(work, student=5e9, teacher=4e9), cluster, 1, cached=True, sharded=False)
    assert not scaling.fits(replace(work, student=5e9, teacher=6e9), cluster, 1, cached=False, sharded=False)


def test_tables(scaling):
    lines = scaling.scaling_lines()
    assert len(lines) == 1 + 2 * len(scaling.WORKS) * 2 and all(len(line) == 3 + len(scaling.GPUS) for line in lines)
    assert all(len(line) == 6 for line in scaling.storage_lines())
    record = {
        "parameters": {"teacher": 60, "student": 10}, "seconds": {"live": 2.0, "cached": 1.0}, "tokens": 100
    }  # fmt: skip
    assert scaling.measured_lines(record)[-1] == ("live / cache", "", "2.00 measured, 3.00 by formula")
