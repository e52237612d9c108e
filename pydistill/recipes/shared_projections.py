# SPDX-License-Identifier: Apache-2.0
"""Zhao et al. 2019 (arXiv 1909.11687v1): a tiny vocabulary, dual training, projections between the weights.

Stages, each in a folder that appears under its name only when it is complete: ``vocabulary/``, trained on the corpus;
then ``students/ARM/`` for each arm that is compared. A run that was interrupted goes on where it stopped, in mid-pass
over the corpus too.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from pydistill import _dispatch
from pydistill.config import Distinct, OneOrMore, Section, resolve_path
from pydistill.data.corpus import TextSource, corpus_texts, load_corpus
from pydistill.data.mixed_vocab import MixedVocabularyCollator, Mixing, Segmenter, count_words, example
from pydistill.data.vocabulary import SIZE, check_wordpiece, train_vocabulary
from pydistill.inference import ModelError, load_tokenizer
from pydistill.losses.shared_projection import Direction
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
    teacher_tokenizer,
)
from pydistill.recipes.costs import costs_of, how_speed_is_measured
from pydistill.recipes.pretraining import (
    ROWS_PER_BATCH,
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
    rows_per_step,
    rows_until,
    seconds_per_step,
    stream_arguments,
)
from pydistill.recipes.shared_projections_report import SEGMENTATION_FILE, page
from pydistill.recipes.stages import WORK, Stages, attach_progress, checkpoint_in, once, open_output, say
from pydistill.report import METRICS_FILE, REPORT_FILE, write_text
from pydistill.students.encoder import make_student, smaller_config
from pydistill.students.mixed_vocab import (
    HEADS,
    DualTraining,
    MixedVocabularyTeacher,
    held_out_losses,
    second_table,
    student_config,
)
from pydistill.trainer import DistillationTrainer

Arm = Literal["no_kd", "dual", "down", "up"]
OWN_PICTURES = ("comparison.png", "curves.png", "segmentation.png")
OWN_ENTRIES = (
    *("vocabulary", "students", WORK, METRICS_FILE, SEGMENTATION_FILE, REPORT_FILE, CONFIG_FILE, DATA_FILE),
    *OWN_PICTURES,
)
# Texts that time a finished model.
TIMED_TEXTS = {"teacher": 100, "student": 400}
# Rows that time how fast words are cut and masked.
TIMED_ROWS = 512
# The paper's first figure shows this sentence.
PICTURE_TEXT = "I like machine learning"


class TeacherSection(Section):
    """The encoder that teaches, and trains along: a hub name, a folder, or ``package:NAME/FOLDER`` of a package."""

    model: str
    tokenizer: str | None = Field(None, description="when it is not in the model's folder")
    freeze_encoder: bool = Field(False, description="train only tables, head and biases, so that it cannot move")
    learning_rate: float | None = Field(
        None, gt=0, description="of its encoder and tables, which were trained before; absent: the student's"
    )

    @model_validator(mode="before")
    @classmethod
    def _no_cache(cls, keys: Any) -> Any:
        if isinstance(keys, dict) and keys.get("cache") is not None:
            raise ValueError("cache: this teacher trains along, so that its signals change at every step; drop the key")
        return keys


class VocabularySection(Section):
    """The student's vocabulary."""

    size: int | None = Field(None, gt=0, description=f"pieces, trained on the corpus; absent: {SIZE:,}")
    folder: str | None = Field(None, description="a tokenizer of `pydistill vocab` instead")

    @model_validator(mode="after")
    def _one_of_two(self) -> VocabularySection:
        if self.size is not None and self.folder is not None:
            raise ValueError("give size, to train a vocabulary, or folder, to take one; not both")
        return self


class StudentSection(Section):
    """An encoder of the teacher's architecture and depth; what is left out keeps the teacher's ratio."""

    hidden_size: int = Field(96, gt=0)
    heads: int | None = Field(None, gt=0, description="absent: the teacher's")
    intermediate_size: int | None = Field(None, gt=0, description="absent: the teacher's ratio to the hidden size")
    initialization: Literal["random", "svd"] = Field(
        "random", description="svd: the teacher's weights in a subspace of its states, as it reads the student's pieces"
    )


class MixingSection(Section):
    """How often a word of the teacher's row is cut by the student's vocabulary, and how many words are masked."""

    start: float = Field(0.5, ge=0, le=1, description="probability at the first step")
    end: float | None = Field(None, ge=0, le=1, description="probability that it moves to; absent: it stays")
    steps: int | None = Field(None, gt=0, description="until the end is reached; absent: all of them")
    masking: float = Field(0.15, gt=0, le=1, description="probability that a word is masked")

    @model_validator(mode="after")
    def _moves_somewhere(self) -> MixingSection:
        if self.steps is not None and self.end is None:
            raise ValueError("steps says when end is reached: give end, too")
        return self


class ObjectiveSection(Section):
    """``L = L_student + L_teacher + projection_weight * L_projection``, see ``DualTraining``."""

    projected: Literal["parameters", "hidden_states"] = Field(
        "parameters", description="what down and up project: every weight (the paper), or each layer's output by word"
    )
    projection_weight: float = Field(1.0, ge=0)
    project_embeddings: bool = Field(True, description="the student's table of pieces and the teacher's second table")
    project_norms: bool = Field(True, description="weights and biases of LayerNorms")
    reduction: Literal["mean", "sum"] = Field(
        "sum", description="of the squares of each weight, or of each word's states"
    )
    next_sentence: bool = Field(False, description="both also predict whether two halves of a text belong together")

    @model_validator(mode="after")
    def _chooses_among_weights(self) -> ObjectiveSection:
        if self.projected == "hidden_states" and not (self.project_embeddings and self.project_norms):
            raise ValueError("project_embeddings and project_norms choose among parameters: leave them out")
        return self


class PictureSection(Section):
    """The picture of how teacher and student read a sentence."""

    sentence: str = Field(PICTURE_TEXT, min_length=1)


class SharedProjectionsConfig(CorpusRun):
    """The recipe ``shared-projections``."""

    teacher: TeacherSection
    vocabulary: VocabularySection = Field(default_factory=VocabularySection)
    student: StudentSection = Field(default_factory=StudentSection)
    arms: Annotated[OneOrMore[Arm], Distinct] = Field(
        ["down"],
        min_length=1,
        description="no_kd: the student alone; dual: the tables of embeddings projected; down, up: everything",
    )
    mixing: MixingSection = Field(default_factory=MixingSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    evaluation_corpus: TextSource | None = Field(None, description="losses are measured on its first texts")
    picture: PictureSection = Field(default_factory=PictureSection)

    @model_validator(mode="after")
    def _fits_together(self) -> SharedProjectionsConfig:
        if self.corpus.packing != "truncate":
            raise ValueError("corpus.packing must be truncate: each row is one text, cut in two ways")
        if "dual" in self.arms and not self.objective.project_embeddings:
            raise ValueError("the arm dual ties the tables of embeddings: objective.project_embeddings must be true")
        if self.evaluation_corpus is None and not self.corpus.held_out:
            raise ValueError("losses need texts: give corpus.held_out, or an evaluation_corpus")
        return self


@dataclass
class SharedProjectionsPlan(PlanBase):
    """A run that can start: the teacher, its tokenizer, and the student's where there is one already."""

    config: SharedProjectionsConfig
    teacher: str
    teacher_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    student_tokenizer: PreTrainedTokenizerBase | None


# --------------------------------------------------------------------------- plan


def plan_shared_projections(
    config: SharedProjectionsConfig, *, resume: bool, overwrite: bool, dry_run: bool
) -> SharedProjectionsPlan:
    """Check everything that can be checked without working, and say what the run will do.

    Raises:
        PlanError: listing every reason: an output folder that holds another run, a teacher or texts that cannot be
            read, a tokenizer that is not WordPiece, vocabularies that do not fit together, sizes that the architecture
            does not allow, texts longer than the model's limit, training arguments that contradict each other.
    """
    problems: list[str] = []
    output = Path(config.output).expanduser()
    sources = {
        "teacher.model": config.teacher.model,
        "teacher.tokenizer": config.teacher.tokenizer,
        "vocabulary.folder": config.vocabulary.folder,
    }
    if config.evaluation_corpus is not None:
        sources |= {f"evaluation_corpus.files ({name})": name for name in config.evaluation_corpus.files or ()}
    collect(problems, check_output, config, output, resume, overwrite, sources | corpus_sources(config))
    problems += refused_arguments({"train": config.train})
    problems += check_steps(config.train, "an arm")
    problems += check_workers(config.train, "train")
    teacher = collect(problems, resolve_model, config.teacher.model, "teacher.model")
    model_config = collect(problems, load_model_config, teacher) if teacher is not None else None
    tokenizer = student_tokenizer = None
    if model_config is not None:
        tokenizer = collect(problems, teacher_tokenizer, config.teacher.tokenizer, teacher)
        problems += check_length(config, config.teacher.model, model_config, tokenizer)
        if config.objective.next_sentence and getattr(model_config, "type_vocab_size", 0) < 2:
            problems.append(
                f"objective.next_sentence: {model_config.model_type} does not tell two texts of a row apart; set it to "
                "false"
            )
        try:
            _narrower(config, model_config)
        except ValueError as error:
            problems.append(f"student: {error}")
    if tokenizer is not None and collect(problems, check_wordpiece, "teacher", tokenizer) is not None:
        student_tokenizer = collect(problems, _given_vocabulary, config)
        if student_tokenizer is not None:
            collect(problems, Segmenter, tokenizer, student_tokenizer)
        texts = collect(problems, first_texts, config.corpus, tokenizer)
        collect(problems, _evaluation_texts, config, tokenizer)
        if texts is not None and resume:
            collect(problems, check_same_corpus, config.corpus, output, texts)
    if problems or teacher is None or model_config is None or tokenizer is None:
        raise PlanError("\n".join(problems))

    result = SharedProjectionsPlan(
        config, output, teacher, model_config, tokenizer, student_tokenizer, resume=resume, overwrite=overwrite
    )
    _describe(result)
    if dry_run:
        with quiet():
            _dry_run(result)
    return result


def _narrower(config: SharedProjectionsConfig, teacher: PretrainedConfig) -> PretrainedConfig:
    section = config.student
    return smaller_config(
        teacher,
        hidden_size=section.hidden_size,
        num_attention_heads=section.heads,
        intermediate_size=section.intermediate_size,
    )


def _given_vocabulary(config: SharedProjectionsConfig) -> PreTrainedTokenizerBase | None:
    folder = config.vocabulary.folder
    if folder is None:
        return None
    try:
        tokenizer = load_tokenizer(resolve_path(folder))
    except ModelError as error:
        raise PlanError(
            f"vocabulary.folder: {error}; train one with pydistill vocab, or give vocabulary.size"
        ) from None
    check_wordpiece("student", tokenizer)
    return tokenizer


def _evaluation_texts(config: SharedProjectionsConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that losses are measured on."""
    if config.evaluation_corpus is None:
        return load_corpus(config.corpus, tokenizer, part="held_out").first_texts(config.evaluation_texts)
    return list(itertools.islice(corpus_texts(config.evaluation_corpus), config.evaluation_texts))


def _has_head(config: PretrainedConfig) -> bool:
    """Whether the teacher's weights hold a head for masked pieces that `MixedVocabularyTeacher` takes over."""
    return config.model_type in HEADS and _names_a_head(config)


def _names_a_head(config: PretrainedConfig) -> bool:
    # The head that ELECTRA was pretrained with tells replaced pieces.
    heads = ("ForMaskedLM",) if config.model_type == "electra" else ("ForMaskedLM", "ForPreTraining")
    return any(name.endswith(heads) for name in config.architectures or ())


def _describe(result: SharedProjectionsPlan) -> None:
    config, teacher = result.config, result.teacher_config
    describe_run(result, config.corpus)
    measured = config.evaluation_corpus
    where = "the held-out texts" if measured is None else measured.dataset or ", ".join(measured.files or ())
    result.add("corpus", "losses", f"of the first {config.evaluation_texts:,} texts, at most, of {where}")
    result.add("teacher", "model", config.teacher.model)
    result.add("teacher", "sizes", describe_sizes(teacher))
    if _has_head(teacher):
        head = "its own"
    elif _names_a_head(teacher):
        head = f"its own is not of a kind known here ({', '.join(HEADS)}): a new one is made, and trained along"
    else:
        head = "none that its configuration names: a new one is made, and trained along"
    result.add("teacher", "masked-piece head", head)
    training = "only tables, head and biases" if config.teacher.freeze_encoder else "everything, along with the student"
    rate = config.teacher.learning_rate
    pace = "" if rate is None else f"; learning_rate {rate:g} of encoder and tables"
    result.add("teacher", "training", f"{training}{pace}")
    mixing = config.mixing
    ramp = "" if mixing.end is None else f", to {mixing.end} in {_mixing_steps(config):,} steps"
    result.add("teacher", "mixing", f"a word is cut by the student's vocabulary with probability {mixing.start}{ramp}")
    if result.student_tokenizer is None:
        pieces = f"{config.vocabulary.size or SIZE:,} pieces, trained on the corpus"
    else:
        pieces = f"{len(result.student_tokenizer):,} pieces of {config.vocabulary.folder}"
    result.add("student", "vocabulary", pieces)
    result.add("student", "sizes", describe_sizes(_narrower(config, teacher)))
    result.add("student", "initialization", config.student.initialization)
    result.add("student", "arms", ", ".join(config.arms))
    term = config.objective
    predicted = f"{mixing.masking:.0%} of the words masked{', next sentence' if term.next_sentence else ''}"
    result.add("student", "training", f"{describe_block(config.train)}; {predicted}")
    if set(config.arms) - {"no_kd"}:
        left_out = "".join(
            f", without {what}"
            for what, there in (("tables of pieces", term.project_embeddings), ("LayerNorms", term.project_norms))
            if not there
        )
        result.add(
            "loss",
            "projections",
            f"of {term.projected.replace('_', ' ')}{left_out}, {term.reduction}, weight {term.projection_weight}",
        )
    describe_machine(result)


def _mixing_steps(config: SharedProjectionsConfig) -> int:
    return config.mixing.steps or config.train["max_steps"]


def _dry_run(result: SharedProjectionsPlan) -> None:
    """Take a few steps of the cheapest and of the dearest arm: their pace tells how long the run takes."""
    config = result.config
    # Where the student's vocabulary is yet to be trained, the teacher's stands for it: the rows are a bit shorter.
    vocabulary = result.student_tokenizer or result.tokenizer
    arms = sorted(config.arms, key=("no_kd", "dual", "up", "down").index)  # by what they cost
    seconds: dict[Arm, float] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for arm in dict.fromkeys((arms[0], arms[-1])):
        step = _dual_training(result, arm, vocabulary).to(device).train()
        if arm == arms[-1] and step.objective.teacher is not None:
            count = sum(tensor.numel() for tensor in step.objective.teacher.parameters())
            result.add("teacher", "parameters", f"{count:,}, with both tables")
        stream = iter(load_corpus(config.corpus, result.tokenizer, seed=config.seed, as_texts=True))
        collate = _collator(config, result.tokenizer, vocabulary)
        each = seconds_per_step(step, stream, collate, config.train)
        seconds[arm] = each * config.train["max_steps"]
        result.add("student", f"pace of {arm}", f"{each:.2f} s a step, about {duration(seconds[arm])} in all")
    if len(arms) > 1:
        total = sum(seconds.get(arm, seconds[arms[-1]]) for arm in arms)
        result.add("student", "all arms", f"at most about {duration(total)}")
    texts = [row["text"] for row in itertools.islice(stream, TIMED_ROWS)]
    start = time.process_time()
    batch = collate([{"text": text, "index": index} for index, text in enumerate(texts)])
    pace = count_words(batch) / (time.process_time() - start)
    result.add("machine", "rows", f"{pace:,.0f} words per second and core cut and masked")


# --------------------------------------------------------------------------- run


def run(plan: SharedProjectionsPlan) -> dict[str, Any]:
    """Carry out the plan and return its results, the content of ``metrics.json``."""
    with quiet():
        return _run(plan)


def _run(plan: SharedProjectionsPlan) -> dict[str, Any]:
    config = plan.config
    open_output(plan, OWN_ENTRIES)
    seen = fingerprint(config.corpus, first_texts(config.corpus, plan.tokenizer))
    once(lambda: write_text(plan.output / DATA_FILE, seen))
    stages = Stages(plan.output)
    vocabulary = plan.student_tokenizer or _vocabulary(plan, stages)
    trained = []
    for arm in config.arms:

        def make(folder: Path, arm: Arm = arm) -> int:
            return _train(plan, arm, vocabulary, folder, stages.scratch(f"students/{arm}"))

        folder = stages.build(f"students/{arm}", make, "train")
        trained.append({"name": arm} | json.loads((folder / TRAINING_FILE).read_text(encoding="utf-8")))
    say("[compare] teacher and students on the same texts")
    return once(lambda: _finish(plan, trained, vocabulary, stages))


def _finish(
    plan: SharedProjectionsPlan,
    trained: Sequence[Mapping[str, Any]],
    vocabulary: PreTrainedTokenizerBase,
    stages: Stages,
) -> dict[str, Any]:
    config = plan.config
    texts = _evaluation_texts(config, plan.tokenizer)
    results = {
        "recipe": config.recipe,
        "description": config.description,
        "evaluation_texts": len(texts),
        "models": _compare(plan, trained, vocabulary, texts),
        "stages": stages.done,
        "measured": (
            "Loss: cross-entropy of the masked pieces over the student's vocabulary, in nats; the same masks for all. "
            f"{how_speed_is_measured()} Texts of at most {config.timed_length} tokens. Without embeddings: "
            "everything but the embedding tables."
        ),
        "environment": _dispatch.environment(),
        "plan": str(plan),
    }
    shown = example(_segmenter(config, plan.tokenizer, vocabulary), config.picture.sentence)
    write_text(plan.output / SEGMENTATION_FILE, json.dumps(shown))
    finish(stages, results, page, "students")
    return results


def _vocabulary(plan: SharedProjectionsPlan, stages: Stages) -> PreTrainedTokenizerBase:
    config = plan.config

    def make(folder: Path) -> int:
        size = config.vocabulary.size or SIZE
        train_vocabulary(corpus_texts(config.corpus), plan.tokenizer, size=size).save_pretrained(folder)
        return size

    return load_tokenizer(stages.build("vocabulary", make, "find the pieces that the corpus is made of", alone=True))


def _segmenter(
    config: SharedProjectionsConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: PreTrainedTokenizerBase,
    rows: int = 0,
) -> Segmenter:
    """With ``rows`` of the stream per step the mixing moves as configured; without, it is what it ends with."""
    mixing = config.mixing
    if mixing.end is None:
        mixed = Mixing(mixing.start)
    elif rows:
        mixed = Mixing(mixing.start, mixing.end, _mixing_steps(config) * rows)
    else:
        mixed = Mixing(mixing.end)
    return Segmenter(
        tokenizer,
        vocabulary,
        max_length=config.corpus.max_length,
        mixing=mixed,
        masking=mixing.masking,
        seed=config.seed,
    )


def _collator(
    config: SharedProjectionsConfig,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: PreTrainedTokenizerBase,
    rows: int = 0,
) -> MixedVocabularyCollator:
    segmenter = _segmenter(config, tokenizer, vocabulary, rows)
    return MixedVocabularyCollator(segmenter, next_sentence=config.objective.next_sentence)


def _dual_training(plan: SharedProjectionsPlan, arm: Arm, vocabulary: PreTrainedTokenizerBase) -> DualTraining:
    """Teacher and student as an arm begins: the same student in each, from the same seed."""
    config, term = plan.config, plan.config.objective
    kind = AutoModelForMaskedLM if _has_head(plan.teacher_config) else AutoModel
    model = kind.from_pretrained(plan.teacher, dtype=torch.float32)
    section = config.student
    sizes = student_config(
        model.config,
        vocabulary,
        hidden_size=section.hidden_size,
        num_attention_heads=section.heads,
        intermediate_size=section.intermediate_size,
    )
    if section.initialization == "random":
        student = make_student(model, sizes, seed=config.seed)
    else:
        student = _from_the_teacher(plan, model, sizes, vocabulary)
    if arm == "no_kd":
        return DualTraining(student, next_sentence=term.next_sentence, seed=config.seed)
    rate = config.train.get("learning_rate", TrainingArguments.learning_rate)
    teacher = MixedVocabularyTeacher(
        model,
        plan.tokenizer,
        vocabulary,
        freeze_encoder=config.teacher.freeze_encoder,
        learning_rate_scale=(config.teacher.learning_rate or rate) / rate if rate else 1.0,
        seed=config.seed,
    )
    directions: dict[Arm, Direction] = {"dual": "down", "down": "down", "up": "up"}
    return DualTraining(
        student,
        teacher,
        direction=directions[arm],
        projected="embeddings" if arm == "dual" else term.projected,
        projection_weight=term.projection_weight,
        project_embeddings=term.project_embeddings,
        project_norms=term.project_norms,
        reduction=term.reduction,
        next_sentence=term.next_sentence,
        seed=config.seed,
    )


def _from_the_teacher(
    plan: SharedProjectionsPlan, model: PreTrainedModel, sizes: PretrainedConfig, vocabulary: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The student made of the teacher's weights, see `make_student`, of a teacher that reads the student's pieces."""
    config = plan.config
    reader = cast(PreTrainedModel, copy.deepcopy(model.base_model))
    own = cast(nn.Embedding, reader.get_input_embeddings())
    table = second_table(own.weight.detach(), plan.tokenizer, vocabulary)
    reader.set_input_embeddings(nn.Embedding.from_pretrained(table))
    texts = load_corpus(config.corpus, vocabulary).first_texts(config.sample_tokens // 2)
    return make_student(
        reader,
        sizes,
        initialization="svd",
        layers=range(sizes.num_hidden_layers),
        sample=first_tokens(texts, vocabulary, config.sample_tokens, config.corpus.max_length),
        seed=config.seed,
    )


def _train(
    plan: SharedProjectionsPlan, arm: Arm, vocabulary: PreTrainedTokenizerBase, folder: Path, scratch: Path
) -> int:
    config = plan.config
    arguments = stream_arguments(config.train, scratch, config.seed)
    stream = load_corpus(config.corpus, plan.tokenizer, seed=config.seed, as_texts=True)
    checkpoint = checkpoint_in(scratch)
    if checkpoint is not None:
        stream = stream.seen(rows_until(checkpoint, arguments))
    step = _dual_training(plan, arm, vocabulary)
    texts = _evaluation_texts(config, plan.tokenizer)
    trainer = DistillationTrainer(
        step,
        arguments,
        train_dataset=stream,
        eval_dataset=[{"text": text, "index": index} for index, text in enumerate(texts)],
        processing_class=vocabulary,
        data_collator=_collator(config, plan.tokenizer, vocabulary, rows_per_step(arguments)),
    )
    attach_progress(trainer, "loss")

    def measure() -> dict[str, float]:
        return held_out_losses(step, _evaluation_batches(plan, vocabulary, texts))

    before_file = scratch / "before.json"
    if checkpoint is None:
        once(lambda: write_text(before_file, json.dumps(measure())))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - start
    # The trainer has put its autocast around the step, and both losses are taken in float32.
    trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
    step.student.save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    before, after = json.loads(before_file.read_text(encoding="utf-8")), once(measure)
    record = {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "loss_before": before["student"],
        "loss_after": after["student"],
        "parts_before": before,
        "parts_after": after,
        "curve": [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry],
    }
    write_text(folder / TRAINING_FILE, json.dumps(record))
    return trainer.state.global_step


def _evaluation_batches(
    plan: SharedProjectionsPlan, vocabulary: PreTrainedTokenizerBase, texts: Sequence[str]
) -> Iterator[Mapping[str, Tensor]]:
    collate = _collator(plan.config, plan.tokenizer, vocabulary)
    for start in range(0, len(texts), ROWS_PER_BATCH):
        rows = enumerate(texts[start : start + ROWS_PER_BATCH], start)
        yield collate([{"text": text, "index": index} for index, text in rows])


def _compare(
    plan: SharedProjectionsPlan,
    trained: Sequence[Mapping[str, Any]],
    vocabulary: PreTrainedTokenizerBase,
    texts: Sequence[str],
) -> list[dict[str, Any]]:
    """Return what teacher and students are and cost."""
    config = plan.config
    rows = [(text,) for text in texts]

    def entry(kind: str, source: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        model: PreTrainedModel = AutoModel.from_pretrained(source, dtype=torch.float32)
        return {
            "layers": model.config.num_hidden_layers,
            "hidden_size": model.config.hidden_size,
            "vocabulary": len(tokenizer),
        } | costs_of(model, tokenizer, Path(source), rows, config.timed_length, TIMED_TEXTS[kind])

    teacher = {"name": "teacher", "source": config.teacher.model} | entry("teacher", plan.teacher, plan.tokenizer)
    students = [
        dict(record) | entry("student", str(plan.output / "students" / record["name"]), vocabulary)
        for record in trained
    ]
    return [teacher, *students]
