# SPDX-License-Identifier: Apache-2.0
"""The C++ tests of the kernels' headers (tests/cpp): built with CMake in a folder of their own and run by ctest."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree around the tests")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_headers_of_every_instruction_set(tmp_path: Path) -> None:
    """simd.h, gemm.h and transpose.h; a program whose instructions this processor lacks is skipped by itself."""
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=environment["PATH"]) is None:
            pytest.skip(f"no {tool} found")
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        pytest.skip("no C++ compiler found")
    run(
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tmp_path / "build"), "-DPYDISTILL_TESTS=ON",
        "-DPYDISTILL_VERSION=test", "-DPYDISTILL_CUDA=0", f"-DPython_EXECUTABLE={sys.executable}",
    )  # fmt: skip
    run("cmake", "--build", str(tmp_path / "build"), "--target", "kernel_tests")
    report = run("ctest", "--test-dir", str(tmp_path / "build"), "--output-on-failure")
    assert re.search(r"headers_generic \.+ +Passed", report)
    sets = re.findall(r"headers_(\w+) \.+\**(?: +Passed|Skipped)", report)
    assert sorted(sets) in (["generic"], ["avx2", "avx512", "generic"]), report
