# SPDX-License-Identifier: Apache-2.0
"""The wheel: drives CMakeLists.txt with ninja and ships kernels/ as pydistill.kernels.

Environment: PYDISTILL_NATIVE=0 leaves the native code out (a pure-Python wheel; the eager reference does the work).
PYDISTILL_CUDA=1 demands CUDA kernels, 0 leaves them out; otherwise they are built where nvcc is found: CUDACXX, CUDA_HOME,
PATH, the package nvidia-cuda-nvcc. TORCH_CUDA_ARCH_LIST says for which architectures. CMake's own variables work too,
e.g. CMAKE_BUILD_TYPE=Debug or CMAKE_BUILD_PARALLEL_LEVEL=1. Nothing here reads the network or looks for a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from importlib import import_module, metadata
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)


class CMakeBuild(build_ext):
    """Builds pydistill._C, the one extension, with CMake."""

    def build_extension(self, ext: Extension) -> None:
        check_torch()
        # One folder of object files per Python, whatever is being built: an editable install after a wheel only links.
        work = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"
        # Where setuptools looks for the finished module, to put it into the wheel or, editable, beside the sources.
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(work)),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYDISTILL_VERSION={self.distribution.get_version()}",
            f"-DPYDISTILL_CUDA={os.environ.get('PYDISTILL_CUDA', 'auto')}",
        ]
        environment = {**os.environ, "PATH": os.pathsep.join([*tool_folders(), os.environ.get("PATH", "")])}
        try:
            subprocess.run(configure, check=True, env=environment)
            subprocess.run(["cmake", "--build", str(work)], check=True, env=environment)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"pydistill: the native build failed ({error}). It needs cmake, ninja, pybind11 and a C++20 compiler; "
                "what went wrong stands above. PYDISTILL_NATIVE=0 installs without native code."
            ) from error


def check_torch() -> None:
    """Stops with one sentence where torch's headers are missing or too old for the stable ABI."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise SystemExit(
            "pydistill: the native build needs torch in this environment: "
            "pip install 'torch>=2.10' setuptools wheel pybind11 cmake ninja, then pip install --no-build-isolation ."
        ) from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"pydistill: the native build needs torch >= 2.10, got {version}: pip install 'torch>=2.10'")


def tool_folders() -> list[str]:
    """This Python's cmake and ninja: its environment need not be activated, and the system's may be too old."""
    folders = []
    for package, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        try:
            folders.append(getattr(import_module(package), attribute))
        except ImportError:
            continue
    return folders


native = os.environ.get("PYDISTILL_NATIVE", "1")
if native not in ("0", "1"):
    raise SystemExit(f"pydistill: PYDISTILL_NATIVE must be 0 or 1, got {native!r}")
if os.environ.get("PYDISTILL_CUDA", "auto") not in ("0", "1", "auto"):
    raise SystemExit(f"pydistill: PYDISTILL_CUDA must be 0, 1 or auto, got {os.environ['PYDISTILL_CUDA']!r}")

setup(
    packages=[*find_packages(include=["pydistill", "pydistill.*"]), "pydistill.kernels"],
    package_dir={"pydistill.kernels": "kernels"},
    ext_modules=[Extension("pydistill._C", [])] if native == "1" else [],
    cmdclass={"build_ext": CMakeBuild},
)
