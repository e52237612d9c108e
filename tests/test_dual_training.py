# SPDX-License-Identifier: Apache-2.0
"""Dual training: the teacher's two vocabularies, the parts of the loss, what trains, what a checkpoint holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mixed_vocab_data import SENTENCES, student_tokenizer, teacher_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    ElectraConfig,
    TrainerCallback,
    TrainingArguments,
)

from pydistill.data.corpus import Corpus
from pydistill.data.mixed_vocab import IGNORED, STUDENT, MixedVocabularyCollator, Segmenter
from pydistill.distiller import Distiller
from pydistill.losses.shared_projection import shared_projection_loss
from pydistill.students.encoder import make_student
from pydistill.students.mixed_vocab import (
    DualTraining,
    MixedVocabularyTeacher,
    held_out_losses,
    student_config,
)
from pydistill.trainer import OBJECTIVE_WEIGHTS, DistillationTrainer

TEACHER, STUDENT_SIZE = 171, 90  # pieces
SIZES: dict[str, Any] = {
    "vocab_size": TEACHER,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}


def encoder(dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertModel(BertConfig(**SIZES | rates | options))


def teacher_of(model: Any = None, **options: Any) -> MixedVocabularyTeacher:
    return MixedVocabularyTeacher(model or encoder(), teacher_tokenizer(), student_tokenizer(), **options)


def student_of(teacher: MixedVocabularyTeacher, hidden_size: int = 8) -> Any:
    model = teacher.encoder
    return make_student(model, student_config(model.config, student_tokenizer(), hidden_size=hidden_size))


def dual(dropout: float = 0.0, **options: Any) -> DualTraining:
    teacher = teacher_of(encoder(dropout))
    return DualTraining(student_of(teacher), teacher, **options)


def batch(count: int = 6, **options: Any) -> dict[str, Tensor]:
    cut = Segmenter(teacher_tokenizer(), student_tokenizer(), **{"max_length": 32, "masking": 0.3} | options)
    rows = [{"text": SENTENCES[index % 8], "index": index} for index in range(count)]
    return MixedVocabularyCollator(cut)(rows)


# ------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("hidden_size", "parameters", "without"),
    [(192, 6_420_672, 6_284_544), (96, 1_874_016, 1_815_168), (48, 602_928, 575_808)],
)
def test_parameters_of_the_papers_students(hidden_size: int, parameters: int, without: int) -> None:
    class Vocabulary:
        pad_token_id = 0

        def __len__(self) -> int:
            return 4928

    config = student_config(BertConfig(), Vocabulary(), hidden_size=hidden_size)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = AutoModel.from_config(config)
        whole = BertModel(BertConfig()).num_parameters()
    assert model.num_parameters() == parameters
    # The paper's more-than-sixtyfold is that of 96, of what is neither positions, types, their norm nor pooler.
    left_out = ("position", "token_type", "embeddings.LayerNorm", "pooler")
    kept = sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in left_out))
    assert kept == without
    assert whole == 109_482_240 and (hidden_size != 96 or whole / kept == pytest.approx(60.3, abs=0.05))


def test_the_student_is_the_teachers_shape_with_its_own_vocabulary() -> None:
    config = student_config(encoder().config, student_tokenizer(), hidden_size=8, num_attention_heads=4)
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (90, 8, 2)
    assert (config.intermediate_size, config.num_attention_heads, config.pad_token_id) == (16, 4, 0)


# ------------------------------------------------------------------------- the teacher


def test_the_second_table_starts_from_the_first() -> None:
    teacher = teacher_of()
    theirs, ours = teacher_tokenizer(), student_tokenizer()
    table, second = teacher.table, teacher.student_embeddings.weight
    for name in ("cls_token", "mask_token", "pad_token"):
        assert torch.equal(second[getattr(ours, f"{name}_id")], table[getattr(theirs, f"{name}_id")])
    found = 0
    for piece, index in ours.get_vocab().items():
        if piece in theirs.get_vocab():
            assert torch.equal(second[index], table[theirs.get_vocab()[piece]])
            continue
        found += 1
        parts = theirs.convert_tokens_to_ids(theirs.tokenize(piece.removeprefix("##")))
        torch.testing.assert_close(second[index], table[parts].mean(0))
    assert found == 3
    # A copy: training one leaves the other alone.
    before = table.detach().clone()
    second.data += 1
    assert torch.equal(teacher.table, before)


def test_without_the_students_vocabulary_the_teacher_is_the_encoder() -> None:
    model = encoder()
    teacher, inputs = teacher_of(model), batch(mixing=0.0)
    found = teacher(inputs["teacher_input_ids"], inputs["teacher_attention_mask"], inputs["teacher_vocabulary"])
    mask = inputs["teacher_attention_mask"]
    plain = model(inputs["teacher_input_ids"], attention_mask=mask, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(found, plain.hidden_states[1:], strict=True))
    assert torch.equal(found[-1], plain.last_hidden_state)
    # And a piece of the student's vocabulary is looked up in the second table.
    other = torch.full_like(inputs["teacher_vocabulary"], STUDENT)
    ids = inputs["teacher_input_ids"].clamp(max=STUDENT_SIZE - 1)
    model.set_input_embeddings(teacher.student_embeddings)
    assert torch.equal(teacher(ids, mask, other)[-1], model(ids, attention_mask=mask).last_hidden_state)


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_each_masked_piece_is_predicted_over_its_own_vocabulary(mixing: float) -> None:
    teacher, inputs = teacher_of(), batch(mixing=mixing)
    torch.nn.init.normal_(teacher.bias)
    torch.nn.init.normal_(teacher.student_bias)
    labels, vocabulary = inputs["teacher_labels"], inputs["teacher_vocabulary"]
    hidden = torch.randn(*labels.shape, 16)
    expected, counts = torch.zeros(()), [0, 0]
    for row, column in (labels != IGNORED).nonzero().tolist():
        which = int(vocabulary[row, column])
        table, bias = (
            (teacher.student_embeddings.weight, teacher.student_bias) if which else (teacher.table, teacher.bias)
        )
        logits = teacher.head(hidden[row, column]) @ table.T + bias
        expected = expected - logits.log_softmax(-1)[labels[row, column]]
        counts[which] += 1
    assert [count > 0 for count in counts] == [mixing < 1, mixing > 0]
    torch.testing.assert_close(teacher.loss(hidden, labels, vocabulary), expected)


def test_heads_run_on_masked_pieces_alone() -> None:
    step, inputs = dual(), batch()
    seen: list[tuple[int, ...]] = []
    for head in (step.objective.student_head, step.objective.teacher.head):  # type: ignore[union-attr]
        head.register_forward_hook(lambda module, given, _: seen.append(tuple(given[0].shape)))
    step(**inputs)
    masked = inputs["teacher_labels"] != IGNORED
    of_student = inputs["teacher_vocabulary"] == STUDENT
    counts = [(inputs["labels"] != IGNORED).sum(), (masked & ~of_student).sum(), (masked & of_student).sum()]
    assert seen == [(int(count), width) for count, width in zip(counts, (8, 16, 16), strict=True)]


OF_DISTILBERT: dict[str, Any] = {
    "vocab_size": TEACHER,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**SIZES, hidden_act="relu"),
        DistilBertConfig(**OF_DISTILBERT, initializer_range=0.2, activation="relu"),
        # Its layers have another activation than its head.
        ElectraConfig(**SIZES, embedding_size=12, hidden_act="relu"),
    ],
    ids=lambda config: config.model_type,
)
def test_the_head_of_a_masked_language_model_is_kept(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config).eval()
    # As they are made, norms and biases do nothing.
    for name, value in model.named_parameters():
        if value.dim() == 1:
            torch.nn.init.normal_(value, mean=float("norm" in name.lower()), std=0.5)
    inputs = batch(mixing=0.0)
    mask, labels = inputs["teacher_attention_mask"], inputs["teacher_labels"]
    expected = model(inputs["teacher_input_ids"], attention_mask=mask, labels=labels).loss
    teacher = teacher_of(model)
    assert not teacher.new_head and teacher_of(copy.deepcopy(model.base_model)).new_head
    hidden = teacher(inputs["teacher_input_ids"], mask, inputs["teacher_vocabulary"])[-1]
    loss = teacher.loss(hidden, labels, inputs["teacher_vocabulary"]) / (labels != IGNORED).sum()
    torch.testing.assert_close(loss, expected)


def test_a_new_head_is_seeded_and_leaves_the_random_state_alone() -> None:
    model = encoder()
    state = torch.random.get_rng_state()
    first, again, other = (teacher_of(model, seed=seed).head.dense.weight for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "config",
    [
        ElectraConfig(**SIZES | {"embedding_size": 12}),
        DistilBertConfig(**OF_DISTILBERT),
    ],
    ids=lambda config: config.model_type,
)
def test_other_encoders_of_the_family(config: Any) -> None:
    torch.manual_seed(0)
    teacher = teacher_of(AutoModel.from_config(config))
    for options in ({"direction": "down"}, {"direction": "up", "projected": "hidden_states"}):
        step = DualTraining(student_of(teacher), teacher, **options)  # type: ignore[arg-type]
        output = step(**batch())
        output.loss.backward()
        assert set(output.parts) == {"student", "teacher", "projection"} and output.loss.isfinite()


# ------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"direction": "down", "projection_weight": 0.7}, ["student", "teacher", "projection"]),
        ({"direction": "up", "reduction": "sum"}, ["student", "teacher", "projection"]),
        ({"direction": "down", "projected": "embeddings"}, ["student", "teacher", "projection"]),
        ({"direction": "up", "projected": "hidden_states"}, ["student", "teacher", "projection"]),
        ({}, ["student", "teacher"]),
        ({"teacher": None}, ["student"]),
    ],
)
def test_the_loss_is_the_weighted_sum_of_its_parts(options: dict[str, Any], names: list[str]) -> None:
    teacher = teacher_of()
    step = DualTraining(student_of(teacher), **{"teacher": teacher, **options})
    inputs = batch()
    output = step(**inputs)
    assert output.parts is not None and list(output.parts) == names == list(step.objective.names)
    weights = {"projection": options.get("projection_weight", 1.0)}
    total = sum(weights.get(name, 1.0) * value for name, value in output.parts.items())
    torch.testing.assert_close(output.loss.detach(), total)

    labels = inputs["labels"]
    hidden = step.student(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    head = step.objective.student_head(hidden)
    logits = head @ step.student.get_input_embeddings().weight.T + step.objective.student_bias
    torch.testing.assert_close(output.parts["student"], F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    if "teacher" in names:
        vocabulary, theirs = inputs["teacher_vocabulary"], inputs["teacher_labels"]
        states = teacher(inputs["teacher_input_ids"], inputs["teacher_attention_mask"], vocabulary)
        expected = teacher.loss(states[-1], theirs, vocabulary) / (theirs != IGNORED).sum()
        torch.testing.assert_close(output.parts["teacher"], expected)


@pytest.mark.parametrize("alone", [False, True])
def test_both_predict_the_next_sentence(alone: bool) -> None:
    teacher = teacher_of()
    step = DualTraining(student_of(teacher), None if alone else teacher, next_sentence=True)
    cut = Segmenter(teacher_tokenizer(), student_tokenizer(), max_length=32)
    rows = [{"text": text, "index": index} for index, text in enumerate([*SENTENCES, "alone"])]
    inputs = MixedVocabularyCollator(cut, next_sentence=True)(rows)
    kinds = inputs["next_sentence"]
    assert set(kinds.tolist()) == {0, 1, IGNORED}
    output = step(**inputs)
    parts = output.parts
    assert parts is not None
    sides = ["student"] if alone else ["student", "teacher"]
    assert list(parts) == list(step.objective.names) == [*sides, *(f"{side}_next" for side in sides)]
    torch.testing.assert_close(output.loss.detach(), sum(parts.values()))
    assert step.objective.count_items(inputs)[-1] == len(SENTENCES)

    types = {"attention_mask": inputs["attention_mask"], "token_type_ids": inputs["token_type_ids"]}
    hidden = {"student": step.student(inputs["input_ids"], **types).last_hidden_state}
    if not alone:
        hidden["teacher"] = teacher(
            *(inputs[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "vocabulary", "token_type_ids"))
        )[-1]
        # The types are read.
        blind = teacher(*(inputs[f"teacher_{name}"] for name in ("input_ids", "attention_mask", "vocabulary")))[-1]
        assert not torch.allclose(hidden["teacher"], blind)
    for side, states in hidden.items():
        head: Any = step.objective.next_sentence_heads[side]
        logits = head.classes(torch.tanh(head.dense(states[:, 0])))
        torch.testing.assert_close(parts[f"{side}_next"], F.cross_entropy(logits, kinds).detach())
    output.loss.backward()
    assert all(value.grad is not None for value in step.objective.next_sentence_heads.parameters())


def test_next_sentences_need_token_types() -> None:
    teacher = teacher_of(AutoModel.from_config(DistilBertConfig(**OF_DISTILBERT)))
    with pytest.raises(ValueError, match="next_sentence: distilbert does not tell two texts of a row apart"):
        DualTraining(student_of(teacher), teacher, next_sentence=True)


def test_matched_parameters_are_everything_but_poolers_heads_and_the_teachers_own_table() -> None:
    step = dual(direction="down")
    teacher = step.objective.teacher
    assert teacher is not None
    ours, theirs = step.objective.matched_parameters()
    assert ours.keys() == theirs.keys()
    assert set(dict(step.student.named_parameters())) - set(ours) == {"pooler.dense.weight", "pooler.dense.bias"}
    # The parameters themselves, not copies.
    assert all(ours[name] is value for name, value in step.student.named_parameters() if name in ours)
    table = "embeddings.word_embeddings.weight"
    assert theirs[table] is teacher.student_embeddings.weight
    encoder = dict(teacher.encoder.named_parameters())
    assert all(theirs[name] is encoder[name] for name in theirs if name != table)
    projections = step.objective.projections
    assert projections is not None
    # Tables on the right only: their rows are pieces, positions and types on both sides.
    assert set(projections.matrices) == {"left_8_16", "left_16_32", "right_16_8", "right_32_16"}
    expected = shared_projection_loss(
        list(ours.values()),
        list(theirs.values()),
        [projections.pair(name) for name in ours],
        "down",
        reduction="sum",
    )
    torch.testing.assert_close(step(**batch()).parts["projection"], expected.detach())

    without = dual(direction="down", project_embeddings=False, project_norms=False).objective.matched_parameters()[0]
    assert {name for name in ours if name not in without} == {
        name for name in ours if name == table or "LayerNorm" in name
    }
    tables = dual(direction="up", projected="embeddings").objective.matched_parameters()[0]
    assert set(tables) == {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}


@pytest.mark.parametrize(("direction", "reduction"), [("down", "mean"), ("up", "mean"), ("down", "sum")])
def test_hidden_states_are_compared_word_by_word(direction: Any, reduction: str) -> None:
    step, inputs = dual(direction=direction, projected="hidden_states", reduction=reduction), batch()
    # A word that only one side has does not count.
    inputs["word_ids"][0][inputs["word_ids"][0] == 2] = -1
    objective, (right,) = step.objective, step.objective.projections.matrices.values()  # type: ignore[union-attr]
    mask = inputs["attention_mask"]
    student = step.student(inputs["input_ids"], attention_mask=mask, output_hidden_states=True).hidden_states[1:]
    teacher = objective.teacher(  # type: ignore[misc]
        inputs["teacher_input_ids"], inputs["teacher_attention_mask"], inputs["teacher_vocabulary"]
    )
    expected, words = torch.zeros(()), 0
    for row, (ours, theirs) in enumerate(zip(inputs["word_ids"], inputs["teacher_word_ids"], strict=True)):
        for word in sorted((set(ours.tolist()) & set(theirs.tolist())) - {-1}):
            words += 1
            for layer in range(2):
                s = student[layer][row][ours == word].mean(0)
                t = teacher[layer][row][theirs == word].mean(0)
                difference = t @ right - s if direction == "down" else t - s @ right
                squares = difference.square()
                expected = expected + (squares.mean() if reduction == "mean" else squares.sum())
    of_teacher = int((inputs["teacher_word_ids"].max(1).values + 1).sum())
    assert objective.count_items(inputs).tolist()[2] == words == of_teacher - 1
    torch.testing.assert_close(step(**inputs).parts["projection"], expected.detach() / words)


def test_a_batch_without_words_costs_nothing_and_keeps_the_graph() -> None:
    cut = Segmenter(teacher_tokenizer(), student_tokenizer(), max_length=32)
    step = dual(direction="down", projected="hidden_states")
    output = step(**MixedVocabularyCollator(cut)([{"text": ""}, {"text": " "}]))
    output.loss.backward()
    assert output.loss == 0 and all(value == 0 for value in output.parts.values())
    for name, value in step.objective.named_parameters():
        assert "pooler" in name or (value.grad is not None and not value.grad.any()), name


@pytest.mark.parametrize(
    "options", [{"direction": "down"}, {"direction": "up", "projected": "hidden_states"}, {"teacher": None}]
)
def test_everything_that_trains_gets_a_gradient(options: dict[str, Any]) -> None:
    teacher = teacher_of()
    step = DualTraining(student_of(teacher), **{"teacher": teacher, **options})
    frozen = step.freeze_unreachable({name: value for name, value in batch().items() if name != "labels"})
    assert frozen == ["pooler.dense.weight", "pooler.dense.bias"]
    # Also where every word of the teacher's row is its own: data parallelism would wait for the rest.
    for mixing in (0.5, 0.0):
        step.zero_grad(set_to_none=True)
        step(**batch(mixing=mixing)).loss.backward()
        missing = [name for name, value in step.named_parameters() if value.requires_grad and value.grad is None]
        assert not missing
    assert {name.split(".")[0] for name, _ in step.named_parameters()} == {"student", "objective"}


def test_a_projection_reaches_both_models() -> None:
    for projected in ("parameters", "hidden_states", "embeddings"):
        step = dual(direction="down", projected=projected)
        inputs = batch()
        for side in ("labels", "teacher_labels"):
            inputs[side] = torch.full_like(inputs[side], IGNORED)  # nothing but the projection
        step(**inputs).loss.backward()
        student, teacher = step.student, step.objective.teacher
        assert teacher is not None and step.objective.projections is not None
        tables = [student.get_input_embeddings().weight, teacher.student_embeddings.weight]
        assert all(bool(value.grad.any()) for value in [*tables, *step.objective.projections.parameters()])  # type: ignore[union-attr]


def test_a_frozen_encoder_keeps_its_layers() -> None:
    teacher = teacher_of(freeze_encoder=True)
    trained = {name for name, value in teacher.named_parameters() if value.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"encoder", "student_embeddings", "head", "bias", "student_bias"}
    assert [name for name in trained if name.startswith("encoder.")] == ["encoder.embeddings.word_embeddings.weight"]
    assert any(value.requires_grad for name, value in teacher_of().named_parameters() if "encoder.layer" in name)


@pytest.mark.parametrize("options", [{"direction": "down"}, {"direction": "down", "projected": "hidden_states"}])
def test_micro_batches_add_up_to_one_batch(options: dict[str, Any]) -> None:
    step = dual(**options)
    whole = batch()
    halves = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 2), slice(2, 6))]
    step(**whole).loss.backward()
    expected = {name: value.grad.clone() for name, value in step.named_parameters() if value.grad is not None}
    step.zero_grad()
    items = torch.stack([step.objective.count_items(half) for half in halves]).sum(0)
    for half in halves:
        step(**half, num_items_in_batch=items).loss.backward()
    for name, value in step.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(value.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_the_student_alone_learns_what_it_would_learn_beside_an_untied_teacher() -> None:
    teacher = teacher_of()
    alone, beside = (DualTraining(student_of(teacher), given) for given in (None, teacher))
    for step in (alone, beside):
        step(**batch()).loss.backward()
    found = {name: value.grad for name, value in beside.student.named_parameters() if value.grad is not None}
    assert len(found) > 30
    for name, value in alone.student.named_parameters():
        assert (value.grad is None and name not in found) or torch.equal(value.grad, found[name]), name  # type: ignore[arg-type]


# ------------------------------------------------------------------------- training


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def trainer(folder: Path, skipped: int = 0, *callbacks: Any, **options: Any) -> DistillationTrainer:
    cut = Segmenter(teacher_tokenizer(), student_tokenizer(), max_length=32)
    rows = Corpus(SENTENCES, student_tokenizer(), max_length=32, packing="texts", shuffle_buffer=5)
    arguments = TrainingArguments(
        str(folder),
        max_steps=8,
        save_steps=3,
        logging_steps=4,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        weight_decay=0.1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    return DistillationTrainer(
        dual(dropout=0.1, **{"direction": "down", **options}),
        arguments,
        train_dataset=rows.seen(skipped),  # type: ignore[arg-type]
        processing_class=student_tokenizer(),
        data_collator=MixedVocabularyCollator(cut),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("options", [{}, {"projected": "hidden_states", "direction": "up"}])
def test_training_resumed_is_bit_identical(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    trainer(tmp_path / "cut", 0, _Stop(5), **options).train()
    resumed = trainer(tmp_path / "cut", 3 * 6, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    for (name, one), (_, other) in zip(
        whole.distiller.named_parameters(), resumed.distiller.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    # Teacher, student and projections have moved.
    fresh = dict(dual(dropout=0.1, **{"direction": "down", **options}).named_parameters())
    still = {name for name, value in whole.distiller.named_parameters() if torch.equal(value, fresh[name])}
    assert all("pooler" in name for name in still)
    logged = [entry for entry in whole.state.log_history if "loss_student" in entry]
    assert len(logged) == 2 and {"loss_teacher", "loss_projection"} < logged[0].keys()
    total = sum(logged[-1][f"loss_{name}"] for name in ("student", "teacher", "projection"))
    assert logged[-1]["loss"] == pytest.approx(total, rel=1e-3)


def test_checkpoints_hold_the_student_alone(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    folder = tmp_path / "checkpoint-8"
    state = load_file(folder / "model.safetensors")
    assert state.keys() == run.distiller.student.state_dict().keys()
    beside = load_file(folder / OBJECTIVE_WEIGHTS)
    assert {name.split(".")[0] for name in beside} == {"teacher", "student_head", "student_bias", "projections"}

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    inputs = tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")
    assert dict(inputs).keys() == {"input_ids", "token_type_ids", "attention_mask"}
    expected = run.distiller.student.eval()(**inputs).last_hidden_state
    assert torch.equal(model(**inputs).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert classifier(**inputs).logits.shape == (2, 3)
    classifier(**inputs, labels=torch.tensor([0, 2])).loss.backward()


def test_projections_know_no_weight_decay(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    groups = run.create_optimizer().param_groups
    names = {id(value): name for name, value in run.distiller.named_parameters()}
    decayed, free = ({names[id(value)] for value in group["params"]} for group in groups)
    assert groups[0]["weight_decay"] == 0.1 and groups[1]["weight_decay"] == 0
    projections = {name for name in names.values() if "projections" in name}
    assert projections and projections <= free
    assert "student.encoder.layer.0.output.dense.weight" in decayed and "objective.student_bias" in free


def test_evaluation_is_of_the_whole_objective(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    rows = [{"text": text, "index": index} for index, text in enumerate(SENTENCES)]
    found = run.evaluate(rows)["eval_loss"]  # type: ignore[arg-type]
    assert found == run.evaluate(rows)["eval_loss"] and found > 0  # type: ignore[arg-type]
    assert isinstance(run.distiller, Distiller)


@pytest.mark.parametrize("options", [{"direction": "down"}, {"projected": "hidden_states", "direction": "up"}])
def test_held_out_losses_are_means_over_all_items(options: dict[str, Any]) -> None:
    step, whole = dual(dropout=0.5, **options), batch()
    halves = [{name: value[rows] for name, value in whole.items()} for rows in (slice(0, 2), slice(2, 6))]
    step.train()
    found = held_out_losses(step, halves)
    assert step.training and found == held_out_losses(step, halves)
    parts = step.eval()(**whole).parts
    assert found == pytest.approx({name: value.item() for name, value in parts.items()}, rel=1e-5)
    with pytest.raises(ValueError, match="batches must hold at least one, got none"):
        held_out_losses(step, [])


# ------------------------------------------------------------------------- refusals


def test_what_is_refused() -> None:
    teacher = teacher_of()
    student = student_of(teacher)
    for options, rule in (
        ({"direction": "down", "teacher": None}, "direction 'down' projects between two models; pass a teacher"),
        ({"projected": "logits"}, "projected must be one of parameters, embeddings, hidden_states, got 'logits'"),
        ({"projection_weight": -1}, "projection_weight must not be negative, got -1"),
        ({"projected": "hidden_states", "reduction": "max"}, "reduction must be one of mean, sum, got 'max'"),
        ({"direction": "left"}, "direction must be one of down, up, got 'left'"),
    ):
        with pytest.raises(ValueError, match=rule):
            DualTraining(student, **{"teacher": teacher, **options})  # type: ignore[arg-type]
    shallow = make_student(teacher.encoder, BertConfig(**SIZES | {"num_hidden_layers": 1, "vocab_size": 90}))
    with pytest.raises(ValueError, match="the student must have the teacher's .* bert with 1 and bert with 2; build"):
        DualTraining(shallow, teacher)
    other = make_student(teacher.encoder, BertConfig(**SIZES))
    with pytest.raises(ValueError, match="student has 171 embeddings, the teacher's second table 90"):
        DualTraining(other, teacher)
    with pytest.raises(ValueError, match="the model has 100 embeddings, the tokenizer 171 pieces"):
        teacher_of(encoder(vocab_size=100))
    assert copy.deepcopy(DualTraining(student, teacher, direction="up"))(**batch()).loss.isfinite()


def test_what_was_trained_before_may_learn_more_slowly(tmp_path: Path) -> None:
    teacher = teacher_of(learning_rate_scale=0.1)
    step = DualTraining(student_of(teacher), teacher, direction="down")
    arguments = TrainingArguments(
        str(tmp_path), learning_rate=1e-2, weight_decay=0.5, max_steps=2, report_to="none", use_cpu=True
    )
    trainer = DistillationTrainer(step, arguments, data_collator=lambda rows: rows)
    names = {id(parameter): name for name, parameter in step.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert set(found) == {name for name, parameter in step.named_parameters() if parameter.requires_grad}
    slow = ("objective.teacher.encoder.", "objective.teacher.student_embeddings.")
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(1e-3 if name.startswith(slow) else 1e-2), name
        exempt = "projections" in name or name.endswith("bias") or "norm" in name.lower()
        assert decay == (0.0 if exempt else 0.5), name
    assert trainer.create_optimizer().param_groups is groups  # and only once
    with pytest.raises(ValueError, match="learning_rate_scale must be positive, got 0"):
        teacher_of(learning_rate_scale=0)
