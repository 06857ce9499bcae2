"""The fused kernel: one launch draws the masks, mixes the pixels, pools the maps and writes the targets."""

import triton
import triton.language as tl

from .draw import draw, load_ratios, partner_of
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
    if (not moves) | (not LAYOUT.IN_PLACE) | (i < j):
        drawn = draw(seed, seed_high, sample_offset, i, j, mask, plan, tables, ratios, MASK_RULE, GRID, RULE, PTX)
        if not moves:
            write_targets(pairs, evidence, results, i, j, side, drawn, smoothing, GRID, RULE, MAPS)
        elif images is not None:
            pixels = Pixels(images, out, strides.images, strides.out, normalisation.shift, normalisation.scale)
            drawn_j = drawn
            if LAYOUT.IN_PLACE and RULE.DRAW_EACH:
                drawn_j = draw(
                    seed, seed_high, sample_offset, j, i, mask, plan, tables, ratios, MASK_RULE, GRID, RULE, PTX
                )
            mix_rows(pixels, i, j, program, drawn, drawn_j, GRID, LAYOUT, TILE, RULE)
