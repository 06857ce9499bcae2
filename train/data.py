"""Data sets, and loaders whose every sample depends on the seed, the epoch and its place only."""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, default_collate
from torchvision import datasets

from tokenmix_kernels.maps import folder_digest
from tokenmix_kernels.maps.bank import dataset_digest
from tokenmix_kernels.transforms import EvalTransform, TrackedTransform


class Batch(NamedTuple):
    """A training batch; a single sample has the same fields without B.

    Attributes:
        images: [B, 3, S, S] uint8, the augmented crops.
        labels: [B] int64.
        boxes: [B, 4] float32, the crop's (x0, y0, x1, y1) in the source image, relative, before any flip.
        flips: [B] bool, the crop was flipped from left to right.
        affines: [B, 2, 3] float32, from relative output to relative source positions, warps included.
        ids: [B] int64, places of the images in the data set.
        positions: [B] int64, places of the samples in the epoch, over all processes.
    """

    images: Any
    labels: Any
    boxes: Any
    flips: Any
    affines: Any
    ids: Any
    positions: Any


def to_device(batch: Batch, device: torch.device, channels_last: bool = False) -> Batch:
    """The batch on the device, without waiting for it."""
    moved = Batch(*(field.to(device, non_blocking=True) for field in batch))
    return moved._replace(images=moved.images.contiguous(memory_format=torch.channels_last)) if channels_last else moved


@lru_cache(maxsize=1)
def _elpv_arrays() -> tuple[Any, Any, Any]:
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
        images, probabilities, types = _elpv_arrays()
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

    def describe(self) -> str:
        return f"{self.name}: {len(self.train)} images, {len(self.classes)} classes"

    def majority(self) -> float:
        """Share of the validation images in the class that is largest in the training set; NaN if not known."""
        if not self.labels or not self.val.targets:
            return math.nan
        largest = Counter(self.labels).most_common(1)[0][0]
        return sum(label == largest for label in self.val.targets) / len(self.val)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] to float32 with the data's mean and standard deviation."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean).view(shape).to(images.device, non_blocking=True)
        std = torch.tensor(self.std).view(shape).to(images.device, non_blocking=True)
        return (images.float() / 255 - mean) / std


def load_data(args: argparse.Namespace) -> Data:
    """The data set that --data and --data-path name, cut down as --holdout and --label-fraction say.

    Raises:
        ValueError: it is not there, its two splits do not have the same classes, or a package is missing.
    """
    return restrict(load_whole(args), args.holdout, args.label_fraction, args.seed)


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

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image: Image.Image = self.images[self.rows[index]][0]
        return image, self.targets[index]


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


TIMM_PACKAGES = {
    "wds": ("webdataset",),
    "tfds": ("tensorflow", "tensorflow_datasets"),
    "hfds": ("datasets",),
    "hfids": ("datasets",),
}


def _open_timm(args: argparse.Namespace, training: bool) -> Any:
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


def _class_index(images: Any) -> dict[str, int]:
    """Class names and their labels as a reader knows them; empty if it does not."""
    reader = getattr(images, "reader", images)
    found = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return dict(found) if found else {str(name): i for i, name in enumerate(getattr(reader, "classes", ()))}


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
    train, val = _open_timm(args, True), _open_timm(args, False)
    if kind == "folder" and train.reader.root == val.reader.root and args.train_split != args.val_split:
        raise ValueError(
            f"{args.data_path} has no {args.train_split} and {args.val_split} in it: timm would train and validate on "
            "the same images; name the parts with --train-split and --val-split"
        )
    index, val_index = _class_index(train), _class_index(val)
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
        from .streams import Stream  # it takes samples and seeds from this file

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


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within, all three generators that transforms draw from start from the key; after, they are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: it also prepares the seeds of devices that no transform draws from, in half a millisecond.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class TrainSamples(Dataset[Batch]):
    """Augmented samples: item (epoch, position, id) is the same in every process, worker and resumed run."""

    def __init__(self, source: Any, transform: TrackedTransform, seed: int) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int, int]) -> Batch:
        epoch, position, index = item
        image, label = self.source[index]
        with seeded(self.seed, epoch, position, index):
            pixels, geometry = self.transform(image)
        return Batch(pixels, label, geometry.box, geometry.flip, geometry.affine, index, position)


class EvalSamples(Dataset[tuple[Tensor, int]]):
    """Validation images, resized and cropped."""

    def __init__(self, source: Any, transform: EvalTransform) -> None:
        self.source = source
        self.transform = transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.source[index]
        return self.transform(image)[0], label


class EpochOrder(Sampler[tuple[int, int, int]]):
    """The items of one process's epoch from any step on; the order comes from a library's sampler."""

    def __init__(self, data: Data, args: argparse.Namespace, rank: int, world: int) -> None:
        self.rank, self.world, self.seed = rank, world, args.seed
        self.epoch, self.first = 0, 0
        self.sampler: Any
        if args.repeated_aug:
            self.sampler = RepeatAugSampler(data.train, num_replicas=world, rank=rank)
        else:
            self.sampler = DistributedSampler(data.train, world, rank, drop_last=len(data.train) >= world)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        self.sampler.set_epoch(self.seed * 100_003 + self.epoch)
        for place, index in enumerate(self.sampler):
            if place >= self.first:
                yield self.epoch, place * self.world + self.rank, index

    def __len__(self) -> int:
        return len(self.sampler) - self.first


class EpochLoader:
    """Training batches of one process, epoch by epoch, and its share of the validation set.

    Attributes:
        steps: batches in an epoch of this process.
    """

    def __init__(self, data: Data, args: argparse.Namespace, rank: int, world: int) -> None:
        transform = TrackedTransform(
            args.input_size,
            scale=tuple(args.scale),
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=args.train_interpolation,
            erasing=args.reprob,
            mean=data.mean,
            std=data.std,
        )
        eval_transform = EvalTransform(args.input_size, crop_pct=args.eval_crop_ratio)
        self.stream = None
        if data.stream:
            from .streams import StreamBatches  # it takes samples and seeds from this file

            self.stream = StreamBatches(data, args, transform, eval_transform, rank, world)
            self.steps = self.stream.steps
            return
        self.samples = TrainSamples(data.train, transform, args.seed)
        self.order = EpochOrder(data, args, rank, world)
        workers: dict[str, Any] = {
            "num_workers": args.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": args.num_workers > 0,
        }
        # Loaders draw a number for each epoch: from generators of their own, not from the one of the model.
        self.loader = DataLoader(
            self.samples,
            args.batch_size,
            sampler=self.order,
            drop_last=True,
            generator=torch.Generator(),
            **workers,
        )
        self.steps = len(self.loader)
        if not self.steps:
            raise ValueError(
                f"--batch-size {args.batch_size} on {world} process(es) is more than an epoch's "
                f"{len(self.order) * world} samples"
            )
        self.eval_loader = DataLoader(
            EvalSamples(data.val, eval_transform),
            args.batch_size,
            sampler=range(rank, len(data.val), world),
            generator=torch.Generator(),
            **workers,
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from a step on."""
        if self.stream:
            return self.stream.epoch(epoch, first_step)
        assert self.loader.batch_size is not None
        self.order.epoch, self.order.first = epoch, first_step * self.loader.batch_size
        return iter(self.loader)

    def batch(self, epoch: int, positions: Tensor, ids: Tensor, world: int = 1) -> Batch:
        """One batch again, by the places and ids of its samples; a stream reads the epoch up to it.

        Args:
            epoch: of the batch.
            positions: [B] int64, its `Batch.positions`.
            ids: [B] int64, its `Batch.ids`.
            world: number of processes of the run that made it.
        """
        if self.stream:
            return self.stream.batch(epoch, positions, world)
        pairs = zip(positions.tolist(), ids.tolist(), strict=True)
        batch: Batch = default_collate([self.samples[epoch, position, index] for position, index in pairs])
        return batch

    def preview(self, count: int) -> Batch:
        """The first samples of an epoch, at least `count` of them if there are so many."""
        if self.stream:
            return self.stream.preview(count)
        batch: Batch = default_collate([self.samples[item] for item in islice(iter(self.order), count)])
        return batch

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [B, 3, S, S] uint8, labels [B] int64) of this process's share, each image once."""
        return self.stream.validation() if self.stream else iter(self.eval_loader)
