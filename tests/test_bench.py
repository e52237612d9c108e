# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what it counts, what it refuses, what it leaves behind."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from cases import IMPLEMENTATIONS

from pydistill.bench import machine, main, measure, rows, soft_target
from pydistill.losses import soft_target as loss_module

needs_kernel = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="PYDISTILL_NATIVE=0: no compiled kernel")
FAST = [
    "soft_target",
    "--sizes",
    "8x40,16x3",
    "--dtypes",
    "fp32",
    "--quick",
    "--budget",
    "0.2",
    "--threads",
    "1",
]
NOT_COMPILED = ["--providers", "eager,ours,limit"]


def example_row(**changes) -> rows.Row:
    row = rows.Row(
        loss="soft_target", workload="kl", shape="4096x30522", dtype="fp32", threads=2, thp_alloc=0,
        provider="ours in place", median_ms=40.0, p20_ms=39.0, p80_ms=44.5, min_ms=38.0, samples=7, clean=7,
        extra_mib=0.0, value_error=1e-8, gradient_error=2.5e-7, megabytes=1500.2, gb_per_s=37.5,
        percent_of_limit=78.0, vs_eager=89.0, vs_compile=None,
    )  # fmt: skip
    return dataclasses.replace(row, **changes)


def test_a_run_leaves_csv_markdown_and_picture(tmp_path, capsys):
    assert main([*FAST, *NOT_COMPILED, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    line, measured = rows.read_csv(tmp_path / "soft_target.csv")
    for key in ("cpu ", "cores ", "torch ", "pydistill ", "commit ", "thp "):
        assert key in line
    assert line in printed
    assert {row.problem[1:3] for row in measured} == {
        (workload, shape) for workload in ("kl", "kl+ce") for shape in ("8x40", "16x3")
    }
    assert [row.provider for row in measured[:3]] == ["eager", "ours", "limit"]
    for row in measured:
        assert 0 < row.min_ms <= row.median_ms
        assert row.p20_ms <= row.median_ms <= row.p80_ms
        assert row.samples >= 3
        if row.provider != "limit":
            assert row.value_error < 1e-6
            assert row.gradient_error < 1e-6
    assert (tmp_path / "soft_target.png").read_bytes().startswith(b"\x89PNG")
    assert line in (tmp_path / "soft_target.md").read_text()
    assert max(map(len, printed.split("targets")[0].splitlines()[2:-1])) <= 112
    again = tmp_path / "again"
    assert main(["soft_target", "--from-csv", str(tmp_path / "soft_target.csv"), "--out", str(again)]) == 0
    assert (again / "soft_target.md").read_text() == (tmp_path / "soft_target.md").read_text()


@needs_kernel
def test_all_providers_agree_and_in_place_takes_no_memory(tmp_path):
    """torch.compile and in place too, on a problem whose gradient (4 MiB) is visible in the resident size."""
    arguments = [
        "soft_target",
        "--sizes",
        "128x8192",
        "--dtypes",
        "fp32",
        "--workloads",
        "kl",
        "--quick",
        "--budget",
        "1",
    ]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    measured = {row.provider: row for row in rows.read_csv(tmp_path / "soft_target.csv")[1]}
    assert set(measured) == set(soft_target.PROVIDERS)
    assert measured["ours in place"].extra_mib < 1
    assert 3.5 < measured["ours"].extra_mib < 6
    assert measured["eager"].extra_mib > 12
    assert measured["ours"].vs_eager == pytest.approx(
        measured["eager"].median_ms / measured["ours"].median_ms, rel=1e-3
    )


def test_a_red_gate_reports_no_time(tmp_path, monkeypatch, capsys):
    """A loss that is wrong by one part in a thousand, or whose gradient is, must not get a line in the
    table."""
    right = loss_module.soft_target_loss
    for wrong in (
        lambda student, *rest, **more: right(student, *rest, **more) * 1.001,
        lambda student, *rest, **more: right(student * 1.0, *rest, **more) + 1e-3 * (student - student.detach()).sum(),
    ):
        monkeypatch.setattr(loss_module, "soft_target_loss", wrong)
        assert main([*FAST, *NOT_COMPILED, "--out", str(tmp_path)]) == 1
        captured = capsys.readouterr()
        assert "the correctness gate is red" in captured.err
        assert "median ms" not in captured.out
    assert not (tmp_path / "soft_target.csv").exists()


def test_bytes_by_formula():
    """Two reads and one write of 10 x 7 bf16 numbers; labels are 8 bytes a row."""
    problem = soft_target.Problem.random(10, 7, torch.bfloat16)
    assert problem.bytes_to_move(hard_weight=0.0) == 3 * 10 * 7 * 2
    assert problem.bytes_to_move(hard_weight=0.5) == 3 * 10 * 7 * 2 + 8 * 10


def test_plain_loss_is_the_reference():
    """The eager provider computes the same thing, or the ratios would mean nothing."""
    problem = soft_target.Problem.random(12, 30, torch.float32)
    for hard_weight, labels in ((0.0, None), (0.5, problem.labels)):
        plain = soft_target.plain_loss(problem.student, problem.teacher, labels, hard_weight)
        expected = loss_module.soft_target_reference(
            problem.student,
            problem.teacher,
            labels,
            temperature=soft_target.TEMPERATURE,
            hard_weight=hard_weight,
        )
        torch.testing.assert_close(plain, expected)


def test_extra_peak_memory():
    """32 MiB alive for a moment and 16 MiB in the result; a repetition measures the same, not 0."""
    mib = 1 << 18  # floats

    def call() -> torch.Tensor:
        passing = torch.ones(32 * mib)
        return passing[: 16 * mib].clone()

    for _ in range(2):
        found = measure.extra_peak_mib(measure.Variant(call))
        if found is None:
            pytest.skip("/proc/self/clear_refs is not writable here")
        assert 46 < found < 56
    kept = torch.ones(32 * mib)
    assert measure.extra_peak_mib(measure.Variant(kept.sum)) < 4


def test_preparation_is_not_timed():
    order: list[str] = []
    variant = measure.Variant(lambda: order.append("call"), lambda: (order.append("prepare"), time.sleep(0.02))[0])
    assert variant.run() < 0.015
    assert order == ["prepare", "call"]


def test_interleaving_changes_the_neighbour():
    """Every variant is sampled equally often, and each gets to go first."""
    calls: list[str] = []
    variants = {name: measure.Variant(lambda name=name: calls.append(name)) for name in "abc"}
    timings = measure.interleave(variants, repetitions=3, budget_seconds=0.0, sample_seconds=0.0)
    assert calls[:6] == list("aabbcc")
    assert calls[6:15] == list("abcbcacab")
    assert {len(timing.clean + timing.disturbed) for timing in timings.values()} == {len(calls[6:]) // 3}


def test_disturbed_samples():
    """Up to 8 % of the machine may go elsewhere, plus one tick of the kernel's clock."""
    assert not measure.is_disturbed(0.0, 1.0, cores=2, tolerance=0.08)
    assert not measure.is_disturbed(0.16, 1.0, cores=2, tolerance=0.08)
    assert measure.is_disturbed(0.20, 1.0, cores=2, tolerance=0.08)
    assert not measure.is_disturbed(0.01, 0.01, cores=2, tolerance=0.08)
    assert measure.is_disturbed(1.0, 1.0, cores=2, tolerance=0.08)


def test_statistics_prefer_clean_samples():
    timing = measure.Timing(clean=[1.0, 2.0, 3.0], disturbed=[9.0, 0.5])
    assert (timing.median, timing.best, timing.is_clean) == (2.0, 0.5, True)
    assert timing.percentile(20) == pytest.approx(1.4)
    few = measure.Timing(clean=[1.0, 2.0], disturbed=[9.0, 8.0, 7.0])
    assert (few.median, few.is_clean) == (7.0, False)
    assert "40.0!" in rows.cells(example_row(clean=2))
    assert "40.0" in rows.cells(example_row(clean=3))


def test_csv_keeps_every_value(tmp_path):
    written = [example_row(), example_row(provider="limit", extra_mib=None, value_error=None, vs_eager=None)]
    rows.write_csv(tmp_path / "x.csv", "cpu some | torch 2", written)
    assert rows.read_csv(tmp_path / "x.csv") == ("cpu some | torch 2", written)
    (tmp_path / "y.csv").write_text("loss,workload\n")
    with pytest.raises(ValueError, match="first line must be '# <machine>'"):
        rows.read_csv(tmp_path / "y.csv")


def test_targets_judge_what_they_promise():
    def judged(*given: rows.Row) -> dict[str, bool]:
        return {
            target.text.split(" ours in place")[1].lstrip(", "): target.met for target in soft_target.targets(given)
        }

    row = example_row(vs_compile=11.0)
    assert judged(row) == {"times eager": True, "times compile": False, "% of limit": False}
    assert judged(dataclasses.replace(row, threads=1)) == {"times eager": True, "times compile": False}
    small = example_row(shape="65536x3", threads=1, median_ms=0.51)
    assert judged(small) == {"ms": False}
    assert judged(dataclasses.replace(small, median_ms=0.49)) == {"ms": True}
    hard = example_row(workload="kl+ce", median_ms=45.0)
    assert judged(row, hard)["times KL alone"] is True
    assert judged(row, dataclasses.replace(hard, median_ms=47.0))["times KL alone"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["soft_target", "--sizes", "4096"], "expected ROWSxCLASSES"),
        (["soft_target", "--sizes", "0x5"], "expected ROWSxCLASSES"),
        (["soft_target", "--dtypes", "fp32,int8"], "expected some of fp32,bf16,fp16, got 'int8'"),
        (["soft_target", "--threads", "0"], "expected a positive whole number, got '0'"),
        (["soft_target", "--providers", "theirs"], "got 'theirs'"),
        (["no_such_loss"], "invalid choice: 'no_such_loss'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_machine_line(tmp_path):
    fields = machine.describe()
    assert fields["torch"] == torch.__version__
    assert machine.commit(tmp_path) == "none"
    assert machine.line({"a": "1", "b": "2"}) == "a 1 | b 2"


def test_in_a_process_with_huge_pages(tmp_path):
    """--thp adds the rows of a second process that runs with THP_MEM_ALLOC_ENABLE=1."""
    arguments = [
        "soft_target",
        "--sizes",
        "8x40",
        "--dtypes",
        "bf16",
        "--workloads",
        "kl",
        "--quick",
        "--budget",
        "0.2",
        "--thp",
    ]
    assert main([*arguments, *NOT_COMPILED, "--out", str(tmp_path)]) == 0
    measured = rows.read_csv(tmp_path / "soft_target.csv")[1]
    assert [(row.thp_alloc, row.provider) for row in measured] == [
        (thp, provider) for thp in (0, 1) for provider in ("eager", "ours", "limit")
    ]
