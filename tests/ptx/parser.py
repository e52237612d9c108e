# SPDX-License-Identifier: Apache-2.0
"""PTX text as a list of instructions: what nvcc and Triton write, read once, every instruction with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+\S+\s+(?:\.align\s+\d+\s+)?)?([\w$]+)(?:\[(\d+)\])?"
)
SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
LABEL = re.compile(r"\s*([\w$]+)\s*:(?!:)")
STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
NAME = re.compile(r"[%$A-Za-z_][\w$]*")
# Opcodes that order what different blocks do.
MEMORY_ORDER = r"(membar|fence)(\.[\w:]+)*"
SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


class PtxError(RuntimeError):
    """What a GPU would do wrong, or what the interpreter cannot do; the message ends with the place."""


def size_of(kind: str) -> int:
    """Bytes of a type: b8, s32, f64, f16x2, pred..."""
    if kind == "pred":
        return 1
    digits = kind.lstrip("abcdefghijklmnopqrstuvwxyz")
    return SIZES[digits] if "x" not in digits else 4


@dataclass(frozen=True)
class Instruction:
    """`@!predicate opcode operands;`"""

    opcode: str
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    text: str
    line: int  # in the PTX
    source: str  # file:line of what it was compiled from, where the PTX says so

    @property
    def place(self) -> str:
        return f"{self.source + ': ' if self.source else ''}PTX line {self.line}: {self.text}"


@dataclass
class Program:
    """One entry point."""

    name: str
    parameters: dict[str, int]  # name -> bytes, in order
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # type by name
    families: dict[str, str] = field(default_factory=dict)  # type by prefix, for %r<100>
    shared: dict[str, int] = field(default_factory=dict)  # offset by name
    static_shared: int = 0

    def type_of(self, register: str) -> str:
        """The declared type of a register."""
        if register in self.registers:
            return self.registers[register]
        prefix = register.rstrip("0123456789")
        if prefix not in self.families:
            raise PtxError(f"undeclared register {register} in {self.name}")
        return self.families[prefix]


def parse(text: str, entry: str | None = None) -> Program:
    """The entry point of that name, or the only one."""
    text = COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
    lines = [line.split("//")[0] for line in text.split("\n")]
    found = [match for match in map(ENTRY.search, lines) if match]
    names = [match[1] for match in found]
    if entry is None and len(names) != 1:
        raise PtxError(f"one entry point is needed, the PTX has {', '.join(names) or 'none'}: name one")
    name = entry or names[0]
    if name not in names:
        raise PtxError(f"no entry point {name} in the PTX, it has {', '.join(names) or 'none'}")
    start = next(number for number, line in enumerate(lines) if (match := ENTRY.search(line)) and match[1] == name)
    opening = next(number for number in range(start, len(lines)) if lines[number].strip().startswith("{"))
    head = "\n".join(lines[start:opening])
    parameters = {found[2]: size_of(found[1]) * int(found[3] or 1) for found in PARAMETER.finditer(head)}
    program = Program(name, parameters)
    _Body(program, lines, opening).read()
    outside = "\n".join(lines[:start] if len(names) == 1 else _module_scope(lines))
    for declaration in SHARED.finditer(outside):
        _declare_shared(program, declaration)
    # Memory that the launch sizes comes behind what the code declares.
    for declaration in SHARED.finditer(outside):
        if declaration[4] == "":
            program.shared[declaration[3]] = program.static_shared
    return program


def entries(text: str) -> list[str]:
    """Names of all entry points."""
    return ENTRY.findall(text)


def split(operands: str) -> tuple[str, ...]:
    """At commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for character in operands:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    if current.strip():
        parts.append(current.strip())
    return tuple(parts)


def _module_scope(lines: list[str]) -> list[str]:
    outside, depth = [], 0
    for line in lines:
        if depth == 0 and "{" not in line:
            outside.append(line)
        depth += line.count("{") - line.count("}")
    return outside


def _declare_shared(program: Program, declaration: re.Match[str]) -> None:
    alignment, kind, name, count = declaration.groups()
    if name in program.shared or count == "":
        return
    size = size_of(kind)
    step = int(alignment or size)
    offset = -(-program.static_shared // step) * step
    program.shared[name] = offset
    program.static_shared = offset + size * int(count or 1)


class _Body:
    """The reader of what stands between an entry point's braces."""

    def __init__(self, program: Program, lines: list[str], opening: int) -> None:
        self.program, self.lines, self.opening = program, lines, opening
        self.files = {match[1]: match[2].rsplit("/", 1)[-1] for line in lines if (match := FILE.search(line))}
        self.scopes: list[dict[str, str]] = []  # of braces inside: written name -> the name that only it has
        self.source = ""

    def read(self) -> None:
        statement, first, depth = "", 0, 0
        for number in range(self.opening, len(self.lines)):
            line = self.lines[number]
            if not statement.strip() and line.lstrip().startswith((".loc", ".file", ".section")):
                location = LOCATION.search(line)
                if location and location[2] != "0":
                    self.source = f"{self.files.get(location[1], '')}:{location[2]}"
                continue
            for character in line + "\n":
                blank = not statement.strip()
                if character == "{" and blank:
                    depth += 1
                    self.scopes.append({})
                elif character == "}" and blank:
                    depth -= 1
                    self.scopes.pop()
                    if depth == 0:
                        return
                elif character == ";":
                    self.statement(statement.strip(), first + 1)
                    statement = ""
                elif character == ":" and LABEL.fullmatch(statement + ":") and line.strip().endswith(":"):
                    self.program.labels[statement.strip()] = len(self.program.instructions)
                    statement = ""
                else:
                    if blank and not character.isspace():
                        first = number
                    statement += character
        raise PtxError(f"the body of {self.program.name} does not end")

    def statement(self, text: str, line: int) -> None:
        if declared := REGISTERS.match(text):
            return self.registers(declared[1], declared[2])
        if declared := SHARED.match(text):
            return _declare_shared(self.program, declared)
        if text.startswith("."):
            if text.startswith(".pragma"):
                return None
            raise PtxError(f"directive not supported: PTX line {line}: {text}")
        matched = STATEMENT.fullmatch(text)
        if not matched:
            raise PtxError(f"not understood: PTX line {line}: {text}")
        negated, predicate, opcode, operands = matched.groups()
        self.program.instructions.append(
            Instruction(
                opcode,
                split(self.renamed(operands)),
                self.renamed(predicate) if predicate else None,
                negated == "!",
                " ".join(text.split()),
                line,
                self.source,
            )
        )
        return None

    def registers(self, kind: str, names: str) -> None:
        for name in split(names):
            if "<" in name:
                self.program.families[name.split("<")[0]] = kind
                continue
            unique = name if name not in self.program.registers else f"{name}_{len(self.program.registers)}"
            self.scopes[-1][name] = unique
            self.program.registers[unique] = kind

    def renamed(self, operands: str) -> str:
        """With names that were declared in an inner scope made unique."""
        renames: dict[str, str] = {}
        for scope in self.scopes:
            renames.update(scope)
        return NAME.sub(lambda name: renames.get(name[0], name[0]), operands) if renames else operands
