# SPDX-License-Identifier: Apache-2.0
"""The times on GPUs below which no kernel can be, and those below which ours cannot: `python docs/gpu_floors.py`.

Nothing here was measured on a GPU. The rates are those of data sheets: memory, dense products in bf16, and
exponentials (16 per multiprocessor and clock). A floor is the largest of three times: every input and output moved
once, the products of the formula, and two exponentials for each pair of logits or scores. What our kernels do is
counted from their code: the bytes of tests/ptx/workloads.py, which the interpreted machine code keeps to within 2 %,
and the products and exponentials that are made again; steps that follow each other, each with a floor of its own, are
added. Launches add about 3 us each when nothing else is in the queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from pydistill.losses.linear_soft_target import rows_at_a_time

BF16, FP32 = 2, 4  # bytes
LAUNCH = 3e-6


@dataclass(frozen=True)
class Device:
    memory: float  # bytes per second
    matrix: float  # operations per second of dense bf16 products with sums in fp32
    exponentials: float  # per second
    shared: int  # bytes that a block can have


DEVICES = {
    "A100": Device(2.04e12, 312e12, 108 * 16 * 1.41e9, 163 << 10),
    "H100": Device(3.35e12, 989e12, 132 * 16 * 1.83e9, 227 << 10),
    "H200": Device(4.8e12, 989e12, 132 * 16 * 1.83e9, 227 << 10),
    "B200": Device(8.0e12, 2250e12, 148 * 16 * 1.85e9, 227 << 10),
    "MI300X": Device(5.3e12, 1307e12, 304 * 16 * 2.1e9, 64 << 10),
}


@dataclass(frozen=True)
class Work:
    """Value and gradient of one call."""

    moved: float  # bytes
    products: float  # operations of matrix products
    exponentials: float
    launches: int = 0

    def parts(self, device: Device) -> dict[str, float]:
        return {
            "memory": self.moved / device.memory,
            "products": self.products / device.matrix,
            "exponentials": self.exponentials / device.exponentials,
        }

    def seconds(self, device: Device) -> float:
        return max(self.parts(device).values()) + self.launches * LAUNCH

    def bound(self, device: Device) -> str:
        parts = self.parts(device)
        return max(parts, key=parts.__getitem__)


def soft_target(rows: int, classes: int, device: Device, walks: int = 2) -> list[Work]:
    """Forward KL, or with three walks the Jensen-Shannon divergence. Ours: csrc/cuda keeps a row of both sides in
    shared memory where they fit, and makes exponentials again in each walk."""
    size = rows * classes * BF16
    if 2 * classes * BF16 <= device.shared:
        moved = 3 * size
    else:
        moved = (2 * walks + 1) * size
    return [Work(3 * size, 0, 2 * rows * classes), Work(moved, 0, 2 * walks * rows * classes, 3)]


def linear_soft_target(
    rows: int, student: int, teacher: int, classes: int, device: Device, walks: int = 2
) -> list[Work]:
    """The output layers of both sides, and the gradients of the student's rows and weight. Ours: a chunk of rows at a
    time; its logits are written by a product, compared, overwritten by their gradient, and read by two products; the
    weight's gradient is a sum in fp32, read and written by each chunk."""
    products = 2 * rows * classes * (3 * student + teacher)
    weights, hidden = classes * (student + teacher) * BF16, rows * (2 * student + teacher) * BF16
    gradient = classes * student
    floor = Work(weights + gradient * BF16 + hidden, products, 2 * rows * classes)
    chunks, logits = ceil(rows / rows_at_a_time(classes, "cuda")), rows * classes * BF16
    moved = chunks * (weights + classes * student * BF16 + 2 * gradient * FP32) + hidden + 4 * logits
    between = soft_target(rows, classes, device, walks)[1]
    rounded = Work(gradient * (FP32 + BF16), 0, 0, 1)
    return [floor, Work(moved, products, 0, 4 * chunks), between, rounded]


def attention_relation(batch: int, heads: int, tokens: int, teacher: int, student: int) -> list[Work]:
    """Queries against keys. Ours: csrc/cuda makes the scores for values, for gradients of queries and for those of
    keys, the last two in one launch, and multiplies gradients of scores in two parts."""
    rows, pairs = batch * heads * tokens, batch * heads * tokens**2
    inputs, outputs = 2 * rows * (teacher + student) * BF16, 2 * rows * student * BF16
    floor = Work(inputs + outputs, 2 * pairs * (teacher + 3 * student), 2 * pairs)
    again = Work(
        2 * inputs + outputs + rows * 10 * FP32, 2 * pairs * (3 * (teacher + student) + 4 * student), 6 * pairs, 4
    )
    return [floor, again]


def projected_mse(rows: int, student: int, teacher: int) -> list[Work]:
    """The student is projected. Ours: the projected rows are made by two kernels, once for every 384 of the student's
    features, and differences are multiplied in two parts."""
    weights = student * teacher
    inputs = (rows * (student + teacher) + weights) * BF16
    outputs = rows * student * BF16 + weights * FP32
    once = 2 * rows * weights
    again = (2 * ceil(student / 384) + 4) * once
    return [Work(inputs + outputs, 3 * once, 0), Work(2 * inputs + outputs, again, 0, 4)]


def lines() -> list[tuple[str, ...]]:
    """One line per op and shape: floor and ours in microseconds, and what the floor is bound by."""
    problems = {
        "soft_target 8192 x 32000": lambda device: soft_target(8192, 32000, device),
        "soft_target 8192 x 128256": lambda device: soft_target(8192, 128256, device),
        "soft_target, jsd, 8192 x 128256": lambda device: soft_target(8192, 128256, device, walks=3),
        "linear_soft_target 8192 x 2048, 4096 -> 128256": lambda device: linear_soft_target(
            8192, 2048, 4096, 128256, device
        ),
        "linear_soft_target, jsd, 8192 x 4096, 4096 -> 128256": lambda device: linear_soft_target(
            8192, 4096, 4096, 128256, device, walks=3
        ),
        "attention_relation 32 x 12 x 128, 64/32": lambda device: attention_relation(32, 12, 128, 64, 32),
        "attention_relation 8 x 12 x 512, 64/32": lambda device: attention_relation(8, 12, 512, 64, 32),
        "attention_relation 1 x 12 x 4096, 64/32": lambda device: attention_relation(1, 12, 4096, 64, 32),
        "attention_relation 32 x 48 x 128, 16/8": lambda device: attention_relation(32, 48, 128, 16, 8),
        "projected_mse 4096 x 384 -> 768": lambda device: projected_mse(4096, 384, 768),
        "projected_mse 65536 x 384 -> 768": lambda device: projected_mse(65536, 384, 768),
    }
    found: list[tuple[str, ...]] = [("bf16, value and gradient", *DEVICES)]
    for name, works in problems.items():
        cells = []
        for device in DEVICES.values():
            floor, *ours = works(device)
            seconds = sum(one.seconds(device) for one in ours)
            cells.append(f"{1e6 * floor.seconds(device):,.0f} ({floor.bound(device)}) / {1e6 * seconds:,.0f}")
        found.append((name, *cells))
    return found


if __name__ == "__main__":
    for line in lines():
        print("  ".join(f"{cell:>26}" for cell in line))
