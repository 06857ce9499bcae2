"""What a program asks of the L2 cache before it draws its mask. It changes no result."""

import triton
import triton.language as tl

__all__ = ["look_ahead"]

SECTOR = tl.constexpr(32)  # bytes that memory moves at least
LANES = tl.constexpr(128)


@triton.jit
def prefetch(address):
    """Bring the sectors at `address` into the L2 cache. It takes no register, waits for nothing and never traps."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_table(table, BYTES: tl.constexpr):
    """Prefetch a table of BYTES bytes."""
    start = table.to(tl.pointer_type(tl.int8), bitcast=True)
    for first in tl.static_range(0, BYTES, LANES * SECTOR):
        prefetch(start + tl.minimum(first + tl.arange(0, LANES) * SECTOR, BYTES - 1))


@triton.jit
def look_ahead(
    images,
    images_stride,
    normalisation,
    tables,
    i,
    program,
    GRID: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Prefetch what the draw waits for, then the first AHEAD lines of the program's rows of sample i.

    All programs of a batch draw before they load a pixel, and memory would idle meanwhile. The tables come first: behind
    megabytes of pixels the draw would wait longer than it gains.
    """
    if tables.ratio is not None:
        prefetch_table(tables.ratio, 4096)
    if normalisation.mean is not None:
        prefetch_table(normalisation.mean, 4 * LAYOUT.C)
        prefetch_table(normalisation.rstd, 4 * LAYOUT.C)
    SIZE: tl.constexpr = images.dtype.element_ty.primitive_bitwidth // 8
    PLANES: tl.constexpr = 1 if LAYOUT.NHWC else LAYOUT.C
    SPAN: tl.constexpr = TILE.AHEAD * LAYOUT.SH * SIZE  # bytes of a plane
    first_line = program.to(tl.int64) * (TILE.ROWS * GRID.P)
    start = images + (i * tl.cast(images_stride, tl.int64) + first_line * LAYOUT.SH)
    start = start.to(tl.pointer_type(tl.int8), bitcast=True)
    for plane in tl.static_range(PLANES):
        for first in tl.static_range(0, SPAN, LANES * SECTOR):
            at = tl.minimum(first + tl.arange(0, LANES) * SECTOR, SPAN - 1)
            prefetch(start + (plane * (LAYOUT.SC * SIZE) + at))
