# SPDX-License-Identifier: Apache-2.0
"""Several processes: the same losses and weights as one process that sees the same rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import train
from processes import in_a_new_process
from torch import Tensor


def results(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    logs = json.loads((folder / "log.json").read_text())
    return torch.load(folder / "weights.pt"), [entry for entry in logs if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "processes", "batch", "accumulation"), [("all", 2, 2, 2), ("relations", 4, 2, 1)]
)
def test_processes_share_a_batch(tmp_path, objective, processes, batch, accumulation):
    """Five steps on eight rows each, of many lengths: every term has its own denominator, that of all processes."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    alone.mkdir()
    together.mkdir()
    train.main(alone, objective, 8, 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [str(together), objective, str(batch), str(accumulation)]
    # What the name of this machine stands for is nobody's business here.
    interface = "lo" if sys.platform == "linux" else "lo0"
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
    in_a_new_process([*launcher, "-m", "distributed.train", *arguments], **environment)
    expected, expected_log = results(alone)
    found, found_log = results(together)
    assert expected.keys() == found.keys()
    start = train.student_at_start().state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
    # It went somewhere.
    assert any((expected[f"student.{name}"] - value).abs().max() > 1e-2 for name, value in start.items())
    assert len(found_log) == len(expected_log) == train.STEPS
    for mine, theirs in zip(found_log, expected_log, strict=True):
        parts = [name for name in theirs if name.startswith("loss")]
        assert {name: mine[name] for name in parts} == pytest.approx({name: theirs[name] for name in parts}, rel=1e-5)
