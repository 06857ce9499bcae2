"""A window of four tries of the block mask, in Triton. All programs of a batch wait for a chain of these.

Beside the loop in `reference.draw.union_of_rectangles`.
"""

import triton
import triton.language as tl

from .groups import CONST

__all__ = ["power_of_2", "ratio_factors", "try_four"]


@triton.constexpr_function
def power_of_2(exponent):
    return 1 << exponent


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
def times_plus(total, square, NUMBER: tl.constexpr):
    """A step of a polynomial in `square`, in fp32."""
    return tl.fma(total, square, tl.full(square.shape, NUMBER, tl.float32))


@triton.jit
def ratio_factors(word):
    """The entry of `tables.ratio_table` that the low bits of random words choose, computed: nothing waits for a load.

    The factors are exp(x) and exp(-x) in units of 2**-14: the sum and the difference of an even and an odd polynomial,
    rounded by an addition. None comes nearer than 0.002 units to the middle of two integers, so it does not matter
    whether a product is rounded before it is added to.
    """
    placed = ((word & CONST.value.RATIO_MASK) << 1) | 0x4B000000  # 2**23 and twice the number of the entry
    unit = tl.full(word.shape, 2.0**-10, tl.float32)
    x = times_plus(placed.to(tl.float32, bitcast=True), unit, -(2.0**13) - 1023 / 1024)
    square = x * x
    even = times_plus(tl.full(word.shape, 0.9585097432136536, tl.float32), square, 89.7809066772461)
    even = times_plus(times_plus(even, square, 2968.656494140625), square, 0.0008212247048504651)
    slope = times_plus(tl.full(word.shape, 10.861645698547363, tl.float32), square, 595.6954345703125)
    slope = times_plus(slope, square, 9862.9521484375)
    height = (tl.fma(slope, x, even) + (1.5 * 2**23 + 2**14)).to(tl.int32, bitcast=True)
    width = (tl.fma(-slope, x, even) + (1.5 * 2**23 + 2**14)).to(tl.int32, bitcast=True)
    return (width << 16) | (height & 0xFFFF)


@triton.jit
def whole_root(x, PTX: tl.constexpr):
    """The integer part of the correctly rounded square root of fp32 numbers from 1 to 2**32.

    In PTX by the steps that the assembler takes for `sqrt.rn`, without its branch for other numbers, and rounded down
    to a multiple of the smallest number there is, whose bits are the integer: every window of tries waits for it.
    """
    if PTX:
        whole = tl.inline_asm_elementwise(
            "{ .reg .f32 r, s, h, e; rsqrt.approx.ftz.f32 r, $1; mul.rn.f32 s, $1, r; mul.rn.f32 h, r, 0f3F000000; "
            "neg.f32 e, s; fma.rn.f32 e, e, s, $1; fma.rn.f32 s, e, h, s; mul.rz.f32 s, s, 0f00000001; "
            "mov.b32 $0, s; }",
            "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        whole = tl.sqrt_rn(x).to(tl.int32)
    return whole


@triton.jit
def key_of(counts, j, PTX: tl.constexpr):
    """j * SHIFTED and the j-th of four counts, which are side by side in one word."""
    if PTX:
        key = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [counts, j, j + 0x5450], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        key = j * CONST.value.SHIFTED + ((counts >> (8 * j)) & 255)
    return key


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
    area = (power_of_2(GRID.AREA_BITS) - area) + remaining * area
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
    if PACKED:  # noqa: SIM108, this is known at compile time
        keys = key_of(tl.sum(tl.ravel(new << (8 * j)), 0), j, PTX)  # [4, WORDS]
    else:
        keys = j * SHIFTED + tl.sum(new, 1)[:, None]
    # 0 < new <= remaining, in one comparison without sign; nothing fits where nothing remains or no try is left.
    limit = tl.where((tl.minimum(tops, lefts) > 1) & (j * SHIFTED < tries), remaining, 0)
    fits = (keys - (j * SHIFTED + 1)).to(tl.uint32, bitcast=True) < limit.to(tl.uint32, bitcast=True)
    keys = tl.where(fits, keys, CONST.value.NONE)
    first = tl.min(tl.ravel(keys), 0)
    free = free ^ tl.reduce_or(tl.where(fits & (keys == first), bits, 0), 0)[None, :]
    remaining -= first & 0xFFFF
    tries = tl.where(first < CONST.value.NONE, 10 * SHIFTED, tries - 4 * SHIFTED)
    return free, remaining, tries
