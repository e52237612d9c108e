# SPDX-License-Identifier: Apache-2.0
"""The interpreted GPU: registers as numpy arrays over all threads of all blocks, and the order in which they run.

Threads that stand earliest (`flow`) run first, together, until they meet others, part, or wait: so those that parted
at a branch are together again when an instruction needs a whole warp. Races do not depend on that order: they are
found by `memory` from barriers alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx.flow import ranks
from ptx.memory import UNSIGNED, GlobalAccess, GlobalMemory, SharedMemory, Traffic
from ptx.parser import Instruction, Program, PtxError, size_of

Array = NDArray[Any]
# Which threads an instruction is for: all, or those of an array in ascending order.
Lanes = slice | NDArray[np.int64]
Step = Callable[[Lanes], None]
ALL = slice(None)

KINDS: dict[str, Any] = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": np.uint16, "u16": np.uint16,
    "s16": np.int16, "f16": np.float16, "bf16": np.uint16, "b32": np.uint32, "u32": np.uint32, "s32": np.int32,
    "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32, "tf32": np.uint32, "b64": np.uint64, "u64": np.uint64,
    "s64": np.int64, "f64": np.float64,
}  # fmt: skip
MEMORY_OPERAND = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")
# Added by cvta to the address of shared memory, so that a generic address tells what it points to.
SHARED_WINDOW = np.uint64(1 << 60)
# Binders by the pattern of the opcodes that they take, filled by `arithmetic` and `collective` and below.
BINDERS: list[tuple[re.Pattern[str], Callable[..., Step]]] = []


def instruction(pattern: str) -> Callable[[Callable[..., Step]], Callable[..., Step]]:
    """Registers a binder: (machine, operands, match of the whole opcode) -> what runs for some lanes.

    An opcode is taken as a whole: a modifier that the pattern does not name is not supported.
    """

    def register(binder: Callable[..., Step]) -> Callable[..., Step]:
        BINDERS.append((re.compile(pattern), binder))
        return binder

    return register


class Machine:
    """One launch.

    Args:
        parameters: the bytes of each, in order; those that are missing at the end are zero.
        dynamic_shared: bytes that the launch asks for beyond what the code declares.
        max_steps: of instructions, each for any number of threads; more is an endless loop.
    """

    def __init__(
        self,
        program: Program,
        grid: Sequence[int],
        block: Sequence[int],
        parameters: Sequence[bytes],
        memory: GlobalMemory,
        dynamic_shared: int = 0,
        max_steps: int = 10_000_000,
    ) -> None:
        self.program, self.memory, self.max_steps = program, memory, max_steps
        self.grid, self.block = (*grid, 1, 1)[:3], (*block, 1, 1)[:3]
        self.blocks, self.threads_per_block = int(np.prod(self.grid)), int(np.prod(self.block))
        if self.threads_per_block % 32:
            raise PtxError(f"{program.name}: blocks of whole warps only, got {self.threads_per_block} threads")
        self.count = self.blocks * self.threads_per_block
        self.threads = np.arange(self.count)
        self.block_of = self.threads // self.threads_per_block
        opcodes = [one.opcode for one in program.instructions]
        ordered = any(opcode.startswith(("atom", "membar", "fence")) for opcode in opcodes)
        self.global_memory = GlobalAccess(memory, self.threads_per_block, _granule(opcodes, "global"), ordered)
        self.shared_memory = SharedMemory(
            self.blocks, self.threads_per_block, program.static_shared + dynamic_shared, _granule(opcodes, "shared")
        )
        padded = [*parameters, *[b""] * (len(program.parameters) - len(parameters))]
        # One after the other, each at a multiple of 16 bytes.
        self.parameters = b""
        self.parameter_places: dict[str, int] = {}
        for (name, size), given in zip(program.parameters.items(), padded, strict=True):
            self.parameter_places[name] = len(self.parameters)
            self.parameters += given.ljust(-(-size // 16) * 16, b"\0")
        self.registers: dict[str, Array] = {}
        self.special = self._special()
        self.copies: list[tuple[Array, Array, Array, Array]] = []  # threads, shared address, bytes, number of the group
        self.groups = np.zeros(self.count, np.int64)  # of copies that a thread has committed
        self.steps = 0
        self.executed: set[int] = set()  # positions of instructions that some thread has taken

    def _special(self) -> dict[str, Array]:
        thread, block = self.threads % self.threads_per_block, self.block_of
        found = {"%laneid": thread % 32, "%warpid": thread // 32}
        for axis, name in enumerate("xyz"):
            found[f"%tid.{name}"] = thread // int(np.prod(self.block[:axis])) % self.block[axis]
            found[f"%ctaid.{name}"] = block // int(np.prod(self.grid[:axis])) % self.grid[axis]
            found[f"%ntid.{name}"] = np.full(self.count, self.block[axis])
            found[f"%nctaid.{name}"] = np.full(self.count, self.grid[axis])
        return {name: value.astype(np.uint32) for name, value in found.items()}

    @property
    def traffic(self) -> Traffic:
        return self.global_memory.traffic

    # ------------------------------------------------------------------ operands

    def register(self, name: str) -> Array:
        """The bits of a register, [threads]; what was never written is all ones: NaN."""
        if name not in self.registers:
            kind = self.program.type_of(name)
            width = size_of(kind)
            bits = True if kind == "pred" else (1 << 8 * width) - 1
            self.registers[name] = np.full(self.count, bits, np.bool_ if kind == "pred" else UNSIGNED[width])
        return self.registers[name]

    def source(self, operand: str, kind: str) -> Array:
        """An operand as numbers of a type, [threads]: a view, to be indexed with lanes when the instruction runs."""
        dtype = np.dtype(KINDS[kind])
        if operand in self.special:
            return self._narrow(self.special[operand], dtype)
        if operand.startswith("%") or operand in self.program.registers:
            return self._narrow(self.register(operand), dtype)
        return np.broadcast_to(self.constant(operand, dtype), self.count)

    def constant(self, operand: str, dtype: np.dtype[Any]) -> Array:
        symbols = self.program.shared if operand in self.program.shared else self.parameter_places
        if operand in symbols:
            return np.array(symbols[operand], dtype)
        if operand.startswith(("0f", "0F")):
            return (
                np.array(int(operand[2:], 16), np.uint32)
                .view(np.float32)
                .astype(dtype if dtype.kind == "f" else "f4")
                .view(dtype)
            )
        if operand.startswith(("0d", "0D")):
            return np.array(int(operand[2:], 16), np.uint64).view(dtype)
        if not re.fullmatch(r"-?(0x)?[0-9a-fA-F]+U?", operand):
            raise PtxError(f"operand not understood: {operand}")
        number = int(operand.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        if dtype == np.bool_:
            return np.array(bool(number))
        return np.array(number, UNSIGNED[dtype.itemsize]).view(dtype)

    def predicate(self, operand: str) -> Callable[[Lanes], Array]:
        """A predicate register, negated by !."""
        value = self.source(operand.lstrip("!"), "pred")
        return (lambda lanes: ~value[lanes]) if operand.startswith("!") else (lambda lanes: value[lanes])

    def _narrow(self, bits: Array, dtype: np.dtype[Any]) -> Array:
        if dtype.itemsize < bits.dtype.itemsize:  # the lower part
            return bits.view(dtype)[:: bits.dtype.itemsize // dtype.itemsize]
        if dtype.itemsize > bits.dtype.itemsize:
            raise PtxError(f"register of {bits.dtype.itemsize} bytes used as one of {dtype.itemsize}")
        return bits.view(dtype)

    def destination(self, operand: str, kind: str) -> Callable[[Lanes, Array], None]:
        """What writes values of a type; a wider register is extended as the type's sign says."""
        if operand == "_":
            return lambda lanes, values: None
        bits = self.register(operand)
        dtype = np.dtype(KINDS[kind])
        if dtype.itemsize == bits.dtype.itemsize:
            view = bits.view(dtype)
        else:
            signed = kind.startswith("s")
            view = bits.view(np.dtype(f"{'i' if signed else 'u'}{bits.dtype.itemsize}"))

        def write(lanes: Lanes, values: Array) -> None:
            view[lanes] = values

        return write

    def vector(self, operand: str) -> list[str]:
        """{a, b} as its registers."""
        return [name.strip() for name in operand.strip("{} ").split(",")]

    def address(self, operand: str) -> Callable[[Lanes], Array]:
        """[register + offset] or [symbol + offset], as uint64."""
        found = MEMORY_OPERAND.fullmatch(operand)
        if not found:
            raise PtxError(f"address not understood: {operand}")
        base, offset = found[1], np.uint64(int(found[2] or "0", 0) & (2**64 - 1))
        if base.startswith("%") or base in self.program.registers:
            width = size_of(self.program.type_of(base))
            value = self.source(base, f"u{8 * width}")
        else:
            value = self.source(base, "u64")
        return lambda lanes: value[lanes].astype(np.uint64) + offset

    def warps(self, lanes: Lanes) -> int:
        """How many warps, all of their threads being there."""
        threads = self.threads[lanes]
        first = threads[::32]
        if threads.size % 32 or (first % 32).any() or (threads[31::32] != first + 31).any():
            raise PtxError("instruction of a whole warp on a part of one")
        return threads.size // 32

    # ------------------------------------------------------------------ running

    def run(self) -> Machine:
        with np.errstate(all="ignore"):
            self._run()
        return self

    def _run(self) -> None:
        code = self.program.instructions
        end = len(code)
        steps: list[Step | None] = [None] * end
        branches = [one.opcode.startswith("bra") for one in code]
        leaves = [one.opcode in ("ret", "exit") for one in code]
        barriers = [_is_barrier(one.opcode) for one in code]
        targets = [
            self.program.labels.get(one.operands[0], -1) if branch else -1
            for one, branch in zip(code, branches, strict=True)
        ]
        conditions = [
            self.predicate(("!" if one.negated else "") + one.predicate) if one.predicate else None for one in code
        ]
        rank = [*ranks(tuple(code), tuple(self.program.labels.items())), end]
        ready: dict[int, NDArray[np.int64]] = {0: self.threads}
        waiting: dict[int, NDArray[np.int64]] = {}

        def meet(at: int, threads: NDArray[np.int64], where: dict[int, NDArray[np.int64]] = ready) -> None:
            if threads.size and at < end:
                where[at] = np.sort(np.concatenate([where[at], threads])) if at in where else threads

        while ready or waiting:
            if not ready:
                self._pass_barrier(waiting)
                for at, threads in waiting.items():
                    meet(at + 1, threads)
                waiting.clear()
            pc = min(ready, key=rank.__getitem__)
            threads = ready.pop(pc)
            others = min((rank[at] for at in ready), default=end)
            while threads.size and pc < end:
                if rank[pc] >= others:
                    meet(pc, threads)
                    break
                self.steps += 1
                if self.steps > self.max_steps:
                    raise PtxError(f"no end after {self.max_steps} instructions: {code[pc].place}")
                active = threads
                condition = conditions[pc]
                if condition is not None:
                    chosen = condition(ALL if threads.size == self.count else threads)
                    active = threads if chosen.all() else threads[chosen]
                if branches[pc] or leaves[pc]:
                    self.executed.add(pc)
                    target = targets[pc] if branches[pc] else end
                    if active.size == threads.size:
                        pc = target
                        continue
                    meet(target, active)
                    threads = threads[~chosen]
                    others = min((rank[at] for at in ready), default=end)
                elif barriers[pc]:
                    if active.size < threads.size:
                        raise PtxError(f"barrier for a part of the threads: {code[pc].place}")
                    self.executed.add(pc)
                    meet(pc, threads, waiting)
                    break
                elif active.size:
                    self.executed.add(pc)
                    try:
                        step = steps[pc]
                        if step is None:
                            step = steps[pc] = self.bind(code[pc])
                        step(ALL if active.size == self.count else active)
                    except PtxError as error:
                        raise PtxError(f"{error}: {self.program.name}: {code[pc].place}") from None
                pc += 1

    def _pass_barrier(self, waiting: dict[int, NDArray[np.int64]]) -> None:
        """Nobody runs: each block that waits must be there as a whole, at one barrier."""
        for at, threads in waiting.items():
            blocks, found = np.unique(self.block_of[threads], return_counts=True)
            if (found != self.threads_per_block).any():
                raise PtxError(
                    f"barrier that only {found.min()} of {self.threads_per_block} threads reach: "
                    f"{self.program.name}: {self.program.instructions[at].place}"
                )
            self.shared_memory.synchronise(blocks)

    def bind(self, one: Instruction) -> Step:
        """What an instruction does, with its operands looked up."""
        found = _binder(one.opcode)
        if found is None:
            raise PtxError(f"instruction not supported ({one.opcode})")
        binder, match = found
        return binder(self, one.operands, match)


@cache
def _binder(opcode: str) -> tuple[Callable[..., Step], re.Match[str]] | None:
    matches = ((binder, pattern.fullmatch(opcode)) for pattern, binder in BINDERS)
    return next(((binder, match) for binder, match in matches if match), None)


def _is_barrier(opcode: str) -> bool:
    return re.fullmatch(r"(bar|barrier(\.cta)?)\.sync(\.aligned)?", opcode) is not None


def _granule(opcodes: Sequence[str], space: str) -> int:
    """The fewest bytes that an instruction accesses in a space: what races are looked for in."""
    accesses = [one for one in opcodes if one.startswith(("ld.", "st.", "atom.", "red."))]
    generic = re.compile(r"\.(global|shared|param|local)")
    sizes = [size_of(one.split(".")[-1]) for one in accesses if f".{space}" in one or not generic.search(one)]
    return min([4, *sizes])
