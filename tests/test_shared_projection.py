# SPDX-License-Identifier: Apache-2.0
"""The shared-projection loss: values, gradients, sharing, memory, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pydistill.losses.shared_projection import DIRECTIONS, SharedProjections, shared_projection_loss


def wave(rows: int, columns: int, shift: int) -> Tensor:
    return torch.from_numpy(np.sin(0.3 * shift + 0.9 * np.arange(rows * columns)).reshape(rows, columns))


def golden() -> dict[str, Any]:
    # A teacher's [6, 8] against a student's [3, 4].
    return {
        "student": wave(3, 4, 2),
        "teacher": wave(6, 8, 1),
        "down": (wave(3, 6, 3), wave(8, 4, 4)),
        "up": (wave(6, 3, 5), wave(4, 8, 6)),
    }


# Computed once with numpy, in float64.
@pytest.mark.parametrize(
    ("direction", "reduction", "value"),
    [
        ("down", "sum", 42.4053744833),
        ("down", "mean", 3.5337812069),
        ("up", "sum", 45.6320477541),
        ("up", "mean", 0.9506676615),
    ],
)
def test_golden_values(direction: Any, reduction: str, value: float) -> None:
    given = golden()
    loss = shared_projection_loss(
        [given["student"]], [given["teacher"]], [given[direction]], direction, reduction=reduction
    )
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(value, abs=1e-9)
    if reduction == "mean":  # the default
        assert shared_projection_loss([given["student"]], [given["teacher"]], [given[direction]], direction) == loss


def models(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two layers with a square, a tall and a wide matrix and their biases, and a table of 7 rows."""
    generator = torch.Generator().manual_seed(seed)

    def made(d: int) -> dict[str, Tensor]:
        sizes: dict[str, tuple[int, ...]] = {"table": (7, d)}
        for layer in range(2):
            sizes |= {f"{layer}.square": (d, d), f"{layer}.up": (3 * d, d), f"{layer}.down": (d, 3 * d)}
            sizes |= {f"{layer}.bias": (d,), f"{layer}.up_bias": (3 * d,)}
        return {name: torch.randn(size, generator=generator, dtype=dtype) for name, size in sizes.items()}

    return made(3), made(5)


def test_zero_for_equal_parameters_and_identities() -> None:
    parameters = list(models()[0].values())
    pairs = [(torch.eye(len(value)) if value.dim() == 2 else None, torch.eye(value.size(-1))) for value in parameters]
    for direction in DIRECTIONS:
        given = [value.clone().requires_grad_() for value in parameters]
        loss = shared_projection_loss(given, parameters, pairs, direction)
        loss.backward()
        assert loss.item() == 0
        assert all(value.grad is not None and not value.grad.any() for value in given)
        given[3].data += 1
        assert shared_projection_loss(given, parameters, pairs, direction) > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_is_the_formula_summed_over_all_parameters(direction: Any, reduction: str) -> None:
    student, teacher = models(torch.float64)
    shared = SharedProjections(student, teacher, direction, tables=["table"], reduction=reduction)
    expected = 0.0
    for name in student:
        source, target = (teacher[name], student[name]) if direction == "down" else (student[name], teacher[name])
        left, right = shared.pair(name)
        assert (left is None) == (source.dim() == 1 or name == "table")
        product = source @ right.double() if left is None else left.double() @ source @ right.double()
        squares = (product - target).square()
        expected += (squares.mean() if reduction == "mean" else squares.sum()).item()
    assert shared(student, teacher).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_reach_student_teacher_and_projections(direction: Any) -> None:
    student, teacher = models(torch.float64)
    shared = SharedProjections(student, teacher, direction, tables=["table"]).double()
    names = ["table", "0.up", "1.up", "1.bias"]
    pairs = [shared.pair(name) for name in names]
    matrices = list(dict.fromkeys(matrix for pair in pairs for matrix in pair if matrix is not None))
    # The two layers' projections are the same tensors, whose gradient is the sum of both.
    assert len(matrices) == 2
    inputs = [side[name].requires_grad_() for side in (student, teacher) for name in names]

    def loss(*tensors: Tensor) -> Tensor:
        sides, given = tensors[: 2 * len(names)], tensors[2 * len(names) :]
        places = {id(matrix): place for place, matrix in enumerate(matrices)}
        used = [(None if u is None else given[places[id(u)]], given[places[id(v)]]) for u, v in pairs]
        return shared_projection_loss(sides[: len(names)], sides[len(names) :], used, direction)

    assert torch.autograd.gradcheck(loss, [*inputs, *matrices])


def test_projections_are_shared_by_side_and_size() -> None:
    student, teacher = models()
    down = SharedProjections(student, teacher, "down", tables=["table"])
    assert {name: list(value.shape) for name, value in down.matrices.items()} == {
        "left_3_5": [3, 5],
        "left_9_15": [9, 15],
        "right_5_3": [5, 3],
        "right_15_9": [15, 9],
    }
    for name in ("square", "up", "down"):
        assert all(a is b for a, b in zip(down.pair(f"0.{name}"), down.pair(f"1.{name}"), strict=True))
    assert down.pair("0.square")[0] is down.pair("0.down")[0] and down.pair("0.bias")[1] is down.pair("table")[1]
    up = SharedProjections(student, teacher, "up", tables=["table"])
    assert set(up.matrices) == {"left_5_3", "left_15_9", "right_3_5", "right_9_15"}
    # Without being named as a table, its rows are mixed too.
    assert "left_7_7" in SharedProjections(student, teacher, "down").matrices


def test_noise_is_seeded_scaled_and_leaves_the_random_state_alone() -> None:
    student, teacher = {"w": torch.zeros(200, 100)}, {"w": torch.zeros(400, 900)}
    state = torch.random.get_rng_state()
    first, again, other = (SharedProjections(student, teacher, "down", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    left, right = first.pair("w")
    assert left is not None and torch.equal(left, again.pair("w")[0]) and not torch.equal(left, other.pair("w")[0])
    assert left.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert right.std().item() == pytest.approx(900**-0.5, rel=0.02)
    # So a projected weight keeps its scale.
    weight = torch.randn(400, 900, generator=torch.Generator().manual_seed(0))
    assert (left @ weight @ right).std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nothing_is_kept_but_the_products(direction: Any) -> None:
    student, teacher = {"w": torch.randn(48, 12)}, {"w": torch.randn(192, 40)}
    shared = SharedProjections(student, teacher, direction)
    inputs = {value.data_ptr() for value in (student["w"], teacher["w"], *shared.parameters())}
    for side in (student, teacher):
        side["w"].requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in inputs:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shared(student, teacher)
    # The cheaper order: down [192, 40] @ [40, 12] first, then [48, 12]; up [192, 48] @ [48, 12], then [192, 40].
    assert sorted(kept.values()) == ([48 * 12, 192 * 12] if direction == "down" else [192 * 12, 192 * 40])


def test_sixteen_bit_parameters_are_compared_in_fp32_and_autocast_changes_nothing() -> None:
    student, teacher = models()
    shared = SharedProjections(student, teacher, "down", tables=["table"])
    exact = shared(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(shared(student, teacher), exact)
    halved = [{name: value.bfloat16() for name, value in side.items()} for side in (student, teacher)]
    raised = [{name: value.float() for name, value in side.items()} for side in halved]
    loss = shared(*halved)
    assert loss.dtype == torch.float32 and torch.equal(loss, shared(*raised)) and loss != exact


def test_no_pair_is_zero() -> None:
    assert shared_projection_loss([], [], [], "up").item() == 0


def test_what_is_refused() -> None:
    s, t = torch.ones(3, 4), torch.ones(6, 8)
    u, v = torch.ones(3, 6), torch.ones(8, 4)

    def refuses(rule: str, *given: Any, error: type[Exception] = ValueError, **options: Any) -> None:
        with pytest.raises(error, match=rule):
            shared_projection_loss(*given, **options)

    refuses(r"shared_projection: direction must be one of down, up, got 'left'", [s], [t], [(u, v)], "left")
    refuses(r"reduction must be one of mean, sum, got 'none'", [s], [t], [(u, v)], "down", reduction="none")
    refuses(r"must be as many, got 1, 2 and 1", [s], [t, t], [(u, v)], "down")
    refuses(r"pair 0: U must be \[3, 6\] to take \[6, 8\] to \[3, 4\], got \[6, 3\]", [s], [t], [(u.T, v)], "down")
    refuses(r"pair 1: V must be \[8, 4\] .* got \[4, 8\]", [s, s], [t, t], [(u, v), (u, v.T)], "down")
    refuses(r"pair 0: U must be \[6, 3\] to take \[3, 4\] to \[6, 8\]", [s], [t], [(u, v)], "up")
    refuses(r"a vector is projected on the right only, got U of \[3, 6\]", [s[0]], [t[0]], [(u, v)], "down")
    refuses(r"without U both must have the same number of rows, got \[6, 8\] and", [s], [t], [(None, v)], "down")
    refuses(r"two vectors or two matrices, got \[6, 8\] and \[4\]", [s[0]], [t], [(None, v)], "down")
    refuses(r"V must be a floating-point tensor, got torch.int64", [s], [t], [(u, v.long())], "down", error=TypeError)
    refuses(r"U must be on cpu like the parameter, got meta", [s], [t], [(u.to("meta"), v)], "down")
    with pytest.raises(ValueError, match="same names, only one side has b"):
        SharedProjections({"a": s}, {"a": t, "b": t}, "down")
    with pytest.raises(ValueError, match="at least one parameter, got none"):
        SharedProjections({}, {}, "down")
    with pytest.raises(ValueError, match="tables must name parameters, got b"):
        SharedProjections({"a": s}, {"a": t}, "down", tables=["b"])
    with pytest.raises(ValueError, match="without U both must have the same number of rows"):
        SharedProjections({"a": s}, {"a": t}, "down", tables=["a"])
    with pytest.raises(ValueError, match="those that it was built for: a"):
        SharedProjections({"a": s}, {"a": t}, "down")({"b": s}, {"b": t})
