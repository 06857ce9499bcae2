"""What `build` and `convert` share: fill a bank from a data set, on one process or on all that torchrun started."""

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..extras import require
from ..photos import ImageError
from .bank import MapBank, MapBankWriter
from .bank.layout import SKIPPED, read_section
from .folder import folder_digest

__all__ = ["Job", "Ranks", "add_options", "check_out", "fill", "whole"]


class Job(NamedTuple):
    """A bank to be filled.

    Attributes:
        out: the bank.
        dataset: an ImageFolder.
        grid: (h, w) of every map.
        teacher: name to note in the bank.
        inputs: what the maps depend on, by name; the same in every process.
        fingerprints: of the files that each map is made of, [N] uint32; called by the first process only.
        load: id to (content, (height, width) of the source image), called in the loader's workers.
        blank: content in the place of an image that is skipped.
        to_maps: (content [B, ...], ids [B]) to maps [B, h, w].
    """

    out: Path
    dataset: Any
    grid: tuple[int, int]
    teacher: str
    inputs: Mapping[str, str]
    fingerprints: Callable[[], np.ndarray[Any, Any]]
    load: Callable[[int], tuple[Tensor, tuple[int, int]]]
    blank: Tensor
    to_maps: Callable[[Tensor, Tensor], Tensor]


class Ranks:
    """This process among those that torchrun started; alone without torchrun. A context manager."""

    def __init__(self) -> None:
        self.launched = dist.is_available() and dist.is_torchelastic_launched()
        self.rank, self.count, self.local = 0, 1, 0

    def __enter__(self) -> "Ranks":
        if self.launched:
            # Shares take differently long, and waiting for the slowest is no failure.
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self.local = int(os.environ["LOCAL_RANK"])
        return self

    def __exit__(self, *_: object) -> None:
        if self.launched and dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Wait for all processes."""
        if self.launched:
            dist.barrier()


class Numbered(Dataset[Any]):
    """Some items of a job, each as (id, content, height and width of the source, why it is skipped or nothing)."""

    def __init__(self, ids: Tensor, job: Job, skip_broken: bool) -> None:
        self.ids, self.load, self.blank, self.skip_broken = ids, job.load, job.blank, skip_broken

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, str]:
        number, why = int(self.ids[index]), ""
        try:
            content, size = self.load(number)
        except ImageError as error:
            if not self.skip_broken:
                raise
            content, size, why = self.blank, (SKIPPED, SKIPPED), str(error)
        return number, content, torch.from_numpy(np.array(size)), why


def fill(job: Job, ranks: Ranks, args: argparse.Namespace) -> None:
    """Write the maps that are missing, each process its share of them, and finish the bank."""
    labels = [label for _, label in job.dataset.samples]
    if ranks.rank == 0:
        writer = MapBankWriter.create(
            job.out, len(labels), job.grid, labels, None, job.teacher, folder_digest(job.dataset),
            inputs=job.inputs, save_every=args.save_every,
        )  # fmt: skip
        check_images(job, writer)
        ranks.wait()
    else:
        ranks.wait()
        writer = MapBankWriter.open_partial(job.out, inputs=job.inputs, save_every=args.save_every)
    with writer:
        pending = writer.pending()
        ranks.wait()  # nobody writes before everybody knows what is missing
        start = time.monotonic()
        write_share(job, writer, pending, ranks, args)
        writer.save()
        ranks.wait()
        if ranks.rank == 0:
            if (read_section(writer.file, writer.sections["sizes"]) == SKIPPED).all():
                raise ValueError(f"none of the {len(labels)} images can be read: there is nothing to make a bank of")
            summarise(writer.finish(), len(pending), time.monotonic() - start)
    ranks.wait()


def check_images(job: Job, writer: MapBankWriter) -> None:
    """Raise ValueError where an image has changed since its map was written."""
    changed = writer.compare_images(job.fingerprints())
    if len(changed):
        writer.close()
        first = job.dataset.samples[int(changed[0])][0]
        raise ValueError(
            f"{writer.partial} holds maps of {len(changed)} images that have changed since, the first is {first}: "
            "delete it to start anew"
        )


def write_share(job: Job, writer: MapBankWriter, pending: Tensor, ranks: Ranks, args: argparse.Namespace) -> None:
    """Write this process's share of the pending maps, with a progress bar in the first process."""
    count = len(job.dataset.samples)
    done = count - len(pending)
    if ranks.rank == 0 and done:
        print(f"{done} of {count} maps are there already, continuing", flush=True)
    share = pending.tensor_split(ranks.count)[ranks.rank]
    loader: Iterable[Any] = DataLoader(
        Numbered(share, job, args.skip_broken),
        batch_size=args.batch_size,
        num_workers=args.workers,
        pin_memory=torch.cuda.is_available(),
    )
    alone = ranks.count == 1
    with require("tqdm").tqdm(
        total=count if alone else len(share),
        initial=done if alone else 0,
        desc=job.out.name if alone else f"{job.out.name}, process 1 of {ranks.count}",
        unit="map",
        disable=ranks.rank != 0,
    ) as bar:
        for ids, content, sizes, reasons in loader:
            for why in filter(None, reasons):
                bar.write(f"skipped: {why}", file=sys.stderr)
            good = sizes[:, 0] != SKIPPED
            if good.any():
                writer.write(ids[good], job.to_maps(content[good], ids[good]), sizes[good])
            writer.skip(ids[~good])
            bar.update(len(ids))


def summarise(bank: MapBank, new: int, seconds: float) -> None:
    h, w = bank.grid
    skipped = len(bank.skipped)
    empty = int((bank.scales == 0).sum()) - skipped
    print(
        f"{bank.path}: {len(bank)} maps of {h}x{w}, {bank.path.stat().st_size / 1e6:.1f} MB, "
        f"{new} of them new in {seconds:.0f} s; {100 * empty / len(bank):.1f} % are all zero"
    )
    if skipped:
        print(f"{skipped} of {len(bank)} images could not be read and have no map")


def check_out(out: Path) -> None:
    """Raise for a bank that exists, and for a folder that does not."""
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists already: delete it or give another --out")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {out.parent} for --out {out}")


def whole(low: int) -> Callable[[str], int]:
    """Type of a command-line argument: a whole number of at least `low`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, got {text!r}")
        return value

    return parse


def seconds(text: str) -> float:
    """Type of a command-line argument: a time of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, at least 0, got {text!r}")
    return value


def add_options(command: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the options of `fill` to a command."""
    command.add_argument(
        "--skip-broken",
        action="store_true",
        help="leave images out that cannot be read (truncated, empty, no images) and count them at the end "
        "(default: stop at the first and name it)",
    )
    command.add_argument("--batch-size", type=whole(1), default=batch_size, metavar="N", help="(default: %(default)s)")
    command.add_argument(
        "--workers",
        type=whole(0),
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="loader processes (default: %(default)s)",
    )
    command.add_argument(
        "--save-every",
        type=seconds,
        default=5.0,
        metavar="SECONDS",
        help="time between records of progress (default: %(default)g)",
    )
