"""Variants of the kernel that are compiled: what is asked of `mix`, by name, and the targets to compile for."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HALF = torch.float16


def case(
    dtype: torch.dtype = HALF,
    out_dtype: torch.dtype | None = None,
    shape: tuple[int, int, int] = (3, 224, 224),
    layout: str = "contiguous",
    in_place: bool = False,
    partner: bool = False,
    maps: str = "none",
    boxes: str = "none",
    ids: bool = False,
    flips: bool = False,
    seed: int | str = 1 << 40,
    labels: torch.dtype | None = None,
    **settings: Any,
) -> dict[str, Any]:
    return locals()


# What the pixels look like: all of these must move 16 bytes at a time.
MOVES = {
    "fp16": case(),
    "fp32": case(torch.float32),
    "bf16": case(torch.bfloat16),
    "uint8 as it is": case(torch.uint8),
    "uint8 to fp16": case(torch.uint8, HALF, mean=MEAN, std=STD),
    "uint8 to bf16": case(torch.uint8, torch.bfloat16, mean=MEAN, std=STD),
    "fp16 channels_last": case(layout="channels_last"),
    "fp32 channels_last": case(torch.float32, layout="channels_last"),
    "uint8 channels_last to fp16": case(torch.uint8, HALF, layout="channels_last", mean=MEAN, std=STD),
    "fp16 in place": case(in_place=True),
    "fp32 in place": case(torch.float32, in_place=True),
    "fp16 channels_last in place": case(in_place=True, layout="channels_last"),
    "fp16 patch 32": case(patch_size=32),
    "fp32 patch 8, 384": case(torch.float32, shape=(3, 384, 384), patch_size=8),
    "fp16 random": case(mask_type="random"),
    "fp16 given": case(mask_type="given"),
    "fp16 grid": case(mask_type="grid"),
}
# What else is compiled: other draws, all forms of maps, awkward shapes.
OTHERS = {
    "mixup and block": case(mixup_alpha=0.8, switch_prob=0.5),
    "mixup and block in place": case(mixup_alpha=0.8, switch_prob=0.5, in_place=True, mode="elem"),
    "mixup and random, uint8 to fp16": case(
        torch.uint8, HALF, mixup_alpha=0.8, switch_prob=0.5, mask_type="random", lam=-1.0, mean=MEAN, std=STD
    ),
    "mixup and cutmix, as timm": case(
        torch.float32, mixup_alpha=0.8, switch_prob=0.5, mask_type="cutmix", lam=-1.0, mode="batch", correct_lam=False
    ),
    "cutmix in place": case(mask_type="cutmix", lam=-1.0, in_place=True, mode="pair"),
    "cutmix minmax channels_last": case(mask_type="cutmix", minmax=(0.2, 0.8), layout="channels_last"),
    "seed in memory": case(seed="device"),
    "seed 1": case(seed=1),
    "seed whose high half is 1": case(seed=(1 << 32) + 16),
    "cutmix of one size": case(mask_type="cutmix", minmax=(0.5, 0.5)),
    "one pixel wide, batch stride 1": case(torch.float32, shape=(1, 4, 1), patch_size=1, layout="batch innermost"),
    "lines of one value": case(torch.bfloat16, shape=(3, 4, 1), patch_size=1, mixup_alpha=0.8, switch_prob=0.5),
    "lines of one value, normalised": case(HALF, shape=(1, 4, 1), patch_size=1, mean=MEAN[:1], std=STD[:1]),
    "lines of one word, channels_last": case(shape=(4, 4, 1), patch_size=1, layout="channels_last"),
    "lines of one word in place": case(shape=(4, 4, 1), patch_size=1, layout="channels_last", in_place=True),
    "lines of one byte, normalised": case(torch.uint8, shape=(1, 1, 1), patch_size=1, mean=MEAN[:1], std=STD[:1]),
    "lines of two bytes, normalised": case(torch.uint8, shape=(1, 2, 2), patch_size=1, mean=MEAN[:1], std=STD[:1]),
    "float64": case(torch.float64, mixup_alpha=0.8, switch_prob=0.5),
    "own maps": case(maps="own", boxes="xyxy", partner=True),
    "own maps of a data set, bytes": case(maps="bytes", boxes="xyxy", ids=True, flips=True),
    "affines": case(maps="own", boxes="affines"),
    "maps of all classes": case(maps="all"),
    "top-k maps": case(maps="topk", boxes="xyxy", mode="elem"),
    "packed maps": case(maps="packed", boxes="crop"),
    "packed maps, published": case(maps="packed", boxes="crop_swapped", mask_type="cutmix", lam=-1.0),
    "label rows": case(labels=torch.float32, mixup_alpha=0.8, switch_prob=0.5),
    "label rows, bool, in place, clamped": case(labels=torch.bool, in_place=True, multi_label=True, clamp_targets=True),
    "label rows, own maps": case(labels=HALF, maps="own", boxes="xyxy"),
    "label rows, maps of all classes": case(labels=torch.float32, maps="all", mixup_alpha=0.8, switch_prob=0.5),
    "label rows, top-k maps": case(labels=torch.float32, maps="topk", boxes="affines", multi_label=True),
    "clamped": case(maps="own", boxes="xyxy", clamp_targets=True),
    "64x64 grid": case(shape=(3, 256, 256), patch_size=4),
    "not aligned": case(layout="offset"),
    "transposed": case(layout="transposed"),
    "one channel, patch 14": case(torch.float32, shape=(1, 518, 266), patch_size=14),
    "wide": case(shape=(4, 32, 512), mode="elem"),
}

# A compilation takes seconds. All are made for the two cards whose figures are published, and these for the others.
FOR_OTHER_TARGETS = (
    "fp16", "fp32", "uint8 to fp16", "uint8 channels_last to fp16", "fp16 channels_last in place", "mixup and block",
    "mixup and cutmix, as timm", "one pixel wide, batch stride 1", "lines of one value", "affines", "top-k maps",
    "64x64 grid",
)  # fmt: skip

# Random erasing, the slow path of few pixels.
PIXEL = {"erase_prob": 0.25, "erase_mode": "pixel"}
ERASES = {
    "fp16": case(**PIXEL),
    "uint8 to fp16, mixup": case(torch.uint8, HALF, mean=MEAN, std=STD, mixup_alpha=0.8, switch_prob=0.5, **PIXEL),
    "fp32 channels_last, evidence": case(
        torch.float32, layout="channels_last", maps="own", erase_evidence=True, **PIXEL
    ),
    "fp16 channels_last in place, mixup": case(
        in_place=True, layout="channels_last", mixup_alpha=0.8, switch_prob=0.5, **PIXEL
    ),
    "three colours of float64, seed in memory": case(
        torch.float64, seed="device", erase_prob=0.25, erase_mode="rand", erase_count=(1, 3), mask_type="cutmix"
    ),
}


def on_targets(names: Iterable[str], *targets: str) -> pytest.MarkDecorator:
    """`name` and `target` of a test: all names on sm_80 and sm_90, or on the targets that are given, some elsewhere."""
    pairs = [
        (name, target)
        for target in targets or TARGETS
        for name in names
        if target in ("sm_80", "sm_90") or name in FOR_OTHER_TARGETS
    ]
    return pytest.mark.parametrize(("name", "target"), pairs, indirect=["target"])
