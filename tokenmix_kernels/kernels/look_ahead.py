"""What a program asks of the L2 cache before it draws its mask. It changes no result.

All programs of a batch draw before they load a pixel or a map, and memory would idle meanwhile.
"""

import triton
import triton.language as tl

__all__ = ["look_ahead_of_pixels", "look_ahead_of_targets"]

SECTOR = tl.constexpr(32)  # bytes that memory moves at least
LANES = tl.constexpr(128)


@triton.jit
def prefetch(address):
    """Bring the sectors at `address` into the L2 cache. It takes no register, waits for nothing and never traps."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_bytes(start, COUNT: tl.constexpr):
    """Prefetch COUNT bytes from the address `start` on."""
    start = start.to(tl.pointer_type(tl.int8), bitcast=True)
    for first in tl.static_range(0, COUNT, LANES * SECTOR):
        prefetch(start + tl.minimum(first + tl.arange(0, LANES) * SECTOR, COUNT - 1))


@triton.jit
def look_ahead_of_pixels(
    images, images_stride, normalisation, i, program, GRID: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Prefetch the first AHEAD lines of the program's rows of sample i, and what normalises them."""
    if TILE.AHEAD > 0:
        if normalisation.scale is not None:
            prefetch_bytes(normalisation.scale, 4 * LAYOUT.C)
            prefetch_bytes(normalisation.shift, 4 * LAYOUT.C)
        SIZE: tl.constexpr = images.dtype.element_ty.primitive_bitwidth // 8
        PLANES: tl.constexpr = 1 if LAYOUT.NHWC else LAYOUT.C
        SPAN: tl.constexpr = TILE.AHEAD * LAYOUT.SH * SIZE  # bytes of a plane
        first_line = program.to(tl.int64) * (TILE.ROWS * GRID.P)
        start = images + (i * tl.cast(images_stride, tl.int64) + first_line * LAYOUT.SH)
        start = start.to(tl.pointer_type(tl.int8), bitcast=True)
        for plane in tl.static_range(PLANES):
            prefetch_bytes(start + plane * (LAYOUT.SC * SIZE), SPAN)


@triton.jit
def look_ahead_of_targets(pairs, evidence, i, j, side, RULE: tl.constexpr, MAPS: tl.constexpr):
    """Prefetch labels, box and maps of one side of a pair."""
    n = tl.where(side == 0, i, j)
    if RULE.LABEL_ROWS:
        LABEL_SIZE: tl.constexpr = (pairs.labels.dtype.element_ty.primitive_bitwidth + 7) // 8
        prefetch_bytes(pairs.labels + n * pairs.labels_stride, RULE.K * LABEL_SIZE)
    elif pairs.labels is not None:
        prefetch(pairs.labels + i * pairs.labels_stride)
        prefetch(pairs.labels + j * pairs.labels_stride)
    if evidence.boxes is not None:
        prefetch(evidence.boxes + n * evidence.boxes_stride)
    if evidence.affines is not None:
        prefetch(evidence.affines + n * 6)
    if evidence.maps is not None and (MAPS.CLASSES == 0 or evidence.indices is not None):
        if evidence.ids is not None:
            n = tl.load(evidence.ids + n).to(tl.int64)
            n = tl.where((n >= 0) & (n < evidence.rows), n, 0)
        COUNT: tl.constexpr = max(1, MAPS.CLASSES) * MAPS.MH * MAPS.MW
        if evidence.indices is not None:
            INDEX_SIZE: tl.constexpr = evidence.indices.dtype.element_ty.primitive_bitwidth // 8
            prefetch_bytes(evidence.indices + n * evidence.indices_stride, COUNT * INDEX_SIZE)
        SIZE: tl.constexpr = evidence.maps.dtype.element_ty.primitive_bitwidth // 8
        prefetch_bytes(evidence.maps + n * evidence.maps_stride, COUNT * SIZE)
