# SPDX-License-Identifier: Apache-2.0
"""The configuration: yaml, overrides, types, and errors that name file, key, rule and value."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pydistill.config import (
    RECIPES_FOLDER,
    AugmentSection,
    ConfigError,
    find_recipe,
    known_keys,
    load_config,
    parse_overrides,
    resolve_path,
)
from pydistill.data.augment import AugmentConfig

MINIMUM = {"recipe": "bilstm", "output": "runs/x", "data.train": "train.tsv", "teacher.model": "some/model"}


def load(**overrides: Any) -> Any:
    return load_config(None, MINIMUM | {key.replace("__", "."): value for key, value in overrides.items()})


def complaint(path: Path | None = None, **overrides: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, MINIMUM | {key.replace("__", "."): value for key, value in overrides.items()})
    return str(caught.value)


def test_words_of_the_command_line_become_typed_values() -> None:
    words = "--seeds 1 2 3 --train.learning_rate 1e-3 --data.labels=bad --data.dev null --train.bf16 true".split()
    config = load_config(
        None, MINIMUM | parse_overrides([*words, "--student.hidden-size", "8", "--augment.p_mask=0.2"])
    )
    assert config.seeds == [1, 2, 3]
    assert config.train == {"learning_rate": 0.001, "bf16": True}
    assert config.data.labels == ["bad"]
    assert config.data.dev is None
    assert config.student.hidden_size == 8
    assert config.augment.p_mask == 0.2


def test_negative_values_and_yaml_values() -> None:
    assert parse_overrides(["--train.max_steps", "-1"]) == {"train.max_steps": "-1"}
    assert parse_overrides(["--data.filter", "{source: rt}"]) == {"data.filter": {"source": "rt"}}


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["stray"], "expected --key value, got 'stray'"),
        (["--seeds"], "--seeds: needs a value"),
        (["--seeds", "1", "--seeds", "2"], "--seeds: is given twice"),
        (["--data.filter", "{source"], "is not valid yaml"),
    ],
)
def test_malformed_command_line_is_refused(words: list[str], rule: str) -> None:
    with pytest.raises(ConfigError, match="command line") as caught:
        parse_overrides(words)
    assert rule in str(caught.value)


def test_rows_are_a_number_or_a_share() -> None:
    assert load(data__dev_rows="500").data.dev_rows == 500
    assert isinstance(load(data__dev_rows="500").data.dev_rows, int)
    assert load(data__dev_rows="0.25").data.dev_rows == 0.25
    assert "share below 1" in complaint(data__dev_rows="1.5")


def test_saved_yaml_is_complete_and_loads_to_an_equal_configuration(tmp_path: Path) -> None:
    config = load(
        seeds=["3", "4"], train__learning_rate="0.5", teacher__fine_tune__max_steps="7", data__labels=["a", "b"]
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert set(yaml.safe_load(config.to_yaml())) == set(type(config).model_fields)


def test_errors_name_file_key_rule_and_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("student: {hidden_size: wide}\naugment: {p_pos: 2}\n")
    lines = complaint(path).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{path}: student.hidden_size: input should be a valid integer") and "'wide'" in lines[0]
    assert lines[1].startswith(f"{path}: augment.p_pos: input should be less than or equal to 1") and "2" in lines[1]


def test_override_is_blamed_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("student: {hidden_size: 3}\n")
    assert complaint(path, student__hidden_size="x").startswith("command line: --student.hidden_size: ")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("data__trian", "data.train"),
        ("learning_rate", "train.learning_rate"),
        ("train__learnin_rate", "train.learning_rate"),
        ("teacher__fine_tune__max_stepz", "teacher.fine_tune.max_steps"),
        ("train_per_arm__hard__num_epochs", "train_per_arm.hard.num_train_epochs"),
        ("hidden_size", "student.hidden_size"),
        ("seed", "seeds"),
    ],
)
def test_unknown_key_lists_near_ones(key: str, near: str) -> None:
    message = complaint(**{key: "1"})
    assert "unknown key" in message and f"did you mean {near}" in message
    assert key.replace("__", ".") in message


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        ({"train__output_dir": "x"}, "is set by the run from output"),
        ({"train__learning_rate": "fast"}, "valid number"),
        ({"train__eval_strategy": "sometimes"}, "'no', 'steps' or 'epoch'"),
        ({"objective__temperature": "2"}, "temperature must be 1, got 2"),
        ({"augment__p_mask": "0.7", "augment__p_pos": "0.7"}, "p_mask + p_pos must be at most 1"),
        ({"arms": ["hard", "soft"]}, "'hard', 'distilled' or 'augmented'"),
        ({"seeds": ["1", "1"]}, "must not repeat"),
        ({"data__text_columns": ["a", "b", "c"]}, "at most 2"),
        ({"train_per_arm__soft__max_steps": "1"}, "'hard', 'distilled' or 'augmented'"),
        ({"data__train__path": "x"}, "data.train is not a block of keys"),
    ],
)
def test_rules(overrides: dict[str, Any], rule: str) -> None:
    message = complaint(**overrides)
    assert rule in message and "got" in message


def test_missing_keys_are_named_down_to_the_leaf() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"recipe": "bilstm"})
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["output", "data.train", "teacher.model"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("a: [1", "is not valid yaml"),
        ("seeds: 1\nseeds: 2\n", "'seeds' is given twice"),
        ("- 1\n", "must hold a mapping"),
    ],
)
def test_bad_yaml_is_refused_with_its_place(tmp_path: Path, content: str, rule: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    message = complaint(path)
    assert message.startswith(str(path)) and rule in message


def test_augment_section_has_the_defaults_of_the_library() -> None:
    section = AugmentSection().model_dump(exclude={"workers"})
    assert AugmentConfig(**section) == AugmentConfig()
    assert set(section) == set(AugmentConfig.__dataclass_fields__) - {"mask_token"}


@pytest.mark.parametrize("path", sorted(RECIPES_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_built_in_recipes_are_valid(path: Path) -> None:
    given = yaml.safe_load(path.read_text())
    taught = {"output": "runs/x", "teacher.model": "some/model"}
    needed = {
        "bilstm": taught | {"data.train": "texts.tsv"},
        "minilm": taught | {"corpus.files": "texts.tsv"},
        "shared-projections": taught | {"corpus.files": "texts.tsv"},
        "mtdnn": {"output": "x", "encoder.model": "m", "tasks.a.data.train": "a.tsv", "tasks.a.train_teachers": 1},
    }[given["recipe"]]
    if "output" in given:  # complete as it stands
        needed = {}
    config = load_config(path, needed)
    assert config.description and config.recipe == path.stem.removesuffix("-demo")


def test_unknown_recipe_lists_the_names() -> None:
    with pytest.raises(ConfigError, match=r"did you mean bilstm.*bilstm, bilstm-demo"):
        find_recipe("bilsm")


def test_package_sources() -> None:
    assert resolve_path("package:pydistill/recipes/bilstm.yaml") == RECIPES_FOLDER / "bilstm.yaml"
    with pytest.raises(ConfigError, match=r"no_such_pkg is not installed; run: pip install .*no-such-pkg"):
        resolve_path("package:no_such_pkg/data.csv")
    with pytest.raises(ConfigError, match="holds no recipes/nothing"):
        resolve_path("package:pydistill/recipes/nothing")


def test_every_documented_key_exists() -> None:
    keys = known_keys()
    assert {"seeds", "data.train", "teacher.fine_tune", "student.vectors", "augment.n_iter", "train"} <= set(keys)
    assert len(keys) == len(set(keys))


def test_import_is_light() -> None:
    code = "import sys, pydistill.config; sys.exit(any(name in sys.modules for name in ('transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
