# SPDX-License-Identifier: Apache-2.0
"""Time and memory of one call, taken so that variants can be compared on a machine that is not entirely ours.

All variants of a case are sampled in turn within one process, and a sample during which other processes used
the CPU is marked as disturbed. Nothing here knows about losses.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

# One kernel tick (10 ms) of rounding on either side of /proc/stat's counters must not disqualify a short
# sample.
TICK_SECONDS = 0.012


@dataclass(frozen=True)
class Variant:
    """One thing to time: `call` is measured, `prepare` restores its inputs beforehand and is not."""

    call: Callable[[], object]
    prepare: Callable[[], None] | None = None

    def run(self) -> float:
        """Seconds of one call, including the release of what it returned (a training step pays for that
        too)."""
        if self.prepare is not None:
            self.prepare()
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


@dataclass
class Timing:
    """Samples of one variant, in milliseconds per call."""

    clean: list[float] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        """What the statistics are taken over: the clean samples if there are at least three, otherwise
        all."""
        return self.clean if self.is_clean else self.clean + self.disturbed

    @property
    def is_clean(self) -> bool:
        return len(self.clean) >= 3

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.clean + self.disturbed)

    def percentile(self, percent: float) -> float:
        """Linear interpolation between the sorted samples."""
        ordered = sorted(self.samples)
        position = (len(ordered) - 1) * percent / 100
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def cpu_seconds_of_machine() -> float | None:
    """CPU seconds that all processes have used since boot, or None where /proc/stat does not exist."""
    try:
        with open("/proc/stat") as stat:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.readline().split()[1:9])
    except OSError:
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def is_disturbed(foreign_seconds: float, wall_seconds: float, cores: int, tolerance: float) -> bool:
    """Whether other processes took more than `tolerance` of the machine's `cores` during a sample."""
    return foreign_seconds > tolerance * cores * wall_seconds + TICK_SECONDS


class Meter(Protocol):
    """How a device is timed, and its memory watched."""

    def seconds(self, variant: Variant) -> float:
        """Of one call, without what prepares it."""

    def extra_peak_mib(self, variant: Variant) -> float | None:
        """Memory in MiB at the worst moment of one call, its result included, beyond what was there before."""

    def foreign_seconds(self) -> float | None:
        """CPU seconds that other processes have used so far, where that disturbs what is measured."""


class CpuMeter:
    """Wall time and resident memory of this process."""

    def seconds(self, variant: Variant) -> float:
        return variant.run()

    def extra_peak_mib(self, variant: Variant) -> float | None:
        return extra_peak_mib(variant)

    def foreign_seconds(self) -> float | None:
        machine = cpu_seconds_of_machine()
        return None if machine is None else machine - time.process_time()


def interleave(
    variants: Mapping[str, Variant],
    *,
    repetitions: int,
    budget_seconds: float,
    sample_seconds: float = 0.12,
    tolerance: float = 0.08,
    meter: Meter | None = None,
) -> dict[str, Timing]:
    """Times every variant in turn, round after round.

    Each round starts with another variant, so that none always runs in the wake of the same neighbour. Rounds
    end when every variant has `repetitions` clean samples, or, once each has at least three samples, when the
    budget is spent.
    """
    meter = meter or CpuMeter()
    calls: dict[str, int] = {}
    for name, variant in variants.items():
        meter.seconds(variant)  # compiles, faults pages in
        seconds = meter.seconds(variant)
        if seconds < sample_seconds:
            seconds = min(meter.seconds(variant) for _ in range(3))
        calls[name] = max(1, round(sample_seconds / max(seconds, 1e-6)))
    timings = {name: Timing() for name in variants}
    names = list(variants)
    cores = os.cpu_count() or 1
    started = time.perf_counter()
    round_index = 0
    while True:
        enough = min(len(timing.clean) for timing in timings.values()) >= repetitions
        spent = time.perf_counter() - started > budget_seconds and round_index >= 3
        if enough or spent:
            return timings
        for name in names[round_index % len(names) :] + names[: round_index % len(names)]:
            before, wall = meter.foreign_seconds(), time.perf_counter()
            seconds = sum(meter.seconds(variants[name]) for _ in range(calls[name]))
            after, wall = meter.foreign_seconds(), time.perf_counter() - wall
            foreign = 0.0 if before is None or after is None else after - before
            timing = timings[name]
            disturbed = is_disturbed(foreign, wall, cores, tolerance)
            (timing.disturbed if disturbed else timing.clean).append(seconds / calls[name] * 1e3)
        round_index += 1


def extra_peak_mib(variant: Variant) -> float | None:
    """Extra resident memory in MiB at the worst moment of one call, its result included.

    The kernel's high-water mark (VmHWM) is reset before the call and compared with the resident size then.
    None where /proc/self/clear_refs cannot be written (not Linux, or a restricted container).
    """
    variant.run()
    if variant.prepare is not None:
        variant.prepare()
    gc.collect()
    try:
        # Memory that malloc keeps for reuse would otherwise be handed out again without being counted.
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")
    except OSError:
        return None
    before = _status_mib("VmRSS")
    result = variant.call()
    peak = _status_mib("VmHWM") - before
    del result
    return max(peak, 0.0)


def _status_mib(key: str) -> float:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    raise KeyError(key)
