# SPDX-License-Identifier: Apache-2.0
"""Projected mean squared error in Triton: value and gradients without the projected rows in memory.

Rows of the source x [R, k] are projected, y = x P + b [R, m], and compared with rows of the target t (Jiao et al. 2019,
arXiv 1909.10351, equation 8). A row's value is |d|^2 / m with d = y - t, and the gradients are, times 2 / m,

    to x: d P^T    to t: -d    to P: x^T d    to b: the sum of d over rows.

With u = y / |y|, v = t / |t| and c = <u, v> (`normalize`), d = u - v, and (c u - v) / |y| stands for d in the
gradients, (c v - u) / |t| for -d.

Each kernel makes y again, a tile at a time: one walks the features under a block of rows, for their values and the
gradient of their side; one walks the rows over a tile of P, for its gradient. Rows are shared out to several programs
there, whose parts are added in a fixed order at the end, as are the values: the same bits every time. The number of
valid rows is counted on the device.

Products of half precision run on tensor cores: x P is exact up to its sum, and d enters the other two as the sum of two
numbers of half precision. The method "gram" is computed directly: the same value and gradients, without its loss of
digits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pydistill.kernels.half import left_to_backward, power_of_two

SHORTEST = tl.constexpr(1e-12)  # length of a row below which it has no direction


@triton.jit
def count_rows(
    mask, num_items, factors, gradient_scale, count, m,
    MEAN: tl.constexpr, BY_ROW: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What depends on the number of valid rows: the factors of the value, of the gradient of a side, and of those of
    projection and bias, [3], and what backward applies to the first of these gradients."""
    denominator = tl.full((), 1, tl.float64)
    if MEAN or BY_ROW:
        denominator *= m
    if MEAN:
        if num_items is not None:
            denominator *= tl.load(num_items).to(tl.float64)
        else:
            found = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, count, BLOCK):
                rows = start + tl.arange(0, BLOCK).to(tl.int64)
                found += _valid_rows(mask, rows, count).to(tl.int32)
            denominator *= tl.maximum(tl.sum(found, 0), 1)
    later = left_to_backward(denominator, MEAN and HALF)
    tl.store(factors, 1 / denominator)
    tl.store(factors + 1, 2 / (denominator * later))
    tl.store(factors + 2, 2 / denominator)
    tl.store(gradient_scale, later.to(gradient_scale.dtype.element_ty))


@triton.jit
def _valid_rows(mask, rows, end):
    """Which rows count: [rows]."""
    valid = rows < end
    if mask is not None:
        valid = valid & (tl.load(mask + rows, mask=valid, other=0) != 0)
    return valid


@triton.jit
def _load_rows(side, stride, rows, valid, columns, size, dtype: tl.constexpr):
    """A tile of a side, [rows, columns]. Rows that do not count are not read."""
    places = side + (rows * stride)[:, None] + columns[None, :]
    return tl.load(places, mask=valid[:, None] & (columns < size)[None, :], other=0.0).to(dtype)


@triton.jit
def _load_projection(projection, features, columns, k, m):
    """A tile of P, [features, columns]."""
    places = projection + features.to(tl.int64)[:, None] * m + columns[None, :]
    return tl.load(places, mask=(features < k)[:, None] & (columns < m)[None, :], other=0.0)


@triton.jit
def _project(
    x, p, source, stride, rows, valid, projection, bias, columns, k, m,
    dtype: tl.constexpr, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of y, [rows, columns], zero where a row does not count. WHOLE: x and p have all of its k features."""
    y = tl.zeros((rows.shape[0], columns.shape[0]), dtype)
    if WHOLE:
        y = tl.dot(x, p, y, input_precision="ieee", out_dtype=dtype)
    else:
        for start in range(0, k, BLOCK_K):
            features = start + tl.arange(0, BLOCK_K)
            tile_x = _load_rows(source, stride, rows, valid, features, k, projection.dtype.element_ty)
            tile_p = _load_projection(projection, features, columns, k, m)
            y = tl.dot(tile_x, tile_p, y, input_precision="ieee", out_dtype=dtype)
    inside = columns < m
    if bias is not None:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(dtype)[None, :]
    return tl.where(valid[:, None] & inside[None, :], y, 0.0)


@triton.jit
def _load_directions(directions, rows, valid, dtype: tl.constexpr):
    """What `row_directions` found: 1 / |y|, 1 / |t| and c, each [rows, 1]; nothing where rows are not normalised."""
    inverse_y = tl.full((rows.shape[0], 1), 1, dtype)
    inverse_t, cosine = inverse_y, inverse_y
    if directions is not None:
        places = directions + rows * 3
        inverse_y = tl.load(places, mask=valid, other=0.0)[:, None]
        inverse_t = tl.load(places + 1, mask=valid, other=0.0)[:, None]
        cosine = tl.load(places + 2, mask=valid, other=0.0)[:, None]
    return inverse_y, inverse_t, cosine


@triton.jit
def _slopes(y, t, inverse_y, inverse_t, cosine, NORMALIZE: tl.constexpr):
    """The difference d, and half the gradient of |d|^2 with respect to y and to t."""
    if NORMALIZE:
        u, v = y * inverse_y, t * inverse_t
        return u - v, (cosine * u - v) * inverse_y, (cosine * v - u) * inverse_t
    return y - t, y - t, t - y


@triton.jit
def _halves(d, axis: tl.constexpr, dtype: tl.constexpr):
    """d [a, b] as (leading + rest) * scale, in half precision; scale has size 1 along `axis`.

    bf16 has the range of fp32, fp16 has not: there a power of two brings each row (or column) to the size of 1.
    """
    scale = tl.full((1, 1), 1, tl.float32)
    if dtype == tl.float16:
        scale, inverse = power_of_two(tl.max(tl.abs(d), axis, keep_dims=True))
        d *= inverse
    leading = d.to(dtype)
    return leading, (d - leading.to(tl.float32)).to(dtype), scale


@triton.jit
def _add_product(total, d, p, dtype: tl.constexpr):
    """total + d p, with d in full precision."""
    if p.dtype.primitive_bitwidth > 16:
        return tl.dot(d, p, total, input_precision="ieee", out_dtype=dtype)
    leading, rest, scale = _halves(d, 1, p.dtype)
    if p.dtype == tl.bfloat16:
        return tl.dot(leading, p, tl.dot(rest, p, total))
    return total + scale * tl.dot(leading, p, tl.dot(rest, p))


@triton.jit
def _add_transposed_product(total, x, d, dtype: tl.constexpr):
    """total + x^T d, with d in full precision."""
    x = tl.trans(x)
    if x.dtype.primitive_bitwidth > 16:
        return tl.dot(x, d, total, input_precision="ieee", out_dtype=dtype)
    leading, rest, scale = _halves(d, 0, x.dtype)
    if x.dtype == tl.bfloat16:
        return tl.dot(x, leading, tl.dot(x, rest, total))
    return total + scale * tl.dot(x, leading, tl.dot(x, rest))


@triton.jit
def _inverse_length(squares):
    """1 / length, and 0 for a row without a direction; NaN stays."""
    length = tl.sqrt(squares)
    short = length <= SHORTEST
    return tl.where(short, 0.0, 1 / tl.where(short, 1.0, length))


@triton.jit
def row_directions(
    source, target, projection, bias, mask, directions, count, k, m, source_stride, target_stride,
    WHOLE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """1 / |y|, 1 / |t| and <y, t> / (|y| |t|) of a block of rows: [R, 3]."""
    dtype: tl.constexpr = directions.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = _valid_rows(mask, rows, count)
    x = 0
    if WHOLE:
        features = tl.arange(0, BLOCK_K)
        x = _load_rows(source, source_stride, rows, valid, features, k, projection.dtype.element_ty)
    yy = tl.zeros((BLOCK_ROWS,), dtype)
    tt, yt = yy, yy
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        p = 0
        if WHOLE:
            p = _load_projection(projection, features, columns, k, m)
        y = _project(
            x, p, source, source_stride, rows, valid, projection, bias, columns, k, m, dtype, WHOLE, BLOCK_K
        )  # fmt: skip
        t = _load_rows(target, target_stride, rows, valid, columns, m, dtype)
        yy += tl.sum(y * y, 1)
        tt += tl.sum(t * t, 1)
        yt += tl.sum(y * t, 1)
    inverse_y, inverse_t = _inverse_length(yy), _inverse_length(tt)
    places = directions + rows * 3
    tl.store(places, inverse_y, mask=valid)
    tl.store(places + 1, inverse_t, mask=valid)
    tl.store(places + 2, yt * inverse_y * inverse_t, mask=valid)


@triton.jit
def projected_mse_rows(
    source, target, projection, bias, mask, row_weights, directions, factors, squares, row_loss, gradient,
    count, k, m, source_stride, target_stride,
    OF_SOURCE: tl.constexpr, OF_TARGET: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """Values of a block of rows, one by one or their sum, and the gradient of their source (BLOCK_OUT of its features)
    or of their target."""
    dtype: tl.constexpr = squares.dtype.element_ty
    block, part = tl.program_id(0), tl.program_id(1)
    rows = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    valid = _valid_rows(mask, rows, count)
    factor = tl.full((BLOCK_ROWS, 1), 1, dtype) * tl.load(factors + 1).to(dtype)
    if row_weights is not None:
        factor *= tl.load(row_weights + rows, mask=valid, other=0.0)[:, None]
    inverse_y, inverse_t, cosine = _load_directions(directions, rows, valid, dtype)
    x = 0
    if WHOLE:
        features = tl.arange(0, BLOCK_K)
        x = _load_rows(source, source_stride, rows, valid, features, k, projection.dtype.element_ty)
    outputs = part * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    total = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype)
    value = tl.zeros((BLOCK_ROWS,), dtype)
    for start in range(0, m, BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        p = 0
        if WHOLE:
            p = _load_projection(projection, features, columns, k, m)
        y = _project(
            x, p, source, source_stride, rows, valid, projection, bias, columns, k, m, dtype, WHOLE, BLOCK_K
        )  # fmt: skip
        t = _load_rows(target, target_stride, rows, valid, columns, m, dtype)
        d, slope_y, slope_t = _slopes(y, t, inverse_y, inverse_t, cosine, directions is not None)
        value += tl.sum(d * d, 1)
        if OF_SOURCE:
            if not WHOLE:
                p = _load_projection(projection, outputs, columns, k, m)
            total = _add_product(total, slope_y, tl.trans(p), dtype)
        if OF_TARGET:
            places = gradient + (rows * m)[:, None] + columns[None, :]
            inside = (rows < count)[:, None] & (columns < m)[None, :]
            tl.store(places, (slope_t * factor).to(gradient.dtype.element_ty), mask=inside)
    if OF_SOURCE:
        places = gradient + (rows * k)[:, None] + outputs[None, :]
        inside = (rows < count)[:, None] & (outputs < k)[None, :]
        tl.store(places, (total * factor).to(gradient.dtype.element_ty), mask=inside)
    if part == 0:
        if row_loss is not None:
            tl.store(row_loss + rows, value * tl.load(factors).to(dtype), mask=rows < count)
        else:
            tl.store(squares + block, tl.sum(value, 0))


@triton.jit
def projected_mse_projection(
    source, target, projection, bias, mask, row_weights, directions, parts,
    count, k, m, source_stride, target_stride, share,
    WITH_PROJECTION: tl.constexpr, WITH_BIAS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """A tile of x^T d, and the sum of d, over a share of the rows: [shares, k + 1, m], the last row for the bias."""
    dtype: tl.constexpr = parts.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    begin = tl.program_id(2).to(tl.int64) * share
    end = tl.minimum(begin + share, count)
    p = 0
    if WHOLE:
        p = _load_projection(projection, outputs, columns, k, m)
    total = tl.zeros((BLOCK_OUT, BLOCK_M), dtype)
    sums = tl.zeros((BLOCK_M,), dtype)
    for start in range(begin, end, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        valid = _valid_rows(mask, rows, end)
        x = 0
        if WITH_PROJECTION or WHOLE:
            x = _load_rows(source, source_stride, rows, valid, outputs, k, projection.dtype.element_ty)
        y = _project(
            x, p, source, source_stride, rows, valid, projection, bias, columns, k, m, dtype, WHOLE, BLOCK_K
        )  # fmt: skip
        t = _load_rows(target, target_stride, rows, valid, columns, m, dtype)
        inverse_y, inverse_t, cosine = _load_directions(directions, rows, valid, dtype)
        _, slope, _ = _slopes(y, t, inverse_y, inverse_t, cosine, directions is not None)
        if row_weights is not None:
            slope *= tl.load(row_weights + rows, mask=valid, other=0.0)[:, None]
        if WITH_BIAS:
            sums += tl.sum(slope, 0)
        if WITH_PROJECTION:
            total = _add_transposed_product(total, x, slope, dtype)
    parts += tl.program_id(2).to(tl.int64) * (k + 1) * m + columns
    if WITH_PROJECTION:
        inside = (outputs < k)[:, None] & (columns < m)[None, :]
        tl.store(parts[None, :] + outputs.to(tl.int64)[:, None] * m, total, mask=inside)
    if WITH_BIAS:
        if tl.program_id(1) == 0:
            tl.store(parts + tl.full((), k, tl.int64) * m, sums, mask=columns < m)


@triton.jit
def add_parts(
    squares, blocks, factors, loss, parts, shares, grad_projection, grad_bias, k, m,
    WITH_PROJECTION: tl.constexpr, WITH_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss, by the first program, and the gradients of projection and bias, by the others: the parts of each added
    in a fixed order, times the factor."""
    block = tl.program_id(0)
    if block == 0:
        if loss is not None:
            # In double precision: one program has few numbers to add, and many rows are not to cost digits.
            value = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, blocks, BLOCK):
                places = start + tl.arange(0, BLOCK)
                value += tl.load(squares + places, mask=places < blocks, other=0.0).to(tl.float64)
            tl.store(loss, (tl.sum(value, 0) * tl.load(factors)).to(loss.dtype.element_ty))
    else:
        dtype: tl.constexpr = parts.dtype.element_ty
        size = tl.full((), k, tl.int64) * m
        places = (block - 1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        if not WITH_PROJECTION:
            places += size
        total = tl.zeros((BLOCK,), dtype)
        for share in range(0, shares):
            total += tl.load(parts + share * (size + m) + places, mask=places < size + m, other=0.0)
        total *= tl.load(factors + 2).to(dtype)
        if WITH_PROJECTION:
            tl.store(grad_projection + places, total, mask=places < size)
        if WITH_BIAS:
            tl.store(grad_bias + (places - size), total, mask=(places >= size) & (places < size + m))


# --------------------------------------------------------------------------- host

PROGRAMS = 512  # as many as keep a large device busy


def _tiles(dtype: torch.dtype, k: int, m: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles and warps of the kernels over rows, and of the one over the projection, by the dtype of their products:
    fixed, so that a new shape costs a compilation and no search. Larger ones spill registers."""
    features, width = (triton.next_power_of_2(max(size, 16)) for size in (k, m))
    if dtype.itemsize > 2:  # no tensor cores: products are unrolled
        whole, depths, over_rows, over_projection = 16, (16, 16), (32, 32), (32, 64)
        outputs = 64 if dtype == torch.float32 else 32
    else:
        whole, depths, over_rows = 128, (64, 32), (64, 64)
        over_projection = (64, 32 if features <= whole else 64)
        outputs = 128

    def tile(depth: int, rows: int, columns: int, warps: int) -> dict[str, Any]:
        return {
            "WHOLE": features <= whole,
            "BLOCK_ROWS": rows,
            "BLOCK_K": features if features <= whole else depth,
            "BLOCK_M": min(width, columns),
            "BLOCK_OUT": min(features, outputs),
            "num_warps": warps,
            "num_stages": 2,
        }

    # AMD's warps are twice as wide.
    return tile(depths[0], *over_rows, 8), tile(depths[1], *over_projection, 4 if torch.version.hip else 8)


def _unit_stride(rows: Tensor) -> Tensor:
    return rows.contiguous() if rows.size(1) > 1 and rows.stride(1) != 1 else rows


def projected_mse(
    student: Tensor,
    teacher: Tensor,
    projection: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    num_items: Tensor | None,
    row_weights: Tensor | None,
    up: bool,
    normalize: bool,
    method: str,
    reduction: str,
    with_student: bool,
    with_projection: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `projected_mse`: see `pydistill._schemas`."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    count, (k, m) = student.size(0), projection.shape
    by_row = reduction == "none"

    def fresh(wanted: bool, *sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes if wanted else 0, dtype=dtype, device=student.device)

    loss = fresh(True, *([count] if by_row else []))
    grad_student = fresh(with_student, *student.shape, dtype=student.dtype)
    grad_projection, grad_bias = fresh(with_projection, k, m), fresh(with_bias, m)
    gradient_scale = fresh(True)
    factors = fresh(True, 3, dtype=torch.float64)
    projection = projection.contiguous()
    bias, mask, row_weights = (None if given is None else given.contiguous() for given in (bias, mask, row_weights))
    source, target = (_unit_stride(side) for side in ((student, teacher) if up else (teacher, student)))
    sizes = (count, k, m, source.stride(0), target.stride(0))
    over_rows, over_projection = _tiles(projection.dtype, k, m)
    blocks = triton.cdiv(count, over_rows["BLOCK_ROWS"])

    count_rows[(1,)](
        mask, num_items, factors, gradient_scale, count, m, MEAN=reduction == "mean", BY_ROW=by_row,
        HALF=student.dtype == torch.float16, BLOCK=4096, num_warps=16, enable_fp_fusion=True,
    )  # fmt: skip
    directions = fresh(True, count, 3) if normalize else None
    if normalize and count > 0:
        row_directions[(blocks,)](
            source, target, projection, bias, mask, directions, *sizes, **over_rows, enable_fp_fusion=True
        )  # fmt: skip
    squares = fresh(True, blocks)
    if count > 0:
        parts_of_k = triton.cdiv(k, over_rows["BLOCK_OUT"]) if up and with_student else 1
        projected_mse_rows[(blocks, parts_of_k)](
            source, target, projection, bias, mask, row_weights, directions, factors, squares,
            loss if by_row else None, grad_student, *sizes,
            OF_SOURCE=up and with_student, OF_TARGET=with_student and not up,
            **over_rows, enable_fp_fusion=True,
        )  # fmt: skip
    wanted = with_projection or with_bias
    shares, parts = 0, fresh(False)
    if wanted and count > 0:
        tiles = (triton.cdiv(m, over_projection["BLOCK_M"]), triton.cdiv(k, over_projection["BLOCK_OUT"]))
        # As many rows to a share whatever is asked for: the same bits.
        unit = over_projection["BLOCK_ROWS"]
        share = triton.cdiv(triton.cdiv(count, unit), triton.cdiv(PROGRAMS, tiles[0] * tiles[1])) * unit
        shares = triton.cdiv(count, share)
        parts = fresh(True, shares, k + 1, m)
        projected_mse_projection[(tiles[0], tiles[1] if with_projection else 1, shares)](
            source, target, projection, bias, mask, row_weights, directions, parts, *sizes, share,
            WITH_PROJECTION=with_projection, WITH_BIAS=with_bias, **over_projection, enable_fp_fusion=True,
        )  # fmt: skip
    if wanted or not by_row:
        length = (k * with_projection + with_bias) * m
        add_parts[(1 + triton.cdiv(length, 1024),)](
            squares, blocks, factors, None if by_row else loss, parts, shares, grad_projection, grad_bias, k, m,
            WITH_PROJECTION=with_projection, WITH_BIAS=with_bias, BLOCK=1024, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, grad_student, grad_projection, grad_bias, gradient_scale
