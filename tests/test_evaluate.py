# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning and scoring: what is learnt, resumed, written and refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up_task import GOOD, NEUTRAL, make_teacher, sentences, write_table
from transformers import AutoModel, AutoTokenizer

from pydistill import evaluate as module
from pydistill.cli import main
from pydistill.config import ConfigError, load_section
from pydistill.data.tasks import DataError
from pydistill.evaluate import EvaluateConfig, evaluate, table
from pydistill.plan import PlanError


def scored(count: int, seed: int) -> list[tuple[str, ...]]:
    """Pairs of sentences; the score is the number of good words in both."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        pair = [draw.choices(NEUTRAL + 3 * GOOD, k=4) for _ in range(2)]
        good = sum(word in GOOD for text in pair for word in text)
        rows.append((" ".join(pair[0]), " ".join(pair[1]), f"{good / 2:.1f}"))
    return rows


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base encoder without a head, a classification and a regression task, and the yaml that names them."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_teacher(folder / "whole")
    AutoModel.from_pretrained(folder / "whole").save_pretrained(folder / "encoder")
    AutoTokenizer.from_pretrained(folder / "whole").save_pretrained(folder / "encoder")
    write_table(folder / "mood.tsv", ["sentence", "label"], sentences(320, seed=1))
    write_table(folder / "score.tsv", ["first", "second", "score"], scored(400, seed=2))
    tasks = {
        "mood": {
            "data": {"train": str(folder / "mood.tsv"), "dev_rows": 80, "split": "last", "max_train_rows": 200},
            "metric": "matthews",
        },
        "goodness": {
            "data": {
                "train": str(folder / "score.tsv"),
                "text_columns": ["first", "second"],
                "label_column": "score",
                "dev_rows": 80,
            },
            "metric": "pearson_spearman",
            "train": {"num_train_epochs": 12},
        },
    }
    train = {"learning_rate": 3e-3, "num_train_epochs": 4, "per_device_train_batch_size": 16}
    (folder / "tasks.yaml").write_text(
        yaml.safe_dump({"tasks": tasks, "train": train, "max_length": 32}, sort_keys=False)
    )
    return folder


def load(folder: Path, output: Path, **more: Any) -> EvaluateConfig:
    keys = {"model": str(folder / "encoder"), "output": str(output), "seeds": [1, 2]}
    return load_section(
        EvaluateConfig, folder / "tasks.yaml", keys | {k.replace("__", "."): v for k, v in more.items()}
    )


def test_both_kinds_of_task_are_learnt_and_reported(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(shared / "tasks.yaml"), "--model", str(shared / "encoder"), "--seeds", "1", "2"]
    assert main([*words, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "metrics.json").read_text())
    (model,) = results["models"]
    mood, goodness = model["tasks"]["mood"], model["tasks"]["goodness"]
    assert mood["mean"] > 0.9 and goodness["mean"] > 0.8
    assert mood["rows"] == {"train": 200, "dev": 80} and [run["seed"] for run in mood["runs"]] == [1, 2]
    assert set(goodness["runs"][0]["numbers"]) == {"pearson", "spearman", "pearson_spearman"}
    assert model["average"] == pytest.approx((mood["mean"] + goodness["mean"]) / 2)
    printed = capsys.readouterr().out
    header, _, row = printed.split("\n\n")[1].splitlines()
    assert header.split() == ["model", "mood,", "matthews", "goodness,", "pearson_spearman", "average"]
    assert f"{100 * mood['mean']:.1f}" in row and row.count("±") == 2
    # The configuration is complete: it runs again as it stands.
    assert load_section(EvaluateConfig, tmp_path / "config.yaml").tasks["mood"].metric == "matthews"


def test_finished_seeds_are_kept_and_changed_settings_done_again(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fine_tune(source: str, tokenizer: Any, task: Any, arguments: Any, length: int, seed: int, label: str) -> Any:
        calls.append(label)
        if len(calls) == 3:
            raise KeyboardInterrupt
        score = seed / 10 + arguments["learning_rate"]
        return dict.fromkeys(("accuracy", "f1", "matthews") if task.label_names else module.SCORE_METRICS, score)

    monkeypatch.setattr(module, "_fine_tune", fine_tune)
    with pytest.raises(KeyboardInterrupt):
        evaluate(load(shared, tmp_path))
    assert len(calls) == 3 and not (tmp_path / "metrics.json").exists()
    first = evaluate(load(shared, tmp_path))
    names = [label.split("/")[1] for label in calls]
    assert names == ["mood-seed1", "mood-seed2", "goodness-seed1", "goodness-seed1", "goodness-seed2"]
    del calls[:]
    calls += ["", "", ""]
    assert evaluate(load(shared, tmp_path))["models"] == first["models"] and len(calls) == 3
    evaluate(load(shared, tmp_path, seeds=[1, 2, 3]))
    assert [label.split("/")[1] for label in calls[3:]] == ["mood-seed3", "goodness-seed3"]
    evaluate(load(shared, tmp_path, tasks__mood__train__learning_rate=0.5))
    assert [label.split("/")[1] for label in calls[5:]] == ["mood-seed1", "mood-seed2"]
    # The same folder with other weights in it is another model.
    copied = tmp_path / "student"
    for seed in (1, 2):
        model = AutoModel.from_pretrained(shared / "encoder")
        model.embeddings.word_embeddings.weight.data += seed
        model.save_pretrained(copied)
        AutoTokenizer.from_pretrained(shared / "encoder").save_pretrained(copied)
        evaluate(load(shared, tmp_path, model=str(copied), seeds=[1]))
    assert len(calls) == 11


def test_another_tokenizer_is_another_model(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def fine_tune(source: str, tokenizer: Any, *_: Any) -> Any:
        calls.append(source)
        tokenizer("cutting leaves its settings behind", truncation=True, max_length=4)
        return dict.fromkeys(("matthews", *module.SCORE_METRICS), 0.5)

    monkeypatch.setattr(module, "_fine_tune", fine_tune)
    tokenizer = AutoTokenizer.from_pretrained(shared / "encoder")
    tokenizer.save_pretrained(tmp_path / "same")
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "other")
    keys: dict[str, Any] = {"output": tmp_path / "out", "seeds": [1]}
    for name, expected in ((None, 2), ("same", 2), ("other", 4), ("other", 4), ("same", 6)):
        evaluate(load(shared, **keys, tokenizer=None if name is None else str(tmp_path / name)))
        assert len(calls) == expected
    # Replaced in its folder.
    tokenizer.save_pretrained(tmp_path / "same")
    evaluate(load(shared, **keys, tokenizer=str(tmp_path / "same")))
    assert len(calls) == 8


def test_a_tokenizer_without_a_backend_is_known_by_its_vocabulary() -> None:
    class Tokenizer:
        def __init__(self, *pieces: str) -> None:
            self.pieces = pieces

        def get_vocab(self) -> dict[str, int]:
            return {piece: index for index, piece in enumerate(self.pieces)}

    one, other = (module._tokenizer_hash(Tokenizer(*pieces)) for pieces in ("ab", "ba"))  # type: ignore[arg-type]
    assert one == module._tokenizer_hash(Tokenizer("a", "b")) != other  # type: ignore[arg-type]


def test_a_table_of_several_models(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fine_tune(source: str, tokenizer: Any, task: Any, *_: Any) -> Any:
        return dict.fromkeys(
            ("matthews",) if task.label_names else module.SCORE_METRICS, 0.5 + source.endswith("whole") / 4
        )

    monkeypatch.setattr(module, "_fine_tune", fine_tune)
    models = [str(shared / "encoder"), str(shared / "whole")]
    rows = table(evaluate(load(shared, tmp_path, model=models, seeds=[7])))
    assert rows[1:] == [[models[0], "50.0", "50.0", "50.0"], [models[1], "75.0", "75.0", "75.0"]]


def test_seeds_decide_and_repeat(shared: Path, tmp_path: Path) -> None:
    def run(name: str, seed: int) -> dict[str, float]:
        settings = load(shared, tmp_path / name, seeds=[seed], train__max_steps=4)
        settings.tasks = {"goodness": settings.tasks["goodness"]}
        return evaluate(settings)["models"][0]["tasks"]["goodness"]["runs"][0]["numbers"]

    assert run("a", 1) == run("b", 1) != run("c", 2)


def test_what_is_refused_before_any_work(shared: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], rule: str, **more: Any) -> None:
        with pytest.raises(error, match=rule):
            evaluate(load(shared, tmp_path / "out", **more))
        assert not (tmp_path / "out").exists()

    refused(PlanError, "model: .*/none: there is no such folder", model=str(shared / "none"))
    refused(DataError, "scores, not classes", tasks__goodness__metric="accuracy")
    refused(DataError, "rows of 'label' hold no score", tasks__mood__metric="pearson")
    refused(ConfigError, "tasks.mood.metric: input should be 'accuracy', 'f1'.*got 'bleu'", tasks__mood__metric="bleu")
    refused(ConfigError, "unknown key .*did you mean tasks.NAME.data.max_train_rows", tasks__mood__data__max_rows=3)
    refused(ConfigError, "learning_rat: .*did you mean .*learning_rate", tasks__mood__train__learning_rat=3)
    refused(ConfigError, "seeds: must not repeat", seeds=[1, 1])
    refused(ConfigError, "must be letters", **{"tasks__a/b__data__train": "x"})
    empty = tmp_path / "empty"
    AutoModel.from_pretrained(shared / "encoder").save_pretrained(empty)
    with pytest.raises(module.EvaluateError, match="tokenizer: .*empty: .*--tokenizer"):
        evaluate(load(shared, tmp_path / "out", model=str(empty)))


def test_diverged_fine_tuning_is_an_error(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(module.EvaluateError, match="not finite; lower train.learning_rate"):
        evaluate(
            load(shared, tmp_path, train__learning_rate=1e30, train__max_steps=5, train__lr_scheduler_type="constant")
        )


def test_command_line_errors(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, rule in (
        ([], "name a yaml file"),
        (["--model", "x"], "tasks: is required and not given"),
        (["none.yaml"], "none.yaml: cannot be read"),
        ([str(shared / "tasks.yaml")], "model: is required"),
    ):
        assert main(["evaluate", *words]) == 2
        assert rule in capsys.readouterr().err
    assert main(["evaluate", "--keys"]) == 0
    assert "tasks.NAME.data.train" in capsys.readouterr().out.splitlines()


def test_one_task_needs_no_yaml(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The line that a finished minilm run ends with.
    words = ["--tasks.mine.data.train", str(shared / "mood.tsv"), "--tasks.mine.data.text_columns", "sentence"]
    words += ["--model", str(shared / "encoder"), "--output", str(tmp_path), "--train.max_steps", "1", "--seeds", "1"]
    assert main(["evaluate", *words]) == 0
    assert "mine, accuracy" in capsys.readouterr().out
    assert main(["evaluate", *words[4:]]) == 2
    assert "tasks: is required and not given" in capsys.readouterr().err
