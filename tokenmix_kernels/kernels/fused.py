"""The fused kernel: one launch draws the masks, mixes the pixels, pools the maps and writes the targets."""

import triton
import triton.language as tl

from .draw import draw, load_ratios, partner_of, read_seed
from .erasing import draw_rectangles, erase_rows, erases_rows
from .groups import Pixels
from .look_ahead import look_ahead_of_pixels, look_ahead_of_targets
from .pixels import mix_rows
from .targets import write_targets

__all__ = ["mix_kernel"]


@triton.jit
def place_of(n, batch, TILE: tl.constexpr):
    """What program n does: (whether it moves pixels, program of its sample, sample, side of the targets)."""
    PIXELS: tl.constexpr = TILE.PIXELS
    beyond = n - batch * PIXELS
    i = beyond >> 1
    program = i
    moves = n < batch * PIXELS
    if PIXELS > 0:
        own = (n.to(tl.uint32) // PIXELS).to(tl.int32)
        program = n - own * PIXELS
        i = tl.where(moves, own, i)
    return moves, program, i.to(tl.int64), beyond & 1


@triton.jit(do_not_specialize=["seed", "seed_high", "sample_offset", "batch"])
def mix_kernel(
    images,  # [B, C, H, W], or None: no pixels
    out,  # of the same shape, `images` itself in place
    strides,  # groups.Strides
    normalisation,  # groups.Normalisation
    pairs,  # groups.Pairs
    evidence,  # groups.EvidencePointers
    mask,  # bytes [B, GH, GW] where it is given
    results,  # groups.Results
    tables,  # groups.Tables
    plan,  # settings.Plan
    erasing,  # groups.Erasing, or None
    seed,  # low half of the seed, or a pointer to all of it
    seed_high,  # high half, or None
    sample_offset,  # of the batch's first sample
    batch,  # B
    smoothing,  # epsilon of the targets
    MASK_RULE: tl.constexpr,  # a function of draw.py, or None for rectangles
    GRID: tl.constexpr,  # groups.Grid
    LAYOUT: tl.constexpr,  # groups.Layout
    TILE: tl.constexpr,  # groups.Tile
    RULE: tl.constexpr,  # groups.Rule
    MAPS: tl.constexpr,  # groups.MapForm
):
    """PIXELS programs for each sample, one for each ROWS token rows; after those of all samples two for its targets.

    Every program draws its sample's mask anew, in registers: cheaper than passing it on. In place the program of the
    pair's first sample moves both, and `partner` must be its own inverse (a sample for which it is not is left alone).
    """
    PTX: tl.constexpr = LAYOUT.PTX
    moves, program, i, side = place_of(tl.program_id(0), batch, TILE)
    j = partner_of(pairs.partner, i, batch)
    if LAYOUT.IN_PLACE:
        j = tl.where(partner_of(pairs.partner, j, batch) == i, j, i)
    ratios = load_ratios(tables)  # before the look-ahead: behind megabytes of pixels the draw would wait for it
    if PTX:
        # In this order, here and below, the assembler puts pixels first: no jump to code that is not in the cache yet.
        if not moves:
            look_ahead_of_targets(pairs, evidence, i, j, side, RULE, MAPS)
        elif images is not None:
            look_ahead_of_pixels(images, strides.images, normalisation, i, program, GRID, LAYOUT, TILE)
    # An image that is its own partner moves nowhere, but may be erased.
    mine = i <= j if RULE.ERASE else i < j
    if (not moves) | (not LAYOUT.IN_PLACE) | mine:
        drawn = draw(seed, seed_high, sample_offset, i, j, mask, plan, tables, ratios, MASK_RULE, GRID, RULE, PTX)
        if not moves:
            gone, gone_j = None, None
            if RULE.ERASE_EVIDENCE:
                gone, gone_j = draw_both(seed, seed_high, sample_offset, i, j, batch, erasing, GRID, RULE)
            write_targets(
                pairs, evidence, results, i, j, side, drawn, gone, gone_j, smoothing, GRID, RULE, MAPS
            )  # fmt: skip
        elif images is not None:
            pixels = Pixels(images, out, strides.images, strides.out, normalisation.shift, normalisation.scale)
            drawn_j = drawn
            if LAYOUT.IN_PLACE and RULE.DRAW_EACH:
                drawn_j = draw(
                    seed, seed_high, sample_offset, j, i, mask, plan, tables, ratios, MASK_RULE, GRID, RULE, PTX
                )
            if RULE.ERASE:
                erased, erased_j = draw_both(seed, seed_high, sample_offset, i, j, batch, erasing, GRID, RULE)
                mix_and_erase(
                    pixels, i, j, program, drawn, drawn_j, erased, erased_j, GRID, LAYOUT, TILE, RULE
                )  # fmt: skip
            else:
                mix_rows(pixels, i, j, program, drawn, drawn_j, GRID, LAYOUT, TILE, RULE)


@triton.jit
def draw_both(seed, seed_high, sample_offset, i, j, batch, erasing, GRID: tl.constexpr, RULE: tl.constexpr):
    """What is erased of images i and j. It depends on an image's own place among all samples, whatever `mode` says."""
    key = read_seed(seed, seed_high)
    first = tl.cast(sample_offset, tl.int64) + tl.zeros([], tl.int64)
    untouched = batch // RULE.ERASE_SPLITS if RULE.ERASE_SPLITS > 1 else 0
    return (
        draw_rectangles(key, first + i, i >= untouched, erasing, GRID, RULE),
        draw_rectangles(key, first + j, j >= untouched, erasing, GRID, RULE),
    )


@triton.jit
def mix_and_erase(pixels, i, j, program, drawn, drawn_j, erased, erased_j,
                  GRID: tl.constexpr, LAYOUT: tl.constexpr, TILE: tl.constexpr, RULE: tl.constexpr):  # fmt: skip
    """`mix_rows`, and what is erased of both images. In place they are erased before they are mixed, else after it."""
    erases = erases_rows(erased, erased_j, program, GRID, TILE)
    if LAYOUT.IN_PLACE:
        if erases:
            erase_rows(pixels, i, j, program, drawn, erased, erased_j, GRID, LAYOUT, TILE, RULE)
            tl.debug_barrier()
        if i != j:
            mix_rows(pixels, i, j, program, drawn, drawn_j, GRID, LAYOUT, TILE, RULE)
    else:
        mix_rows(pixels, i, j, program, drawn, drawn_j, GRID, LAYOUT, TILE, RULE)
        if erases:
            tl.debug_barrier()
            erase_rows(pixels, i, j, program, drawn, erased, erased_j, GRID, LAYOUT, TILE, RULE)
