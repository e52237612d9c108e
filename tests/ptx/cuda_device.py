# SPDX-License-Identifier: Apache-2.0
"""CUDA sources compiled by nvcc and launched without a GPU.

The launchers of .cu files run on the host as they are, against `cuda_runtime.c` in the place of CUDA's runtime; the
kernels that they launch are interpreted, from the PTX in the same file, on the memory of CPU tensors::

    library = build([source])
    with library.device(x, y) as device:
        library.functions.launch(x.data_ptr(), y.data_ptr(), x.numel(), None)
    device.launches[0].traffic

With the bindings of csrc/cuda in the library too, whole ops run so on CPU tensors::

    library = ops()
    with library.device() as device:
        loss, gradient, scale = torch.ops.pydistill_ptx.soft_target(...)
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ptx import interpreter, parser
from ptx.memory import Snapshot, Traffic
from ptx.parser import Program
from ptx.static import TOOLS

CSRC = Path(__file__).parents[2] / "csrc"
RUNTIME = Path(__file__).parent / "cuda_runtime.c"
FLAGS = ("-std=c++20", "-O3", "-lineinfo")
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t,
)  # fmt: skip


def nvcc() -> str | None:
    """CUDA's compiler, where there is one: NVCC, on the path, or /usr/local/cuda."""
    return os.environ.get("NVCC") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


_defined: list[torch.library.Library] = []  # a schema lasts as long as its library
NO_NVCC = "CUDA's compiler is needed: nvcc on the path, or its place in NVCC"


def version() -> dict[str, str]:
    """Of the compiler, where there is one."""
    found = nvcc() and re.search(r"release \S+, V(\S+)", _run(_compiler(), "--version"))
    return {"nvcc": found[1]} if found else {}


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(str(word) for word in command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def _compiler() -> str:
    found = nvcc()
    if found is None:
        raise RuntimeError(NO_NVCC)
    return found


@contextmanager
def _kept(sources: Sequence[Path], options: Sequence[str], suffix: str) -> Iterator[tuple[Path, Path | None]]:
    """Where what is compiled from these sources, their neighbours and options is kept until the machine tidies up, and
    where to put it if it is not there yet. One process compiles, the others wait for it."""
    digest = hashlib.sha256(repr([*options, *map(str, sources)]).encode())
    files = {RUNTIME, *sources}
    for one in sources:
        if one.suffix in (".cu", ".cpp"):  # objects have no neighbours
            files.update(*(folder.glob(name) for folder in one.parents[:2] for name in ("*.cuh", "*.h")))
    for file in sorted(files):
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"pydistill-ptx-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    kept = folder / f"{digest.hexdigest()[:24]}{suffix}"
    with open(f"{kept}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            yield kept, None
            return
        temporary = kept.with_name(f"making-{kept.name}")
        yield kept, temporary
        temporary.replace(kept)


def cubin(source: Path, target: str, options: Sequence[str] = ()) -> bytes:
    """Machine code for sm_80, sm_90..."""
    with _kept([source], [*options, target], ".cubin") as (kept, missing):
        if missing:
            _run(_compiler(), *FLAGS, *options, "-cubin", f"-arch={target}", source, "-o", missing)
    return kept.read_bytes()


def build(sources: Sequence[Path], options: Sequence[str] = (), objects: Sequence[Path] = ()) -> Library:
    """Sources and the runtime of the tests as one library, with PTX for compute_80; `objects` are linked to it."""
    with (
        _kept([*sources, *objects], options, ".so") as (kept, missing),
        tempfile.TemporaryDirectory() as folder,
    ):
        if missing:
            runtime = Path(folder) / "runtime.o"
            _run("cc", "-O1", "-fPIC", "-fvisibility=default", "-c", RUNTIME, "-o", runtime)
            _run(
                _compiler(), *FLAGS, *options, "-shared", "-cudart", "none", "-arch=compute_80",
                "-Xcompiler", "-fPIC", "-Xlinker", "-Bsymbolic", *sources, *objects, runtime, "-o", missing,
            )  # fmt: skip
    return Library(kept)


@cache
def ops(csrc: Path = CSRC, namespace: str = "pydistill_ptx") -> Library:
    """The library of the package's CUDA ops, with their bindings, as operators of a namespace on CPU tensors."""
    torch_folder = Path(torch.__file__).parent
    bindings = sorted((csrc / "cuda").glob("*.cpp"))
    objects = []
    options = [
        "-std=c++20", "-O1", "-fPIC", f"-DPYD_NAMESPACE={namespace}", "-DPYD_KEY=CPU", "-DPYD_SIMT_HOST",
        "-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch_folder / 'include'}",
    ]  # fmt: skip
    for binding in bindings:
        with _kept([binding], options, ".o") as (made, missing):
            if missing:
                _run("c++", *options, "-c", binding, "-o", missing)
        objects.append(made)
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-Xlinker", f"-rpath={torch_folder / 'lib'}"]
    _define(namespace)
    library = build(sorted((csrc / "cuda").glob("*.cu")), links, objects)
    torch.ops.load_library(str(library.path))
    return library


def _define(namespace: str) -> None:
    """The ops' schemas, fake kernels and autograd, as the package has them."""
    from pydistill import _schemas
    from pydistill.losses import attention_relation, projected_mse, soft_target

    _defined.append(_schemas.define(namespace))
    for loss in (soft_target, attention_relation, projected_mse):
        loss._register(namespace)


def stand_in_for_cuda(namespace: str = "pydistill_ptx") -> None:
    """From here on, ``impl="cuda"`` is for CPU tensors too, and calls the ops of `ops`."""
    from pydistill import _dispatch

    for loss in _dispatch.LOSSES:
        _dispatch.BACKENDS[loss]["cuda"] = _dispatch.Backend(True, "CUDA kernels interpreted by tests/ptx")
    _dispatch.NAMESPACES["cuda"] = namespace
    _dispatch.PREFERRED["cpu"] = ("cuda",)


@dataclass
class Launch:
    """A launch of a kernel by a launcher; `parameters` are the bytes of each."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    ptx: str
    parameters: list[bytes]
    tensors: Sequence[Tensor]
    traffic: Traffic | None = None
    steps: int = 0
    executed: frozenset[int] = frozenset()
    before: Snapshot | None = None

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def program(self) -> Program:
        return interpreter.read(self.ptx, self.name)

    def execute(self, program: Program | None = None, max_steps: int = 10_000_000) -> None:
        """Runs the kernel, or another one in its place."""
        machine = interpreter.launch(
            program or self.program,
            self.grid,
            self.block,
            self.parameters,
            shared=self.shared,
            tensors=self.tensors,
            max_steps=max_steps,
        )
        self.traffic, self.steps, self.executed = machine.traffic, machine.steps, frozenset(machine.executed)


class Library:
    """A built library; `functions` are its C functions, as ctypes has them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.functions = ctypes.CDLL(str(path))

    @cached_property
    def ptx(self) -> dict[str, str]:
        """The text that has each kernel."""
        dump = _run(TOOLS / "cuobjdump", "--dump-ptx", self.path)
        texts = [part for part in re.split(r"(?m)^(?=\.version)", dump) if part.startswith(".version")]
        texts = [text.split("\nFatbin")[0] for text in texts]
        return {name: text for text in texts for name in parser.entries(text)}

    def device(self, *tensors: Tensor, keep: bool = False) -> Device:
        """Inside of its context, launchers launch on the memory of these tensors; `keep`: every launch remembers what
        was in memory, so that it can be repeated."""
        return Device(self, tensors, keep)


class _Seen(TorchDispatchMode):
    """Notes every tensor that appears, those that bindings allocate in C++ included, and keeps it alive: a pointer
    among a kernel's parameters is then into one of them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors: dict[Any, Tensor] = {}
        self.note(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.note((args, kwargs))
        if func.namespace.startswith("pydistill"):
            # Straight to the kernel, and this mode stays active for what it calls.
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = func(*args, **kwargs)
        self.note(result)
        return result

    def note(self, tree: Any) -> None:
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self.tensors.setdefault((leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()), leaf)


class Device:
    def __init__(self, library: Library, tensors: Sequence[Tensor], keep: bool = False) -> None:
        self.library, self.seen, self.keep = library, _Seen(tensors), keep
        self.launches: list[Launch] = []
        self.error: BaseException | None = None
        self.callback = CALLBACK(self._take)

    @property
    def traffic(self) -> Traffic:
        """Of all launches together."""
        return sum((launch.traffic for launch in self.launches if launch.traffic), Traffic())

    def __enter__(self) -> Device:
        self.library.functions.pydistill_on_launch(self.callback)
        self.seen.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seen.__exit__(kind, error, trace)
        self.library.functions.pydistill_on_launch(None)
        if self.error is not None:
            raise self.error

    def _take(self, name: bytes, grid: Any, block: Any, arguments: Any, shared: int) -> int:
        # An exception cannot pass through C: the launcher sees an error code, and the exception waits for the end.
        try:
            text = self.library.ptx[name.decode()]
            sizes = interpreter.read(text, name.decode()).parameters.values()
            parameters = [ctypes.string_at(arguments[i], size) for i, size in enumerate(sizes)]
            tensors = interpreter.pointed_to(parameters, self.seen.tensors.values())
            launch = Launch(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, text, parameters, tensors)
            self.launches.append(launch)
            if self.keep:
                launch.before = Snapshot(launch.tensors)
            launch.execute()
        except Exception as error:
            self.error = self.error or error
            return LAUNCH_FAILURE
        return 0
