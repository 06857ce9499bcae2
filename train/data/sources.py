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

from .dataset import Data, restrict
from .timm_readers import load_timm


@lru_cache(maxsize=1)
def elpv_arrays() -> tuple[Any, Any, Any]:
    """(images [N, 300, 300] uint8, defect probabilities [N], cell types [N]), read from the package once."""
    if find_spec("elpv_dataset") is None:
        raise ValueError("--data elpv needs the package elpv-dataset: pip install 'tokenmix_kernels[demo]'")
    from elpv_dataset.utils import load_dataset

    arrays: tuple[Any, Any, Any] = load_dataset()
    return arrays


class ElpvCells(Dataset[tuple[Image.Image, int]]):
    """Electroluminescence photographs of solar cells (elpv-dataset), 4 classes: defect x cell type.

    A cell counts as defective where the experts' probability is at least one half. Every fifth image of each
    class is for validation, the others are for training.

    Raises:
        ValueError: the package elpv-dataset is not installed.
    """

    classes = ("mono", "mono defective", "poly", "poly defective")

    def __init__(self, split: str) -> None:
        images, probabilities, types = elpv_arrays()
        labels = 2 * (types == "poly").astype(np.int64) + (probabilities >= 0.5)
        validation = np.zeros(len(labels), dtype=bool)
        for label in range(len(self.classes)):
            validation[np.flatnonzero(labels == label)[::5]] = True
        chosen = np.flatnonzero(validation if split == "val" else ~validation)
        self.images, self.rows = images, chosen
        self.targets: list[int] = labels[chosen].tolist()
        self.names = [f"cell{index + 1:04d}.png" for index in chosen]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[self.rows[index]]).convert("RGB"), self.targets[index]


def load_data(args: argparse.Namespace) -> Data:
    """The data set that --data and --data-path name, cut down as --holdout and --label-fraction say.

    Raises:
        ValueError: it is not there, its two splits do not have the same classes, or a package is missing.
    """
    return restrict(load_whole(args), args.holdout, args.label_fraction, args.seed)


def load_whole(args: argparse.Namespace) -> Data:
    """The data set with its own splits, as `load_data` finds it."""
    mean, std = tuple(IMAGENET_DEFAULT_MEAN), tuple(IMAGENET_DEFAULT_STD)
    if args.data == "elpv":
        train, val = ElpvCells("train"), ElpvCells("val")
        return Data(
            "elpv",
            train,
            val,
            ElpvCells.classes,
            train.targets,
            dataset_digest(train.names, train.targets),
            (0.5, 0.5, 0.5),
            (0.25, 0.25, 0.25),
        )
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
        folder, val_folder = datasets.ImageFolder(root / "train"), datasets.ImageFolder(root / "val")
        if folder.classes != val_folder.classes:
            raise ValueError(
                f"{root / 'train'} has {len(folder.classes)} classes and {root / 'val'} "
                f"{len(val_folder.classes)}, or they are named differently"
            )
        return Data(str(root), folder, val_folder, folder.classes, folder.targets, folder_digest(folder), mean, std)
    kind = datasets.CIFAR10 if args.data == "cifar10" else datasets.CIFAR100
    cifar, cifar_val = kind(root, train=True, download=True), kind(root, train=False, download=True)
    digest = dataset_digest([str(index) for index in range(len(cifar))], cifar.targets)
    return Data(args.data, cifar, cifar_val, cifar.classes, cifar.targets, digest, mean, std)
