# SPDX-License-Identifier: Apache-2.0
"""Attention-relation loss in Triton (Wang et al. 2020, arXiv 2002.10957; MiniLMv2, arXiv 2012.15828).

With scores t of the teacher and s of the student, p = softmax(t), q = softmax(s) over the tokens that a row sees,

    value of row i      sum_j p_ij (log p_ij - log q_ij)
    gradient of s_ij    w_i (q_ij - p_ij) = G_ij,  of A_i  sum_j G_ij B_j,  of B_j  sum_i G_ij A_i

and for a self relation (B = A) of A_i  sum_j (G_ij + G_ji) A_j, where scores are symmetric: one product. A program has
a block of tokens of one head, its own, and walks over those that they share a sequence with. No N x N matrix is ever
written: `relation_values` leaves maxima and sums of exponentials, O(B A N) numbers, from which `relation_gradients`
makes the probabilities of rows, of columns or of both again. Nothing is added atomically: the same bits every time.

Exponentials are 2^((s - max s) c) with c = scale * log2 e: the difference comes first, and is exact near the maximum.
Where student and teacher agree, value and gradient are exactly 0. In half precision G is multiplied in two parts, high
and low, so that the gradient is rounded once, when it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels.half import left_to_backward

LN2 = tl.constexpr(math.log(2))
LOWEST = tl.constexpr(-3.4028234e38)  # a finite maximum of nothing, whose difference from anything is a number
PADDING = tl.constexpr(-1)
# One compilation for all of them: of numbers, only strides matter to how memory is read.
SIZES = ("batches", "heads", "positions")


# --------------------------------------------------------------------------- tokens


@triton.jit
def _ids(mask, segment_ids, batch, tokens, positions, HAS_MASK: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """Of each token its sequence's id, negative for padding."""
    inside = tokens < positions
    ids = tl.where(inside, 0, PADDING).to(tl.int64)
    if HAS_SEGMENTS:
        ids = tl.load(segment_ids + batch * positions + tokens, mask=inside, other=PADDING)
    if HAS_MASK:
        ids = tl.where(tl.load(mask + batch * positions + tokens, mask=inside, other=0) != 0, ids, PADDING)
    return ids


@triton.jit(do_not_specialize=["positions"])
def find_sequences(
    mask, segment_ids, firsts, lasts, shares, counts, positions,
    HAS_MASK: tl.constexpr, HAS_SEGMENTS: tl.constexpr, SEQUENCE_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each token the first and the last of its sequence, which also say who sees whom, and its share in the loss; of
    each block of tokens how many are valid and how many are the first of their sequence."""
    blocks = tl.cdiv(positions, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    own = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    ids = _ids(mask, segment_ids, batch, own, positions, HAS_MASK, HAS_SEGMENTS)
    valid = ids >= 0
    first = tl.zeros((BLOCK,), tl.int32)
    last = first + (positions - 1)
    length = first + positions
    if HAS_MASK or HAS_SEGMENTS:
        first, last, length = length, first + PADDING, first
        for start in range(0, positions, BLOCK):
            other = start + tl.arange(0, BLOCK)
            other_ids = _ids(mask, segment_ids, batch, other, positions, HAS_MASK, HAS_SEGMENTS)
            same = (ids[:, None] == other_ids[None, :]) & valid[:, None]
            first = tl.minimum(first, tl.min(tl.where(same, other[None, :], positions), 1))
            last = tl.maximum(last, tl.max(tl.where(same, other[None, :], PADDING), 1))
            length += tl.sum(same.to(tl.int32), 1)
    share = valid.to(shares.dtype.element_ty)
    if SEQUENCE_MEAN:
        share /= tl.maximum(length, 1).to(share.dtype)
    at = batch * positions + own
    inside = own < positions
    tl.store(firsts + at, tl.where(valid, first, PADDING), mask=inside)
    tl.store(lasts + at, tl.where(valid, last, PADDING), mask=inside)
    tl.store(shares + at, share, mask=inside)
    tl.store(counts + 2 * tl.program_id(0), tl.sum(valid.to(tl.int32), 0))
    tl.store(counts + 2 * tl.program_id(0) + 1, tl.sum((valid & (own == first)).to(tl.int32), 0))


@triton.jit
def _own_tokens(firsts, lasts, block, positions, OWN: tl.constexpr):
    """A program's tokens, whether they are valid, the first of the sequence of each (for padding a number that nobody
    has), and the range in which all tokens that they see lie."""
    tokens = block * OWN + tl.arange(0, OWN)
    inside = tokens < positions
    first = tl.load(firsts + tokens, mask=inside, other=PADDING)
    last = tl.load(lasts + tokens, mask=inside, other=PADDING)
    valid = first >= 0
    begin = tl.min(tl.where(valid, first, positions), 0)
    end = tl.max(last, 0) + 1
    return tokens, valid, tl.where(valid, first, PADDING - 1), begin, end


# --------------------------------------------------------------------------- scores
#
# A side, student or teacher, has compile-time numbers (WIDTH, SIZE, CUT, BLOCK, SCALE): features of a relation head and
# of a head as it is stored, whether the former are cut out of the latter, how many are loaded at a time, and the factor
# of scores in units of log 2. One of its tensors, for one relation head of one batch row, is a view: (pointer, strides,
# head).


@triton.jit
def _pick(choices, index):
    """choices[index], for an index known on the device."""
    chosen = choices[0]
    for k in tl.static_range(1, len(choices)):
        if index == k:
            chosen = choices[k]
    return chosen


@triton.jit
def _view(pointer, strides, batch, head, SIDE: tl.constexpr):
    """Points to the first feature of the relation head in token 0, or, where heads are cut, of all heads."""
    pointer += batch * strides[0]
    if not SIDE[2]:
        first = head * SIDE[0]
        pointer += (first // SIDE[1]) * strides[1] + first % SIDE[1]
    return pointer, strides, head


@triton.jit
def _places(view, tokens, chunk, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Where features [chunk * BLOCK, ...) of the relation head are, [tokens, BLOCK], and which of them exist.

    Relation head r has the features from r * WIDTH on of a token's heads side by side. Where they lie so in memory, or
    in one head, they are one stretch; else each is looked up.
    """
    pointer, strides, head = view
    feature = chunk * BLOCK + tl.arange(0, BLOCK)
    place = feature.to(tl.int64)
    if SIDE[2]:
        joined = head * SIDE[0] + feature
        place = (joined // SIDE[1]) * strides[1] + joined % SIDE[1]
    return pointer + tokens.to(tl.int64)[:, None] * strides[2] + place[None, :], (feature < SIDE[0])[None, :]


@triton.jit
def _tile(view, tokens, exists, chunk, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Features of tokens, [tokens, BLOCK]; padding is not read."""
    places, inside = _places(view, tokens, chunk, SIDE, BLOCK)
    return tl.load(places, mask=exists[:, None] & inside, other=0.0)


@triton.jit
def _dot(x, y, total):
    return tl.dot(x, y, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def _scores(x, own, tokens, valid, y, other, others, exists, zero, SIDE: tl.constexpr):
    """Scores before their scale, [tokens, others]: of the tiles x and y where they hold the whole head, else chunk by
    chunk."""
    if SIDE[0] <= SIDE[3]:
        total = _dot(x, tl.trans(y), zero)
    else:
        total = zero
        for chunk in range(0, tl.cdiv(SIDE[0], SIDE[3])):
            x = _tile(own, tokens, valid, chunk, SIDE, SIDE[3])
            y = _tile(other, others, exists, chunk, SIDE, SIDE[3])
            total = _dot(x, tl.trans(y), total)
    return total


# --------------------------------------------------------------------------- values


@triton.jit(do_not_specialize=SIZES)
def relation_values(
    student_a, student_b, teacher_a, teacher_b,
    student_a_strides, student_b_strides, teacher_a_strides, teacher_b_strides,
    firsts, lasts, shares, row_weights, unit, statistics, row_loss, partial, batches, heads, positions,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, CAUSAL: tl.constexpr, GRADIENT: tl.constexpr, ROW_LOSS: tl.constexpr,
    ROW_WEIGHTS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr,
):  # fmt: skip
    """Values of a block of rows, added up by their shares, and for the gradient maxima and sums of exponentials.

    `partial` and `statistics` are, like the sides, one tensor for each relation of the launch.
    """
    blocks = tl.cdiv(positions, OWN)
    block = tl.program_id(0) % blocks
    index = tl.program_id(0) // blocks
    head = (index % heads).to(tl.int64)
    batch = (index // heads % batches).to(tl.int64)
    task = index // heads // batches
    partial = _pick(partial, task)
    dtype: tl.constexpr = partial.dtype.element_ty
    firsts += batch * positions
    lasts += batch * positions
    tokens, valid, sequence, begin, end = _own_tokens(firsts, lasts, block, positions, OWN)
    if CAUSAL:
        end = tl.minimum(end, (block + 1) * OWN)

    own_s = _view(_pick(student_a, task), student_a_strides, batch, head, STUDENT)
    own_t = _view(_pick(teacher_a, task), teacher_a_strides, batch, head, TEACHER)
    other_s = _view(_pick(student_b, task), student_b_strides, batch, head, STUDENT)
    other_t = _view(_pick(teacher_b, task), teacher_b_strides, batch, head, TEACHER)
    xs = _tile(own_s, tokens, valid, 0, STUDENT, STUDENT[3])
    xt = _tile(own_t, tokens, valid, 0, TEACHER, TEACHER[3])

    # Differences between the sides are in the teacher's unit, so that they are 0 where both sides are the same.
    RATIO: tl.constexpr = STUDENT[4] / TEACHER[4]
    max_s = tl.full((OWN,), LOWEST, dtype)
    max_t = max_s
    sum_s = tl.zeros((OWN,), dtype)
    sum_t, sum_d = sum_s, sum_s
    zero = tl.zeros((OWN, OTHER), dtype)
    for start in range(begin, end, OTHER):
        others = start + tl.arange(0, OTHER)
        other_sequence = tl.load(firsts + others, mask=others < end, other=PADDING)
        exists = other_sequence >= 0
        seen = sequence[:, None] == other_sequence[None, :]
        if CAUSAL:
            seen = seen & (others[None, :] <= tokens[:, None])
        ys = _tile(other_s, others, exists, 0, STUDENT, STUDENT[3])
        yt = _tile(other_t, others, exists, 0, TEACHER, TEACHER[3])
        s = _scores(xs, own_s, tokens, valid, ys, other_s, others, exists, zero, STUDENT)
        t = _scores(xt, own_t, tokens, valid, yt, other_t, others, exists, zero, TEACHER)
        s = tl.where(seen, s, -float("inf"))
        t = tl.where(seen, t, -float("inf"))
        above_s = tl.maximum(max_s, tl.max(s, 1))
        above_t = tl.maximum(max_t, tl.max(t, 1))
        # The sum of differences is relative to both maxima, which have moved.
        moved = (max_t - above_t) - (max_s - above_s) * RATIO
        kept_s = tl.exp2((max_s - above_s) * STUDENT[4])
        kept_t = tl.exp2((max_t - above_t) * TEACHER[4])
        s -= above_s[:, None]
        t -= above_t[:, None]
        e = tl.exp2(t * TEACHER[4])
        sum_d = (sum_d + tl.where(sum_t > 0, sum_t * moved, 0.0)) * kept_t
        sum_d += tl.sum(tl.where(seen, e * (t - s * RATIO), 0.0), 1)
        sum_t = sum_t * kept_t + tl.sum(e, 1)
        sum_s = sum_s * kept_s + tl.sum(tl.exp2(s * STUDENT[4]), 1)
        max_s, max_t = above_s, above_t

    sum_s = tl.where(valid, sum_s, 1.0)
    sum_t = tl.where(valid, sum_t, 1.0)
    ratio = tl.where(sum_s == sum_t, 1.0, sum_t / sum_s)
    value = tl.where(valid, (sum_d / sum_t * TEACHER[4] - tl.log2(ratio)) * LN2, 0.0)
    inside = tokens < positions
    rows = (batch * heads + head) * positions + tokens
    if ROW_LOSS:
        tl.store(row_loss + rows, value, mask=inside)
    share = tl.load(shares + batch * positions + tokens, mask=inside, other=0.0)
    tl.store(partial + tl.program_id(0) % (blocks * heads * batches), tl.sum(value * share, 0))
    if GRADIENT:
        weight = 1 / sum_t
        if ROW_WEIGHTS:
            weight *= tl.load(row_weights + rows, mask=valid, other=0.0) * tl.load(unit)
        statistics = _pick(statistics, task) + rows
        each = batches.to(tl.int64) * heads * positions
        tl.store(statistics, max_s, mask=inside)
        tl.store(statistics + each, max_t, mask=inside)
        tl.store(statistics + 2 * each, ratio, mask=inside)
        tl.store(statistics + 3 * each, weight, mask=inside)


@triton.jit(do_not_specialize=["programs", "heads", "blocks"])
def add_up(
    partial, programs, heads, weight_0: tl.float64, weight_1: tl.float64, weight_2: tl.float64,
    counts, blocks, num_items, loss, parts, factors, gradient_scale,
    REDUCTION: tl.constexpr, HAS_ITEMS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss, value of each relation, what its gradient is multiplied by: one program, which adds in a fixed order."""
    dtype: tl.constexpr = parts.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    valid = tl.zeros((BLOCK,), tl.int64)
    sequences = valid
    for start in range(0, blocks, BLOCK):
        block = start + lanes
        valid += tl.load(counts + 2 * block, mask=block < blocks, other=0)
        sequences += tl.load(counts + 2 * block + 1, mask=block < blocks, other=0)
    valid_count = tl.maximum(tl.sum(valid, 0), 1).to(tl.float64)
    sequence_count = tl.maximum(tl.sum(sequences, 0), 1).to(tl.float64)
    MEAN: tl.constexpr = REDUCTION == "sequence_mean" or REDUCTION == "token_mean"
    denominator = tl.full((), 1, tl.float64)
    if HAS_ITEMS:
        denominator = tl.load(num_items).to(tl.float64)
    elif REDUCTION == "sequence_mean":
        denominator = sequence_count
    elif REDUCTION == "token_mean":
        denominator = valid_count
    rows = denominator
    if MEAN:
        rows *= heads[0]
    if REDUCTION == "sequence_mean":
        rows *= valid_count / sequence_count
    later = left_to_backward(rows, HALF).to(tl.float64)
    tl.store(gradient_scale, later.to(dtype))
    total = tl.full((), 0, tl.float64)
    weights = (weight_0, weight_1, weight_2)
    for r in tl.static_range(len(partial)):
        added = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, programs[r], BLOCK):
            program = start + lanes
            added += tl.load(partial[r] + program, mask=program < programs[r], other=0.0).to(tl.float64)
        factor = 1 / denominator
        if MEAN:
            factor /= heads[r]
        value = tl.sum(added, 0) * factor
        total += value * weights[r]
        tl.store(parts + r, value.to(dtype))
        tl.store(factors[r], (weights[r] * factor / later).to(dtype))
    if REDUCTION != "none":
        tl.store(loss, total.to(dtype))


# --------------------------------------------------------------------------- gradients


@triton.jit
def _gradient(s, t, seen, max_s, max_t, ratio, weight, STUDENT: tl.constexpr, TEACHER: tl.constexpr):
    """Of scores, (q - p) * weight, with q = 2^s ratio / sum 2^t and p = 2^t / sum 2^t; `weight` has the sum."""
    q = tl.exp2((s - max_s) * STUDENT[4])
    p = tl.exp2((t - max_t) * TEACHER[4])
    return tl.where(seen, (q * ratio - p) * weight, 0.0)


@triton.jit
def _statistics_of(statistics, each, tokens, exists):
    """What `relation_values` has stored for rows: maxima, ratio of sums, weight."""
    statistics += tokens
    return (
        tl.load(statistics, mask=exists, other=0.0),
        tl.load(statistics + each, mask=exists, other=0.0),
        tl.load(statistics + 2 * each, mask=exists, other=0.0),
        tl.load(statistics + 3 * each, mask=exists, other=0.0),
    )


@triton.jit(do_not_specialize=SIZES)
def relation_gradients(
    gradient, student_own, student_other, teacher_own, teacher_other, gradient_strides,
    student_own_strides, student_other_strides, teacher_own_strides, teacher_other_strides,
    firsts, lasts, shares, factors, unit, statistics, batches, heads, positions,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr,
    ROW_WEIGHTS: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradient of PART features of a block of tokens, as the first tensor of a relation (ROWS: probabilities are those
    of their own rows), as the second (COLUMNS: of the other tokens' rows), or, for a self relation, as both."""
    blocks = tl.cdiv(positions, OWN)
    parts: tl.constexpr = (STUDENT[0] + PART - 1) // PART
    block = tl.program_id(0) % blocks
    index = tl.program_id(0) // blocks
    part = index % parts
    index = index // parts
    head = (index % heads).to(tl.int64)
    batch = (index // heads % batches).to(tl.int64)
    task = index // heads // batches
    statistics = _pick(statistics, task) + (batch * heads + head) * positions
    each = batches.to(tl.int64) * heads * positions
    dtype: tl.constexpr = statistics.dtype.element_ty
    firsts += batch * positions
    lasts += batch * positions
    tokens, valid, sequence, begin, end = _own_tokens(firsts, lasts, block, positions, OWN)
    if CAUSAL and not COLUMNS:
        end = tl.minimum(end, (block + 1) * OWN)
    if CAUSAL and not ROWS:
        begin = tl.maximum(begin, block * OWN)

    own_s = _view(_pick(student_own, task), student_own_strides, batch, head, STUDENT)
    own_t = _view(_pick(teacher_own, task), teacher_own_strides, batch, head, TEACHER)
    other_s = _view(_pick(student_other, task), student_other_strides, batch, head, STUDENT)
    other_t = _view(_pick(teacher_other, task), teacher_other_strides, batch, head, TEACHER)
    written = _view(_pick(gradient, task), gradient_strides, batch, head, STUDENT)
    half: tl.constexpr = written[0].dtype.element_ty == tl.float16
    xs = _tile(own_s, tokens, valid, 0, STUDENT, STUDENT[3])
    xt = _tile(own_t, tokens, valid, 0, TEACHER, TEACHER[3])
    if ROWS:
        max_s, max_t, ratio, weight = _statistics_of(statistics, each, tokens, valid)

    # Numbers below 1 have their lower half in fp16 too if they are made larger.
    LARGER: tl.constexpr = 4096.0 if half else 1.0
    total = tl.zeros((OWN, PART), dtype)
    zero = tl.zeros((OWN, OTHER), dtype)
    for start in range(begin, end, OTHER):
        others = start + tl.arange(0, OTHER)
        other_sequence = tl.load(firsts + others, mask=others < end, other=PADDING)
        exists = other_sequence >= 0
        seen = sequence[:, None] == other_sequence[None, :]
        ys = _tile(other_s, others, exists, 0, STUDENT, STUDENT[3])
        yt = _tile(other_t, others, exists, 0, TEACHER, TEACHER[3])
        s = _scores(xs, own_s, tokens, valid, ys, other_s, others, exists, zero, STUDENT)
        t = _scores(xt, own_t, tokens, valid, yt, other_t, others, exists, zero, TEACHER)
        g = zero
        if ROWS:
            rows_see = seen
            if CAUSAL:
                rows_see = seen & (others[None, :] <= tokens[:, None])
            g = _gradient(
                s, t, rows_see, max_s[:, None], max_t[:, None], ratio[:, None], weight[:, None], STUDENT, TEACHER
            )
        if COLUMNS:
            rows_see = seen
            if CAUSAL:
                rows_see = seen & (others[None, :] >= tokens[:, None])
            other_max_s, other_max_t, other_ratio, other_weight = _statistics_of(statistics, each, others, exists)
            g += _gradient(
                s, t, rows_see, other_max_s[None, :], other_max_t[None, :], other_ratio[None, :], other_weight[None, :],
                STUDENT, TEACHER,
            )  # fmt: skip
        if STUDENT[0] > STUDENT[3] or PART != STUDENT[3]:
            ys = _tile(other_s, others, exists, part, STUDENT, PART)
        if ys.dtype == dtype:
            total = _dot(g, ys, total)
        else:
            g *= LARGER
            high = g.to(ys.dtype)
            total = _dot(high, ys, total)
            total = _dot((g - high.to(dtype)).to(ys.dtype), ys, total)

    inside = tokens < positions
    factor = tl.load(shares + batch * positions + tokens, mask=inside, other=0.0) * tl.load(_pick(factors, task))
    factor *= STUDENT[4] * LN2 / LARGER
    if ROW_WEIGHTS:
        factor /= tl.load(unit)
    total = tl.where(valid[:, None], total * factor[:, None], 0.0)
    places, features = _places(written, tokens, part, STUDENT, PART)
    tl.store(places, total.to(written[0].dtype.element_ty), mask=inside[:, None] & features)


# --------------------------------------------------------------------------- host

TOKENS = 64  # whose sequences one program finds


class _Blocks(NamedTuple):
    """Tokens that a program has and that it meets at a time; features of student, teacher and gradient at a time."""

    own: int
    other: int
    student: int
    teacher: int
    part: int
    num_warps: int
    num_stages: int


def _blocks(dtype: torch.dtype, student_width: int, teacher_width: int) -> _Blocks:
    """Fixed, so that a new shape costs a compilation and no search; chosen by the registers that programs take."""

    def features(width: int, most: int) -> int:
        return max(16, min(triton.next_power_of_2(width), most))

    half = dtype.itemsize == 2
    most = 128 if half else 64
    part = features(student_width, most)
    own, warps = ((128, 8) if part == 128 else (64, 4)) if half else (32, 8)
    if max(student_width, teacher_width) > most:  # heads are walked through: less at a time
        most, own = most // 2, min(own, 64)
    # AMD's warps are twice as wide.
    num_warps = warps // 2 if torch.version.hip else warps
    return _Blocks(own, 32, features(student_width, most), features(teacher_width, most), part, num_warps, num_stages=2)


class _Relation(NamedTuple):
    """A relation of two tensors on each side, [B, H, N, d], and what is computed of it."""

    student: tuple[Tensor, Tensor]
    teacher: tuple[Tensor, Tensor]
    heads: int
    scale: float | None
    partial: Tensor  # sums of values, one per program
    statistics: Tensor | None  # [4, B, heads, N]
    factor: Tensor  # of the gradient, 0-d

    def turned(self) -> _Relation:
        """The same with its tensors in the other order."""
        return self._replace(student=self.student[::-1], teacher=self.teacher[::-1])

    def layout(self) -> tuple[Any, ...]:
        """Relations that agree in it share a launch."""
        return self.heads, *((tensor.shape, tensor.stride()) for tensor in (*self.student, *self.teacher))

    def blocks(self) -> _Blocks:
        return _blocks(self.student[0].dtype, *(_width(side[0], self.heads) for side in (self.student, self.teacher)))

    def sides(self) -> dict[str, Any]:
        """What the kernels know of student and teacher when they are compiled."""

        def side(tensors: tuple[Tensor, Tensor], block: int) -> tuple[Any, ...]:
            width, size = _width(tensors[0], self.heads), tensors[0].size(3)
            cut = any(size % width != 0 and tensor.stride(1) != size for tensor in tensors)
            return width, size, cut, block, (width**-0.5 if self.scale is None else self.scale) / math.log(2)

        blocks = self.blocks()
        return {"STUDENT": side(self.student, blocks.student), "TEACHER": side(self.teacher, blocks.teacher)}


def _width(tensor: Tensor, heads: int) -> int:
    return tensor.size(1) * tensor.size(3) // heads


def _grouped(tasks: Iterable[tuple[_Relation, Tensor]]) -> list[tuple[list[_Relation], tuple[Tensor, ...]]]:
    """Relations of one layout, and the tensor that comes with each."""
    groups: dict[tuple[Any, ...], list[tuple[_Relation, Tensor]]] = {}
    for relation, tensor in tasks:
        groups.setdefault(relation.layout(), []).append((relation, tensor))
    return [([relation for relation, _ in group], tuple(tensor for _, tensor in group)) for group in groups.values()]


def _tensors(group: Sequence[_Relation]) -> tuple[list[tuple[Tensor, ...]], list[tuple[int, ...]]]:
    """Student's first and second tensor and teacher's, for each relation of a group, and the strides of each."""
    rows = [(*relation.student, *relation.teacher) for relation in group]
    return list(zip(*rows, strict=True)), [tensor.stride()[:3] for tensor in rows[0]]


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.size(3) < 2 or tensor.stride(3) == 1 else tensor.contiguous()


def _unit(row_weights: Tensor, firsts: Tensor) -> Tensor:
    """A power of two that takes the largest weight of a row to 1 or a little above, where fp16 has the room for it."""
    largest = row_weights.abs().masked_fill((firsts < 0).unsqueeze(1), 0.0).amax()
    return torch.exp2(-largest.clamp(min=2.0**-100).log2().floor())


def attention_relation(
    student_q: Tensor | None,
    student_k: Tensor | None,
    student_v: Tensor | None,
    teacher_q: Tensor | None,
    teacher_k: Tensor | None,
    teacher_v: Tensor | None,
    relations: Sequence[int],
    weights: Sequence[float],
    mask: Tensor | None,
    segment_ids: Tensor | None,
    num_items: Tensor | None,
    row_weights: Tensor | None,
    causal: bool,
    relation_heads: int | None,
    scale: float | None,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `attention_relation`: see `pydistill._schemas`."""
    students, teachers = (
        {
            slot: _with_unit_stride(tensor)
            for slot, tensor in enumerate(side)
            if tensor is not None and slot in relations
        }
        for side in ((student_q, student_k, student_v), (teacher_q, teacher_k, teacher_v))
    )
    first = students[relations[0]]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    batches, _, positions, _ = first.shape
    pairs = list(zip(relations[::2], relations[1::2], strict=True))
    options: dict[str, Any] = {"enable_fp_fusion": True}

    def empty(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=kind, device=first.device)

    token_blocks = triton.cdiv(positions, TOKENS) * batches
    firsts, lasts = (empty(batches, positions, kind=torch.int32) for _ in range(2))
    shares, counts = empty(batches, positions), empty(token_blocks, 2, kind=torch.int32)
    if token_blocks > 0:
        mask, segment_ids = (None if tensor is None else tensor.contiguous() for tensor in (mask, segment_ids))
        find_sequences[(token_blocks,)](
            mask, segment_ids, firsts, lasts, shares, counts, positions, HAS_MASK=mask is not None,
            HAS_SEGMENTS=segment_ids is not None, SEQUENCE_MEAN=reduction == "sequence_mean", BLOCK=TOKENS, **options,
        )  # fmt: skip

    found = []
    for a, b in pairs:
        heads = students[a].size(1) if relation_heads is None else relation_heads
        relation = _Relation(
            (students[a], students[b]), (teachers[a], teachers[b]), heads, scale, empty(),
            empty(4, batches, heads, positions) if with_gradient else None, empty(),
        )  # fmt: skip
        programs = triton.cdiv(positions, relation.blocks().own) * heads * batches
        found.append(relation._replace(partial=empty(programs)))
    by_row = reduction == "none"
    loss = empty(batches, found[0].heads, positions) if by_row else empty()
    unit = None
    if row_weights is not None:
        row_weights = row_weights.contiguous()
        unit = _unit(row_weights, firsts)
    for group, partial in _grouped((relation, relation.partial) for relation in found):
        tensors, strides = _tensors(group)
        blocks = group[0].blocks()
        if partial[0].numel() > 0:
            relation_values[(len(group) * partial[0].numel(),)](
                *tensors, *strides, firsts, lasts, shares, row_weights, unit,
                tuple(relation.statistics for relation in group) if with_gradient else None, loss if by_row else None,
                partial, batches, group[0].heads, positions, **group[0].sides(), CAUSAL=causal, GRADIENT=with_gradient,
                ROW_LOSS=by_row, ROW_WEIGHTS=row_weights is not None, OWN=blocks.own, OTHER=blocks.other,
                num_warps=blocks.num_warps, num_stages=blocks.num_stages, **options,
            )  # fmt: skip

    parts, gradient_scale = empty(len(pairs)), empty()
    add_up[(1,)](
        tuple(relation.partial for relation in found), tuple(relation.partial.numel() for relation in found),
        tuple(relation.heads for relation in found), *weights, *(0.0,) * (3 - len(weights)), counts, token_blocks,
        num_items, loss, parts, tuple(relation.factor for relation in found), gradient_scale, REDUCTION=reduction,
        HAS_ITEMS=num_items is not None, HALF=first.dtype == torch.float16, BLOCK=1024, **options,
    )  # fmt: skip

    gradients = [
        torch.empty_like(students[slot]) if with_gradient and slot in students else first.new_empty(0)
        for slot in range(3)
    ]
    if with_gradient and first.numel() > 0:
        both = [(relation, gradients[a]) for relation, (a, b) in zip(found, pairs, strict=True) if a == b]
        rows = [(relation, gradients[a]) for relation, (a, b) in zip(found, pairs, strict=True) if a != b]
        columns = [(relation.turned(), gradients[b]) for relation, (a, b) in zip(found, pairs, strict=True) if a != b]
        for tasks, given in ((both, (True, True)), (rows, (True, False)), (columns, (False, True))):
            for group, gradient in _grouped(tasks):
                tensors, strides = _tensors(group)
                blocks = group[0].blocks()
                parts_of_head = triton.cdiv(_width(gradient[0], group[0].heads), blocks.part)
                relation_gradients[(len(group) * group[0].partial.numel() * parts_of_head,)](
                    gradient, *tensors, gradient[0].stride()[:3], *strides, firsts, lasts, shares,
                    tuple(relation.factor for relation in group), unit,
                    tuple(relation.statistics for relation in group), batches, group[0].heads, positions,
                    **group[0].sides(), ROWS=given[0], COLUMNS=given[1], CAUSAL=causal,
                    ROW_WEIGHTS=row_weights is not None, OWN=blocks.own, OTHER=blocks.other, PART=blocks.part,
                    num_warps=blocks.num_warps, num_stages=blocks.num_stages, **options,
                )  # fmt: skip
    return loss, parts, gradients[0], gradients[1], gradients[2], gradient_scale
