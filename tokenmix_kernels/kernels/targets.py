"""Weights and soft targets, in Triton. Beside `reference/targets.py`."""

import triton
import triton.language as tl

from .draw import coverage
from .erasing import chosen, rectangle
from .evidence import pool
from .groups import CONST
from .window import popcount

__all__ = ["write_targets"]


@triton.jit
def taken_share(drawn, TOKENS: tl.constexpr, GRID: tl.constexpr, RULE: tl.constexpr):
    """The share of each token that comes from the partner, [TOKENS] fp32; beyond the grid it means nothing."""
    P: tl.constexpr = GRID.P
    GW: tl.constexpr = GRID.GW
    WORD_TOKENS: tl.constexpr = GRID.WORD_ROWS * GW
    token = tl.arange(0, TOKENS)
    if RULE.WHOLE_TOKENS:
        line = tl.max(drawn.mask, 0)  # [WORDS], the same in all four rows
        mine = tl.gather(line, tl.minimum(token // WORD_TOKENS, GRID.WORDS - 1), 0)
        share = ((mine >> (token % WORD_TOKENS).to(drawn.mask.dtype)) & 1).to(tl.float32)
    else:
        covered = coverage(drawn.top, drawn.bottom, drawn.left, drawn.right, token, GRID)
        share = covered.to(tl.float32) * (1.0 / (P * P))
    return share


@triton.jit
def erased_pixels(erased, token, GRID: tl.constexpr):
    """The pixels of each token that are in one of the rectangles: bits of its lines, 32 columns at a time."""
    COUNT: tl.constexpr = erased.top.shape[0]
    P: tl.constexpr = GRID.P
    if COUNT == 1:
        top, bottom, left, right = rectangle(erased, 0, COUNT)
        number = coverage(top, bottom, left, right, token, GRID)
    else:
        y, x = (token // GRID.GW) * P, (token % GRID.GW) * P
        number = token * 0
        for line in range(P):
            for column in tl.static_range(0, P, 32):
                bits = token.to(tl.uint64) * 0
                for n in tl.static_range(COUNT):
                    top, bottom, left, right = rectangle(erased, n, COUNT)
                    inside = (y + line >= top) & (y + line < bottom)
                    first = tl.minimum(tl.maximum(left - x - column, 0), min(32, P - column))
                    end = tl.minimum(tl.maximum(right - x - column, 0), min(32, P - column))
                    one = inside.to(tl.uint64)
                    bits = bits | ((one << end) - (one << first))
                number += popcount(bits)
    return number


@triton.jit
def visible_share(erased, TOKENS: tl.constexpr, GRID: tl.constexpr):
    """The share of each token that is not erased, [TOKENS] fp32; 0 beyond the grid."""
    P: tl.constexpr = GRID.P
    token = tl.arange(0, TOKENS)
    visible = P * P - erased_pixels(erased, token, GRID)
    return tl.where(token < GRID.GH * GRID.GW, visible.to(tl.float32) * (1.0 / (P * P)), 0.0)


@triton.jit
def visible_area(share, visible):
    """The share of what is visible of an image that `share` [TOKENS] of its tokens makes."""
    return tl.div_rn(tl.sum(share * visible, 0), tl.sum(visible, 0))


@triton.jit
def write_row(targets, begin, side, mine, theirs, rest, raised, K: tl.constexpr):
    """One side's half of a target row that starts at `begin`: `raised` in the column `mine`, `rest` elsewhere.

    Whatever K is, columns are stored in fours between 16-byte borders of memory. The fours around both labels (mine,
    theirs; AWAY where there is none) and the ends of the row are stored by themselves, no column by two threads.
    """
    WIDE: tl.constexpr = min(128, triton.next_power_of_2(K))
    head = ((-begin) & 3).to(tl.int32) if K % 4 != 0 else tl.zeros([], tl.int32)  # columns before the first border
    fours = tl.maximum(K - head, 0) // 4
    row = targets + tl.multiple_of(begin + head, 4)
    mine, theirs = mine - head, theirs - head
    my_four, their_four = mine >> 2, theirs >> 2
    within = tl.arange(0, 4)
    for start in range(0, K // 4, 2 * WIDE):
        four = start + side * WIDE + tl.arange(0, WIDE)[:, None]  # [WIDE, 1]
        valid = (four < fours) & (four != my_four) & (four != their_four)
        tl.store(row + (four * 4 + within[None, :]), rest, valid)
    near = my_four * 4 + within
    valid = (near >= -head) & (near < K - head) & (near != theirs)
    valid = valid & ((side == 0) | (my_four != their_four) | (near == mine))
    tl.store(row + near, tl.where(near == mine, raised, rest), valid)
    if K % 4 != 0:
        end = tl.where(side == 0, -1, fours)
        near = end * 4 + within
        valid = (near >= -head) & (near < K - head) & (end != my_four) & (end != their_four)
        tl.store(row + near, rest, valid)


@triton.jit
def raise_label(weight, kind, smoothing, RULE: tl.constexpr):
    """What a label of this weight adds to its class in the targets, before the share that every class has."""
    timm = weight * (1.0 - smoothing)
    return tl.where(kind > CONST.value.MIXUP, weight - smoothing * 0.5, timm) if RULE.AS_IN_PAPER else timm


@triton.jit
def is_by_lam(drawn, RULE: tl.constexpr):
    """Whether lam weighs the labels: of samples that are blended or left, and by the rules that say so."""
    by_lam = drawn.kind <= CONST.value.MIXUP
    if RULE.LAM_WEIGHTS:
        by_lam = drawn.kind >= 0
    return by_lam


@triton.jit
def clamp(target, RULE: tl.constexpr):
    """At most 1 where the settings say so. What is not a number stays so."""
    return tl.where(target > 1.0, 1.0, target) if RULE.CLAMP else target


@triton.jit
def weigh_classes(
    evidence, source, label, column, weight, by_lam, share, area, visible, TOKENS: tl.constexpr, GRID: tl.constexpr,
    RULE: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """The weight of each class of a block by its own map, [BLOCK] fp32; where lam weighs or a label is 0, `weight`.

    Maps of classes whose label is 0 are not read.
    """
    weights = column * 0.0 + weight
    left = (label != 0.0) & (column < RULE.K) & ~by_lam
    c = tl.min(tl.where(left, column, RULE.K), 0)
    while c < RULE.K:
        pooled = pool(evidence, source, c.to(tl.int64), share, area, visible, TOKENS, GRID, MAPS)
        weights = tl.where(column == c, pooled, weights)
        left = left & (column > c)
        c = tl.min(tl.where(left, column, RULE.K), 0)
    return weights


@triton.jit
def write_rows(
    pairs,
    evidence,
    results,
    i,
    j,
    drawn,
    taken,
    moved,
    erased,  # as in `write_targets`
    erased_j,
    smoothing,
    GRID: tl.constexpr,
    RULE: tl.constexpr,
    MAPS: tl.constexpr,
):
    """Weights and targets of labels [B, K]: the sum of both rows, each times what it is raised by.

    Maps of several classes weigh each class by its own map; all other weights are the same for a row.
    """
    TOKENS: tl.constexpr = taken.shape[0]
    AREA: tl.constexpr = GRID.GH * GRID.GW if RULE.WHOLE_TOKENS else GRID.H * GRID.W
    K: tl.constexpr = RULE.K
    BY_CLASS: tl.constexpr = MAPS.CLASSES > 0
    BLOCK: tl.constexpr = min(128 if BY_CLASS else 1024, triton.next_power_of_2(K))
    by_lam = is_by_lam(drawn, RULE)
    rest = tl.div_rn(tl.cast(smoothing, tl.float32), tl.full([], 2 if RULE.MULTI_LABEL else K, tl.float32))
    sides = tl.arange(0, 2)
    areas = tl.where(sides == 0, AREA - moved, moved).to(tl.float32) * (1.0 / AREA)
    if RULE.ERASE_EVIDENCE:
        own_area = visible_area(1.0 - taken, visible_share(erased, TOKENS, GRID))
        areas = tl.where(sides == 0, own_area, visible_area(taken, visible_share(erased_j, TOKENS, GRID)))
    lams = tl.where(sides == 0, drawn.lam, 65536 - drawn.lam).to(tl.float32) * CONST.value.UNIT
    weights = tl.where(by_lam, lams, areas)  # [2]
    if evidence.maps is not None and not BY_CLASS:
        n = 0
        while n < 2:
            own = n == 0
            share, area = tl.where(own, 1.0 - taken, taken), tl.sum(tl.where(sides == n, areas, 0.0), 0)
            visible = None
            if RULE.ERASE_EVIDENCE:
                visible = visible_share(chosen(own, erased, erased_j), TOKENS, GRID)
            pooled = pool(evidence, tl.where(own, i, j), -1, share, area, visible, TOKENS, GRID, MAPS)
            weights = tl.where((sides == n) & ~by_lam, pooled, weights)
            n += 1
    total, weighed = sides * 0.0, sides * 0.0
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        target = column * 0.0 + rest
        n = 0
        while n < 2:
            own = n == 0
            source = tl.where(own, i, j)
            label = tl.load(pairs.labels + source * pairs.labels_stride + column, column < K, 0).to(tl.float32)
            weight = tl.sum(tl.where(sides == n, weights, 0.0), 0)
            if BY_CLASS:
                share, area = tl.where(own, 1.0 - taken, taken), tl.sum(tl.where(sides == n, areas, 0.0), 0)
                visible = None
                if RULE.ERASE_EVIDENCE:
                    visible = visible_share(chosen(own, erased, erased_j), TOKENS, GRID)
                weight = weigh_classes(
                    evidence, source, label, column, weight, by_lam, share, area, visible, TOKENS, GRID, RULE, MAPS
                )  # fmt: skip
                if results.weights is not None:
                    total += tl.where(sides == n, tl.sum(label, 0), 0.0)
                    weighed += tl.where(sides == n, tl.sum(weight * label, 0), 0.0)
            target += raise_label(weight, drawn.kind, smoothing, RULE) * label
            n += 1
        if results.targets is not None:
            tl.store(results.targets + i * K + column, clamp(target, RULE), column < K)
    if results.weights is not None:
        if BY_CLASS:
            weights = tl.where(total > 0, tl.div_rn(weighed, tl.where(total > 0, total, 1.0)), weights)
        tl.store(results.weights + i * 2 + sides, weights)


@triton.jit
def write_targets(
    pairs,
    evidence,
    results,
    i,
    j,
    side,
    drawn,
    erased,  # where erased pixels carry no evidence
    erased_j,
    smoothing,
    GRID: tl.constexpr,
    RULE: tl.constexpr,
    MAPS: tl.constexpr,
):
    """Pool one side of a pair (side 0: the own image, 1: the partner) and write its half of the target row.

    Where both have one label, side 0 pools both; of labels [B, K] it writes all.
    """
    COUNT: tl.constexpr = GRID.GH * GRID.GW
    TOKENS: tl.constexpr = triton.next_power_of_2(COUNT)
    K: tl.constexpr = RULE.K
    AREA: tl.constexpr = COUNT if RULE.WHOLE_TOKENS else GRID.H * GRID.W
    taken = taken_share(drawn, TOKENS, GRID, RULE)
    token = tl.arange(0, TOKENS)
    if results.mask is not None and side == 1:
        SHARES: tl.constexpr = results.mask.dtype.element_ty == tl.float32
        tl.store(results.mask + i * COUNT + token, taken if SHARES else taken > 0.5, token < COUNT)
    if results.kind is not None and side == 1:
        tl.store(results.kind + i, drawn.kind.to(tl.uint8))
    if results.weights is None and results.targets is None:
        return
    moved = drawn.tokens if RULE.WHOLE_TOKENS else (drawn.bottom - drawn.top) * (drawn.right - drawn.left)
    if RULE.LABEL_ROWS:
        if side == 0:
            write_rows(
                pairs, evidence, results, i, j, drawn, taken, moved, erased, erased_j, smoothing, GRID, RULE, MAPS
            )  # fmt: skip
        return
    label_i = tl.load(pairs.labels + i * pairs.labels_stride).to(tl.int64)
    label_j = tl.load(pairs.labels + j * pairs.labels_stride).to(tl.int64)
    same = label_i == label_j
    AWAY: tl.constexpr = CONST.value.AWAY
    column_i = tl.where((label_i >= 0) & (label_i < K), label_i, AWAY).to(tl.int32)
    column_j = tl.where((label_j >= 0) & (label_j < K) & ~same, label_j, AWAY).to(tl.int32)
    n = side
    last = tl.where(same, 2 - 2 * side, side + 1)
    raised = tl.zeros([], tl.float32)
    while n < last:
        own = n == 0
        share = tl.where(own, 1.0 - taken, taken)
        area = tl.where(own, AREA - moved, moved).to(tl.float32) * (1.0 / AREA)
        visible = None
        if RULE.ERASE_EVIDENCE:
            visible = visible_share(chosen(own, erased, erased_j), TOKENS, GRID)
            area = visible_area(share, visible)
        weight = pool(
            evidence, tl.where(own, i, j), tl.where(own, label_i, label_j), share, area, visible, TOKENS, GRID, MAPS
        )  # fmt: skip
        lam_weight = tl.where(own, drawn.lam, 65536 - drawn.lam).to(tl.float32) * CONST.value.UNIT
        weight = tl.where(is_by_lam(drawn, RULE), lam_weight, weight)
        if results.weights is not None:
            tl.store(results.weights + i * 2 + n, weight)
        raised += raise_label(weight, drawn.kind, smoothing, RULE)
        n += 1
    if results.targets is not None:
        # The side again, from where the loop stopped: a register less while it runs.
        side = tl.where(same, 2 - n, n - 1)
        rest = tl.div_rn(smoothing, tl.full([], K, tl.float32))
        mine, theirs = tl.where(side == 0, column_i, column_j), tl.where(side == 0, column_j, column_i)
        write_row(results.targets, i * K, side, mine, theirs, rest, clamp(rest + raised, RULE), K)
