"""What each sample gets, in Triton: kind, lam, mask, rectangle. Beside `reference/draw.py`."""

import triton
import triton.language as tl

from .groups import CONST, Draw
from .window import ratio_factors, try_four

__all__ = ["draw", "load_header", "partner_of", "read_seed", "sample_of"]


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
def beta_entries(word, table):
    """The two entries of a table of quantiles that a random word lies between; nothing where there is no table."""
    low, high = None, None
    if table is not None:
        entry = (word >> (32 - CONST.value.BETA_BITS)).to(tl.int32)
        low, high = tl.load(table + entry), tl.load(table + entry + 1)
    return low, high


@triton.jit
def beta(word, entries):
    """lam ~ Beta(alpha, alpha) in units of 2**-16: the quantile table, read between two entries."""
    between = ((word >> (18 - CONST.value.BETA_BITS)) & 0x3FFF).to(tl.int32)
    return entries[0] + (((entries[1] - entries[0]) * between) >> 14)


@triton.jit
def load_header(key, sample, tables, RULE: tl.constexpr):
    """What `header` needs of random words and tables: (words, entries for Mixup, entries for the second branch)."""
    words = key
    if RULE.HAS_HEADER:
        w0, w1, w2, _ = philox(key, sample, tl.zeros([], tl.int32), CONST.value.HEADER)
        words = w0, w1, w2
        mixup, cutmix = beta_entries(w2, tables.mixup), beta_entries(w2, tables.cutmix)
    else:
        mixup, cutmix = beta_entries(key[0], None), beta_entries(key[0], None)
    return words, mixup, cutmix


@triton.jit
def header(loaded, plan, tables, COUNT: tl.constexpr, RULE: tl.constexpr):
    """Whether and how a sample is mixed: (kind, lam in 2**-16, tokens to mask)."""
    lam = tl.cast(plan.lam, tl.int32)
    words, mixup, cutmix = loaded
    if RULE.HAS_HEADER:
        kind = tl.where((words[1] >> 8).to(tl.int32) < plan.switches, RULE.KIND, CONST.value.MIXUP)
        kind = tl.where((words[0] >> 8).to(tl.int32) < plan.mixes, kind, CONST.value.COPY)
        if tables.cutmix is not None:
            lam = beta(words[2], cutmix)
        if tables.mixup is not None:
            lam = tl.where(kind == CONST.value.MIXUP, beta(words[2], mixup), lam)
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
def block_mask(key, sample, i, tokens, mask, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
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
        factors_a, factors_b = ratio_factors(size_a), ratio_factors(size_b)
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
def random_mask(key, sample, i, tokens, mask, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
    """The `tokens` tokens with the smallest keys: (words [4, WORDS], tokens masked)."""
    WORDS: tl.constexpr = GRID.WORDS
    KEY_BITS: tl.constexpr = bit_length(GRID.GH * GRID.GW - 1)
    bit, token, real = token_of(GRID)
    return as_words(real & smallest_keys(key, sample, token, real, tokens, KEY_BITS), bit, WORD, WORDS)


@triton.jit
def given_mask(key, sample, i, tokens, mask, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
    """A mask from memory, bytes [B, GH, GW]: (words [4, WORDS], tokens masked)."""
    WORDS: tl.constexpr = GRID.WORDS
    bit, token, real = token_of(GRID)
    return as_words(tl.load(mask + i * (GRID.GH * GRID.GW) + token, real, 0) != 0, bit, WORD, WORDS)


@triton.jit
def grid_mask(key, sample, i, tokens, mask, GRID: tl.constexpr, PTX: tl.constexpr, WORD: tl.constexpr):
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
def sample_of(sample_offset, i, j, RULE: tl.constexpr):
    """The number among all samples whose random numbers sample i with partner j takes."""
    # The interpreter's cast alone would leave an offset between 2**31 and 2**32 in 32 bits.
    sample = tl.cast(sample_offset, tl.int64) + tl.zeros([], tl.int64)
    if RULE.MODE == CONST.value.PAIR:
        sample += tl.minimum(i, j)
    elif RULE.MODE != CONST.value.BATCH:
        sample += i
    return sample


@triton.jit
def draw(
    key,
    sample,  # of `sample_of`
    loaded,  # of `load_header`
    i,
    mask,
    plan,
    tables,
    MASK_RULE: tl.constexpr,  # a function NAME_mask of this file, or None for rectangles
    GRID: tl.constexpr,
    RULE: tl.constexpr,
    PTX: tl.constexpr,
):
    """What sample i gets."""
    WORD: tl.constexpr = tl.uint32 if GRID.GW <= 32 else tl.uint64
    WORDS: tl.constexpr = GRID.WORDS
    kind, lam, tokens = header(loaded, plan, tables, GRID.GH * GRID.GW, RULE)
    top = tl.zeros([], tl.int32)
    bottom, left, right, masked = top, top, top, top
    words = tl.zeros([4, WORDS], WORD)
    if RULE.WHOLE_TOKENS:
        if kind == RULE.KIND:
            words, masked = MASK_RULE(key, sample, i, tokens, mask, GRID, PTX, WORD)
    elif kind == RULE.KIND:
        top, bottom, left, right = cutmix_rectangle(key, sample, lam, plan, GRID, RULE)
    return Draw(kind, lam, words, masked, top, bottom, left, right)
