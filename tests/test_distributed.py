# SPDX-License-Identifier: Apache-2.0
"""Several processes: the same losses and weights as one process that sees the same rows, whatever happens to them."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.train import STEPS, Case, student_at_start, train
from processes import ChildError, launch
from safetensors.torch import load_file
from torch import Tensor

from pydistill.trainer import last_checkpoint

pytestmark = pytest.mark.slow

# Steps of eight rows each. 13 rows: the second step of a pass has five, the last of which is all that one process has
# of its last micro-batch, and another has none.
WHOLE = {
    "all": Case("", "all"),
    "relations": Case("", "relations"),
    "all, uneven": Case("", "all", rows=13),
    "relations, uneven": Case("", "relations", rows=13),
}

REFUSED = [
    (Case("", options={"fsdp": True}), "fsdp: accelerate shards on GPUs and other accelerators alone, .* uses cpu"),
    (
        Case("", fsdp=True, options={"fsdp_config": {"transformer_layer_cls_to_wrap": ["BertLayer"]}}),
        r"reshard_after_forward must be false .* \(keys@-1, queries@-1, values@-1\), got true",
    ),
    (Case("", options={"accelerator_config": {"even_batches": False}}), "even_batches must be true, got false"),
]


def launch_cases(processes: int, cases: list[Case]) -> None:
    """Run the cases one after the other, in the same processes."""
    launch(processes, "distributed.train", json.dumps([asdict(case) for case in cases]))


def results(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    return torch.load(folder / "weights.pt"), json.loads((folder / "log.json").read_text())


def checkpoint(folder: Path) -> str:
    return str(folder / "checkpoints" / "checkpoint-3")


def check_same(found: Path, expected: Path) -> None:
    """The same weights, losses and parts of them, on the way and in the evaluation."""
    (weights, log), (expected_weights, expected_log) = results(found), results(expected)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
    assert sum("loss" in entry for entry in log) == STEPS and any("eval_loss" in entry for entry in log)
    for mine, theirs in zip(log, expected_log, strict=True):
        losses = {name for name in theirs if name.startswith(("loss", "eval_loss"))}
        assert {name: mine[name] for name in losses} == pytest.approx({name: theirs[name] for name in losses}, rel=1e-5)


def check_resumed(found: Path, expected: Path) -> None:
    """The same weights; the log holds the steps of both."""
    weights, log = results(found)
    for name, value in results(expected)[0].items():
        torch.testing.assert_close(weights[name], value, rtol=1e-5, atol=1e-5)
    assert sum("loss" in entry for entry in log) == STEPS


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of the cases, with checkpoints on the way."""
    folder = tmp_path_factory.mktemp("alone")
    for name, case in WHOLE.items():
        train(replace(case, folder=str(folder / name), save_steps=3))
    return folder


@pytest.fixture(scope="module")
def two(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of them."""
    folder = tmp_path_factory.mktemp("two")
    cases = [
        replace(case, folder=str(folder / name), batch=2, accumulation=2, save_steps=3, folder_each=name == "all")
        for name, case in WHOLE.items()
    ]
    cases[1].evaluates = True
    uneven = cases[2]
    cases += [
        # What one process began, two go on with, in the middle of a pass.
        replace(uneven, folder=str(folder / "resumed"), resume=checkpoint(alone / "all, uneven")),
        replace(uneven, folder=str(folder / "sharded"), fsdp=True),
        replace(uneven, folder=str(folder / "sharded, resumed"), fsdp=True, resume=checkpoint(folder / "sharded")),
        replace(cases[1], folder=str(folder / "sharded relations"), fsdp=True, evaluates=False),
        *(replace(case, folder=str(folder / f"refused {number}")) for number, (case, _) in enumerate(REFUSED)),
        # The last, which ends them all.
        replace(uneven, folder=str(folder / "died"), dies=4),
    ]
    with pytest.raises(ChildError, match="SIGKILL") as caught:
        launch_cases(2, cases)
    (folder / "died.json").write_text(json.dumps([cases[-1].folder, str(caught.value), time.time()]))
    return folder


def test_it_goes_somewhere(alone):
    start = student_at_start().state_dict()
    for name in WHOLE:
        weights, _ = results(alone / name)
        assert any((weights[f"student.{key}"] - value).abs().max() > 1e-2 for key, value in start.items())


@pytest.mark.parametrize("name", WHOLE)
def test_two_processes_share_a_batch(alone, two, name):
    """Every term has its own denominator, that of all processes; rows that one of them has to repeat do not count."""
    check_same(two / name, alone / name)


def test_one_process_continues_what_two_began(alone, two, tmp_path):
    """In the middle of a pass, the last step of which is uneven."""
    train(replace(WHOLE["all, uneven"], folder=str(tmp_path), resume=checkpoint(two / "all, uneven")))
    check_resumed(tmp_path, alone / "all, uneven")


def test_two_processes_continue_what_one_began(alone, two):
    check_resumed(two / "resumed", alone / "all, uneven")


def test_a_step_of_another_size_is_not_continued(two, tmp_path):
    message = r"checkpoint-3 had 8 rows, and has 4 now, 1 \(processes\) x 2 .* x 2 .*: make them 8"
    with pytest.raises(ValueError, match=message):
        train(Case(str(tmp_path), batch=2, accumulation=2, resume=checkpoint(two / "relations")))


def test_sharding_changes_nothing(alone, two):
    """FSDP2, layer by layer, of terms that read the inside of one, of a student a part of which is frozen."""
    check_same(two / "sharded", alone / "all, uneven")
    check_same(two / "sharded relations", alone / "relations")
    check_resumed(two / "sharded, resumed", alone / "all, uneven")


def test_a_checkpoint_is_the_students_and_one_process_writes_it(two):
    first, second = (two / "all" / f"checkpoints-of-{rank}" / "checkpoint-3" for rank in (0, 1))
    assert {path.name for path in second.parent.rglob("*") if path.is_file()} == {"rng_state_1.pth"}
    assert "trainer_state.json" in {path.name for path in first.iterdir()}
    for folder in (first, Path(checkpoint(two / "sharded"))):
        assert load_file(folder / "model.safetensors").keys() == student_at_start().state_dict().keys()
        assert all(name.startswith("terms.") for name in load_file(folder / "objective.safetensors"))
    # What FSDP resumes from.
    state = torch.load(Path(checkpoint(two / "sharded")) / "pytorch_model_fsdp.bin")
    assert all(name.startswith(("student.", "objective.")) for name in state)


def test_four_processes(alone, tmp_path):
    """One of them has no row in the last step of a pass."""
    names = ["relations", "all, uneven"]
    cases = [replace(WHOLE[name], folder=str(tmp_path / name), batch=2) for name in names]
    cases.append(replace(cases[1], folder=str(tmp_path / "sharded"), fsdp=True))
    launch_cases(4, cases)
    for name in names:
        check_same(tmp_path / name, alone / name)
    check_same(tmp_path / "sharded", alone / "all, uneven")


def test_a_process_that_dies_ends_all(alone, two, tmp_path):
    """At once, by its name, and the last checkpoint is a whole one."""
    died, message, end = json.loads((two / "died.json").read_text())
    assert re.search(r"rank +: 1 \(.*\n +exitcode +: -9 .*SIGKILL", message), message
    found = last_checkpoint(Path(died) / "checkpoints")
    assert found is not None and found.name == "checkpoint-3"
    # The others would wait for half an hour.
    assert end - (found / "trainer_state.json").stat().st_mtime < 120
    assert not (Path(died) / "weights.pt").exists()
    train(replace(WHOLE["all, uneven"], folder=str(tmp_path), resume=str(found)))
    check_resumed(tmp_path, alone / "all, uneven")


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_what_cannot_be_shared_is_refused(two, number):
    assert re.search(REFUSED[number][1], (two / f"refused {number}" / "refused.txt").read_text())
