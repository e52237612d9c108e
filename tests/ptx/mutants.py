# SPDX-License-Identifier: Apache-2.0
"""How much would be noticed if a kernel were wrong? Its real PTX is broken one instruction at a time.

A mutant is caught when the interpreter objects to it or when what it leaves in memory differs from what the kernel
left by more than a numerics test would let pass. One that survives is either equivalent to the kernel (a wait that
waits for nothing, a bound that no shape reaches) or a hole in the tests."""

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
    executed: frozenset[int]

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
FIRST_TWO = re.compile(r"\{\s*([%\w]+),\s*([%\w]+)")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def _left_out(one: Instruction) -> None:
    return None


def _operand(one: Instruction, place: int, new: str) -> Instruction:
    return replace(one, operands=(*one.operands[:place], new, *one.operands[place + 1 :]))


def _registers_swapped(place: int) -> Rule:
    return lambda one: _operand(one, place, FIRST_TWO.sub(r"{\2, \1", one.operands[place], count=1))


def _elements_swapped(one: Instruction) -> Instruction | None:
    return _registers_swapped(0 if one.opcode.startswith("ld") else 1)(one)


def _other_opcode(**names: str) -> Rule:
    """With the first of these words in the opcode replaced."""
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    return lambda one: replace(one, opcode=pattern.sub(lambda word: names[word[0]], one.opcode, count=1))


def _another_lane(one: Instruction) -> Instruction:
    # Not just any: exchanges with lanes 16, 8, 7, 2 and 1 away reach all of a warp as well.
    lane = one.operands[2]
    return _operand(one, 2, str(int(lane) // 2 or 16)) if lane.isdigit() else one


def _negated(one: Instruction) -> Instruction:
    return replace(one, negated=not one.negated) if one.predicate else one


def _one_further(one: Instruction) -> Instruction:
    place = next(place for place, operand in enumerate(one.operands) if operand.startswith("["))
    base, offset = ADDRESS.fullmatch(one.operands[place]).groups()  # type: ignore[union-attr]
    return _operand(one, place, f"[{base} + {int(offset or '0', 0) + 4}]")


def _one_larger(one: Instruction) -> Instruction:
    constants = [place for place, operand in enumerate(one.operands) if re.fullmatch(r"-?\d+", operand)]
    return _operand(one, constants[0], str(int(one.operands[constants[0]]) + 1)) if constants else one


def _not_divided(one: Instruction) -> Instruction:
    return replace(one, opcode=f"mov.{one.opcode.split('.')[-1]}", operands=one.operands[:2])


def _no_addend(one: Instruction) -> Instruction:
    return _operand(one, 3, "0d0000000000000000" if one.opcode.endswith("64") else "0f00000000")


# Kind, which opcodes, what is done to the instruction; none where it is left out.
RULES: list[tuple[str, str, Rule]] = [
    ("barrier left out", r"bar(rier)?(\.cta)?\.sync.*|bar\.warp\.sync", _left_out),
    ("wait left out", r"cp\.async\.wait.*", _left_out),
    ("commit left out", r"cp\.async\.commit_group", _left_out),
    ("copy left out", r"cp\.async\.c[ag]\..*", _left_out),
    ("store left out", r"st\..*|red\..*", _left_out),
    ("registers of A swapped", r"mma\..*", _registers_swapped(1)),
    ("registers of B swapped", r"mma\..*", _registers_swapped(2)),
    ("registers of C swapped", r"mma\..*", _registers_swapped(3)),
    ("registers swapped", r"ldmatrix\..*x[24].*", _registers_swapped(0)),
    ("elements swapped", r"(ld|st)\..*\.v[24]\..*", _elements_swapped),
    ("not transposed", r"ldmatrix\..*\.trans\..*", lambda one: replace(one, opcode=one.opcode.replace(".trans", ""))),
    ("another lane", r"shfl\..*", _another_lane),
    ("predicate negated", r"(?!bra).*", _negated),
    ("branch negated", r"bra.*", _negated),
    ("predicate left out", r"(?!bra).*", lambda one: replace(one, predicate=None)),
    ("address one further", r"(ld|st|cp|ldmatrix|red|atom)\..*(global|shared).*", _one_further),
    ("constant one larger", r"(add|sub|mad|shl|shr|and|mul)\..*[busd](16|32|64)", _one_larger),
    ("compared otherwise", r"setp\.[lg][te]\..*", _other_opcode(lt="le", le="lt", gt="ge", ge="gt")),
    ("added for subtracted", r"(add|sub)\..*f(16|32|64)", _other_opcode(add="sub", sub="add")),
    ("factor for divisor", r"(div|rcp).*", _not_divided),
    ("minimum for maximum", r"(min|max)\..*", _other_opcode(min="max", max="min")),
    ("the other choice", r"selp\..*", lambda one: replace(one, operands=tuple(one.operands[i] for i in (0, 2, 1, 3)))),
    ("the addend left out", r"fma\..*", _no_addend),
]


def mutants(program: Program, executed: frozenset[int], per_kind: int, seed: int) -> list[Mutant]:
    """At most `per_kind` of each kind among the instructions that are executed, chosen by the seed."""
    chosen = []
    generator = random.Random(seed)
    for kind, pattern, rule in RULES:
        found = []
        for position, one in enumerate(program.instructions):
            if position in executed and re.fullmatch(pattern, one.opcode):
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
    """Runs the mutants of one kernel on its launches, each until one of them catches it. The launches were recorded
    with what was in memory before; it is left as it was after them."""
    trials = [trial(launch) for launch in launches]
    program = launches[0].program
    executed = frozenset().union(*(launch.executed for launch in launches))
    result = Score(launches[0].name)
    for mutant in mutants(program, executed, per_kind, seed):
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
