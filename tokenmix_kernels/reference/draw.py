"""What each sample gets, in NumPy and Python integers: kind, lam, mask, rectangle. Beside `kernels/draw.py`.

Random numbers come from Philox4x32-10 with the seed as key and (sample, sample >> 32, draw, stream) as counter. Every
decision on them is made on integers, so that masks are equal bit for bit on every device.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import isqrt
from struct import Struct
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..settings import BATCH, COPY, MASK_RULES, MIXUP, MODES, PAIR, Plan, Settings, area_bits, make_plan
from ..tables import BETA_BITS, RATIO_BITS, beta_table, ratio_table

__all__ = ["Draw", "draw", "partner_of", "philox"]

HEADER, RECTANGLE, TRIES, KEYS = 0, 1, 2, 3  # streams of the random counters
LOW32 = 0xFFFFFFFF
AT_ONCE = 12  # tries that one sample draws at a time
HALF, LOW = np.uint64(32), np.uint64(LOW32)
FACTORS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
CPU = torch.device("cpu")
Integers = NDArray[np.int64]
Masks = NDArray[np.bool_]
Rectangle = tuple[int, int, int, int]
Words = Sequence[int]


class Draw(NamedTuple):
    """What was drawn for each sample, on the CPU.

    Attributes:
        kind: [B] of COPY, MIXUP and the kinds of mask rules.
        lam: [B] share kept from the own image in units of 2**-16 (Mixup and CutMix).
        mask: [B, Gh, Gw] bool, the tokens taken from the partner (more than half of a token, for CutMix).
        tokens: [B] how many these are, where whole tokens are taken.
        rectangle: [B] of (top, bottom, left, right) in pixels; (0, 0, 0, 0) for all but CutMix.
    """

    kind: list[int]
    lam: list[int]
    mask: Tensor
    tokens: list[int]
    rectangle: list[Rectangle]


def philox(seed: int, samples: Tensor, draws: Tensor, stream: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words, as int64 [*, 4], for each counter."""
    return torch.from_numpy(philox_words(seed, samples.numpy(), draws.numpy(), stream))


def philox_words(seed: int, samples: Integers, draws: Integers, stream: int) -> Integers:
    """`philox` of arrays: int64 [*, 4]."""
    state = np.empty((4, *np.broadcast_shapes(samples.shape, draws.shape)), np.uint64)
    # Words 0 and 2, which are multiplied, and words 1 and 3.
    even, odd = state[:2], state[2:]
    even[0], even[1], odd[0], odd[1] = samples & LOW32, draws, samples >> 32 & LOW32, stream
    keys, factors = (part.reshape(*part.shape, *[1] * (state.ndim - 1)) for part in (round_keys(seed), FACTORS))
    for key in keys:
        product = even * factors
        even = ((product >> HALF)[::-1] ^ odd) ^ key
        odd = (product & LOW)[::-1]
    out = np.empty((*state.shape[1:], 4), np.int64)
    out[..., 0], out[..., 2], out[..., 1], out[..., 3] = *even, *odd
    return out


@lru_cache(maxsize=4)
def lanes(count: int) -> tuple[int, int, int, Struct]:
    """`count` fields of 64 bits in one integer: all 1, all LOW32, 0, 1, 2, ...; and how to read them."""
    ones = sum(1 << 64 * lane for lane in range(count))
    return ones, ones * LOW32, sum(lane << 64 * lane for lane in range(count)), Struct(f"<{count}Q")


def philox_several(seed: int, sample: int, draw: int, stream: int, count: int) -> list[tuple[int, ...]]:
    """`philox` of `count` counters of one sample, from `draw` on, which stay below 2**32: `count` times four words.

    Each has a field of its own in long integers: a dozen for the price of two.
    """
    ones, low32, steps, fields = lanes(count)
    c0, c1, c2, c3 = (sample & LOW32) * ones, (sample >> 32 & LOW32) * ones, draw * ones + steps, stream * ones
    key0, key1, weyl0, weyl1 = (key * ones for key in (seed & LOW32, seed >> 32 & LOW32, 0x9E3779B9, 0xBB67AE85))
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # of 64 bits: no field reaches into the next
        c0, c1 = high >> 32 & low32 ^ c1 ^ key0, high & low32
        c2, c3 = low >> 32 & low32 ^ c3 ^ key1, low & low32
        key0, key1 = key0 + weyl0 & low32, key1 + weyl1 & low32
    return list(zip(*(fields.unpack(word.to_bytes(fields.size, "little")) for word in (c0, c1, c2, c3)), strict=True))


def philox_one(seed: int, sample: int, draw: int, stream: int) -> list[int]:
    """`philox` of one counter: four words."""
    c0, c1, c2, c3 = sample & LOW32, sample >> 32 & LOW32, draw, stream
    key0, key1 = seed & LOW32, seed >> 32 & LOW32
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = high >> 32 ^ c1 ^ key0, high & LOW32
        c2, c3 = low >> 32 ^ c3 ^ key1, low & LOW32
        key0, key1 = key0 + 0x9E3779B9 & LOW32, key1 + 0xBB67AE85 & LOW32
    return [c0, c1, c2, c3]


def first_words(seed: int, samples: list[int], stream: int) -> list[Words]:
    """The words of each sample's first draw, [U, 4]."""
    if len(samples) == 1:
        return [philox_one(seed, samples[0], 0, stream)]
    return [*philox_words(seed, np.array(samples), np.zeros(1, np.int64), stream).tolist()]


@lru_cache(maxsize=16)
def round_keys(seed: int) -> NDArray[np.uint64]:
    """The keys of the ten rounds, [10, 2]."""
    weyl = (0x9E3779B9, 0xBB67AE85)
    first = (seed & LOW32, seed >> 32 & LOW32)
    return np.array([[(f + n * w) & LOW32 for f, w in zip(first, weyl, strict=True)] for n in range(10)], np.uint64)


def counting(count: int) -> Tensor:
    """0 ... count - 1 as int64 on the CPU, whatever the default device is."""
    return torch.arange(count, dtype=torch.int64, device=CPU)


def partner_of(partner: Tensor | None, batch: int) -> Tensor:
    """The partner of each sample, [B] int64: the batch reversed unless given; out of range it is the sample itself."""
    if partner is None:
        return reversed_batch(batch)
    partner = partner.to(CPU, torch.int64)
    return torch.where((partner >= 0) & (partner < batch), partner, counting(batch))


@lru_cache(maxsize=64)
def reversed_batch(batch: int) -> Tensor:
    """batch - 1 ... 0, [B] int64 on the CPU, not to be changed."""
    return counting(batch).flip(0)


def beta(word: int, alpha: float) -> int:
    """lam ~ Beta(alpha, alpha) in units of 2**-16: the quantile table, read between two entries."""
    table = beta_table(alpha)
    entry, between = word >> (32 - BETA_BITS), word >> (18 - BETA_BITS) & 0x3FFF
    return table[entry] + ((table[entry + 1] - table[entry]) * between >> 14)


def header(words: Words, settings: Settings, plan: Plan, count: int) -> tuple[int, int, int]:
    """Whether and how a sample is mixed: (kind, lam in 2**-16, tokens to mask)."""
    mixes = words[0] >> 8 < plan.mixes
    switches = words[1] >> 8 < plan.switches
    if not mixes:
        return COPY, 65536, 0
    if not switches:
        return MIXUP, beta(words[2], settings.mixup_alpha), 0
    kind = MASK_RULES[settings.mask_type].kind
    if plan.lam >= 0:
        return kind, plan.lam, plan.tokens
    lam = beta(words[2], settings.cutmix_alpha)
    return kind, lam, min(count, ((65536 - lam) * count >> 16) + plan.minimum_tokens)


def block_mask(seed: int, samples: list[int], tokens: list[int], grid: tuple[int, int], cell: int) -> Masks:
    """Rectangles of random area and aspect ratio until `tokens` [U] are masked, [U, G] bool."""
    words: list[list[Words]] = [[]]  # a sample alone draws as it goes, which costs less than arrays do
    if len(samples) > 1:
        words = philox_words(seed, np.array(samples)[:, None], np.arange(32), TRIES).tolist()
    masks = [
        union_of_rectangles(dict(enumerate(first_words)), sample, seed, wanted, grid)
        for first_words, sample, wanted in zip(words, samples, tokens, strict=True)
    ]
    return unpack(masks, grid[0] * grid[1])


def union_of_rectangles(words: dict[int, Words], sample: int, seed: int, tokens: int, grid: tuple[int, int]) -> int:
    """The mask of one sample as an integer of G bits. `words` holds the Philox words of draws that are known already.

    Tries go in windows of four, all against the tokens that are still to be masked; the first that fits is taken.
    Ten in a row that do not fit end it.
    """
    grid_h, grid_w = grid
    bits = area_bits(grid_h * grid_w)
    ratios = ratio_table()
    half, shift = 1 << (13 + bits // 2), 14 + bits // 2
    smallest, unused = 1 << bits, 32 - bits
    mask = covered = failed = window = 0
    while covered < tokens and failed < 3:
        remaining = tokens - covered
        first, half_row = 4 * (window // 2), 2 * (window % 2)
        failed += 1
        for j in range(4 if failed < 3 else 2):
            if first + j not in words:
                words.update(enumerate(philox_several(seed, sample, first + j, TRIES, AT_ONCE), first + j))
            row = words[first + j]
            size_word, position_word = row[half_row], row[half_row + 1]
            area = smallest + (remaining - 1) * (size_word >> unused)
            factors = ratios[size_word & ((1 << RATIO_BITS) - 1)]
            side = isqrt(area)
            h = (side * (factors & 0xFFFF) + half) >> shift
            w = (side * (factors >> 16) + half) >> shift
            if h < grid_h and w < grid_w:
                top = position_word * (grid_h - h + 1) >> 32
                left = (position_word << 16 & LOW32) * (grid_w - w + 1) >> 32
                rectangle = row_pattern(h, w, grid_w) << (top * grid_w + left)
                new = (mask | rectangle).bit_count() - covered
                if 0 < new <= remaining:
                    mask, covered, failed = mask | rectangle, covered + new, 0
                    break
        window += 1
    return mask


@lru_cache(maxsize=4096)
def row_pattern(h: int, w: int, grid_w: int) -> int:
    """A rectangle of h x w tokens in the grid's first corner, as an integer of bits."""
    return ((1 << h * grid_w) - 1) // ((1 << grid_w) - 1) * ((1 << w) - 1)


def unpack(masks: list[int], count: int) -> Masks:
    """Integers of `count` bits as bool [len(masks), count]."""
    size = (count + 7) // 8
    octets = np.frombuffer(b"".join([mask.to_bytes(size, "little") for mask in masks]), np.uint8)
    return np.unpackbits(octets.reshape(len(masks), size), axis=1, count=count, bitorder="little").view(np.bool_)


def random_mask(seed: int, samples: list[int], tokens: list[int], grid: tuple[int, int], cell: int) -> Masks:
    """The `tokens` [U] tokens with the smallest keys, [U, G] bool.

    Keys are 32-bit random numbers whose low bits are the token's index, so no two are equal.
    """
    count = grid[0] * grid[1]
    words = philox_words(seed, np.array(samples)[:, None], np.arange((count + 3) // 4), KEYS).reshape(len(samples), -1)
    low = (1 << (count - 1).bit_length()) - 1
    keys = words[:, :count] & ~low | np.arange(count)
    return keys.argsort(1).argsort(1) < np.array(tokens)[:, None]


def grid_mask(seed: int, samples: list[int], tokens: list[int], grid: tuple[int, int], cell: int) -> Masks:
    """Random cells of cell x cell tokens, [U, G] bool: as many as the share of `tokens` [U] stands for.

    The cells at the lower and right edges are smaller where the cell does not divide the grid.
    """
    rows, columns = (-(-side // cell) for side in grid)
    count, cells = grid[0] * grid[1], rows * columns
    # Rounded down; not twice, since the tokens were rounded down before.
    wanted = [((number + 1) * cells - 1) // count if number else 0 for number in tokens]
    chosen = random_mask(seed, samples, wanted, (rows, columns), 1).reshape(-1, rows, columns)
    chosen = chosen.repeat(cell, 1).repeat(cell, 2)
    return chosen[:, : grid[0], : grid[1]].reshape(len(samples), count)


TOKEN_RULES: dict[str, Callable[[int, list[int], list[int], tuple[int, int], int], Masks]] = {
    name: globals()[f"{name}_mask"] for name, rule in MASK_RULES.items() if rule.whole_tokens and rule.drawn
}


def cutmix_rectangle(words: Words, lam: int, plan: Plan, minmax: bool, height: int, width: int) -> Rectangle:
    """(top, bottom, left, right) in pixels, as `timm.data.mixup.rand_bbox` and `rand_bbox_minmax` place it."""
    if minmax:
        cut_h = plan.low_h + (words[0] * plan.span_h >> 32)
        cut_w = plan.low_w + (words[1] * plan.span_w >> 32)
        top = words[2] * (height - cut_h + 1) >> 32
        left = words[3] * (width - cut_w + 1) >> 32
        return top, top + cut_h, left, left + cut_w
    cut_h = isqrt((65536 - lam) * height * height) >> 8
    cut_w = isqrt((65536 - lam) * width * width) >> 8
    center_y, center_x = words[0] * height >> 32, words[1] * width >> 32
    top, bottom = max(center_y - cut_h // 2, 0), min(center_y + (cut_h + 1) // 2, height)
    left, right = max(center_x - cut_w // 2, 0), min(center_x + (cut_w + 1) // 2, width)
    return top, bottom, left, right


@lru_cache(maxsize=256)
def coverage(rectangle: Rectangle, grid: tuple[int, int], patch: int) -> Tensor:
    """Pixels of each token inside a rectangle, [Gh, Gw] int64, not to be changed."""
    top, bottom, left, right = rectangle
    rows, columns = covered(top, bottom, grid[0], patch), covered(left, right, grid[1], patch)
    return torch.from_numpy(np.multiply.outer(rows, columns))


def covered(start: int, end: int, count: int, patch: int) -> list[int]:
    """How much of each of `count` pieces of length `patch` lies in start ... end - 1."""
    pieces = [0] * count
    if start < end:
        first, last = start // patch, (end - 1) // patch
        pieces[first : last + 1] = [patch] * (last + 1 - first)
        pieces[first] -= start - first * patch
        pieces[last] -= (last + 1) * patch - end
    return pieces


def draw(
    seed: int, sample_offset: int, partner: Tensor, mask: Tensor | None, height: int, width: int, settings: Settings
) -> Draw:
    """What each sample of the batch gets."""
    batch, patch, mode = partner.shape[0], settings.patch_size, MODES[settings.mode]
    grid = (height // patch, width // patch)
    rule = MASK_RULES[settings.mask_type]
    plan = make_plan(settings, height, width)
    # Samples that share a draw have one counter.
    order = [0] * batch if mode == BATCH else list(range(batch))
    places = order[:1] if mode == BATCH else order
    if mode == PAIR:
        firsts, unit_of = np.unique(np.minimum(order, partner.numpy()), return_inverse=True)
        order, places = unit_of.tolist(), firsts.tolist()
    units = [sample_offset + place for place in places]

    headers = first_words(seed, units, HEADER)
    kinds, lams, tokens = zip(*(header(words, settings, plan, grid[0] * grid[1]) for words in headers), strict=True)
    rectangles: list[Rectangle] = [(0, 0, 0, 0)] * len(units)
    masks, counts = np.zeros((len(units), *grid), np.bool_), [0] * len(units)
    if rule.kind in kinds and not rule.whole_tokens:
        words = first_words(seed, units, RECTANGLE)
        for u, kind in enumerate(kinds):
            if kind == rule.kind:
                rectangles[u] = cutmix_rectangle(words[u], lams[u], plan, bool(settings.minmax), height, width)
                masks[u] = coverage(rectangles[u], grid, patch).numpy() * 2 > patch * patch
    elif rule.kind in kinds and rule.drawn:
        masks = TOKEN_RULES[settings.mask_type](seed, units, list(tokens), grid, settings.grid_cell)
        counts = masks.sum(1).tolist()
    of_each, counts = [kinds[u] for u in order], [counts[u] for u in order]
    if rule.drawn:
        each = masks.reshape(-1, *grid)
        taken = torch.from_numpy(each.repeat(batch, 0) if mode == BATCH else each[order])
    else:
        assert mask is not None
        taken = mask.to(CPU) & torch.tensor([kind == rule.kind for kind in of_each], device=CPU)[:, None, None]
        counts = taken.sum((1, 2)).tolist()
    return Draw(
        kind=of_each,
        lam=[lams[u] for u in order],
        mask=taken,
        tokens=counts,
        rectangle=[rectangles[u] for u in order],
    )
