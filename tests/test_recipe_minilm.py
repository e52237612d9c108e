# SPDX-License-Identifier: Apache-2.0
"""The recipe minilm end to end on a made-up corpus: stages, resume, what the student is, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_task import make_teacher, sentences
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    TrainerCallback,
)

import pydistill
from pydistill.cli import main
from pydistill.config import ConfigError, load_config
from pydistill.plan import PlanError
from pydistill.recipes import minilm, minilm_report, run


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of four layers that attends to something, and a corpus of 400 texts."""
    folder = tmp_path_factory.mktemp("minilm")
    make_teacher(folder / "words")
    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(folder / "words"))
    teacher = BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    teacher.save_pretrained(folder / "bert")
    AutoTokenizer.from_pretrained(folder / "words").save_pretrained(folder / "bert")
    (folder / "texts.txt").write_text("\n".join(text for text, _ in sentences(400, seed=5)) + "\n")
    return folder


def settings(folder: Path, output: Path, **more: Any) -> dict[str, Any]:
    keys = {
        "recipe": "minilm",
        "output": str(output),
        "teacher.model": str(folder / "bert"),
        "corpus.files": [str(folder / "texts.txt")],
        "corpus.max_length": 16,
        "corpus.held_out": 8,
        "corpus.shuffle_buffer": 100,
        "student.layers": 2,
        "student.hidden_size": 16,
        "train.max_steps": 60,
        "train.learning_rate": 5e-3,
        "train.per_device_train_batch_size": 16,
        "train.save_steps": 20,
        "train.logging_steps": 10,
    }
    return keys | {key.replace("__", "."): value for key, value in more.items()}


def start(folder: Path, output: Path, resume: bool = False, **more: Any) -> dict[str, Any]:
    return run(load_config(None, settings(folder, output, **more)), resume=resume)


def complaint(folder: Path, output: Path, **more: Any) -> str:
    with pytest.raises(PlanError) as caught:
        pydistill.plan(load_config(None, settings(folder, output, **more)), dry_run=False)
    return str(caught.value)


def test_a_student_learns_the_relations_and_loads_as_a_model(shared: Path, tmp_path: Path) -> None:
    results = start(shared, tmp_path / "run")
    teacher, student = results["models"]
    assert (teacher["name"], teacher["layers"], student["layers"], student["hidden_size"]) == ("teacher", 4, 2, 16)
    assert student["loss_to_teacher"] == student["loss_after"]
    assert student["loss_after"] < 0.5 * student["loss_before"]
    assert student["steps"] == 60 and len(student["curve"]) >= 6
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"comparison.png", "curves.png", "relations.png"}
    files = {"metrics.json", "relations.json", "config.yaml", "data.sha256", "report.html"}
    assert names == {"student"} | pictures | files
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == results
    model = AutoModel.from_pretrained(tmp_path / "run" / "student")
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 16)
    assert sum(p.numel() for p in model.parameters()) == student["parameters"]
    # What the relations cannot reach is as it was made; what they can is not.
    made = minilm.make_student(
        AutoModel.from_pretrained(shared / "bert"),
        model.config,
        seed=load_config(None, settings(shared, tmp_path)).seed,
    ).state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, made[name])}
    assert "encoder.layer.1.attention.self.query.weight" in moved and "embeddings.word_embeddings.weight" in moved
    assert not any(name.startswith(("pooler", "encoder.layer.1.output")) for name in moved)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "student", num_labels=3)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "student")("fine film")["input_ids"]
    assert classifier.config.num_labels == 3
    # The saved configuration is complete.
    assert load_config(tmp_path / "run" / "config.yaml") == load_config(None, settings(shared, tmp_path / "run"))


class _Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("packing", ["truncate", "packed"])
def test_an_interrupted_run_ends_with_the_same_bits(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    # Dropout is on, and 350 texts are gone through more than once.
    more = {"corpus__packing": packing, "corpus__max_length": 32, "student__initialization": "svd"}
    more |= {"assistant": {"hidden_size": 16, "train": {"max_steps": 30}}, "objective__relations": ["qq", "kk", "vv"]}
    more |= {"objective__relation_heads": 8}
    whole = start(shared, tmp_path / "whole", **more)
    assert [model["name"] for model in whole["models"]] == ["teacher", "assistant", "student"]
    # The student's own loss is against the assistant.
    assert whole["models"][2]["loss_to_teacher"] != whole["models"][2]["loss_after"]
    assert whole["models"][2]["source"] == str(tmp_path / "whole" / "assistant")
    trained = minilm.DistillationTrainer.train
    calls = []

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(options["resume_from_checkpoint"])
        if len(calls) == 2:
            self.add_callback(_Interrupt(45))
        return trained(self, *arguments, **options)

    monkeypatch.setattr(minilm.DistillationTrainer, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(shared, tmp_path / "cut", **more)
    assert not (tmp_path / "cut" / "student").exists() and (tmp_path / "cut" / "assistant").exists()
    again = start(shared, tmp_path / "cut", resume=True, **more)
    # The assistant was kept, the student went on from its last checkpoint.
    assert len(calls) == 3 and calls[2].endswith("checkpoint-40")
    first, second = (AutoModel.from_pretrained(tmp_path / name / "student") for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    for key in ("loss_before", "loss_after", "steps"):
        assert again["models"][2][key] == whole["models"][2][key]


def test_the_teacher_s_layer_is_the_one_that_is_read(shared: Path, tmp_path: Path) -> None:
    # A copy of the first two layers has the second layer's relations, exactly; it has not those of the last.
    more = {"student__hidden_size": 32, "student__initialization": "layers", "train__max_steps": 1}
    second = start(shared, tmp_path / "second", teacher__layer=1, **more)["models"][1]
    last = start(shared, tmp_path / "last", student__copy_layers=[0, 1], **more)["models"][1]
    assert second["loss_before"] < 1e-6 < 1e-2 < last["loss_before"]


def test_the_relations_of_teacher_and_student_are_drawn(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"train__max_steps": 30, "assistant": {"hidden_size": 16, "layers": 4}}
    start(shared, tmp_path / "run", **more)
    printed = capsys.readouterr().out
    maps = json.loads((tmp_path / "run" / "relations.json").read_text())
    names = ["teacher", "assistant, distilled", "student, at the start", "student, distilled"]
    assert [model["name"] for model in maps["models"]] == names and maps["head_count"] == 4
    held_out = [text for text, _ in sentences(400, seed=5)][7::8]
    assert maps["text"] in held_out and maps["tokens"][1:-1] == maps["text"].split()
    assert (maps["tokens"][0], maps["tokens"][-1]) == ("[CLS]", "[SEP]")
    teacher, _, before, after = maps["models"]
    for relation in ("qk", "vv"):
        assert teacher["divergence"][relation] < 1e-6
        assert after["divergence"][relation] < 0.8 * before["divergence"][relation]
        (matrix,) = after["matrices"][relation]  # the mean of the heads
        assert [sum(row) for row in matrix] == pytest.approx([1] * len(maps["tokens"]), abs=1e-3)
    # One table, where the report is, and a command that works.
    assert "to the teacher" in printed and f"report:  {tmp_path / 'run' / 'report.html'}" in printed
    assert "try it:  pydistill evaluate --tasks.mine.data.train YOUR.tsv" in printed

    # The same folder with another text and single heads: only the picture is made anew.
    chosen = {"picture": {"sentence": "the film is a great story", "heads": [0, 3]}}
    start(shared, tmp_path / "run", resume=True, **more, **chosen)
    assert "[student] kept from before" in capsys.readouterr().out
    again = json.loads((tmp_path / "run" / "relations.json").read_text())
    assert again["tokens"] == ["[CLS]", *"the film is a great story".split(), "[SEP]"] and again["heads"] == [0, 3]
    assert [len(model["matrices"]["qk"]) for model in again["models"]] == [2] * 4
    assert again["models"][0]["matrices"]["qk"][0] != again["models"][0]["matrices"]["qk"][1]


def test_a_report_is_drawn_again_and_shows_every_relation(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = start(shared, tmp_path / "run", corpus__held_out=0, objective__relations=["qq", "kk", "vv"])
    (tmp_path / "run" / "report.html").unlink()
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "report: " in printed and "student" in printed
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and not re.search(r"(src|href)=\"(?!data:)", page)
    assert "no text was held out" in page and minilm.PICTURE_TEXT in page
    # The parts of the loss are logged, and are drawn.
    logged = results["models"][1]["curve"][0]
    parts = [logged[f"loss_attention_relation.{name}"] for name in ("qq", "kk", "vv")]
    assert sum(parts) == pytest.approx(logged["loss"], rel=1e-3) and min(parts) > 0
    left, right = minilm_report.draw_curves(results).axes
    assert [text.get_text()[:2] for text in left.get_legend().get_texts()] == ["QQ", "KK", "VV", "th"]
    assert not right.lines


def test_the_plan_says_what_will_run(shared: Path, tmp_path: Path) -> None:
    config = load_config(None, settings(shared, tmp_path / "run"))
    text = str(pydistill.plan(config))
    assert "every 8th text held out" in text and "4 layers, hidden size 32, 4 heads" in text
    assert "the paper uses an assistant here, e.g. --assistant.hidden_size 16" in text
    assert "s a step, about" in text
    helped = load_config(None, settings(shared, tmp_path / "run", assistant={"hidden_size": 16}))
    assert "the paper uses" not in str(pydistill.plan(helped, dry_run=False))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"teacher__layer": 4}, "teacher.layer: must be from -4 to 3, got 4"),
        ({"student__hidden_size": 18}, "student: smaller_config: num_attention_heads must divide hidden_size 18"),
        ({"student__heads": 2}, "student.heads: the teacher has 4 attention heads and the student 2"),
        (
            {"objective__relation_heads": 3},
            "objective.relation_heads: must divide the hidden size 16 of student, got 3",
        ),
        ({"objective__relation_heads": 32}, "hidden size 16 of student, got 32"),
        ({"objective__student_layer": 2}, "objective.student_layer: student has 2 layers, got 2"),
        ({"picture__heads": [0, 4]}, "picture.heads: must be from 0 to 3, the relation heads, got 4"),
        ({"corpus__max_length": 65}, "corpus.max_length: must be at most 64"),
        ({"corpus__files": ["none.txt"]}, "none.txt: there is no such file"),
        ({"corpus__held_out": 1000}, "no text is held out with held_out 1000"),
        ({"train__max_steps": -1}, "train.max_steps: the corpus is read as an endless stream"),
        (
            {"student__train__dataloader_num_workers": 2},
            "train (student).dataloader_num_workers: the corpus is one stream, which several workers cannot share: set "
            "it to 0 or 1, got 2",
        ),
        ({"train__fsdp": "full_shard"}, "train (student): fsdp: each process of a recipe holds the whole student"),
        ({"student__initialization": "layers", "student__layers": 4, "teacher__layer": 2}, "from 1 to the teacher's 3"),
        ({"teacher__model": "./none"}, "teacher.model: ./none: there is no such folder"),
    ],
)
def test_what_is_refused_before_any_work(shared: Path, tmp_path: Path, keys: dict[str, Any], rule: str) -> None:
    assert rule in complaint(shared, tmp_path / "run", **keys)


def test_several_problems_come_together(shared: Path, tmp_path: Path) -> None:
    lines = complaint(shared, tmp_path, teacher__layer=9, corpus__max_length=99, train__max_steps=0).splitlines()
    assert len(lines) == 3


def test_another_corpus_is_not_continued(shared: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text((shared / "texts.txt").read_text())
    keys = {"corpus__files": [str(texts)], "train__max_steps": 2}
    start(shared, tmp_path / "run", **keys)
    assert start(shared, tmp_path / "run", resume=True, **keys)["models"][1]["steps"] == 2
    texts.write_text("another text\n" + texts.read_text())
    with pytest.raises(PlanError, match="the corpus has changed since the run"):
        start(shared, tmp_path / "run", resume=True, **keys)


def test_unknown_keys_are_those_of_this_recipe(shared: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"student.layer: unknown key .*did you mean .*student.layers"):
        load_config(None, settings(shared, tmp_path, student__layer=3))
    with pytest.raises(ConfigError, match=r"assistant.train.lerning_rate: .*assistant.train.learning_rate"):
        load_config(None, settings(shared, tmp_path, assistant={"train": {"lerning_rate": 3}}))


def test_a_teacher_from_a_cache(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses as with the teacher beside the student, the same bits after an interruption; what cannot work is
    refused."""
    few = {"train.max_steps": 20, "train.save_steps": 10, "train.logging_steps": 5}
    online = start(shared, tmp_path / "online", **few)["models"][1]
    words = ["cache", str(tmp_path / "cache"), "--teacher", str(shared / "bert"), "--dtype", "float32"]
    words += ["--corpus", str(shared / "texts.txt"), "--max-length", "16"]
    assert main([*words, "--signals", "queries@-1", "keys@-1", "values@-1"]) == 0
    assert re.search(r"400 texts, 400 of them new: [\d,]+ tokens, .* MB, .* tokens/s", capsys.readouterr().out)
    cache = {"teacher.cache": str(tmp_path / "cache"), **few}
    plan = pydistill.plan(load_config(None, settings(shared, tmp_path / "planned", **cache)), dry_run=False)
    assert f"from the cache {tmp_path / 'cache'}" in str(plan)
    cached = start(shared, tmp_path / "whole", **cache)["models"][1]
    for one in ("loss_before", "loss_after"):
        assert cached[one] == pytest.approx(online[one], rel=1e-4)
    losses = [[entry["loss"] for entry in record["curve"] if "loss" in entry] for record in (cached, online)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    trained = minilm.DistillationTrainer.train

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        self.add_callback(_Interrupt(15))
        return trained(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(minilm.DistillationTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            start(shared, tmp_path / "cut", **cache)
    start(shared, tmp_path / "cut", resume=True, **cache)
    first, second = (AutoModel.from_pretrained(tmp_path / name / "student") for name in ("whole", "cut"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))

    assert "corpus.packing to truncate" in complaint(shared, tmp_path / "no", **cache, corpus__packing="packed")
    refused = complaint(shared, tmp_path / "no", **cache, teacher__layer=0)
    assert "holds keys@-1, queries@-1, values@-1, not keys@0" in refused
    assert "teacher.dtype: is for a teacher that runs" in complaint(
        shared, tmp_path / "no", **cache, teacher__dtype="bfloat16"
    )
    assert "no teacher cache" in complaint(shared, tmp_path / "no", teacher__cache=str(tmp_path / "nothing"))
    # Texts that the cache has not seen.
    (tmp_path / "more.txt").write_text("\n".join(text for text, _ in sentences(50, seed=77)) + "\n")
    with pytest.raises(ValueError, match="run pydistill cache on these texts"):
        start(shared, tmp_path / "more", **cache | {"corpus.files": [str(tmp_path / "more.txt")]})
