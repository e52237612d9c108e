# SPDX-License-Identifier: Apache-2.0
"""Compiled code against its budgets, and the file that docs/gpu.md has its tables from.

    python tests/ptx/budgets.py [triton] [cuda]   prints what there is; exit status 1 where a budget is broken
    python tests/ptx/budgets.py --record          also writes docs/benchmarks/gpu-static.json
    python tests/ptx/budgets.py --renew           also makes budgets.json anew: to be read in the diff

A budget is of a kernel as a workload launches it, on a target: at most so many registers, spills and bytes of shared
memory, at least so much occupancy and so many wide or matrix instructions. Traffic has one budget for all: a tenth
more than the formula of the workload.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUDGETS = HERE / "budgets.json"
RECORD = HERE.parents[1] / "docs" / "benchmarks" / "gpu-static.json"
MOST = ("registers", "spills", "shared")
LEAST = ("occupancy", "loads_128", "stores_128", "matrix")
TRAFFIC = 1.1
CUDA_TARGETS = ("sm_80", "sm_90", "sm_100")

if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import torch  # noqa: E402
import triton  # noqa: E402

from ptx import cuda_device, static, triton_device  # noqa: E402
from ptx.memory import Traffic  # noqa: E402
from ptx.static import Code  # noqa: E402
from ptx.workloads import Workload, workloads  # noqa: E402

Budgets = dict[str, dict[str, dict[str, float]]]


@dataclass(frozen=True)
class Kernel:
    """One kernel of a workload on one target."""

    implementation: str
    workload: Workload
    name: str
    code: Code

    @property
    def key(self) -> str:
        return f"{self.implementation}: {self.workload.op} {self.workload.name}: {self.name}"


def of_triton(workload: Workload, target: str) -> Iterator[Kernel]:
    """Kernels of a workload, the one that is launched twice with different code under two names."""
    with triton_device.Device(target, execute=False) as device:
        workload.call(torch.ops.pydistill_triton)
    binary = "amdgcn" if "amdgcn" in device.launches[0].asm else "cubin"
    yield from _named("triton", workload, device.launches, binary, lambda one: static.of_launch(target, one))


def _named(
    implementation: str, workload: Workload, launches: list[Any], stage: str, code: Callable[[Any], Code]
) -> Iterator[Kernel]:
    seen: dict[Any, str] = {}
    for launch in launches:
        if launch.asm[stage] not in seen:
            again = sum(name.split(" ")[0] == launch.name for name in seen.values())
            seen[launch.asm[stage]] = launch.name + (f" {again + 1}" if again else "")
            yield Kernel(implementation, workload, seen[launch.asm[stage]], code(launch))


def of_cuda(workload: Workload, launches: list[cuda_device.Launch], target: str) -> Iterator[Kernel]:
    """The same, of what was launched on sm_80."""
    seen = set()
    for launch in launches:
        if launch.name not in seen:
            seen.add(launch.name)
            codes = cuda_code(target)
            yield Kernel("cuda", workload, readable(launch.name), codes(launch.name, launch.threads, launch.shared))


def cuda_code(target: str) -> Callable[[str, int, int], Code]:
    """(mangled name, threads, dynamic shared memory) -> code, for a target."""
    sources = sorted((cuda_device.CSRC / "cuda").glob("*.cu"))
    images = [static.disassembled(cuda_device.cubin(source, target)) for source in sources]
    return lambda name, threads, shared: next(
        image.code(target, name, threads, shared) for image in images if name in image.names
    )


def readable(name: str) -> str:
    """A mangled name without namespaces and arguments."""
    plain = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    plain = re.sub(r"\(pyd::(\w+)\)(\d+)", r"\1 \2", plain.removeprefix("void "))
    return re.sub(r"\b(pyd|\(anonymous namespace\))::|__nv_", "", re.sub(r"\([^()]*\)$", "", plain))


def kernels(implementation: str, launches: dict[str, list[Any]] | None = None) -> Iterator[Kernel]:
    """Of every workload and target; for "cuda" with what `traffic` recorded."""
    for workload in workloads(implementation):
        if implementation == "triton":
            for target in triton_device.TARGETS:
                yield from of_triton(workload, target)
        else:
            assert launches is not None
            for target in CUDA_TARGETS:
                yield from of_cuda(workload, launches[f"{workload.op} {workload.name}"], target)


def measured(implementation: str, workload: Workload) -> tuple[Traffic, list[Any]]:
    """Traffic of a workload on sm_80, and its launches."""
    if implementation == "triton":
        with triton_device.Device("sm_80") as device:
            workload.call(torch.ops.pydistill_triton)
        return device.traffic, device.launches
    with cuda_device.ops().device() as other:
        workload.call(torch.ops.pydistill_ptx)
    return other.traffic, other.launches


def violations(kernel: Kernel, budgets: Budgets) -> list[str]:
    """What is over or under; a kernel without a budget is a violation too."""
    budget = budgets.get(kernel.key, {}).get(kernel.code.target)
    if budget is None:
        return [f"{kernel.key}: {kernel.code.target} has no budget in {BUDGETS.name}"]
    found = asdict(kernel.code)
    broken = [
        f"{what} {found[what]:g}, at most {budget.get(what, 0):g}" for what in MOST if found[what] > budget.get(what, 0)
    ]
    broken += [
        f"{what} {found[what]:g}, at least {budget[what]:g}" for what in LEAST if found[what] < budget.get(what, 0)
    ]
    return [f"{kernel.key}: {kernel.code.target}: {one}" for one in broken]


def budget_of(code: Code) -> dict[str, float]:
    """What code that is as good as this one keeps; registers may grow to the next multiple of 8, by which they are
    given out."""
    found = asdict(code)
    most = {what: found[what] for what in MOST if found[what]}
    most["registers"] = -(-code.registers // 8) * 8
    occupancy = static.occupancy(code.target, most["registers"], code.threads, code.shared)
    return {**most, "occupancy": occupancy, **{what: found[what] for what in LEAST[1:] if found[what]}}


def read() -> Budgets:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}


def main(arguments: list[str]) -> int:
    chosen = [one for one in ("triton", "cuda") if one in arguments] or ["triton", "cuda"]
    triton_device.register_ops()
    budgets, broken = read(), []
    renewed: Budgets = {key: one for key, one in budgets.items() if key.split(":")[0] not in chosen}
    record: dict[str, Any] = {"compilers": {"triton": triton.__version__, **cuda_device.version()}}
    record |= {"traffic": [], "kernels": []}
    for implementation in chosen:
        launches = {}
        for workload in workloads(implementation):
            traffic, launches[f"{workload.op} {workload.name}"] = measured(implementation, workload)
            moved = traffic.touched if workload.cached else traffic.sectors
            about = {"implementation": implementation, "op": workload.op, "workload": workload.name}
            sizes = {what: getattr(traffic, what) for what in ("requested", "sectors", "touched")}
            record["traffic"].append(
                {**about, "moved": moved, "minimum": workload.minimum, "formula": workload.formula, **sizes}
            )
            line = (
                f"{implementation}: {workload.op} {workload.name}: {moved / workload.minimum:.2f} of every byte once, "
                f"{moved / workload.formula:.2f} of the formula"
            )
            print(line, flush=True)
            if moved > TRAFFIC * workload.formula:
                broken.append(f"{line}, at most {TRAFFIC}")
        for kernel in kernels(implementation, launches):
            broken += violations(kernel, budgets) if "--renew" not in arguments else []
            renewed.setdefault(kernel.key, {})[kernel.code.target] = budget_of(kernel.code)
            about = {"implementation": implementation, "op": kernel.workload.op, "workload": kernel.workload.name}
            record["kernels"].append({**about, "kernel": kernel.name, **asdict(kernel.code)})
            code = kernel.code
            print(
                f"{kernel.key}: {code.target}: {code.registers} registers, {code.spills} spills, {code.shared} bytes "
                f"shared, occupancy {code.occupancy:.2f}, {code.loads_128} of {code.loads} loads of 16 bytes, "
                f"{code.matrix} matrix, {code.instructions} instructions",
                flush=True,
            )
    if "--renew" in arguments:
        BUDGETS.write_text(_json(renewed))
    if "--record" in arguments:
        RECORD.write_text(_json(record))
    print("\n".join(broken) or "all budgets are kept")
    return int(bool(broken))


def _json(content: dict[str, Any]) -> str:
    """Readable in a diff: a line for each thing of the second level."""
    parts = []
    for key, value in content.items():
        pairs = isinstance(value, dict)
        inner = (
            [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()]
            if pairs
            else map(json.dumps, value)
        )
        opening, closing = "{}" if pairs else "[]"
        parts.append(f"{json.dumps(key)}: {opening}\n  " + ",\n  ".join(inner) + f"\n {closing}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
