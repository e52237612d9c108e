# SPDX-License-Identifier: Apache-2.0
"""What stands ready for a machine with a GPU (tests/gpu), as far as it can be tried without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import check
from processes import in_a_new_process, numerics_of

from pydistill import _dispatch, bench
from pydistill.bench import gpu as bench_gpu
from pydistill.bench import machine, rows, soft_target

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: make gpu-check")
CHECK = Path(__file__).parent / "gpu" / "check.py"


@pytest.mark.slow
@pytest.mark.skipif(_dispatch.native is None, reason="the CPU kernels stand in for those of a GPU")
@pytest.mark.parametrize(
    ("loss", "tests"),
    [
        ("soft_target", "error_budget or all_rows or inplace"),
        ("linear_soft_target", "error_budget and fp32"),
        ("attention_relation", "golden or reductions"),
        ("projected_mse", "golden or reductions"),
    ],
)
def test_tests_reach_the_device(loss: str, tests: str) -> None:
    """The plugin takes every op to a device and back: here to the CPU, where the kernels are those of "cpp"."""
    printed = in_a_new_process(
        [*numerics_of(f"test_{loss}.py"), "-p", "gpu.plugin", "-k", tests],
        PYDISTILL_TEST_IMPL="cuda",
        PYDISTILL_TEST_DEVICE="cpu",
    )
    assert " passed" in printed and "failed" not in printed


@without_gpu
def test_check_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(CHECK), "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "this PyTorch sees no GPU" in done.stderr
    assert "soft_target: cuda" in done.stdout and not (tmp_path / "out").exists()


@without_gpu
def test_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["soft_target", "--device", "cuda"])
    assert "--device cuda: this PyTorch sees no GPU" in capsys.readouterr().err


def test_steps_are_those_of_every_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton has kernels and there are none in CUDA C++."""
    asked = set()

    def here(op: str, implementation: str, device: torch.device) -> _dispatch.Backend:
        asked.add(op)
        return _dispatch.Backend(implementation == "triton", "")

    monkeypatch.setattr(_dispatch, "_on_device", here)
    losses = ["soft_target", "linear_soft_target", "attention_relation", "projected_mse"]
    expected = [f"test {loss} triton" for loss in losses] + [f"bench {loss}" for loss in losses]
    assert [step.name for step in check.steps(tmp_path)] == expected
    assert asked == set(_dispatch.LOSSES)


def test_summary_of_steps() -> None:
    table = """
soft_target kl, bf16 (128, 30522), cuda, 23.4 MB to move
  provider    ms     p20 .. p80  clean  extra MiB  value err  grad err  GB/s  % limit  x eager  x compile
  eager     1.00   0.99 .. 1.01    3/3          -          -         -     1       12        -          -
  ours      0.10   0.09 .. 0.11    3/3          8      1e-07     2e-03   234       97     10.0        2.5
"""
    step = check.Step("bench soft_target", [], {}, 0.5)
    assert check.summary(step, table, 0) == "ours against eager / compile: 10.0x / 2.5x"
    assert check.summary(step, "", None) == "stopped, its time was over; no result"
    step = check.Step("test soft_target cuda", [], {}, 0.5)
    assert check.summary(step, "...\n1 failed, 350 passed, 4 skipped in 3.5s", 1) == "1 failed, 350 passed, 4 skipped"


def test_problems_move_to_a_device() -> None:
    problem = soft_target.Problem.random(4, 6, torch.bfloat16)
    assert bench_gpu.on(problem, torch.device("cpu")) is problem
    there = bench_gpu.on(problem, torch.device("meta"))
    assert there.student.device.type == there.labels.device.type == "meta"
    assert there.student.requires_grad and there.student.is_leaf and not there.teacher.requires_grad


def test_rows_tell_where_they_were_measured(tmp_path: Path) -> None:
    common = dict.fromkeys([field for field in rows.Row.__dataclass_fields__ if field != "device"])
    common |= {"loss": "soft_target", "workload": "kl", "shape": "4x6", "dtype": "bf16", "provider": "ours"}
    common |= dict.fromkeys(("threads", "thp_alloc", "samples", "clean"), 1)
    common |= dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "min_ms"), 1.0)
    written = [rows.Row(**common, device=device) for device in ("cpu", "cuda")]  # type: ignore[arg-type]
    rows.write_csv(tmp_path / "soft_target.csv", machine.line(machine.describe()), written)
    assert rows.read_csv(tmp_path / "soft_target.csv")[1] == written
    assert len(rows.by_problem(written)) == 2
    assert "1 thread," in rows.heading(written[0]) and "cuda," in rows.heading(written[1])
    # Files from before there was a device.
    text = (tmp_path / "soft_target.csv").read_text().replace(",device", "").replace(",cpu\n", "\n")
    (tmp_path / "old.csv").write_text(text.replace(",cuda\n", "\n"))
    assert {row.device for row in rows.read_csv(tmp_path / "old.csv")[1]} == {"cpu"}
