"""The batches that are timed, counted and simulated, and their inputs."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmix_kernels import TopKMaps
from tokenmix_kernels.settings import Settings

__all__ = ["CASES", "MEAN", "SEED", "SIMULATED", "STD", "Case", "Inputs", "make_inputs", "settings_of"]

SEED = 7
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch and the settings it is mixed with.

    Attributes:
        name: as tables show it.
        batch, channels, height, width: of the images.
        dtype: of the images; uint8 images are normalised.
        out_dtype: of the mixed images.
        patch_size, num_classes: of the mix.
        map_size: side of the top-5 maps.
        channels_last: memory layout.
        in_place: whether the images are mixed into themselves.
        settings: fields of `Settings` that differ from block masks drawn for each image.
    """

    name: str
    batch: int = 128
    channels: int = 3
    height: int = 224
    width: int = 224
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    patch_size: int = 16
    num_classes: int = 1000
    map_size: int = 18
    channels_last: bool = False
    in_place: bool = False
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, C, H, W]."""
        return self.batch, self.channels, self.height, self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns."""
        return self.height // self.patch_size, self.width // self.patch_size

    @property
    def output(self) -> torch.dtype:
        """The dtype of the mixed images."""
        return self.out_dtype or self.dtype

    @property
    def minimum_tokens(self) -> int:
        """14 of 14x14 tokens, the same share of any other grid."""
        return round(14 * self.grid[0] * self.grid[1] / 196)


class Inputs(NamedTuple):
    """A batch on its device.

    Attributes:
        images: [B, C, H, W] of the case's dtype.
        raw: [B, C, H, W] uint8.
        labels: [B] int64.
        maps: top-5 maps [B, 5, h, w] float16 with the class numbers.
        boxes: [B, 4] (x0, y0, x1, y1) in [0, 1].
    """

    images: Tensor
    raw: Tensor
    labels: Tensor
    maps: TopKMaps
    boxes: Tensor


CASES = {
    "main": Case("main"),
    "cpu": Case("cpu"),
    "tiny": Case("tiny", batch=4, height=64, width=64, patch_size=8, num_classes=10, map_size=6),
    "gpu-fp16": Case("gpu-fp16", dtype=torch.float16),
    "gpu-fp32": Case("gpu-fp32"),
    "gpu-fp16-nhwc": Case("gpu-fp16-nhwc", dtype=torch.float16, channels_last=True),
}


def simulated_cases() -> Iterator[Case]:
    """The cases of the table of simulated times."""
    half, full, byte = torch.float16, torch.float32, torch.uint8
    for batch in (32, 64, 128, 256):
        yield Case(f"fp16 B {batch}", batch, dtype=half)
    yield Case("fp32", dtype=full)
    yield Case("uint8 to fp16", dtype=byte, out_dtype=half)
    erasing = {"erase_prob": 0.25, "erase_mode": "pixel"}
    yield Case("uint8 to fp16, erasing", dtype=byte, out_dtype=half, settings=erasing)
    yield Case("fp16, erasing", dtype=half, settings=erasing)
    yield Case("channels_last fp16", dtype=half, channels_last=True)
    yield Case("in place, one mask", dtype=half, in_place=True, settings={"mode": "batch"})
    yield Case("Mixup and blocks", dtype=half, settings={"mixup_alpha": 0.8, "switch_prob": 0.5})
    yield Case("CutMix", dtype=half, settings={"mask_type": "cutmix", "lam": -1.0})


SIMULATED = {case.name: case for case in simulated_cases()}


def settings_of(case: Case) -> Settings:
    """The settings that a case is mixed with: block masks, one for each image, unless the case says otherwise."""
    fields: dict[str, Any] = {"mode": "elem", "minimum_tokens": case.minimum_tokens, **case.settings}
    if case.dtype == torch.uint8:
        fields = {"mean": MEAN, "std": STD, **fields}
    return Settings(num_classes=case.num_classes, patch_size=case.patch_size, **fields)


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Make the batch of a case: always the same one for a seed."""
    source = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, case.shape, dtype=torch.uint8, generator=source)
    images = raw if case.dtype == torch.uint8 else torch.randn(case.shape, generator=source).to(case.dtype)
    labels = torch.randint(0, case.num_classes, (case.batch,), generator=source)
    size = (case.batch, 5, case.map_size, case.map_size)
    # The own label first, then four other classes: no class twice in a cell, as in a top-k.
    others = (labels[:, None] + torch.arange(5) * max(1, case.num_classes // 7)) % case.num_classes
    indices = others[:, :, None, None].expand(size).contiguous()
    top = torch.rand(size, generator=source).half()
    low = torch.rand(case.batch, 2, generator=source) * 0.5
    boxes = torch.cat([low, low + 0.3 + torch.rand(case.batch, 2, generator=source) * 0.2], 1)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return Inputs(
        images.to(device, memory_format=layout), raw.to(device, memory_format=layout), labels.to(device),
        TopKMaps(top.to(device), indices.to(device)), boxes.to(device),
    )  # fmt: skip
