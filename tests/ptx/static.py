# SPDX-License-Identifier: Apache-2.0
"""What compiled code says about its speed without being run: registers, spills, shared memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
SASS = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)
AMDGCN = re.compile(r"^\s+([a-z]\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Limits:
    """What the blocks that run at once on one multiprocessor share (of AMD: on a compute unit, with a workgroup for a
    block, a wave for a warp and SIMDs for its sides)."""

    warp: int
    warps: int
    blocks: int
    registers: int  # of all threads together
    register_unit: int  # by which a warp gets them
    shared: int
    reserved_shared: int  # taken by every block
    shared_unit: int


NVIDIA = Limits(
    warp=32, warps=64, blocks=32, registers=65536, register_unit=256, shared=228 << 10, reserved_shared=1 << 10,
    shared_unit=128,
)  # fmt: skip
LIMITS = {
    "sm_80": Limits(**{**asdict(NVIDIA), "shared": 164 << 10}),
    "sm_90": NVIDIA,
    "sm_100": NVIDIA,
    "gfx942": Limits(
        warp=64, warps=32, blocks=16, registers=4 * 512 * 64, register_unit=8 * 64, shared=64 << 10, reserved_shared=0,
        shared_unit=512,
    ),
}  # fmt: skip
SIDES = 4  # that a multiprocessor is divided in; a warp stays on one, with the registers of that one


def occupancy(target: str, registers: int, threads: int, shared: int) -> float:
    """Warps that can be resident, of those that the hardware has room for."""
    limits = LIMITS[target]
    warps = -(-threads // limits.warp)
    of_a_warp = -(-registers * limits.warp // limits.register_unit) * limits.register_unit
    by_registers = limits.registers // SIDES // max(of_a_warp, 1) * SIDES // warps
    of_a_block = -(-(shared + limits.reserved_shared) // limits.shared_unit) * limits.shared_unit
    by_shared = limits.shared // of_a_block if of_a_block else limits.blocks
    blocks = min(limits.blocks, limits.warps // warps, by_registers, by_shared)
    return blocks * warps / limits.warps


@dataclass(frozen=True)
class Code:
    """One compiled kernel. Counts are of instructions in the code, not of executions.

    Attributes:
        shared: bytes of shared memory per block, dynamic memory included.
        spills: instructions that move registers to or from local memory (for AMD, registers that are spilled).
        loads_128, stores_128: of 16 bytes per thread, from and to global memory.
        matrix: instructions of tensor cores: HMMA, HGMMA, UTCHMMA, DMMA, mfma.
        copies: asynchronous ones from global to shared memory.
    """

    target: str
    registers: int
    spills: int
    shared: int
    threads: int
    occupancy: float
    loads: int
    loads_128: int
    stores_128: int
    matrix: int
    copies: int
    barriers: int
    instructions: int


def of_launch(target: str, launch: Any) -> Code:
    """Of a launch that `triton_device` recorded."""
    shared, threads = launch.metadata.shared, launch.threads
    if "cubin" in launch.asm:
        image = disassembled(launch.asm["cubin"])
        (name,) = image.names
        return image.code(target, name, threads, shared)
    return of_amdgcn(target, launch.asm["amdgcn"], threads, shared)


@dataclass(frozen=True)
class Image:
    """A cubin: of each kernel its registers, its static shared memory, and how often it has each instruction."""

    names: dict[str, tuple[int, int, Counter[str]]]

    def code(self, target: str, name: str, threads: int, dynamic_shared: int) -> Code:
        registers, static_shared, counts = self.names[name]

        def total(pattern: str) -> int:
            return sum(number for opcode, number in counts.items() if re.match(pattern, opcode))

        # From sm_90 on, what the system reserves of a block's shared memory is listed as the kernel's.
        reserved = LIMITS[target].reserved_shared if target != "sm_80" else 0
        shared = max(static_shared - reserved, 0) + dynamic_shared
        return Code(
            target=target,
            registers=registers,
            spills=total(r"LDL|STL"),
            shared=shared,
            threads=threads,
            occupancy=occupancy(target, registers, threads, shared),
            loads=total(r"LDG|LD\."),
            loads_128=total(r"LDG\S*\.128|LDGSTS\S*\.128|UTMALDG"),
            stores_128=total(r"STG\S*\.128|UTMASTG"),
            matrix=total(r"HMMA|HGMMA|UTC\w*MMA|DMMA|IMMA|QGMMA"),
            copies=total(r"LDGSTS|UTMALDG"),
            barriers=total(r"BAR\.|SYNCS\."),
            instructions=sum(number for opcode, number in counts.items() if opcode != "NOP"),
        )


@lru_cache(maxsize=64)
def disassembled(cubin: bytes) -> Image:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.cubin"
        path.write_bytes(cubin)
        resources, sass = (
            subprocess.run([TOOLS / tool, option, path], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL))
    return Image(
        {
            name: (int(registers), int(shared), Counter(SASS.findall(bodies[name])))
            for name, registers, _, shared, _ in RESOURCES.findall(resources)
        }
    )


def of_amdgcn(target: str, assembly: str, threads: int, shared: int) -> Code:
    """Of the one kernel in AMD's assembly."""
    # Opcodes stand before the metadata.
    counts = Counter(AMDGCN.findall(assembly.split(".amdgpu_metadata")[0]))

    def total(pattern: str) -> int:
        return sum(number for opcode, number in counts.items() if re.match(pattern, opcode))

    def about(key: str) -> int:
        match = re.search(rf"\.{key}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    registers = about("vgpr_count")
    return Code(
        target=target,
        registers=registers,
        spills=about("vgpr_spill_count") + total("scratch_"),
        shared=shared,
        threads=threads,
        occupancy=occupancy(target, registers, threads, shared),
        loads=total("(global|buffer|flat)_load"),
        loads_128=total("(global|buffer)_load_dwordx4"),
        stores_128=total("(global|buffer)_store_dwordx4"),
        matrix=total("v_mfma"),
        copies=total("(global|buffer)_load_lds"),
        barriers=total("s_barrier"),
        instructions=sum(
            number for opcode, number in counts.items() if re.match("[sv]_|ds_|global_|buffer_|flat_|scratch_", opcode)
        ),
    )
