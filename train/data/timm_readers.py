"""Data sets of timm.data.create_dataset: by index where its reader can, as streams elsewhere."""

import argparse
import operator
from collections.abc import Iterator
from copy import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset, IterableDataset

from tokenmix_kernels.maps import dataset_digest

from .dataset import Data

TIMM_PACKAGES = {
    "wds": ("webdataset",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "hfds": ("datasets",),
    "hfids": ("datasets",),
}


class TimmImages(Dataset[tuple[Image.Image, int]]):
    """A split that timm (or torchvision through it) reads by index.

    Attributes:
        targets: the labels, empty where the reader cannot list them without the images.
        names: of the images, for the digest; their places where files have no names.
    """

    def __init__(self, images: Any) -> None:
        self.images = images
        reader = getattr(images, "reader", images)
        if hasattr(reader, "iter_targets"):
            found = list(reader.iter_targets())
        elif hasattr(reader, "label_key"):  # hfds in timm 1.0.15
            found = list(reader.dataset[reader.label_key])
        elif hasattr(reader, "targets"):
            found = reader.targets
        else:
            found = [label for _, label in getattr(reader, "samples", [])]
        self.targets: list[int] = np.asarray(found, dtype=np.int64).tolist()
        self.names = [str(index) for index in range(len(images))]
        if isinstance(reader, (ReaderImageFolder, ReaderImageInTar)):
            self.names = [Path(name).as_posix() for name in reader.filenames()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.images[index]
        return image, int(label)


class Stream:
    """A split as timm's IterableImageDataset reads it; images pass once per epoch and cannot be asked for."""

    targets: tuple[int, ...] = ()  # not known before they pass

    def __init__(self, images: Any, num_classes: int, name: str) -> None:
        self.images = images
        self.num_classes = num_classes
        self.name = name

    def __len__(self) -> int:
        return int(self.images.reader.num_samples)

    def share(self, rank: int, world: int, workers: int) -> "Stream":
        """The same split for one of several processes; the reader shards it among them and their workers."""
        part = copy(self)
        part.images, part.images.reader = copy(self.images), copy(self.images.reader)
        part.images.reader.dist_rank, part.images.reader.dist_num_replicas = rank, world
        part.images.set_loader_cfg(num_workers=workers)
        return part

    def read(self) -> Iterator[tuple[Image.Image, int]]:
        """(image, label) of the samples of this worker.

        Raises:
            ValueError: a target is not the number of a class.
        """
        for image, target in self.images:
            try:
                label = operator.index(target)
            except TypeError:
                raise ValueError(f"--data {self.name} has the target {target!r}, not a class number") from None
            if not 0 <= label < self.num_classes:
                raise ValueError(f"--data {self.name} has the label {label}, not one of {self.num_classes} classes")
            yield image, label


def load_timm(args: argparse.Namespace, mean: tuple[float, ...], std: tuple[float, ...]) -> Data:
    """The two splits as timm.data.create_dataset opens them: by index where its reader can, as streams elsewhere.

    Raises:
        ValueError: a package is missing, timm cannot open it, or what it finds does not fit together.
    """
    kind, slash, _ = args.data.removeprefix("timm:").partition("/")
    kind = kind.lower() if slash else "folder"
    missing = [name for name in TIMM_PACKAGES.get(kind, ()) if find_spec(name) is None]
    if missing:
        packages = " ".join(name.replace("_", "-") for name in missing)
        raise ValueError(f"--data {args.data} needs what is not installed: pip install {packages}")
    if args.data_path is None and kind in ("folder", "torch", "wds"):
        raise ValueError(f"--data {args.data} needs --data-path")
    train, val = open_timm(args, True), open_timm(args, False)
    if kind == "folder" and train.reader.root == val.reader.root and args.train_split != args.val_split:
        raise ValueError(
            f"{args.data_path} has no {args.train_split} and {args.val_split} in it: timm would train and validate on "
            "the same images; name the parts with --train-split and --val-split"
        )
    index, val_index = class_index(train), class_index(val)
    if index and val_index and index != val_index:
        raise ValueError(f"the classes of the splits {args.train_split} and {args.val_split} differ")
    count = max(index.values()) + 1 if index else args.num_classes
    if count is None or (args.num_classes or count) != count:
        raise ValueError(
            f"--data {args.data} has {count} classes, not --num-classes {args.num_classes}"
            if index
            else f"the reader of --data {args.data} does not know the classes: give --num-classes"
        )
    named = {label: name for name, label in index.items()}
    classes = [named.get(label, str(label)) for label in range(count)]
    if isinstance(train, IterableDataset):
        splits = Stream(train, count, args.data), Stream(val, count, args.data)
        if not len(splits[1]):
            raise ValueError(f"the number of images in the split {args.val_split} is not known: give --val-num-samples")
        return Data(args.data, *splits, classes, [], "", mean, std, stream=True)
    by_index = TimmImages(train), TimmImages(val)
    for images in by_index:
        if images.targets and not 0 <= min(images.targets) <= max(images.targets) < count:
            least, most = min(images.targets), max(images.targets)
            raise ValueError(f"--data {args.data} has labels from {least} to {most}, but {count} classes")
    labels = by_index[0].targets
    digest = dataset_digest(by_index[0].names, labels) if labels else ""
    return Data(args.data, *by_index, classes, labels, digest, mean, std)


def open_timm(args: argparse.Namespace, training: bool) -> Any:
    """timm's data set of one split."""
    side = "train" if training else "val"
    split, count = getattr(args, f"{side}_split"), getattr(args, f"{side}_num_samples")
    try:
        return create_dataset(
            args.data.removeprefix("timm:"),
            root=args.data_path,
            split=split,
            is_training=training,
            batch_size=args.batch_size,
            num_samples=count,
            seed=args.seed,
            **args.data_kwargs,
        )
    # Readers and the libraries under them fail in their own ways; all of them mean that there is no such data.
    except Exception as error:
        hint = f"; give --{side}-num-samples" if "num_samples" in str(error) and not count else ""
        where = f" at {args.data_path}" if args.data_path else ""
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"timm cannot open --data {args.data}, split {split!r}{where} ({reason}){hint}") from error


def class_index(images: Any) -> dict[str, int]:
    """Class names and their labels as a reader knows them; empty if it does not."""
    reader = getattr(images, "reader", images)
    found = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return dict(found) if found else {str(name): i for i, name in enumerate(getattr(reader, "classes", ()))}
