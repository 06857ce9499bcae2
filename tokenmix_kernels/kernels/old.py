"""The mix as Triton kernels: one launch draws the masks, mixes the pixels, pools the maps and writes the targets.

Steps stand in the order of `reference.py`, under the same names. A sample is served by some programs that move a
few token rows each, and by two that pool one side each and write the targets. Every program draws its sample's mask
anew, in registers: cheaper than passing it on.

The launchers are plain functions of tensors. They do not ask what device these are on, so the interpreter can run them.
"""

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .settings import BATCH, BLOCK, CUTMIX, GIVEN, MASK_TYPES, MIXUP, MODES, PAIR, RANDOM, Settings, plan
from .tables import BETA_BITS, RATIO_BITS, device_table

__all__ = ["arguments", "launch_shape", "mix", "mix_inplace", "mix_kernel", "pool_targets", "token_mask"]

# What a launch takes beside the kernel's arguments.
OPTIONS = ("num_warps", "enable_fp_fusion", "maxnreg")
# Global constants that kernels read.
K_HEADER = tl.constexpr(0)
K_RECTANGLE = tl.constexpr(1)
K_TRIES = tl.constexpr(2)
K_KEYS = tl.constexpr(3)
K_COPY = tl.constexpr(0)
K_MIXUP = tl.constexpr(MIXUP)
K_BLOCK = tl.constexpr(BLOCK)
K_RANDOM = tl.constexpr(RANDOM)
K_CUTMIX = tl.constexpr(CUTMIX)
K_GIVEN = tl.constexpr(GIVEN)
K_BATCH = tl.constexpr(BATCH)
K_PAIR = tl.constexpr(PAIR)
K_RATIO_MASK = tl.constexpr((1 << RATIO_BITS) - 1)
K_BETA_BITS = tl.constexpr(BETA_BITS)
SHIFTED = tl.constexpr(1 << 16)
K_SAMPLES = tl.constexpr(64.0)
K_NONE = tl.constexpr(0x7FFF0000)
K_UNFIT = tl.constexpr(0x7FFFFFFF)
K_AWAY = tl.constexpr(-64)


@triton.constexpr_function
def power_of_2(exponent):
    return 1 << exponent


@triton.constexpr_function
def bit_length(number):
    return number.bit_length()


@triton.jit
def philox(seed_low, seed_high, sample, draws, STREAM: tl.constexpr):
    """Philox4x32-10: four uint32 words for each of the int32 `draws` of an int64 sample."""
    c2 = draws.to(tl.uint32, bitcast=True)
    c0 = (c2 * 0) + (sample & 0xFFFFFFFF).to(tl.uint32)
    c1 = (c2 * 0) + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (c2 * 0) + STREAM
    return tl.philox_impl(c0, c1, c2, c3, seed_low, seed_high)


@triton.jit
def read_seed(seed, seed_high):
    """The two 32-bit halves of the key, from two integers or from a pointer to one int64."""
    if seed_high is None:
        both = tl.load(seed)
        low = (both & 0xFFFFFFFF).to(tl.uint32)
        high = ((both >> 32) & 0xFFFFFFFF).to(tl.uint32)
    else:
        low = seed.to(tl.uint32, bitcast=True)
        high = seed_high.to(tl.uint32, bitcast=True)
    return low, high


@triton.jit
def partner_of(partner, i, batch):
    """The partner of sample i: the batch reversed unless given; an index out of range is the sample itself."""
    if partner is None:
        j = batch - 1 - i
    else:
        j = tl.load(partner + i).to(tl.int64)
        j = tl.where((j >= 0) & (j < batch), j, i)
    return j


@triton.jit
def beta(word, table):
    """lam ~ Beta(alpha, alpha) in units of 2**-16: the quantile table, read between two entries."""
    entry = (word >> (32 - K_BETA_BITS)).to(tl.int32)
    between = ((word >> (18 - K_BETA_BITS)) & 0x3FFF).to(tl.int32)
    low = tl.load(table + entry)
    return low + (((tl.load(table + entry + 1) - low) * between) >> 14)


@triton.jit
def header(
    seed_low, seed_high, sample, mixes, switches, lam_constant, tokens_constant, minimum_tokens, mix_table, cut_table,
    COUNT: tl.constexpr, MASK_TYPE: tl.constexpr, HAS_HEADER: tl.constexpr,
):  # fmt: skip
    """Whether and how a sample is mixed: (kind, lam in 2**-16, tokens to mask)."""
    if HAS_HEADER:
        w0, w1, w2, _ = philox(seed_low, seed_high, sample, tl.zeros([], tl.int32), K_HEADER)
        kind = tl.where((w1 >> 8).to(tl.int32) < switches, MASK_TYPE, K_MIXUP)
        kind = tl.where((w0 >> 8).to(tl.int32) < mixes, kind, K_COPY)
        lam = lam_constant
        if cut_table is not None:
            lam = beta(w2, cut_table)
        if mix_table is not None:
            lam = tl.where(kind == K_MIXUP, beta(w2, mix_table), lam)
        lam = tl.where(kind == K_COPY, 65536, lam)
    else:
        kind = tl.zeros([], tl.int32) + MASK_TYPE
        lam = lam_constant
    if cut_table is not None:
        tokens = tl.minimum(COUNT, (((65536 - lam).to(tl.int64) * COUNT) >> 16).to(tl.int32) + minimum_tokens)
    else:
        tokens = tokens_constant
    return kind, lam, tokens


@triton.jit
def popcount(bits):
    """Bits set in each word; the compiler knows the idiom."""
    if bits.dtype == tl.uint64:
        bits = bits - ((bits >> 1) & 0x5555555555555555)
        bits = (bits & 0x3333333333333333) + ((bits >> 2) & 0x3333333333333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F0F0F0F0F
        return ((bits * 0x0101010101010101) >> 56).to(tl.int32)
    else:
        bits = bits - ((bits >> 1) & 0x55555555)
        bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
        bits = (bits + (bits >> 4)) & 0x0F0F0F0F
        return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def try_four(
    area, factors, place, free, remaining, left, first_row, j,
    GH: tl.constexpr, GW: tl.constexpr, AREA_BITS: tl.constexpr, WORD_ROWS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """One window of four tries: what is free now [4, WORDS], tokens that remain, tries left in a row (times 2**16)."""
    HALF: tl.constexpr = power_of_2(13 + AREA_BITS // 2)
    SHIFT: tl.constexpr = 14 + AREA_BITS // 2
    area = power_of_2(AREA_BITS) + (remaining - 1) * area
    side = tl.sqrt_rn(area.to(tl.float32)).to(tl.int32)
    h = (side * (factors & 0xFFFF) + HALF) >> SHIFT
    w = (side * (factors >> 16) + HALF) >> SHIFT
    tops, lefts = GH + 1 - h, GW + 1 - w
    top = tl.umulhi(place, tops.to(tl.uint32, bitcast=True)).to(tl.int32)
    column = tl.umulhi(place << 16, lefts.to(tl.uint32, bitcast=True)).to(tl.int32)
    columns = ((((free ^ free) + 1) << w.to(WORD)) - 1) << column.to(WORD)
    bits = free ^ free
    for r in tl.static_range(WORD_ROWS):
        inside = (first_row + (r - top)).to(tl.uint32, bitcast=True) < h.to(tl.uint32)
        bits = bits | tl.where(inside, columns << (r * GW), 0)
    bits = bits & free
    new = popcount(bits)
    # All four counts side by side in one word, where even a rectangle that does not fit counts less than 256: one
    # reduction of the whole warp.
    PACKED: tl.constexpr = GH * GW <= 232
    new = (tl.sum(tl.ravel(new << (8 * j)), 0) >> (8 * j)) & 255 if PACKED else tl.sum(new, 1)[:, None]  # [4, 1]
    # 0 < new <= remaining, in one comparison without sign; nothing fits where nothing remains.
    fits = (tl.minimum(tops, lefts) > 1) & (
        (new - 1).to(tl.uint32, bitcast=True) < remaining.to(tl.uint32, bitcast=True)
    )
    keys = tl.where(fits, j * SHIFTED + new, K_UNFIT)
    key = tl.min(tl.ravel(keys), 0)
    taken = key < left
    key = tl.where(taken, key, K_NONE)
    free = free ^ tl.reduce_or(tl.where(keys == key, bits, 0), 0)[None, :]
    remaining -= key & 0xFFFF
    left = tl.where(taken, 10 * SHIFTED, left - 4 * SHIFTED)
    return free, remaining, left


@triton.jit
def block_mask(
    seed_low, seed_high, sample, tokens, ratio_table,
    GH: tl.constexpr, GW: tl.constexpr, AREA_BITS: tl.constexpr, WORD_ROWS: tl.constexpr, WORDS: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """Rectangles of random area and aspect ratio until `tokens` are masked: (words [4, WORDS], tokens masked).

    A word holds WORD_ROWS grid rows, bit r * GW + c of its rows. Four tries are looked at side by side (first axis),
    all against the tokens that are still to be masked; the first that fits is taken. Ten in a row that do not fit end
    it. One Philox call serves 2 * WORDS windows of four tries.
    """
    j = tl.arange(0, 4)[:, None]
    word = tl.arange(0, WORDS)[None, :]
    first_row = word * WORD_ROWS + j * 0  # [4, WORDS]
    every = (word + j).to(WORD) * 0 - 1
    free = every
    remaining = tokens
    left = tl.full([], 10 * SHIFTED, tl.int32)
    draws = word * 4 + j
    while (remaining > 0) & (left > 0):
        size_a, place_a, size_b, place_b = philox(seed_low, seed_high, sample, draws, K_TRIES)
        factors_a = tl.load(ratio_table + (size_a & K_RATIO_MASK).to(tl.int32))
        factors_b = tl.load(ratio_table + (size_b & K_RATIO_MASK).to(tl.int32))
        area_a = (size_a >> (32 - AREA_BITS)).to(tl.int32)
        area_b = (size_b >> (32 - AREA_BITS)).to(tl.int32)
        step = 0
        while (step < WORDS) & (remaining > 0) & (left > 0):
            lane = step + word * 0 + j * 0
            free, remaining, left = try_four(
                tl.gather(area_a, lane, 1), tl.gather(factors_a, lane, 1), tl.gather(place_a, lane, 1),
                free, remaining, left, first_row, j, GH, GW, AREA_BITS, WORD_ROWS, WORD,
            )  # fmt: skip
            free, remaining, left = try_four(
                tl.gather(area_b, lane, 1), tl.gather(factors_b, lane, 1), tl.gather(place_b, lane, 1),
                free, remaining, left, first_row, j, GH, GW, AREA_BITS, WORD_ROWS, WORD,
            )  # fmt: skip
            step += 1
        draws += 4 * WORDS
    return free ^ every, tokens - remaining


@triton.jit
def pack(chosen, bit, WORD: tl.constexpr, WORDS: tl.constexpr):
    """Chosen tokens [WORDS, BITS] as words [4, WORDS], and their number."""
    words = tl.sum(chosen.to(WORD) << bit.to(WORD), 1)  # [WORDS]
    return words[None, :] + tl.zeros([4, WORDS], WORD), tl.sum(tl.sum(chosen.to(tl.int32), 1), 0)


@triton.jit
def random_mask(
    seed_low, seed_high, sample, tokens,
    COUNT: tl.constexpr, KEY_BITS: tl.constexpr, WORD_TOKENS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """The `tokens` tokens with the smallest keys: (words [4, WORDS], tokens masked).

    Keys are 32-bit random numbers whose low bits are the token's index, so no two are equal. The largest key that is
    taken is found bit by bit.
    """
    bit = tl.arange(0, BITS)[None, :]
    token = tl.arange(0, WORDS)[:, None] * WORD_TOKENS + bit  # [WORDS, BITS]
    real = (bit < WORD_TOKENS) & (token < COUNT)
    w0, w1, w2, w3 = philox(seed_low, seed_high, sample, token >> 2, K_KEYS)
    word = token & 3
    key = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    key = ((key >> KEY_BITS) << KEY_BITS) | token.to(tl.uint32)
    bound = tl.zeros([], tl.uint32)
    probe = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        higher = bound | probe
        below = tl.sum(tl.sum((real & (key < higher)).to(tl.int32), 1), 0)
        bound = tl.where(below < tokens, higher, bound)
        probe = probe >> 1
    return pack(real & (key <= bound) & (tokens > 0), bit, WORD, WORDS)


@triton.jit
def given_mask(
    mask,
    COUNT: tl.constexpr, WORD_TOKENS: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """A mask from memory: (words [4, WORDS], tokens masked)."""
    bit = tl.arange(0, BITS)[None, :]
    token = tl.arange(0, WORDS)[:, None] * WORD_TOKENS + bit
    real = (bit < WORD_TOKENS) & (token < COUNT)
    return pack(tl.load(mask + token, real, 0) != 0, bit, WORD, WORDS)


@triton.jit
def cut_length(lam, SIZE: tl.constexpr):
    """The integer part of SIZE * sqrt(1 - lam), exactly: a float guess, mended by whole numbers."""
    wanted = (65536 - lam).to(tl.int64) * (SIZE * SIZE)
    guess = (tl.sqrt_rn((65536 - lam).to(tl.float32)) * (SIZE / 256.0)).to(tl.int64)
    guess += ((guess + 1) * (guess + 1) * 65536 <= wanted).to(tl.int64)
    guess -= (guess * guess * 65536 > wanted).to(tl.int64)
    return guess.to(tl.int32)


@triton.jit
def cutmix_rectangle(
    seed_low, seed_high, sample, lam, cut_low_h, cut_span_h, cut_low_w, cut_span_w,
    H: tl.constexpr, W: tl.constexpr, HAS_MINMAX: tl.constexpr,
):  # fmt: skip
    """(top, bottom, left, right) in pixels, as timm's rand_bbox and rand_bbox_minmax place it."""
    w0, w1, w2, w3 = philox(seed_low, seed_high, sample, tl.zeros([], tl.int32), K_RECTANGLE)
    if HAS_MINMAX:
        cut_h = cut_low_h + tl.umulhi(w0, cut_span_h.to(tl.uint32)).to(tl.int32)
        cut_w = cut_low_w + tl.umulhi(w1, cut_span_w.to(tl.uint32)).to(tl.int32)
        top = tl.umulhi(w2, (H + 1 - cut_h).to(tl.uint32)).to(tl.int32)
        left = tl.umulhi(w3, (W + 1 - cut_w).to(tl.uint32)).to(tl.int32)
        bottom, right = top + cut_h, left + cut_w
    else:
        cut_h, cut_w = cut_length(lam, H), cut_length(lam, W)
        center_y = tl.umulhi(w0, tl.full([], H, tl.uint32)).to(tl.int32)
        center_x = tl.umulhi(w1, tl.full([], W, tl.uint32)).to(tl.int32)
        top, bottom = tl.maximum(center_y - cut_h // 2, 0), tl.minimum(center_y + (cut_h + 1) // 2, H)
        left, right = tl.maximum(center_x - cut_w // 2, 0), tl.minimum(center_x + (cut_w + 1) // 2, W)
    return top, bottom, left, right


@triton.jit
def draw(
    seed, seed_high, sample_offset, i, j, mask, mixes, switches, lam_constant, tokens_constant, minimum_tokens,
    cut_low_h, cut_span_h, cut_low_w, cut_span_w, ratio_table, mix_table, cut_table,
    H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, MODE: tl.constexpr, MASK_TYPE: tl.constexpr,
    HAS_HEADER: tl.constexpr, HAS_MINMAX: tl.constexpr, AREA_BITS: tl.constexpr, WORD_ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """What sample i gets: kind, lam, mask words [4, WORDS], tokens masked, and a rectangle."""
    GH: tl.constexpr = H // P
    GW: tl.constexpr = W // P
    COUNT: tl.constexpr = GH * GW
    WORD: tl.constexpr = tl.uint32 if GW <= 32 else tl.uint64
    seed_low, seed_high = read_seed(seed, seed_high)
    sample = sample_offset.to(tl.int64)
    if MODE == K_PAIR:
        sample += tl.minimum(i, j)
    elif MODE != K_BATCH:
        sample += i
    kind, lam, tokens = header(
        seed_low, seed_high, sample, mixes, switches, lam_constant, tokens_constant, minimum_tokens, mix_table,
        cut_table, COUNT, MASK_TYPE, HAS_HEADER,
    )  # fmt: skip
    tokens = tl.where(kind == MASK_TYPE, tokens, 0)
    top = tl.zeros([], tl.int32)
    bottom, left, right, covered = top, top, top, top
    words = tl.zeros([4, WORDS], WORD)
    if MASK_TYPE == K_BLOCK:
        words, covered = block_mask(
            seed_low, seed_high, sample, tokens, ratio_table, GH, GW, AREA_BITS, WORD_ROWS, WORDS, WORD
        )
    elif MASK_TYPE == K_CUTMIX:
        if kind == K_CUTMIX:
            top, bottom, left, right = cutmix_rectangle(
                seed_low, seed_high, sample, lam, cut_low_h, cut_span_h, cut_low_w, cut_span_w, H, W, HAS_MINMAX
            )
    else:
        WORD_TOKENS: tl.constexpr = WORD_ROWS * GW
        BITS: tl.constexpr = triton.next_power_of_2(WORD_TOKENS)
        if kind == MASK_TYPE:
            if MASK_TYPE == K_RANDOM:
                KEY_BITS: tl.constexpr = bit_length(COUNT - 1)
                words, covered = random_mask(
                    seed_low, seed_high, sample, tokens, COUNT, KEY_BITS, WORD_TOKENS, WORDS, BITS, WORD
                )
            else:
                words, covered = given_mask(mask + i * COUNT, COUNT, WORD_TOKENS, WORDS, BITS, WORD)
    return kind, lam, words, covered, top, bottom, left, right


@triton.jit
def row_bits(words, row, WORD_ROWS: tl.constexpr, GW: tl.constexpr, WORDS: tl.constexpr):
    """The tokens of one grid row, as bits of a scalar word."""
    word = tl.arange(0, WORDS)[None, :]
    row = row.to(tl.uint32)
    mine = tl.where(word == (row // WORD_ROWS).to(tl.int32), words, 0)
    return tl.reduce_or(tl.ravel(mine), 0) >> ((row % WORD_ROWS) * GW).to(words.dtype)


@triton.jit
def channel_of(values, column, plane, C: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr):
    """The entry of `values` [C] for a plane, or for each of the columns [COLS] where channels lie side by side.

    There, each VEC neighbours have the channels in the same order, but for where it starts: few values are picked in
    registers. A load by channel would have to pass through shared memory to lie as the pixels do.
    """
    if not NHWC:
        picked = tl.load(values + plane)
    elif C > 4:
        picked = tl.load(values + column % C)
    else:
        near = column % VEC
        first = (column - near) % C
        picked = tl.load(values)
        for place in tl.static_range(C):
            turned = tl.load(values + place)
            for start in tl.static_range(1, C):
                turned = tl.where(first == start, tl.load(values + (start + place) % C), turned)
            picked = tl.where(near % C == place, turned, picked)
    return picked


@triton.jit
def blend(own, other, lam):
    """lam * own + (1 - lam) * other in fp32, each step rounded once; raw bytes are blended in integers, exactly."""
    if own.dtype == tl.uint8:
        mixed = (lam * own.to(tl.int32) + (65536 - lam) * other.to(tl.int32)).to(tl.float32) * 0.0000152587890625
    else:
        share = lam.to(tl.float32) * 0.0000152587890625
        mixed = share * own.to(tl.float32) + (1 - share) * other.to(tl.float32)
    return mixed


@triton.jit
def finish(
    pixels, mean, rstd, column, plane,
    C: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Normalise (where mean is given) and round to the dtype that is stored."""
    if mean is not None:
        offset, scale = channel_of(mean, column, plane, C, NHWC, VEC), channel_of(rstd, column, plane, C, NHWC, VEC)
        pixels = (pixels.to(tl.float32) - offset) * scale
    elif tl.uint8 == DTYPE and pixels.dtype != tl.uint8:
        pixels = tl.floor(pixels + 0.5)
    return pixels.to(DTYPE)


@triton.jit
def token_bit(bits, column, SPAN: tl.constexpr):
    """Whether each of a row's columns belongs to a masked token of SPAN columns."""
    return ((bits >> (column // SPAN).to(bits.dtype)) & 1) != 0


@triton.jit
def take_tokens(
    images, out, i, j, row, bits, images_stride, out_stride, mean, rstd,
    C: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SC: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    OC: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, COLS: tl.constexpr,
    LINES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """One row of tokens of out[i], each from images[i] or images[j].

    A tile is LINES lines of pixels by COLS neighbours in memory. The source of each VEC neighbours is found once for
    all channels and lines, so that what is left is one load and one store. Where nothing is converted, PACK values
    move as one 64-bit word.
    """
    SPAN: tl.constexpr = (P * C if NHWC else P) // PACK
    WIDTH: tl.constexpr = (W * C if NHWC else W) // PACK
    PLANES: tl.constexpr = 1 if NHWC else C
    STEP: tl.constexpr = 1 if NHWC else SW
    OUT_STEP: tl.constexpr = 1 if NHWC else OW
    BLOCK: tl.constexpr = COLS // PACK
    NEAR: tl.constexpr = VEC // PACK
    SIZE: tl.constexpr = images.dtype.element_ty.primitive_bitwidth // 8
    WORD: tl.constexpr = tl.int64 if PACK > 1 else images.dtype.element_ty
    OUT_WORD: tl.constexpr = tl.int64 if PACK > 1 else out.dtype.element_ty
    # Where a token lies is found in bytes: one selection, one addition.
    own_row = (images + (i * images_stride + row.to(tl.int64) * (P * SH))).to(tl.pointer_type(tl.int8), bitcast=True)
    apart = (j - i) * (images_stride.to(tl.int64) * SIZE)
    out_row = (out + (i * out_stride + row.to(tl.int64) * (P * OH))).to(tl.pointer_type(OUT_WORD), bitcast=True)
    for first in range(0, P, LINES):
        line = (first + tl.arange(0, LINES)).to(tl.int64)[:, None]
        for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
            column = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)  # [BLOCK]
            # Lanes beyond the edge read the last neighbours again: cheaper than a predicate, which needs zeros too.
            within = column % NEAR + tl.minimum(column - column % NEAR, WIDTH - NEAR)
            source = own_row + tl.where(token_bit(bits, column, SPAN), apart, 0)
            source = source.to(tl.pointer_type(WORD), bitcast=True)[None, :]
            within = tl.max_contiguous(tl.multiple_of(within * STEP, NEAR), NEAR)[None, :]
            valid = ((column < WIDTH) if WIDTH % BLOCK != 0 else (column >= 0))[None, :] & (line < P)
            for plane in tl.static_range(PLANES):
                at = within + (tl.minimum(line, P - 1) * (SH // PACK) + plane * (SC // PACK))
                at = tl.max_contiguous(tl.multiple_of(source + at, (1, NEAR * SIZE * PACK)), (1, NEAR))
                taken = finish(tl.load(at), mean, rstd, column, plane, C, NHWC, VEC, OUT_WORD)
                place = column[None, :] * OUT_STEP + (line * (OH // PACK) + plane * (OC // PACK))
                tl.store(out_row + place, taken, valid)


@triton.jit
def swap_tokens(
    images, i, j, row, bits, bits_j, images_stride,
    C: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SC: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    NHWC: tl.constexpr, VEC: tl.constexpr, COLS: tl.constexpr, LINES: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """One row of tokens of a pair in place: `bits` go from images[j] to images[i], `bits_j` the other way."""
    if PACK > 1:
        images = images.to(tl.pointer_type(tl.int64), bitcast=True)
    SPAN: tl.constexpr = (P * C if NHWC else P) // PACK
    WIDTH: tl.constexpr = (W * C if NHWC else W) // PACK
    PLANES: tl.constexpr = 1 if NHWC else C
    STEP: tl.constexpr = 1 if NHWC else SW
    LINE: tl.constexpr = SH // PACK
    BLOCK: tl.constexpr = COLS // PACK
    NEAR: tl.constexpr = VEC // PACK
    images_stride = images_stride.to(tl.int64) // PACK
    own_row = i * images_stride + row.to(tl.int64) * (P * LINE)
    other_row = j * images_stride + row.to(tl.int64) * (P * LINE)
    for first in range(0, P, LINES):
        line = first + tl.arange(0, LINES)[:, None]
        for block in tl.static_range((WIDTH + BLOCK - 1) // BLOCK):
            column = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
            own_at = tl.max_contiguous(tl.multiple_of(own_row + column * STEP, NEAR), NEAR)
            other_at = tl.max_contiguous(tl.multiple_of(other_row + column * STEP, NEAR), NEAR)
            valid = ((column < WIDTH) if WIDTH % BLOCK != 0 else (column >= 0))[None, :] & (line < P)
            to_own = valid & token_bit(bits, column, SPAN)[None, :]
            to_other = valid & token_bit(bits_j, column, SPAN)[None, :]
            for plane in tl.static_range(PLANES):
                at = plane * (SC // PACK) + line * LINE
                own = tl.load(images + own_at[None, :] + at, to_other)
                other = tl.load(images + other_at[None, :] + at, to_own)
                tl.store(images + own_at[None, :] + at, other, to_own)
                tl.store(images + other_at[None, :] + at, own, to_other)


@triton.jit
def source_pixels(
    kind, bits, column, y, top, bottom, left, right,
    SPAN: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr, MASK_TYPE: tl.constexpr,
):  # fmt: skip
    """What a tile takes from the partner [LINES, COLS]: which pixels, and which VEC neighbours in part and in whole."""
    if MASK_TYPE == K_CUTMIX:
        rows = (y >= top) & (y < bottom)
        chunk = (column // VEC) * VEC
        first, last = chunk // CHANNELS, (chunk + VEC - 1) // CHANNELS
        x = column // CHANNELS
        exact = rows & ((x >= left) & (x < right))[None, :]
        some = rows & ((last >= left) & (first < right))[None, :]
        whole = rows & ((first >= left) & (last < right))[None, :]
    else:
        exact = (y >= 0) & token_bit(bits, column, SPAN)[None, :]
        some, whole = exact, exact
    return exact, some | (kind == K_MIXUP), whole & (kind != K_MIXUP)


@triton.jit
def blend_pixels(
    images, out, i, j, row, kind, lam, bits, top, bottom, left, right, kind_j, lam_j, bits_j, top_j, bottom_j, left_j,
    right_j, images_stride, out_stride, mean, rstd,
    C: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SC: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    OC: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr, COLS: tl.constexpr,
    LINES: tl.constexpr, MASK_TYPE: tl.constexpr, HAS_MIXUP: tl.constexpr, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """One row of tokens where a pixel may need both images (Mixup, rectangles); in place a pair's both halves (_j)."""
    SPAN: tl.constexpr = P * C if NHWC else P
    CHANNELS: tl.constexpr = C if NHWC else 1
    WIDTH: tl.constexpr = W * C if NHWC else W
    PLANES: tl.constexpr = 1 if NHWC else C
    STEP: tl.constexpr = 1 if NHWC else SW
    OUT_STEP: tl.constexpr = 1 if NHWC else OW
    own_row = i * images_stride + row.to(tl.int64) * (P * SH)
    other_row = j * images_stride + row.to(tl.int64) * (P * SH)
    out_row = i * out_stride + row.to(tl.int64) * (P * OH)
    for first in range(0, P, LINES):
        line = first + tl.arange(0, LINES)[:, None]
        y = row * P + line
        for block in tl.static_range((WIDTH + COLS - 1) // COLS):
            column = block * COLS + tl.arange(0, COLS)  # [COLS]
            own_at = tl.max_contiguous(tl.multiple_of(own_row + column * STEP, VEC), VEC)
            other_at = tl.max_contiguous(tl.multiple_of(other_row + column * STEP, VEC), VEC)
            place = tl.max_contiguous(tl.multiple_of(out_row + column * OUT_STEP, VEC), VEC)
            valid = ((column < WIDTH) if WIDTH % COLS != 0 else (column >= 0))[None, :] & (line < P)
            exact, some, whole = source_pixels(
                kind, bits, column, y, top, bottom, left, right, SPAN, CHANNELS, VEC, MASK_TYPE
            )  # fmt: skip
            to_own, keeps_own = valid & some, valid & ~whole
            if IN_PLACE:
                exact_j, some_j, whole_j = source_pixels(
                    kind_j, bits_j, column, y, top_j, bottom_j, left_j, right_j, SPAN, CHANNELS, VEC, MASK_TYPE
                )  # fmt: skip
                to_other, keeps_other = valid & some_j, valid & ~whole_j
            for plane in tl.static_range(PLANES):
                at = plane * SC + line * SH
                own_place, other_place = images + own_at[None, :] + at, images + other_at[None, :] + at
                if IN_PLACE:
                    own = tl.load(own_place, (to_own & keeps_own) | to_other, 0)
                    other = tl.load(other_place, (to_other & keeps_other) | to_own, 0)
                    value, value_j = tl.where(exact, other, own), tl.where(exact_j, own, other)
                    if HAS_MIXUP:
                        blended = finish(blend(own, other, lam), None, None, column, plane, C, NHWC, VEC, own.dtype)
                        blended_j = finish(blend(other, own, lam_j), None, None, column, plane, C, NHWC, VEC, own.dtype)
                        value = tl.where(kind == K_MIXUP, blended, value)
                        value_j = tl.where(kind_j == K_MIXUP, blended_j, value_j)
                    tl.store(own_place, value, to_own)
                    tl.store(other_place, value_j, to_other)
                else:
                    own = tl.load(own_place, keeps_own, 0)
                    other = tl.load(other_place, to_own, 0)
                    value = finish(
                        tl.where(exact, other, own), mean, rstd, column, plane, C, NHWC, VEC, out.dtype.element_ty
                    )
                    if HAS_MIXUP:
                        blended = finish(
                            blend(own, other, lam), mean, rstd, column, plane, C, NHWC, VEC, out.dtype.element_ty
                        )
                        value = tl.where(kind == K_MIXUP, blended, value)
                    tl.store(out + place[None, :] + (plane * OC + line * OH), value, valid)


@triton.jit
def taken_share(
    words, top, bottom, left, right,
    GH: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, WORD_ROWS: tl.constexpr, WORDS: tl.constexpr,
    TOKENS: tl.constexpr, MASK_TYPE: tl.constexpr,
):  # fmt: skip
    """The share of each token that comes from the partner, [TOKENS] fp32; beyond the grid it means nothing."""
    token = tl.arange(0, TOKENS)
    if MASK_TYPE == K_CUTMIX:
        y, x = (token // GW) * P, (token % GW) * P
        rows = tl.maximum(tl.minimum(y + P, bottom) - tl.maximum(y, top), 0)
        columns = tl.maximum(tl.minimum(x + P, right) - tl.maximum(x, left), 0)
        share = (rows * columns).to(tl.float32) * (1.0 / (P * P))
    else:
        line = tl.max(words, 0)  # [WORDS], the same in all four rows
        mine = tl.gather(line, tl.minimum(token // (WORD_ROWS * GW), WORDS - 1), 0)
        share = ((mine >> (token % (WORD_ROWS * GW)).to(words.dtype)) & 1).to(tl.float32)
    return share


@triton.jit
def own_map(
    maps, indices, ids, n, label, maps_stride, indices_stride, map_rows, top_k,
    CLASSES: tl.constexpr, CELLS: tl.constexpr, SIZE: tl.constexpr, MAP_VEC: tl.constexpr,
):  # fmt: skip
    """The activation map of an image's own label, flat [CELLS] fp32; zeros where the label or the id is absent.

    CLASSES is 0 for maps of the own label; with `indices` it is the k of the top-k. Of equal indices the last counts.
    """
    cell = tl.arange(0, CELLS)
    real = cell < SIZE
    if ids is not None:
        n = tl.load(ids + n).to(tl.int64)
        listed = (n >= 0) & (n < map_rows)
        n = tl.where(listed, n, 0)
        real = real & listed
    first = tl.multiple_of(n * maps_stride, MAP_VEC)
    if CLASSES > 0 and indices is None:
        known = (label >= 0) & (label < CLASSES)
        first += tl.where(known, label, 0) * SIZE
        real = real & known
    at = cell
    if indices is not None:
        # Class numbers first, then one value of each cell: not all values of all classes.
        first_index = tl.multiple_of(n * indices_stride, MAP_VEC)
        at = cell * 0 - 1
        k = tl.zeros([], tl.int32)
        while k < top_k:
            index = tl.load(indices + first_index + k * SIZE + cell, real, 0).to(tl.int64)
            at = tl.where(index == label, k * SIZE + cell, at)
            k += 1
        real = real & (at >= 0)
    values = tl.load(maps + first + at, real, 0)
    return values.to(tl.float32)


@triton.jit
def corners(boxes, n, boxes_stride, BOX_STEP: tl.constexpr, BOX_FORMAT: tl.constexpr):
    """(x0, y0, x1, y1) of a box. BOX_FORMAT: 0 xyxy, 1 (top, left, height, width), 2 the latter with axes swapped."""
    at = boxes + n * boxes_stride
    a, b = tl.load(at), tl.load(at + BOX_STEP)
    c, d = tl.load(at + 2 * BOX_STEP), tl.load(at + 3 * BOX_STEP)
    if BOX_FORMAT == 0:
        x0, y0, x1, y1 = a, b, c, d
    elif BOX_FORMAT == 1:
        x0, y0, x1, y1 = b, a, b + d, a + c
    else:
        x0, y0, x1, y1 = a, b, a + c, b + d
    return x0, y0, x1, y1


@triton.jit
def resample(
    flat, low, high, outer, cell,
    OUTER_STEP: tl.constexpr, STEP: tl.constexpr, SIZE: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """A map's axis averaged over the grid's cells by the rule of `roi_align`: one value for each of (outer, cell).

    torchvision's rule with aligned=False and an adaptive sampling ratio: box * size - 0.5, at least one map cell long,
    ceil(extent / grid) samples in each cell. Values lie at outer * OUTER_STEP + position * STEP of `flat`.
    """
    extent = tl.maximum((high - low) * SIZE, 1.0)
    first = low * SIZE - 0.5
    length = tl.div_rn(extent, tl.full([], GRID, tl.float32))
    samples = tl.minimum(tl.ceil(length), K_SAMPLES)
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
    flat, affine, token,
    GH: tl.constexpr, GW: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr,
):  # fmt: skip
    """A map averaged over the tokens of a grid that an affine takes into it, by the rule of `resample`: [TOKENS].

    affine points to (a, b, c, d, e, f): output (u, v) in [0, 1]^2 shows (a u + b v + c, d u + e v + f) of the map.
    """
    a, b, c = tl.load(affine), tl.load(affine + 1), tl.load(affine + 2)
    d, e, f = tl.load(affine + 3), tl.load(affine + 4), tl.load(affine + 5)
    width, height = tl.full([], GW, tl.float32), tl.full([], GH, tl.float32)
    across = tl.div_rn(tl.maximum(tl.maximum(tl.abs(a) * MW, tl.abs(d) * MH), 1.0), width)
    down = tl.div_rn(tl.maximum(tl.maximum(tl.abs(b) * MW, tl.abs(e) * MH), 1.0), height)
    across, down = tl.minimum(tl.ceil(across), K_SAMPLES), tl.minimum(tl.ceil(down), K_SAMPLES)
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
def pool_box(
    flat, boxes, flips, n, column, line, boxes_stride,
    GH: tl.constexpr, GW: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, BOX_STEP: tl.constexpr,
    BOX_FORMAT: tl.constexpr,
):  # fmt: skip
    """A map averaged over the tokens (line, column) of the grid that lies on its box, mirrored where it is flipped."""
    STRIPES: tl.constexpr = triton.next_power_of_2(MH * GW)
    if boxes is None:
        x0 = tl.zeros([], tl.float32)
        y0, x1 = x0, x0 + 1.0
        y1 = x1
    else:
        x0, y0, x1, y1 = corners(boxes, n, boxes_stride, BOX_STEP, BOX_FORMAT)
    if flips is not None:
        column = tl.where(tl.load(flips + n) != 0, GW - 1 - column, column)
    stripe = tl.arange(0, STRIPES)
    row = tl.minimum(stripe // GW, MH - 1)
    stripes = resample(flat, x0, x1, row, stripe % GW, MW, 1, MW, GW)  # [MH * GW]
    return resample(stripes, y0, y1, column, line, 1, GW, MH, GH)


@triton.jit
def pool(
    maps, indices, ids, boxes, flips, affines, n, label, share, area, maps_stride, indices_stride, boxes_stride,
    map_rows, top_k,
    GH: tl.constexpr, GW: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, CLASSES: tl.constexpr,
    MAP_VEC: tl.constexpr, BOX_STEP: tl.constexpr, BOX_FORMAT: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The share of its evidence that an image keeps where `share` [TOKENS] of each token is its own.

    Without evidence (its sum is not a positive number) it is its share of the area.
    """
    CELLS: tl.constexpr = triton.next_power_of_2(MH * MW)
    token = tl.arange(0, TOKENS)
    kept = area
    if maps is not None:
        flat = own_map(
            maps, indices, ids, n, label, maps_stride, indices_stride, map_rows, top_k,
            CLASSES, CELLS, MH * MW, MAP_VEC,
        )  # fmt: skip
        real = token < GH * GW
        line = tl.minimum(token // GW, GH - 1)
        if affines is not None:
            pooled = resample_affine(flat, affines + n * 6, token, GH, GW, MH, MW)
        else:
            pooled = pool_box(
                flat, boxes, flips, n, token % GW, line, boxes_stride, GH, GW, MH, MW, BOX_STEP, BOX_FORMAT
            )
        pooled = tl.where(real, pooled, 0.0)
        total = tl.sum(pooled, 0)
        evidence = tl.sum(pooled * share, 0)
        kept = tl.where((total > 0) & (total < float("inf")), tl.div_rn(evidence, total + 1e-8), kept)
    return kept


@triton.jit
def write_row(targets, begin, side, mine, theirs, rest, raised, K: tl.constexpr):
    """One side's half of a target row that starts at `begin`: `raised` in the column `mine`, `rest` elsewhere.

    Whatever K is, columns are stored in fours between 16-byte borders of memory. The fours around both labels (mine,
    theirs; K_AWAY where there is none) and the ends of the row are stored by themselves, no place by two threads.
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
def write_targets(
    labels, maps, indices, ids, boxes, flips, affines, targets, weights, mask_out, i, j, side, kind, lam, words,
    covered, top, bottom, left, right, labels_stride, maps_stride, indices_stride, boxes_stride, map_rows, top_k,
    smoothing,
    GH: tl.constexpr, GW: tl.constexpr, P: tl.constexpr, MH: tl.constexpr, MW: tl.constexpr, CLASSES: tl.constexpr,
    MAP_VEC: tl.constexpr, BOX_STEP: tl.constexpr, BOX_FORMAT: tl.constexpr, WORD_ROWS: tl.constexpr,
    WORDS: tl.constexpr, K: tl.constexpr, MASK_TYPE: tl.constexpr, LAM_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Pool one side of a pair (side 0: the own image, 1: the partner) and write its half of the target row.

    Where both have one label, side 0 pools both.
    """
    TOKENS: tl.constexpr = triton.next_power_of_2(GH * GW)
    taken = taken_share(words, top, bottom, left, right, GH, GW, P, WORD_ROWS, WORDS, TOKENS, MASK_TYPE)
    token = tl.arange(0, TOKENS)
    real = token < GH * GW
    if mask_out is not None and side == 1:
        tl.store(mask_out + i * (GH * GW) + token, taken > 0.5, real)
    if weights is None and targets is None:
        return
    label_i = tl.load(labels + i * labels_stride).to(tl.int64)
    label_j = tl.load(labels + j * labels_stride).to(tl.int64)
    same = label_i == label_j
    column_i = tl.where((label_i >= 0) & (label_i < K), label_i, K_AWAY).to(tl.int32)
    column_j = tl.where((label_j >= 0) & (label_j < K) & ~same, label_j, K_AWAY).to(tl.int32)
    moved = (bottom - top) * (right - left) if MASK_TYPE == K_CUTMIX else covered
    AREA: tl.constexpr = GH * GW * (P * P if MASK_TYPE == K_CUTMIX else 1)
    n = side
    last = tl.where(same, 2 - 2 * side, side + 1)
    raised = tl.zeros([], tl.float32)
    while n < last:
        own = n == 0
        share = tl.where(own, 1.0 - taken, taken)
        weight = pool(
            maps, indices, ids, boxes, flips, affines, tl.where(own, i, j), tl.where(own, label_i, label_j), share,
            tl.where(own, AREA - moved, moved).to(tl.float32) * (1.0 / AREA), maps_stride, indices_stride, boxes_stride,
            map_rows, top_k, GH, GW, MH, MW, CLASSES, MAP_VEC, BOX_STEP, BOX_FORMAT, TOKENS,
        )  # fmt: skip
        lam_weight = tl.where(own, lam, 65536 - lam).to(tl.float32) * 0.0000152587890625
        by_lam = (kind == K_COPY) | (kind == K_MIXUP)
        if LAM_WEIGHTS:
            by_lam = by_lam | (kind == K_CUTMIX)
        weight = tl.where(by_lam, lam_weight, weight)
        if weights is not None:
            tl.store(weights + i * 2 + n, weight)
        tokens = (kind == K_BLOCK) | (kind == K_RANDOM) | (kind == K_GIVEN)
        raised += tl.where(tokens, weight - smoothing * 0.5, weight * (1.0 - smoothing))
        n += 1
    if targets is not None:
        rest = tl.div_rn(smoothing, tl.full([], K, tl.float32))
        mine, theirs = tl.where(side == 0, column_i, column_j), tl.where(side == 0, column_j, column_i)
        write_row(targets, i * K, side, mine, theirs, rest, rest + raised, K)


@triton.jit(do_not_specialize=["seed_high", "sample_offset", "tokens_constant", "batch", "map_rows", "top_k"])
def mix_kernel(
    images, out, labels, partner, maps, indices, ids, boxes, flips, affines, mask, targets, weights, mask_out, mean,
    rstd, ratio_table, mix_table, cut_table, seed, seed_high, sample_offset, batch, images_stride, out_stride,
    labels_stride, maps_stride, indices_stride, boxes_stride, map_rows, top_k, mixes, switches, lam_constant,
    tokens_constant, minimum_tokens, cut_low_h, cut_span_h, cut_low_w, cut_span_w, smoothing,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, SC: tl.constexpr, SH: tl.constexpr,
    SW: tl.constexpr, OC: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr,
    COLS: tl.constexpr, LINES: tl.constexpr, ROWS: tl.constexpr, PROGRAMS: tl.constexpr, MODE: tl.constexpr,
    MASK_TYPE: tl.constexpr, HAS_HEADER: tl.constexpr, HAS_MIXUP: tl.constexpr, HAS_MINMAX: tl.constexpr,
    LAM_WEIGHTS: tl.constexpr, AREA_BITS: tl.constexpr, WORD_ROWS: tl.constexpr, WORDS: tl.constexpr, K: tl.constexpr,
    MH: tl.constexpr, MW: tl.constexpr, CLASSES: tl.constexpr, MAP_VEC: tl.constexpr, BOX_STEP: tl.constexpr,
    BOX_FORMAT: tl.constexpr, IN_PLACE: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """PROGRAMS programs for each sample: one for each ROWS token rows, then two for the targets.

    images, out: pixels; the batch strides are arguments, the others constants. In place the program of the pair's
    first half moves both halves, and `partner` must be its own inverse (a sample for which it is not is left alone).
    mask: uint8 [B, GH, GW] where it is given. targets [B, K], weights [B, 2], mask_out [B, GH, GW]: where wanted.
    seed and seed_high: the low and high half of the seed, or a pointer to it and None.
    """
    GH: tl.constexpr = H // P
    GW: tl.constexpr = W // P
    program = tl.program_id(0) % PROGRAMS
    side = program - (PROGRAMS - 2)
    i = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    j = partner_of(partner, i, batch)
    if IN_PLACE:
        j = tl.where(partner_of(partner, j, batch) == i, j, i)
    if (side >= 0) | (not IN_PLACE) | (i < j):
        kind, lam, words, covered, top, bottom, left, right = draw(
            seed, seed_high, sample_offset, i, j, mask, mixes, switches, lam_constant, tokens_constant, minimum_tokens,
            cut_low_h, cut_span_h, cut_low_w, cut_span_w, ratio_table, mix_table, cut_table,
            H, W, P, MODE, MASK_TYPE, HAS_HEADER, HAS_MINMAX, AREA_BITS, WORD_ROWS, WORDS,
        )  # fmt: skip
        if side >= 0:
            write_targets(
                labels, maps, indices, ids, boxes, flips, affines, targets, weights, mask_out, i, j, side, kind, lam,
                words, covered, top, bottom, left, right, labels_stride, maps_stride, indices_stride, boxes_stride,
                map_rows, top_k, smoothing,
                GH, GW, P, MH, MW, CLASSES, MAP_VEC, BOX_STEP, BOX_FORMAT, WORD_ROWS, WORDS, K, MASK_TYPE, LAM_WEIGHTS,
            )  # fmt: skip
        elif images is not None:
            kind_j, lam_j, words_j = kind, lam, words
            top_j, bottom_j, left_j, right_j = top, bottom, left, right
            if IN_PLACE and (MASK_TYPE == K_GIVEN or (MODE != K_BATCH and MODE != K_PAIR)):
                kind_j, lam_j, words_j, _, top_j, bottom_j, left_j, right_j = draw(
                    seed, seed_high, sample_offset, j, i, mask, mixes, switches, lam_constant, tokens_constant,
                    minimum_tokens, cut_low_h, cut_span_h, cut_low_w, cut_span_w, ratio_table, mix_table, cut_table,
                    H, W, P, MODE, MASK_TYPE, HAS_HEADER, HAS_MINMAX, AREA_BITS, WORD_ROWS, WORDS,
                )  # fmt: skip
            row = program * ROWS
            last = tl.minimum(row + ROWS, GH)
            while row < last:
                bits = row_bits(words, row, WORD_ROWS, GW, WORDS)
                bits_j = row_bits(words_j, row, WORD_ROWS, GW, WORDS) if IN_PLACE else bits
                if MASK_TYPE == K_CUTMIX or (HAS_MIXUP and (IN_PLACE or kind == K_MIXUP)):
                    blend_pixels(
                        images, out, i, j, row, kind, lam, bits, top, bottom, left, right, kind_j, lam_j, bits_j, top_j,
                        bottom_j, left_j, right_j, images_stride, out_stride, mean, rstd,
                        C, W, P, SC, SH, SW, OC, OH, OW, NHWC, VEC, COLS, LINES, MASK_TYPE, HAS_MIXUP, IN_PLACE,
                    )  # fmt: skip
                elif IN_PLACE:
                    swap_tokens(
                        images, i, j, row, bits, bits_j, images_stride,
                        C, W, P, SC, SH, SW, NHWC, VEC, COLS, LINES, PACK,
                    )  # fmt: skip
                else:
                    take_tokens(
                        images, out, i, j, row, bits, images_stride, out_stride, mean, rstd,
                        C, W, P, SC, SH, SW, OC, OH, OW, NHWC, VEC, COLS, LINES, PACK,
                    )  # fmt: skip
                row += 1


class Shape(NamedTuple):
    """How a launch is cut up. See `launch_shape`."""

    VEC: int
    COLS: int
    LINES: int
    ROWS: int
    PROGRAMS: int
    WORD_ROWS: int
    WORDS: int
    num_warps: int


@lru_cache(maxsize=256)
def launch_shape(
    channels: int, height: int, width: int, patch: int, nhwc: bool, in_bytes: int, out_bytes: int, alignment: int,
    converts: bool, blends: bool, in_place: bool,
) -> Shape:  # fmt: skip
    """Blocks and warps of a launch, from the shape and dtype alone.

    Args:
        channels, height, width, patch: of the images.
        nhwc: whether channels lie next to each other in memory.
        in_bytes, out_bytes: size of one value.
        alignment: a divisor of all strides but the innermost, in values.
        converts: whether pixels are normalised or change their dtype.
        blends: whether a pixel may need both images (Mixup, rectangles).
        in_place: whether a pair's tokens change places.

    Returns:
        VEC: neighbours in memory that a thread moves at once: 16 bytes of the wider dtype, less where tokens are
            narrower. COLS by LINES: the tile; few lines where much is held for each. ROWS: token rows of a program.
            PROGRAMS: programs of a sample, two of them for the targets. WORD_ROWS grid rows go into one word of the
            mask, which has WORDS words.
    """
    warps = 4
    grid_h, grid_w = height // patch, width // patch
    span = patch * (channels if nhwc else 1)
    line = width * (channels if nhwc else 1)
    vec = gcd(16 // max(in_bytes, out_bytes), span, alignment)
    cols = min(32 * vec, triton.next_power_of_2(line))
    tall = triton.next_power_of_2(patch)
    lines = min(tall, 4) if blends else min(tall, 8) if converts and nhwc else tall
    word_rows = max(1, 32 // grid_w) if grid_w <= 32 else 1
    word_rows = min(word_rows, -(-grid_h // 8))
    words = triton.next_power_of_2(-(-grid_h // word_rows))
    # Loads of each thread: enough to be worth the draw of the mask, few enough that warps stay short.
    loads = tall * (1 if nhwc else channels) * -(-line // cols) * cols // (vec * 32 * warps)
    if in_place:
        loads += loads // 3  # each with a condition of its own
    rows = max(1, (36 if converts or blends else 84) // max(1, loads))
    rows = -(-grid_h // -(-grid_h // min(rows, grid_h)))
    return Shape(
        VEC=vec,
        COLS=cols,
        LINES=lines,
        ROWS=rows,
        PROGRAMS=2 + -(-grid_h // rows),
        WORD_ROWS=word_rows,
        WORDS=max(8, words),
        num_warps=warps,
    )


@lru_cache(maxsize=256)
def constants(
    shape: tuple[int, ...], strides: tuple[int, ...], out_strides: tuple[int, ...], in_bytes: int, out_bytes: int,
    plain: bool, map_shape: tuple[int, ...], map_vec: int, box_step: int, in_place: bool, settings: Settings,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments of `mix_kernel`."""
    _, channels, height, width = shape
    sb, sc, sh, sw = strides
    ob, oc, oh, ow = out_strides
    nhwc = sc == 1 and sw == channels and oc == 1 and ow == channels and channels > 1
    planned = plan(settings, height, width)
    inner: tuple[int, ...] = (sb, sh, ob, oh) if nhwc else (sb, sc, sh, ob, oc, oh)
    if not nhwc and (sw != 1 or ow != 1):
        inner = (1,)
    mask_type = MASK_TYPES[settings.mask_type]
    has_mixup = planned.switches < 1 << 24
    cut = launch_shape(
        channels, height, width, settings.patch_size, nhwc, in_bytes, out_bytes, gcd(*inner),
        not plain, has_mixup or mask_type == CUTMIX, in_place,
    )  # fmt: skip
    drawn_lam = planned.lam < 0
    uneven = settings.patch_size & (settings.patch_size - 1)
    return {
        **cut._asdict(),
        "C": channels, "H": height, "W": width, "P": settings.patch_size,
        "SC": sc, "SH": sh, "SW": sw, "OC": oc, "OH": oh, "OW": ow, "NHWC": nhwc,
        "MODE": MODES[settings.mode],
        "MASK_TYPE": mask_type,
        "HAS_HEADER": planned.mixes < 1 << 24 or planned.switches < 1 << 24 or drawn_lam,
        "HAS_MIXUP": has_mixup,
        "HAS_MINMAX": planned.cuts != (0, 0, 0, 0),
        "LAM_WEIGHTS": mask_type == CUTMIX and not map_shape and not settings.correct_lam and not settings.minmax,
        "AREA_BITS": planned.area_bits,
        "K": settings.num_classes,
        "MH": map_shape[-2] if map_shape else 1, "MW": map_shape[-1] if map_shape else 1,
        "MAP_VEC": map_vec,
        "CLASSES": map_shape[0] if len(map_shape) == 3 else 0,
        "BOX_STEP": box_step, "BOX_FORMAT": ("xyxy", "crop", "crop_swapped").index(settings.box_format),
        "IN_PLACE": in_place,
        "PACK": 8 // in_bytes if plain and cut.VEC * in_bytes >= 8 else 1,
        # A contracted multiply-add would round Mixup and the sampling positions differently from the reference.
        "enable_fp_fusion": False,
        # 1,024 threads fit a multiprocessor, and the assembler keeps what it has to keep in registers, not in memory.
        # Masks of many rows beside lines that are not a power of two need more.
        **({} if torch.version.hip else {"maxnreg": 64 if cut.WORDS <= 16 or uneven == 0 else 128}),
    }  # fmt: skip


@lru_cache(maxsize=64)
def normalisation(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation on a device, made once."""
    return torch.tensor(mean, device=device), 1 / torch.tensor(std, device=device)


def arguments(
    images: Tensor | None,
    out: Tensor | None,
    labels: Tensor | None,
    partner: Tensor | None,
    maps: Tensor | None,
    indices: Tensor | None,
    boxes: Tensor | None,
    mask: Tensor | None,
    seed: Tensor,
    sample_offset: int,
    targets: Tensor | None,
    weights: Tensor | None,
    mask_out: Tensor | None,
    shape: tuple[int, ...],
    settings: Settings,
    device: torch.device,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments by name of a launch of `mix_kernel`. Nothing here waits for a device."""
    batch, _, height, width = shape
    planned = plan(settings, height, width)
    plain = False
    map_shape: tuple[int, ...] = ()
    map_vec = 1
    if maps is not None:
        map_shape = tuple(maps.shape[1:])
        map_vec = gcd(4, maps.stride(0), 0 if indices is None else indices.stride(0), map_shape[-2] * map_shape[-1])
    if images is None or out is None:
        strides: tuple[int, ...] = (1, 1, 1, 1)
        out_strides: tuple[int, ...] = strides
        in_bytes = out_bytes = 1
    else:
        strides, out_strides = images.stride(), out.stride()
        in_bytes, out_bytes = images.element_size(), out.element_size()
        plain = images.dtype == out.dtype and not settings.mean
    fixed = constants(
        shape, strides, out_strides, in_bytes, out_bytes, plain, map_shape, map_vec,
        0 if boxes is None else boxes.stride(1), images is not None and images is out, settings,
    )  # fmt: skip
    if seed.device.type == "cpu":
        number = int(seed)
        low, high = number & 0xFFFFFFFF, number >> 32
        seed_low: Any = low - (low >> 31 << 32)
        seed_high = high
    else:
        seed_low, seed_high = seed, None
    mean, rstd = normalisation(settings.mean, settings.std, device) if settings.mean else (None, None)
    drawn_lam = planned.lam < 0 and fixed["MASK_TYPE"] != GIVEN
    return (batch * fixed["PROGRAMS"],), {
        "images": images, "out": out, "labels": labels, "partner": partner, "maps": maps, "indices": indices,
        "ids": ids, "boxes": boxes, "flips": flips, "affines": affines, "mask": mask,
        "targets": targets, "weights": weights, "mask_out": mask_out, "mean": mean, "rstd": rstd,
        "ratio_table": device_table("ratio", 0.0, device) if fixed["MASK_TYPE"] == BLOCK else None,
        "mix_table": device_table("beta", settings.mixup_alpha, device) if fixed["HAS_MIXUP"] else None,
        "cut_table": device_table("beta", settings.cutmix_alpha, device) if drawn_lam else None,
        "seed": seed_low, "seed_high": seed_high, "sample_offset": sample_offset, "batch": batch,
        "images_stride": strides[0], "out_stride": out_strides[0],
        "labels_stride": 1 if labels is None else labels.stride(0),
        "maps_stride": 0 if maps is None else maps.stride(0),
        "indices_stride": 0 if indices is None else indices.stride(0),
        "boxes_stride": 0 if boxes is None else boxes.stride(0),
        "map_rows": 0 if maps is None else maps.shape[0],
        # An argument, not a constant: the loop over it must not be unrolled into registers.
        "top_k": fixed["CLASSES"], "mixes": planned.mixes, "switches": planned.switches, "lam_constant": planned.lam,
        "tokens_constant": planned.tokens, "minimum_tokens": settings.minimum_tokens,
        "cut_low_h": planned.cuts[0], "cut_span_h": max(planned.cuts[1] - planned.cuts[0], 1),
        "cut_low_w": planned.cuts[2], "cut_span_w": max(planned.cuts[3] - planned.cuts[2], 1),
        "smoothing": settings.label_smoothing,
        **fixed,
    }  # fmt: skip


def mix(
    images: Tensor, labels: Tensor, out: Tensor, partner: Tensor | None, maps: Tensor | None, indices: Tensor | None,
    boxes: Tensor | None, mask: Tensor | None, seed: Tensor, sample_offset: int, settings: Settings,
    ids: Tensor | None = None, flips: Tensor | None = None, affines: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mix a batch into `out` (which may be `images`) and return (targets, mask, weights), in one launch."""
    batch, _, height, width = images.shape
    grid_h, grid_w = height // settings.patch_size, width // settings.patch_size
    targets = torch.empty(batch, settings.num_classes, dtype=torch.float32, device=images.device)
    weights = torch.empty(batch, 2, dtype=torch.float32, device=images.device)
    mask_out = torch.empty(batch, grid_h, grid_w, dtype=torch.bool, device=images.device)
    grid, named = arguments(
        images, out, labels, partner, maps, indices, boxes, mask, seed, sample_offset, targets, weights, mask_out,
        tuple(images.shape), settings, images.device, ids, flips, affines,
    )  # fmt: skip
    mix_kernel[grid](**named)
    return targets, mask_out, weights


def mix_inplace(
    images: Tensor, labels: Tensor, partner: Tensor | None, maps: Tensor | None, indices: Tensor | None,
    boxes: Tensor | None, mask: Tensor | None, seed: Tensor, sample_offset: int, settings: Settings,
    ids: Tensor | None = None, flips: Tensor | None = None, affines: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Mix a batch into itself; the partner's partner must be the own image."""
    return mix(
        images, labels, images, partner, maps, indices, boxes, mask, seed, sample_offset, settings, ids, flips, affines
    )


def token_mask(batch: int, grid: tuple[int, int], seed: Tensor, sample_offset: int, settings: Settings) -> Tensor:
    """Masks alone, [B, Gh, Gw] bool, on the seed's device."""
    shape = (batch, 1, grid[0] * settings.patch_size, grid[1] * settings.patch_size)
    mask_out = torch.empty(batch, *grid, dtype=torch.bool, device=seed.device)
    launch_grid, named = arguments(
        None, None, None, None, None, None, None, None, seed, sample_offset, None, None, mask_out, shape, settings,
        seed.device,
    )  # fmt: skip
    mix_kernel[launch_grid](**named)
    return mask_out


def pool_targets(
    maps: Tensor, indices: Tensor | None, labels: Tensor, mask: Tensor, boxes: Tensor | None, partner: Tensor | None,
    box_format: str, ids: Tensor | None = None, flips: Tensor | None = None, affines: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Weights alone, [B, 2] fp32 (own, partner), for masks that are already there."""
    settings = Settings(num_classes=1, patch_size=1, mask_type="given", box_format=box_format)
    weights = torch.empty(len(mask), 2, dtype=torch.float32, device=maps.device)
    seed = torch.zeros((), dtype=torch.int64)
    launch_grid, named = arguments(
        None, None, labels, partner, maps, indices, boxes, mask, seed, 0, None, weights, None,
        (len(mask), 1, *mask.shape[1:]), settings, maps.device, ids, flips, affines,
    )  # fmt: skip
    mix_kernel[launch_grid](**named)
    return weights
