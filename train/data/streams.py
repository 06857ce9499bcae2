"""Streams: training and validation batches of timm's iterable readers (WebDataset, TFDS, HF streaming).

A reader has an order of its own and gives each loader process its shards, so there are no ids to ask for. What can
be exact is: an epoch's batches depend on the seed, the epoch and the numbers of processes and workers only. Workers
are therefore started anew for every epoch, from a seed of the epoch's own, and each makes the same number of batches.
"""

import argparse
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from tqdm import tqdm

from tokenmix_kernels.transforms import EvalTransform, TrackedTransform

from .batch import Batch, seeded
from .broken import sentence
from .dataset import Data
from .timm_readers import Stream

REPEATS = 3  # of each image with --repeated-aug, as timm's RepeatAugSampler


class WorkerStream(IterableDataset[Any]):
    """Whole batches of one worker, each with the sentences about images left out since the one before.

    Loaders wait long for workers that raised, and put tracebacks around what they said: a sentence comes in the place
    of a batch, and `checked` raises it. The last item may have sentences only.
    """

    source: Stream

    def batches(self) -> Iterator[Any]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.batches():
                yield batch, self.take_skipped()
            if skipped := self.take_skipped():
                yield None, skipped
        except (ValueError, RuntimeError, OSError) as error:
            yield sentence(error)

    def take_skipped(self) -> list[str]:
        skipped, self.source.skipped = self.source.skipped, []
        return skipped


def checked(items: Iterator[Any], skipped: set[str]) -> Iterator[Any]:
    """The batches of workers; sentences about images that were left out are added to `skipped`.

    Raises:
        ValueError: one of the workers came upon an error.
    """
    for item in items:
        if isinstance(item, str):
            raise ValueError(item)
        batch, sentences = item
        for why in sentences:
            if why not in skipped:
                tqdm.write(f"skipped: {why}")
                skipped.add(why)
        if batch is not None:
            yield batch


class TrainStream(WorkerStream):
    """Augmented batches of one process; a sample depends on seed, epoch, rank, worker and its place in the worker."""

    def __init__(
        self, source: Stream, transform: TrackedTransform, args: argparse.Namespace, rank: int, world: int, steps: int
    ) -> None:
        self.source, self.transform = source, transform
        self.seed, self.batch_size, self.repeats = args.seed, args.batch_size, REPEATS if args.repeated_aug else 1
        self.rank, self.world, self.steps = rank, world, steps
        self.epoch, self.first = 0, 0  # first batch of every worker that is made

    def batches(self) -> Iterator[Batch]:
        worker = get_worker_info()
        assert worker is not None
        repeated = (sample for sample in self.source.read() for _ in range(self.repeats))
        for number in range(self.steps // worker.num_workers):
            step = number * worker.num_workers + worker.id
            read, samples = 0, []
            for row, (image, label) in enumerate(islice(repeated, self.batch_size)):
                read += 1
                if number < self.first:
                    continue
                with seeded(self.seed, self.epoch, self.rank, worker.id, number * self.batch_size + row):
                    pixels, geometry = self.transform(image)
                position = (step * self.batch_size + row) * self.world + self.rank
                samples.append(Batch(pixels, label, geometry.box, geometry.flip, geometry.affine, position, position))
            if read < self.batch_size:
                raise ValueError(
                    f"worker {worker.id} of process {self.rank} found {number * self.batch_size + read} of its "
                    f"{self.steps // worker.num_workers * self.batch_size} samples: --data {self.source.name} needs a "
                    f"shard for each of the {self.world * worker.num_workers} workers (--num-workers x processes), "
                    "or has fewer samples than it says"
                )
            if number >= self.first:
                yield default_collate(samples)


class EvalStream(WorkerStream):
    """Validation batches of one process, resized and cropped; over all processes and workers each image comes once."""

    def __init__(self, source: Stream, transform: EvalTransform, batch_size: int) -> None:
        self.source, self.transform, self.batch_size = source, transform, batch_size

    def batches(self) -> Iterator[Any]:
        # With several processes readers repeat or drop samples to give all the same number. Once its shards are
        # chosen, a reader that believes to be alone reads just them, to their end.
        reader = self.source.images.reader
        reader._lazy_init()
        reader.dist_num_replicas = 1
        samples = ((self.transform(image)[0], label) for image, label in self.source.read())
        while batch := list(islice(samples, self.batch_size)):
            yield default_collate(batch)


class StreamBatches:
    """What EpochLoader gives, from streams.

    Attributes:
        steps: batches in an epoch of this process, a multiple of its workers; readers fill up the last ones.
    """

    def __init__(
        self,
        data: Data,
        args: argparse.Namespace,
        transform: TrackedTransform,
        eval_transform: EvalTransform,
        rank: int,
        world: int,
    ) -> None:
        self.data, self.args, self.rank = data, args, rank
        self.transform, self.eval_transform = transform, eval_transform
        self.last_epoch = 0
        # Readers shard among workers; without one some of them would give every process the same samples.
        self.workers = max(1, args.num_workers)
        source = data.train.share(rank, world, self.workers)
        self.steps = len(source.images) // args.batch_size
        self.samples = TrainStream(source, transform, args, rank, world, self.steps)
        self.loader = self._loader(self.samples)
        val = data.val.share(rank, world, self.workers)
        self.eval_loader = self._loader(EvalStream(val, eval_transform, args.batch_size))

    def _loader(self, stream: WorkerStream) -> DataLoader[Any]:
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, from a step on; the images before it are read, not augmented."""
        self.last_epoch = epoch
        self.samples.source.images.set_epoch(epoch)
        self.samples.epoch = epoch
        # Batches come from the workers in turn, so all begin in one round, of which the first batches are past.
        self.samples.first, past = divmod(first_step, self.workers)
        with seeded(self.args.seed, epoch, self.rank):
            self.loader.generator.manual_seed(int(torch.randint(2**62, ())))
        return islice(checked(iter(self.loader), self.data.skipped), past, None)

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(images [B, 3, S, S] uint8, labels [B] int64) of this process's share."""
        return checked(iter(self.eval_loader), self.data.skipped)

    def batch(self, epoch: int, positions: Tensor, world: int) -> Batch:
        """A batch of any process of a run of `world` processes again; reads the epoch up to it."""
        place, rank = divmod(int(positions[0]), world)
        others = StreamBatches(self.data, self.args, self.transform, self.eval_transform, rank, world)
        return next(others.epoch(epoch, place // self.args.batch_size))

    def preview(self, count: int) -> Batch:
        """The first samples of the last epoch, in whole batches."""
        batches = islice(self.epoch(self.last_epoch), -(-count // self.args.batch_size))
        return Batch(*(torch.cat(fields) for fields in zip(*batches, strict=True)))
