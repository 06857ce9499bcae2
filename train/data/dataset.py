"""A data set with its two splits, and parts of it."""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from tokenmix_kernels.photos import to_rgb


@dataclass
class Data:
    """A data set with its two splits, as PIL images; labels are empty where they cannot be listed."""

    name: str
    train: Any
    val: Any
    classes: Sequence[str]
    labels: list[int]  # of train
    digest: str  # of train
    mean: tuple[float, ...]
    std: tuple[float, ...]
    stream: bool = False  # images come in the order of a reader, none can be asked for by index
    broken: dict[int, str] = field(default_factory=dict)  # training images that are left out, by id, and why
    skipped: set[str] = field(default_factory=set)  # why images of both splits are left out, one sentence for each

    def describe(self) -> str:
        return f"{self.name}: {len(self.train)} images, {len(self.classes)} classes"

    def readable(self) -> list[int]:
        """Ids of the training images that are not left out, ascending."""
        return [index for index in range(len(self.train)) if index not in self.broken]

    def majority(self) -> float:
        """Share of the validation images in the class that is largest in the training set; NaN if not known."""
        if not self.labels or not self.val.targets:
            return math.nan
        largest = Counter(self.labels[index] for index in self.readable()).most_common(1)[0][0]
        return sum(label == largest for label in self.val.targets) / len(self.val)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 with the data's mean and standard deviation."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean).view(shape).to(images.device, non_blocking=True)
        std = torch.tensor(self.std).view(shape).to(images.device, non_blocking=True)
        return (images.float() / 255 - mean) / std


class Selection(Dataset[tuple[Image.Image, int]]):
    """Some images of a split.

    Attributes:
        rows: their places in the whole split, ascending.
        targets: their labels.
    """

    def __init__(self, images: Any, labels: Sequence[int], rows: Sequence[int]) -> None:
        self.images = images
        self.rows = list(rows)
        self.targets = [int(labels[row]) for row in self.rows]

    @property
    def paths(self) -> list[str]:
        """Their files; empty where images have none."""
        paths = getattr(self.images, "paths", None)
        return [paths[row] for row in self.rows] if paths else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image: Image.Image = self.images[self.rows[index]][0]
        return image, self.targets[index]


class Kept(Dataset[tuple[Image.Image, int]]):
    """A split whose images are read once, made smaller, and kept in memory.

    Args:
        source: the split.
        side: of the kept images, the shorter one, in pixels; smaller images stay as they are.
    """

    def __init__(self, source: Any, side: int) -> None:
        self.source = source
        self.side = side
        self.kept: dict[int, tuple[Image.Image, int]] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if index not in self.kept:
            image, label = self.source[index]
            image = to_rgb(image)
            factor = self.side / min(image.size)
            if factor < 1:
                width, height = (max(1, round(factor * side)) for side in image.size)
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            self.kept[index] = image, label
        return self.kept[index]


def stratified(labels: Sequence[int], rows: Sequence[int], fraction: float, key: str) -> list[int]:
    """A share of the rows of each class, at least one of each; a smaller share is part of a larger one.

    Args:
        labels: of the whole split.
        rows: among which to choose, as places in `labels`.
        fraction: in (0, 1].
        key: which choice among the possible ones.
    """
    members: dict[int, list[int]] = {}
    for row in rows:
        members.setdefault(int(labels[row]), []).append(row)
    chosen: list[int] = []
    for label, own in members.items():
        random.Random(f"{key}/{label}").shuffle(own)
        chosen += own[: max(1, round(fraction * len(own)))]
    return sorted(chosen)


def restrict(data: Data, holdout: float, label_fraction: float, seed: int) -> Data:
    """Validate on a part of the training set, and train on some of the rest.

    Args:
        data: the whole data set.
        holdout: share of the training images of each class on which to validate instead of the validation split; the
            same ones for every seed. 0: the validation split.
        label_fraction: share of the images of each class that is trained on, of those that are not held out.
        seed: which ones these are.

    Raises:
        ValueError: a share is out of range, or the labels are not known without the images.
    """
    if not 0 <= holdout < 1:
        raise ValueError(f"--holdout must be at least 0 and below 1, got {holdout}")
    if not 0 < label_fraction <= 1:
        raise ValueError(f"--label-fraction must be above 0 and at most 1, got {label_fraction}")
    if not holdout and label_fraction == 1:
        return data
    if data.stream or not data.labels:
        raise ValueError(f"--data {data.name} does not list its labels: --holdout and --label-fraction need them")
    rows: list[int] = list(range(len(data.train)))
    val = data.val
    if holdout:
        held = stratified(data.labels, rows, holdout, "holdout")
        rows = sorted(set(rows) - set(held))
        val = Selection(data.train, data.labels, held)
    if label_fraction < 1:
        rows = stratified(data.labels, rows, label_fraction, f"labels {seed}")
    train = Selection(data.train, data.labels, rows)
    digest = hashlib.sha256(f"{data.digest} {rows}".encode()).hexdigest()
    return replace(data, train=train, val=val, labels=train.targets, digest=digest)
