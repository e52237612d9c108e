# SPDX-License-Identifier: Apache-2.0
"""Several tasks, one student: model and heads, batches of one task, their loss, the trainer that uses them."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from tiny_models import WORDS, tiny_bert, tiny_sentences, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
)

from pydistill import DistillationTrainer, Distiller
from pydistill.multitask import TaskCollator, TaskLoss, TaskMixture
from pydistill.students.multitask import AnswerModule, MultiTaskConfig, MultiTaskModel, task_settings

TASKS = {
    "kind": task_settings(labels=["a", "b", "c"], dropout=0.0),
    "score": task_settings("regression", pair=True),
    "pair": task_settings(labels=["no", "yes"], pair=True, head="san", dropout=0.0),
    "rank": task_settings("ranking", pair=True),
}


def model_of(tasks: dict[str, Any] = TASKS, seed: int = 1) -> MultiTaskModel:
    return MultiTaskModel.from_encoder(tiny_bert(3, layers=2), tasks, seed=seed)


def texts(count: int = 4, pair: bool = True) -> Any:
    sentences = tiny_sentences(2 * count, seed=5)
    given = (sentences[:count], sentences[count:]) if pair else (sentences[:count],)
    return tiny_tokenizer()(*given, padding=True, return_tensors="pt")


# --------------------------------------------------------------------------- model


def test_heads_share_one_encoder():
    bert = tiny_bert(3, layers=2)
    model = MultiTaskModel.from_encoder(bert, TASKS, seed=1)
    for (name, ours), (theirs_name, theirs) in zip(
        model.encoder.named_parameters(), bert.bert.named_parameters(), strict=True
    ):
        assert name == theirs_name
        assert torch.equal(ours, theirs)
    # Nothing is held twice, and the encoder stands under one name.
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names))
    assert sum("word_embeddings" in name for name in names) == 1
    inputs = texts()
    assert model(**inputs, task="kind").logits.shape == (4, 3)
    assert model(**inputs, task="score").logits.shape == (4, 1)
    # A loss of one task reaches the encoder and its own head alone.
    model(**inputs, task="pair").logits.sum().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in reached if name.startswith("heads.")} == {"pair"}
    assert "encoder.embeddings.word_embeddings.weight" in reached


def test_new_heads_depend_on_the_seed_alone():
    bert = tiny_bert(3)
    before = torch.random.get_rng_state()
    one, same, other = (MultiTaskModel.from_encoder(bert, TASKS, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.heads["kind"].classifier.weight, other.heads["kind"].classifier.weight)
    assert all(torch.isfinite(parameter).all() for parameter in one.parameters())


def test_copies_have_encoders_of_their_own():
    model = model_of().eval()
    inputs = texts()
    before = model(**inputs, task="kind").logits
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.zero_()
    assert torch.equal(before, model(**inputs, task="kind").logits)
    assert not torch.equal(before, other(**inputs, task="kind").logits)


@pytest.mark.parametrize("loader", [MultiTaskModel, AutoModelForSequenceClassification])
def test_comes_back_from_a_folder(tmp_path: Path, loader: Any):
    model = model_of().eval()
    model.save_pretrained(tmp_path)
    again = loader.from_pretrained(tmp_path).eval()
    assert isinstance(again, MultiTaskModel)
    inputs = texts()
    for task in TASKS:
        assert torch.equal(model(**inputs, task=task).logits, again(**inputs, task=task).logits)
    # An encoder taken out of it, under other heads.
    next_one = MultiTaskModel.from_encoder(tmp_path, {"new": TASKS["kind"]})
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, next_one.encoder.state_dict()[name])
    assert next_one.config.task == "new"  # the only one need not be named
    assert next_one(**inputs).logits.shape == (4, 3)


def small(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "distilbert":
        config = DistilBertConfig(vocab_size=45, dim=16, n_layers=1, n_heads=2, hidden_dim=32)
        return DistilBertForSequenceClassification(config)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=45, **sizes, pad_token_id=0, bos_token_id=1))


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_task_alone_is_a_plain_classifier(tmp_path: Path, kind: str):
    """RoBERTa's head is two layers, DistilBERT's keeps one of them beside the classifier, BERT's pooler is shared."""
    source = tiny_bert(3) if kind == "bert" else small(kind)
    model = MultiTaskModel.from_encoder(source, {"one": TASKS["kind"], "other": task_settings("regression")}).eval()
    inputs = texts(pair=False)
    if kind != "bert":
        del inputs["token_type_ids"]
    plain = model.classifier("one")
    plain.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(again) is type(source)
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(again(**inputs).logits, model(**inputs, task="one").logits)
    assert model.classifier("other").config.problem_type == "regression"


def test_an_answer_module_is_no_plain_classifier():
    with pytest.raises(ValueError, match="answer module"):
        model_of().classifier("pair")


def test_answers_follow_the_formula():
    torch.manual_seed(0)
    module = AnswerModule(8, 3, steps=4, dropout=0.0, prediction_dropout=0.5).double().eval()
    hidden = torch.randn(2, 5, 8, dtype=torch.float64)
    first = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
    second = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    found = module(hidden, first, second)
    for row in range(2):
        premise, hypothesis = hidden[row, first[row]], hidden[row, second[row]]
        state = (hypothesis @ module.query.weight[0]).softmax(0) @ hypothesis
        guesses = []
        for _ in range(4):
            seen = (premise @ module.bilinear.weight.T @ state).softmax(0) @ premise
            features = torch.cat([state, seen, (state - seen).abs(), state * seen])
            guesses.append(module.answer(features).softmax(-1))
            state = module.cell(seen[None], state[None])[0]
        torch.testing.assert_close(found[row].exp().double(), torch.stack(guesses).mean(0), rtol=1e-6, atol=1e-6)


def test_dropped_guesses_leave_a_distribution():
    torch.manual_seed(0)
    module = AnswerModule(8, 3, steps=3, dropout=0.0, prediction_dropout=0.9)
    hidden, mask = torch.randn(64, 4, 8), torch.tensor([1, 1, 0, 0]).bool().expand(64, 4)
    drawn = module(hidden, mask, ~mask)
    torch.testing.assert_close(drawn.exp().sum(-1), torch.ones(64))
    drawn.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())
    # In training it is a draw, in evaluation the mean of all.
    assert not torch.equal(drawn, module(hidden, mask, ~mask))
    module.eval()
    assert torch.equal(module(hidden, mask, ~mask), module(hidden, mask, ~mask))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "generation"}, "kind must be one of"),
        ({"labels": ["one"]}, "labels must name two"),
        ({"kind": "regression", "labels": ["a", "b"]}, "labels must name two"),
        ({"labels": ["a", "b"], "head": "san"}, "is for pairs"),
        ({"kind": "ranking"}, "is for pairs"),
        ({"labels": ["a", "b"], "head": "tree"}, "head must be one of"),
        ({"labels": ["a", "b"], "dropout": 1.0}, "dropout must lie in"),
        ({"labels": ["a", "b"], "steps": 0}, "steps must be at least 1"),
    ],
)
def test_settings_that_cannot_be(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        task_settings(**arguments)


def test_model_refuses():
    model = model_of()
    with pytest.raises(ValueError, match="task must name one of kind, score, pair, rank"):
        model(**texts())
    with pytest.raises(ValueError, match="got 'nothing'"):
        model(**texts(), task="nothing")
    with pytest.raises(ValueError, match="train it with TaskLoss"):
        model(**texts(), task="rank", labels=torch.zeros(4))
    inputs = texts()
    del inputs["token_type_ids"]
    with pytest.raises(ValueError, match="which text is which"):
        model(**inputs, task="pair")
    with pytest.raises(ValueError, match="at least one task"):
        MultiTaskModel(MultiTaskConfig(encoder=tiny_bert().config.to_dict()))


# --------------------------------------------------------------------------- batches


def rows(count: int, seed: int = 0) -> Dataset:
    draw = np.random.default_rng(seed)
    ids = [draw.integers(5, 45, draw.integers(2, 30)).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": draw.integers(0, 2, count).tolist()})


def epoch_of(mixture: TaskMixture, epoch: int, size: int = 4, parts: int = 1, **options: Any) -> list[list[int]]:
    mixture.set_epoch(epoch)
    return list(mixture.batches(size, parts, seed=7, **options))


def test_an_epoch_is_every_row_once_in_batches_of_one_task():
    mixture = TaskMixture({"one": rows(10), "two": rows(21), "three": rows(3)})
    batches = epoch_of(mixture, 0)
    assert sorted(index for batch in batches for index in batch) == list(range(34)) and len(list(mixture)) == 34
    assert len(batches) == len(mixture.batches(4, 1, seed=7)) == 3 + 6 + 1
    for batch in batches:
        assert len({mixture[index]["task"] for index in batch}) == 1
    order = [mixture[batch[0]]["task"] for batch in batches]
    assert order != sorted(order)  # the tasks take turns
    # The same again, and another order with other neighbours in the next epoch.
    assert epoch_of(mixture, 0) == batches
    following = epoch_of(mixture, 1)
    assert following != batches
    assert {frozenset(batch) for batch in following} != {frozenset(batch) for batch in batches}


def test_pack_once_keeps_the_neighbours():
    mixture = TaskMixture({"one": rows(10), "two": rows(21)}, pack_once=True)
    first, second = epoch_of(mixture, 0), epoch_of(mixture, 1)
    assert first != second
    assert {frozenset(batch) for batch in first} == {frozenset(batch) for batch in second}


@pytest.mark.parametrize("parts", [2, 3])
def test_the_parts_of_a_step_are_of_one_task(parts: int):
    """Processes and accumulation: batches come in groups of parts; one without rows repeats one that does not count."""
    mixture = TaskMixture({"one": rows(10), "two": rows(25), "three": rows(parts - 1)})
    batches = epoch_of(mixture, 0, parts=parts)
    assert len(batches) == len(mixture.batches(4, parts, seed=7))
    assert len(batches) % parts == 0
    repeated = []
    for start in range(0, len(batches), parts):
        group = batches[start : start + parts]
        assert len({mixture[index]["task"] for batch in group for index in batch}) == 1
        sizes = [len(batch) for batch in group]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        repeated += [batch for batch in group if "repeated" in mixture[batch[0]]]
    assert all(len(batch) == 1 and batch[0] < 0 for batch in repeated)
    counted = [index for batch in batches if batch not in repeated for index in batch]
    assert sorted(counted) == list(range(len(mixture)))
    assert "three" in {mixture[batch[0]]["task"] for batch in repeated}


def test_a_step_has_the_same_rows_however_it_is_cut():
    mixture = TaskMixture({"one": rows(33), "two": rows(17), "three": rows(2)})

    def steps(size: int, parts: int) -> list[list[int]]:
        batches = epoch_of(mixture, 1, size, parts)
        return [
            sorted(index for batch in batches[start : start + parts] for index in batch if index >= 0)
            for start in range(0, len(batches), parts)
        ]

    assert steps(8, 1) == steps(4, 2) == steps(2, 4) == steps(1, 8)


def test_processes_read_the_same_task_at_every_step():
    """As accelerate hands the batches out, with two of each process to a step."""
    mixture = TaskMixture({"one": rows(30), "two": rows(53), "three": rows(7), "four": rows(1)})
    batches = mixture.batches(4, parts=4, seed=7)
    shards = [list(BatchSamplerShard(batches, num_processes=2, process_index=rank)) for rank in range(2)]
    assert len(shards[0]) == len(shards[1]) == len(batches) // 2
    tasks = [[{mixture[index]["task"] for index in batch} for batch in shard] for shard in shards]
    assert tasks[0] == tasks[1]
    assert tasks[0][::2] == tasks[0][1::2]
    seen = [index for shard in shards for batch in shard for index in batch]
    assert sorted(index for index in seen if index >= 0) == list(range(len(mixture)))
    assert len(seen) == sum(map(len, batches))


def test_strategies():
    tasks = {"small": rows(16), "large": rows(144)}
    expected = {
        ("proportional", None): {"small": 16, "large": 144},
        ("square_root", None): {"small": 40, "large": 120},
        ("uniform", None): {"small": 80, "large": 80},
        ("capped", 50): {"small": 16, "large": 50},
    }
    for (strategy, cap), counts in expected.items():
        mixture = TaskMixture(tasks, strategy=strategy, cap=cap)
        batches = epoch_of(mixture, 0)
        assert Counter(mixture[index]["task"] for batch in batches for index in batch) == counts


def test_rows_are_read_equally_often_over_the_epochs():
    mixture = TaskMixture({"small": rows(6), "large": rows(90)}, strategy="uniform")
    seen = Counter(index for epoch in range(15) for batch in epoch_of(mixture, epoch) for index in batch)
    small_counts, large_counts = ([seen[index] for index in part] for part in (range(6), range(6, 96)))
    assert set(small_counts) == {15 * 48 // 6}
    assert set(large_counts) == {15 * 48 // 90}


def test_by_length_brings_similar_rows_together():
    mixture = TaskMixture({"one": rows(400), "two": rows(100)})
    lengths = [len(mixture[index]["input_ids"]) for index in range(500)]

    def padding(batches: list[list[int]]) -> int:
        return sum(max(lengths[index] for index in batch) * len(batch) for batch in batches) - sum(lengths)

    plain, sorted_ones = epoch_of(mixture, 0), epoch_of(mixture, 0, by_length=True)
    assert sorted(index for batch in sorted_ones for index in batch) == list(range(500))
    assert padding(sorted_ones) < 0.2 * padding(plain)


def test_mixture_refuses():
    for arguments, message in (
        ({"tasks": {}}, "at least one"),
        ({"tasks": {"one": rows(3).select([])}}, "at least one row"),
        ({"tasks": {"one": rows(3)}, "strategy": "random"}, "strategy must be one of"),
        ({"tasks": {"one": rows(3)}, "strategy": "capped"}, "cap must be at least 1"),
        ({"tasks": {"one": rows(3)}, "cap": 3}, "None with others"),
        ({"tasks": {"one": rows(3)}, "strategy": "uniform", "pack_once": True}, "pack_once must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            TaskMixture(**arguments)


def test_collated_candidates():
    queries = [
        {"task": "rank", "input_ids": [[2, 7, 3], [2, 8, 9, 3]], "labels": 1, "teacher_logits": [[0.1], [0.2]]},
        {"task": "rank", "input_ids": [[2, 5], [2, 6], [2, 7]], "labels": 0, "teacher_logits": [[0.3], [0.4], [0.5]]},
    ]
    batch = TaskCollator(tiny_tokenizer())(queries)
    assert batch["task"] == "rank"
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 4)
    assert batch["candidates"].tolist() == [[0, 1, -1], [2, 3, 4]]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["teacher_logits"][:, 0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match="rows of one task, got one, two"):
        TaskCollator(tiny_tokenizer())([{"task": "one", "input_ids": [1]}, {"task": "two", "input_ids": [1]}])


# --------------------------------------------------------------------------- loss


def test_loss_of_classes():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    term = TaskLoss({"kind": "classification"}, hard_weight=0.3)
    batch: dict[str, Any] = {"task": "kind", "labels": labels}
    torch.testing.assert_close(term({"logits": logits}, {}, batch), F.cross_entropy(logits, labels))
    soft = torch.randn(5, 3).log_softmax(-1)
    batch["teacher_logits"] = soft
    expected = 0.3 * F.cross_entropy(logits, labels) + 0.7 * F.cross_entropy(logits, soft.exp())
    torch.testing.assert_close(term({"logits": logits}, {}, batch), expected)
    torch.testing.assert_close(term({"logits": logits}, {}, batch, num_items=20), expected * 5 / 20)


def test_loss_of_scores():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 1), torch.randn(5)
    term = TaskLoss({"score": "regression"}, hard_weight=0.3)
    batch: dict[str, Any] = {"task": "score", "labels": labels}
    torch.testing.assert_close(term({"logits": logits}, {}, batch), F.mse_loss(logits[:, 0], labels))
    batch["teacher_logits"] = torch.randn(5, 1)
    expected = 0.3 * F.mse_loss(logits[:, 0], labels) + 0.7 * F.mse_loss(logits, batch["teacher_logits"])
    torch.testing.assert_close(term({"logits": logits}, {}, batch), expected)


def test_loss_of_rankings():
    """A query with fewer candidates than another is what it would be alone."""
    torch.manual_seed(0)
    scores, soft = torch.randn(5, 1, requires_grad=True), torch.randn(5, 1)
    term = TaskLoss({"rank": "ranking"})
    batch = {
        "task": "rank",
        "labels": torch.tensor([1, 0]),
        "candidates": torch.tensor([[0, 1, -1], [2, 3, 4]]),
        "teacher_logits": soft,
    }
    loss, parts = term.forward_with_parts({"logits": scores}, {}, batch)
    expected = 0.0
    for labels, places in ((1, slice(0, 2)), (0, slice(2, 5))):
        alone, teacher = scores[places].T, soft[places].T
        hard = F.cross_entropy(alone, torch.tensor([labels]))
        expected = expected + 0.25 * (hard + F.cross_entropy(alone, teacher.softmax(-1)))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*torch.autograd.grad(loss, scores), *torch.autograd.grad(expected, scores))
    assert parts["rank"] == loss


def test_loss_refuses():
    with pytest.raises(ValueError, match="kinds: that of a must be one of"):
        TaskLoss({"a": "song"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"hard_weight must lie in \[0, 1\], got 2"):
        TaskLoss({"a": "regression"}, hard_weight=2)
    with pytest.raises(ValueError, match="only one of the two has b"):
        TaskLoss({"a": "regression"}, hard_weight={"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="task must be one of a, got 'b'"):
        TaskLoss({"a": "regression"})({"logits": torch.zeros(1, 1)}, {}, {"task": "b", "labels": torch.zeros(1)})


# --------------------------------------------------------------------------- training


def labelled(count: int, kind: str, seed: int) -> Dataset:
    """A word of the first half of the vocabulary at the beginning: class 0, score -1."""
    sentences = tiny_sentences(count, seed, longest=8)
    high = [WORDS.index(sentence.split()[0]) >= len(WORDS) // 2 for sentence in sentences]
    coded = tiny_tokenizer()(sentences)
    labels = [int(one) for one in high] if kind == "classification" else [2.0 * one - 1 for one in high]
    columns = {"input_ids": coded["input_ids"], "token_type_ids": coded["token_type_ids"], "labels": labels}
    return Dataset.from_dict(columns)


def trainer_of(folder: Path, scores: int = 32, **options: Any) -> DistillationTrainer:
    tasks = {"kind": task_settings(labels=["low", "high"]), "score": task_settings("regression")}
    kinds = {name: settings["kind"] for name, settings in tasks.items()}
    model = MultiTaskModel.from_encoder(tiny_bert(3), tasks, seed=1)
    mixture = TaskMixture({"kind": labelled(48, "classification", 0), "score": labelled(scores, "regression", 1)})
    settings = {"num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 5}
    settings |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "seed": 3} | options
    return DistillationTrainer(
        Distiller(model, None, TaskLoss(kinds)),
        TrainingArguments(str(folder), disable_tqdm=True, **settings),
        train_dataset=mixture,  # type: ignore[arg-type]
        processing_class=tiny_tokenizer(),
        data_collator=TaskCollator(tiny_tokenizer()),
    )


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return trainer.distiller.student.state_dict()


def test_training_learns_both_tasks_and_logs_each(tmp_path: Path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    assert trainer.state.global_step == 4 * (6 + 4)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss_task.kind", "loss_task.score"):
        assert logs[-1][name] < 0.5 * logs[0][name]
    for entry in logs:
        # Each is the mean over the steps of its task, so that the mean over all steps lies between them.
        parts = [entry[name] for name in ("loss_task.kind", "loss_task.score") if name in entry]
        assert min(parts) - 1e-6 <= entry["loss_task"] <= max(parts) + 1e-6


def test_training_resumes_in_mid_epoch_to_the_bit(tmp_path: Path):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    trainer_of(tmp_path / "parts", save_strategy="steps", save_steps=13).train()
    for later in (26, 39):
        (tmp_path / "parts" / f"checkpoint-{later}" / "trainer_state.json").unlink()
    resumed = trainer_of(tmp_path / "parts", save_strategy="steps", save_steps=13)
    resumed.train(resume_from_checkpoint=True)
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


@pytest.mark.parametrize("scores", [32, 19, 3])
def test_accumulation_is_one_large_batch(tmp_path: Path, scores: int):
    """The micro-batches of a step are of one task, and each row counts the same: 4 x 2 and 1 x 8 are 8 x 1, with a
    rest of 3 rows in a step, too."""
    # Plain gradient descent: Adam makes steps of one size of gradients that are nothing but rounding.
    options = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.05}
    large = trainer_of(tmp_path / "large", scores, **options)
    large.train()
    for rows_at_a_time in (2, 1):
        options |= {"per_device_train_batch_size": rows_at_a_time, "gradient_accumulation_steps": 8 // rows_at_a_time}
        small_ones = trainer_of(tmp_path / "small", scores, **options)
        small_ones.train()
        assert small_ones.state.global_step == large.state.global_step
        for name, value in weights(large).items():
            torch.testing.assert_close(value, weights(small_ones)[name], rtol=1e-4, atol=1e-5)
