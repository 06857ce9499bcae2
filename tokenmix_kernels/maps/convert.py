"""`convert`: the own label's maps out of the top-k label maps of TokenLabeling and ReLabel."""

import argparse
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmix_kernels import __version__

from ..extras import require
from ..photos import image_size
from .folder import class_indices, fingerprints, open_folder
from .job import Job, Ranks, add_options, check_out, fill
from .weights import read_tensors

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command `convert`."""
    convert = commands.add_parser(
        "convert",
        help="make a bank of TokenLabeling's or ReLabel's label maps",
        description="Take the own label's map out of top-k label maps: one .pt file per image, FOLDER/class/image.pt, "
        "a tensor [2, k, h, w] of values and class indices. The file of an image has its name up to the last dot, or, "
        "as TokenLabeling writes it, up to the first. Negative values become zero; an image whose label is in no entry "
        "gets an all-zero map, whose target falls back to the area share.",
    )
    convert.add_argument("label_maps", type=Path, help="folder of the .pt files")
    convert.add_argument("--data", required=True, type=Path, help="the image folder they belong to")
    convert.add_argument("--out", required=True, type=Path, metavar="FILE", help="the bank to write")
    convert.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="text file, 'folder index' on each line: the label maps' class of each folder "
        "(default: ImageNet's index for ImageNet's folders, else their order)",
    )
    convert.add_argument(
        "--region",
        default="whole",
        choices=["whole", "centre"],
        help="part of the image that the maps cover. Training code reads the published maps as 'whole'; "
        "TokenLabeling's generator makes them of the 'centre' square (default: whole)",
    )
    convert.add_argument("--teacher", metavar="NAME", help="name to note in the bank (default: the folder's)")
    add_options(convert, batch_size=256)
    convert.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Convert label maps."""
    with Ranks() as ranks:
        for library in ("PIL.Image", "torchvision", "tqdm"):
            require(library)
        check_out(args.out)
        dataset = open_folder(args.data)
        if not args.label_maps.is_dir():
            raise FileNotFoundError(f"there is no folder {args.label_maps}")
        classes = class_indices(dataset.classes, None, args.class_map)
        files = find_files(args.label_maps, args.data, [path for path, _ in dataset.samples])
        load = LabelMaps(files, dataset.samples, classes, args.region)
        h, w = load.grid

        def to_maps(own: Tensor, _ids: Tensor) -> Tensor:
            return own

        job = Job(
            out=args.out,
            dataset=dataset,
            grid=(h, w),
            teacher=f"{args.teacher or args.label_maps.resolve().name} (label maps, {args.region})",
            inputs={
                "classes": hashlib.sha256(str(classes).encode()).hexdigest(),
                "code": f"tokenmix_kernels {__version__}",
            },
            fingerprints=lambda: fingerprints([path for path, _ in dataset.samples]) ^ fingerprints(files),
            load=load,
            blank=torch.zeros(h, w),
            to_maps=to_maps,
        )
        fill(job, ranks, args)


def find_files(root: Path, data: Path, images: Sequence[str]) -> list[Path]:
    """The label map of each image.

    For DATA/cat/s1/photo.1.jpg these names are tried under `root`: cat/s1/photo.1.pt, cat/s1/photo.pt, s1/photo.1.pt
    and s1/photo.pt. TokenLabeling cuts names at their first dot.

    Raises:
        ValueError: an image has none, or two images have the same.
    """
    known = {
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".pt")
    }
    owner: dict[str, str] = {}
    files = []
    for image in images:
        relative = Path(os.path.relpath(image, data))
        names = dict.fromkeys([relative.stem, relative.name.partition(".")[0]])
        folders = dict.fromkeys([relative.parent, Path(relative.parent.name)])
        tried = [str(folder / f"{name}.pt") for folder in folders for name in names]
        found = next((name for name in tried if name in known), None)
        if found is None:
            raise ValueError(f"there is no label map {root / tried[0]} for the image {image}")
        if found in owner:
            raise ValueError(
                f"the label map {root / found} would belong to two images, {owner[found]} and {image}: "
                "give each its own, named like the image up to its last dot"
            )
        owner[found] = image
        files.append(root / found)
    return files


class LabelMaps:
    """Loads the own-label map out of TokenLabeling's and ReLabel's top-k label maps."""

    def __init__(self, files: list[Path], samples: list[tuple[str, int]], classes: list[int], region: str) -> None:
        self.files, self.samples, self.classes, self.region = files, samples, classes, region
        self.grid = self.own_map(0).shape

    def own_map(self, number: int) -> Tensor:
        """[h, w] float32: the values of the own label, zero where it is not among the top k."""
        path = self.files[number]
        entry = read_tensors(path, "label map")
        if not isinstance(entry, Tensor) or entry.ndim != 4 or len(entry) != 2 or 0 in entry.shape:
            shape = list(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(f"the label map {path} must be [2, k, h, w], values and indices, got {shape}")
        label = self.classes[self.samples[number][1]]
        # From these numbers on two class ids share one floating-point number.
        coarse = {torch.float16: 2048, torch.bfloat16: 256}.get(entry.dtype, label + 1)
        if label >= coarse:
            raise ValueError(f"the label map {path} holds class ids as {entry.dtype}, too coarse for {label}")
        values, indices = entry.float()
        if not values.isfinite().all():
            raise ValueError(f"the label map {path} has NaN or infinite values")
        return torch.where(indices == label, values, 0.0).sum(0).clamp(min=0)

    def __call__(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        own = self.own_map(number)
        if own.shape != self.grid:
            raise ValueError(
                f"the label map {self.files[number]} is of {own.shape[0]}x{own.shape[1]}, that of the first "
                f"image of {self.grid[0]}x{self.grid[1]}: all must be of one size"
            )
        height, width = image_size(self.samples[number][0])
        if self.region == "centre":
            own = from_centre_square(own, height, width)
        return own, (height, width)


def from_centre_square(own: Tensor, height: int, width: int) -> Tensor:
    """Spread a map [h, w] of an image's centre square over the whole image, zero outside the square."""
    side = min(height, width)
    rows = ((torch.arange(own.shape[0]) + 0.5) / own.shape[0] * 2 - 1) * height / side
    columns = ((torch.arange(own.shape[1]) + 0.5) / own.shape[1] * 2 - 1) * width / side
    where = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None]), -1)
    return F.grid_sample(own[None, None], where[None], align_corners=False)[0, 0]
