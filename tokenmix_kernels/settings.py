"""The settings of one mix, as plain numbers, and what the reference and the kernels derive from them."""

from functools import lru_cache
from typing import NamedTuple

__all__ = ["BATCH", "BLOCK", "COPY", "CUTMIX", "ELEM", "GIVEN", "MIXUP", "PAIR", "RANDOM", "Plan", "Settings", "plan"]

# Who shares a draw.
BATCH, PAIR, ELEM = 0, 1, 2
# What a sample's draw says: leave it, blend it, or take tokens or a rectangle of pixels from the partner.
COPY, MIXUP, BLOCK, RANDOM, CUTMIX, GIVEN = 0, 1, 2, 3, 4, 5

MODES = {"batch": BATCH, "pair": PAIR, "elem": ELEM}
MASK_TYPES = {"block": BLOCK, "random": RANDOM, "cutmix": CUTMIX, "given": GIVEN}


class Settings(NamedTuple):
    """What is constant from step to step. Every field is a plain number, string or list, as an operator's schema wants.

    Attributes:
        num_classes: K, width of the targets.
        patch_size: P, side of a token in pixels.
        mask_type: 'block', 'random', 'cutmix' or 'given' (the mask is an input).
        mode: who shares a draw: 'batch', 'pair' or 'elem'.
        lam: share kept from the own image in the second branch; below 0 it comes from Beta(cutmix_alpha, cutmix_alpha).
        minimum_tokens: tokens added to the (1 - lam) * G that are masked.
        mixup_alpha: the first branch is Mixup with this Beta; 0 switches the branch off.
        cutmix_alpha: the Beta of the second branch; 0 switches the branch off.
        prob: probability that a draw mixes at all.
        switch_prob: probability of the second branch where both are on.
        minmax: (low, high) share of the image's sides of a CutMix rectangle, or empty.
        correct_lam: CutMix weights follow the clipped area, not the drawn lam.
        label_smoothing: epsilon of the targets.
        mean, std: per-channel normalisation, or empty.
        box_format: how boxes are stored: 'xyxy', or a packed label-map batch's 'crop' (top, left, height, width) or its
            'crop_swapped' reading.
    """

    num_classes: int
    patch_size: int = 16
    mask_type: str = "block"
    mode: str = "batch"
    lam: float = 0.5
    minimum_tokens: int = 14
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    switch_prob: float = 1.0
    minmax: tuple[float, ...] = ()
    correct_lam: bool = True
    label_smoothing: float = 0.1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    box_format: str = "xyxy"


class Plan(NamedTuple):
    """Integers of a draw, for one grid.

    Attributes:
        mixes: a draw mixes when its 24-bit random number is below this.
        switches: it takes the second branch when its 24-bit random number is below this.
        tokens: N, tokens to mask for a constant lam; -1 where lam is drawn.
        lam: constant lam in units of 2**-16; -1 where it is drawn.
        area_bits: k, fraction bits of a rectangle's area.
        cuts: (lowest, highest) height, (lowest, highest) width of a rectangle with minmax, or zeros.
    """

    mixes: int
    switches: int
    tokens: int
    lam: int
    area_bits: int
    cuts: tuple[int, int, int, int]


@lru_cache(maxsize=256)
def plan(settings: Settings, height: int, width: int) -> Plan:
    """The integers that a draw is made with, for images of height x width pixels."""
    grid_h, grid_w = height // settings.patch_size, width // settings.patch_size
    tokens_in_all = grid_h * grid_w
    if settings.mixup_alpha > 0 and settings.cutmix_alpha > 0:
        switch_prob = settings.switch_prob
    else:
        switch_prob = 1.0 if settings.cutmix_alpha > 0 else 0.0
    constant = settings.lam >= 0
    tokens = min(tokens_in_all, int((1 - settings.lam) * tokens_in_all) + settings.minimum_tokens)
    cuts = (0, 0, 0, 0)
    if settings.minmax:
        low, high = settings.minmax
        cuts = (int(height * low), int(height * high), int(width * low), int(width * high))
    return Plan(
        mixes=round(settings.prob * (1 << 24)),
        switches=round(switch_prob * (1 << 24)),
        tokens=tokens if constant else -1,
        lam=round(settings.lam * 65536) if constant else -1,
        # An area below 2**24 is exact in fp32, so its square root's integer part needs one rounded instruction.
        area_bits=min(16, (24 - tokens_in_all.bit_length()) & ~1),
        cuts=cuts,
    )
