# SPDX-License-Identifier: Apache-2.0
"""The only file that knows backends exist: loads the compiled extension, resolves `impl=`, reports the environment."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata, util
from types import ModuleType
from typing import Any, NamedTuple

import torch

from pydistill import _schemas
from pydistill._version import __version__

IMPLEMENTATIONS = ("auto", "reference", "cpp", "triton", "cuda")


class Backend(NamedTuple):
    """One implementation of a loss: whether it can run here, and why (not)."""

    available: bool
    reason: str


def _load_native() -> tuple[ModuleType | None, str]:
    if os.environ.get("PYDISTILL_NATIVE") == "0":
        return None, "PYDISTILL_NATIVE=0 is set"
    if util.find_spec("pydistill._C") is None:
        return (
            None,
            "this installation has no compiled extension (built with PYDISTILL_NATIVE=0, or run from a source tree)",
        )
    # A compiled extension that is there but does not load is a broken installation: its error must be seen.
    from pydistill import _C

    return _C, f"compiled extension {_C.version}, instruction set {_C.isa()}"


# The ops of compiled code and those of Triton: the same schemas under two names, so that `impl` can choose on a device.
NAMESPACES = {"cpp": "pydistill", "cuda": "pydistill", "triton": "pydistill_triton"}
libraries = {namespace: _schemas.define(namespace) for namespace in sorted(set(NAMESPACES.values()))}

native, native_reason = _load_native()

LOSSES = ("soft_target", "attention_relation", "projected_mse")
# Losses with kernels in csrc/cuda.
CUDA_LOSSES = ("soft_target", "attention_relation", "projected_mse")
# Ops with Triton kernels, and the module of pydistill.kernels that has each.
TRITON_OPS = {
    "soft_target": "soft_target",
    "soft_target_": "soft_target",
    "projected_mse": "projected_mse",
    "attention_relation": "attention_relation",
    "scale_rows_": "scale_rows",
}
# Triton's interpreter runs its kernels on the CPU, slowly and exactly: for tests and for stepping through a kernel.
interpreting = os.environ.get("TRITON_INTERPRET") == "1"


def _load_triton() -> Backend:
    """Registers the Triton kernels; each is imported, and Triton with it, when it is first called."""
    if util.find_spec("triton") is None:
        return Backend(False, "triton is not installed; pip install 'pydistill[triton]'")

    def kernel(op: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            return getattr(import_module(f"pydistill.kernels.{TRITON_OPS[op]}"), op)(*arguments)

        return call

    for op in TRITON_OPS:
        for key in ("CUDA", "CPU") if interpreting else ("CUDA",):
            libraries["pydistill_triton"].impl(op, kernel(op), key)
    return Backend(True, "compiled by triton when first used" if not interpreting else "run by triton's interpreter")


def _cuda(loss: str) -> Backend:
    if loss not in CUDA_LOSSES:
        return Backend(False, "this version has no CUDA kernel for this loss")
    if native is None:
        return Backend(False, native_reason)
    compiled = native.cuda_architectures()
    if not compiled:
        return Backend(
            False,
            "this installation was built without CUDA: nvcc was not found (CUDACXX, CUDA_HOME, PATH), or "
            "PYDISTILL_CUDA=0 was set",
        )
    return Backend(True, f"compiled for {', '.join(compiled)}")


def _covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, as in ["8.0", "9.0a", "10.0+PTX"], runs on a device of this capability."""
    for architecture in architectures:
        number, ptx, _ = architecture.partition("+PTX")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if number[-1].isalpha():  # for exactly this device
            if (major, minor) == capability:
                return True
        # Machine code runs on later devices of its generation, PTX on all later ones.
        elif (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability):
            return True
    return False


def _on_device(loss: str, impl: str, device: torch.device, dtype: torch.dtype | None = None) -> Backend:
    """Whether this device runs what the installation has; for a type of device that is not there, as if it did."""
    backend = BACKENDS[loss][impl]
    if impl != "cuda" or not backend.available:
        return backend
    if dtype == torch.float64:
        return Backend(False, "CUDA kernels take fp32, bf16 and fp16, got fp64")
    if device.type != "cuda" or not torch.cuda.is_available():
        return backend
    assert native is not None
    if torch.version.hip is not None:
        return Backend(False, "CUDA kernels do not run on ROCm devices")
    capability = torch.cuda.get_device_capability(device)
    if not _covers(native.cuda_architectures(), capability):
        return Backend(
            False,
            f"{backend.reason}, not for this device's {capability[0]}.{capability[1]}; "
            f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} builds it",
        )
    return backend


def _backends(loss: str, triton: Backend) -> dict[str, Backend]:
    return {
        "reference": Backend(True, "eager PyTorch, any device"),
        "cpp": Backend(native is not None, native_reason),
        "cuda": _cuda(loss),
        "triton": triton if loss in TRITON_OPS else Backend(False, "this version has no Triton kernel for this loss"),
    }


_triton = _load_triton()
# Which implementations of each loss this installation has, with the reason for each that is missing.
BACKENDS: dict[str, dict[str, Backend]] = {loss: _backends(loss, _triton) for loss in LOSSES}
# Implementations that run on a type of device, best first. ROCm's devices are of type "cuda" too.
PREFERRED = {"cpu": ("cpp", "triton") if interpreting else ("cpp",), "cuda": ("cuda", "triton")}


def ops(impl: str) -> Any:
    """The operators that `impl`, an implementation other than the reference, calls."""
    return getattr(torch.ops, NAMESPACES[impl])


@cache
def _warn_reference(loss: str, device: str, reason: str) -> None:
    warnings.warn(
        f"{loss}: no fused kernel for device '{device}' here ({reason}); running the eager reference. "
        "Pass impl='reference' to choose it on purpose.",
        stacklevel=4,
    )


def resolve(loss: str, device: torch.device, impl: str = "auto", dtype: torch.dtype | None = None) -> str:
    """The implementation that will run `loss` on tensors of `device`: "reference", "cpp", "cuda" or "triton".

    `dtype` is that of the tensors; None is one that every kernel takes.

    Raises:
        ValueError: `impl` is unknown, or does not run on this device.
        RuntimeError: `impl` was asked for and this installation does not have it.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{loss}: impl must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    if impl == "reference":
        return impl
    preferred = PREFERRED.get(device.type, ())
    if impl == "auto":
        for name in preferred:
            if _on_device(loss, name, device, dtype).available:
                return name
        # Choosing the reference because the user switched the kernels off is no surprise; anything else is said once.
        if os.environ.get("PYDISTILL_NATIVE") != "0" and not torch.compiler.is_compiling():
            reason = (
                _on_device(loss, preferred[0], device, dtype).reason if preferred else "no kernel is written for it"
            )
            _warn_reference(loss, device.type, reason)
        return "reference"
    if impl not in preferred:
        fitting = ", ".join(repr(name) for name in ("auto", "reference", *preferred))
        raise ValueError(f"{loss}: impl={impl!r} does not run on device '{device}'; use one of {fitting}")
    backend = _on_device(loss, impl, device, dtype)
    if not backend.available:
        raise RuntimeError(
            f"{loss}: impl={impl!r} is not available: {backend.reason}. "
            "Use impl='auto'" + (", or reinstall pydistill with a C++ compiler at hand." if impl == "cpp" else ".")
        )
    return impl


def environment() -> dict[str, Any]:
    """What this installation is and what it would run: the content of `pydistill env`."""

    def version_of(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    report: dict[str, Any] = {
        "pydistill": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for package in ("transformers", "datasets", "accelerate", "triton"):
        report[package] = version_of(package)
    report["native"] = native_reason
    if native is not None:
        report["instruction sets compiled"] = ", ".join(native.isas_compiled())
        report["instruction set chosen"] = native.isa()
        report["CUDA architectures compiled"] = ", ".join(native.cuda_architectures()) or "none"
    report["CUDA device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    for loss, available in BACKENDS.items():
        for name, backend in available.items():
            report[f"{loss}: {name}"] = ("yes: " if backend.available else "no: ") + backend.reason
        for device, preferred in PREFERRED.items():
            fitting = [name for name in preferred if _on_device(loss, name, torch.device(device)).available]
            report[f"{loss}: auto on {device}"] = fitting[0] if fitting else "reference"
    return report
