"""Data sets of timm.data.create_dataset: by index where its reader can, as streams elsewhere."""

import argparse
import io
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
from tokenmix_kernels.photos import ImageError, naming, open_image, read_image, to_rgb

from .dataset import Data
from .webdataset import prepare_webdataset

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
        paths: the files; empty where images have none of their own.
    """

    def __init__(self, images: Any, title: str) -> None:
        self.images = images
        self.title = title
        self.reader = getattr(images, "reader", None)
        if hasattr(images, "loader"):  # torchvision's folders
            images.loader = open_image
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
        self.paths: list[str] = reader.filenames(absolute=True) if isinstance(reader, ReaderImageFolder) else []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if self.reader is None:
            image, label = self.images[index]
            return to_rgb(image), int(label)
        # Not by timm's data set: it gives another image in the place of one that cannot be read.
        name = self.paths[index] if self.paths else f"{self.names[index]} of {self.title}"
        with naming(name):
            file, label, *_ = self.reader[index]
        return read_image(file, name), -1 if label is None else int(label)


class Stream:
    """A split as timm's IterableImageDataset reads it; images pass once per epoch and cannot be asked for."""

    targets: tuple[int, ...] = ()  # not known before they pass

    def __init__(self, images: Any, num_classes: int, name: str, skip_broken: bool) -> None:
        self.images = images
        self.skip_broken = skip_broken
        self.skipped: list[str] = []  # since somebody took them
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
        """(image, label) of the samples of this worker; in training as many as there are with broken ones.

        Raises:
            ValueError: a target is not the number of a class, an image or shard cannot be read.
        """
        prepare_reader(self.images.reader, self.name)
        left_out = True
        while left_out:
            left_out = given = False
            for found, target in self.samples():
                try:
                    image = self.decode(found)
                except ImageError as error:
                    if not self.skip_broken:
                        raise
                    self.skipped.append(str(error))
                    left_out = self.images.reader.is_training
                    continue
                given = True
                yield image, self.label_of(target)
            if left_out and not given:
                raise ValueError(f"--data {self.name}: none of the images of a worker can be read")

    def samples(self) -> Iterator[tuple[Any, Any]]:
        """What the reader gives; what goes wrong inside it is a ValueError."""
        try:
            yield from self.images
        except (ValueError, RuntimeError):
            raise
        except Exception as error:  # of the libraries under the reader
            raise ValueError(f"--data {self.name} cannot be read: {type(error).__name__}: {error}") from error

    def decode(self, found: Any) -> Image.Image:
        """The image of a sample: decoded already, not decoded (Hugging Face), or the reason why it cannot be."""
        if isinstance(found, ImageError):
            raise found
        if isinstance(found, dict):
            name = found["path"] or f"of a row of {self.name}"
            return read_image(io.BytesIO(found["bytes"]), name) if found["bytes"] else open_image(name)
        return to_rgb(found)

    def label_of(self, target: Any) -> int:
        try:
            label = operator.index(target)
        except TypeError:
            raise ValueError(f"--data {self.name} has the target {target!r}, not a class number") from None
        if not 0 <= label < self.num_classes:
            raise ValueError(f"--data {self.name} has the label {label}, not one of {self.num_classes} classes")
        return label


def prepare_reader(reader: Any, name: str) -> None:
    """Make timm's reader of this worker give all its samples: it leaves out or stops at images that are broken."""
    if reader.ds is None:
        reader._lazy_init()
    kind = name.removeprefix("timm:").partition("/")[0].lower()
    if kind == "wds":
        prepare_webdataset(reader)
    elif kind == "hfids":
        from datasets import Image as ImageColumn

        column = getattr(reader, "input_key", None) or reader.image_key  # the latter in timm 1.0.15
        reader.ds = reader.ds.cast_column(column, ImageColumn(decode=False))


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
    if count is None:
        raise ValueError(f"the reader of --data {args.data} does not know the classes: give --num-classes")
    named = {label: name for name, label in index.items()}
    classes = [named.get(label, str(label)) for label in range(count)]
    if isinstance(train, IterableDataset):
        skip_broken = args.skip_broken
        if skip_broken and kind == "tfds":
            raise ValueError(
                "--skip-broken cannot be used with tfds: TensorFlow decodes its images; prepare it without them"
            )
        splits = (
            Stream(train, count, args.data, skip_broken),
            Stream(val, count, args.data, skip_broken),
        )
        if not len(splits[1]):
            raise ValueError(f"the number of images in the split {args.val_split} is not known: give --val-num-samples")
        return Data(args.data, *splits, classes, [], "", mean, std, stream=True)
    by_index = TimmImages(train, args.data), TimmImages(val, args.data)
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
    # Streams give images as they are: `Stream` converts them. TFDS decodes to RGB itself.
    undecoded = {"input_img_mode": ""} if args.data.lower().startswith(("timm:wds/", "timm:hfids/")) else {}
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
            **(undecoded | args.data_kwargs),
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
