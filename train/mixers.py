"""The mixers as named recipes of masks, evidence and loss, with the numbers of each paper, in one table."""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenmix_kernels.erasing import MOST_RECTANGLES

__all__ = [
    "EVIDENCE", "LITE0", "MIXERS", "PROGRESSIVE", "MixerRecipe", "attention_ratio", "cell_of", "check", "evidence_of",
    "ratio_of", "teacher_of",
]  # fmt: skip

EVIDENCE = ("attention", "teacher", "maps", "area")
LITE0 = "tf_efficientnet_lite0"  # the demo's teacher
PROGRESSIVE = "progressive"
LARGE_GRID = 12  # tokens at the shorter side from which a grid mask has MixPro's cells of 4 tokens


class MixerRecipe(NamedTuple):
    """What a value of --mixer stands for.

    Attributes:
        mask_type: mask rule of the second branch; None: there is none, or --mask-type says.
        lam: share kept by the second branch, or 'beta'.
        mixup: whether there is a Mixup branch (with --mixup above 0).
        masks: whether there is a second branch, which evidence can be pooled over.
        attention_ratio: share of the attention in the weights, with --evidence attention.
        flags: values of other flags where the command line, or a recipe that names this mixer, does not set them.
    """

    mask_type: str | None = None
    lam: float | str = 0.5
    mixup: bool = False
    masks: bool = True
    attention_ratio: float | str = 0.5
    flags: Mapping[str, Any] = {}


# The flags' own defaults are DeiT's, which the TokenMix paper takes: Mixup 0.8 and the second branch with probability
# 0.5 each, smoothing 0.1, and the paper's binary cross-entropy. Whether a batch shares its draws (--mixup-mode) stays
# as it is. TokenMix and CutMix have no number of their own for the attention's share: they take TransMix's.
MIXERS = {
    "tokenmix": MixerRecipe(mixup=True),  # arXiv 2207.08409
    "cutmix": MixerRecipe(mask_type="cutmix", lam="beta"),  # arXiv 1905.04899
    "mixup": MixerRecipe(mixup=True, masks=False),  # arXiv 1710.09412
    "none": MixerRecipe(masks=False),
    # arXiv 2111.09833, section 4.1 and its published DeiT-S configuration
    "transmix": MixerRecipe(
        mask_type="cutmix",
        lam="beta",
        mixup=True,
        attention_ratio=0.5,
        flags={
            "evidence": "attention", "mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.8, "smoothing": 0.1,
            "bce_loss": False,
        },
    ),
    # arXiv 2304.12043, section 4.1 and its published DeiT-S configuration, whose targets are not smoothed
    "mixpro": MixerRecipe(
        mask_type="grid",
        lam="beta",
        mixup=True,
        attention_ratio=PROGRESSIVE,
        flags={
            "evidence": "attention", "mixup": 0.8, "cutmix": 1.0, "mixup_switch_prob": 0.5, "smoothing": 0.0,
            "bce_loss": False,
        },
    ),
}  # fmt: skip


def attention_ratio(text: str) -> str:
    """A value of --attention-ratio as it is, if it is one.

    Raises:
        argparse.ArgumentTypeError: neither a share in [0, 1] nor 'progressive'.
    """
    try:
        fits = text == PROGRESSIVE or 0 <= float(text) <= 1
    except ValueError:
        fits = False
    if not fits:
        raise argparse.ArgumentTypeError(f"must be a share in [0, 1] or {PROGRESSIVE}, got {text!r}")
    return text


def ratio_of(args: argparse.Namespace) -> float | str:
    """The attention's share in the weights, or 'progressive', as --attention-ratio or the mixer's paper says."""
    if args.attention_ratio is None:
        return MIXERS[args.mixer].attention_ratio
    return PROGRESSIVE if args.attention_ratio == PROGRESSIVE else float(args.attention_ratio)


def cell_of(args: argparse.Namespace, grid: int) -> int:
    """Side of a grid mask's cells in tokens: --grid-cell, or MixPro's 4, or 2 on grids too small for these.

    Args:
        args: of the run.
        grid: tokens at the images' side.
    """
    return args.grid_cell or (4 if grid >= LARGE_GRID else 2)


def teacher_of(args: argparse.Namespace) -> str | None:
    """The teacher that --teacher names, or the demo's own."""
    return args.teacher or (LITE0 if args.data == "elpv" else None)


def evidence_of(args: argparse.Namespace) -> str:
    """What the targets follow, one of `EVIDENCE`: as --evidence says, else as --maps, --teacher and --mixer do."""
    if args.evidence is not None:
        return str(args.evidence)
    if not MIXERS[args.mixer].masks or args.maps == "area":
        return "area"
    if args.maps is not None:
        return "maps"
    # CutMix is by area, unless a teacher or a bank is asked for.
    return "teacher" if args.teacher or (teacher_of(args) and args.mixer == "tokenmix") else "area"


def check_erasing(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raise ValueError for flags of random erasing that are out of range or would have no effect."""
    if not 0 <= args.reprob <= 1:
        raise ValueError(f"--reprob must be a probability in [0, 1], got {args.reprob}")
    if not 1 <= args.recount <= MOST_RECTANGLES:
        raise ValueError(f"--recount must be in [1, {MOST_RECTANGLES}], got {args.recount}")
    for name in ("remode", "recount"):
        if name in given and args.reprob == 0:
            raise ValueError(f"--{name} is for --reprob above 0, and nothing is erased here")


def check(args: argparse.Namespace, given: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of the mixing flags that contradict each other, or would have no effect.

    Args:
        args: all arguments.
        given: those of the command line.
    """
    mixer, evidence = MIXERS[args.mixer], args.evidence
    check_erasing(args, given)
    if "mask_type" in given and args.mixer != "tokenmix":
        masks = f"has masks of its own ({mixer.mask_type})" if mixer.masks else "has no masks"
        raise ValueError(f"--mask-type is for --mixer tokenmix; --mixer {args.mixer} {masks}")
    grid = (mixer.mask_type or args.mask_type) == "grid" and mixer.masks
    if args.grid_cell is not None and (args.grid_cell < 1 or not grid):
        what = "must be at least 1" if grid else "is for --mixer mixpro or --mask-type grid"
        raise ValueError(f"--grid-cell {what}, got {args.grid_cell} with --mixer {args.mixer}")
    if args.attention_ratio is not None and evidence != "attention":
        raise ValueError(f"--attention-ratio is for --evidence attention; the evidence here is {evidence_of(args)}")
    if evidence is None:
        return
    if evidence not in EVIDENCE:
        raise ValueError(f"--evidence must be one of {', '.join(EVIDENCE)}, got {evidence!r}")
    if not mixer.masks and evidence != "area":
        raise ValueError(f"--evidence {evidence} needs masks to be pooled over, and --mixer {args.mixer} has none")
    if evidence == "maps" and args.maps in (None, "area"):
        raise ValueError(f"--evidence maps needs a map bank, --maps FILE, got --maps {args.maps}")
    if evidence == "area" and args.maps not in (None, "area"):
        raise ValueError(f"--evidence area uses no maps: leave out --maps {args.maps}, or use --evidence maps")
    if evidence in ("teacher", "attention") and args.maps == "area":
        raise ValueError(f"--evidence {evidence} and --maps area exclude each other: leave one of them out")
    if evidence == "teacher" and args.maps is not None:
        raise ValueError(
            f"--evidence teacher makes its own maps: leave out --maps {args.maps}, or use --evidence maps for them"
        )
    if evidence == "teacher" and teacher_of(args) is None:
        raise ValueError("--evidence teacher needs a teacher: --teacher NAME, a timm model that knows the classes")
    for flag in ("teacher", "teacher_weights", "online", "probe"):
        if evidence != "teacher" and getattr(args, flag):
            raise ValueError(
                f"--{flag.replace('_', '-')} is for --evidence teacher, the evidence here is {evidence}: leave it out, "
                "or use --evidence teacher"
            )
