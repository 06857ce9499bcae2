"""What tracking the geometry adds to a loader's time: DeiT's transform by timm and ours, the same images, in turn."""

import argparse
import io
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from tokenmix_kernels.transforms import tracked_transform

from .machine import describe, write_json

__all__ = ["add_arguments", "main", "measure"]

RECIPE: dict[str, Any] = {"scale": (0.08, 1.0), "hflip": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1"}
SOURCE = (500, 375)  # the median size of ImageNet's photographs
BAR = 1.02


class Photographs(Dataset[Any]):
    """JPEG files in memory, decoded and transformed at every access."""

    def __init__(self, count: int, transform: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.files = []
        for _ in range(min(count, 64)):
            coarse = torch.rand(1, 3, 24, 32, generator=generator)
            fine = torch.nn.functional.interpolate(coarse, SOURCE[::-1], mode="bicubic").clamp(0, 1)[0]
            file = io.BytesIO()
            Image.fromarray((255 * fine).byte().permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
            self.files.append(file.getvalue())
        self.count, self.transform = count, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        file = io.BytesIO(self.files[index % len(self.files)])
        return self.transform(Image.open(file).convert("RGB")), index


def start_from(seed: int) -> None:
    """Put the generators that transforms draw from to a state that the seed decides."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def check(transforms: dict[str, Any], images: int = 16) -> None:
    """Raise RuntimeError unless both transforms make the same images from the same random numbers."""
    made = []
    for transform in transforms.values():
        start_from(0)
        photographs = Photographs(images, transform)
        made.append([photographs[n][0] for n in range(images)])
    for one, (pixels, _) in zip(*made, strict=True):
        if not np.array_equal(one, pixels.numpy()):
            raise RuntimeError("timm's images and ours differ: the comparison would be of different work")


def epoch(loader: DataLoader[Any], seed: int) -> float:
    """Seconds of one pass; the seed decides what is drawn, with and without workers."""
    start_from(seed)
    begin = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - begin


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, which asks for 0 bits at times, an error in Pillow 13; ours keeps one bit as well."""
    return ImageOps.posterize(image, max(1, bits))


def timm_transform() -> Any:
    """The recipe by timm's own transform, bytes out."""
    transform = create_transform(
        224, is_training=True, use_prefetcher=True, interpolation="bicubic", color_jitter=0.3, re_prob=0.0, **RECIPE
    )
    policy = next(step for step in transform.transforms if hasattr(step, "ops"))
    for operation in policy.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return transform


def measure(workers: int, images: int, rounds: int, batch: int = 128, show: bool = True) -> dict[str, Any]:
    """Milliseconds for an image of both loaders, and the median ratio of the rounds."""
    transforms = {
        "timm": timm_transform(),
        "ours": tracked_transform(224, **RECIPE),
    }
    check(transforms)
    loaders = {
        name: DataLoader(Photographs(images, transform), batch, num_workers=workers, persistent_workers=workers > 0)
        for name, transform in transforms.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in tqdm(range(rounds + 1), desc=f"{workers} workers", unit="round", disable=not show):
        order = list(loaders) if number % 2 else list(loaders)[::-1]
        for name in order:
            taken = epoch(loaders[name], number)
            if number:  # the first pass starts the workers
                seconds[name].append(taken)
    ratios = np.array(seconds["ours"]) / np.array(seconds["timm"])
    low, middle, high = np.percentile(ratios, [20, 50, 80])
    return {
        "workers": workers,
        "timm_ms": 1000 * float(np.median(seconds["timm"])) / images,
        "ours_ms": 1000 * float(np.median(seconds["ours"])) / images,
        "ratio_p20": low,
        "ratio_p50": middle,
        "ratio_p80": high,
        "bar": BAR,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results/loader.json"))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--images", type=int, default=256, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=50)


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows = [measure(workers, asked.images, asked.rounds) for workers in asked.workers]
    record = {
        "kind": "loader", "command": "python -m bench loader", "machine": describe(), "source": SOURCE,
        "images": asked.images, "rounds": asked.rounds, "rows": rows,
    }  # fmt: skip
    write_json(asked.out, record)
