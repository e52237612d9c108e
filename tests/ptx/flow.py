# SPDX-License-Identifier: Apache-2.0
"""In which order parted threads run, so that they are together again as early as they can be.

Whoever stands earliest runs. Earliest in the text would not do: compilers put a block that all paths lead to before
the paths. It is an order of the flow graph in which a loop is in one piece and everything behind it comes later
(Bourdoncle's weak topological order, 1993): strongly connected components as their edges say, and inside of each, its
entry first and the rest of it by the same rule."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from ptx.parser import Instruction


@lru_cache(maxsize=256)
def ranks(code: tuple[Instruction, ...], label_places: tuple[tuple[str, int], ...]) -> list[int]:
    """A number for each instruction; threads at a lower one run first."""
    labels = dict(label_places)
    branches = [one.opcode.startswith("bra") for one in code]
    ends = [one.opcode in ("ret", "exit") for one in code]
    starts = sorted(
        {0, *labels.values(), *(at + 1 for at in range(len(code)) if branches[at] or ends[at])} - {len(code)}
    )
    edges: dict[int, list[int]] = {}
    for start, behind in zip(starts, [*starts[1:], len(code)], strict=True):
        last = code[behind - 1]
        goes_on = last.predicate is not None or not (branches[behind - 1] or ends[behind - 1])
        following = [labels[last.operands[0]]] if branches[behind - 1] else []
        following += [behind] if goes_on else []
        edges[start] = [block for block in following if block < len(code)]
    after = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    found = [0] * len(code)
    rank = 0
    for block in ordered(starts, edges):
        for place in range(block, after[block]):
            found[place] = rank
            rank += 1
    return found


def ordered(blocks: Iterable[int], edges: dict[int, list[int]]) -> list[int]:
    """The blocks in their order, the first one being where flow enters."""
    result: list[int] = []
    pending = [list(blocks)]  # parts of the graph, the next one last
    while pending:
        part = pending.pop()
        if len(part) == 1:
            result += part
            continue
        inside = set(part)
        components = _components(part, {block: [to for to in edges[block] if to in inside] for block in part})
        if len(components) > 1:
            pending += reversed(components)
            continue
        # One loop: its entry, and then what is left of it without the way back to the entry.
        result.append(part[0])
        pending.append(part[1:])
    return result


def _components(blocks: list[int], edges: dict[int, list[int]]) -> list[list[int]]:
    """Strongly connected components, along the edges; each with its entry first."""
    finished = _finished(blocks, edges)
    back: dict[int, list[int]] = {block: [] for block in blocks}
    for block, following in edges.items():
        for to in following:
            back[to].append(block)
    seen: set[int] = set()
    components = []
    for block in reversed(finished):
        if block not in seen:
            component = _reached(block, back, seen)
            components.append([block, *sorted(component - {block})])
    return components


def _finished(blocks: list[int], edges: dict[int, list[int]]) -> list[int]:
    """Blocks by the end of a depth-first walk from the first one."""
    seen: set[int] = set()
    finished = []
    for start in blocks:
        stack = [(start, iter(edges[start]))] if start not in seen else []
        seen.add(start)
        while stack:
            block, following = stack[-1]
            to = next((to for to in following if to not in seen), None)
            if to is None:
                finished.append(block)
                stack.pop()
            else:
                seen.add(to)
                stack.append((to, iter(edges[to])))
    return finished


def _reached(start: int, edges: dict[int, list[int]], seen: set[int]) -> set[int]:
    found, stack = set(), [start]
    while stack:
        block = stack.pop()
        if block not in seen:
            seen.add(block)
            found.add(block)
            stack += edges[block]
    return found
