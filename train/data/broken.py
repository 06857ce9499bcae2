"""Images that cannot be read: one rule for all readers.

The run stops with a sentence that names the first of them, whichever process finds it; with --skip-broken they are left
out. A data set that is read by index is looked through before the run, so that the id of every other image, and with it
its row in a bank, stays what it is. Streams leave out what they come upon.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from tokenmix_kernels.maps.folder import fingerprints
from tokenmix_kernels.photos import ImageError

from .. import checkpoint
from ..files import write_lines
from .dataset import Data, Selection

__all__ = ["checked_batches", "leave_out_broken", "make_loader", "sentence"]


class Failure(NamedTuple):
    """A sentence in the place of a sample or a batch.

    Loaders wait long for workers that raised, and put tracebacks around what they said.
    """

    sentence: str


def sentence(error: Exception) -> str:
    """What an error says, without the number that the system gives it."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class Reported(Dataset[Any]):
    """A data set whose errors are items."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: Any) -> Any:
        try:
            return self.dataset[item]
        except (ValueError, OSError) as error:
            return Failure(sentence(error))


def collate(samples: list[Any]) -> Any:
    """A batch, or the first failure among its samples."""
    return next((sample for sample in samples if isinstance(sample, Failure)), None) or default_collate(samples)


def make_loader(dataset: Any, batch_size: int, **options: Any) -> DataLoader[Any]:
    """A loader of a data set by index, to be read through `checked_batches`."""
    # Loaders draw a number for each epoch: from generators of their own, not from the one of the model.
    return DataLoader(Reported(dataset), batch_size, collate_fn=collate, generator=torch.Generator(), **options)


def checked_batches(batches: Iterator[Any]) -> Iterator[Any]:
    """The batches of a loader.

    Raises:
        ValueError: a sample could not be read; the message names it.
    """
    for batch in batches:
        if isinstance(batch, Failure):
            raise ValueError(batch.sentence)
        yield batch


class Looked(Dataset[tuple[int, str]]):
    """For some images of a split: (place, why it cannot be read or nothing)."""

    def __init__(self, images: Any, rows: range) -> None:
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, str]:
        row = self.rows[index]
        try:
            self.images[row]
        except ImageError as error:
            return row, str(error)
        return row, ""


def find_broken(images: Any, args: argparse.Namespace, title: str) -> dict[int, str]:
    """Decode all images of a split, each process its share of them; (place: why) of those that cannot be read.

    What is found is kept in --cache for the same files.
    """
    rank, world = place()
    kept = None
    if paths := getattr(images, "paths", None):
        identity = f"{paths} {fingerprints(paths).tolist()}"
        kept = Path(args.cache) / f"broken-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    known = read_kept(kept) if rank == 0 else None
    known = checkpoint.gather(known)[0]
    if known is not None:
        return known
    share = range(rank, len(images), world)
    found: dict[int, str] = {}
    loader = make_loader(Looked(images, share), 64, num_workers=args.num_workers)
    with tqdm(total=len(share), desc=title, unit="image", leave=False, disable=True if rank else None) as bar:
        for rows, reasons in checked_batches(iter(loader)):
            found |= {row: why for row, why in zip(rows.tolist(), reasons, strict=True) if why}
            bar.update(len(rows))
    whole = {row: why for part in checkpoint.gather(found) for row, why in part.items()}
    whole = dict(sorted(whole.items()))
    if rank == 0 and kept is not None:
        write_lines([json.dumps(whole)], kept)
    return whole


def place() -> tuple[int, int]:
    """Rank of this process, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def read_kept(path: Path | None) -> dict[int, str] | None:
    """What an earlier run found, or None."""
    if path is None or not path.is_file():
        return None
    try:
        return {int(row): str(why) for row, why in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError):  # not a whole file of this trainer: look again
        return None


def leave_out_broken(data: Data, args: argparse.Namespace) -> None:
    """Look through both splits, note the training images that cannot be read, and take them out of validation.

    Raises:
        ValueError: no image of a split can be read, or the labels are not known without the images.
    """
    if not data.val.targets:
        raise ValueError(f"--data {data.name} does not list its labels: --skip-broken needs them")
    data.broken = find_broken(data.train, args, "looking for broken training images")
    broken_val = find_broken(data.val, args, "looking for broken validation images")
    for name, images, broken in (("training", data.train, data.broken), ("validation", data.val, broken_val)):
        if len(broken) == len(images):
            raise ValueError(f"none of the {len(images)} {name} images of {data.name} can be read")
    if broken_val:
        rows = [row for row in range(len(data.val)) if row not in broken_val]
        data.val = Selection(data.val, data.val.targets, rows)
    data.skipped = {*data.broken.values(), *broken_val.values()}
    if place()[0] == 0:
        for why in sorted(data.skipped):
            tqdm.write(f"skipped: {why}")
