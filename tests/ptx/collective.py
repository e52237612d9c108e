# SPDX-License-Identifier: Apache-2.0
"""Instructions that touch memory or join lanes: loads, stores, asynchronous copies, shuffles, matrix products."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np

from ptx.arithmetic import from_bf16
from ptx.machine import KINDS, SHARED_WINDOW, Array, Lanes, Machine, Step, instruction
from ptx.memory import UNSIGNED, GlobalAccess, SharedMemory
from ptx.parser import MEMORY_ORDER, PtxError, size_of

Match = re.Match[str]
LANE = np.arange(32)


# -------------------------------------------------------------------------------- loads and stores

CACHE = r"(?P<cache>(\.(nc|ca|cg|cs|cv|lu|wb|wt|relaxed|gpu|cta|sys|weak|volatile|L1::\w+|L2::\w+))*)"
VECTOR = r"(\.v(?P<count>[248]))?\.(?P<kind>[busf]\d+)"


@instruction(rf"ld\.param{VECTOR}")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, names = match["kind"], machine.vector(operands[0])
    address = machine.address(operands[1])
    content = np.frombuffer(machine.parameters, KINDS[kind])
    writes = [machine.destination(name, kind) for name in names]

    def step(lanes: Lanes) -> None:
        first = address(lanes) // np.uint64(content.itemsize)
        for place, write in enumerate(writes):
            write(lanes, content[first + np.uint64(place)])

    return step


def space_of(space: str | None, address: Array, machine: Machine) -> tuple[GlobalAccess | SharedMemory, Array]:
    """The memory that an address is of, and the address in it; a generic one is of shared memory in its window."""
    if space and space.startswith("shared"):
        return machine.shared_memory, address
    if space is None and address.size and (address >= SHARED_WINDOW).any():
        if not (address >= SHARED_WINDOW).all():
            raise PtxError("generic addresses of different memories by one instruction")
        return machine.shared_memory, address - SHARED_WINDOW
    return machine.global_memory, address


SPACE = r"(\.(?P<space>global|shared(::cta)?))?"


@instruction(rf"ld(\.volatile|\.relaxed|\.weak)?{SPACE}{CACHE}{VECTOR}")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, names, space = match["kind"], machine.vector(operands[0]), match["space"]
    if len(names) != int(match["count"] or 1):
        raise PtxError("as many registers as the vector has elements are needed")
    width = size_of(kind)
    address = machine.address(operands[1])
    writes = [machine.destination(name, kind) for name in names]

    def step(lanes: Lanes) -> None:
        memory, place = space_of(space, address(lanes), machine)
        loaded = memory.load(place, width, len(names), machine.threads[lanes]).view(KINDS[kind])
        for column, write in enumerate(writes):
            write(lanes, loaded[:, column])

    return step


@instruction(rf"st(\.volatile|\.relaxed|\.weak)?{SPACE}{CACHE}{VECTOR}")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, names, space = f"b{8 * size_of(match['kind'])}", machine.vector(operands[1]), match["space"]
    if len(names) != int(match["count"] or 1):
        raise PtxError("as many registers as the vector has elements are needed")
    address = machine.address(operands[0])
    sources = [machine.source(name, kind) for name in names]

    def step(lanes: Lanes) -> None:
        memory, place = space_of(space, address(lanes), machine)
        memory.store(place, np.stack([source[lanes] for source in sources], 1), machine.threads[lanes])

    return step


@instruction(
    r"(?P<name>atom|red)(\.(relaxed|acquire|release|acq_rel))?(\.(gpu|cta|sys))?\.(?P<space>global|shared)"
    r"(\.(relaxed|acquire|release|acq_rel))?(\.(gpu|cta|sys))?\.(?P<what>add|min|max|and|or|xor|exch|cas|inc)"
    r"\.(?P<kind>[bus](32|64))"
)
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """Of integers only: a sum of floating-point numbers would depend on the order of threads."""
    kind, what = match["kind"], match["what"]
    returns = match["name"] == "atom"
    target, *rest = operands[1:] if returns else operands
    address = machine.address(target)
    sources = [machine.source(operand, kind) for operand in rest]
    write = machine.destination(operands[0], kind) if returns else None
    functions: dict[str, Any] = {
        "add": lambda old, x: old + x, "min": min, "max": max, "and": lambda old, x: old & x,
        "or": lambda old, x: old | x, "xor": lambda old, x: old ^ x, "exch": lambda old, x: x,
        "cas": lambda old, x, y: y if old == x else old, "inc": lambda old, x: 0 if old >= x else int(old) + 1,
    }  # fmt: skip

    def step(lanes: Lanes) -> None:
        memory, places = space_of(match["space"], address(lanes), machine)
        values = [source[lanes] for source in sources]
        for i, thread in enumerate(machine.threads[lanes]):
            one = machine.threads[thread : thread + 1]
            old = memory.load(places[i : i + 1], size_of(kind), 1, one).view(KINDS[kind])
            new = np.array(functions[what](old[0, 0], *(value[i] for value in values))).astype(KINDS[kind])
            memory.store(places[i : i + 1], new.reshape(1, 1).view(UNSIGNED[size_of(kind)]), one)
            if write is not None:
                write(one, old[:, 0])

    return step


@instruction(MEMORY_ORDER)
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """What orders accesses to global memory: here they are in order."""
    return lambda lanes: None


# -------------------------------------------------------------------------------- asynchronous copies


@instruction(r"cp\.async\.(?P<cache>ca|cg)\.shared(::cta)?\.global((\.L2::\w+)*)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """What was read lands when the thread waits for it; until then the place is nobody's."""
    target, source = machine.address(operands[0]), machine.address(operands[1])
    size = int(operands[2], 0)
    if size not in ((16,) if match["cache"] == "cg" else (4, 8, 16)):
        raise PtxError(f"asynchronous copy of {size} bytes")
    given = machine.source(operands[3], "u32") if len(operands) > 3 else None

    def step(lanes: Lanes) -> None:
        threads = machine.threads[lanes]
        values = np.zeros((threads.size, size), np.uint8)
        places, addresses = target(lanes), source(lanes)
        # Fewer bytes may be read than are written, which are zero then.
        sizes = np.full(threads.size, size) if given is None else given[lanes].astype(np.int64)
        if (sizes > size).any():
            raise PtxError(f"asynchronous copy that reads more than {size} bytes")
        for some in np.unique(sizes[sizes > 0]):
            chosen = sizes == some
            values[chosen, :some] = read_bytes(machine.global_memory, addresses[chosen], int(some), threads[chosen])
        machine.shared_memory.begin_filling(places, size, threads)
        machine.copies.append((threads, places, values, machine.groups[threads]))

    return step


def read_bytes(memory: GlobalAccess, address: Array, size: int, threads: Array) -> Array:
    whole = size if size in (4, 8, 16) else 1
    parts = [
        memory.load(address + np.uint64(start), min(whole, 8), max(1, whole // 8), threads).view(np.uint8)
        for start in range(0, size, whole)
    ]
    return np.concatenate(parts, 1)


@instruction(r"cp\.async\.commit_group")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    def step(lanes: Lanes) -> None:
        machine.groups[lanes] += 1

    return step


@instruction(r"cp\.async\.(?P<which>wait_group|wait_all)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    pending = int(operands[0], 0) if match["which"] == "wait_group" else None

    def step(lanes: Lanes) -> None:
        waits = np.zeros(machine.count, bool)
        waits[lanes] = True
        left = []
        for threads, places, values, groups in machine.copies:
            done = waits[threads]
            if pending is not None:
                done &= groups < machine.groups[threads] - pending
            if done.any():
                machine.shared_memory.end_filling(places[done], values[done].view(np.uint32), threads[done])
            if not done.all():
                left.append((threads[~done], places[~done], values[~done], groups[~done]))
        machine.copies = left

    return step


# -------------------------------------------------------------------------------- warps


@instruction(r"bar\.warp\.sync")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    mask = machine.source(operands[0], "u32")

    def step(lanes: Lanes) -> None:
        named = together(machine, mask, lanes)
        machine.shared_memory.synchronise_lanes(machine.threads[lanes], named)

    return step


def together(machine: Machine, mask: Array, lanes: Lanes) -> Array:
    """The lanes that each thread's mask names: itself among them, and all of them there."""
    threads, named = machine.threads[lanes], mask[lanes]
    there = bits_of(machine, threads)[threads // 32]
    if (named & ~there).any() or ((named >> (threads % 32).astype(np.uint32) & 1) == 0).any():
        raise PtxError("lanes of a warp work together of which some are not there")
    return named


def bits_of(machine: Machine, threads: Array) -> Array:
    """Threads as lanes, [warps]."""
    bits = np.zeros(machine.count // 32, np.uint32)
    np.bitwise_or.at(bits, threads // 32, np.uint32(1) << (threads % 32).astype(np.uint32))
    return bits


@instruction(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    names = operands[0].split("|")
    write = machine.destination(names[0].strip(), "b32")
    write_found = machine.destination(names[1].strip(), "pred") if len(names) > 1 else None
    value, other, clamp, mask = (
        machine.source(operand, kind) for operand, kind in zip(operands[1:], ("b32", "s32", "s32", "u32"), strict=True)
    )
    mode = match["mode"]

    def step(lanes: Lanes) -> None:
        named, threads = together(machine, mask, lanes), machine.threads[lanes]
        lane = threads % 32
        by, limit, segment = other[lanes] & 31, clamp[lanes] & 31, clamp[lanes] >> 8 & 31
        lowest, highest = lane & segment, (lane & segment) | (limit & ~segment)
        place = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment)}[mode]
        found = place >= highest if mode == "up" else place <= highest
        source = np.where(found, place, lane)
        if ((named >> source.astype(np.uint32) & 1) == 0).any():
            raise PtxError("a lane is read that the mask does not name")
        write(lanes, value[threads - lane + source])
        if write_found is not None:
            write_found(lanes, found)

    return step


@instruction(r"vote\.sync\.(?P<mode>ballot|any|all|uni)\.(b32|pred)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    said, mask = machine.predicate(operands[1]), machine.source(operands[2], "u32")
    mode = match["mode"]
    write = machine.destination(operands[0], "b32" if mode == "ballot" else "pred")

    def step(lanes: Lanes) -> None:
        named, threads = together(machine, mask, lanes), machine.threads[lanes]
        ballot = bits_of(machine, threads[said(lanes)])[threads // 32] & named
        results = {"ballot": ballot, "any": ballot != 0, "all": ballot == named}
        write(lanes, results[mode] if mode in results else results["all"] | ~results["any"])

    return step


@instruction(r"redux\.sync\.(?P<what>add|min|max|and|or|xor)\.(?P<kind>[bus]32)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    value, mask = machine.source(operands[1], match["kind"]), machine.source(operands[2], "u32")
    write = machine.destination(operands[0], match["kind"])
    reduce = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[match["what"]].reduce  # fmt: skip

    def step(lanes: Lanes) -> None:
        warps = machine.warps(lanes)
        together(machine, mask, lanes)
        write(lanes, np.repeat(reduce(value[lanes].reshape(warps, 32), axis=1, dtype=value.dtype), 32))

    return step


@instruction(r"activemask\.b32")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    write = machine.destination(operands[0], "b32")

    def step(lanes: Lanes) -> None:
        threads = machine.threads[lanes]
        write(lanes, bits_of(machine, threads)[threads // 32])

    return step


# -------------------------------------------------------------------------------- matrices


@instruction(r"ldmatrix\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<transposed>\.trans)?\.shared(::cta)?\.b16")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    count, names = int(match["count"]), machine.vector(operands[0])
    address = machine.address(operands[1])
    writes = [machine.destination(name, "b32") for name in names]
    if len(names) != count:
        raise PtxError("as many registers as matrices are needed")

    def step(lanes: Lanes) -> None:
        warps = machine.warps(lanes)
        # Row r of matrix m begins where lane 8 m + r says.
        rows = address(lanes).reshape(warps, 32)[:, : 8 * count].reshape(-1)
        threads = machine.threads[lanes].reshape(warps, 32)[:, : 8 * count].reshape(-1)
        loaded = machine.shared_memory.load(rows, 2, 8, threads).reshape(warps, count, 8, 8)
        if match["transposed"]:
            loaded = loaded.swapaxes(2, 3)
        # A lane has two neighbours of row lane / 4.
        pairs = np.ascontiguousarray(loaded).view(np.uint32).reshape(warps, count, 32)
        for matrix, write in enumerate(writes):
            write(lanes, pairs[:, matrix].reshape(-1))

    return step


@cache
def fragments(m: int, n: int, k: int, packed: int) -> tuple[Array, Array, Array]:
    """Where lanes hold the elements of A [m, k], B [k, n] and C [m, n]: for each element, register, lane and part of
    the register as one index into [registers, 32, parts]."""
    group, inner = LANE // 4, LANE % 4

    def order(rows: int, columns: int, places: list[tuple[Array, Array]], parts: int) -> Array:
        index = np.full((rows, columns), -1)
        for at, (row, column) in enumerate(places):
            register, part = divmod(at, parts)
            index[row, column] = (register * 32 + LANE) * parts + part
        assert (index >= 0).all()
        return index

    eights = range(m // 8)
    deep = range(k // (4 * packed))
    a = [
        (group + 8 * half, packed * inner + 4 * packed * step + part)
        for step in deep for half in eights for part in range(packed)
    ]  # fmt: skip
    b = [(packed * inner + 4 * packed * step + part, group) for step in deep for part in range(packed)]
    c = [(group + 8 * half, 2 * inner + part) for half in eights for part in range(2)]
    return order(m, k, a, packed), order(k, n, b, packed), order(m, n, c, 1)


@instruction(
    r"mma\.sync\.aligned\.m(?P<m>8|16)n8k(?P<k>4|8|16)\.row\.col\.(?P<d>f32|f64)\.(?P<a>bf16|f16|tf32|f64)\.(?P=a)\.(?P=d)(\.rn)?"
)
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """D = A B + C. Products are exact, and summed in double precision."""
    kind, accumulated = match["a"], match["d"]
    shapes = {"bf16": ("16x8", "16x16"), "f16": ("16x8", "16x16"), "tf32": ("16x4", "16x8"), "f64": ("8x4",)}
    if f"{match['m']}x{match['k']}" not in shapes[kind] or (accumulated == "f64") != (kind == "f64"):
        raise PtxError(f"matrix product not supported ({match[0]})")
    m, n, k = int(match["m"]), 8, int(match["k"])
    packed = 2 if kind.endswith("f16") else 1
    bits = "b64" if kind == "f64" else "b32"
    d, a, b, c = (machine.vector(operand) for operand in operands)
    order_a, order_b, order_c = fragments(m, n, k, packed)
    sources = {name: [machine.source(one, bits) for one in names] for name, names in (("a", a), ("b", b))}
    added = [machine.source(one, accumulated) for one in c]
    writes = [machine.destination(one, accumulated) for one in d]
    back = np.argsort(order_c.reshape(-1))

    def values(registers: list[Array], order: Array, lanes: Lanes, warps: int) -> Array:
        held = np.stack([register[lanes].reshape(warps, 32) for register in registers], 1)
        if packed == 2:
            halves = held.view(np.uint16)
            numbers = from_bf16(halves) if kind == "bf16" else halves.view(np.float16)
        else:
            # The tensor core reads 19 bits of a tf32 operand.
            numbers = held.view(np.float64) if kind == "f64" else (held & np.uint32(0xFFFFE000)).view(np.float32)
        return numbers.reshape(warps, -1)[:, order].astype(np.float64)

    def step(lanes: Lanes) -> None:
        warps = machine.warps(lanes)
        left = values(sources["a"], order_a, lanes, warps)
        right = values(sources["b"], order_b, lanes, warps)
        start = np.stack([one[lanes].reshape(warps, 32) for one in added], 1).reshape(warps, -1)[:, order_c]
        product = (left @ right + start).astype(KINDS[accumulated])
        held = product.reshape(warps, -1)[:, back].reshape(warps, len(writes), 32)
        for register, write in enumerate(writes):
            write(lanes, held[:, register].reshape(-1))

    return step
