"""Random erasing, in Triton. Beside `reference/erasing.py`."""

import torch
import triton
import triton.language as tl

from ..settings import Settings, erase_bits, make_erase_plan
from ..tables import erasing_tables
from .draw import philox
from .groups import CONST, Erased, Erasing
from .pixels import blend, finish, row_bits, token_bit
from .window import power_of_2

__all__ = ["draw_rectangles", "erase_rows", "erases_rows", "erasing_of"]

fraction_bits = triton.constexpr_function(erase_bits)


def erasing_of(settings: Settings, height: int, width: int, device: torch.device) -> Erasing | None:
    """What a launch needs to erase parts of images of height x width pixels; None where it erases nothing."""
    if settings.erase_prob == 0:
        return None
    return Erasing(*erasing_tables(settings.erase_aspect, device), *make_erase_plan(settings, height, width))


@triton.jit
def integer_root(area):
    """The integer part of a square root below 2**16, exactly: a float guess, corrected by whole numbers."""
    wanted = area.to(tl.int64)
    guess = tl.sqrt_rn(area.to(tl.float32)).to(tl.int32).to(tl.int64)
    guess += ((guess + 1) * (guess + 1) <= wanted).to(tl.int64)
    guess -= (guess * guess > wanted).to(tl.int64)
    return guess


@triton.jit
def draw_rectangles(key, sample, wanted, erasing, GRID: tl.constexpr, RULE: tl.constexpr):
    """What is erased of an image: ERASE_COUNT rectangles, side by side; those that it does not have are empty.

    As in `timm.data.random_erasing`: ten tries for each, the first that is smaller than the image is taken.
    """
    H: tl.constexpr = GRID.H
    W: tl.constexpr = GRID.W
    BITS: tl.constexpr = fraction_bits(H * W)
    HALF: tl.constexpr = power_of_2(13 + BITS // 2)
    SHIFT: tl.constexpr = 14 + BITS // 2
    chance, number, _, _ = philox(key, sample, tl.zeros([], tl.int32), CONST.value.ERASE)
    count = erasing.low_count + tl.umulhi(number, tl.cast(erasing.span_count, tl.uint32)).to(tl.int32)
    count = tl.where(wanted & ((chance >> 8).to(tl.int32) < erasing.erases), count, 0)
    n = tl.arange(0, RULE.ERASE_COUNT)
    top = n * 0
    bottom, left, right = top, top, top
    waiting = n < count
    tries = tl.zeros([], tl.int32)
    while (tl.max(waiting.to(tl.int32), 0) > 0) & (tries < CONST.value.ERASE_TRIES):
        w0, w1, w2, w3 = philox(key, sample, 1 + n * CONST.value.ERASE_TRIES + tries, CONST.value.ERASE)
        area = erasing.low + tl.umulhi(w0, tl.cast(erasing.span, tl.uint32)).to(tl.int32)
        if RULE.ERASE_COUNT > 1:
            area = area // tl.maximum(count, 1)
        side = integer_root(area)
        factors = tl.load(erasing.aspects + (w1 >> (32 - CONST.value.RATIO_BITS)).to(tl.int32))
        h = ((side * (factors & 0xFFFFFFFF) + HALF) >> SHIFT).to(tl.int32)
        w = ((side * (factors >> 32) + HALF) >> SHIFT).to(tl.int32)
        fits = waiting & (h < H) & (w < W)
        new_top = tl.umulhi(w2, (H + 1 - h).to(tl.uint32)).to(tl.int32)
        new_left = tl.umulhi(w3, (W + 1 - w).to(tl.uint32)).to(tl.int32)
        top, bottom = tl.where(fits, new_top, top), tl.where(fits, new_top + h, bottom)
        left, right = tl.where(fits, new_left, left), tl.where(fits, new_left + w, right)
        waiting = waiting & ~fits
        tries += 1
    return Erased(key, sample, erasing.segments, top, bottom, left, right)


@triton.jit
def in_rectangle(erased, n, y, x, COUNT: tl.constexpr):
    """Which of the pixels (y, x) are in the n-th rectangle."""
    top, bottom, left, right = rectangle(erased, n, COUNT)
    return (y >= top) & (y < bottom) & (x >= left) & (x < right)


@triton.jit
def rectangle(erased, n, COUNT: tl.constexpr):
    """(top, bottom, left, right) of the n-th rectangle."""
    mine = tl.arange(0, COUNT) == n
    top, bottom = tl.sum(tl.where(mine, erased.top, 0), 0), tl.sum(tl.where(mine, erased.bottom, 0), 0)
    left, right = tl.sum(tl.where(mine, erased.left, 0), 0), tl.sum(tl.where(mine, erased.right, 0), 0)
    return top, bottom, left, right


@triton.jit
def last_rectangle(erased, y, x, COUNT: tl.constexpr):
    """The last rectangle that each of the pixels (y, x) is in, -1 for none."""
    last = (y + x) * 0 - 1
    for n in tl.static_range(COUNT):
        last = tl.where(in_rectangle(erased, n, y, x, COUNT), n, last)
    return last


@triton.jit
def normal(segments, words):
    """Numbers of the standard normal distribution for random words of 16 bits. See `tables.normal_table`.

    A word's exponent and first bits as a float say its segment, the 12 bits that follow its place on it. Integers below
    2**23 become floats as the last bits of 2**23, or of 128 in units of 2**-16, which is subtracted: all exact.
    """
    BITS: tl.constexpr = CONST.value.SEGMENT_BITS
    bits = ((words | 0x4B000001).to(tl.float32, bitcast=True) - 8388608.0).to(tl.int32, bitcast=True)
    segment = tl.load(segments + ((bits >> (23 - BITS)) - (127 << BITS))).to(tl.uint32, bitcast=True)
    fall = ((segment >> 19) * ((bits >> 8) & 0xFFF).to(tl.uint32)) >> 12
    upper = ((segment & 0x7FFFF) + 0x43000000 - fall).to(tl.float32, bitcast=True) - 128.0
    return tl.where((words & 1) != 0, -upper, upper)


@triton.jit
def side_by_side(words):
    """The halves of four words [LINES, EIGHTS] as [LINES, EIGHTS, 8], lower halves first."""
    w0, w1, w2, w3 = words
    whole = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [LINES, EIGHTS, 2, 2]
    halves = tl.join(whole & 0xFFFF, whole >> 16)
    return tl.reshape(halves, (w0.shape[0], w0.shape[1], 8))


@triton.jit
def half_of(words, n):
    """The n-th half of four words, lower halves first."""
    w0, w1, w2, w3 = words
    word = tl.where(n < 4, tl.where(n < 2, w0, w1), tl.where(n < 6, w2, w3))
    return tl.where(n % 2 == 0, word, word >> 16) & 0xFFFF


@triton.jit
def noise(
    erased, y, eight, n, channel, GRID: tl.constexpr, C: tl.constexpr, DTYPE: tl.constexpr, RULE: tl.constexpr
):  # fmt: skip
    """What a channel of the n-th rectangle becomes: one number, or one for each pixel of lines y and eights of columns.

    A draw has numbers for eight pixels of a line, whose first column is a multiple of eight, or for eight channels.
    """
    if RULE.ERASE == CONST.value.ERASE_PIXEL:
        place = (y * ((GRID.W + 7) // 8) + eight) * C + channel
        number = normal(erased.segments, side_by_side(philox(erased.key, erased.sample, place, CONST.value.NOISE)))
    elif RULE.ERASE == CONST.value.ERASE_CONST:
        number = tl.zeros([], tl.float32)
    else:
        words = philox(erased.key, erased.sample, n * ((C + 7) // 8) + channel // 8, CONST.value.COLOUR)
        number = normal(erased.segments, half_of(words, channel % 8))
    return number.to(DTYPE)


@triton.jit
def chosen(first, one, other):
    """What is erased of one image, or of the other."""
    return Erased(
        one.key, tl.where(first, one.sample, other.sample), one.segments, tl.where(first, one.top, other.top),
        tl.where(first, one.bottom, other.bottom), tl.where(first, one.left, other.left),
        tl.where(first, one.right, other.right),
    )  # fmt: skip


@triton.jit
def from_partner(drawn, y, x, row, GRID: tl.constexpr, RULE: tl.constexpr):
    """Which of the pixels (y, x) of a row of tokens are taken from the partner."""
    if RULE.WHOLE_TOKENS:
        taken = (y >= 0) & token_bit(row_bits(drawn.mask, row, GRID), x, GRID.P)
    else:
        taken = (y >= drawn.top) & (y < drawn.bottom) & (x >= drawn.left) & (x < drawn.right)
    return taken


@triton.jit
def erases_rows(erased, erased_j, program, GRID: tl.constexpr, TILE: tl.constexpr):
    """Whether something is erased of one of two images in the rows of a program."""
    first = program * (TILE.ROWS * GRID.P)
    end = first + TILE.ROWS * GRID.P
    inside = ((erased.top < end) & (erased.bottom > first)) | ((erased_j.top < end) & (erased_j.bottom > first))
    return tl.max(inside.to(tl.int32), 0) > 0


@triton.jit
def erase_rows(
    pixels, i, j, program, drawn, erased, erased_j,
    GRID: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Put what erased pixels become into ROWS rows of tokens of out[i], which are mixed already.

    Pixels that show one image become its noise. Blended ones are blended anew, of noise and of normalised pixels. In
    place, where pixels are erased before they move, both images become noise.
    """
    P: tl.constexpr = GRID.P
    IN_PLACE: tl.constexpr = LAYOUT.IN_PLACE
    BLENDS: tl.constexpr = RULE.HAS_MIXUP and not IN_PLACE
    COUNT: tl.constexpr = RULE.ERASE_COUNT
    LINES: tl.constexpr = min(16, triton.next_power_of_2(P))
    TALL: tl.constexpr = (P + LINES - 1) // LINES  # tiles of a row of tokens
    EIGHTS: tl.constexpr = min(128 // LINES, triton.next_power_of_2((GRID.W + 7) // 8))
    # Then eight pixels that are all wanted are stored as one piece of memory.
    WHOLE: tl.constexpr = LAYOUT.OW == 1 and GRID.W % 8 == 0
    DTYPE: tl.constexpr = pixels.out.dtype.element_ty
    WIDE: tl.constexpr = tl.float64 if pixels.images.dtype.element_ty == tl.float64 else tl.float32
    blends = (drawn.kind == CONST.value.MIXUP) & (i != j)
    start = program * (TILE.ROWS * P)
    end = start + TILE.ROWS * P  # rectangles end with the image
    count = tl.zeros([], tl.int32)
    while count < 2 * COUNT:
        of_own = count < COUNT
        n = count % COUNT
        mine, theirs = chosen(of_own, erased, erased_j), chosen(of_own, erased_j, erased)
        target, source = tl.where(of_own, i, j) if IN_PLACE else i, tl.where(of_own, j, i)
        top, bottom, left, right = rectangle(mine, n, COUNT)
        top, bottom = tl.maximum(top, start), tl.minimum(bottom, end)
        row = top // P
        high = (top - row * P) // LINES
        first = left // 8
        while (row * P + high * LINES < bottom) & (left < right):
            line = row * P + high * LINES
            y = line + tl.arange(0, LINES)[:, None]  # [LINES, 1]
            eight = first + tl.arange(0, EIGHTS)[None, :]  # [1, EIGHTS]
            x = eight[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]  # [1, EIGHTS, 8]
            y_of = y[:, :, None]
            in_row = (y_of >= top) & (y_of < tl.minimum(bottom, (row + 1) * P))
            # Where rectangles overlap, the last one writes.
            wanted = in_row & (last_rectangle(mine, y_of, x, COUNT) == n)
            if IN_PLACE:
                wanted = wanted & (of_own | (i != j))
            else:
                wanted = wanted & (blends | (from_partner(drawn, y_of, x, row, GRID, RULE) ^ of_own))
            last = n
            if BLENDS:
                last = last_rectangle(theirs, y_of, x, COUNT)
                wanted = wanted & (~blends | of_own | (last < 0))
            whole = wanted
            if WHOLE:
                whole = tl.broadcast_to((tl.min(wanted.to(tl.int32), 2) > 0)[:, :, None], wanted.shape)
            place = (
                pixels.out + target * pixels.out_stride + (y_of.to(tl.int64) * LAYOUT.OH + x.to(tl.int64) * LAYOUT.OW)
            )
            for channel in tl.static_range(LAYOUT.C):
                value = noise(mine, y, eight, n, channel, GRID, LAYOUT.C, DTYPE, RULE)
                value = tl.broadcast_to(value, wanted.shape)
                if BLENDS:  # noqa: SIM102, this is known at compile time
                    if blends:
                        other = blend_source(pixels, source, y_of, x, channel, wanted, LAYOUT, TILE, WIDE)
                        fill = noise(theirs, y, eight, last, channel, GRID, LAYOUT.C, DTYPE, RULE)
                        other = tl.where(last < 0, other, fill.to(WIDE))
                        own = value.to(WIDE)
                        value = blend(
                            tl.where(of_own, own, other), tl.where(of_own, other, own), drawn.lam
                        ).to(DTYPE)  # fmt: skip
                tl.store(place + channel * LAYOUT.OC, value, whole)
                if WHOLE:
                    tl.store(place + channel * LAYOUT.OC, value, wanted & ~whole)
            first += EIGHTS
            beyond = first * 8 >= right
            first = tl.where(beyond, left // 8, first)
            high += beyond.to(tl.int32)
            row += high // TALL
            high = high % TALL
        count += 1


@triton.jit
def blend_source(pixels, n, y, x, channel, wanted, LAYOUT: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """A channel of the pixels (y, x) of images[n], normalised, in the precision that is blended in."""
    place = n * pixels.images_stride + y.to(tl.int64) * LAYOUT.SH + x.to(tl.int64) * LAYOUT.SW + channel * LAYOUT.SC
    value = tl.load(pixels.images + place, wanted, 0)
    column = x * LAYOUT.C + channel if LAYOUT.NHWC else x
    return finish(value, pixels, column, channel, LAYOUT, TILE, WIDE)
