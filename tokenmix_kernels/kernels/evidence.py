"""Activation maps pooled over the mask, in Triton. Beside `reference/evidence.py`."""

import triton
import triton.language as tl

from .groups import CONST

__all__ = ["pool"]


@triton.jit
def own_map(evidence, n, label, MAPS: tl.constexpr):
    """The activation map of an image's own label, flat [CELLS] fp32; zeros where the label or the id is absent.

    Of equal top-k indices the last counts.
    """
    SIZE: tl.constexpr = MAPS.MH * MAPS.MW
    CELLS: tl.constexpr = triton.next_power_of_2(SIZE)
    VEC: tl.constexpr = MAPS.VEC
    cell = tl.arange(0, CELLS)
    real = cell < SIZE
    if evidence.ids is not None:
        n = tl.load(evidence.ids + n).to(tl.int64)
        listed = (n >= 0) & (n < evidence.rows)
        n = tl.where(listed, n, 0)
        real = real & listed
    first = tl.multiple_of(n * evidence.maps_stride, VEC)
    if MAPS.CLASSES > 0 and evidence.indices is None:
        known = (label >= 0) & (label < MAPS.CLASSES)
        first += tl.where(known, label, 0) * SIZE
        real = real & known
    at = cell
    if evidence.indices is not None:
        # Class numbers first, then one value of each cell: not all values of all classes.
        first_index = tl.multiple_of(n * evidence.indices_stride, VEC)
        at = cell * 0 - 1
        k = tl.zeros([], tl.int32)
        while k < evidence.top_k:
            index = tl.load(evidence.indices + first_index + k * SIZE + cell, real, 0).to(tl.int64)
            at = tl.where(index == label, k * SIZE + cell, at)
            k += 1
        real = real & (at >= 0)
    return tl.load(evidence.maps + first + at, real, 0).to(tl.float32)


@triton.jit
def corners(evidence, n, BOX_STEP: tl.constexpr, BOX_FORMAT: tl.constexpr):
    """(x0, y0, x1, y1) of a box in fp32; BOX_FORMAT is the place in `inputs.BOX_FORMATS`."""
    at = evidence.boxes + n * evidence.boxes_stride
    a, b = tl.load(at).to(tl.float32), tl.load(at + BOX_STEP).to(tl.float32)
    c, d = tl.load(at + 2 * BOX_STEP).to(tl.float32), tl.load(at + 3 * BOX_STEP).to(tl.float32)
    if BOX_FORMAT == 0:
        x0, y0, x1, y1 = a, b, c, d
    elif BOX_FORMAT == 1:
        x0, y0, x1, y1 = b, a, b + d, a + c
    else:
        x0, y0, x1, y1 = a, b, a + c, b + d
    return x0, y0, x1, y1


@triton.jit
def resample(
    flat,
    low,
    high,
    outer,
    cell,
    OUTER_STEP: tl.constexpr,
    STEP: tl.constexpr,
    SIZE: tl.constexpr,
    CELLS: tl.constexpr,
):
    """A map's axis averaged over the grid's cells by the rule of `roi_align`: one value for each of (outer, cell).

    torchvision's rule with aligned=False and an adaptive sampling ratio: box * size - 0.5, at least one map cell long,
    ceil(extent / grid) samples in each cell. The map is at outer * OUTER_STEP + position * STEP of `flat`.
    """
    extent = tl.maximum((high - low) * SIZE, 1.0)
    first = low * SIZE - 0.5
    length = tl.div_rn(extent, tl.full([], CELLS, tl.float32))
    samples = tl.minimum(tl.ceil(length), CONST.value.MOST_SAMPLES)
    total = cell.to(tl.float32) * 0.0
    s = tl.zeros([], tl.float32)
    while s < samples:
        at = first + (cell.to(tl.float32) + tl.div_rn(s + 0.5, samples)) * length
        used = (at >= -1.0) & (at <= SIZE)
        at = tl.minimum(tl.maximum(at, 0.0), SIZE - 1.0)
        lower = at.to(tl.int32)
        upper = tl.minimum(lower + 1, SIZE - 1)
        share = at - lower.to(tl.float32)
        both = tl.join(outer * OUTER_STEP + lower * STEP, outer * OUTER_STEP + upper * STEP)  # [cells, 2]
        near, far = tl.split(tl.reshape(tl.gather(flat, tl.ravel(both), 0), both.shape))
        total += tl.where(used, near + share * (far - near), 0.0)
        s += 1.0
    return total * tl.div_rn(1.0, samples)


@triton.jit
def resample_affine(
    flat, affine, token, GH: tl.constexpr, GW: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr
):  # fmt: skip
    """A map averaged over the tokens of a grid that an affine takes into it, by the rule of `resample`: [TOKENS].

    affine points to (a, b, c, d, e, f): output (u, v) in [0, 1]^2 shows (a u + b v + c, d u + e v + f) of the map.
    """
    a, b, c = tl.load(affine), tl.load(affine + 1), tl.load(affine + 2)
    d, e, f = tl.load(affine + 3), tl.load(affine + 4), tl.load(affine + 5)
    width, height = tl.full([], GW, tl.float32), tl.full([], GH, tl.float32)
    across = tl.div_rn(tl.maximum(tl.maximum(tl.abs(a) * MW, tl.abs(d) * MH), 1.0), width)
    down = tl.div_rn(tl.maximum(tl.maximum(tl.abs(b) * MW, tl.abs(e) * MH), 1.0), height)
    across = tl.minimum(tl.ceil(across), CONST.value.MOST_SAMPLES)
    down = tl.minimum(tl.ceil(down), CONST.value.MOST_SAMPLES)
    column = (token % GW).to(tl.float32)
    row = tl.minimum(token // GW, GH - 1).to(tl.float32)
    total = column * 0.0
    t = tl.zeros([], tl.float32)
    while t < down:
        v = tl.div_rn(row + tl.div_rn(t + 0.5, down), height)
        s = tl.zeros([], tl.float32)
        while s < across:
            u = tl.div_rn(column + tl.div_rn(s + 0.5, across), width)
            x = (a * u + b * v + c) * MW - 0.5
            y = (d * u + e * v + f) * MH - 0.5
            used = (x >= -1.0) & (x <= MW) & (y >= -1.0) & (y <= MH)
            x = tl.minimum(tl.maximum(x, 0.0), MW - 1.0)
            y = tl.minimum(tl.maximum(y, 0.0), MH - 1.0)
            left, top = x.to(tl.int32), y.to(tl.int32)
            right, bottom = tl.minimum(left + 1, MW - 1), tl.minimum(top + 1, MH - 1)
            x, y = x - left.to(tl.float32), y - top.to(tl.float32)
            four = tl.join(
                tl.join(top * MW + left, bottom * MW + left), tl.join(top * MW + right, bottom * MW + right)
            )  # [TOKENS, 2, 2]
            near, far = tl.split(tl.reshape(tl.gather(flat, tl.ravel(four), 0), four.shape))
            upper, lower = tl.split(near + x[:, None] * (far - near))
            total += tl.where(used, upper + y * (lower - upper), 0.0)
            s += 1.0
        t += 1.0
    return total * tl.div_rn(1.0, across * down)


@triton.jit
def pool_box(flat, evidence, n, column, line, GRID: tl.constexpr, MAPS: tl.constexpr):
    """A map averaged over the tokens (line, column) of the grid on its box, mirrored where it is flipped."""
    GH: tl.constexpr = GRID.GH
    GW: tl.constexpr = GRID.GW
    MH: tl.constexpr = MAPS.MH
    MW: tl.constexpr = MAPS.MW
    STRIPES: tl.constexpr = triton.next_power_of_2(MH * GW)
    if evidence.boxes is None:
        x0 = tl.zeros([], tl.float32)
        y0, x1 = x0, x0 + 1.0
        y1 = x1
    else:
        x0, y0, x1, y1 = corners(evidence, n, MAPS.BOX_STEP, MAPS.BOX_FORMAT)
    if evidence.flips is not None:
        column = tl.where(tl.load(evidence.flips + n) != 0, GW - 1 - column, column)
    stripe = tl.arange(0, STRIPES)
    row = tl.minimum(stripe // GW, MH - 1)
    stripes = resample(flat, x0, x1, row, stripe % GW, MW, 1, MW, GW)  # [MH * GW]
    return resample(stripes, y0, y1, column, line, 1, GW, MH, GH)


@triton.jit
def pool(
    evidence, n, label, share, area, visible, TOKENS: tl.constexpr, GRID: tl.constexpr, MAPS: tl.constexpr
):  # fmt: skip
    """The share of its evidence that an image keeps where `share` [TOKENS] of each token is its own: eq. 5 and 6.

    `visible` [TOKENS] of each token is not erased, all of it where it is None. Without evidence (its sum is not a
    positive number) it is its share of the area.
    """
    kept = area
    if evidence.maps is not None:
        token = tl.arange(0, TOKENS)
        flat = own_map(evidence, n, label, MAPS)
        line = tl.minimum(token // GRID.GW, GRID.GH - 1)
        if evidence.affines is not None:
            pooled = resample_affine(flat, evidence.affines + n * 6, token, GRID.GH, GRID.GW, MAPS.MH, MAPS.MW)
        else:
            pooled = pool_box(flat, evidence, n, token % GRID.GW, line, GRID, MAPS)
        pooled = tl.where(token < GRID.GH * GRID.GW, pooled, 0.0)
        if visible is not None:
            pooled *= visible
        total = tl.sum(pooled, 0)
        kept_evidence = tl.sum(pooled * share, 0)
        kept = tl.where((total > 0) & (total < float("inf")), tl.div_rn(kept_evidence, total + 1e-8), kept)
    return kept
