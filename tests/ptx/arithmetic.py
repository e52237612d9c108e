# SPDX-License-Identifier: Apache-2.0
"""Instructions of single threads: arithmetic, logic, comparison, conversion, movement of bits.

Approximations of the hardware (ex2, lg2, rcp, rsqrt, division) are exact here, rounded once. `.ftz` flushes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx.machine import KINDS, SHARED_WINDOW, Array, Lanes, Machine, Step, instruction
from ptx.parser import PtxError, size_of

Match = re.Match[str]
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
TINY = {"f32": np.finfo(np.float32).tiny, "f64": np.finfo(np.float64).tiny, "f16": np.finfo(np.float16).tiny}
ROUNDING = r"(?P<rounding>\.rn|\.rz|\.rm|\.rp)?"
FTZ = r"(?P<ftz>\.ftz)?"


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: Array) -> Array:
    """To nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def flush(values: Array, kind: str) -> Array:
    """Subnormal numbers to zero of the same sign."""
    return np.where(np.abs(values) < TINY[kind], np.copysign(values.dtype.type(0), values), values)


def rounded(values: Array, kind: str, mode: str | None) -> Array:
    """Wider numbers in a type, in the direction that `.rn`, `.rz`, `.rm` or `.rp` says."""
    dtype = KINDS[kind]
    near = values.astype(dtype)
    if mode in (None, ".rn", ".approx", ".full"):
        return near
    down = np.where(near > values, np.nextafter(near, dtype(-np.inf)), near)
    up = np.where(near < values, np.nextafter(near, dtype(np.inf)), near)
    return down if mode == ".rm" else up if mode == ".rp" else np.where(values < 0, up, down)


def compute(
    machine: Machine, operands: tuple[str, ...], kind: str, function: Callable[..., Array], ftz: bool = False
) -> Step:
    """operands[0] = function(operands[1:]), all of one type."""
    write = machine.destination(operands[0], kind)
    sources = [machine.source(operand, kind) for operand in operands[1:]]
    if ftz:

        def step(lanes: Lanes) -> None:
            write(lanes, flush(function(*(flush(source[lanes], kind) for source in sources)), kind))

    elif len(sources) == 1:
        (only,) = sources

        def step(lanes: Lanes) -> None:
            write(lanes, function(only[lanes]))

    elif len(sources) == 2:
        left, right = sources

        def step(lanes: Lanes) -> None:
            write(lanes, function(left[lanes], right[lanes]))

    else:

        def step(lanes: Lanes) -> None:
            write(lanes, function(*(source[lanes] for source in sources)))

    return step


# -------------------------------------------------------------------------------- floating point

WIDE: dict[str, Any] = {"f16": np.float64, "f32": np.float64, "f64": np.longdouble}


@instruction(rf"(?P<name>add|sub|mul){ROUNDING}{FTZ}\.(?P<kind>f16|f32|f64)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, mode = match["kind"], match["rounding"]
    function: Callable[..., Array] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[match["name"]]
    if mode not in (None, ".rn"):
        exact = function

        def function(x: Array, y: Array) -> Array:
            return rounded(exact(x.astype(WIDE[kind]), y.astype(WIDE[kind])), kind, mode)

    return compute(machine, operands, kind, function, bool(match["ftz"]))


@instruction(rf"fma{ROUNDING}{FTZ}\.(?P<kind>f16|f32|f64)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, wide, mode = match["kind"], WIDE[match["kind"]], match["rounding"]

    def function(x: Array, y: Array, z: Array) -> Array:
        return rounded(x.astype(wide) * y + z, kind, mode)

    return compute(machine, operands, kind, function, bool(match["ftz"]))


@instruction(
    rf"(?P<name>div|rcp|sqrt|rsqrt|ex2|lg2|tanh)(?P<rounding>\.rn|\.rz|\.rm|\.rp|\.approx|\.full){FTZ}\.(?P<kind>f32|f64)"
)
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, wide, mode = match["kind"], WIDE[match["kind"]], match["rounding"]
    exact: Callable[..., Array] = {
        "div": np.divide, "rcp": np.reciprocal, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "ex2": np.exp2,
        "lg2": np.log2, "tanh": np.tanh,
    }[match["name"]]  # fmt: skip
    return compute(
        machine,
        operands,
        kind,
        lambda *x: rounded(exact(*(one.astype(wide) for one in x)), kind, mode),
        bool(match["ftz"]),
    )


@instruction(rf"(?P<name>min|max){FTZ}(?P<nan>\.NaN)?\.(?P<kind>f16|f32|f64)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    names = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[match["name"]]
    return compute(machine, operands, match["kind"], names[bool(match["nan"])], bool(match["ftz"]))


@instruction(rf"(?P<name>neg|abs){FTZ}\.(?P<kind>f16|f32|f64|s16|s32|s64)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    function = {"neg": np.negative, "abs": np.abs}[match["name"]]
    return compute(machine, operands, match["kind"], function, bool(match["ftz"]))


@instruction(r"(?P<name>add|sub|mul|max|min|neg|abs|fma)(?:\.rn)?\.(?P<kind>bf16|bf16x2|f16x2)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """Half precision, one or two at a time."""
    kind = match["kind"]
    functions: dict[str, Callable[..., Array]] = {
        "add": np.add, "sub": np.subtract, "mul": np.multiply, "max": np.fmax, "min": np.fmin, "neg": np.negative,
        "abs": np.abs, "fma": lambda x, y, z: x * y + z,
    }  # fmt: skip
    function = functions[match["name"]]
    write = machine.destination(operands[0], kind)
    sources = [machine.source(operand, kind) for operand in operands[1:]]

    def halves(bits: Array) -> Array:
        values = np.ascontiguousarray(bits).view(np.uint16)
        return (from_bf16(values) if kind.startswith("bf16") else values.view(np.float16)).astype(np.float64)

    def step(lanes: Lanes) -> None:
        found = function(*(halves(source[lanes]) for source in sources))
        narrow = to_bf16(found.astype(np.float32)) if kind.startswith("bf16") else found.astype(np.float16)
        write(lanes, narrow.view(np.uint32 if kind.endswith("x2") else np.uint16))

    return step


# -------------------------------------------------------------------------------- integers and bits


def divide(x: Array, y: Array) -> Array:
    """Towards zero; by zero, all ones as on the device."""
    if x.dtype.kind == "u":
        return np.where(y == 0, ~x.dtype.type(0), x // np.where(y == 0, 1, y))
    quotient = x // np.where(y == 0, 1, y)
    quotient += (quotient * y != x) & ((x < 0) != (y < 0))
    return np.where(y == 0, x.dtype.type(-1), quotient)


def shift_left(x: Array, by: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    return np.where(by >= bits, x.dtype.type(0), x << np.minimum(by, bits - 1).astype(x.dtype))


def shift_right(x: Array, by: Array) -> Array:
    bits = 8 * x.dtype.itemsize
    shifted = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return shifted if x.dtype.kind == "i" else np.where(by >= bits, x.dtype.type(0), shifted)


INTEGER: dict[str, Callable[..., Array]] = {
    "add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "mad.lo": lambda x, y, z: x * y + z, "min": np.minimum,
    "max": np.maximum, "div": divide, "rem": lambda x, y: np.where(y == 0, x, x - divide(x, y) * y),
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
}  # fmt: skip


@instruction(r"(?P<name>add|sub|mul\.lo|mad\.lo|min|max|div|rem)\.(?P<kind>[us](16|32|64))")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    return compute(machine, operands, match["kind"], INTEGER[match["name"]])


@instruction(r"(?P<name>and|or|xor|not)\.(?P<kind>pred|b16|b32|b64)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    return compute(machine, operands, match["kind"], INTEGER[match["name"]])


@instruction(r"(?P<name>mul|mad)\.(?P<part>wide|hi)\.(?P<kind>[us](16|32))")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, high = match["kind"], match["part"] == "hi"
    wide = WIDER[kind]
    result = kind if high else wide
    write = machine.destination(operands[0], result)
    left, right = (machine.source(operand, kind) for operand in operands[1:3])
    added = machine.source(operands[3], result) if match["name"] == "mad" else None
    bits = 8 * size_of(kind)

    def step(lanes: Lanes) -> None:
        product = left[lanes].astype(KINDS[wide]) * right[lanes]
        if high:
            product = (product >> bits).astype(KINDS[kind])
        write(lanes, product if added is None else product + added[lanes])

    return step


@instruction(r"mul\.hi\.(?P<kind>[us]64)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    def function(x: Array, y: Array) -> Array:
        full = x.astype(object) * y.astype(object)
        return np.array([int(one) >> 64 for one in np.atleast_1d(full)], object).astype(x.dtype)

    return compute(machine, operands, match["kind"], function)


@instruction(r"(?P<name>shl|shr)\.(?P<kind>[bus](16|32|64))")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind = match["kind"]
    write = machine.destination(operands[0], kind)
    value, by = machine.source(operands[1], kind), machine.source(operands[2], "u32")
    function = {"shl": shift_left, "shr": shift_right}[match["name"]]
    return lambda lanes: write(lanes, function(value[lanes], by[lanes]))


@instruction(r"shf\.(?P<side>l|r)\.(?P<mode>wrap|clamp)\.b32")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """32 bits out of the 64 of two registers."""
    write = machine.destination(operands[0], "u32")
    low, high, by = (machine.source(operand, "u32") for operand in operands[1:])

    def step(lanes: Lanes) -> None:
        amount = (by[lanes] & 31 if match["mode"] == "wrap" else np.minimum(by[lanes], 32)).astype(np.uint64)
        both = high[lanes].astype(np.uint64) << np.uint64(32) | low[lanes]
        found = (both << amount) >> np.uint64(32) if match["side"] == "l" else both >> amount
        write(lanes, found.astype(np.uint32))

    return step


@instruction(r"bfe\.(?P<kind>[us](32|64))")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind = match["kind"]
    write, value = machine.destination(operands[0], kind), machine.source(operands[1], kind)
    position, length = (machine.source(operand, "u32") for operand in operands[2:])
    bits = 8 * size_of(kind)

    def step(lanes: Lanes) -> None:
        first, many = position[lanes] & 255, length[lanes] & 255
        # Up to the highest bit and down again: the sign comes along, or zeros do.
        above = np.maximum(bits - first.astype(int) - many, 0).astype(np.uint32)
        found = shift_right(shift_left(value[lanes], above), above + first)
        write(lanes, np.where(many == 0, found.dtype.type(0), found))

    return step


@instruction(r"bfi\.(?P<kind>b(32|64))")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind = match["kind"]
    write = machine.destination(operands[0], kind)
    inserted, base = (machine.source(operand, kind) for operand in operands[1:3])
    position, length = (machine.source(operand, "u32") for operand in operands[3:])

    def step(lanes: Lanes) -> None:
        one = base.dtype.type(1)
        mask = shift_left(shift_left(np.full_like(base[lanes], one), length[lanes]) - one, position[lanes])
        write(lanes, base[lanes] & ~mask | shift_left(inserted[lanes], position[lanes]) & mask)

    return step


@instruction(r"lop3\.b32")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """Any function of three bits, as its table of eight."""
    write = machine.destination(operands[0], "b32")
    a, b, c = (machine.source(operand, "b32") for operand in operands[1:4])
    table = int(operands[4], 0)

    def step(lanes: Lanes) -> None:
        x, y, z = a[lanes], b[lanes], c[lanes]
        found = np.zeros_like(x)
        for row in range(8):
            if table >> row & 1:
                found |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        write(lanes, found)

    return step


@instruction(r"(?P<name>popc|clz|brev)\.(?P<kind>b(32|64))")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind = match["kind"]
    bits = 8 * size_of(kind)
    functions: dict[str, Callable[[int], int]] = {
        "popc": lambda x: bin(x).count("1"),
        "clz": lambda x: bits - x.bit_length(),
        "brev": lambda x: int(format(x, f"0{bits}b")[::-1], 2),
    }
    function = functions[match["name"]]
    write = machine.destination(operands[0], kind if match["name"] == "brev" else "u32")
    value = machine.source(operands[1], kind)
    return lambda lanes: write(lanes, np.array([function(int(one)) for one in value[lanes]], write_kind(kind, match)))


def write_kind(kind: str, match: Match) -> Any:
    return KINDS[kind] if match["name"] == "brev" else np.uint32


@instruction(r"prmt\.b32")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """Four bytes out of eight."""
    write = machine.destination(operands[0], "b32")
    low, high, selector = (machine.source(operand, "b32") for operand in operands[1:])

    def step(lanes: Lanes) -> None:
        both = np.stack([np.broadcast_to(part[lanes], low[lanes].shape) for part in (low, high)], 1)
        choices = np.ascontiguousarray(both).view(np.uint8)  # [lanes, 8]
        select = selector[lanes][:, None] >> (4 * np.arange(4, dtype=np.uint32))
        found = np.take_along_axis(choices, (select & 7).astype(np.intp), 1)
        sign = np.where(found & 128, np.uint8(255), np.uint8(0))
        write(lanes, np.where(select & 8, sign, found).view(np.uint32)[:, 0])

    return step


# -------------------------------------------------------------------------------- comparison and choice

COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


@instruction(rf"setp\.(?P<compare>[a-z]+)(?P<with>\.and|\.or|\.xor)?{FTZ}\.(?P<kind>[busf]\d+|bf16)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind, name = match["kind"], match["compare"]
    left, right = (machine.source(operand, kind) for operand in operands[1:3])
    floating = kind.endswith("f16") or kind.startswith("f")

    def convert(values: Array) -> Array:
        values = from_bf16(values) if kind == "bf16" else values
        return flush(values, kind) if match["ftz"] else values

    def compared(lanes: Lanes) -> Array:
        x, y = convert(left[lanes]), convert(right[lanes])
        unordered = np.isnan(x) | np.isnan(y) if floating else np.zeros(x.shape, bool)
        if name in ("nan", "num"):
            return unordered if name == "nan" else ~unordered
        if name in COMPARE:
            return COMPARE[name](x, y) & ~unordered
        if floating and name[:-1] in COMPARE and name.endswith("u"):
            return COMPARE[name[:-1]](x, y) | unordered
        raise PtxError(f"comparison not supported ({name})")

    combined = machine.predicate(operands[3]) if match["with"] else None
    combine = {".and": np.logical_and, ".or": np.logical_or, ".xor": np.logical_xor, None: None}[match["with"]]
    names = operands[0].split("|")
    write = machine.destination(names[0].strip(), "pred")
    write_other = machine.destination(names[1].strip(), "pred") if len(names) > 1 else None

    def step(lanes: Lanes) -> None:
        found = compared(lanes)
        if combine is None or combined is None:
            write(lanes, found)
            other = ~found
        else:
            also = combined(lanes)
            write(lanes, combine(found, also))
            other = combine(~found, also)
        if write_other is not None:
            write_other(lanes, other)

    return step


@instruction(r"selp\.(?P<kind>[busf]\d+)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind = match["kind"]
    write = machine.destination(operands[0], kind)
    yes, no = (machine.source(operand, kind) for operand in operands[1:3])
    chosen = machine.predicate(operands[3])
    return lambda lanes: write(lanes, np.where(chosen(lanes), yes[lanes], no[lanes]))


# -------------------------------------------------------------------------------- movement and conversion


@instruction(r"mov\.(?P<kind>pred|[busf]\d+|bf16|[bf]+16x2)")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    kind = match["kind"]
    target, source = operands
    if not target.startswith("{") and not source.startswith("{"):
        value, write = machine.source(source, kind), machine.destination(target, kind)
        return lambda lanes: write(lanes, value[lanes])
    # Registers put together, or taken apart: the first one is the lowest part.
    names = machine.vector(target if target.startswith("{") else source)
    width = size_of(kind) // len(names)
    part = f"b{8 * width}"
    whole = machine.register(source if target.startswith("{") else target)
    parts = whole.view(KINDS[part]).reshape(machine.count, len(names))
    if target.startswith("{"):
        writes = [(machine.destination(name, part), parts[:, i]) for i, name in enumerate(names)]

        def step(lanes: Lanes) -> None:
            for write, value in writes:
                write(lanes, value[lanes])

    else:
        reads = [(machine.source(name, part), parts[:, i]) for i, name in enumerate(names)]

        def step(lanes: Lanes) -> None:
            for value, place in reads:
                place[lanes] = value[lanes]

    return step


@instruction(
    r"cvt(?P<mode>(\.(rn|rz|rm|rp|rni|rzi|rmi|rpi|rna|ftz|sat))*)\.(?P<to>[usf]\d+|bf16|tf32)\.(?P<from>[usf]\d+|bf16)"
)
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    to, kind, modes = match["to"], match["from"], match["mode"].split(".")[1:]
    source = machine.source(operands[1], kind)
    write = machine.destination(operands[0], to)
    floating = {name: name in ("bf16", "tf32") or name.startswith("f") for name in (to, kind)}
    directed = next((f".{mode}" for mode in modes if mode in ("rn", "rz", "rm", "rp")), None)
    integral = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
    whole = next((integral[mode] for mode in modes if mode in integral), None)

    def step(lanes: Lanes) -> None:
        values = source[lanes]
        if kind == "bf16":
            values = from_bf16(values)
        if "ftz" in modes and kind == "f32":
            values = flush(values, kind)
        if whole is not None:
            values = whole(values)
        if "sat" in modes and floating[to]:
            values = np.clip(np.where(np.isnan(values), 0, values), 0, 1)
        if floating[kind] and not floating[to]:
            values = to_integer(values, to)
        elif "sat" in modes and not floating[to]:
            limits = np.iinfo(KINDS[to])
            values = np.clip(
                values, max(limits.min, np.iinfo(values.dtype).min), min(limits.max, np.iinfo(values.dtype).max)
            )
        if to == "bf16":
            if directed not in (None, ".rn"):
                raise PtxError(f"rounding to bf16 by {directed}")
            write(lanes, to_bf16(values.astype(np.float32)))
        elif to == "tf32":
            bits = values.view(np.uint32)
            write(lanes, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000))
        elif floating[to] and directed not in (None, ".rn"):
            write(lanes, rounded(values, to, directed))
        else:
            found = values.astype(KINDS[to])
            write(lanes, flush(found, to) if "ftz" in modes and to == "f32" else found)

    return step


def to_integer(values: Array, kind: str) -> Array:
    """Clamped to the type's range; NaN is 0."""
    limits = np.iinfo(KINDS[kind])
    values = np.where(np.isnan(values), 0, values).astype(np.longdouble)
    return np.clip(values, limits.min, limits.max).astype(KINDS[kind])


@instruction(r"cvt\.rn(\.satfinite)?\.(?P<to>bf16x2|f16x2)\.f32")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """Two numbers into one register, the first one to its upper half."""
    upper, lower = (machine.source(operand, "f32") for operand in operands[1:])
    write = machine.destination(operands[0], "b32")

    def narrow(values: Array) -> Array:
        return to_bf16(values) if match["to"] == "bf16x2" else values.astype(np.float16).view(np.uint16)

    def step(lanes: Lanes) -> None:
        write(lanes, narrow(upper[lanes]).astype(np.uint32) << 16 | narrow(lower[lanes]))

    return step


@instruction(r"cvta(?P<to>\.to)?\.(?P<space>global|shared)\.u64")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    value, write = machine.source(operands[1], "u64"), machine.destination(operands[0], "u64")
    window = SHARED_WINDOW if match["space"] == "shared" else np.uint64(0)
    if match["to"]:
        return lambda lanes: write(lanes, value[lanes] - window)
    return lambda lanes: write(lanes, value[lanes] + window)


@instruction(r"createpolicy\.\S+")
def _(machine: Machine, operands: tuple[str, ...], match: Match) -> Step:
    """A hint to the cache, which there is none of."""
    write = machine.destination(operands[0], "b64")
    return lambda lanes: write(lanes, np.uint64(0))
