# SPDX-License-Identifier: Apache-2.0
"""attention_relation_loss: golden values, error budget, masks, layouts, autograd, memory, errors, instruction sets."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ATTENTION_RELATION, DTYPES, IMPLEMENTATIONS, Outcome, Tensors, assert_within_budget, run, truth
from processes import ChildError, check_instruction_set, in_a_new_process, numerics_of
from torch import Tensor

from pydistill import AttentionRelation, _dispatch, attention_relation_loss
from pydistill.losses import attention_relation as module
from pydistill.losses.attention_relation import attention_relation_reference, attention_relations_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)
each_kernel = pytest.mark.parametrize("impl", [impl for impl in IMPLEMENTATIONS if impl != "reference"])
each_variant = pytest.mark.parametrize("variant", ATTENTION_RELATION.variants)
each_kind = pytest.mark.parametrize("kind", ["cross", "self"])
each_garbage = pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
needs_kernel = pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason="PYDISTILL_NATIVE=0: no compiled kernel")

STUDENTS = ATTENTION_RELATION.differentiable
SIDES = ("student_a", "student_b", "teacher_a", "teacher_b")

inputs = ATTENTION_RELATION.inputs


def features(shape: tuple[int, ...], dtype: str = "fp32", kind: str = "cross", **how: Any) -> Tensors:
    """The tensors of one relation, without mask and segments."""
    drawn = inputs(shape, DTYPES[dtype], **how)
    return {key: drawn[key] for key in SIDES if kind == "cross" or key.endswith("_a")}


def completed(tensors: Tensors, keywords: dict[str, Any]) -> dict[str, Any]:
    """A self relation is asked for by None."""
    return {**{key: None for key in SIDES if key not in tensors}, **keywords}


def ours(tensors: Tensors, impl: str = "auto", **keywords: Any) -> Outcome:
    """Forward and backward of the public function."""
    return run(attention_relation_loss, tensors, {"impl": impl, **completed(tensors, keywords)}, STUDENTS)


# Rounding of 1, which is what softmax makes of scores of size 1: the rows' values are small differences of those.
ROUNDING = {"fp64": 2**-52, "fp32": 2**-23, "bf16": 2**-23, "fp16": 2**-23}


def check_budget(
    tensors: Tensors, impl: str, *, floor: float = 0.0, value_floor: float = 0.0, **keywords: Any
) -> Outcome:
    """Runs `impl` and holds it against the reference in the same dtype and the truth in float64."""
    found = ours(tensors, impl, **keywords)
    keywords = completed(tensors, keywords)
    reference = run(attention_relation_reference, tensors, keywords, STUDENTS)
    exact = truth(ATTENTION_RELATION, tensors, keywords)
    assert_within_budget(found, reference, exact, floor=floor, value_floor=value_floor)
    return found


def assert_same_bits(found: Outcome, expected: Outcome, what: Any = "") -> None:
    assert torch.equal(found.value, expected.value), what
    for key, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[key], gradient), (what, key)


def by_hand(tensors: Tensors, **how: Any) -> Tensor:
    """The rows' values [B, A, N] in float64, by loops over sequences, heads and queries that slice what they need."""
    mask, segments, causal = how.get("mask"), how.get("segment_ids"), how.get("causal", False)
    batch, heads, positions, _ = tensors["student_a"].shape
    count = how.get("relation_heads") or heads
    rows = torch.zeros(batch, count, positions, dtype=torch.float64)

    def scores(side: str, b: int, head: int, tokens: list[int]) -> Tensor:
        sides = [tensors[f"{side}_a"], tensors.get(f"{side}_b", tensors[f"{side}_a"])]
        width = sides[0].size(1) * sides[0].size(3) // count
        repeats = sides[0].size(1) // sides[1].size(1)
        left, right = (
            torch.cat([x[b, h // again, tokens] for h in range(heads_of)], -1).double()
            [:, head * width : (head + 1) * width]
            for x, again, heads_of in zip(sides, (1, repeats), (sides[0].size(1),) * 2, strict=True)
        )  # fmt: skip
        scale = how.get("scale") or width**-0.5
        return left @ right.T * scale

    for b in range(batch):
        sequences: dict[int, list[int]] = {}
        for i in range(positions):
            segment = 0 if segments is None else int(segments[b, i])
            if segment >= 0 and (mask is None or mask[b, i]):
                sequences.setdefault(segment, []).append(i)
        for tokens in sequences.values():
            for head in range(count):
                student, teacher = scores("student", b, head, tokens), scores("teacher", b, head, tokens)
                for n, i in enumerate(tokens):
                    seen = slice(n + 1 if causal else None)
                    log_q, log_p = student[n, seen].log_softmax(-1), teacher[n, seen].log_softmax(-1)
                    rows[b, head, i] = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return rows


def test_kernel_is_built():
    """Guards all tests below: without it, a missing extension would turn them into tests of the reference."""
    if os.environ.get("PYDISTILL_NATIVE") == "0":
        assert _dispatch.native is None
    else:
        assert "cpp" in IMPLEMENTATIONS, _dispatch.BACKENDS["attention_relation"]["cpp"].reason
        assert _dispatch.resolve("attention_relation", torch.device("cpu")) == "cpp"


# -------------------------------------------------------------------------------- values


def golden(s: int, size: int) -> Tensor:
    """X[b, h, i, j] = 2 sin(1 + 0.7 s + 0.11 b + 0.31 h + 0.53 i + 0.17 j (1 + 0.05 i)), [2, 2, 5, size]."""
    b, h, i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, 2, 5, size)), indexing="ij")
    return 2 * torch.sin(1 + 0.7 * s + 0.11 * b + 0.31 * h + 0.53 * i + 0.17 * j * (1 + 0.05 * i))


GOLDEN_TEACHER = [golden(s, 8) for s in (0, 1, 2)]  # queries, keys, values
GOLDEN_STUDENT = [golden(s, 4) for s in (3, 4, 5)]
GOLDEN_MASK = torch.arange(5) < torch.tensor([[3], [5]])
GOLDEN = [
    # MiniLM, equations 6 and 9: queries with keys, values with values.
    ("qk", None, 1.2807720809, 1.3864817128),
    ("vv", None, 1.8015429843, 1.8218003099),
    # MiniLMv2 with four relation heads out of two.
    ("qq", 4, 1.4950743106, 1.5545997905),
    ("kk", 4, 1.2172384936, 1.3083954822),
    ("vv", 4, 1.4821550840, 1.5417843392),
]


def golden_tensors(relation: str, dtype: torch.dtype = torch.float64) -> Tensors:
    a, b = ("qkv".index(letter) for letter in relation)
    tensors = {"student_a": GOLDEN_STUDENT[a], "teacher_a": GOLDEN_TEACHER[a]}
    if a != b:
        tensors = {**tensors, "student_b": GOLDEN_STUDENT[b], "teacher_b": GOLDEN_TEACHER[b]}
    return {key: value.to(dtype) for key, value in tensors.items()}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("relation", "heads", "sequence_mean", "token_mean"), GOLDEN)
@each_implementation
def test_golden_values(impl, relation, heads, sequence_mean, token_mean, dtype):
    """Values computed by an independent script in float64, given to 10 digits: lengths 3 and 5, two heads."""
    for reduction, expected in (("sequence_mean", sequence_mean), ("token_mean", token_mean)):
        found = ours(golden_tensors(relation, dtype), impl, mask=GOLDEN_MASK, relation_heads=heads, reduction=reduction)
        assert found.value.dtype == dtype
        assert found.value.shape == ()
        assert float(found.value) == pytest.approx(expected, abs=1e-10 if dtype == torch.float64 else 1e-6)


@each_implementation
def test_values_that_must_not_come_out(impl):
    """Two bugs of published code, which these inputs can tell from the truth: padded queries that stay in the mean,
    and heads that are split again before tokens and heads have changed places."""

    def log_relation(a: Tensor, b: Tensor) -> Tensor:
        scores = a @ b.mT / a.size(-1) ** 0.5
        return scores.masked_fill(~GOLDEN_MASK[:, None, None], -math.inf).log_softmax(-1)

    log_p, log_q = log_relation(*GOLDEN_TEACHER[:2]), log_relation(*GOLDEN_STUDENT[:2])
    everywhere = torch.where(GOLDEN_MASK[:, None, None], log_p.exp() * (log_p - log_q), 0.0).sum(-1).mean()
    assert float(everywhere) == pytest.approx(1.3039072039, abs=1e-10)
    found = ours(golden_tensors("qk"), impl, mask=GOLDEN_MASK).value
    assert abs(float(found) - float(everywhere)) > 0.01

    mixed = {"student_a": GOLDEN_STUDENT[0].reshape(2, 4, 5, 2), "teacher_a": GOLDEN_TEACHER[0].reshape(2, 4, 5, 4)}
    assert float(ours(mixed, impl, mask=GOLDEN_MASK).value) == pytest.approx(0.9166962554, abs=1e-10)
    found = ours(golden_tensors("qq"), impl, mask=GOLDEN_MASK, relation_heads=4).value
    assert abs(float(found) - 0.9166962554) > 0.01


@each_implementation
def test_same_value_as_plain_pytorch(impl):
    """The line that the docstring promises."""
    tensors = features((2, 3, 7, 4, 5), "fp64")
    p = (tensors["teacher_a"] @ tensors["teacher_b"].mT / 5**0.5).softmax(-1)
    student = tensors["student_a"] @ tensors["student_b"].mT / 4**0.5
    plain = (p * (p.log() - student.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(attention_relation_loss(**tensors, impl=impl), plain)


@pytest.mark.numerics
@each_variant
@each_implementation
def test_rows_by_hand(impl, variant):
    """Every option against loops that know nothing of masks, and every reduction from the rows."""
    tensors, keywords = ATTENTION_RELATION.select(inputs((3, 3, 11, 8, 4), torch.float64), variant)
    keywords.pop("reduction", None)
    items = keywords.pop("num_items", None)
    how = {key: value for key, value in keywords.items() if key not in SIDES}
    how |= {key: tensors[key] for key in ("mask", "segment_ids") if key in tensors}
    expected = by_hand(tensors, **how)

    def found(reduction: str, **more: Any) -> Tensor:
        return attention_relation_loss(**tensors, **keywords, **more, reduction=reduction, impl=impl)

    torch.testing.assert_close(found("none"), expected)
    torch.testing.assert_close(found("sum"), expected.sum())
    valid = tensors.get("mask", torch.ones(3, 11, dtype=torch.bool))
    segments = tensors.get("segment_ids", torch.zeros(3, 11, dtype=torch.long))
    valid = valid & (segments >= 0)
    means = [
        expected[b, :, valid[b] & (segments[b] == segment)].mean()
        for b in range(3)
        for segment in segments[b][valid[b]].unique()
    ]
    torch.testing.assert_close(found("sequence_mean"), torch.stack(means).mean())
    tokens = expected.mean(1).sum()
    torch.testing.assert_close(found("token_mean"), tokens / valid.sum())
    if items is not None:
        torch.testing.assert_close(found("sequence_mean", num_items=items), torch.stack(means).sum() / float(items))
        torch.testing.assert_close(found("token_mean", num_items=items), tokens / float(items))


@pytest.mark.numerics
@each_implementation
def test_grouped_query_heads_by_hand(impl):
    """Six query heads over two (student) and three (teacher) key heads."""
    tensors = features((2, 6, 9, 4, 6), "fp64")
    tensors["student_b"], tensors["teacher_b"] = tensors["student_b"][:, :2], tensors["teacher_b"][:, :3]
    for heads in (None, 4):
        rows = attention_relation_loss(**tensors, relation_heads=heads, reduction="none", impl=impl)
        torch.testing.assert_close(rows, by_hand(tensors, relation_heads=heads))


# -------------------------------------------------------------------------------- error budget
# Where reductions are not the point, "sum" keeps gradients of size 1, which the budget's absolute terms cannot excuse.

SHAPES = [
    (3, 3, 21, 8, 16),  # less than a block of queries, ragged, one row each of the inputs' three masks
    (2, 2, 70, 12, 6),  # more than one block; a head size that is no whole vector; teacher smaller than student
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_variant
@each_kernel
def test_error_budget(impl, variant, dtype):
    for shape in SHAPES:
        tensors, keywords = ATTENTION_RELATION.select(inputs(shape, DTYPES[dtype]), variant)
        check_budget(tensors, impl, **keywords)


LENGTHS = [
    (1, 8, 8),  # one token
    (2, 8, 8),
    (17, 8, 16),  # one more than the widest vector
    *((n, 16, 24) for n in (63, 64, 65)),  # around the widest block of queries
    *((n, 16, 8) for n in (127, 128, 129)),  # around the first chunk of queries
    (300, 32, 64),  # several chunks, keys copied as a whole
    (513, 32, 64),  # keys copied in blocks
    (1025, 8, 4),  # the largest number of chunks
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_kind
@pytest.mark.parametrize(("positions", "student_size", "teacher_size"), LENGTHS)
@each_kernel
def test_lengths(impl, positions, student_size, teacher_size, kind, dtype):
    heads = 2 if positions < 500 else 1
    tensors = features((1, heads, positions, student_size, teacher_size), dtype, kind)
    for causal in (False, True) if positions < 200 or dtype == "fp32" else (True,):
        check_budget(tensors, impl, causal=causal, reduction="sum", floor=ROUNDING[dtype])


@pytest.mark.numerics
@pytest.mark.parametrize("positions", [129, 300, 1025])
@each_kind
@each_kernel
def test_rows_of_long_sequences(impl, kind, positions):
    """Row by row, where errors of opposite sign cannot cancel: sums over many keys must not lose more than the
    reference's do."""
    for causal in (False, True):
        check_budget(features((1, 1, positions, 8, 4), "fp32", kind), impl, causal=causal, reduction="none")


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
@each_kernel
def test_odd_head_sizes(impl, kind, dtype):
    """1, 5, 7: no whole vector, no whole pair of bf16; 24: a vector and a half; 1 and 3 tokens beside them."""
    for student_size in (1, 5, 7, 24):
        for teacher_size in (1, 7, 24):
            tensors = features((1, 2, 37, student_size, teacher_size), dtype, kind)
            check_budget(tensors, impl, reduction="sum")
            check_budget({key: value[:, :, :3] for key, value in tensors.items()}, impl, reduction="sum")


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@each_kind
@each_kernel
def test_relation_heads_that_cut_heads(impl, kind, dtype):
    """12 heads of 32 and 64 as 16 of 24 and 48 (every other one lies in two heads) and as 48 of 8 and 16 (MiniLMv2);
    different numbers of heads on the two sides; heads of one feature."""
    for heads in (16, 48):
        check_budget(features((1, 12, 33, 32, 64), dtype, kind), impl, relation_heads=heads, reduction="sum")
    tensors = features((2, 4, 19, 6, 6), dtype, kind)
    for key, value in tensors.items():
        if key.startswith("teacher"):
            tensors[key] = value.reshape(2, 2, 2, 19, 6).transpose(2, 3).reshape(2, 2, 19, 12)
    for heads in (1, 3, 8, 24):
        check_budget(tensors, impl, relation_heads=heads, reduction="sum", causal=True)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
@each_kernel
def test_several_sweeps(impl, kind, dtype):
    """Keys whose gradient leaves the cache: those of 512 features do from 353 tokens on (in fp64 from 177)."""
    positions = 180 if dtype == "fp64" else 360
    scale = 0.4 if kind == "self" else 1.0  # a token's score with itself is the size of its features
    drawn = inputs((1, 1, positions, 512, 8), DTYPES[dtype], scale=scale)
    tensors = {key: drawn[key] for key in features((1, 1, 1, 1, 1), dtype, kind)}
    # A score is the sum of 512 products, one after the other: an error of some roundings, which a row's value shows.
    for causal in (False, True):
        floors = {"floor": ROUNDING[dtype], "value_floor": 80 * ROUNDING[dtype]}
        check_budget(tensors, impl, causal=causal, reduction="none", **floors)


@pytest.mark.numerics
@each_kind
@each_kernel
def test_several_sweeps_of_cut_heads(impl, kind):
    """One relation head out of 24, for tokens with gaps."""
    drawn = inputs((1, 24, 400, 24, 2), scale=0.4 if kind == "self" else 1.0)
    tensors = {key: drawn[key] for key in features((1, 1, 1, 1, 1), "fp32", kind)}
    tensors["mask"] = torch.rand(1, 400, generator=torch.Generator().manual_seed(1)) > 0.1
    floors = {"floor": ROUNDING["fp32"], "value_floor": 80 * ROUNDING["fp32"]}
    check_budget(tensors, impl, relation_heads=1, reduction="none", **floors)


def long_outcome(tensors: Tensors, dtype: torch.dtype, causal: bool) -> Outcome:
    """What `run` gives for reduction="sum" of one head, by plain matrix products on some rows at a time: of the
    reference's order of memory there would be a dozen N x N matrices."""
    student_a, teacher_a = (tensors[key][0, 0].to(dtype) for key in ("student_a", "teacher_a"))
    student_b, teacher_b = (
        tensors[key][0, 0].to(dtype) if key in tensors else tensors[key[:-1] + "a"][0, 0].to(dtype)
        for key in ("student_b", "teacher_b")
    )
    units = [x.size(-1) ** -0.5 for x in (student_a, teacher_a)]
    positions, value = len(student_a), torch.zeros((), dtype=dtype)
    grad_a, grad_b = torch.zeros_like(student_a), torch.zeros_like(student_b)
    for begin in range(0, positions, 256):
        rows = torch.arange(begin, min(begin + 256, positions))
        seen = slice(int(rows[-1]) + 1 if causal else None)
        hidden = torch.arange(positions)[seen] > rows[:, None] if causal else torch.zeros((), dtype=torch.bool)
        log_q = (student_a[rows] @ student_b[seen].T * units[0]).masked_fill(hidden, -math.inf).log_softmax(-1)
        log_p = (teacher_a[rows] @ teacher_b[seen].T * units[1]).masked_fill(hidden, -math.inf).log_softmax(-1)
        p = log_p.exp()
        value += (p * (log_p - log_q).masked_fill(hidden, 0.0)).sum()
        gradient = (log_q.exp() - p) * (0.5 * units[0])
        grad_a[rows] += gradient @ student_b[seen]
        grad_b[seen] += gradient.T @ student_a[rows]
    stored = tensors["student_a"].dtype
    if "student_b" not in tensors:
        return Outcome(
            value, {"student_a": (grad_a + grad_b)[None, None].to(stored if dtype != torch.float64 else dtype)}
        )
    gradients = {"student_a": grad_a, "student_b": grad_b}
    kept = stored if dtype != torch.float64 else dtype
    return Outcome(value, {key: gradient[None, None].to(kept) for key, gradient in gradients.items()})


@pytest.mark.parametrize(
    ("kind", "student_size", "dtype", "causal"),
    [
        ("self", 3, "fp32", True),  # one sweep, with the smallest block of queries
        ("cross", 48, "fp32", False),  # several sweeps
        ("self", 48, "bf16", True),
    ],
)
@needs_kernel
def test_4100_tokens(kind, student_size, dtype, causal):
    tensors = features((1, 1, 4100, student_size, 2), dtype, kind)
    found = ours(tensors, "cpp", causal=causal, reduction="sum")
    expected = [long_outcome(tensors, precision, causal) for precision in (torch.float32, torch.float64)]
    assert_within_budget(found, *expected, floor=ROUNDING[dtype])


@pytest.mark.parametrize("positions", [2048, 4096, 8300])
@each_kind
@needs_kernel
def test_repeated_tokens(kind, positions):
    """Every token r times: the same distributions over distinct tokens, so r times the value, and for each copy of a
    token the gradient of the original. 8,300 tokens leave the cache by their scores alone."""
    originals = features((1, 1, positions // 100, 8, 4), "fp32", kind)
    expected = truth(ATTENTION_RELATION, originals, completed(originals, {"reduction": "sum"}))
    found = ours({key: value.repeat(1, 1, 100, 1) for key, value in originals.items()}, "cpp", reduction="sum")
    # Whole periods of the same numbers are rounded in the same way: these errors do not average out.
    torch.testing.assert_close(found.value.double(), expected.value * 100, rtol=1e-5, atol=0.0)
    for key, gradient in expected.gradients.items():
        copies = found.gradients[key].double().unflatten(2, (100, positions // 100))
        torch.testing.assert_close(copies, gradient[:, :, None].expand_as(copies), rtol=1e-4, atol=1e-5)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
@each_implementation
def test_scores_of_200(impl, kind, dtype):
    """Attention on single tokens, different ones on the two sides, and equal scores far from 0."""
    for positions in (9, 80):
        tensors = features((1, 2, positions, 16, 16), dtype, kind, scale=9.0)
        scores = tensors["student_a"].double() @ tensors.get("student_b", tensors["student_a"]).double().mT / 4
        assert float(scores.abs().max()) > 200
        for causal in (False, True):
            # Scores between 256 and 512 have 256 roundings of 1, and so has the value of a row.
            rounding = 256 * ROUNDING[dtype]
            found = check_budget(
                tensors, impl, causal=causal, reduction="sum", floor=rounding, value_floor=positions * rounding
            )
            assert bool(found.value.isfinite())
    far = {key: torch.full_like(value, 7.0) for key, value in features((1, 1, 33, 16, 16), dtype, kind).items()}
    found = ours(far, impl, reduction="sum")
    assert float(found.value) == 0.0


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_kind
@each_implementation
def test_student_almost_equal_to_teacher(impl, kind, dtype):
    """The value is a small difference of large numbers: rounding of scores of size 1 is allowed, no more."""
    tensors = features((1, 2, 90, 16, 16), "fp64", kind)
    noise = features((1, 2, 90, 16, 16), "fp64", kind, seed=1)
    for key in STUDENTS:
        if key in tensors:
            teacher = tensors[key.replace("student", "teacher")]
            tensors[key] = teacher + 1e-3 * noise[key]
    tensors = {key: value.to(DTYPES[dtype]) for key, value in tensors.items()}
    check_budget(tensors, impl, floor=1e-7)


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
@each_implementation
def test_equality_is_zero(impl, kind, dtype):
    """Student and teacher the same: the value is exactly 0, and the gradient vanishes to rounding."""
    for shape, scale in (((2, 3, 21, 8, 8), 1.0), ((1, 1, 150, 7, 7), 9.0), ((1, 1, 200, 1024, 1024), 0.3)):
        tensors = features(shape, dtype, kind, scale=scale)
        for key in STUDENTS:
            if key in tensors:
                tensors[key.replace("student", "teacher")] = tensors[key].clone()
        found = ours(tensors, impl, reduction="none")
        assert float(found.value.abs().max()) == 0.0
        epsilon = torch.finfo(torch.float64 if dtype == "fp64" else torch.float32).eps
        # Sums over a row of rounded differences of probabilities that sum to 1, times features of this size.
        largest = 4 * epsilon * float(tensors["student_a"].abs().max()) * shape[2] ** 0.5
        assert all(float(gradient.abs().max()) <= largest for gradient in found.gradients.values())


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", DTYPES)
@each_kind
@each_implementation
def test_one_token_leaves_nothing_to_learn(impl, kind, dtype):
    """A distribution over one token: in a batch of length 1, behind a mask, and in segments."""
    tensors = features((2, 3, 6, 5, 7), dtype, kind)
    first = {key: value[:, :, :1] for key, value in tensors.items()}
    alone = {**tensors, "mask": torch.eye(6, dtype=torch.bool)[[1, 5]]}
    apart = {**tensors, "segment_ids": torch.arange(6).expand(2, 6)}
    for given in (first, alone, apart):
        for reduction in module.REDUCTIONS:
            found = ours(given, impl, reduction=reduction)
            assert float(found.value.abs().max()) == 0.0
            assert all(float(gradient.abs().max()) == 0.0 for gradient in found.gradients.values())
    rows = ours(tensors, impl, causal=True, reduction="none").value
    assert float(rows[:, :, 0].abs().max()) == 0.0  # the first token sees only itself


# -------------------------------------------------------------------------------- masks

MASKS: dict[str, Callable[[int], Tensor]] = {
    "right": lambda n: torch.arange(n) < torch.tensor([[n], [n - n // 3], [1]]),
    "left": lambda n: torch.arange(n) >= torch.tensor([[0], [n // 3], [n - 2]]),
    "holes": lambda n: torch.rand(3, n, generator=torch.Generator().manual_seed(5)) > 0.3,
}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("padding", MASKS)
@each_kind
@each_implementation
def test_padded_batch_equals_its_sequences_one_by_one(impl, kind, padding, dtype):
    """In C++ bit for bit; value and gradient."""
    for positions, causal in ((70, False), (150, True)):
        tensors, mask = features((3, 2, positions, 12, 6), dtype, kind), MASKS[padding](positions)
        for reduction, items in (("sequence_mean", 3), ("token_mean", mask.sum()), ("none", None)):
            how = {"causal": causal, "reduction": reduction}
            batch = ours({**tensors, "mask": mask}, impl, **how)
            value = torch.zeros((), dtype=batch.value.dtype)
            for b in range(3):
                kept = mask[b].nonzero()[:, 0]
                one = {key: tensor[b : b + 1, :, kept] for key, tensor in tensors.items()}
                if reduction == "none":  # with the weights that the rows have in the batch
                    weights = 2.0 ** (torch.arange(batch.value.numel()) % 3 - 1).view_as(batch.value)
                    single = weighted(one, weights[b : b + 1, :, kept], impl, causal=causal)
                    assert_close(batch.value[b : b + 1, :, kept], single.value, impl)
                else:
                    single = ours(one, impl, **how, num_items=items)
                    value += single.value
                for key, gradient in single.gradients.items():
                    assert_close(batch.gradients[key][b : b + 1, :, kept], gradient, impl)
                    assert float(batch.gradients[key][b, :, ~mask[b]].abs().sum()) == 0.0
            if reduction != "none":
                torch.testing.assert_close(batch.value, value)


def assert_close(found: Tensor, expected: Tensor, impl: str) -> None:
    """The arithmetic of C++ does not depend on what is padded; that of matrix products in blocks may."""
    if impl == "cpp":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected)


def weighted(tensors: Tensors, weights: Tensor, impl: str, **keywords: Any) -> Outcome:
    """Rows, and the gradients of their weighted sum."""
    leaves = {key: tensors[key].detach().requires_grad_() for key in STUDENTS if key in tensors}
    given = completed(tensors, {**tensors, **leaves})
    value = attention_relation_loss(**given, **keywords, reduction="none", impl=impl)
    gradients = torch.autograd.grad(value, list(leaves.values()), weights.to(value.dtype))
    return Outcome(value.detach(), dict(zip(leaves, gradients, strict=True)))


@pytest.mark.numerics
@each_kind
@each_kernel
def test_packed_row_equals_its_segments_one_by_one(impl, kind):
    """Segments side by side or mixed, ids in any order: in C++ bit for bit what each gives alone."""
    tensors = features((1, 2, 150, 8, 12), "fp32", kind)
    side_by_side = torch.tensor([5] * 40 + [-3] * 7 + [2] * 33 + [9] * 70)
    mixed = side_by_side[torch.randperm(150, generator=torch.Generator().manual_seed(0))]
    for ids in (side_by_side, mixed):
        for causal in (False, True):
            packed = ours({**tensors, "segment_ids": ids[None]}, impl, causal=causal, reduction="sequence_mean")
            for segment in (5, 2, 9):
                kept = (ids == segment).nonzero()[:, 0]
                one = {key: value[:, :, kept] for key, value in tensors.items()}
                single = ours(one, impl, causal=causal, num_items=3)
                for key, gradient in single.gradients.items():
                    assert_close(packed.gradients[key][:, :, kept], gradient, impl)
            for gradient in packed.gradients.values():
                assert float(gradient[:, :, ids < 0].abs().sum()) == 0.0


@pytest.mark.numerics
@each_garbage
@each_kind
@each_implementation
def test_garbage_in_padding(impl, kind, garbage):
    """NaN and infinities where mask or segment say padding change no bit, and padding itself receives exactly 0."""
    for dtype in ("fp32", "bf16"):
        drawn = inputs((3, 2, 40, 7, 12), DTYPES[dtype])
        clean = features((3, 2, 40, 7, 12), dtype, kind)
        for names in (("mask",), ("segment_ids",), ("mask", "segment_ids")):
            valid = torch.ones(3, 40, dtype=torch.bool)
            if "mask" in names:
                valid &= drawn["mask"]
            if "segment_ids" in names:
                valid &= drawn["segment_ids"] >= 0
            assert 0 < int(valid.sum()) < valid.numel()
            padding = ~valid[:, None, :, None]
            marks = {name: drawn[name] for name in names}
            dirty = {key: value.masked_fill(padding, garbage) for key, value in clean.items()}
            for how in ({"relation_heads": 1}, {"causal": True}, {"reduction": "none"}):
                found = ours({**dirty, **marks}, impl, **how)
                assert_same_bits(found, ours({**clean, **marks}, impl, **how), how)
                for gradient in found.gradients.values():
                    assert float(gradient.masked_select(padding).abs().sum()) == 0.0


@pytest.mark.numerics
@pytest.mark.parametrize("reduction", module.REDUCTIONS)
@each_implementation
def test_all_padding(impl, reduction):
    """A whole batch of it, and one row of the batch: no sequence, so it does not count in a mean."""
    for kind in ("cross", "self"):
        tensors = features((2, 3, 17, 5, 8), "fp32", kind)
        none = {key: torch.full_like(value, math.nan) for key, value in tensors.items()}
        for marks in ({"mask": torch.zeros(2, 17, dtype=torch.bool)}, {"segment_ids": torch.full((2, 17), -1)}):
            found = ours({**none, **marks}, impl, reduction=reduction)
            assert float(found.value.abs().sum()) == 0.0
            assert all(float(gradient.abs().sum()) == 0.0 for gradient in found.gradients.values())
        half = {**tensors, "mask": torch.tensor([[True], [False]]).expand(2, 17)}
        alone = ours({key: value[:1] for key, value in tensors.items()}, impl, reduction=reduction)
        found = ours(half, impl, reduction=reduction)
        torch.testing.assert_close(found.value.sum(), alone.value.sum())
        assert float(found.gradients["student_a"][1].abs().sum()) == 0.0


@pytest.mark.numerics
@pytest.mark.parametrize("shape", [(0, 2, 7, 4, 8), (2, 3, 0, 4, 8), (0, 1, 0, 1, 1)])
@pytest.mark.parametrize("reduction", module.REDUCTIONS)
@each_implementation
def test_empty_batch(impl, reduction, shape):
    for kind in ("cross", "self"):
        for marks in ({}, {key: value for key, value in inputs(shape).items() if key in ("mask", "segment_ids")}):
            found = ours({**features(shape, "fp32", kind), **marks}, impl, reduction=reduction, causal=True)
            assert found.value.shape == (torch.Size(shape[:3]) if reduction == "none" else ())
            assert float(found.value.sum()) == 0.0
            assert all(gradient.shape == shape[:4] for gradient in found.gradients.values())


@pytest.mark.numerics
@each_implementation
def test_nan_in_a_valid_token_is_not_hidden(impl):
    """It reaches every row that sees the token, and no other sequence."""
    segments = torch.tensor([[0] * 20 + [1] * 30]).expand(2, -1)
    for key in SIDES:
        tensors = features((2, 1, 50, 8, 8))
        tensors[key][1, 0, 33, 2] = math.nan
        rows = attention_relation_loss(**tensors, segment_ids=segments, reduction="none", impl=impl)
        expected = torch.zeros(2, 1, 50, dtype=torch.bool)
        expected[1, 0, 33 if key.endswith("_a") else slice(20, None)] = True
        assert torch.equal(rows.isnan(), expected), key
        causal = attention_relation_loss(**tensors, causal=True, reduction="none", impl=impl)
        assert bool(causal[1, 0, 33].isnan())


@pytest.mark.numerics
@each_kind
@each_implementation
def test_nan_in_a_valid_token_leaves_padding_alone(impl, kind):
    """Padding among the tokens that meet the NaN receives exactly 0, not 0 times NaN."""
    tensors = features((1, 2, 40, 8, 8), "fp32", kind)
    tensors["student_a"][0, :, 7] = math.nan
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 3:6] = mask[0, 30:] = False
    found = ours({**tensors, "mask": mask}, impl)
    assert bool(found.gradients["student_a"][0, :, 7].isnan().all())
    for gradient in found.gradients.values():
        assert float(gradient[0, :, ~mask[0]].abs().sum()) == 0.0


@pytest.mark.numerics
@pytest.mark.parametrize("value", [1e3, -1e18, math.inf, math.nan])
@each_implementation
def test_later_tokens_cannot_be_seen(impl, value):
    """causal: what comes later, however large or NaN, changes no bit of a row's value before it."""
    tensors = features((1, 2, 60, 8, 8))
    expected = attention_relation_loss(**tensors, causal=True, reduction="none", impl=impl)
    changed = {key: tensor.clone() for key, tensor in tensors.items()}
    for tensor in changed.values():
        tensor[:, :, 35:] = value
    found = attention_relation_loss(**changed, causal=True, reduction="none", impl=impl)
    assert torch.equal(found[:, :, :35], expected[:, :, :35])


@pytest.mark.numerics
@each_implementation
def test_kinds_of_masks_and_segments(impl):
    """Masks as bool or integers, segments as any integer, strided ones."""
    drawn = inputs((3, 2, 30, 4, 4))
    mask, segments = drawn["mask"], drawn["segment_ids"].remainder(100) - 20  # 2^40 does not fit into all of these
    tensors = {**drawn, "segment_ids": segments}
    expected = ours(tensors, impl)
    for kind in (mask.long() * 3, -mask.int(), mask.to(torch.uint8), mask.repeat_interleave(2, 1)[:, ::2]):
        assert_same_bits(ours({**tensors, "mask": kind}, impl), expected)
    for kind in (segments.int(), segments.to(torch.int8), segments.repeat_interleave(2, 1)[:, ::2]):
        assert_same_bits(ours({**tensors, "segment_ids": kind}, impl), expected)


# -------------------------------------------------------------------------------- layouts


def layouts(base: Tensor) -> dict[str, Tensor]:
    """The same [B, H, N, d] values laid out differently."""
    batch, heads, positions, size = base.shape
    joined = torch.full((batch, positions, 3, heads, size), math.nan, dtype=base.dtype)
    joined[:, :, 1] = base.transpose(1, 2)
    wide = torch.full((batch, heads, positions + 2, size + 5), math.nan, dtype=base.dtype)
    wide[:, :, 1:-1, 3:-2] = base
    steps = torch.full((batch, heads, positions, 2 * size), math.nan, dtype=base.dtype)
    steps[..., ::2] = base
    return {
        "as a projection leaves it": base.transpose(1, 2).contiguous().transpose(1, 2),
        "one of three in a joint projection": joined[:, :, 1].transpose(1, 2),
        "slices at odd offsets": wide[:, :, 1:-1, 3:-2],
        "every second feature": steps[..., ::2],
        "features before tokens": base.transpose(2, 3).contiguous().transpose(2, 3),
        "batch innermost": base.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    }


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@each_kind
@each_implementation
def test_non_contiguous_inputs(impl, kind, dtype):
    """The same bits from every layout, with whole and with cut heads, and nothing read beside them (NaN)."""
    tensors = features((2, 3, 21, 8, 16), dtype, kind)
    for heads in (None, 4):
        expected = ours(tensors, impl, relation_heads=heads)
        for name in layouts(tensors["student_a"]):
            laid_out = {key: layouts(value)[name] for key, value in tensors.items()}
            assert not laid_out["student_a"].is_contiguous()
            found = ours(laid_out, impl, relation_heads=heads)
            if impl == "cpp":
                assert_same_bits(found, expected, name)
            else:
                torch.testing.assert_close((found.value, found.gradients), (expected.value, expected.gradients))


@needs_kernel
def test_gradient_has_the_layout_of_its_tensor():
    """The projection behind reads its gradient as it wrote its output; a gradient is dense, whatever the gaps."""
    base = features((2, 3, 20, 8, 8))["student_a"]
    for name, expected in (
        ("as a projection leaves it", (480, 8, 24, 1)),
        ("one of three in a joint projection", (480, 8, 24, 1)),
        ("slices at odd offsets", (480, 160, 8, 1)),
    ):
        tensors = {"student_a": layouts(base)[name], "teacher_a": base + 1}
        for reduction in ("sum", "none"):
            gradient = ours(tensors, "cpp", reduction=reduction).gradients["student_a"]
            assert gradient.stride() == expected, name


@pytest.mark.numerics
@each_kind
@each_implementation
def test_expanded_inputs(impl, kind):
    """One teacher for the whole batch; one student used many times collects the sum of the gradients."""
    shape = (3, 2, 18, 8, 8)
    tensors = features(shape, "fp32", kind)
    same_teacher = {
        key: value[:1].expand_as(value) if key.startswith("teacher") else value for key, value in tensors.items()
    }
    check_budget(same_teacher, impl)
    leaves = {key: tensors[key][:1, :1].clone().requires_grad_() for key in STUDENTS if key in tensors}
    exact = {key: leaf.detach().double().requires_grad_() for key, leaf in leaves.items()}

    def loss(leaves: Tensors, function: Callable[..., Tensor], **how: Any) -> Tensor:
        dtype = leaves["student_a"].dtype
        given = {key: value.to(dtype) for key, value in tensors.items()}
        given |= {key: leaf.expand(3, 2, -1, -1) for key, leaf in leaves.items()}
        return function(**completed(given, given), **how)

    loss(leaves, attention_relation_loss, impl=impl).backward()
    loss(exact, attention_relation_reference).backward()
    for key, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), exact[key].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.numerics
@pytest.mark.parametrize(
    "dtypes", [("fp32", "bf16"), ("bf16", "fp32"), ("bf16", "fp16"), ("fp64", "fp32"), ("fp32", "fp64")]
)
@each_kind
@each_implementation
def test_mixed_dtypes(impl, kind, dtypes):
    """All in the widest; neither side is rounded to the other's type, and each gradient has its tensor's."""
    tensors = {
        key: value.to(DTYPES[dtypes[0 if key.startswith("student") else 1]])
        for key, value in features((2, 2, 25, 8, 6), "fp64", kind).items()
    }
    found = check_budget(tensors, impl)
    assert found.value.dtype == (torch.float64 if "fp64" in dtypes else torch.float32)
    assert all(gradient.dtype == DTYPES[dtypes[0]] for gradient in found.gradients.values())
    if kind == "cross":
        tensors["student_b"] = tensors["student_b"].to(DTYPES[dtypes[1]])
        check_budget(tensors, impl)


# -------------------------------------------------------------------------------- properties


@pytest.mark.numerics
@each_implementation
def test_invariances(impl):
    """The order of heads, features and tokens means nothing; a vector added to all keys changes nothing; the scale
    can stand in the features."""
    tensors = features((2, 4, 33, 8, 6), "fp64")
    expected = attention_relation_loss(**tensors, impl=impl)

    def same(changed: Tensors, **how: Any) -> None:
        torch.testing.assert_close(attention_relation_loss(**changed, impl=impl, **how), expected)

    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    same({key: value[:, :, order] for key, value in tensors.items()})
    same({key: value.flip(1) for key, value in tensors.items()})
    same({key: value.flip(3) for key, value in tensors.items()})
    shift = 100 * torch.ones(1, 1, 1, 1, dtype=torch.float64)
    same({**tensors, "student_b": tensors["student_b"] + shift, "teacher_b": tensors["teacher_b"] - shift})
    factors = {"student_a": 2 / 8**0.5, "teacher_a": 2 / 6**0.5}
    same({key: value * factors.get(key, 1.0) for key, value in tensors.items()}, scale=0.5)
    found = ours(tensors, impl)
    # Scores of a row may grow together for nothing: with gradient G, rows of G sum to 0.
    assert float((found.gradients["student_b"]).sum(2).abs().max()) < 1e-15


@pytest.mark.numerics
@each_implementation
def test_self_relation_is_a_cross_relation_with_itself(impl):
    """Same value, and the sum of both gradients: (G + G^T) A."""
    for dtype in ("fp64", "fp32"):
        tensors = features((2, 2, 77, 8, 6), dtype, "self")
        found = ours(tensors, impl)
        both = ours({**tensors, "student_b": tensors["student_a"], "teacher_b": tensors["teacher_a"]}, impl)
        expected = both.gradients["student_a"] + both.gradients["student_b"]
        torch.testing.assert_close(found.value, both.value)
        torch.testing.assert_close(found.gradients["student_a"], expected, rtol=1e-5, atol=1e-8)
        # And through autograd, where the caller passes one tensor twice.
        leaf = tensors["student_a"].clone().requires_grad_()
        attention_relation_loss(leaf, leaf, tensors["teacher_a"], tensors["teacher_a"], impl=impl).backward()
        torch.testing.assert_close(leaf.grad * 0.5, expected)


@each_implementation
def test_num_items(impl):
    """Numbers and tensors of one element, of any type."""
    tensors = inputs((3, 2, 20, 8, 8))
    sequences = sum(
        len(segment_ids[valid & (segment_ids >= 0)].unique())
        for segment_ids, valid in zip(tensors["segment_ids"], tensors["mask"], strict=True)
    )
    tokens = int((tensors["mask"] & (tensors["segment_ids"] >= 0)).sum())
    for reduction, own in (("sequence_mean", sequences), ("token_mean", tokens)):
        expected = attention_relation_loss(**tensors, reduction=reduction, impl=impl) * own
        for items in (23, 23.0, torch.tensor(23), torch.tensor(23.0), torch.tensor([23.0])):
            found = attention_relation_loss(**tensors, reduction=reduction, num_items=items, impl=impl)
            torch.testing.assert_close(found.reshape(()), expected / 23)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
@each_kind
@each_implementation
def test_accumulation_equals_one_large_batch(impl, kind, reduction):
    """Four parts, with the items of the whole as num_items, add up to the whole: value and gradient."""
    drawn = inputs((8, 2, 20, 8, 6), torch.float64)
    tensors = {**features((8, 2, 20, 8, 6), "fp64", kind), "mask": drawn["mask"], "segment_ids": drawn["segment_ids"]}
    term = AttentionRelation(reduction=reduction)
    items = term.count_items(
        {"input_ids": drawn["segment_ids"], "attention_mask": drawn["mask"], "segment_ids": drawn["segment_ids"]}
    )
    whole = ours(tensors, impl, reduction=reduction)
    parts = [
        ours({key: value[at : at + 2] for key, value in tensors.items()}, impl, reduction=reduction, num_items=items)
        for at in range(0, 8, 2)
    ]
    torch.testing.assert_close(sum(part.value for part in parts), whole.value)
    for key, gradient in whole.gradients.items():
        torch.testing.assert_close(torch.cat([part.gradients[key] for part in parts]), gradient)


@pytest.mark.numerics
@each_kind
@each_implementation
def test_weights_by_row(impl, kind):
    """reduction="none": any incoming gradient, zeros, strided and expanded ones included."""
    for dtype in ("fp32", "bf16"):
        drawn = inputs((2, 3, 40, 8, 16), DTYPES[dtype])
        tensors = {**features((2, 3, 40, 8, 16), dtype, kind), "mask": drawn["mask"]}
        weights = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(3))
        weights[:, 1] = 0.0
        for given in (
            weights,
            weights.transpose(1, 2).contiguous().transpose(1, 2),
            torch.tensor(2.0).expand(2, 3, 40),
        ):
            found = weighted(tensors, given, impl)
            exact = weighted(
                {key: x.double() if x.is_floating_point() else x for key, x in tensors.items()}, given, "reference"
            )
            assert_within_budget(found, weighted(tensors, given, "reference"), exact)


@pytest.mark.numerics
@pytest.mark.parametrize("reduction", module.REDUCTIONS)
@each_kind
@each_kernel
def test_fp16_gradient_under_a_loss_scaler(impl, kind, reduction):
    """A scaler multiplies the loss so that fp16 gradients do not fall below the smallest number. The kernel has made
    the gradient by then: it must have kept what the scaler brings back into range."""
    # A student near its teacher, as it is late in training: small gradients.
    tensors, noise = features((2, 12, 128, 16, 16), "fp16", kind), features((2, 12, 128, 16, 16), "fp16", kind, seed=1)
    for key in set(STUDENTS) & tensors.keys():
        tensors[key] = tensors[key.replace("student", "teacher")] + 0.03 * noise[key]
    leaves = {key: tensors[key].detach().requires_grad_() for key in STUDENTS if key in tensors}

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype, **how: Any) -> Outcome:
        given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
        given |= {key: leaf.to(dtype) for key, leaf in leaves.items()}
        loss = function(**completed(given, given), reduction=reduction, **how)
        loss = loss.mean() if reduction == "none" else loss / (2 * 12 * 128 if reduction == "sum" else 1)
        found = torch.autograd.grad(loss * 2.0**16, [given[key] for key in leaves])
        return Outcome(loss.detach(), dict(zip(leaves, found, strict=True)))

    exact = gradients(attention_relation_reference, torch.float64)
    assert all(0.1 < float(gradient.abs().max()) < 100 for gradient in exact.gradients.values())
    found = gradients(attention_relation_loss, torch.float16, impl=impl)
    # The value is a mean of small differences of numbers of size 1, each rounded to 6e-8.
    assert_within_budget(found, gradients(attention_relation_reference, torch.float16), exact, value_floor=5e-9)


# -------------------------------------------------------------------------------- threads

# Shape, and how: fewer heads than threads and more, parts of a job side by side, several sweeps, sequences of different
# lengths.
THREADED: list[tuple[tuple[int, ...], dict[str, Any], tuple[str, ...]]] = [
    ((1, 1, 700, 8, 8), {}, ()),
    ((1, 2, 300, 32, 16), {"causal": True}, ()),
    ((1, 2, 300, 8, 16), {"reduction": "none"}, ("mask",)),
    ((1, 1, 360, 512, 4), {"causal": True}, ()),
    ((3, 4, 65, 8, 16), {}, ("mask", "segment_ids")),
    ((2, 3, 20, 5, 7), {"relation_heads": 1}, ()),
]


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@each_kind
@needs_kernel
def test_same_bits_for_any_number_of_threads(kind, dtype, restored_threads):
    for shape, how, marks in THREADED:
        drawn = inputs(shape, DTYPES[dtype], scale=0.3)
        tensors = {key: drawn[key] for key in (*features((1, 1, 1, 1, 1), dtype, kind), *marks)}
        expected = None
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = ours(tensors, "cpp", **how)
            expected = expected or found
            assert_same_bits(found, expected, (shape, how, threads))


@needs_kernel
def test_same_bits_every_time(restored_threads):
    torch.set_num_threads(2)
    tensors = inputs((2, 3, 150, 16, 8))
    expected = ours(tensors, "cpp")
    for _ in range(10):
        assert_same_bits(ours(tensors, "cpp"), expected)


@needs_kernel
def test_a_batch_larger_or_smaller_changes_no_bit_of_a_sequence(restored_threads):
    """Work is handed out by what a sequence is, not by what lies beside it."""
    tensors = features((4, 3, 140, 8, 8))
    torch.set_num_threads(3)
    batch = ours(tensors, "cpp", reduction="sum")
    for b in range(4):
        one = ours({key: value[b : b + 1] for key, value in tensors.items()}, "cpp", reduction="sum")
        for key, gradient in one.gradients.items():
            assert torch.equal(batch.gradients[key][b : b + 1], gradient)


# -------------------------------------------------------------------------------- several relations

SIGNALS = ("queries", "keys", "values")
LETTERS = {"q": "queries", "k": "keys", "v": "values"}


def signals(dtype: str = "fp64", heads: tuple[int, int, int] = (4, 4, 4)) -> tuple[Tensors, Tensors, Tensors]:
    """Student and teacher signals, and mask and segments."""
    student, teacher = {}, {}
    for seed, (name, count) in enumerate(zip(SIGNALS, heads, strict=True)):
        drawn = inputs((3, count, 20, 6, 9), DTYPES[dtype], seed=seed)
        student[name], teacher[name] = drawn["student_a"], drawn["teacher_a"]
    marks = inputs((3, 1, 20, 1, 1), seed=9)
    return student, teacher, {key: marks[key] for key in ("mask", "segment_ids")}


RELATIONS: list[tuple[list[str], list[float] | None]] = [
    (["qk"], None),
    (["qk", "vv"], None),
    (["qk", "vv"], [2.0, 0.5]),
    (["qq", "kk", "vv"], [1.0, 0.0, 4.0]),
    (["qv", "kk"], None),
    (["qk", "qq"], [0.5, 2.0]),  # a tensor in two relations
    (["qq", "kk", "vv", "qk", "kv", "vq"], None),
]


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean", "sum"])
@pytest.mark.parametrize(("relations", "weights"), RELATIONS)
@each_implementation
def test_several_relations_are_the_sum_of_single_ones(impl, relations, weights, reduction):
    student, teacher, marks = signals()
    used = [name for letter, name in LETTERS.items() if letter in "".join(relations)]
    leaves = {name: student[name].clone().requires_grad_() for name in used}
    how = {**marks, "reduction": reduction, "causal": True, "relation_heads": 3, "impl": impl}
    total, parts = attention_relations_loss({**student, **leaves}, teacher, relations, weights=weights, **how)
    found = torch.autograd.grad(total, list(leaves.values()))

    expected = torch.zeros((), dtype=torch.float64)
    for relation, weight in zip(relations, weights or [1.0] * len(relations), strict=True):
        a, b = LETTERS[relation[0]], LETTERS[relation[1]] if relation[0] != relation[1] else None
        value = attention_relation_loss(
            leaves[a], leaves[b] if b else None, teacher[a], teacher[b] if b else None, **how
        )
        torch.testing.assert_close(parts[relation], value.detach())
        assert not parts[relation].requires_grad
        expected = expected + weight * value
    assert list(parts) == relations
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, list(leaves.values())))


@needs_kernel
def test_relations_share_a_launch_where_they_can(monkeypatch):
    calls: list[Any] = []
    original = module._call
    monkeypatch.setattr(module, "_call", lambda *given: calls.append(given) or original(*given))
    student, teacher, marks = signals("fp32")
    for relations, launches in ((["qk", "vv"], 1), (["qq", "kk", "vv"], 1), (["qk", "qq"], 2)):
        calls.clear()
        attention_relations_loss(student, teacher, relations, **marks)
        assert len(calls) == launches, relations


@each_implementation
def test_relations_of_a_grouped_query_model(impl):
    """Fewer key and value heads: repeated for qk, as they are for vv."""
    student, teacher, marks = signals(heads=(4, 2, 2))
    leaves = {name: value.clone().requires_grad_() for name, value in student.items()}
    total, parts = attention_relations_loss(leaves, teacher, ["qk", "vv"], **marks, impl=impl)
    found = torch.autograd.grad(total, list(leaves.values()))
    exact = {name: value.clone().requires_grad_() for name, value in student.items()}
    qk = attention_relation_reference(exact["queries"], exact["keys"], teacher["queries"], teacher["keys"], **marks)
    vv = attention_relation_reference(exact["values"], None, teacher["values"], None, **marks)
    torch.testing.assert_close(total, qk + vv)
    torch.testing.assert_close(list(parts.values()), [qk.detach(), vv.detach()])
    torch.testing.assert_close(found, torch.autograd.grad(qk + vv, list(exact.values())))


# -------------------------------------------------------------------------------- autograd


@each_variant
@each_implementation
def test_gradcheck(impl, variant):
    tensors, keywords = ATTENTION_RELATION.select(inputs((2, 3, 5, 4, 8), torch.float64, seed=2), variant)
    leaves = [tensors.pop(key).requires_grad_() for key in STUDENTS if key in tensors]

    def loss(*students: Tensor) -> Tensor:
        given = dict(zip(STUDENTS, students, strict=False))
        return attention_relation_loss(**given, **tensors, **keywords, impl=impl)

    # The reference is differentiated by PyTorch: a few directions will do.
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=impl == "reference")


@needs_kernel
def test_gradcheck_of_several_relations():
    student, teacher, _ = signals()
    leaves = [student[name][:1, :2, :6, :3].clone().requires_grad_() for name in SIGNALS]
    teacher = {name: value[:1, :2, :6, :3] for name, value in teacher.items()}

    def loss(*students: Tensor) -> Tensor:
        return attention_relations_loss(dict(zip(SIGNALS, students, strict=True)), teacher, impl="cpp")[0]

    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
@each_implementation
def test_backward_twice_over_a_retained_graph(impl, reduction):
    tensors = inputs((2, 2, 20, 8, 8))
    leaves = [tensors[key].requires_grad_() for key in STUDENTS]
    loss = attention_relation_loss(**tensors, reduction=reduction, impl=impl).sum()
    gradients = [torch.autograd.grad(loss, leaves, torch.tensor(1.5), retain_graph=True) for _ in range(3)]
    for gradient in gradients[0]:
        gradient.zero_()  # what was handed out belongs to the caller
    last = torch.autograd.grad(loss, leaves, torch.tensor(1.5))
    for one, two, three in zip(gradients[1], gradients[2], last, strict=True):
        assert float(three.abs().max()) > 0
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@each_implementation
def test_gradient_accumulates_into_leaf(impl):
    """Two losses on one tensor, and a second backward: .grad is the sum, and no gradient aliases another."""
    tensors = features((2, 2, 20, 8, 8))
    single = ours(tensors, "reference").gradients["student_a"] * 2  # run() passes a gradient of 0.5 to a 0-d value
    student = tensors["student_a"].requires_grad_()
    both = attention_relation_loss(**tensors, impl=impl) + 2 * attention_relation_loss(**tensors, impl=impl)
    both.backward()
    attention_relation_loss(**tensors, impl=impl).backward()
    torch.testing.assert_close(student.grad, 4 * single)


@pytest.mark.parametrize("reduction", ["sequence_mean", "none"])
@needs_kernel
def test_double_backward_is_refused(reduction):
    tensors = features((1, 2, 5, 4, 4))
    student = tensors["student_a"].requires_grad_()
    loss = attention_relation_loss(**tensors, reduction=reduction, impl="cpp").sum()
    with pytest.raises(RuntimeError, match=r"attention_relation: double backward .* impl='reference'"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("wanted", STUDENTS)
@each_implementation
def test_one_of_two_students_wants_a_gradient(impl, wanted):
    tensors = features((2, 2, 20, 8, 8))
    expected = ours(tensors, impl).gradients[wanted]
    leaf = tensors[wanted].requires_grad_()
    for reduction in ("sequence_mean", "none"):
        value = attention_relation_loss(**tensors, reduction=reduction, impl=impl)
        incoming = torch.full_like(value, 0.5 if value.dim() == 0 else 0.5 / value.numel())
        torch.testing.assert_close(torch.autograd.grad(value, leaf, incoming)[0], expected)


@pytest.mark.parametrize("reduction", module.REDUCTIONS)
@each_implementation
def test_no_gradient_wanted(impl, reduction):
    """Evaluation: same value, nothing recorded."""
    tensors = features((2, 2, 20, 8, 8))
    expected = ours(tensors, impl, reduction=reduction).value
    value = attention_relation_loss(**tensors, reduction=reduction, impl=impl)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    tracked = {key: x.clone().requires_grad_(key in STUDENTS) for key, x in tensors.items()}
    with torch.no_grad():
        value = attention_relation_loss(**tracked, reduction=reduction, impl=impl)
    assert not value.requires_grad
    assert torch.equal(value, expected)
    with torch.inference_mode():
        assert torch.equal(attention_relation_loss(**tensors, reduction=reduction, impl=impl), expected)


@each_implementation
def test_inputs_are_left_alone(impl):
    tensors = inputs((2, 3, 40, 8, 16))
    copies = {key: value.clone() for key, value in tensors.items()}
    for reduction in ("sequence_mean", "none"):
        ours(tensors, impl, causal=True, relation_heads=4, reduction=reduction)
        for key, value in copies.items():
            assert torch.equal(tensors[key], value), key


def op_arguments(tensors: Tensors, keywords: dict[str, Any], with_gradient: bool) -> tuple[Any, ...]:
    """The op's arguments, from those of the public function."""
    items = keywords.get("num_items")
    cross = "student_b" in tensors
    return (
        *(tensors["student_a"], tensors.get("student_b"), None),
        *(tensors["teacher_a"], tensors.get("teacher_b"), None),
        [0, 1] if cross else [0, 0],
        [1.0],
        tensors.get("mask"),
        tensors.get("segment_ids"),
        None if items is None else torch.as_tensor(float(items), dtype=torch.float64),
        None,
        keywords.get("causal", False),
        keywords.get("relation_heads"),
        keywords.get("scale"),
        keywords.get("reduction", "sequence_mean"),
        with_gradient,
    )


OPCHECKED = [
    ("cross", "fp32"),
    ("self mask segments causal", "fp32"),
    ("cross 12 relation heads", "bf16"),
    ("scale", "fp64"),
    ("cross none", "fp32"),
    ("self none", "bf16"),
    ("num_items tensor", "fp32"),
    # Without a factor left to backward, which scales the op's own output in place: opcheck compares that output.
    ("sum", "fp16"),
]


@needs_kernel
@pytest.mark.parametrize(("variant", "dtype"), OPCHECKED)
def test_opcheck(variant, dtype):
    """Schema, fake kernel, autograd registration and AOT dispatch of the registered op."""
    tensors, keywords = ATTENTION_RELATION.select(inputs((2, 3, 7, 4, 8), DTYPES[dtype]), variant)
    for wanted in (True, False):
        leaves = {key: tensors[key].clone().requires_grad_(wanted) for key in STUDENTS if key in tensors}
        # For rows, the gradient waits for their weights.
        with_gradient = wanted and keywords.get("reduction") != "none"
        arguments = op_arguments({**tensors, **leaves}, keywords, with_gradient)
        torch.library.opcheck(torch.ops.pydistill.attention_relation.default, arguments)


@needs_kernel
@pytest.mark.parametrize("layout", list(layouts(torch.zeros(2, 3, 7, 4))))
def test_opcheck_of_layouts(layout):
    """Strides of the gradients as the fake kernel says: a compiler has planned with them."""
    tensors = {key: layouts(value)[layout] for key, value in features((2, 3, 7, 4, 8)).items()}
    leaves = {key: tensors[key].detach().requires_grad_() for key in STUDENTS}
    arguments = op_arguments({**tensors, **leaves}, {}, True)
    torch.library.opcheck(torch.ops.pydistill.attention_relation.default, arguments)


@needs_kernel
def test_only_the_loss_is_differentiable():
    """The gradients that the op hands over for its backward are no functions to differentiate."""
    tensors = features((2, 3, 7, 4, 8))
    tensors["student_a"].requires_grad_()
    outputs = torch.ops.pydistill.attention_relation(*op_arguments(tensors, {}, True))
    assert [output.requires_grad for output in outputs] == [True] + [False] * 5


def compiled_outcome(function: Callable[..., Tensor], tensors: Tensors) -> Outcome:
    leaves = {key: tensors[key].detach().requires_grad_() for key in STUDENTS if key in tensors}
    value = function({**tensors, **leaves})
    value.sum().backward()
    return Outcome(value.detach(), {key: leaf.grad for key, leaf in leaves.items()})


@pytest.mark.parametrize("variant", ["cross mask segments causal", "self 4 relation heads", "token_mean", "self none"])
@each_implementation
def test_compile_without_graph_breaks(impl, variant):
    """Value and gradient through the compiler's graph capture, inside a larger computation."""
    torch._dynamo.reset()
    tensors, keywords = ATTENTION_RELATION.select(inputs((3, 3, 10, 8, 12)), variant)

    def step(given: Tensors) -> Tensor:
        given = {**given, "student_a": given["student_a"] * 2}
        return 3 * attention_relation_loss(**given, impl=impl, **keywords)

    eager = compiled_outcome(step, tensors)
    found = compiled_outcome(torch.compile(step, fullgraph=True, backend="aot_eager"), tensors)
    torch.testing.assert_close(found.value, eager.value)
    torch.testing.assert_close(found.gradients, eager.gradients)


def test_compile_with_inductor_and_changing_shapes():
    """The default backend end to end, from the projection on; a second batch compiles with symbolic sizes, a third
    reuses them."""
    torch._dynamo.reset()

    def step(given: Tensors) -> Tensor:
        split = {
            key: (given[key] * 2).unflatten(-1, (3, -1)).transpose(1, 2) for key in given if key not in ("mask", "ids")
        }
        return 3 * attention_relation_loss(**split, mask=given["mask"], relation_heads=4)

    compiled = torch.compile(step, fullgraph=True)
    for batch, positions in ((2, 9), (3, 14), (5, 21)):
        drawn = inputs((batch, 3, positions, 8, 12), seed=batch)
        given = {key: drawn[key].transpose(1, 2).flatten(2) for key in SIDES}
        given["mask"] = drawn["mask"]
        eager, found = compiled_outcome(step, given), compiled_outcome(compiled, given)
        torch.testing.assert_close(found.value, eager.value)
        torch.testing.assert_close(found.gradients, eager.gradients)


@needs_kernel
def test_compile_of_several_relations():
    torch._dynamo.reset()
    student, teacher, marks = signals("fp32")

    def step(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        given = {"queries": queries, "keys": keys, "values": values}
        return attention_relations_loss(given, teacher, ["qk", "vv"], weights=[1.0, 0.5], **marks)[0]

    outcomes = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [student[name].clone().requires_grad_() for name in SIGNALS]
        value = function(*leaves)
        outcomes.append((value.detach(), torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(outcomes[1], outcomes[0])


@each_implementation
def test_autocast(impl):
    """Inside autocast a bf16 model meets an fp32 teacher: the loss is fp32 and as exact as outside."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 24)
    hidden, teacher = torch.randn(2, 11, 16), torch.randn(2, 3, 11, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        queries = layer(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
        assert queries.dtype == torch.bfloat16
        inside = attention_relation_loss(queries, None, teacher, None, impl=impl)
        mixed = attention_relation_loss(queries.float(), None, teacher, None, impl=impl)
    assert inside.dtype == torch.float32
    outside = attention_relation_loss(queries.detach(), None, teacher, None, impl=impl)
    assert torch.equal(inside, outside)
    assert torch.equal(mixed, outside)
    inside.backward()
    assert layer.weight.grad.dtype == torch.float32
    exact = layer(hidden).unflatten(-1, (3, 8)).transpose(1, 2)
    expected = torch.autograd.grad(attention_relation_reference(exact, None, teacher, None), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected, rtol=5e-2, atol=1e-3)


# -------------------------------------------------------------------------------- memory

PEAK = """
import torch
from pydistill import attention_relation_loss

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

def extra(threads, kind, positions, size, dtype):
    torch.set_num_threads(threads)
    students, teachers = (
        [torch.randn(1, 1, positions, size).to(dtype) for _ in range(2 if kind == "cross" else 1)] for _ in range(2)
    )
    for student in students:
        student.requires_grad_()
    none = [None] * (2 - len(students))
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what there is now
    before = status("VmRSS")
    value = attention_relation_loss(*students, *none, *teachers, *none)
    gradients = torch.autograd.grad(value, students)
    return status("VmHWM") - before - sum(g.numel() * g.element_size() for g in gradients)

for threads in (1, 2):
    extra(threads, "cross", 300, 8, torch.float32)  # what only the first call takes
    print(
        extra(threads, "self", 4096, 32, torch.float32),  # one sweep
        extra(threads, "cross", 4096, 64, torch.float32),  # several
        extra(threads, "cross", 6000, 64, torch.bfloat16),
    )
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures peaks with Linux's /proc")
@needs_kernel
def test_no_matrix_of_all_scores():
    """Inputs, gradients, and 3 MB for each thread: the N x N scores of one side alone would be 64 MB or more."""
    try:
        printed = in_a_new_process(["-c", PEAK])
    except ChildError as error:
        if "clear_refs" in str(error):
            pytest.skip("this system does not let a process reset its peak")
        raise
    for threads, line in enumerate(printed.splitlines(), start=1):
        peaks = [int(number) for number in line.split()]
        assert len(peaks) == 3
        assert max(peaks) < threads * 3 << 20, [f"{peak / 2**20:.1f} MB with {threads} threads" for peak in peaks]


# -------------------------------------------------------------------------------- errors

ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"reduction": "mean"},
        ValueError,
        "reduction must be one of sequence_mean, token_mean, sum, none, got 'mean'",
    ),
    ({"relation_heads": 0}, ValueError, "relation_heads must be a whole number above 0 or None, got 0"),
    ({"relation_heads": -3}, ValueError, "relation_heads must be a whole number above 0 or None, got -3"),
    ({"relation_heads": 2.0}, ValueError, "relation_heads must be a whole number above 0 or None, got 2.0"),
    (
        {"relation_heads": 8},
        ValueError,
        "relation_heads must divide the student's width 12 and the teacher's 18, got 8; pass one of 1, 2, 3, 6$",
    ),
    ({"scale": 0.0}, ValueError, "scale must be a finite number above 0 or None .*, got 0.0"),
    ({"scale": -1.0}, ValueError, "scale must be a finite number above 0 or None .*, got -1.0"),
    ({"scale": math.nan}, ValueError, "scale must be a finite number above 0 or None .*, got nan"),
    ({"scale": math.inf}, ValueError, "scale must be a finite number above 0 or None .*, got inf"),
    ({"num_items": 0}, ValueError, "num_items must be above 0, got 0"),
    ({"num_items": -1.5}, ValueError, "num_items must be above 0, got -1.5"),
    ({"num_items": math.nan}, ValueError, "num_items must be above 0, got nan"),
    (
        {"num_items": torch.ones(2)},
        ValueError,
        r"num_items must be a number or a tensor of one element, got shape \[2\]",
    ),
    (
        {"num_items": 4, "reduction": "sum"},
        ValueError,
        "num_items replaces the denominator of a mean, got reduction='sum'",
    ),
    (
        {"num_items": 4, "reduction": "none"},
        ValueError,
        "num_items replaces the denominator of a mean, got reduction='none'",
    ),
    (
        {"student_a": torch.zeros(2, 3, 5, 4, dtype=torch.long)},
        TypeError,
        "student_a must be a floating-point tensor, got torch.int64",
    ),
    (
        {"teacher_a": torch.zeros(2, 3, 5, 6, dtype=torch.bool)},
        TypeError,
        "teacher_a must be a floating-point tensor, got torch.bool",
    ),
    (
        {"student_b": torch.zeros(2, 3, 5, 4, dtype=torch.int32)},
        TypeError,
        "student_b must be a floating-point tensor, got torch.int32",
    ),
    (
        {"student_a": torch.zeros(2, 5, 4)},
        ValueError,
        r"student_a must have shape \[B, H, N, d\] with at least one head, got \[2, 5, 4\]",
    ),
    ({"student_a": torch.zeros(2, 3, 5, 0)}, ValueError, r"student_a must have shape .* got \[2, 3, 5, 0\]"),
    ({"teacher_b": torch.zeros(2, 0, 5, 6)}, ValueError, r"teacher_b must have shape .* got \[2, 0, 5, 6\]"),
    (
        {"teacher_a": torch.zeros(2, 3, 6, 6)},
        ValueError,
        r"teacher_a must have the student's batch and positions, got \[2, 3, 6, 6\] vs \[2, 3, 5, 4\]; both models "
        "must read the same tokens",
    ),
    (
        {"teacher_a": torch.zeros(1, 3, 5, 6)},
        ValueError,
        r"teacher_a must have the student's batch and positions, got \[1, 3, 5, 6\] vs \[2, 3, 5, 4\]",
    ),
    (
        {"teacher_a": torch.zeros(2, 3, 5, 6, device="meta")},
        ValueError,
        "teacher_a must be on cpu like student_a, got meta",
    ),
    (
        {"teacher_a": torch.zeros(2, 3, 5, 6, requires_grad=True)},
        RuntimeError,
        r"teacher_a requires grad, but the teacher never receives a gradient; pass teacher_a.detach\(\)",
    ),
    (
        {"teacher_b": torch.zeros(2, 3, 5, 6, requires_grad=True)},
        RuntimeError,
        r"teacher_b requires grad, .*; pass teacher_b.detach\(\)",
    ),
    (
        {"student_b": None},
        ValueError,
        "student_b and teacher_b must both be tensors, or both None for a self relation",
    ),
    (
        {"teacher_b": None},
        ValueError,
        "student_b and teacher_b must both be tensors, or both None for a self relation",
    ),
    (
        {"student_b": torch.zeros(2, 3, 5, 5)},
        ValueError,
        r"student_b must match student_a, with as many heads or \(grouped queries\) a divisor of them, got "
        r"\[2, 3, 5, 5\] vs \[2, 3, 5, 4\]",
    ),
    (
        {"student_b": torch.zeros(2, 2, 5, 4)},
        ValueError,
        r"student_b must match student_a, .* got \[2, 2, 5, 4\] vs \[2, 3, 5, 4\]",
    ),
    (
        {"teacher_b": torch.zeros(2, 6, 5, 6)},
        ValueError,
        r"teacher_b must match teacher_a, .* got \[2, 6, 5, 6\] vs \[2, 3, 5, 6\]",
    ),
    (
        {"teacher_a": torch.zeros(2, 2, 5, 6), "teacher_b": torch.zeros(2, 2, 5, 6)},
        ValueError,
        "student and teacher have 3 and 2 heads; pass relation_heads, one of 1, 2, 3, 4, 6, 12, to compare them after "
        "all heads are joined and split again",
    ),
    ({"mask": torch.ones(2, 5)}, TypeError, "mask must hold boolean or integer .*, got torch.float32"),
    (
        {"mask": torch.ones(2, 6, dtype=torch.bool)},
        ValueError,
        r"mask must have one entry per token, \[B, N\] = \[2, 5\], got \[2, 6\]",
    ),
    (
        {"mask": torch.ones(2, 1, 1, 5, dtype=torch.bool)},
        ValueError,
        r"mask must have one entry per token, .*, got \[2, 1, 1, 5\]",
    ),
    (
        {"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
        ValueError,
        "mask must be on cpu like the student's tensors, got meta",
    ),
    (
        {"segment_ids": torch.zeros(2, 5)},
        TypeError,
        "segment_ids must hold integers, one id per packed sequence, got torch.float32",
    ),
    (
        {"segment_ids": torch.zeros(2, 5, dtype=torch.bool)},
        TypeError,
        "segment_ids must hold integers, .* got torch.bool",
    ),
    (
        {"segment_ids": torch.zeros(5, dtype=torch.long)},
        ValueError,
        r"segment_ids must have one entry per token, \[B, N\] = \[2, 5\], got \[5\]",
    ),
    (
        {"segment_ids": torch.zeros(2, 5, dtype=torch.long, device="meta")},
        ValueError,
        "segment_ids must be on cpu like the student's tensors, got meta",
    ),
    ({"impl": "fast"}, ValueError, "impl must be one of auto, .* got 'fast'"),
    ({"impl": "triton"}, ValueError, "impl='triton' does not run on device 'cpu'"),
    ({"impl": "cuda"}, ValueError, "impl='cuda' does not run on device 'cpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_errors_name_the_argument(change, error, message):
    arguments: dict[str, Any] = {
        "student_a": torch.zeros(2, 3, 5, 4), "student_b": torch.zeros(2, 3, 5, 4),
        "teacher_a": torch.zeros(2, 3, 5, 6), "teacher_b": torch.zeros(2, 3, 5, 6),
    }  # fmt: skip
    attention_relation_loss(**arguments)
    with pytest.raises(error, match=f"^attention_relation: .*{message}"):
        attention_relation_loss(**{**arguments, **change})


RELATION_ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"relations": "qk"}, r"relations must be a list such as \['qk', 'vv'\], got 'qk'"),
    ({"relations": []}, r"relations must be a list such as \['qk', 'vv'\], got \[\]"),
    ({"relations": ["qx"]}, "a relation is two of the letters q, k, v, such as 'qk' or 'vv', got 'qx'"),
    ({"relations": ["q"]}, "a relation is two of the letters q, k, v, .* got 'q'"),
    ({"relations": ["qk", "vv", "qk"]}, "relations must be distinct, got qk, vv, qk"),
    ({"weights": [1.0]}, "weights must have one number per relation, 2, got 1"),
    ({"weights": [1.0, -1.0]}, "weights must be finite and not negative, got -1"),
    ({"weights": [1.0, math.nan]}, "weights must be finite and not negative, got nan"),
    ({"reduction": "none"}, "reduction must be sequence_mean, token_mean or sum .* got 'none'"),
    ({"reduction": "mean"}, "reduction must be one of .* got 'mean'"),
    ({"student": {}}, r"relations qk, vv need the student's keys, got \[\]"),
    (
        {"relation_heads": 5},
        "relation_heads must divide .* 24 and the teacher's 36, got 5; pass one of 1, 2, 3, 4, 6, 12$",
    ),
    ({"mask": torch.ones(3, 19, dtype=torch.bool)}, r"mask must have one entry per token, \[B, N\] = \[3, 20\]"),
]


@pytest.mark.parametrize(("change", "message"), RELATION_ERRORS)
def test_errors_of_several_relations(change, message):
    student, teacher, _ = signals("fp32")
    arguments: dict[str, Any] = {"student": student, "teacher": teacher}
    attention_relations_loss(**arguments)
    with pytest.raises(ValueError, match=f"^attention_relation: .*{message}"):
        attention_relations_loss(**{**arguments, **change})


def test_errors_of_several_relations_name_the_signal():
    student, teacher, _ = signals("fp32")
    with pytest.raises(ValueError, match=r"relations qk, vv need the teacher's values, got \['keys', 'queries'\]"):
        attention_relations_loss(student, {key: teacher[key] for key in ("queries", "keys")})
    values = teacher["values"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="teacher_values requires grad"):
        attention_relations_loss(student, {**teacher, "values": values})


OP_ERRORS: list[tuple[int, Any, str]] = [
    (0, torch.zeros(2, 7, 4), r"tensors must be \[B, H, N, d\]"),
    (1, torch.zeros(2, 3, 7, 5), "both tensors of a relation must have one shape"),
    (1, None, "relation 0 needs the tensors of slot 1"),
    (3, torch.zeros(2, 3, 6, 8), "all tensors must have one dtype, B and N"),
    (3, torch.zeros(2, 3, 7, 8, dtype=torch.float64), "all tensors must have one dtype, B and N"),
    (6, [0, 7], "needs the tensors of slot 7"),
    (6, [0, 1, 2], "relations must hold two slots per weight"),
    (7, [], "relations must hold two slots per weight"),
    (8, torch.ones(2, 8, dtype=torch.bool), r"mask must have shape \[2, 7\]"),
    (8, torch.ones(2, 7), r"mask must have shape \[2, 7\] and its proper dtype"),
    (9, torch.zeros(2, 7, dtype=torch.int32), r"segment_ids must have shape \[2, 7\] and its proper dtype"),
    (11, torch.ones(2, 3, 6), r"row_weights must be \[B, heads, N\]"),
    (13, 5, "5 relation heads do not divide"),
    (13, 0, "0 relation heads do not divide"),
    (14, -1.0, "scale must be above 0"),
    (15, "mean", "unknown reduction 'mean'"),
]


@needs_kernel
@pytest.mark.parametrize(("position", "value", "message"), OP_ERRORS)
def test_error_text_of_the_op_itself(position, value, message):
    """torch.ops is reachable too: it refuses what it cannot do instead of reading past the end."""
    arguments = list(op_arguments(features((2, 3, 7, 4, 8)), {"reduction": "none"}, True))
    torch.ops.pydistill.attention_relation(*arguments)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=f"attention_relation: .*{message}"):
        torch.ops.pydistill.attention_relation(*arguments)


@needs_kernel
def test_the_op_refuses_a_tensor_in_two_relations():
    arguments = list(op_arguments(features((2, 3, 7, 4, 8)), {}, True))
    arguments[6:8] = [0, 1, 0, 0], [1.0, 1.0]
    with pytest.raises(RuntimeError, match="slot 0 stands in two relations"):
        torch.ops.pydistill.attention_relation(*arguments)


# -------------------------------------------------------------------------------- objective term


def test_objective_term_is_the_function():
    student, teacher, marks = signals("fp32")
    options = {"relation_heads": 3, "causal": True, "scale": 0.4, "reduction": "token_mean"}
    term = AttentionRelation(
        relations=["qq", "kk", "vv"], relation_weights=[1.0, 2.0, 0.5], student_layer=3, teacher_layer="encoder.9",
        weight=5.0, name="relations", **options,
    )  # fmt: skip
    expected, _ = attention_relations_loss(
        student, teacher, ["qq", "kk", "vv"], weights=[1.0, 2.0, 0.5], **marks, num_items=9, **options
    )
    student_signals = {f"{name}@3": value for name, value in student.items()}
    # What a teacher hands over may still have a history: the term cuts it.
    teacher_signals = {f"{name}@encoder.9": value.requires_grad_() for name, value in teacher.items()}
    batch = {"attention_mask": marks["mask"].long(), "segment_ids": marks["segment_ids"]}
    # The weight of the term is the objective's business.
    assert torch.equal(term(student_signals, teacher_signals, batch, num_items=9), expected)
    assert (term.weight, term.name) == (5.0, "relations")
    assert term.student_signals == {"queries@3", "keys@3", "values@3"}
    assert term.teacher_signals == {"queries@encoder.9", "keys@encoder.9", "values@encoder.9"}
    assert list(term.state_dict()) == []
    assert "relations=['qq', 'kk', 'vv']" in repr(term) and "relation_heads=3" in repr(term)


def test_objective_term_defaults_are_the_paper():
    student, teacher, _ = signals("fp32")
    term = AttentionRelation()
    assert (term.weight, term.name) == (1.0, "attention_relation")
    assert term.student_signals == term.teacher_signals == {"queries@-1", "keys@-1", "values@-1"}
    value = term(
        {f"{name}@-1": value for name, value in student.items()},
        {f"{name}@-1": value for name, value in teacher.items()},
        {},
    )
    assert torch.equal(value, attention_relations_loss(student, teacher, ("qk", "vv"))[0])
    assert AttentionRelation(relations=["vv"]).student_signals == {"values@-1"}
    assert AttentionRelation(relations=["kq"]).teacher_signals == {"queries@-1", "keys@-1"}


def test_objective_term_with_a_sum_has_no_denominator():
    student, teacher, _ = signals("fp32")
    term = AttentionRelation(relations=["vv"], reduction="sum")
    value = term({"values@-1": student["values"]}, {"values@-1": teacher["values"]}, {}, num_items=7)
    expected = attention_relation_loss(student["values"], None, teacher["values"], None, reduction="sum")
    assert torch.equal(value, expected)


COUNTED = {
    "nothing": ({}, 3, 12),
    "mask": ({"attention_mask": torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])}, 2, 5),
    "segments": ({"segment_ids": torch.tensor([[4, 0, 4, -1], [-1, -1, -2, -9], [1, 1, 1, 1]])}, 3, 7),
    "both": (
        {
            "attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]),
            "segment_ids": torch.tensor([[4, 0, 4, -1], [-1, -1, -2, -9], [1, 2, 2, 3]]),
        },
        3,
        4,
    ),
    "no token": ({"attention_mask": torch.zeros(3, 4, dtype=torch.long)}, 0, 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_count_items(name):
    """Sequences or tokens, as the loss counts them."""
    marks, sequences, tokens = COUNTED[name]
    tensors = features((3, 2, 4, 3, 5), "fp64", "self")
    renamed = {"attention_mask": "mask", "segment_ids": "segment_ids"}
    tensors |= {renamed[key]: value for key, value in marks.items()}
    for reduction, expected in (("sequence_mean", sequences), ("token_mean", tokens)):
        term = AttentionRelation(reduction=reduction)
        for batch in (
            {"input_ids": torch.zeros(3, 4, dtype=torch.long), **marks},
            {"inputs_embeds": torch.zeros(3, 4, 8), **marks},
        ):
            assert int(term.count_items(batch)) == expected
        own, given = ours(tensors, reduction=reduction), ours(tensors, reduction=reduction, num_items=max(expected, 1))
        torch.testing.assert_close(own.value, given.value)


def test_objective_term_refuses():
    for change, message in (
        ({"relations": ["qx"]}, "a relation is two of the letters"),
        ({"relation_weights": [1.0]}, "weights must have one number per relation"),
        ({"relation_heads": 0}, "relation_heads must be a whole number above 0"),
        ({"scale": 0.0}, "scale must be a finite number above 0"),
        ({"reduction": "mean"}, "reduction must be one of"),
        ({"reduction": "none"}, "reduction must be sequence_mean, token_mean or sum in an objective, got 'none'"),
    ):
        with pytest.raises(ValueError, match=f"^attention_relation: {message}"):
            AttentionRelation(**change)


# -------------------------------------------------------------------------------- instruction sets, processes


@needs_kernel
@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"])
def test_every_instruction_set(isa):
    check_instruction_set(isa, __file__)


def test_without_native_code():
    """PYDISTILL_NATIVE=0: the reference runs and says so; asking for the kernel raises."""
    code = (
        "import torch, pydistill; from pydistill import _dispatch\n"
        "assert _dispatch.native is None\n"
        "s, t = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.ones(1, 2, 3, 4)\n"
        "pydistill.attention_relation_loss(s, None, t, None).backward()\n"
        "try: pydistill.attention_relation_loss(s, None, t, None, impl='cpp')\n"
        "except RuntimeError as error: print(error)\n"
    )
    printed = in_a_new_process(["-W", "error", "-c", code], PYDISTILL_NATIVE="0")
    assert "impl='cpp' is not available: PYDISTILL_NATIVE=0 is set" in printed
    if os.environ.get("PYDISTILL_NATIVE") != "0":
        assert "passed" in in_a_new_process([*numerics_of(__file__), "-k", "golden"], PYDISTILL_NATIVE="0")
