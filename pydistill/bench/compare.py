# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of all losses share: the correctness gate, providers timed in turn, rows, and judged targets.

A benchmark is a module such as `soft_target`: it says what a problem is, who computes it, and what limits it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pydistill import _dispatch
from pydistill.bench.gpu import CudaMeter
from pydistill.bench.measure import CpuMeter, Meter, Timing, Variant, interleave
from pydistill.bench.rows import Row

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Providers that compute nothing, but take as long as the machine must: for bytes or multiply-adds, and for
# exponentials.
LIMITS = ("limit", "exponentials")
CPU = torch.device("cpu")

Size = tuple[int, ...]
Result = tuple[Tensor, tuple[Tensor, ...]]  # value, gradients


@dataclass(frozen=True)
class Errors:
    """Distance from float64: relative for the value, relative 2-norm over all elements of all gradients."""

    value: float
    gradient: float


@dataclass(frozen=True)
class Workload:
    """A problem and who computes it, correct as far as the gate knows: everything that a table needs but the time.

    A variant that several workloads share is timed once.
    """

    name: str
    shape: Size
    variants: Mapping[str, Variant]  # by provider
    errors: Mapping[str, Errors]
    megabytes: float | None = None  # that have to move
    gigaflop: float | None = None  # that have to be computed


class Benchmark(Protocol):
    """What `pydistill bench LOSS` needs from the module of a loss."""

    @property
    def LOSS(self) -> str: ...
    @property
    def OP(self) -> str:
        """The op whose kernel ours is made with."""

    @property
    def SIZE_NAMES(self) -> tuple[str, ...]: ...
    @property
    def EXAMPLE_SIZE(self) -> str: ...
    @property
    def WORKLOADS(self) -> Mapping[str, str]:
        """Name -> what it is."""

    @property
    def PROVIDERS(self) -> tuple[str, ...]: ...

    def cases(self, sizes: Sequence[Size] | None, names: Sequence[str], *, quick: bool) -> list[tuple[Size, list[str]]]:
        """The sizes to measure, each with its workloads; None is those of the documentation."""

    def workloads(
        self, size: Size, dtype: torch.dtype, names: Sequence[str], providers: Sequence[str], device: torch.device = CPU
    ) -> list[Workload]:
        """The named workloads of one size; raises GateError."""

    def providers_here(self, device: torch.device = CPU) -> list[str]:
        """All providers that this installation can run."""

    def limit_name(self, device: torch.device = CPU) -> str:
        """What the limit is on this machine, in words."""

    def targets(self, rows: Sequence[Row]) -> list[Target]:
        """The promises that the measured rows can judge."""


def compile_loss(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`loss` through torch.compile, afresh: Inductor bakes shapes and the thread count into its code."""
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def with_gradients(loss: Callable[[], Tensor], trained: Sequence[Tensor]) -> Callable[[], Result]:
    """One forward and backward: the value, and the gradients of what is trained."""

    def call() -> Result:
        value = loss()
        return value.detach(), torch.autograd.grad(value, trained)

    return call


class GateError(RuntimeError):
    """Our result is further from float64 than the reference in the same dtype: there is nothing to time."""


def errors(result: Result, truth: Result) -> Errors:
    value = abs(float(result[0].double() - truth[0])) / max(abs(float(truth[0])), 1e-300)
    pairs = list(zip(result[1], truth[1], strict=True))
    distance = math.hypot(*(float((found.double() - right).norm()) for found, right in pairs))
    return Errors(value, distance / math.hypot(*(float(right.norm()) for _, right in pairs)))


def check(what: str, found: Errors, reference: Errors) -> None:
    """Raises GateError if our errors exceed the reference's plus rounding.

    The reference upcasts to float32, so in low precision its error is the rounding of the gradient it returns; what is
    allowed on top is a few float32 roundings, and a twentieth of that same rounding.
    """
    allowed = Errors(reference.value + 1e-6, reference.gradient * 1.05 + 2e-6)
    if not (found.value <= allowed.value and found.gradient <= allowed.gradient):
        raise GateError(
            f"{what}: value error {found.value:.1e} (allowed {allowed.value:.1e}), "
            f"gradient error {found.gradient:.1e} (allowed {allowed.gradient:.1e})"
        )


def judge(
    problem: str,
    providers: Sequence[str],
    call_of: Callable[[str], Callable[[], Result]],
    reference: Result,
    truth: Result,
    kernels: Sequence[str] = ("ours",),
) -> dict[str, Errors]:
    """Errors of every provider on a problem that is small enough for float64; raises GateError for one of `kernels`."""
    allowed = errors(reference, truth)
    found = {provider: errors(call_of(provider)(), truth) for provider in providers if provider not in LIMITS}
    for kernel in kernels:
        if kernel in found:
            check(problem.format(kernel), found[kernel], allowed)
    return found


def has_kernel(loss: str, device: torch.device = CPU) -> bool:
    """Whether ours is a kernel here, or the eager reference."""
    return _dispatch.resolve(loss, device) != "reference"


def measure(
    benchmark: Benchmark,
    cases: Sequence[tuple[Size, Sequence[str]]],
    dtypes: Sequence[str],
    threads: Sequence[int],
    providers: Sequence[str],
    *,
    thp_alloc: int,
    repetitions: int,
    budget_seconds: float,
    device: torch.device = CPU,
) -> Iterator[list[Row]]:
    """Rows of one workload after the other; those of one (size, dtype, thread count) take turns."""
    before = torch.get_num_threads()
    meter: Meter = CpuMeter() if device.type == "cpu" else CudaMeter()
    try:
        for count in threads:
            torch.set_num_threads(count)
            for dtype in dtypes:
                for size, names in cases:
                    workloads = benchmark.workloads(size, DTYPES[dtype], names, providers, device)
                    variants = {
                        str(id(variant)): variant for workload in workloads for variant in workload.variants.values()
                    }
                    timings = interleave(variants, repetitions=repetitions, budget_seconds=budget_seconds, meter=meter)
                    memory = {key: meter.extra_peak_mib(variant) for key, variant in variants.items()}
                    for workload in workloads:
                        key = {provider: str(id(variant)) for provider, variant in workload.variants.items()}
                        yield [
                            _row(
                                workload,
                                provider,
                                {name: timings[key[name]] for name in key},
                                memory[key[provider]],
                                loss=benchmark.LOSS,
                                dtype=dtype,
                                threads=count,
                                thp_alloc=thp_alloc,
                                device=device.type,
                            )
                            for provider in workload.variants
                        ]
    finally:
        torch.set_num_threads(before)


def _row(
    workload: Workload,
    provider: str,
    timings: Mapping[str, Timing],
    extra_mib: float | None,
    *,
    loss: str,
    dtype: str,
    threads: int,
    thp_alloc: int,
    device: str,
) -> Row:
    timing, found = timings[provider], workload.errors.get(provider)

    def times_faster(than: str) -> float | None:
        comparable = provider not in (than, *LIMITS) and than in timings
        return timings[than].median / timing.median if comparable else None

    def percent_of(limit: str) -> float | None:
        comparable = limit in timings and (provider == limit or provider not in LIMITS)
        return 100 * timings[limit].median / timing.median if comparable else None

    def rate(amount: float | None) -> float | None:
        """Per second; the exponentials are none of it."""
        return None if amount is None or provider == "exponentials" else amount / timing.median * 1e3

    bytes_per_s = rate(workload.megabytes)
    return Row(
        loss=loss,
        workload=workload.name,
        shape="x".join(map(str, workload.shape)),
        dtype=dtype,
        threads=threads,
        thp_alloc=thp_alloc,
        provider=provider,
        median_ms=timing.median,
        p20_ms=timing.percentile(20),
        p80_ms=timing.percentile(80),
        min_ms=timing.best,
        samples=len(timing.clean) + len(timing.disturbed),
        clean=len(timing.clean),
        extra_mib=extra_mib,
        value_error=None if found is None else found.value,
        gradient_error=None if found is None else found.gradient,
        megabytes=workload.megabytes,
        gb_per_s=None if bytes_per_s is None else bytes_per_s / 1e3,
        gigaflop=workload.gigaflop,
        gflop_per_s=rate(workload.gigaflop),
        percent_of_limit=percent_of("limit"),
        percent_of_exponentials=percent_of("exponentials"),
        vs_eager=times_faster("eager"),
        vs_compile=times_faster("compile"),
        device=device,
    )


@dataclass(frozen=True)
class Target:
    """A promise about a loss and what was measured."""

    text: str
    measured: float
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def __str__(self) -> str:
        sign = ">=" if self.at_least else "<="
        verdict = "met " if self.met else "MISS"
        return f"{verdict}  {self.text}: {self.measured:.3g} (target {sign} {self.bound:g})"
