"""The mixed images, in Triton. Beside `reference/pixels.py`."""

import triton
import triton.language as tl

from .groups import CONST

__all__ = ["mix_rows"]


@triton.jit
def blend(own, other, lam):
    """lam * own + (1 - lam) * other in fp32 (fp64 for such images), each step rounded once.

    `lam` is in units of 2**-16. Raw bytes are blended in integers, exactly.
    """
    if own.dtype == tl.uint8:
        mixed = (lam * own.to(tl.int32) + (65536 - lam) * other.to(tl.int32)).to(tl.float32) * CONST.value.UNIT
    else:
        WIDE: tl.constexpr = tl.float64 if own.dtype == tl.float64 else tl.float32
        share = lam.to(WIDE) * CONST.value.UNIT
        mixed = share * own.to(WIDE) + (1 - share) * other.to(WIDE)
    return mixed


@triton.jit
def channel_of(numbers, column, plane, C: tl.constexpr, NHWC: tl.constexpr, VEC: tl.constexpr):
    """The entry of `numbers` [C] for a plane, or for each of the columns [COLS] where channels are innermost.

    There, each VEC neighbours have the channels in the same order, but for where it starts: few numbers are picked in
    registers. A load by channel would need a layout conversion through shared memory.
    """
    if not NHWC:
        picked = tl.load(numbers + plane)
    elif C > 4:
        picked = tl.load(numbers + column % C)
    else:
        near = column % VEC
        first = (column - near) % C
        picked = tl.load(numbers)
        for place in tl.static_range(C):
            turned = tl.load(numbers + place)
            for start in tl.static_range(1, C):
                turned = tl.where(first == start, tl.load(numbers + (start + place) % C), turned)
            picked = tl.where(near % C == place, turned, picked)
    return picked


@triton.jit
def to_float(bytes, PTX: tl.constexpr):
    """Bytes as fp32. In PTX by moving each into the low mantissa bits of 2**23: conversions are slow instructions."""
    if PTX:
        placed = tl.inline_asm_elementwise(
            "prmt.b32 $0, $4, 0x4B000000, 0x7540; prmt.b32 $1, $4, 0x4B000000, 0x7541; "
            "prmt.b32 $2, $4, 0x4B000000, 0x7542; prmt.b32 $3, $4, 0x4B000000, 0x7543;",
            "=r,=r,=r,=r,r", [bytes], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
        numbers = placed - 8388608.0
    else:
        numbers = bytes.to(tl.float32)
    return numbers


@triton.jit
def multiply_add(x, scale, shift, INTERPRETED: tl.constexpr):
    """x * scale + shift in fp32, rounded once. The interpreter rounds twice, so there fp64 holds it exactly."""
    if INTERPRETED:
        result = (x.to(tl.float64) * scale.to(tl.float64) + shift.to(tl.float64)).to(tl.float32)
    else:
        x, scale = tl.broadcast(x, scale)
        x, shift = tl.broadcast(x, shift)
        result = tl.fma(x, scale, shift)
    return result


@triton.jit
def finish(mixed, pixels, column, plane, LAYOUT: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr):
    """Normalise (where mean is given) and round to the dtype that is stored."""
    C: tl.constexpr = LAYOUT.C
    NHWC: tl.constexpr = LAYOUT.NHWC
    VEC: tl.constexpr = TILE.VEC
    if pixels.scale is not None:
        shift = channel_of(pixels.shift, column, plane, C, NHWC, VEC)
        scale = channel_of(pixels.scale, column, plane, C, NHWC, VEC)
        if pixels.images.dtype.element_ty == tl.uint8:
            # Raw bytes, or their exact mixture.
            numbers = to_float(mixed, LAYOUT.PTX) if mixed.dtype == tl.uint8 else mixed
            mixed = multiply_add(numbers, scale, shift, LAYOUT.INTERPRETED)
        else:
            WIDE: tl.constexpr = tl.float64 if mixed.dtype == tl.float64 else tl.float32
            mixed = (mixed.to(WIDE) - shift) * scale
    elif tl.uint8 == DTYPE and mixed.dtype != tl.uint8:
        mixed = tl.floor(mixed + 0.5)
    return mixed.to(DTYPE)


@triton.jit
def row_bits(words, row, GRID: tl.constexpr):
    """The tokens of one grid row, as bits of a scalar word."""
    WORDS: tl.constexpr = GRID.WORDS
    WORD_ROWS: tl.constexpr = GRID.WORD_ROWS
    word = tl.arange(0, WORDS)[None, :]
    row = row.to(tl.uint32)
    mine = tl.where(word == (row // WORD_ROWS).to(tl.int32), words, 0)
    return tl.reduce_or(tl.ravel(mine), 0) >> ((row % WORD_ROWS) * GRID.GW).to(words.dtype)


@triton.jit
def token_bit(bits, column, SPAN: tl.constexpr):
    """Whether each of a row's columns belongs to a masked token of SPAN columns."""
    return ((bits >> (column // SPAN).to(bits.dtype)) & 1) != 0


@triton.jit
def columns(block, BLOCK: tl.constexpr, NEAR: tl.constexpr, WIDTH: tl.constexpr):
    """The columns [BLOCK] of a block of a line; beyond its end the last NEAR neighbours again."""
    column = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    if WIDTH % BLOCK != 0:
        column = column % NEAR + tl.minimum(column - column % NEAR, WIDTH - NEAR)
    return column


@triton.jit
def load_words(source, at, WORD: tl.constexpr, BYTES: tl.constexpr, NEAR: tl.constexpr):
    """The words at [LINES, COLS] places from an address on, NEAR neighbours of which are aligned to BYTES."""
    places = source.to(tl.pointer_type(WORD), bitcast=True) + at
    return tl.load(tl.max_contiguous(tl.multiple_of(places, (1, BYTES)), (1, NEAR)))


@triton.jit
def take_tokens(
    pixels,
    i,
    j,
    row,
    bits,  # of `row_bits`
    lam,
    GRID: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    MIXUP: tl.constexpr,
):
    """One row of tokens of out[i], each from images[i] or images[j]; with MIXUP all of them from both, `lam` of i.

    A tile is LINES lines of pixels by COLS neighbours in memory. The source of each VEC neighbours is found once for
    all channels and lines, so that what is left is one load and one store. Where nothing is converted, PACK values
    move as one 64-bit word.
    """
    P: tl.constexpr = GRID.P
    C: tl.constexpr = LAYOUT.C
    NHWC: tl.constexpr = LAYOUT.NHWC
    PACK: tl.constexpr = 1 if MIXUP else TILE.PACK
    LINES: tl.constexpr = max(1, TILE.LINES // 2) if MIXUP else TILE.LINES  # as many loads
    SPAN: tl.constexpr = (P * C if NHWC else P) // PACK
    WIDTH: tl.constexpr = (GRID.W * C if NHWC else GRID.W) // PACK
    PLANES: tl.constexpr = 1 if NHWC else C
    STEP: tl.constexpr = 1 if NHWC else LAYOUT.SW
    OUT_STEP: tl.constexpr = 1 if NHWC else LAYOUT.OW
    SC: tl.constexpr = LAYOUT.SC // PACK
    SH: tl.constexpr = LAYOUT.SH // PACK
    OC: tl.constexpr = LAYOUT.OC // PACK
    OH: tl.constexpr = LAYOUT.OH // PACK
    BLOCK: tl.constexpr = TILE.COLS // PACK
    NEAR: tl.constexpr = TILE.VEC // PACK
    TOGETHER: tl.constexpr = TILE.TOGETHER
    images = pixels.images
    out = pixels.out
    SIZE: tl.constexpr = images.dtype.element_ty.primitive_bitwidth // 8
    IN_BYTES: tl.constexpr = TILE.VEC * SIZE
    OUT_BYTES: tl.constexpr = TILE.VEC * (out.dtype.element_ty.primitive_bitwidth // 8)
    CHUNKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK * PLANES
    WORD: tl.constexpr = tl.int64 if PACK > 1 else images.dtype.element_ty
    OUT_WORD: tl.constexpr = tl.int64 if PACK > 1 else out.dtype.element_ty
    # The address of a token is found in bytes: one selection, one addition.
    images_stride = tl.cast(pixels.images_stride, tl.int64)
    own_row = (images + (i * images_stride + row.to(tl.int64) * (P * LAYOUT.SH))).to(
        tl.pointer_type(tl.int8), bitcast=True
    )
    apart = (j - i) * (images_stride * SIZE)
    out_row = (out + (i * pixels.out_stride + row.to(tl.int64) * (P * LAYOUT.OH))).to(
        tl.pointer_type(OUT_WORD), bitcast=True
    )
    for first in range(0, P, LINES):
        # Lanes beyond an edge move the last neighbours again: cheaper than a condition.
        line = first + tl.arange(0, LINES)
        line = (tl.minimum(line, P - 1) if P % LINES != 0 else line).to(tl.int64)[:, None]
        for group in tl.static_range(0, CHUNKS, TOGETHER):
            taken, others = (), ()
            for chunk in tl.static_range(group, min(group + TOGETHER, CHUNKS)):
                column = columns(chunk // PLANES, BLOCK, NEAR, WIDTH)  # [BLOCK]
                at = (column * STEP)[None, :] + (line * SH + (chunk % PLANES) * SC)
                source = own_row if MIXUP else own_row + tl.where(token_bit(bits, column, SPAN), apart, 0)[None, :]
                taken = taken + (load_words(source, at, WORD, IN_BYTES, NEAR),)  # type: ignore[assignment]  # noqa: RUF005
                if MIXUP:
                    others = others + (load_words(own_row + apart, at, WORD, IN_BYTES, NEAR),)  # type: ignore[assignment]  # noqa: RUF005
            for chunk in tl.static_range(group, min(group + TOGETHER, CHUNKS)):
                column = columns(chunk // PLANES, BLOCK, NEAR, WIDTH)
                value = taken[chunk - group]  # type: ignore[var-annotated]
                value = blend(value, others[chunk - group], lam) if MIXUP else value
                value = finish(value, pixels, column, chunk % PLANES, LAYOUT, TILE, OUT_WORD)
                at = (column * OUT_STEP)[None, :] + (line * OH + (chunk % PLANES) * OC)
                tl.store(tl.max_contiguous(tl.multiple_of(out_row + at, (1, OUT_BYTES)), (1, NEAR)), value)


@triton.jit
def swap_tokens(
    pixels,
    i,
    j,
    row,
    bits,  # of sample i
    bits_j,  # of sample j
    GRID: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row of tokens of a pair in place: `bits` go from images[j] to images[i], `bits_j` the other way."""
    P: tl.constexpr = GRID.P
    C: tl.constexpr = LAYOUT.C
    NHWC: tl.constexpr = LAYOUT.NHWC
    PACK: tl.constexpr = TILE.PACK
    LINES: tl.constexpr = TILE.LINES
    SPAN: tl.constexpr = (P * C if NHWC else P) // PACK
    WIDTH: tl.constexpr = (GRID.W * C if NHWC else GRID.W) // PACK
    PLANES: tl.constexpr = 1 if NHWC else C
    STEP: tl.constexpr = 1 if NHWC else LAYOUT.SW
    LINE: tl.constexpr = LAYOUT.SH // PACK
    PLANE: tl.constexpr = LAYOUT.SC // PACK
    BLOCK: tl.constexpr = TILE.COLS // PACK
    NEAR: tl.constexpr = TILE.VEC // PACK
    images = pixels.images
    if PACK > 1:
        images = images.to(tl.pointer_type(tl.int64), bitcast=True)
    images_stride = tl.cast(pixels.images_stride, tl.int64) // PACK
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
                at = plane * PLANE + line * LINE
                own = tl.load(images + own_at[None, :] + at, to_other)
                other = tl.load(images + other_at[None, :] + at, to_own)
                tl.store(images + own_at[None, :] + at, other, to_own)
                tl.store(images + other_at[None, :] + at, own, to_other)


@triton.jit
def source_pixels(drawn, bits, column, y, SPAN: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr,
                  RULE: tl.constexpr):  # fmt: skip
    """What a tile takes from the partner [LINES, COLS]: which pixels, and which VEC neighbours in part and in whole."""
    if RULE.WHOLE_TOKENS:
        exact = (y >= 0) & token_bit(bits, column, SPAN)[None, :]
        some, whole = exact, exact
    else:
        rows = (y >= drawn.top) & (y < drawn.bottom)
        chunk = (column // VEC) * VEC
        first, last = chunk // CHANNELS, (chunk + VEC - 1) // CHANNELS
        x = column // CHANNELS
        exact = rows & ((x >= drawn.left) & (x < drawn.right))[None, :]
        some = rows & ((last >= drawn.left) & (first < drawn.right))[None, :]
        whole = rows & ((first >= drawn.left) & (last < drawn.right))[None, :]
    blended = drawn.kind == CONST.value.MIXUP
    return exact, some | blended, whole & (drawn.kind != CONST.value.MIXUP)


@triton.jit
def blend_pixels(
    pixels,
    i,
    j,
    row,
    drawn,  # of sample i
    bits,
    drawn_j,  # of sample j, in place
    bits_j,
    GRID: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    RULE: tl.constexpr,
):
    """One row of tokens where a pixel may need both images (Mixup, rectangles); in place both halves of a pair."""
    P: tl.constexpr = GRID.P
    C: tl.constexpr = LAYOUT.C
    NHWC: tl.constexpr = LAYOUT.NHWC
    IN_PLACE: tl.constexpr = LAYOUT.IN_PLACE
    VEC: tl.constexpr = TILE.VEC
    COLS: tl.constexpr = TILE.COLS
    LINES: tl.constexpr = TILE.LINES
    SPAN: tl.constexpr = P * C if NHWC else P
    CHANNELS: tl.constexpr = C if NHWC else 1
    WIDTH: tl.constexpr = GRID.W * C if NHWC else GRID.W
    PLANES: tl.constexpr = 1 if NHWC else C
    STEP: tl.constexpr = 1 if NHWC else LAYOUT.SW
    OUT_STEP: tl.constexpr = 1 if NHWC else LAYOUT.OW
    DTYPE: tl.constexpr = pixels.out.dtype.element_ty
    images = pixels.images
    images_stride = tl.cast(pixels.images_stride, tl.int64)
    own_row = i * images_stride + row.to(tl.int64) * (P * LAYOUT.SH)
    other_row = j * images_stride + row.to(tl.int64) * (P * LAYOUT.SH)
    out_row = i * tl.cast(pixels.out_stride, tl.int64) + row.to(tl.int64) * (P * LAYOUT.OH)
    for first in range(0, P, LINES):
        line = first + tl.arange(0, LINES)[:, None]
        y = row * P + line
        for block in tl.static_range((WIDTH + COLS - 1) // COLS):
            column = block * COLS + tl.arange(0, COLS)  # [COLS]
            own_at = tl.max_contiguous(tl.multiple_of(own_row + column * STEP, VEC), VEC)
            other_at = tl.max_contiguous(tl.multiple_of(other_row + column * STEP, VEC), VEC)
            out_at = tl.max_contiguous(tl.multiple_of(out_row + column * OUT_STEP, VEC), VEC)
            valid = ((column < WIDTH) if WIDTH % COLS != 0 else (column >= 0))[None, :] & (line < P)
            exact, some, whole = source_pixels(drawn, bits, column, y, SPAN, CHANNELS, VEC, RULE)
            to_own, keeps_own = valid & some, valid & ~whole
            if IN_PLACE:
                exact_j, some_j, whole_j = source_pixels(drawn_j, bits_j, column, y, SPAN, CHANNELS, VEC, RULE)
                to_other = valid & some_j
            for plane in tl.static_range(PLANES):
                at = plane * LAYOUT.SC + line * LAYOUT.SH
                own_places, other_places = images + own_at[None, :] + at, images + other_at[None, :] + at
                if IN_PLACE:
                    keeps_other = valid & ~whole_j
                    own = tl.load(own_places, (to_own & keeps_own) | to_other, 0)
                    other = tl.load(other_places, (to_other & keeps_other) | to_own, 0)
                    mixed, mixed_j = tl.where(exact, other, own), tl.where(exact_j, own, other)
                    if RULE.HAS_MIXUP:
                        blended = finish(blend(own, other, drawn.lam), pixels, column, plane, LAYOUT, TILE, DTYPE)
                        blended_j = finish(blend(other, own, drawn_j.lam), pixels, column, plane, LAYOUT, TILE, DTYPE)
                        mixed = tl.where(drawn.kind == CONST.value.MIXUP, blended, mixed)
                        mixed_j = tl.where(drawn_j.kind == CONST.value.MIXUP, blended_j, mixed_j)
                    tl.store(own_places, mixed, to_own)
                    tl.store(other_places, mixed_j, to_other)
                else:
                    own = tl.load(own_places, keeps_own, 0)
                    other = tl.load(other_places, to_own, 0)
                    mixed = finish(tl.where(exact, other, own), pixels, column, plane, LAYOUT, TILE, DTYPE)
                    if RULE.HAS_MIXUP:
                        blended = finish(blend(own, other, drawn.lam), pixels, column, plane, LAYOUT, TILE, DTYPE)
                        mixed = tl.where((drawn.kind == CONST.value.MIXUP) & (i != j), blended, mixed)
                    out_places = pixels.out + out_at[None, :] + (plane * LAYOUT.OC + line * LAYOUT.OH)
                    tl.store(out_places, mixed, valid)


@triton.jit
def mix_rows(
    pixels,
    i,
    j,
    program,
    drawn,
    drawn_j,
    GRID: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
    RULE: tl.constexpr,
):
    """ROWS rows of tokens of sample i; in place of sample j too."""
    # A sample that is its own partner is left as it is, in every branch.
    mixup = (drawn.kind == CONST.value.MIXUP) & (i != j)
    row = program * TILE.ROWS
    last = tl.minimum(row + TILE.ROWS, GRID.GH)
    while row < last:
        bits = row_bits(drawn.mask, row, GRID)
        bits_j = row_bits(drawn_j.mask, row, GRID) if LAYOUT.IN_PLACE else bits
        if not RULE.WHOLE_TOKENS or (RULE.HAS_MIXUP and LAYOUT.IN_PLACE):
            blend_pixels(pixels, i, j, row, drawn, bits, drawn_j, bits_j, GRID, LAYOUT, TILE, RULE)
        elif LAYOUT.IN_PLACE:
            swap_tokens(pixels, i, j, row, bits, bits_j, GRID, LAYOUT, TILE)
        elif RULE.HAS_MIXUP and mixup:
            take_tokens(pixels, i, j, row, bits, drawn.lam, GRID, LAYOUT, TILE, True)
        else:
            take_tokens(pixels, i, j, row, bits, drawn.lam, GRID, LAYOUT, TILE, False)
        row += 1
