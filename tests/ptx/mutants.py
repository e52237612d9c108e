# SPDX-License-Identifier: Apache-2.0
"""How much would be noticed if a kernel were wrong? Its real PTX is broken one instruction at a time.

A mutant is caught when the interpreter objects to it or when what it leaves in memory differs from what the kernel left by
more than a numerics test would let pass. One that survives is either equivalent to the kernel (a wait that waits for
nothing, a bound that no shape reaches) or a hole in the tests.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ptx.memory import Snapshot
from ptx.parser import Instruction, Program, PtxError


class Launch(Protocol):
    """What `triton_device` and `cuda_device` record."""

    name: str
    before: Snapshot | None
    steps: int

    @property
    def program(self) -> Program: ...

    @property
    def tensors(self) -> Sequence[Tensor]: ...

    def execute(self, program: Program | None = None, max_steps: int = ...) -> None: ...


@dataclass(frozen=True)
class Mutant:
    kind: str
    position: int
    instruction: Instruction | None  # in its place, none where it is left out


@dataclass
class Score:
    """What became of the mutants of a kernel."""

    kernel: str
    caught: dict[str, int] = field(default_factory=dict)  # by kind
    survivors: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.caught.values()) + len(self.survivors)

    @property
    def rate(self) -> float:
        return sum(self.caught.values()) / max(self.total, 1)

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.total - len(self.survivors)} of {self.total} caught"]
        return "\n".join([*lines, *(f"  survived: {one}" for one in self.survivors)])


Rule = Callable[[Instruction], Instruction | None]


def _rewrite(pattern: str, replacement: str | Callable[[re.Match[str]], str], place: int | None = None) -> Rule:
    """Of one operand, or of the opcode."""

    def rule(one: Instruction) -> Instruction | None:
        if place is None:
            return replace(one, opcode=re.sub(pattern, replacement, one.opcode, count=1))
        operands = list(one.operands)
        operands[place] = re.sub(pattern, replacement, operands[place], count=1)
        return replace(one, operands=tuple(operands))

    return rule


def _swap_operands(first: int, second: int) -> Rule:
    def rule(one: Instruction) -> Instruction | None:
        operands = list(one.operands)
        operands[first], operands[second] = operands[second], operands[first]
        return replace(one, operands=tuple(operands))

    return rule


def _next_element(address: re.Match[str]) -> str:
    return f"[{address[1]} + {int(address[2] or '0', 0) + 4}]"


SWAP_FIRST_TWO = (r"\{\s*([%\w]+),\s*([%\w]+)", r"{\2, \1")
ADDRESS = r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]"
# Kind, which opcodes, what is done to the instruction.
RULES: list[tuple[str, str, Rule]] = [
    ("barrier left out", r"bar(rier)?(\.cta)?\.sync.*|bar\.warp\.sync", lambda one: None),
    ("wait left out", r"cp\.async\.wait.*", lambda one: None),
    ("commit left out", r"cp\.async\.commit_group", lambda one: None),
    ("copy left out", r"cp\.async\.c[ag]\..*", lambda one: None),
    ("store left out", r"st\..*|red\..*", lambda one: None),
    ("registers of A swapped", r"mma\..*", _rewrite(*SWAP_FIRST_TWO, 1)),
    ("registers of B swapped", r"mma\..*", _rewrite(*SWAP_FIRST_TWO, 2)),
    ("registers of C swapped", r"mma\..*", _rewrite(*SWAP_FIRST_TWO, 3)),
    ("registers swapped", r"ldmatrix\..*x[24].*", _rewrite(*SWAP_FIRST_TWO, 0)),
    ("not transposed", r"ldmatrix\..*\.trans\..*", _rewrite(r"\.trans", "")),
    ("elements swapped", r"(ld|st)\..*\.v[24]\..*", lambda one: _swap_elements(one)),
    # Not just any other lanes: exchanges with lanes 16, 8, 7, 2 and 1 away reach all of a warp as well.
    ("another lane", r"shfl\..*", _rewrite(r"^\d+$", lambda lane: str(int(lane[0]) // 2 or 16), 2)),
    ("predicate negated", r"(?!bra).*", lambda one: replace(one, negated=not one.negated) if one.predicate else one),
    ("branch negated", r"bra.*", lambda one: replace(one, negated=not one.negated) if one.predicate else one),
    ("predicate left out", r"(?!bra).*", lambda one: replace(one, predicate=None)),
    ("address one further", r"(ld|st|cp|ldmatrix|red|atom)\..*(global|shared).*", lambda one: _further(one)),
    ("constant one larger", r"(add|sub|mad|shl|shr|and|mul)\..*[busd](16|32|64)", lambda one: _larger(one)),
    ("compared otherwise", r"setp\.[lg][te]\..*", _rewrite(r"\.(l|g)(t|e)\.", lambda m: f".{m[1]}{'te'['et'.index(m[2])]}.")),
    ("added for subtracted", r"(add|sub)\..*f(16|32|64)", _rewrite("add|sub", lambda m: {"add": "sub", "sub": "add"}[m[0]])),
    ("factor for divisor", r"(div|rcp).*", lambda one: replace(one, opcode=f"mov.{one.opcode.split('.')[-1]}", operands=one.operands[:2])),
    ("minimum for maximum", r"(min|max)\..*", _rewrite("min|max", lambda m: {"min": "max", "max": "min"}[m[0]])),
    ("the other choice", r"selp\..*", _swap_operands(1, 2)),
    ("the addend left out", r"fma\..*", lambda one: replace(one, operands=(*one.operands[:3], "0f00000000" if one.opcode.endswith("32") else "0d0000000000000000"))),
]  # fmt: skip


def _swap_elements(one: Instruction) -> Instruction | None:
    return _rewrite(*SWAP_FIRST_TWO, 0 if one.opcode.startswith("ld") else 1)(one)


def _further(one: Instruction) -> Instruction | None:
    place = next(place for place, operand in enumerate(one.operands) if operand.startswith("["))
    return _rewrite(ADDRESS, _next_element, place)(one)


def _larger(one: Instruction) -> Instruction | None:
    constants = [place for place, operand in enumerate(one.operands) if re.fullmatch(r"-?\d+", operand)]
    if not constants:
        return one
    return _rewrite(r"^-?\d+$", lambda number: str(int(number[0]) + 1), constants[0])(one)


def mutants(program: Program, per_kind: int, seed: int) -> list[Mutant]:
    """At most `per_kind` of each kind, chosen by the seed."""
    chosen = []
    generator = random.Random(seed)
    for kind, pattern, rule in RULES:
        found = []
        for position, one in enumerate(program.instructions):
            if re.fullmatch(pattern, one.opcode):
                mutated = rule(one)
                if mutated is None or replace(mutated, text=one.text) != one:
                    found.append(Mutant(kind, position, mutated))
        chosen += generator.sample(found, min(per_kind, len(found)))
    return chosen


def mutated(program: Program, mutant: Mutant) -> Program:
    one = mutant.instruction or replace(program.instructions[mutant.position], opcode="membar.cta", operands=())
    code = program.instructions
    return replace(program, instructions=[*code[: mutant.position], one, *code[mutant.position + 1 :]])


def differ(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """By more than roundings: in the precision of a tensor, against its largest element."""
    for one, other in zip(found, expected, strict=True):
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return True
            continue
        finite = other.isfinite()
        if not torch.equal(one[~finite].double().nan_to_num(7), other[~finite].double().nan_to_num(7)):
            return True
        largest = other[finite].double().abs().max() if finite.any() else 0
        allowed = max(2 * torch.finfo(other.dtype).eps, 1e-6) * largest
        # NaN counts as a difference.
        if not bool(((one[finite].double() - other[finite].double()).abs() <= allowed).all()):
            return True
    return False


@dataclass
class Trial:
    """A launch that can be repeated, and what it has to leave in memory."""

    launch: Launch
    expected: list[Tensor]
    steps: int
    after: Snapshot

    def catches(self, program: Program) -> bool:
        assert self.launch.before is not None
        self.launch.before.restore()
        try:
            self.launch.execute(program, max_steps=2 * self.steps + 1000)
            return differ(self.launch.tensors, self.expected)
        except PtxError:
            return True
        finally:
            self.after.restore()


def trial(launch: Launch) -> Trial:
    assert launch.before is not None, "the device has to keep what was in memory"
    launch.before.restore()
    launch.execute()
    return Trial(launch, [one.clone() for one in launch.tensors], launch.steps, Snapshot(launch.tensors))


def score(launches: Sequence[Launch], *, per_kind: int = 4, seed: int = 0) -> Score:
    """Runs the mutants of one kernel on its launches, each until one of them catches it. The launches were recorded with
    what was in memory before; it is left as it was after them."""
    trials = [trial(launch) for launch in launches]
    program = launches[0].program
    result = Score(launches[0].name)
    for mutant in mutants(program, per_kind, seed):
        broken = mutated(program, mutant)
        if any(one.catches(broken) for one in trials):
            result.caught[mutant.kind] = result.caught.get(mutant.kind, 0) + 1
        else:
            result.survivors.append(f"{mutant.kind}: {program.instructions[mutant.position].place}")
    return result


def by_kernel(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Launches of the same code together."""
    found: dict[tuple[str, int], list[Launch]] = {}
    for launch in launches:
        found.setdefault((launch.name, id(launch.program)), []).append(launch)
    return list(found.values())
