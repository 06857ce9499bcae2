"""The fused kernel: one launch draws the masks, mixes the pixels, pools the maps and writes the targets."""

import triton
import triton.language as tl

from .draw import draw, load_header, partner_of, read_seed, sample_of
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
    if TILE.TARGETS_FIRST:
        of_targets, of_pixels = n, n - 2 * batch
        moves = of_pixels >= 0
    else:
        of_targets, of_pixels = n - batch * PIXELS, n
        moves = n < batch * PIXELS
    i = of_targets >> 1
    program = i
    if PIXELS > 0:
        own = (of_pixels.to(tl.uint32) // PIXELS).to(tl.int32)
        program = of_pixels - own * PIXELS
        i = tl.where(moves, own, i)
    return moves, program, i.to(tl.int64), of_targets & 1


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
    """PIXELS programs for each sample, one for each ROWS token rows, and two for its targets.

    Those of all samples' pixels come after those of the targets where TARGETS_FIRST, else before them.

    Every program draws its sample's mask anew, in registers: cheaper than passing it on. In place the program of the
    pair's first sample moves both, and `partner` must be its own inverse (a sample for which it is not is left alone).
    """
    PTX: tl.constexpr = LAYOUT.PTX
    moves, program, i, side = place_of(tl.program_id(0), batch, TILE)
    j = partner_of(pairs.partner, i, batch)
    if LAYOUT.IN_PLACE:
        j = tl.where(partner_of(pairs.partner, j, batch) == i, j, i)
    key = read_seed(seed, seed_high)
    sample = sample_of(sample_offset, i, j, RULE)
    # Before the look-ahead: behind megabytes of pixels, what this loads from a table would come last.
    loaded = load_header(key, sample, tables, RULE)
    if PTX:
        # In this order, here and below, the assembler puts pixels first: no jump to code that is not in the cache yet.
        if not moves:
            look_ahead_of_targets(pairs, evidence, i, j, side, RULE, MAPS)
        elif images is not None:
            look_ahead_of_pixels(images, strides.images, normalisation, i, program, GRID, LAYOUT, TILE)
    # An image that is its own partner moves nowhere, but may be erased.
    mine = i <= j if RULE.ERASE else i < j
    if (not moves) | (not LAYOUT.IN_PLACE) | mine:
        drawn = draw(key, sample, loaded, i, mask, plan, tables, MASK_RULE, GRID, RULE, PTX)
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
                sample_j = sample_of(sample_offset, j, i, RULE)
                loaded_j = load_header(key, sample_j, tables, RULE)
                drawn_j = draw(key, sample_j, loaded_j, j, mask, plan, tables, MASK_RULE, GRID, RULE, PTX)
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
