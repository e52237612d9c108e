# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and that every error of use is one message and status 2."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_task import make_teacher, sentences, write_table

from pydistill.cli import COMMANDS, main


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_table(folder / "train.tsv", ["sentence", "label"], sentences(120, seed=1))
    make_teacher(folder / "bert", labels=["bad", "good"])
    return folder


def run_words(folder: Path, *more: str) -> list[str]:
    """The words after ``pydistill run`` for the smallest run there is."""
    words = f"--data.train {folder}/train.tsv --data.dev {folder}/train.tsv --output {folder}/out"
    words += f" --teacher.model {folder}/bert"
    words += " --teacher.max_length 32 --arms distilled --student.hidden_size 4 --student.classifier_size 4"
    return ["bilstm", *words.split(), "--train.max_steps", "2", *more]


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.err.startswith("pydistill: ")
    return captured.err


def test_without_arguments_it_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 20
    assert all(f"pydistill {name}" in text for name in COMMANDS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([command, "--help"])
    except SystemExit as stop:
        status = stop.code
    assert status == 0
    assert f"pydistill {command}" in capsys.readouterr().out


def test_a_run_from_the_command_line_then_predict_and_report(
    shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = run_words(shared)
    # The untrained teacher's answers are no reason to refuse here: nothing better explains them.
    assert main(["run", *words]) == 0
    printed = capsys.readouterr().out
    assert f"report:  {shared}/out/report.html" in printed
    assert "student, distilled" in printed
    line = next(line for line in printed.splitlines() if line.startswith("try it:  pydistill predict "))
    student = line.split()[4]

    assert main(["predict", student, "a great film", "a dull plot"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("  ")[-1] for row in rows] == ["a great film", "a dull plot"]
    assert all(row.split()[0] in ("bad", "good") and "%" in row for row in rows)

    monkeypatch.setattr(sys, "stdin", io.StringIO("one film\n\nanother\n"))
    assert main(["predict", student]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

    (shared / "out" / "report.html").unlink()
    assert main(["report", f"{shared}/out"]) == 0
    assert (shared / "out" / "report.html").is_file()
    assert "student, distilled" in capsys.readouterr().out

    message = failure(capsys, "run", *words)
    assert "already holds a run; add --resume or --overwrite" in message
    assert "distilled-seed1" in failure(capsys, "predict", f"{shared}/out", "text")
    assert "two by two" in failure(capsys, "predict", student, "--pair", "one")
    assert "single texts" in failure(capsys, "predict", student, "--pair", "one", "two")
    assert main(["run", *words, "--resume"]) == 0
    assert "[students/distilled-seed1] kept from before" in capsys.readouterr().out


def test_plan_prints_and_writes_nothing(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *run_words(shared), "--output", str(tmp_path / "x")][:-2]) in (0, 2)
    capsys.readouterr()
    words = [word.replace(f"{shared}/out", f"{tmp_path}/x") for word in run_words(shared)]
    assert main(["plan", *words]) == 0
    assert "120 rows from" in capsys.readouterr().out
    assert not (tmp_path / "x").exists()


def test_keys_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--keys"]) == 0
    assert {"seeds", "teacher.fine_tune", "augment.p_mask"} <= set(capsys.readouterr().out.split())


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert names[:2] == ["bilstm", "bilstm-demo"]


def test_env_names_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and "soft_target" in text


def test_augment_writes_a_file(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "more.tsv"
    words = ["augment", f"{shared}/train.tsv", str(output), "--text-columns", "sentence", "--n-iter", "2"]
    assert main([*words, "--no-pos-replacement"]) == 0
    assert "written" in capsys.readouterr().out
    assert output.read_text().splitlines()[0] == "sentence\tsource"
    assert "output exists" in failure(capsys, *words, "--no-pos-replacement")
    assert main([*words, "--no-pos-replacement", "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["rnu"], "there is no command 'rnu'; did you mean run?"),
        (["run", "bilstn"], "did you mean bilstm?"),
        (["run", "--resume", "bilstm"], "the recipe or yaml file comes first"),
        (["run", "bilstm", "--resume", "--overwrite"], "exclude each other"),
        (["run", "bilstm", "--output", "x", "--data.train", "x", "--teacher.mdel", "x"], "did you mean teacher.model"),
        (["run", "bilstm", "stray"], "expected --key value, got 'stray'"),
        (["plan", "missing.yaml"], "is neither a recipe nor a yaml file"),
        (["predict", "nowhere", "text"], "nowhere: holds no model"),
        (["predict", "nowhere", "--max-length", "0"], "--max-length must be at least 1"),
        (["report", "nowhere"], "nowhere: holds no metrics.json"),
        (["augment", "missing.tsv", "out.tsv", "--text-columns", "a"], "no such file: missing.tsv"),
        (["augment", "a.tsv", "b.tsv", "--text-columns", "a", "--p-mask", "2"], "p_mask is a probability"),
    ],
)
def test_errors_of_use(words: list[str], rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rule in failure(capsys, *words)


def test_several_problems_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    message = failure(capsys, "run", "bilstm")
    assert message.startswith("pydistill: 3 problems\n  - ") and message.count("\n") == 4


def test_missing_demo_package_is_one_sentence_with_the_command(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bilstm", "--data.train", f"{shared}/train.tsv", "--output", str(tmp_path / "x"), "--teacher.model"]
    message = failure(capsys, "run", *words, "package:no_such_model/model", "--data.dev", "package:no_such_data/a.csv")
    assert message.endswith("; run: pip install --no-deps no-such-data no-such-model\n")
    assert "no_such_model for package:no_such_model/model" in message and len(message.splitlines()) == 1


def test_light_commands_do_not_import_transformers() -> None:
    code = "import sys; from pydistill.cli import main; main([]); main(['recipes']); main(['env'])"
    code += "; sys.exit('transformers' in sys.modules or 'datasets' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
