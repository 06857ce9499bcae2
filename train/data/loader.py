"""Loaders whose every sample depends on the seed, the epoch and its place only."""

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, Sampler, default_collate

from tokenmix_kernels.transforms import EvalTransform, TrackedTransform

from .. import checkpoint
from .batch import Batch, seeded
from .broken import checked_batches, make_loader
from .dataset import Data, Kept
from .shift import ShiftedCrop, make_shifted_crop
from .streams import StreamBatches


class TrainSamples(Dataset[Batch]):
    """Augmented samples: item (epoch, position, id) is the same in every process, worker and resumed run."""

    def __init__(self, source: Any, transform: TrackedTransform, seed: int, crop: ShiftedCrop | None = None) -> None:
        self.source = source
        self.transform = transform
        self.seed = seed
        self.crop = crop  # in place of the transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int, int]) -> Batch:
        epoch, position, index = item
        image, label = self.source[index]
        if self.crop:
            pixels, geometry = self.crop(image, self.seed, epoch, position, index)
        else:
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
        self.ids = data.readable()
        if args.repeated_aug:
            self.sampler = RepeatAugSampler(self.ids, num_replicas=world, rank=rank)
        else:
            # Samplers ask for the length only.
            short = len(self.ids) < world
            self.sampler = DistributedSampler(self.ids, world, rank, drop_last=not short)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        self.sampler.set_epoch(self.seed * 100_003 + self.epoch)
        for place, index in enumerate(self.sampler):
            if place >= self.first:
                yield self.epoch, place * self.world + self.rank, self.ids[index]

    def __len__(self) -> int:
        return len(self.sampler) - self.first


class EpochLoader:
    """Training batches of one process, epoch by epoch, and its share of the validation set.

    Attributes:
        steps: batches in an epoch of this process.
    """

    def __init__(self, data: Data, args: argparse.Namespace, rank: int, world: int) -> None:
        self.data = data
        transform = TrackedTransform(
            args.input_size,
            scale=tuple(args.scale),
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=args.train_interpolation,
            mean=data.mean,
            std=data.std,
        )
        eval_transform = EvalTransform(args.input_size, crop_pct=args.eval_crop_ratio)
        self.stream = None
        if data.stream:
            if args.in_memory or args.shift_crops:
                raise ValueError(f"--in-memory keeps images by index, and --data {data.name} is a stream: leave it out")
            self.stream = StreamBatches(data, args, transform, eval_transform, rank, world)
            self.steps = self.stream.steps
            return
        side = args.in_memory
        train, val = (Kept(split, side) if side else split for split in (data.train, data.val))
        self.samples = TrainSamples(train, transform, args.seed, make_shifted_crop(args))
        self.order = EpochOrder(data, args, rank, world)
        workers: dict[str, Any] = {
            "num_workers": args.num_workers,
            "pin_memory": torch.cuda.is_available(),
            "persistent_workers": args.num_workers > 0,
        }
        self.loader = make_loader(self.samples, args.batch_size, sampler=self.order, drop_last=True, **workers)
        self.steps = len(self.loader)
        if not self.steps:
            raise ValueError(
                f"--batch-size {args.batch_size} on {world} process(es) is more than an epoch's "
                f"{len(self.order) * world} samples"
            )
        shown = range(rank, len(data.val), world)
        self.eval_loader = make_loader(EvalSamples(val, eval_transform), args.batch_size, sampler=shown, **workers)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from a step on."""
        if self.stream:
            return self.stream.epoch(epoch, first_step)
        assert self.loader.batch_size is not None
        self.order.epoch, self.order.first = epoch, first_step * self.loader.batch_size
        return checked_batches(iter(self.loader))

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
        return self.stream.validation() if self.stream else checked_batches(iter(self.eval_loader))

    def skipped(self) -> list[str]:
        """Why images were left out with --skip-broken, one sentence for each image; asks all processes."""
        return sorted(set().union(*checkpoint.gather(self.data.skipped)))
