"""What each sample gets, in Triton: kind, lam, mask, rectangle. Beside `reference/draw.py`."""

import triton
import triton.language as tl

from .groups import CONST, Draw

__all__ = ["draw", "load_ratios", "partner_of"]


@triton.constexpr_function
def power_of_2(exponent):
    return 1 << exponent


@triton.constexpr_function
def bit_length(number):
    return number.bit_length()


@triton.jit
def philox(key, sample, draws, STREAM: tl.constexpr):
    """Philox4x32-10: four uint32 words for each of the int32 `draws` of an int64 sample."""
    c2 = draws.to(tl.uint32, bitcast=True)
    c0 = (c2 * 0) + (sample & 0xFFFFFFFF).to(tl.uint32)
    c1 = (c2 * 0) + ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c3 = (c2 * 0) + STREAM
    return tl.philox_impl(c0, c1, c2, c3, key[0], key[1])


@triton.jit
def read_seed(seed, seed_high):
    """The two 32-bit halves of the key, from two integers or from a pointer to one int64."""
    if seed_high is None:
        both = tl.load(seed)
        low = (both & 0xFFFFFFFF).to(tl.uint32)
        high = ((both >> 32) & 0xFFFFFFFF).to(tl.uint32)
    else:
        low = tl.cast(seed, tl.int32).to(tl.uint32, bitcast=True)
        high = tl.cast(seed_high, tl.int32).to(tl.uint32, bitcast=True)
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
    entry = (word >> (32 - CONST.value.BETA_BITS)).to(tl.int32)
    between = ((word >> (18 - CONST.value.BETA_BITS)) & 0x3FFF).to(tl.int32)
    low = tl.load(table + entry)
    return low + (((tl.load(table + entry + 1) - low) * between) >> 14)


@triton.jit
def header(key, sample, plan, tables, COUNT: tl.constexpr, RULE: tl.constexpr):
    """Whether and how a sample is mixed: (kind, lam in 2**-16, tokens to mask)."""
    lam = tl.cast(plan.lam, tl.int32)
    if RULE.HAS_HEADER:
        w0, w1, w2, _ = philox(key, sample, tl.zeros([], tl.int32), CONST.value.HEADER)
        kind = tl.where((w1 >> 8).to(tl.int32) < plan.switches, RULE.KIND, CONST.value.MIXUP)
        kind = tl.where((w0 >> 8).to(tl.int32) < plan.mixes, kind, CONST.value.COPY)
        if tables.cutmix is not None:
            lam = beta(w2, tables.cutmix)
        if tables.mixup is not None:
            lam = tl.where(kind == CONST.value.MIXUP, beta(w2, tables.mixup), lam)
        lam = tl.where(kind == CONST.value.COPY, 65536, lam)
    else:
        kind = tl.zeros([], tl.int32) + RULE.KIND
    if tables.cutmix is not None:
        share = (((65536 - lam).to(tl.int64) * COUNT) >> 16).to(tl.int32)
        tokens = tl.minimum(COUNT, share + plan.minimum_tokens)
    else:
        tokens = tl.cast(plan.tokens, tl.int32)
    return kind, lam, tl.where(kind == RULE.KIND, tokens, 0)


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
def load_ratios(tables):
    """The table of aspect ratios whole, before anybody knows which entries are needed: looking up waits for nothing."""
    ratios = None
    if tables.ratio is not None:
        ratios = tl.load(tables.ratio + tl.arange(0, CONST.value.RATIO_MASK + 1))
    return ratios


@triton.jit
def whole_root(x, PTX: tl.constexpr):
    """The integer part of the correctly rounded square root of fp32 numbers from 1 to 2**32.

    In PTX by the steps that the assembler takes for `sqrt.rn`, without its branch for other numbers, and rounded down
    into the low mantissa bits of 2**23: every window of tries waits for it.
    """
    if PTX:
        whole = tl.inline_asm_elementwise(
            "{ .reg .f32 r, s, h, e; rsqrt.approx.ftz.f32 r, $1; mul.rn.f32 s, $1, r; mul.rn.f32 h, r, 0f3F000000; "
            "neg.f32 e, s; fma.rn.f32 e, e, s, $1; fma.rn.f32 s, e, h, s; add.rz.f32 s, s, 0f4B000000; "
            "mov.b32 $0, s; sub.s32 $0, $0, 0x4B000000; }",
            "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        whole = tl.sqrt_rn(x).to(tl.int32)
    return whole


@triton.jit
def try_four(
    area, factors, position, free, remaining, tries, first_row, j, GRID: tl.constexpr, PTX: tl.constexpr,
    WORD: tl.constexpr,
):  # fmt: skip
    """One window of four tries.

    Returns what is free now [4, WORDS], the tokens that remain, and the tries that are left in a row (times 2**16).
    """
    GH: tl.constexpr = GRID.GH
    GW: tl.constexpr = GRID.GW
    WORD_ROWS: tl.constexpr = GRID.WORD_ROWS
    HALF: tl.constexpr = power_of_2(13 + GRID.AREA_BITS // 2)
    SHIFT: tl.constexpr = 14 + GRID.AREA_BITS // 2
    SHIFTED: tl.constexpr = CONST.value.SHIFTED
    area = power_of_2(GRID.AREA_BITS) + (remaining - 1) * area
    side = whole_root(area.to(tl.float32), PTX)
    h = (side * (factors & 0xFFFF) + HALF) >> SHIFT
    w = (side * (factors >> 16) + HALF) >> SHIFT
    tops, lefts = GH + 1 - h, GW + 1 - w
    top = tl.umulhi(position, tops.to(tl.uint32, bitcast=True)).to(tl.int32)
    left = tl.umulhi(position << 16, lefts.to(tl.uint32, bitcast=True)).to(tl.int32)
    columns = ((((free ^ free) + 1) << w.to(WORD)) - 1) << left.to(WORD)
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
    keys = tl.where(fits, j * SHIFTED + new, CONST.value.UNFIT)
    first = tl.min(tl.ravel(keys), 0)
    taken = first < tries
    first = tl.where(taken, first, CONST.value.NONE)
    free = free ^ tl.reduce_or(tl.where(keys == first, bits, 0), 0)[None, :]
    remaining -= first & 0xFFFF
    tries = tl.where(taken, 10 * SHIFTED, tries - 4 * SHIFTED)
    return free, remaining, tries


@triton.jit
def block_mask(key, sample, i, tokens, mask, ratios, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
    """Rectangles of random area and aspect ratio until `tokens` are masked: (words [4, WORDS], tokens masked).

    A word holds WORD_ROWS grid rows, bit r * GW + c of its rows. Four tries are looked at side by side (first axis),
    all against the tokens that are still to be masked; the first that fits is taken. Ten in a row that do not fit end
    it. One Philox call serves 2 * WORDS windows of four tries.
    """
    WORDS: tl.constexpr = GRID.WORDS
    AREA_BITS: tl.constexpr = GRID.AREA_BITS
    j = tl.arange(0, 4)[:, None]
    word = tl.arange(0, WORDS)[None, :]
    first_row = word * GRID.WORD_ROWS + j * 0  # [4, WORDS]
    every = (word + j).to(WORD) * 0 - 1
    free = every
    remaining = tokens
    tries = tl.full([], 10 * CONST.value.SHIFTED, tl.int32)
    draws = word * 4 + j
    while (remaining > 0) & (tries > 0):
        size_a, position_a, size_b, position_b = philox(key, sample, draws, CONST.value.TRIES)
        both = (tl.join(size_a, size_b) & CONST.value.RATIO_MASK).to(tl.int32)  # [4, WORDS, 2]
        factors_a, factors_b = tl.split(tl.reshape(tl.gather(ratios, tl.ravel(both), 0), both.shape))
        area_a = (size_a >> (32 - AREA_BITS)).to(tl.int32)
        area_b = (size_b >> (32 - AREA_BITS)).to(tl.int32)
        step = 0
        while (step < WORDS) & (remaining > 0) & (tries > 0):
            lane = step + word * 0 + j * 0
            free, remaining, tries = try_four(
                tl.gather(area_a, lane, 1), tl.gather(factors_a, lane, 1), tl.gather(position_a, lane, 1),
                free, remaining, tries, first_row, j, GRID, PTX, WORD,
            )  # fmt: skip
            free, remaining, tries = try_four(
                tl.gather(area_b, lane, 1), tl.gather(factors_b, lane, 1), tl.gather(position_b, lane, 1),
                free, remaining, tries, first_row, j, GRID, PTX, WORD,
            )  # fmt: skip
            step += 1
        draws += 4 * WORDS
    return free ^ every, tokens - remaining


@triton.jit
def token_of(GRID: tl.constexpr):
    """Tokens by word and bit: (bit [1, BITS], token [WORDS, BITS], whether there is such a token)."""
    WORD_TOKENS: tl.constexpr = GRID.WORD_ROWS * GRID.GW
    BITS: tl.constexpr = triton.next_power_of_2(WORD_TOKENS)
    WORDS: tl.constexpr = GRID.WORDS
    bit = tl.arange(0, BITS)[None, :]
    token = tl.arange(0, WORDS)[:, None] * WORD_TOKENS + bit
    return bit, token, (bit < WORD_TOKENS) & (token < GRID.GH * GRID.GW)


@triton.jit
def as_words(chosen, bit, WORD: tl.constexpr, WORDS: tl.constexpr):
    """Chosen tokens [WORDS, BITS] as words [4, WORDS], and their number."""
    words = tl.sum(chosen.to(WORD) << bit.to(WORD), 1)  # [WORDS]
    return words[None, :] + tl.zeros([4, WORDS], WORD), tl.sum(tl.sum(chosen.to(tl.int32), 1), 0)


@triton.jit
def smallest_keys(key, sample, number, counted, wanted, KEY_BITS: tl.constexpr):
    """Which of the `number`s [WORDS, BITS] have the `wanted` smallest keys among those that are `counted`.

    Keys are 32-bit random numbers whose low bits are the number itself, so no two are equal. The largest key that is
    taken is found bit by bit.
    """
    w0, w1, w2, w3 = philox(key, sample, number >> 2, CONST.value.KEYS)
    which = number & 3
    keys = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    keys = ((keys >> KEY_BITS) << KEY_BITS) | number.to(tl.uint32)
    bound = tl.zeros([], tl.uint32)
    probe = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        higher = bound | probe
        below = tl.sum(tl.sum((counted & (keys < higher)).to(tl.int32), 1), 0)
        bound = tl.where(below < wanted, higher, bound)
        probe = probe >> 1
    return (keys <= bound) & (wanted > 0)


@triton.jit
def random_mask(key, sample, i, tokens, mask, ratios, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
    """The `tokens` tokens with the smallest keys: (words [4, WORDS], tokens masked)."""
    WORDS: tl.constexpr = GRID.WORDS
    KEY_BITS: tl.constexpr = bit_length(GRID.GH * GRID.GW - 1)
    bit, token, real = token_of(GRID)
    return as_words(real & smallest_keys(key, sample, token, real, tokens, KEY_BITS), bit, WORD, WORDS)


@triton.jit
def given_mask(key, sample, i, tokens, mask, ratios, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
    """A mask from memory, bytes [B, GH, GW]: (words [4, WORDS], tokens masked)."""
    WORDS: tl.constexpr = GRID.WORDS
    bit, token, real = token_of(GRID)
    return as_words(tl.load(mask + i * (GRID.GH * GRID.GW) + token, real, 0) != 0, bit, WORD, WORDS)


@triton.jit
def grid_mask(key, sample, i, tokens, mask, ratios, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
    """Random cells of CELL x CELL tokens, as many as the share of `tokens` stands for: (words, tokens masked).

    Each token finds its cell's key, drawn as in `random_mask`; the first token of each cell stands for it in the count.
    """
    WORDS: tl.constexpr = GRID.WORDS
    CELL: tl.constexpr = GRID.CELL
    COLUMNS: tl.constexpr = (GRID.GW + CELL - 1) // CELL
    CELLS: tl.constexpr = (GRID.GH + CELL - 1) // CELL * COLUMNS
    KEY_BITS: tl.constexpr = bit_length(CELLS - 1)
    bit, token, real = token_of(GRID)
    row, column = token // GRID.GW, token % GRID.GW
    cell = row // CELL * COLUMNS + column // CELL
    first = real & (row % CELL == 0) & (column % CELL == 0)
    wanted = tl.where(tokens > 0, ((tokens + 1) * CELLS - 1) // (GRID.GH * GRID.GW), 0)
    chosen = smallest_keys(key, sample, cell, first, wanted, KEY_BITS)
    return as_words(real & chosen, bit, WORD, WORDS)


@triton.jit
def cut_length(lam, SIZE: tl.constexpr):
    """The integer part of SIZE * sqrt(1 - lam), exactly: a float guess, corrected by whole numbers."""
    wanted = (65536 - lam).to(tl.int64) * (SIZE * SIZE)
    guess = (tl.sqrt_rn((65536 - lam).to(tl.float32)) * (SIZE / 256.0)).to(tl.int32).to(tl.int64)
    guess += ((guess + 1) * (guess + 1) * 65536 <= wanted).to(tl.int64)
    guess -= (guess * guess * 65536 > wanted).to(tl.int64)
    return guess.to(tl.int32)


@triton.jit
def cutmix_rectangle(key, sample, lam, plan, GRID: tl.constexpr, RULE: tl.constexpr):
    """(top, bottom, left, right) in pixels, as timm's rand_bbox and rand_bbox_minmax place it."""
    H: tl.constexpr = GRID.H
    W: tl.constexpr = GRID.W
    w0, w1, w2, w3 = philox(key, sample, tl.zeros([], tl.int32), CONST.value.RECTANGLE)
    if RULE.HAS_MINMAX:
        cut_h = plan.low_h + tl.umulhi(w0, tl.cast(plan.span_h, tl.uint32)).to(tl.int32)
        cut_w = plan.low_w + tl.umulhi(w1, tl.cast(plan.span_w, tl.uint32)).to(tl.int32)
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
def coverage(top, bottom, left, right, token, GRID: tl.constexpr):
    """The pixels of each token that lie in a rectangle."""
    P: tl.constexpr = GRID.P
    y, x = (token // GRID.GW) * P, (token % GRID.GW) * P
    rows = tl.maximum(tl.minimum(y + P, bottom) - tl.maximum(y, top), 0)
    columns = tl.maximum(tl.minimum(x + P, right) - tl.maximum(x, left), 0)
    return rows * columns


@triton.jit
def draw(
    seed,
    seed_high,
    sample_offset,
    i,
    j,
    mask,
    plan,
    tables,
    ratios,  # of `load_ratios`
    MASK_RULE: tl.constexpr,  # a function NAME_mask of this file, or None for rectangles
    GRID: tl.constexpr,
    RULE: tl.constexpr,
    PTX: tl.constexpr,
):
    """What sample i with partner j gets."""
    WORD: tl.constexpr = tl.uint32 if GRID.GW <= 32 else tl.uint64
    WORDS: tl.constexpr = GRID.WORDS
    key = read_seed(seed, seed_high)
    # The interpreter's cast alone would leave an offset between 2**31 and 2**32 in 32 bits.
    sample = tl.cast(sample_offset, tl.int64) + tl.zeros([], tl.int64)
    if RULE.MODE == CONST.value.PAIR:
        sample += tl.minimum(i, j)
    elif RULE.MODE != CONST.value.BATCH:
        sample += i
    kind, lam, tokens = header(key, sample, plan, tables, GRID.GH * GRID.GW, RULE)
    top = tl.zeros([], tl.int32)
    bottom, left, right, masked = top, top, top, top
    words = tl.zeros([4, WORDS], WORD)
    if RULE.WHOLE_TOKENS:
        if kind == RULE.KIND:
            words, masked = MASK_RULE(key, sample, i, tokens, mask, ratios, GRID, PTX, WORD)
    elif kind == RULE.KIND:
        top, bottom, left, right = cutmix_rectangle(key, sample, lam, plan, GRID, RULE)
    return Draw(kind, lam, words, masked, top, bottom, left, right)
