# SPDX-License-Identifier: Apache-2.0
"""The objective: sums, parts, denominators, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pydistill import AttentionRelation, SoftTarget
from pydistill.objective import Objective


class Squares(nn.Module):
    """Mean over rows of the squared student signal, times a trainable factor."""

    def __init__(self, name: str = "squares", weight: float = 1.0, signal: str = "logits") -> None:
        super().__init__()
        self.name, self.weight = name, weight
        self.student_signals, self.teacher_signals = frozenset({signal}), frozenset[str]()
        self.signal = signal
        self.factor = nn.Parameter(torch.tensor(2.0))

    def count_items(self, batch: Any) -> int:
        return batch["input_ids"].shape[0]

    def forward(self, student: Any, teacher: Any, batch: Any, num_items: Any = None) -> Any:
        value = student[self.signal]
        return self.factor * value.square().sum() / (value.shape[0] if num_items is None else num_items)


def signals(rows: int = 4, classes: int = 3, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    torch.manual_seed(seed)
    student = {"logits": torch.randn(rows, classes, requires_grad=True)}
    teacher = {"logits": torch.randn(rows, classes)}
    labels = torch.randint(classes, (rows,))
    return student, teacher, {"input_ids": torch.zeros(rows, 2, dtype=torch.long), "labels": labels}


def test_weighted_sum_and_unweighted_parts() -> None:
    student, teacher, batch = signals()
    soft, hard = SoftTarget(weight=0.25), SoftTarget(weight=3.0, name="hard", hard_weight=1.0)
    total, parts = Objective([soft, hard])(student, teacher, batch)
    assert list(parts) == ["soft_target", "hard"]
    torch.testing.assert_close(parts["soft_target"], soft(student, teacher, batch).detach())
    expected = nn.functional.cross_entropy(student["logits"], batch["labels"])
    torch.testing.assert_close(parts["hard"], expected.detach())
    torch.testing.assert_close(total.detach(), 0.25 * parts["soft_target"] + 3.0 * parts["hard"])
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())


def test_parts_of_a_term_are_logged_beside_it() -> None:
    class Halves(Squares):
        def forward_with_parts(self, *arguments: Any, **options: Any) -> Any:
            value = self.forward(*arguments, **options)
            return value, {"left": 0.5 * value.detach(), "right": 0.5 * value.detach()}

    student, teacher, batch = signals()
    total, parts = Objective([Halves("a", weight=3.0), Squares("b")])(student, teacher, batch)
    assert list(parts) == ["a", "a.left", "a.right", "b"]
    torch.testing.assert_close(parts["a.left"] + parts["a.right"], parts["a"])
    # Parts are for reading: the sum is that of the terms.
    torch.testing.assert_close(total.detach(), 3 * parts["a"] + parts["b"])


def test_relations_are_parts_of_their_term() -> None:
    torch.manual_seed(0)
    kinds = ("queries@-1", "keys@-1", "values@-1")
    student, teacher = ({kind: torch.randn(2, 3, 5, 4) for kind in kinds} for _ in range(2))
    term = AttentionRelation(relation_weights=[1.0, 0.25])
    total, parts = Objective([term])(student, teacher, {"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    assert list(parts) == ["attention_relation", "attention_relation.qk", "attention_relation.vv"]
    torch.testing.assert_close(total, parts["attention_relation.qk"] + 0.25 * parts["attention_relation.vv"])
    torch.testing.assert_close(total, term(student, teacher, {"input_ids": torch.zeros(2, 5)}))


def test_sum_does_not_share_memory_with_its_parts() -> None:
    # The trainer scales the loss in place in distributed runs; the logged parts must not follow.
    student, teacher, batch = signals()
    total, parts = Objective([SoftTarget()])(student, teacher, batch)
    before = parts["soft_target"].clone()
    total.detach().mul_(7)
    assert torch.equal(parts["soft_target"], before)


def test_signals_are_the_union_over_terms() -> None:
    objective = Objective([SoftTarget(), Squares(signal="hidden")])
    assert objective.student_signals == {"logits", "hidden"}
    assert objective.teacher_signals == {"logits"}
    assert Objective([SoftTarget(hard_weight=1.0)]).teacher_signals == frozenset()


def test_parameters_of_terms_are_registered() -> None:
    assert [name for name, _ in Objective([SoftTarget(), Squares()]).named_parameters()] == ["terms.1.factor"]


@pytest.mark.parametrize("split", [(8,), (3, 5), (1, 1, 6)])
def test_micro_batches_add_up_to_the_large_batch(split: tuple[int, ...]) -> None:
    """With each term's own count over all micro-batches, values and gradients add up, whatever the split."""
    student, teacher, batch = signals(rows=8)
    batch["labels"][2] = -100  # one row fewer for the terms that read labels
    objective = Objective([SoftTarget(), SoftTarget(name="hard", hard_weight=1.0), Squares(weight=0.5)])
    whole, whole_parts = objective(student, teacher, batch)
    (expected,) = torch.autograd.grad(whole, student["logits"])

    def part_of(values: dict[str, Any], rows: slice) -> dict[str, Any]:
        return {name: value[rows] for name, value in values.items()}

    starts = [sum(split[:index]) for index in range(len(split))]
    pieces = [slice(start, start + size) for start, size in zip(starts, split, strict=True)]
    items = sum(objective.count_items(part_of(batch, rows)) for rows in pieces)
    assert items.tolist() == [7, 7, 8]  # type: ignore[union-attr]
    results = [
        objective(part_of(student, rows), part_of(teacher, rows), part_of(batch, rows), num_items=items)
        for rows in pieces
    ]
    total = torch.stack([loss for loss, _ in results]).sum()
    (gradient,) = torch.autograd.grad(total, student["logits"])
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(gradient, expected)
    for name, value in whole_parts.items():
        torch.testing.assert_close(sum(parts[name] for _, parts in results), value)


def test_one_number_is_the_denominator_of_every_term() -> None:
    student, teacher, batch = signals()
    objective = Objective([SoftTarget(), Squares()])
    mean, _ = objective(student, teacher, batch)
    torch.testing.assert_close(objective(student, teacher, batch, num_items=8)[0], mean / 2)


def missing_attribute() -> list[nn.Module]:
    term = Squares()
    del term.teacher_signals
    return [term]


@pytest.mark.parametrize(
    ("terms", "error", "words"),
    [
        (list, ValueError, "at least one term"),
        (lambda: [SoftTarget(), SoftTarget()], ValueError, "distinct names, got 'soft_target' 2 times"),
        (lambda: [Squares(weight=-1.0)], ValueError, "finite and not negative, got -1.0"),
        (lambda: [Squares(weight=float("nan"))], ValueError, "finite and not negative, got nan"),
        (
            lambda: [nn.Linear(2, 2)],
            TypeError,
            "must have name, student_signals, teacher_signals, count_items",
        ),
        (missing_attribute, TypeError, "teacher_signals"),
        (lambda: [torch.sum], TypeError, "must be an nn.Module"),
        (
            lambda: [SoftTarget(inplace=True), Squares()],
            ValueError,
            "overwrites the student's logits, which 'squares'",
        ),
    ],
)
def test_refuses(terms: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match="objective: .*" + words.replace("(", r"\(")):
        Objective(terms())


def test_inplace_is_allowed_beside_terms_that_read_something_else() -> None:
    Objective([SoftTarget(inplace=True), Squares(signal="hidden")])


def test_missing_signals_name_their_readers() -> None:
    student, teacher, batch = signals()
    objective = Objective([SoftTarget(), Squares(signal="hidden")])
    with pytest.raises(ValueError, match=r"student signal 'hidden' is read by 'squares', and only \['logits'\]"):
        objective(student, teacher, batch)
    with pytest.raises(ValueError, match="teacher signal 'logits' is read by 'soft_target'"):
        Objective([SoftTarget()])(student, {}, batch)


def test_refuses_counts_of_another_length_and_values_that_are_no_scalars() -> None:
    student, teacher, batch = signals()
    with pytest.raises(ValueError, match=r"one entry per term, \[1\], got \[2\]"):
        Objective([SoftTarget()])(student, teacher, batch, num_items=torch.ones(2))

    class Rows(Squares):
        def forward(self, student: Any, teacher: Any, batch: Any, num_items: Any = None) -> Any:
            return student["logits"].sum(-1)

    with pytest.raises(ValueError, match=r"'squares' must return a 0-d tensor, got shape \[4\]"):
        Objective([Rows()])(student, teacher, batch)
