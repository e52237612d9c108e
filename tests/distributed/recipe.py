# SPDX-License-Identifier: Apache-2.0
"""Runs recipes in as many processes as there are, each interrupted in its first training and continued:

torchrun --nproc-per-node N -m distributed.recipe FOLDER CONFIGURATIONS_AS_JSON
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pydistill.config import load_config
from pydistill.recipes import run
from pydistill.trainer import DistillationTrainer

STEP = 5


class Interruption(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEP:
            raise KeyboardInterrupt


@contextmanager
def interrupted() -> Any:
    """The trainings that begin in here end early."""
    train = DistillationTrainer.train

    def begin(self: Any, *arguments: Any, **options: Any) -> Any:
        self.add_callback(Interruption())
        return train(self, *arguments, **options)

    DistillationTrainer.train = begin  # type: ignore[method-assign]
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        DistillationTrainer.train = train  # type: ignore[method-assign]


def main(folder: Path, configurations: list[dict[str, Any]]) -> None:
    torch.distributed.init_process_group("gloo")
    for keys in configurations:
        output = folder / keys["recipe"] / "together"
        config = load_config(None, keys | {"output": str(output)})
        with interrupted():
            run(config)
        results = run(config, resume=True)
        (output.parent / f"results-of-{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
