# SPDX-License-Identifier: Apache-2.0
"""The wheel: drives CMakeLists.txt with ninja and ships kernels/ as pydistill.kernels.

PYDISTILL_NATIVE=0 leaves the native code out (a pure-Python wheel, the eager reference does the work).
CMAKE_BUILD_PARALLEL_LEVEL limits the parallel compilers. Nothing here reads the network or looks for a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)


class CMakeBuild(build_ext):
    """Builds pydistill._C, the one extension, by CMake."""

    def build_extension(self, ext: Extension) -> None:
        check_torch()
        # The folder of the finished module: the package itself in an editable install, the wheel's tree otherwise.
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        work = Path(self.build_temp).resolve()
        output.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(work)),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYDISTILL_VERSION={self.distribution.get_version()}",
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(work)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(
                f"pydistill: the native build failed ({error}). It needs a C++20 compiler (g++ >= 11 or clang >= 14) and the "
                "Python headers; the compiler's own message is above. PYDISTILL_NATIVE=0 installs without native code."
            ) from error


def check_torch() -> None:
    """Stops with one sentence where torch's headers are missing or too old for the stable ABI."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError as error:
        raise SystemExit(
            "pydistill: building the native code needs torch in this environment: "
            "pip install 'torch>=2.10' setuptools pybind11 cmake ninja, then pip install --no-build-isolation ."
        ) from error
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"pydistill: the native code needs torch >= 2.10, got {version}: pip install 'torch>=2.10'")


native = os.environ.get("PYDISTILL_NATIVE", "1")
if native not in ("0", "1"):
    raise SystemExit(f"pydistill: PYDISTILL_NATIVE must be 0 or 1, got {native!r}")

setup(
    packages=[*find_packages(include=["pydistill", "pydistill.*"]), "pydistill.kernels"],
    package_dir={"pydistill.kernels": "kernels"},
    ext_modules=[Extension("pydistill._C", [])] if native == "1" else [],
    cmdclass={"build_ext": CMakeBuild},
)
