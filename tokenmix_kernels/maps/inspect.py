"""`inspect`: print what a bank holds and draw some of its maps."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..extras import require
from ..photos import ImageError, open_image
from .bank import MapBank
from .folder import folder_digest, open_folder
from .job import whole

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command `inspect`."""
    inspect = commands.add_parser(
        "inspect",
        help="print what a bank holds and draw some maps",
        description="Print what a bank holds and draw some of its maps, with --data over the images.",
    )
    inspect.add_argument("bank", type=Path, help="the bank")
    inspect.add_argument("--data", type=Path, help="its image folder; also checks that it is the right one")
    inspect.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: the bank's name + .png)")
    inspect.add_argument("--count", type=whole(1), default=12, metavar="N", help="maps to draw (default: 12)")
    inspect.add_argument("--ids", type=whole(0), nargs="+", metavar="ID", help="draw these instead")
    inspect.add_argument("--verify", action="store_true", help="read the whole file and compare its checksum")
    inspect.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Inspect a bank."""
    bank = MapBank.open(args.bank)
    for name, value in describe(bank).items():
        print(f"{name:>14}  {value}")
    if args.verify:
        size = bank.path.stat().st_size
        with require("tqdm").tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
            bank.verify(bar.update)
        print(f"{'checksum':>14}  correct")
    dataset = None
    if args.data:
        dataset = open_folder(args.data)
        labels = [label for _, label in dataset.samples]
        bank.check(count=len(dataset), labels=labels, digest=folder_digest(dataset))
        print(f"{'data':>14}  {args.data} is the data set of the bank")
    spread = np.linspace(0, len(bank) - 1, min(args.count, len(bank)))
    ids = args.ids or spread.round().astype(int).tolist()
    picture = args.out or bank.path.with_name(bank.path.name + ".png")
    draw(bank, ids, dataset, picture)
    print(f"{'picture':>14}  {picture}")


def describe(bank: MapBank) -> dict[str, str]:
    """What there is to say about a bank, by name."""
    h, w = bank.grid
    peaks = bank.scales.double() * 255
    seen = (bank.sizes > 0).all(1)
    empty = int((bank.scales == 0).sum()) - len(bank.skipped)
    facts = {
        "file": f"{bank.path}, {bank.path.stat().st_size / 1e6:.1f} MB",
        "maps": f"{len(bank)} of {h}x{w}",
        "teacher": bank.teacher,
        "created": bank.metadata["created"],
        "digest": bank.digest,
        "labels": f"{len(bank.labels.unique())} different, {bank.labels.min()} to {bank.labels.max()}",
        "all-zero maps": f"{empty} (their targets fall back to area shares)",
        "peak of a map": f"median {float(peaks.median()):.4g}, largest {float(peaks.max()):.4g}",
    }
    if len(bank.skipped):
        facts["skipped"] = f"{len(bank.skipped)} images that could not be read, the first is {int(bank.skipped[0])}"
    if seen.any():
        low, high = bank.sizes[seen].amin(0).tolist(), bank.sizes[seen].amax(0).tolist()
        facts["source sizes"] = f"height {low[0]} to {high[0]}, width {low[1]} to {high[1]} px"
    return facts | {name: str(value) for name, value in bank.metadata["inputs"].items()}


def draw(bank: MapBank, ids: Sequence[int], dataset: Any, picture: Path) -> None:
    """Draw maps, one panel each; with the data set the image beside its map laid over it."""
    figures = require("matplotlib.figure")
    maps = bank.maps(torch.tensor(ids))
    panels = 2 if dataset is not None else 1
    columns = min(len(ids), 4 if panels == 2 else 6)
    rows = -(-len(ids) // columns)
    figure = figures.Figure(figsize=(2.1 * panels * columns, 2.4 * rows), layout="constrained")
    axes = np.atleast_2d(figure.subplots(rows, panels * columns, squeeze=False))
    for axis in axes.flat:
        axis.set_axis_off()
    for position, (number, own) in enumerate(zip(ids, maps, strict=True)):
        row, column = divmod(position, columns)
        label = int(bank.labels[number])
        title = f"{number}: {dataset.classes[label] if dataset is not None else f'label {label}'}"
        height, width = bank.sizes[number].tolist()
        if height < 1 or width < 1:
            height, width = bank.grid
        extent = (0, width, height, 0)
        axis = axes[row, panels * column + panels - 1]
        if dataset is not None:
            image = read_or_grey(dataset.samples[number][0])
            beside = axes[row, panels * column]
            beside.imshow(image, extent=extent)
            beside.set_title(title, fontsize=8)
            axis.imshow(image.mean(2), extent=extent, cmap="gray", vmin=0, vmax=255)
        axis.imshow(
            own.numpy(),
            extent=extent,
            cmap="inferno",
            vmin=0,
            vmax=float(own.max()) or 1.0,
            alpha=1.0 if dataset is None else 0.6,
            interpolation="nearest" if dataset is None else "bilinear",
        )
        caption = f"peak {float(own.max()):.3g}" if own.any() else "all zero"
        axis.set_title(caption if dataset is not None else f"{title}, {caption}", fontsize=8)
    figure.suptitle(f"{bank.path.name}: {bank.teacher}, {bank.grid[0]}x{bank.grid[1]}", fontsize=9)
    figure.savefig(picture, dpi=110)


def read_or_grey(path: str) -> np.ndarray[Any, Any]:
    """[H, W, 3] pixels of an image; one grey pixel where it cannot be read."""
    try:
        return np.asarray(open_image(path))
    except ImageError:
        return np.full((1, 1, 3), 128, np.uint8)
