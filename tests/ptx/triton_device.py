# SPDX-License-Identifier: Apache-2.0
"""A Triton driver of a GPU that is not there.

Host functions launch their kernels as ever, with CPU tensors. Triton specialises and compiles them for the target as it
would on the machine, and the launches come here: they are recorded and, for sm_80, executed on the memory of those
tensors::

    register_ops()
    with Device("sm_80") as device:
        loss, gradient, scale = torch.ops.pydistill_triton.soft_target(...)
    device.launches[0].asm["ptx"]
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from ptx import interpreter
from ptx.memory import Snapshot, Traffic
from ptx.parser import Program

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a program may have of shared memory there; Triton refuses to launch one that needs more.
MAX_SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
ENCODINGS = {
    "fp32": "<f", "fp64": "<d", "i1": "<?", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<?", "u8": "<B",
    "u16": "<H", "u32": "<I", "u64": "<Q",
}  # fmt: skip


@dataclass
class Launch:
    """A launch of a kernel by a host function.

    Attributes:
        asm: every stage of what Triton compiled: ttir, ttgir, llir, ptx and cubin, or amdgcn and hsaco.
        arguments: what the compiled code takes, with Triton's names of their types: neither constants nor arguments
            to which it is specialised.
        traffic: of global memory, where the launch was executed.
        before: what was in memory, where the device keeps it.
    """

    name: str
    grid: tuple[int, int, int]
    metadata: Any
    asm: dict[str, Any]
    arguments: list[tuple[str, Any]]
    traffic: Traffic | None = None
    steps: int = 0
    executed: frozenset[int] = frozenset()
    before: Snapshot | None = None

    @property
    def threads(self) -> int:
        """Of a program."""
        return self.metadata.num_warps * self.metadata.target.warp_size

    @property
    def program(self) -> Program:
        return interpreter.read(self.asm["ptx"])

    @property
    def tensors(self) -> list[Tensor]:
        """What the kernel may access."""
        return [value for kind, value in self.arguments if kind.startswith("*")]

    def execute(self, program: Program | None = None, max_steps: int = 10_000_000) -> None:
        """Runs the kernel, or another one in its place, on the arguments' memory."""
        machine = interpreter.launch(
            program or self.program,
            self.grid,
            (self.threads,),
            [encode(kind, value) for kind, value in self.arguments],
            shared=self.metadata.shared,
            max_steps=max_steps,
        )
        self.traffic, self.steps, self.executed = machine.traffic, machine.steps, frozenset(machine.executed)


def flat(kinds: tuple[Any, ...], values: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """Arguments with their types, tuples taken apart and constants left out, as the compiled code takes them."""
    found = []
    for kind, value in zip(kinds, values, strict=True):
        if isinstance(kind, tuple):
            found += flat(kind, value)
        elif kind != "constexpr":
            found.append((kind, value))
    return found


def encode(kind: str, value: Any) -> Tensor | bytes:
    """An argument as the kernel's parameter."""
    if kind.startswith("*"):
        return value
    if kind not in ENCODINGS:
        raise TypeError(f"arguments of type {kind!r} are not supported; the kernel takes {', '.join(ENCODINGS)}")
    return struct.pack(ENCODINGS[kind], value)


class _Image:
    """What Triton holds as the loaded function of a kernel: here, where the stages of its compilation are."""

    files: dict[str, str]

    def stages(self) -> dict[str, Any]:
        binary = (".cubin", ".hsaco")
        paths = [Path(path) for name, path in self.files.items() if not name.endswith(".json")]
        return {path.suffix[1:]: path.read_bytes() if path.suffix in binary else path.read_text() for path in paths}


def _note_files(module: Any, function: Any, name: str, files: dict[str, str], digest: str) -> None:
    if isinstance(function, _Image):
        function.files = files


knobs.runtime.kernel_load_end_hook.add(_note_files)


class _Launcher:
    """Triton makes one for a compiled kernel, and calls it for every launch."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: Any,
        image: _Image,
        packed: Any,
        about: Any,
        enter: Any,
        leave: Any,
        *given: Any,
    ) -> None:
        arguments = flat(tuple(self.source.signature.values()), given)
        device = driver.active
        assert isinstance(device, Device)
        device.take(Launch(self.metadata.name, (x, y, z), self.metadata, image.stages(), arguments))


class Device(DriverBase):
    """Inside of its context, the device that Triton launches on."""

    launcher_cls = _Launcher

    def __init__(self, target: str, *, execute: bool | None = None, keep: bool = False) -> None:
        """`target` is a name in TARGETS; `execute` is the default for sm_80, and possible for no other; `keep`: every
        launch remembers what was in memory, so that it can be repeated."""
        super().__init__()
        self.keep = keep
        self.target, self.execute = target, target == "sm_80" if execute is None else execute
        self.launches: list[Launch] = []
        self.previous: DriverBase | None = None
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), _Image(), 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": MAX_SHARED[device]},
        )

    def take(self, launch: Launch) -> None:
        self.launches.append(launch)
        if self.keep:
            launch.before = Snapshot(launch.tensors)
        if self.execute:
            launch.execute()

    @property
    def traffic(self) -> Traffic:
        """Of all launches together."""
        return sum((launch.traffic for launch in self.launches if launch.traffic), Traffic())

    def __enter__(self) -> Device:
        try:
            self.previous = driver.active
        except RuntimeError:  # no GPU
            self.previous = None
        driver.set_active(self)
        # By which host functions know what they launch on.
        self.hip, torch.version.hip = torch.version.hip, "6.4" if TARGETS[self.target].backend == "hip" else None
        return self

    def __exit__(self, *error: object) -> None:
        driver.set_active(self.previous)  # type: ignore[arg-type]
        torch.version.hip = self.hip

    # ------------------------------------------------------------------ what Triton asks

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> str:
        # Triton keeps what it compiled under this name.
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing can be timed on a device that is not there")


def register_ops() -> None:
    """Lets CPU tensors reach the Triton ops of this process; to be called once, before any of them runs."""
    from pydistill import _dispatch

    def kernel(op: str) -> Callable[..., Any]:
        return lambda *arguments: getattr(import_module(f"pydistill.kernels.{_dispatch.TRITON_OPS[op]}"), op)(
            *arguments
        )

    if "triton" in _dispatch.PREFERRED["cpu"]:
        return
    for op in _dispatch.TRITON_OPS:
        _dispatch.libraries["pydistill_triton"].impl(op, kernel(op), "CPU")
    _dispatch.PREFERRED["cpu"] = (*_dispatch.PREFERRED["cpu"], "triton")
