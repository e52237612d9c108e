# SPDX-License-Identifier: Apache-2.0
"""MiniLM (arXiv 2002.10957) and MiniLMv2 (2012.15828): a small encoder learns its teacher's attention relations.

One or two stages, each in a folder that appears under its name only when it is complete: ``assistant/`` (all layers, a
small hidden size) learns from the teacher, ``student/`` from the assistant, or from the teacher where there is none. A
run that was interrupted goes on where it stopped, in mid-pass over the corpus too.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from pydantic import Field
from torch import Tensor
from transformers import (
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)

from pydistill import AttentionRelation, _dispatch
from pydistill.cache import CachedTeacher, TeacherCache
from pydistill.config import OneOrMore, Section, TrainBlock
from pydistill.data.corpus import Corpus, PackedCollator, load_corpus
from pydistill.distiller import Distiller
from pydistill.packing import check_packing, first_position
from pydistill.plan import (
    CONFIG_FILE,
    DATA_FILE,
    PlanBase,
    PlanError,
    check_output,
    collect,
    duration,
    load_model_config,
    quiet,
    refused_arguments,
    resolve_model,
    teacher_dtype,
    teacher_tokenizer,
)
from pydistill.recipes.costs import costs_of, how_speed_is_measured
from pydistill.recipes.minilm_report import RELATIONS_FILE, page
from pydistill.recipes.pretraining import (
    TRAINING_FILE,
    CorpusRun,
    check_length,
    check_same_corpus,
    check_steps,
    check_workers,
    corpus_sources,
    describe_block,
    describe_machine,
    describe_run,
    describe_sizes,
    fingerprint,
    finish,
    first_texts,
    first_tokens,
    rows_until,
    seconds_per_step,
    stream_arguments,
)
from pydistill.recipes.stages import WORK, Stages, attach_progress, checkpoint_in, once, open_output, say
from pydistill.relations import relation_matrices, token_labels
from pydistill.report import METRICS_FILE, REPORT_FILE, write_text
from pydistill.students.encoder import make_student, smaller_config, spaced_layers
from pydistill.teachers import OnlineTeacher, Teacher
from pydistill.trainer import DistillationCollator, DistillationTrainer

STAGES = ("assistant", "student")
OWN_PICTURES = ("comparison.png", "curves.png", "relations.png")
OWN_ENTRIES = (*STAGES, WORK, METRICS_FILE, RELATIONS_FILE, REPORT_FILE, CONFIG_FILE, DATA_FILE, *OWN_PICTURES)
# Texts that time a finished model.
TIMED_TEXTS = {"teacher": 100, "assistant": 200, "student": 400}
# Tokens of the text whose relations are drawn: fewer show little, and more cannot be labelled.
PICTURE_TOKENS = (10, 24)
# Drawn where no text is held out: "it" may attend to the cat, the dog or the tree.
PICTURE_TEXT = "The cat that the dog had chased climbed the old tree because it was afraid."


class TeacherSection(Section):
    """The encoder that is distilled: a hub name, a folder, or ``package:NAME/FOLDER`` of an installed package."""

    model: str
    tokenizer: str | None = Field(None, description="when it is not in the model's folder")
    layer: int = Field(
        -1, description="whose relations are learnt; -1: the last. MiniLMv2 reads 21 of 24 (BERT) or 19 of 24 (RoBERTa)"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="arithmetic of its forward; auto: bfloat16 where the machine computes it"
    )
    cache: str | None = Field(
        None, description="folder of `pydistill cache` with its signals for the corpus, instead of running it"
    )


class EncoderSection(Section):
    """A smaller configuration of the teacher's architecture; what is left out is the teacher's."""

    layers: int | None = Field(None, gt=0)
    hidden_size: int | None = Field(None, gt=0)
    heads: int | None = Field(None, gt=0)
    intermediate_size: int | None = Field(None, gt=0, description="absent: the teacher's ratio to the hidden size")
    initialization: Literal["random", "layers", "svd"] = Field(
        "random", description="layers: copied, sizes equal; svd: the teacher's weights in a subspace of its states"
    )
    copy_layers: list[int] | None = Field(
        None,
        description="the teacher's layers that the student's start from; absent: evenly spaced up to teacher.layer",
    )
    train: TrainBlock = Field(default_factory=dict, description="TrainingArguments of this stage alone")


class ObjectiveSection(Section):
    """``sum_r weight_r KL(teacher relation r || student relation r)``, see ``AttentionRelation``."""

    relations: OneOrMore[str] = Field(["qk", "vv"], min_length=1, description="two letters of q, k and v each")
    relation_weights: OneOrMore[float] | None = Field(None, description="one for each relation; absent: 1")
    relation_heads: int | None = Field(
        None, gt=0, description="split queries, keys and values anew, as MiniLMv2 does; absent: the attention heads"
    )
    student_layer: int = -1
    reduction: Literal["sequence_mean", "token_mean"] = "sequence_mean"


class PictureSection(Section):
    """The picture of the attention relations of teacher and student for one text."""

    sentence: str | None = Field(
        None, min_length=1, description="cut to 24 tokens; absent: a short held-out text, or a built-in one"
    )
    heads: OneOrMore[int] | None = Field(
        None, min_length=1, description="relation heads from 0, each drawn by itself; absent: the mean over all heads"
    )


class MiniLMConfig(CorpusRun):
    """The recipe ``minilm``."""

    teacher: TeacherSection
    assistant: EncoderSection | None = Field(None, description="learns from the teacher first, and teaches the student")
    student: EncoderSection = Field(default_factory=EncoderSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    picture: PictureSection = Field(default_factory=PictureSection)


@dataclass
class MiniLMPlan(PlanBase):
    """A run that can start: the teacher, and the configurations of the encoders that it will make."""

    config: MiniLMConfig
    teacher: str
    tokenizer: PreTrainedTokenizerBase
    encoders: dict[str, PretrainedConfig]  # by stage, in order
    dtype: torch.dtype


# --------------------------------------------------------------------------- plan


def plan_minilm(config: MiniLMConfig, *, resume: bool, overwrite: bool, dry_run: bool) -> MiniLMPlan:
    """Check everything that can be checked without working, and say what the run will do.

    Raises:
        PlanError: listing every reason: an output folder that holds another run, a teacher or a corpus that cannot be
            read, sizes that the architecture, the initialisation or the relation heads do not allow, texts longer than
            the model's limit, training arguments that contradict each other.
    """
    problems: list[str] = []
    output = Path(config.output).expanduser()
    teaching = ("model", "tokenizer", "cache")
    sources = {f"teacher.{name}": getattr(config.teacher, name) for name in teaching} | corpus_sources(config)
    collect(problems, check_output, config, output, resume, overwrite, sources)
    blocks = {name: _block(config, name) for name in _stages(config)}
    problems += refused_arguments({f"train ({name})": block for name, block in blocks.items()})
    for name, block in blocks.items():
        problems += check_steps(block, f"the stage {name}")
        problems += check_workers(block, f"train ({name})")
    teacher = collect(problems, resolve_model, config.teacher.model, "teacher.model")
    model_config = collect(problems, load_model_config, teacher) if teacher is not None else None
    tokenizer = None
    encoders: dict[str, PretrainedConfig] = {}
    if model_config is not None:
        tokenizer = collect(problems, teacher_tokenizer, config.teacher.tokenizer, teacher)
        problems += check_length(config, config.teacher.model, model_config, tokenizer)
        encoders, found = _encoders(config, model_config)
        problems += found
        heads = config.objective.relation_heads or model_config.num_attention_heads
        problems += [
            f"picture.heads: must be from 0 to {heads - 1}, the relation heads, got {head}"
            for head in config.picture.heads or ()
            if not 0 <= head < heads
        ]
    texts = None
    if tokenizer is not None:
        texts = collect(problems, first_texts, config.corpus, tokenizer)
        if texts is not None and resume:
            collect(problems, check_same_corpus, config.corpus, output, texts)
    if config.teacher.cache is not None:
        collect(problems, _check_cache, config)
    if problems or teacher is None or model_config is None or tokenizer is None:
        raise PlanError("\n".join(problems))

    dtype = teacher_dtype(config.teacher.dtype)
    result = MiniLMPlan(config, output, teacher, tokenizer, encoders, dtype, resume=resume, overwrite=overwrite)
    _describe(result, model_config)
    if dry_run:
        with quiet():
            _dry_run(result)
    return result


def _check_cache(config: MiniLMConfig) -> None:
    assert config.teacher.cache is not None
    if config.corpus.packing != "truncate":
        raise PlanError("teacher.cache: holds texts one by one: set corpus.packing to truncate, or drop the cache")
    if config.teacher.dtype != "float32" and config.assistant is None:
        raise PlanError(
            "teacher.dtype: is for a teacher that runs, and pydistill cache ran it in float32; got "
            f"{config.teacher.dtype} with teacher.cache: leave one of them out"
        )
    try:
        CachedTeacher(TeacherCache(config.teacher.cache)).check(_term(config, config.teacher.layer).teacher_signals)
    except ValueError as error:
        raise PlanError(f"teacher.cache: {error}") from None


def _stages(config: MiniLMConfig) -> list[str]:
    return [name for name in STAGES if getattr(config, name) is not None]


def _block(config: MiniLMConfig, stage: str) -> dict[str, Any]:
    section: EncoderSection = getattr(config, stage)
    return config.train | section.train


def _encoders(config: MiniLMConfig, teacher: PretrainedConfig) -> tuple[dict[str, PretrainedConfig], list[str]]:
    """Return the configuration of each stage's encoder, and what is wrong with them."""
    encoders: dict[str, PretrainedConfig] = {}
    problems: list[str] = []
    source, source_layer = teacher, config.teacher.layer
    count = teacher.num_hidden_layers
    if not -count <= source_layer < count:
        return {}, [f"teacher.layer: must be from {-count} to {count - 1}, got {source_layer}"]
    for stage in _stages(config):
        section: EncoderSection = getattr(config, stage)
        try:
            made = smaller_config(
                source,
                num_hidden_layers=section.layers,
                hidden_size=section.hidden_size,
                num_attention_heads=section.heads,
                intermediate_size=section.intermediate_size,
            )
            if section.initialization != "random" and section.copy_layers is None:
                spaced_layers(_depth(source, source_layer), made.num_hidden_layers)
        except ValueError as error:
            return encoders, [*problems, f"{stage}: {error}"]
        heads = config.objective.relation_heads
        for name, one in ((stage, made), ("teacher", source)):
            if heads is not None and one.hidden_size % heads:
                problems.append(
                    f"objective.relation_heads: must divide the hidden size {one.hidden_size} of {name}, got {heads}"
                )
        if heads is None and made.num_attention_heads != source.num_attention_heads:
            problems.append(
                f"{stage}.heads: the teacher has {source.num_attention_heads} attention heads and the {stage} "
                f"{made.num_attention_heads}: make them equal, or set objective.relation_heads to a divisor of both "
                "hidden sizes"
            )
        layer = config.objective.student_layer
        if not -made.num_hidden_layers <= layer < made.num_hidden_layers:
            problems.append(f"objective.student_layer: {stage} has {made.num_hidden_layers} layers, got {layer}")
        encoders[stage] = made
        source, source_layer = made, layer
    return encoders, problems


def _depth(config: PretrainedConfig, layer: int) -> int:
    """How many layers lie up to and including ``layer``."""
    return (layer if layer >= 0 else config.num_hidden_layers + layer) + 1


def _describe(result: MiniLMPlan, teacher: PretrainedConfig) -> None:
    config = result.config
    describe_run(result, config.corpus)
    result.add("teacher", "model", config.teacher.model)
    result.add("teacher", "sizes", describe_sizes(teacher))
    result.add("teacher", "layer", f"{_depth(teacher, config.teacher.layer)} of {teacher.num_hidden_layers}")
    if result.config.teacher.cache is not None:
        result.add("teacher", "signals", f"from the cache {result.config.teacher.cache}")
    result.add("teacher", "arithmetic", str(result.dtype).removeprefix("torch."))
    for stage, made in result.encoders.items():
        result.add(stage, "sizes", describe_sizes(made))
        result.add(stage, "initialization", getattr(config, stage).initialization)
        result.add(stage, "training", describe_block(_block(config, stage)))
    student = result.encoders["student"]
    halved = (
        2 * student.num_hidden_layers <= teacher.num_hidden_layers and 2 * student.hidden_size <= teacher.hidden_size
    )
    if halved and config.assistant is None:
        result.add(
            "student",
            "note",
            "at most half the teacher's layers and hidden size: the paper uses an assistant here, e.g. "
            f"--assistant.hidden_size {student.hidden_size}",
        )
    term = config.objective
    heads = "the attention heads" if term.relation_heads is None else f"{term.relation_heads} relation heads"
    result.add("loss", "relations", f"{', '.join(term.relations)}; {heads}; student layer {term.student_layer}")
    describe_machine(result, "attention_relation")


def _dry_run(result: MiniLMPlan) -> None:
    """Train a throw-away student of the last stage on a few batches: its pace tells how long the stage takes."""
    config = result.config
    teacher = AutoModel.from_pretrained(result.teacher, dtype=result.dtype)
    student = make_student(teacher, result.encoders["student"])
    if config.corpus.packing == "packed":
        for key, model in (("teacher.model", teacher), ("student", student)):
            try:
                check_packing(model)
            except ValueError as error:
                raise PlanError(f"{key}: {error}") from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result.add("teacher", "parameters", f"{sum(tensor.numel() for tensor in teacher.parameters()):,}")
    result.add("student", "parameters", f"{sum(tensor.numel() for tensor in student.parameters()):,}")
    # With an assistant between, the student's stage is cheaper than this, and the assistant's dearer.
    block = _block(config, "student")
    stream = iter(load_corpus(config.corpus, result.tokenizer, seed=config.seed))
    collate = _collator(config, result.tokenizer, student)
    distiller = Distiller(student, OnlineTeacher(teacher), _term(config, config.teacher.layer)).to(device)
    pace = seconds_per_step(distiller, stream, collate, block)
    result.add("student", "pace", f"{pace:.2f} s a step, about {duration(pace * block['max_steps'])} in all")


# --------------------------------------------------------------------------- run


def run(plan: MiniLMPlan) -> dict[str, Any]:
    """Carry out the plan and return its results, the content of ``metrics.json``."""
    with quiet():
        return _run(plan)


def _run(plan: MiniLMPlan) -> dict[str, Any]:
    config = plan.config
    open_output(plan, OWN_ENTRIES)
    seen = fingerprint(config.corpus, first_texts(config.corpus, plan.tokenizer))
    once(lambda: write_text(plan.output / DATA_FILE, seen))
    stages = Stages(plan.output)
    source, layer, named = plan.teacher, config.teacher.layer, config.teacher.model
    models: list[dict[str, Any]] = []
    for stage in plan.encoders:

        def make(folder: Path, stage: str = stage, source: str = source, layer: int = layer) -> int:
            return _distil(plan, stage, source, layer, folder, stages.scratch(stage))

        folder = stages.build(stage, make, f"learn from {named}, layer {layer}")
        models.append({"name": stage} | json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8")))
        source, layer, named = str(folder), config.objective.student_layer, f"the {stage}"
    for model in models:
        model["loss_to_teacher"] = _loss_to_teacher(plan, model)
    say("[compare] teacher and students on the same texts")
    return once(lambda: _finish(plan, models, stages))


def _finish(plan: MiniLMPlan, models: Sequence[Mapping[str, Any]], stages: Stages) -> dict[str, Any]:
    config = plan.config
    compared, maps = _compare(plan, models)
    results = {
        "recipe": config.recipe,
        "description": config.description,
        "objective": config.objective.model_dump(mode="json"),
        "evaluation_texts": _count_evaluation_rows(config, plan.tokenizer),
        "models": compared,
        "stages": stages.done,
        "measured": (
            f"{how_speed_is_measured()} Texts of at most {config.timed_length} tokens. "
            "Without embeddings: everything but the embedding tables."
        ),
        "environment": _dispatch.environment(),
        "plan": str(plan),
    }
    write_text(plan.output / RELATIONS_FILE, json.dumps(maps))
    finish(stages, results, page, "student")
    return results


def _compare(plan: MiniLMPlan, trained: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return what teacher and students are and cost, and the attention relations of each for one text."""
    config = plan.config
    stream = load_corpus(config.corpus, plan.tokenizer, seed=config.seed)
    teacher = AutoModel.from_pretrained(plan.teacher, dtype=torch.float32)
    texts = _texts_to_look_at(config, plan.tokenizer)
    rows = [(text,) for text in texts]
    inputs, picture = _picture_text(config, plan.tokenizer, texts)
    teacher_layer, student_layer = config.teacher.layer, config.objective.student_layer

    def relations(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
        return relation_matrices(
            model, inputs, config.objective.relations, layer=layer, relation_heads=config.objective.relation_heads
        )

    def entry(name: str, model: PreTrainedModel, source: str) -> dict[str, Any]:
        sizes = {
            "layers": model.config.num_hidden_layers,
            "hidden_size": model.config.hidden_size,
            "heads": model.config.num_attention_heads,
        }
        costs = costs_of(model, plan.tokenizer, Path(source), rows, config.timed_length, TIMED_TEXTS[name])
        return {"name": name} | sizes | costs

    truth = relations(teacher, teacher_layer)
    drawn = [_drawn("teacher", truth, truth, config.picture.heads)]
    depth = _depth(teacher.config, teacher_layer)
    models = [entry("teacher", teacher, plan.teacher) | {"source": config.teacher.model, "layer": depth}]
    source, layer = teacher, teacher_layer
    for record in trained:
        stage = record["name"]
        folder = plan.output / stage
        student = AutoModel.from_pretrained(folder, dtype=torch.float32)
        if stage == "student":
            # As it was before its training: made again, from the same seed.
            untrained = _new_student(plan, config.student, stage, source, layer, stream)
            start = relations(untrained, student_layer)
            drawn.append(_drawn("student, at the start", start, truth, config.picture.heads))
        drawn.append(_drawn(f"{stage}, distilled", relations(student, student_layer), truth, config.picture.heads))
        models.append(dict(record) | entry(stage, student, str(folder)))
        source, layer = student, student_layer
    return models, picture | {"heads": config.picture.heads, "head_count": _head_count(truth), "models": drawn}


def _head_count(matrices: Mapping[str, Tensor]) -> int:
    return next(iter(matrices.values())).size(0)


def _drawn(
    name: str, matrices: Mapping[str, Tensor], truth: Mapping[str, Tensor], heads: Sequence[int] | None
) -> dict[str, Any]:
    """Return what the picture shows of one model: by relation, its matrices and its divergence from the teacher."""

    def divergence(p: Tensor, q: Tensor) -> float:
        smallest = torch.finfo(q.dtype).tiny  # an underflown probability would make the sum infinite
        return float((torch.xlogy(p, p) - torch.xlogy(p, q.clamp(min=smallest))).sum(-1).mean())

    def chosen(matrix: Tensor) -> list[Tensor]:
        return [matrix.mean(0)] if heads is None else [matrix[head] for head in heads]

    return {
        "name": name,
        "divergence": {relation: divergence(truth[relation], matrix) for relation, matrix in matrices.items()},
        "matrices": {
            relation: [[[round(value, 5) for value in row] for row in one.tolist()] for one in chosen(matrix)]
            for relation, matrix in matrices.items()
        },
    }


def _texts_to_look_at(config: MiniLMConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Held-out texts, or the first of the corpus where none are held out."""
    part: Literal["train", "held_out"] = "held_out" if config.corpus.held_out else "train"
    return load_corpus(config.corpus, tokenizer, part=part).first_texts(config.evaluation_texts)


def _picture_text(
    config: MiniLMConfig, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the inputs of the text whose relations are drawn, and its tokens."""
    fewest, most = PICTURE_TOKENS
    most = min(most, config.corpus.max_length)
    text = config.picture.sentence
    if text is None:
        lengths = map(len, tokenizer(list(texts))["input_ids"])
        fitting = (one for one, length in zip(texts, lengths, strict=True) if fewest <= length <= most)
        text = next(fitting, PICTURE_TEXT) if config.corpus.held_out else PICTURE_TEXT
    ids = tokenizer(text, truncation=True, max_length=most)["input_ids"]
    cut = len(tokenizer(text)["input_ids"]) > len(ids)
    tokens = {"text": text, "cut": cut, "tokens": token_labels(tokenizer, ids)}
    return {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}, tokens


def _count_evaluation_rows(config: MiniLMConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    rows = _evaluation_rows(config, tokenizer)
    return 0 if rows is None else len(rows)


def _loss_to_teacher(plan: MiniLMPlan, trained: Mapping[str, Any]) -> float | None:
    """The held-out loss against the teacher of the run, which an assistant may have stood between."""
    config = plan.config
    rows = _evaluation_rows(config, plan.tokenizer)
    if rows is None or trained["source"] == plan.teacher:
        return trained["loss_after"]
    teacher = AutoModel.from_pretrained(plan.teacher, dtype=torch.float32)
    student = AutoModel.from_pretrained(plan.output / trained["name"], dtype=torch.float32)
    trainer = DistillationTrainer(
        Distiller(student, OnlineTeacher(teacher), _term(config, config.teacher.layer)),
        stream_arguments(_block(config, "student") | {"eval_strategy": "no"}, plan.output / WORK, config.seed),
        eval_dataset=rows,
        processing_class=plan.tokenizer,
        data_collator=_collator(config, plan.tokenizer, student),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.evaluate()["eval_loss"]


def _distil(plan: MiniLMPlan, stage: str, source: str, layer: int, folder: Path, scratch: Path) -> int:
    config = plan.config
    section: EncoderSection = getattr(config, stage)
    teacher = AutoModel.from_pretrained(source, dtype=torch.float32)
    stream = load_corpus(config.corpus, plan.tokenizer, seed=config.seed)
    student = _new_student(plan, section, stage, teacher, layer, stream)
    arguments = stream_arguments(_block(config, stage), scratch, config.seed)
    checkpoint = checkpoint_in(scratch)
    signals: Teacher
    if config.teacher.cache is not None and source == plan.teacher:
        try:
            signals = CachedTeacher(TeacherCache(config.teacher.cache, model=teacher, tokenizer=plan.tokenizer))
        except ValueError as error:
            raise PlanError(f"teacher.cache: {error}") from None
    else:
        signals = OnlineTeacher(teacher, plan.dtype)
        if checkpoint is not None:
            # A cache wants the rows themselves, also those that are skipped.
            stream = stream.seen(rows_until(checkpoint, arguments))
    evaluation = _evaluation_rows(config, plan.tokenizer)
    if evaluation is None:
        arguments.eval_strategy = "no"
    trainer = DistillationTrainer(
        Distiller(student, signals, _term(config, layer)),
        arguments,
        train_dataset=stream,
        eval_dataset=evaluation,
        processing_class=plan.tokenizer,
        data_collator=_collator(config, plan.tokenizer, student),
    )
    attach_progress(trainer, "loss")
    before_file = scratch / "before.json"
    if checkpoint is None:
        before = trainer.evaluate()["eval_loss"] if evaluation is not None else None
        once(lambda: write_text(before_file, json.dumps(before)))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    after = trainer.evaluate()["eval_loss"] if evaluation is not None else None
    student.save_pretrained(folder)
    plan.tokenizer.save_pretrained(folder)
    record = {
        "source": source,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "loss_before": json.loads(before_file.read_text(encoding="utf-8")),
        "loss_after": after,
        "curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }
    write_text(folder / TRAINING_FILE, json.dumps(record))
    return trainer.state.global_step


def _new_student(
    plan: MiniLMPlan, section: EncoderSection, stage: str, teacher: PreTrainedModel, layer: int, stream: Corpus
) -> PreTrainedModel:
    made = plan.encoders[stage]
    layers = section.copy_layers
    sample: Mapping[str, Tensor] | None = None
    if section.initialization != "random" and layers is None:
        layers = spaced_layers(_depth(teacher.config, layer), made.num_hidden_layers)
    if section.initialization == "svd":
        # No text has fewer than two tokens.
        texts = stream.first_texts(plan.config.sample_tokens // 2)
        sample = first_tokens(texts, plan.tokenizer, plan.config.sample_tokens, plan.config.corpus.max_length)
    try:
        return make_student(
            teacher,
            made,
            initialization=section.initialization,
            layers=layers,
            sample=sample,
            seed=plan.config.seed,
        )
    except ValueError as error:
        raise PlanError(f"{stage}.initialization: {error}") from None


def _term(config: MiniLMConfig, teacher_layer: int) -> AttentionRelation:
    return AttentionRelation(teacher_layer=teacher_layer, **config.objective.model_dump())


def _collator(config: MiniLMConfig, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel) -> Any:
    if config.corpus.packing == "packed":
        return PackedCollator(int(tokenizer.pad_token_id), first_position(student))
    return DistillationCollator(tokenizer)


def _evaluation_rows(config: MiniLMConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset | None:
    if not config.corpus.held_out:
        return None
    held_out = load_corpus(config.corpus, tokenizer, part="held_out")
    return Dataset.from_list(list(itertools.islice(held_out, config.evaluation_texts)))
