# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what it counts, what it refuses, what it leaves behind."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch
from cases import IMPLEMENTATIONS
from processes import in_a_new_process

from pydistill import _dispatch
from pydistill.bench import (
    attention_relation,
    compare,
    liger,
    linear_soft_target,
    machine,
    main,
    measure,
    projected_mse,
    rows,
    soft_target,
)
from pydistill.losses import attention_relation as relation_module
from pydistill.losses import linear_soft_target as linear_module
from pydistill.losses import projected_mse as projection_module
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
FAST_RELATION = [*("attention_relation", "--dtypes", "fp32", "--quick", "--budget", "0.2", "--threads", "1")]
HERE = attention_relation.providers_here()


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
    assert set(measured) == set(soft_target.PROVIDERS) - {"liger"}
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
    """Every digit too: 0.17349999 is 0.173 in a table, and would be 0.174 after six digits in the file."""
    written = [
        example_row(median_ms=0.17349999, p20_ms=1 / 7),
        example_row(provider="limit", extra_mib=None, value_error=None, vs_eager=None),
    ]
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
        (["attention_relation", "--sizes", "32x12x128"], "expected BATCHxHEADSxPOSITIONSxTEACHERxSTUDENT"),
        (["soft_target", "--providers", "liger"], "'liger' needs --device cuda, and the package liger-kernel"),
        (["attention_relation", "--providers", "ours in place"], "got 'ours in place'"),
        (["attention_relation", "--workloads", "kl"], "expected some of qk,vv,qk padded, got 'kl'"),
        (["projected_mse", "--sizes", "4096x48"], "expected ROWSxSTUDENTxTEACHER"),
        (["projected_mse", "--workloads", "left"], "expected some of up,down, got 'left'"),
        (["no_such_loss"], "invalid choice: 'no_such_loss'"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_limits_need_the_compiled_extension(monkeypatch, capsys):
    monkeypatch.setattr(_dispatch, "native", None)
    assert attention_relation.providers_here() == ["eager", "compile", "ours", "ours as cross"]
    with pytest.raises(SystemExit):
        main(["attention_relation", "--providers", "ours,limit"])
    assert "provider 'limit' needs the compiled extension" in capsys.readouterr().err


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


def relation_row(**changes) -> rows.Row:
    size = {"loss": "attention_relation", "workload": "qk", "shape": "8x12x512x64x32", "megabytes": None}
    rates = {"gb_per_s": None, "gigaflop": 8.05, "gflop_per_s": 170.0, "percent_of_exponentials": 10.0}
    return example_row(**{**size, **rates, "provider": "ours", "percent_of_limit": 81.0, "vs_eager": 13.0, **changes})


def test_a_run_of_a_relation_leaves_csv_markdown_and_picture(tmp_path, capsys):
    """Relations across and self, padded and not, in bf16 too, and relation heads that come out of twelve."""
    providers = [name for name in HERE if name != "compile"]
    arguments = [*FAST_RELATION, "--dtypes", "fp32,bf16", "--sizes", "3x24x10x4x2", "--providers", ",".join(providers)]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    line, measured = rows.read_csv(tmp_path / "attention_relation.csv")
    assert line in printed
    across = [name for name in providers if name != "ours as cross"]
    assert [(row.workload, row.provider) for row in measured] == [
        *(("qk", name) for name in across),
        *(("vv", name) for name in providers),
        *(("qk padded", name) for name in across),
    ] * 2
    for row in measured:
        assert row.shape == "3x24x10x4x2"
        assert row.megabytes is None
        if row.provider in compare.LIMITS:
            assert row.value_error is row.vs_eager is None
        elif row.provider.startswith("ours"):
            assert row.value_error < 2e-6
            assert row.gradient_error < (2e-6 if row.dtype == "fp32" else 4e-3)
            assert row.gflop_per_s == pytest.approx(row.gigaflop / row.median_ms * 1e3, rel=1e-4)
    assert (tmp_path / "attention_relation.png").read_bytes().startswith(b"\x89PNG")
    assert "| GFLOP/s | % limit | % exp |" in (tmp_path / "attention_relation.md").read_text()
    assert max(map(len, printed.split("targets")[0].splitlines()[2:-1])) <= 130
    again = tmp_path / "again"
    assert (
        main(["attention_relation", "--from-csv", str(tmp_path / "attention_relation.csv"), "--out", str(again)]) == 0
    )
    assert (again / "attention_relation.md").read_text() == (tmp_path / "attention_relation.md").read_text()


@needs_kernel
def test_a_relation_by_all_providers_and_its_memory(tmp_path):
    """The eager loss keeps five matrices of 16 MiB, compiled three, ours the gradient and its tiles.

    In one heap the holes between such blocks would count, up to six matrices of them: each gets a mapping of its own.
    """
    arguments = [*FAST_RELATION, "--sizes", "1x4x1024x32x16", "--workloads", "vv", "--out", str(tmp_path)]
    in_a_new_process(["-m", "pydistill.cli", "bench", *arguments], MALLOC_MMAP_THRESHOLD_=str(1 << 20))
    measured = {row.provider: row for row in rows.read_csv(tmp_path / "attention_relation.csv")[1]}
    assert list(measured) == list(attention_relation.PROVIDERS)
    assert max(measured[name].gradient_error for name in ("eager", "compile", "ours", "ours as cross")) < 3e-6
    for name, matrices in attention_relation.MATRICES.items():
        assert measured[name].extra_mib == pytest.approx(matrices * 16, abs=3)
    assert measured["ours"].extra_mib < 3
    assert measured["ours"].vs_compile == pytest.approx(
        measured["compile"].median_ms / measured["ours"].median_ms, rel=1e-3
    )
    assert measured["ours"].percent_of_exponentials == pytest.approx(
        100 * measured["exponentials"].median_ms / measured["ours"].median_ms, rel=1e-3
    )


def test_a_red_gate_reports_no_time_of_a_relation(tmp_path, monkeypatch, capsys):
    right = relation_module.attention_relation_loss
    for wrong in (
        lambda *args, **more: right(*args, **more) * 1.001,
        lambda a, *rest, **more: right(a, *rest, **more) + 1e-5 * (a - a.detach()).sum(),
    ):
        monkeypatch.setattr(relation_module, "attention_relation_loss", wrong)
        arguments = [*FAST_RELATION, "--sizes", "2x2x10x4x2", "--providers", "eager,ours", "--out", str(tmp_path)]
        assert main(arguments) == 1
        captured = capsys.readouterr()
        assert "the correctness gate is red" in captured.err
        assert "median ms" not in captured.out
    assert not (tmp_path / "attention_relation.csv").exists()


def test_operations_by_formula():
    """2 B A N^2 (dt + 3 ds); half of it for a self relation; of padded sequences their own n^2."""
    size = (4, 3, 10, 8, 5)
    full = 2 * 4 * 3 * 100 * (8 + 3 * 5)
    across = attention_relation.Problem.random(size, torch.bfloat16, "qk")
    assert across.operations() == full
    assert across.pairs() == 4 * 3 * 100
    assert across.operations(pairs_of_bf16=True) == full - 4 * 3 * 100 * (8 + 5)
    assert attention_relation.Problem.random(size, torch.float32, "vv").operations() == full // 2
    padded = attention_relation.Problem.random(size, torch.float32, "qk padded")
    lengths = padded.mask.sum(-1).tolist()
    assert sorted(lengths) == [1, 4, 6, 9]
    assert padded.pairs() == 3 * sum(length**2 for length in lengths)
    split = attention_relation.Problem.random((4, 48, 10, 16, 8), torch.float32, "qk")
    assert (split.student_a.shape, split.teacher_a.shape) == ((4, 12, 10, 32), (4, 12, 10, 64))
    assert split.operations() == 2 * 4 * 48 * 100 * (16 + 3 * 8)


@pytest.mark.parametrize("workload", attention_relation.WORKLOADS)
@pytest.mark.parametrize("size", [(3, 2, 9, 6, 4), (3, 24, 9, 4, 2)])
def test_plain_relation_is_the_reference(workload, size):
    problem = attention_relation.Problem.random(size, torch.float32, workload)
    expected = relation_module.attention_relation_reference(
        *problem.arguments, mask=problem.mask, relation_heads=problem.relation_heads
    )
    plain = attention_relation.plain_loss(*problem.arguments, problem.mask, problem.relation_heads)
    torch.testing.assert_close(plain, expected)


def test_the_gate_takes_a_part(monkeypatch):
    """Tokens first, then heads (with the relation heads that come out of them), then sequences."""
    monkeypatch.setattr(attention_relation, "GATE_PAIRS", 400)
    for size, batch, heads, positions, relation_heads in [
        ((5, 2, 10, 4, 2), 2, 2, 10, None),
        ((5, 24, 10, 4, 2), 1, 2, 10, 4),
        ((5, 3, 50, 4, 2), 1, 1, 20, None),
    ]:
        part = attention_relation.Problem.random(size, torch.float32, "qk padded").part()
        assert part.student_a.shape[:3] == (batch, heads, positions)
        assert part.relation_heads == relation_heads
        assert part.mask.shape == (batch, positions)


def test_what_needs_too_much_memory_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(attention_relation, "MEMORY_LIMIT", 4 * 2 * 3 * 64 * 4)  # between 3 and 5 matrices
    found = attention_relation.workloads((2, 3, 8, 4, 2), torch.float32, ["qk"], ["eager", "ours"])
    assert list(found[0].variants) == (["ours"] if "cpp" in IMPLEMENTATIONS else [])
    assert "2x3x8x4x2 torch.float32: without eager" in capsys.readouterr().err


def test_sizes_of_the_documentation():
    chosen = attention_relation.cases(None, list(attention_relation.WORKLOADS), quick=False)
    assert chosen[0] == ((32, 12, 128, 64, 32), ["qk", "vv", "qk padded"])
    assert chosen[3] == ((32, 48, 128, 16, 8), ["qk", "vv"])
    assert chosen[-2:] == [((1, 1, 2048, 64, 32), ["qk"]), ((1, 12, 16384, 64, 32), ["qk"])]
    assert [size for size, _ in attention_relation.cases(None, ["qk padded"], quick=False)] == [(32, 12, 128, 64, 32)]
    assert attention_relation.cases([(1, 2, 3, 4, 5)], ["vv"], quick=True) == [((1, 2, 3, 4, 5), ["vv"])]


@needs_kernel
def test_limits_count_what_they_do():
    for loop in (_dispatch.native.multiply_add, _dispatch.native.exponentials):
        assert loop(1000) == 1000 * loop(1)
    start = time.perf_counter()
    _dispatch.native.exponentials(1_000_000)
    assert time.perf_counter() - start > 1e-3  # 16 million or more: the compiler must not have seen through it


def test_targets_of_a_relation():
    def judged(*given: rows.Row) -> dict[str, bool]:
        return {target.text.split("2T, ")[-1]: target.met for target in attention_relation.targets(given)}

    row = relation_row(vs_compile=4.2)
    assert judged(row) == {"times eager": True, "times compile": False, "% of limit": True}
    assert "% of limit" not in judged(dataclasses.replace(row, dtype="bf16"))
    own = dataclasses.replace(row, workload="vv")
    assert judged(own) == {}
    assert judged(own, dataclasses.replace(own, provider="ours as cross", median_ms=65.0)) == {"times as cross": True}
    assert judged(own, dataclasses.replace(own, provider="ours as cross", median_ms=63.0)) == {"times as cross": False}
    for milliseconds, met in ((21.0, True), (22.0, False)):
        padded = dataclasses.replace(row, workload="qk padded", gigaflop=8.05 / 3, median_ms=milliseconds)
        assert judged(row, padded)["share of the time without padding (0.33 of the work)"] is met
    assert judged(relation_row(shape="1x1x2048x64x32", percent_of_limit=55.0)) == {"% of limit": False}


# -------------------------------------------------------------------------------- projected_mse


def test_bench_of_projected_mse(tmp_path, capsys):
    arguments = ["projected_mse", "--dtypes", "fp32", "--quick", "--budget", "0.2", "--threads", "1"]
    assert main([*arguments, "--sizes", "40x12x33", "--providers", "eager,ours", "--out", str(tmp_path)]) == 0
    measured = rows.read_csv(tmp_path / "projected_mse.csv")[1]
    assert [(row.workload, row.provider) for row in measured] == [
        (workload, provider) for workload in ("up", "down") for provider in ("eager", "ours")
    ]
    assert [row.gigaflop for row in measured[::2]] == [6 * 40 * 12 * 33 / 1e9, 4 * 40 * 12 * 33 / 1e9]
    assert all(row.gradient_error < 1e-5 for row in measured)
    assert "projected_mse down, fp32 (40, 12, 33), 1 thread" in capsys.readouterr().out


def test_gate_of_projected_mse(monkeypatch, tmp_path, capsys):
    """A kernel that is wrong is not timed."""
    right = projection_module.projected_mse_loss
    monkeypatch.setattr(projection_module, "projected_mse_loss", lambda *given, **how: 1.001 * right(*given, **how))
    arguments = ["projected_mse", "--dtypes", "fp32", "--quick", "--budget", "0.2", "--sizes", "40x12x33"]
    assert main([*arguments, "--providers", "ours", "--out", str(tmp_path)]) == 1
    assert "the correctness gate is red" in capsys.readouterr().err


def test_operations_of_projected_mse():
    """6 R ds dt up, 4 down; a projection of bf16 pairs counts half."""
    for workload, products in (("up", 6), ("down", 4)):
        problem = projected_mse.Problem.random((10, 3, 7), torch.bfloat16, workload)
        assert problem.operations() == products * 10 * 3 * 7
        assert problem.operations(pairs_of_bf16=True) == (products - 1) * 10 * 3 * 7
        part = problem.part(torch.float64)
        arguments = (part.student, part.teacher, part.projection)
        plain = projected_mse.plain_loss(*arguments, part.up)
        torch.testing.assert_close(plain, projection_module.projected_mse_reference(*arguments))


def test_sizes_of_projected_mse():
    chosen = projected_mse.cases(None, ["up", "down"], quick=False)
    assert chosen[0] == ((4096, 48, 768), ["up", "down"])
    assert len(chosen) == 4 + 13 and chosen[-1] == ((4096, 384, 1024), ["up"])
    assert [names for _, names in projected_mse.cases(None, ["down"], quick=False)] == [["down"]] * 4
    assert projected_mse.cases([(1, 2, 3)], ["down"], quick=True) == [((1, 2, 3), ["down"])]


def test_targets_of_projected_mse():
    def judged(**changes: object) -> dict[str, bool]:
        size = {"loss": "projected_mse", "workload": "up", "shape": "4096x384x768", "provider": "ours"}
        row = example_row(**{**size, "gigaflop": 7.25, "extra_mib": 15.0, **changes})
        return {target.text.split("2T, ")[-1]: target.met for target in projected_mse.targets([row])}

    found = judged(vs_eager=1.7, vs_compile=1.3, percent_of_limit=86.0)
    assert found == {"times eager": True, "times compile": False, "% of limit": True, "extra MiB": True}
    assert judged(extra_mib=100.0)["extra MiB"] is False
    large = judged(shape="65536x384x768", workload="down", dtype="bf16", vs_compile=0.9)
    assert large == {"times compile": False, "extra MiB": True}
    assert judged(shape="4096x312x1024", percent_of_limit=60.0) == {"% of limit": False}
    assert judged(provider="eager") == {}


# -------------------------------------------------------------------------------- linear_soft_target


def test_bench_of_linear_soft_target(tmp_path, capsys):
    arguments = ["linear_soft_target", "--dtypes", "fp32,bf16", "--quick", "--budget", "0.2", "--threads", "1"]
    assert main([*arguments, "--sizes", "40x12x33x70", "--providers", "eager,ours", "--out", str(tmp_path)]) == 0
    measured = rows.read_csv(tmp_path / "linear_soft_target.csv")[1]
    assert [(row.dtype, row.provider) for row in measured] == [
        (dtype, provider) for dtype in ("fp32", "bf16") for provider in ("eager", "ours")
    ]
    assert measured[0].gigaflop == 2 * 40 * 70 * (3 * 12 + 33) / 1e9
    assert all(row.gradient_error < 1e-5 for row in measured[:2])
    assert "linear_soft_target kl, fp32 (40, 12, 33, 70), 1 thread" in capsys.readouterr().out


def test_gate_of_linear_soft_target(monkeypatch, tmp_path, capsys):
    """A loss that is wrong is not timed."""
    right = linear_module.linear_soft_target_loss
    monkeypatch.setattr(linear_module, "linear_soft_target_loss", lambda *given, **how: 1.001 * right(*given, **how))
    arguments = ["linear_soft_target", "--dtypes", "fp32", "--quick", "--budget", "0.2", "--sizes", "40x12x33x70"]
    assert main([*arguments, "--providers", "ours", "--out", str(tmp_path)]) == 1
    assert "the correctness gate is red" in capsys.readouterr().err


def test_plain_linear_loss_is_the_reference():
    problem = linear_soft_target.Problem.random((10, 3, 7, 40), torch.float32)
    expected = linear_module.linear_soft_target_reference(
        *problem.arguments, temperature=linear_soft_target.TEMPERATURE
    )
    torch.testing.assert_close(linear_soft_target.plain_loss(*problem.arguments), expected)


def test_targets_of_linear_soft_target():
    def judged(**changes: object) -> dict[str, bool]:
        size = {"loss": "linear_soft_target", "workload": "kl", "shape": "1024x384x768x30522", "provider": "ours"}
        row = example_row(**{**size, "gigaflop": 120.0, "extra_mib": 105.0, **changes})
        return {target.text.split("2T, ")[-1]: target.met for target in linear_soft_target.targets([row])}

    found = judged(vs_eager=1.7, vs_compile=0.9, percent_of_limit=86.0)
    assert found == {"times eager": True, "times compile": False, "% of limit": True, "extra MiB": True}
    assert judged(extra_mib=130.0)["extra MiB"] is False
    assert judged(provider="eager") == {}


def test_providers_on_a_gpu(monkeypatch):
    """Liger's kernels are measured beside ours, where they are installed."""
    for installed in (True, False):
        monkeypatch.setattr(liger, "find_spec", lambda name, found=installed: object() if found else None)
        assert ("liger" in linear_soft_target.providers_here(torch.device("cuda"))) is installed
        assert "liger" not in linear_soft_target.providers_here() + soft_target.providers_here()


def test_liger_computes_the_same():
    """In Triton's interpreter, where liger-kernel is installed; it is no requirement."""
    pytest.importorskip("liger_kernel")
    pytest.importorskip("triton")
    code = """
import torch
from pydistill.bench.linear_soft_target import Problem, plain_loss, provider_call
problem = Problem.random((6, 8, 12, 50), torch.float32)
found = [provider_call(provider, problem, plain_loss)() for provider in ("eager", "liger")]
torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
print("the same")
"""
    assert in_a_new_process(["-c", code], TRITON_INTERPRET="1").endswith("the same\n")
