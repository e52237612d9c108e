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


class Planted(NamedTuple):
    """A bug to plant: one line of a source, by what it is replaced, and the op and the library that show it."""

    file: str
    line: str
    replacement: str
    flavour: str = "plain"  # or "address", "thread": only a sanitizer sees it for sure
    op: str = "soft_target"


PLANTED = {
    "dropped_barrier": Planted("team.cuh", "  __syncthreads();\n", ""),
    "dropped_warp_barrier": Planted("team.cuh", "    __syncwarp(team.lanes);\n", "", "thread"),
    "slots_used_again": Planted("soft_target.cuh", "slots + 2 * warp_size", "slots", "thread"),
    "lost_neighbour": Planted("team.cuh", "step > 0; step /= 2", "step > 1; step /= 2"),
    "lost_warps": Planted("team.cuh", "lane < team.size / warp_size", "lane < 1"),
    "over_read": Planted("team.cuh", "const int single = pieces.size -", "const int single = 1 + pieces.size -"),
    "unaligned_load": Planted("device.cuh", "if (aligned) return load", "return load", "address"),
    "short_of_shared": Planted("soft_target.cuh", "2 * vector_bytes - 1", "vector_bytes - 1", "address"),
    "ignored_mask": Planted("soft_target.cuh", "(mask == nullptr || mask[r]) && ", ""),
    "teacher_not_moved": Planted("soft_target.cuh", "    teacher *= factor_teacher;\n", ""),
    "wrong_label": Planted("soft_target.cuh", "if (i + k == label) g[k]", "if (i + k == label + 1) g[k]"),
    "hidden_nan": Planted("soft_target.cuh", "return x < 0 ? 0.0f : x;", "return fmaxf(x, 0.0f);"),
    "shared_not_asked_for": Planted("launch.cuh", "if (shared > without_asking)", "if (false)"),
    "block_of_two_teams": Planted("soft_target.cu", "a.team > warp_size ?", "a.team > narrow_block ?"),
}  # fmt: skip


# Of attention_relation: what is replaced by what in which file, and the library that shows it.
PLANTED_RELATION = {
    "copies_not_waited_for": (
        "    wait_for_copies();\n    __syncthreads();\n    fetch_others(start +",
        "    fetch_others(start +",
        "attention_relation.cuh",
    ),
    "barrier_before_others": (
        "    __syncthreads();\n    fetch_others(start +", "    fetch_others(start +", "attention_relation.cuh", "thread"
    ),
    "one_turn": ("return step_of(start) % 2;", "return 0;", "attention_relation.cuh"),
    "two_turns_of_ids": ("step_of(start) % 3", "step_of(start) % 2", "attention_relation.cuh"),
    "chunk_overwritten": ("columns);\n      __syncthreads();", "columns);", "attention_relation.cuh", "thread"),
    "warp_barrier_of_store": ("  __syncwarp();\n  constexpr", "  constexpr", "attention_relation.cuh"),
    "rest_left_out": (
        "multiply_add<S>(c[m], rest, b[0], b[1]);", "", "matrix.cuh"
    ),
    "not_transposed": (
        "load_matrices<true>(b, from_y + n * 8 *", "load_matrices<false>(b, from_y + n * 8 *", "matrix.cuh"
    ),
    "difference_not_moved": (
        "(difference + (teacher > 0 ? teacher * moved : 0.0f))", "difference", "attention_relation.cuh"
    ),
    "sum_not_moved": ("    student *= kept_s;\n", "", "attention_relation.cuh"),
    "future_seen": ("|| (a.causal && sight.behind(n, i) > 0)) continue;", ") continue;", "attention_relation.cuh"),
    "rows_mixed_up": ("range.sequence[i / 2] == ids", "range.sequence[0] == ids", "attention_relation.cuh"),
    "padding_fetched": ("ids[row] < 0 ? 0 : max(", "max(", "attention_relation.cuh"),
    "stored_beyond": ("token >= a.positions || count <= 0", "count <= 0", "attention_relation.cuh", "address"),
    "vectors_for_all": ("v.vectors = !v.cut && ", "v.vectors = true || ", "attention_relation.cu", "address"),
    "keys_left_out": ("second : {false, true}", "second : {false}", "attention_relation.cu"),
}  # fmt: skip
PLANTED |= {
    name: Planted(file, line, replacement, *(flavour or ["plain"]), "attention_relation")
    for name, (line, replacement, file, *flavour) in PLANTED_RELATION.items()
}
# The same of projected_mse.
PLANTED_PROJECTION = {
    "tiles_overwritten": (
        "      wait_for_copies();\n      __syncthreads();\n      if (turns",
        "      wait_for_copies();\n      if (turns",
        "projected_mse.cuh",
        "thread",
    ),
    "copies_of_tiles_not_waited_for": (
        "      wait_for_copies();\n      __syncthreads();\n      if (turns", "      __syncthreads();\n      if (turns",
        "projected_mse.cuh",
    ),
    "one_buffer": ("fetch_source(step % 2, row_of", "fetch_source(0, row_of", "projected_mse.cuh"),
    "one_buffer_of_the_target": ("fetch_target(tile % 2, row_of", "fetch_target(0, row_of", "projected_mse.cuh"),
    "part_before_barrier": (
        "fetch_staying(which);\n        wait_for_copies();\n        __syncthreads();",
        "fetch_staying(which);\n        wait_for_copies();",
        "projected_mse.cuh",
    ),
    "own_part_not_last": ("return (part + 1 + turn) %", "return (part + turn) %", "projected_mse.cuh"),
    "differences_before_barrier": (
        "block.put_difference(y);\n    __syncthreads();", "block.put_difference(y);", "projected_mse.cuh"
    ),
    "differences_of_rows_before_barrier": (
        "block.put_difference(y);\n      __syncthreads();", "block.put_difference(y);", "projected_mse.cuh"
    ),
    "half_of_a_row": (
        "sums[k * tile_rows + threadIdx.x] += sums[(N + k) * tile_rows + threadIdx.x];", ";", "projected_mse.cuh"
    ),
    "invalid_rows_fetched": ("(mask == nullptr || mask[row + r])", "true", "projected_mse.cuh"),
    "columns_not_counted": ("columns - column - c))", "width))", "projected_mse.cuh", "address"),
    "bias_of_first_column": ("(a.bias)[c]", "(a.bias)[0]", "projected_mse.cuh"),
    "not_transposed_left": (
        "load_matrices<true>(a, from_x + k * pitch_x);\n#pragma unroll\n    for (int part",
        "load_matrices<false>(a, from_x + k * pitch_x);\n#pragma unroll\n    for (int part",
        "matrix.cuh",
    ),
    "rest_of_difference_left_out": (
        "split<T>(left, right, leading, remaining);", "split<T>(left, right, leading, remaining), remaining = 0;",
        "projected_mse.cuh",
    ),
    "one_group_of_bias": ("g < row_groups; ++g", "g < 1; ++g", "projected_mse.cuh"),
    "last_share_left_out": ("s < a.shares; ++s", "s < a.shares - 1; ++s", "projected_mse.cuh"),
    "gradient_beyond": ("row + r >= rows || count <= 0", "count <= 0", "projected_mse.cuh", "address"),
}  # fmt: skip
PLANTED |= {
    name: Planted(file, line, replacement, *(flavour or ["plain"]), "projected_mse")
    for name, (line, replacement, file, *flavour) in PLANTED_PROJECTION.items()
}
# The sanitizers need one type, and so do compilers in a hurry.
OTHER_TYPES = {
    "soft_target": r"launch_divergence<__\w+>\(p, a, stream\)",
    "attention_relation": r"launcher\.all<(float|__half)>\(\)",
    "projected_mse": (
        r"launch_all<\w+, \w+, \w+, (single|most)_features>\(p, w, stream\)"
        r"|launch_half<__half>\(p, w, features, stream\)"
    ),
}


def plant(name: str, bug: Planted, folder: Path) -> None:
    """A copy of csrc with the bug in it, for one type alone: fp32, or bf16 where tensor cores are used (of
    projected_mse, the variant that the probe's problems take)."""
    shutil.copytree(ROOT / "csrc", folder / name / "csrc")
    source = folder / name / "csrc" / "cuda" / bug.file
    text = source.read_text()
    assert text.count(bug.line) == 1, f"{name}: {bug.file} has changed"
    source.write_text(text.replace(bug.line, bug.replacement))
    launcher = folder / name / "csrc" / "cuda" / f"{bug.op}.cu"
    launcher.write_text(re.sub(OTHER_TYPES[bug.op], "cudaErrorInvalidValue", launcher.read_text()))
    (folder / name / "flavour").write_text(bug.flavour)
    (folder / name / "op").write_text(bug.op)


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


# A data race shows to ThreadSanitizer in any order.
ORDERS = {"plain": "forward,reverse,random", "address": "forward,random", "thread": "forward"}
REPORTS = {"address": "SUMMARY: AddressSanitizer|runtime error: ", "thread": "SUMMARY: ThreadSanitizer: data race"}


def probe(flavour: str, probed: str, *libraries: Path) -> str:
    """What tests/simt/probe.py prints; ChildError with a sanitizer's report."""
    environment = {"OMP_NUM_THREADS": "1", "PYDISTILL_NATIVE": "0"}
    if flavour != "plain":
        runtime = {"address": "libasan.so", "thread": "libtsan.so"}[flavour]
        done = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True)
        # Python itself is not instrumented: the runtime has to be there before it.
        environment["LD_PRELOAD"] = done.stdout.strip()
        environment |= {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "exitcode=66"}
    return in_a_new_process(
        ["-m", "simt.probe", ORDERS[flavour], probed, *map(str, libraries)], timeout=900, **environment
    )


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


# Long sequences take minutes where they are in half precision.
SELECTED = {"attention_relation": "not ((equality_is_zero or several_sweeps) and (bf16 or fp16))"}
FEWEST = {"soft_target": 350, "attention_relation": 180, "projected_mse": 130}


# In one of the orders nothing fits into shared memory.
@pytest.mark.parametrize(
    ("loss", "order", "shared"),
    [
        ("soft_target", "forward", 232448),
        ("soft_target", "reverse", 2048),
        ("soft_target", "random", 232448),
        ("attention_relation", "random", 232448),
        ("projected_mse", "reverse", 232448),
    ],
)
def test_numerics(build: Build, loss: str, order: str, shared: int) -> None:
    """The numerics tests of all implementations, with the same tolerances."""
    selected = ["-k", SELECTED[loss]] if loss in SELECTED else []
    report = in_harness(
        build,
        [*numerics_of(f"test_{loss}.py"), *selected],
        PYDISTILL_SIMT_ORDER=order,
        PYDISTILL_SIMT_SHARED=str(shared),
    )
    found = re.search(r"(\d+) passed", report)
    assert found is not None and int(found[1]) > FEWEST[loss], report


@pytest.mark.parametrize("loss", FEWEST)
def test_what_only_cuda_does(build: Build, loss: str) -> None:
    assert "passed" in in_harness(build, ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"simt/{loss}.py"])


@pytest.mark.parametrize("flavour", ["address", "thread"])
def test_sanitizers_find_nothing(build: Build, flavour: str) -> None:
    probed = ",".join([*FEWEST, "projected_mse_wide"])
    assert probe(flavour, probed, build.target(f"simt_{flavour}")) == f"simt_{flavour} fine\n"


@pytest.mark.parametrize("op", FEWEST)
def test_planted_bugs_are_caught(build: Build, op: str) -> None:
    build.target("simt_planted")
    by_flavour: dict[str, list[Path]] = {flavour: [] for flavour in ORDERS}
    for name, bug in PLANTED.items():
        if bug.op == op:
            by_flavour[bug.flavour].append(build.folder / "tests" / "simt" / f"simt_{name}.so")
    plain = by_flavour.pop("plain")
    report = probe("plain", op, *plain).splitlines()
    assert not [line for line in report if line.endswith(" fine")]
    assert len(report) == len(plain)
    for flavour, libraries in by_flavour.items():
        for library in libraries:
            with pytest.raises(ChildError, match=REPORTS[flavour]):
                probe(flavour, op, library)
