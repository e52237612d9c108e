# SPDX-License-Identifier: Apache-2.0
"""CUDA kernels without a GPU: the sources of csrc/cuda run on the CPU by the harness in tests/simt."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from processes import ChildError, in_a_new_process, numerics_of

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="needs the source tree around the tests"),
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]

# They are in fp64, which the CUDA kernels do not take.
IN_FP64 = ("fp64", "float64", "dtype0-keywords", "golden_gradients", "invariances", "temperature_limit", "jsd_limits")


class Planted(NamedTuple):
    """A bug to plant: one line of a source, by what it is replaced, and who has to notice."""

    file: str
    line: str
    replacement: str
    caught_by: str = "probe"  # or "address", "thread": only a sanitizer sees it for sure


PLANTED = {
    "dropped_barrier": Planted("team.cuh", "  __syncthreads();\n", ""),
    "dropped_warp_barrier": Planted("team.cuh", "    __syncwarp(team.lanes);\n", "", "thread"),
    "slots_used_again": Planted("soft_target.cuh", "slots + 2 * warp_size", "slots", "thread"),
    "lost_neighbour": Planted("team.cuh", "step > 0; step /= 2", "step > 1; step /= 2"),
    "lost_warps": Planted("team.cuh", "lane < team.size / warp_size", "lane < 1"),
    "over_read": Planted("team.cuh", "const int single = pieces.size -", "const int single = 1 + pieces.size -"),
    "unaligned_load": Planted("device.cuh", "if (N == 1 || aligned) return load", "return load", "address"),
    "short_of_shared": Planted("soft_target.cuh", "2 * vector_bytes - 1", "vector_bytes - 1", "address"),
    "ignored_mask": Planted("soft_target.cuh", "(mask == nullptr || mask[r]) && ", ""),
    "sum_not_moved": Planted("soft_target.cuh", "    teacher *= factor_teacher;\n", ""),
    "wrong_label": Planted("soft_target.cuh", "if (i + k == label) g[k]", "if (i + k == label + 1) g[k]"),
    "hidden_nan": Planted("soft_target.cuh", "return x < 0 ? 0.0f : x;", "return fmaxf(x, 0.0f);"),
    "shared_not_asked_for": Planted("soft_target.cu", "if (shared > shared_without_asking)", "if (false)"),
    "block_of_two_teams": Planted("soft_target.cu", "a.team > warp_size ?", "a.team > narrow_block ?"),
}  # fmt: skip


def plant(name: str, bug: Planted, folder: Path) -> None:
    """A copy of csrc with the bug in it, for fp32 alone."""
    shutil.copytree(ROOT / "csrc", folder / name / "csrc")
    source = folder / name / "csrc" / "cuda" / bug.file
    text = source.read_text()
    assert text.count(bug.line) == 1, f"{name}: {bug.file} has changed"
    source.write_text(text.replace(bug.line, bug.replacement))
    launcher = folder / name / "csrc" / "cuda" / "soft_target.cu"
    launcher.write_text(
        re.sub(r"launch_divergence<__\w+>\(p, a, stream\)", "cudaErrorInvalidValue", launcher.read_text())
    )
    if bug.caught_by != "probe":
        (folder / name / bug.caught_by).touch()


class Build:
    """A build folder, configured once, in which targets are made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "build"
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        planted = folder / "planted"
        for name, bug in PLANTED.items():
            plant(name, bug, planted)
        for tool in ("cmake", "ninja", "g++"):
            if shutil.which(tool, path=self.environment["PATH"]) is None:
                pytest.skip(f"no {tool} found")
        report = self.run(
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(self.folder), "-DPYDISTILL_TESTS=ON",
            "-DPYDISTILL_VERSION=test", f"-DPython_EXECUTABLE={sys.executable}", "-DCMAKE_BUILD_TYPE=None",
            "-DCMAKE_CXX_COMPILER=g++", f"-DPYDISTILL_SIMT_PLANTED={planted}",
        )  # fmt: skip
        if "nvcc was not found" in report:
            pytest.skip("no nvcc found, whose headers the harness needs")

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def target(self, name: str) -> Path:
        self.run("cmake", "--build", str(self.folder), "--target", name)
        return self.folder / "tests" / "simt" / f"{name}.so"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("simt"))


def probe(*libraries: str, sanitizer: str = "") -> str:
    """What tests/simt/probe.py prints; ChildError with a sanitizer's report."""
    environment = {"OMP_NUM_THREADS": "1", "PYDISTILL_NATIVE": "0"}
    if sanitizer:
        runtime = {"address": "libasan.so", "thread": "libtsan.so"}[sanitizer]
        done = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True)
        # Python is not instrumented, so that the runtime has to be there before it.
        environment |= {
            "LD_PRELOAD": done.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "exitcode=66",
        }
    return in_a_new_process(["-m", "simt.probe", *libraries], timeout=900, **environment)


def in_harness(build: Build, arguments: list[str], **environment: str) -> str:
    """pytest in a process where impl="cuda" runs on the CPU."""
    return in_a_new_process(
        [*arguments, "-p", "simt.plugin"],
        timeout=900,
        PYDISTILL_SIMT_LIBRARY=str(build.target("simt")),
        PYDISTILL_TEST_IMPL="cuda",
        **environment,
    )


def test_harness_reports_what_a_gpu_leaves_undefined(build: Build) -> None:
    build.target("simt_harness")
    build.run(str(build.folder / "tests" / "simt" / "simt_harness"))


# In one of the orders nothing fits into shared memory.
@pytest.mark.parametrize(("order", "shared"), [("forward", 232448), ("reverse", 2048), ("random", 232448)])
def test_numerics(build: Build, order: str, shared: int) -> None:
    """The numerics tests of all implementations, with the same tolerances."""
    report = in_harness(
        build,
        [*numerics_of("test_soft_target.py"), "-k", "not " + " and not ".join(IN_FP64)],
        PYDISTILL_SIMT_ORDER=order,
        PYDISTILL_SIMT_SHARED=str(shared),
    )
    found = re.search(r"(\d+) passed", report)
    assert found is not None and int(found[1]) > 350, report


def test_what_only_cuda_does(build: Build) -> None:
    assert "passed" in in_harness(build, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "simt/soft_target.py"])


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_find_nothing(build: Build, sanitizer: str) -> None:
    library = build.target(f"simt_{sanitizer}")
    assert probe(f"pydistill_simt={library}", sanitizer=sanitizer) == "pydistill_simt fine\n"


def test_planted_bugs_are_caught(build: Build) -> None:
    build.target("simt_planted")
    libraries = {name: f"pydistill_{name}={build.folder}/tests/simt/simt_{name}.so" for name in PLANTED}
    plain = [library for name, library in libraries.items() if PLANTED[name].caught_by == "probe"]
    report = probe(*plain)
    assert len(report.splitlines()) == len(plain)
    assert not re.findall(r"^\w+ fine$", report, flags=re.MULTILINE), report
    for name, library in libraries.items():
        sanitizer = PLANTED[name].caught_by
        if sanitizer != "probe":
            with pytest.raises(
                ChildError,
                match={"address": "Sanitizer|runtime error", "thread": "ThreadSanitizer: data race"}[sanitizer],
            ):
                probe(library, sanitizer=sanitizer)
