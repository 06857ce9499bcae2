"""The settings of a mix, the table of mask rules, and the integers that reference and kernels derive from them."""

import json
from functools import lru_cache
from typing import Any, NamedTuple

import torch

__all__ = [
    "BATCH", "COPY", "ELEM", "ERASE_MODES", "GIVEN", "MASK_RULES", "MIXUP", "MODES", "PAIR", "ErasePlan", "MaskRule",
    "Plan", "Settings", "area_bits", "as_text", "erase_bits", "from_text", "has_drawn_lam", "make_erase_plan",
    "make_plan",
]  # fmt: skip

# Which samples share a draw.
BATCH, PAIR, ELEM = 0, 1, 2
MODES = {"batch": BATCH, "pair": PAIR, "elem": ELEM}
# What erased pixels become: 0, one colour a rectangle, noise.
ERASE_MODES = ("const", "rand", "pixel")
# Kinds of a sample beside the mask rules: left as it is, blended.
COPY, MIXUP = 0, 1


class MaskRule(NamedTuple):
    """How the second branch takes pixels from the partner.

    A rule NAME of whole tokens is a function `NAME_mask` in `reference/draw.py` and in `kernels/draw.py`.

    Attributes:
        kind: number of samples that are mixed by this rule.
        whole_tokens: False where a rectangle of pixels is taken, which may cut tokens.
        drawn: False where the mask is an input.
        as_in_paper: whether targets are smoothed and tokens added to the drawn share as the TokenMix paper does; False:
            targets are smoothed as timm does, and no tokens are added unless asked for.
    """

    kind: int
    whole_tokens: bool = True
    drawn: bool = True
    as_in_paper: bool = True


MASK_RULES = {
    "block": MaskRule(2),
    "random": MaskRule(3),
    "cutmix": MaskRule(4, whole_tokens=False, as_in_paper=False),
    "given": MaskRule(5, drawn=False),
    "grid": MaskRule(6, as_in_paper=False),
}
GIVEN = MASK_RULES["given"].kind


class Settings(NamedTuple):
    """What is constant from step to step.

    Attributes:
        num_classes: K, width of the targets.
        patch_size: P, side of a token in pixels.
        mask_type: a name of `MASK_RULES`.
        mode: which samples share a draw: 'batch', 'pair' or 'elem'.
        lam: share kept from the own image in the second branch; below 0 it comes from Beta(cutmix_alpha, cutmix_alpha).
        minimum_tokens: tokens added to the (1 - lam) * G that are masked; -1 for the rule's own number: the paper's 14
            of 196, in proportion, or none.
        mixup_alpha: the first branch is Mixup with this Beta; 0 switches the branch off.
        cutmix_alpha: the Beta of the second branch; 0 switches the branch off.
        prob: probability that a draw mixes at all.
        switch_prob: probability of the second branch where both are on.
        minmax: (low, high) share of the image's sides of a CutMix rectangle, or empty.
        correct_lam: CutMix weights follow the clipped area, not the drawn lam.
        label_smoothing: epsilon of the targets.
        mean, std: per-channel normalisation, or empty.
        grid_cell: side of a grid mask's cells in tokens.
        shares: the mask that is returned is float32, the share of each token that comes from the partner.
        multi_label: labels [B, K] are yes or no for each class, smoothed towards 1 / 2; else they are shares of the
            classes, smoothed towards 1 / K.
        clamp_targets: targets are at most 1.
        erase_prob: probability that an image is erased in part, before it is mixed; 0 switches it off.
        erase_mode: a name of `ERASE_MODES`.
        erase_area: (smallest, largest) share of the image's area that all its rectangles have together.
        erase_aspect: (smallest, largest) height over width of a rectangle.
        erase_count: (smallest, largest) number of rectangles of an image.
        erase_evidence: erased pixels carry no evidence.
        erase_splits: the first batch // erase_splits images of a batch are not erased; 0 or 1: all are.
    """

    num_classes: int
    patch_size: int = 16
    mask_type: str = "block"
    mode: str = "batch"
    lam: float = 0.5
    minimum_tokens: int = -1
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    switch_prob: float = 1.0
    minmax: tuple[float, ...] = ()
    correct_lam: bool = True
    label_smoothing: float = 0.1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    grid_cell: int = 4
    shares: bool = False
    multi_label: bool = False
    clamp_targets: bool = False
    erase_prob: float = 0.0
    erase_mode: str = "const"
    erase_area: tuple[float, ...] = (0.02, 1 / 3)
    erase_aspect: tuple[float, ...] = (0.3, 1 / 0.3)
    erase_count: tuple[int, ...] = (1, 1)
    erase_evidence: bool = False
    erase_splits: int = 0


def as_text(settings: Settings) -> str:
    """The settings as JSON, as the operators take them. A traced graph holds the text as a constant."""
    # json.dumps and caches cannot be traced, string formatting can.
    return write_text(settings) if torch.compiler.is_compiling() else cached_text(settings)


def write_text(settings: Settings) -> str:
    fields = [f'"{name}": {literal(value)}' for name, value in zip(Settings._fields, settings, strict=True)]
    return "{" + ", ".join(fields) + "}"


def literal(value: Any) -> str:
    """A field in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join([literal(part) for part in value]) + "]"
    return f"{value}"


cached_text = lru_cache(maxsize=256)(write_text)


@lru_cache(maxsize=256)
def from_text(text: str) -> Settings:
    """Settings from an operator's argument: a JSON object of `Settings` fields, those with defaults may be left out.

    Raises:
        ValueError: not a JSON object, or one with other fields.
    """
    try:
        fields = json.loads(text)
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
        }
        return Settings(**given)
    except (AttributeError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"settings must be a JSON object of the fields of Settings, got {text!r}: {error}") from None


class Plan(NamedTuple):
    """Integers of a draw for one grid, in the order in which the kernel takes them.

    Attributes:
        mixes: a draw mixes when its 24-bit random number is below this.
        switches: it takes the second branch when its 24-bit random number is below this.
        lam: constant lam in units of 2**-16; -1 where it is drawn.
        tokens: N, tokens to mask for a constant lam; -1 where it is drawn.
        minimum_tokens: tokens to mask beside those of a drawn lam.
        low_h, span_h, low_w, span_w: smallest height of a rectangle with minmax and the number of heights to choose
            from, the same for its width; zeros without minmax.
    """

    mixes: int
    switches: int
    lam: int
    tokens: int
    minimum_tokens: int
    low_h: int = 0
    span_h: int = 0
    low_w: int = 0
    span_w: int = 0


@lru_cache(maxsize=256)
def make_plan(settings: Settings, height: int, width: int) -> Plan:
    """The integers that a draw is made with, for images of height x width pixels."""
    count = (height // settings.patch_size) * (width // settings.patch_size)
    if settings.mixup_alpha > 0 and settings.cutmix_alpha > 0:
        switch_prob = settings.switch_prob
    else:
        switch_prob = 1.0 if settings.cutmix_alpha > 0 else 0.0
    least = min(settings.minimum_tokens, count)
    if settings.minimum_tokens < 0:
        least = (count + 7) // 14 if MASK_RULES[settings.mask_type].as_in_paper else 0
    rectangle: tuple[int, ...] = ()
    if settings.minmax:
        low, high = settings.minmax
        for side in (height, width):
            rectangle += (int(side * low), max(int(side * high) - int(side * low), 1))
    constant = settings.lam >= 0
    return Plan(
        round(settings.prob * (1 << 24)),
        round(switch_prob * (1 << 24)),
        round(settings.lam * 65536) if constant else -1,
        min(count, int((1 - settings.lam) * count) + least) if constant else -1,
        least,
        *rectangle,
    )


def has_drawn_lam(settings: Settings) -> bool:
    """Whether lam of the second branch comes from Beta(cutmix_alpha, cutmix_alpha)."""
    return settings.lam < 0 and settings.cutmix_alpha > 0 and MASK_RULES[settings.mask_type].drawn


def area_bits(count: int) -> int:
    """Fraction bits of a rectangle's area on a grid of `count` tokens.

    An area below 2**24 is exact in fp32, so its square root's integer part needs one rounded instruction.
    """
    return min(16, (24 - count.bit_length()) & ~1)


def erase_bits(count: int) -> int:
    """Fraction bits of an erased rectangle's area in an image of `count` pixels: an even number, areas below 2**31."""
    return (31 - count.bit_length()) & ~1


class ErasePlan(NamedTuple):
    """Integers of the erased rectangles of images of one size.

    Attributes:
        erases: an image is erased when its 24-bit random number is below this.
        low, span: smallest area of an image's rectangles together, in units of 2**-erase_bits pixels, and the number of
            areas to choose from.
        low_count, span_count: the same for the number of rectangles.
    """

    erases: int
    low: int
    span: int
    low_count: int
    span_count: int


@lru_cache(maxsize=256)
def make_erase_plan(settings: Settings, height: int, width: int) -> ErasePlan:
    """The integers that rectangles are drawn with, for images of height x width pixels."""
    unit = height * width << erase_bits(height * width)
    low, high = (round(share * unit) for share in settings.erase_area)
    least, most = settings.erase_count
    return ErasePlan(round(settings.erase_prob * (1 << 24)), low, max(high - low, 1), least, most - least + 1)
