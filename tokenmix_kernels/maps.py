"""Command line for map banks: build one with a teacher, convert published label maps, look at one.

    python -m tokenmix_kernels.maps build train/ --model resnet50 --out train.bank
    torchrun --nproc-per-node 8 -m tokenmix_kernels.maps build train/ --model resnet50 --out train.bank
    python -m tokenmix_kernels.maps convert label_top5_train_nfnet/ --data train/ --out train.bank
    python -m tokenmix_kernels.maps inspect train.bank --data train/

`build` and `convert` can be killed at any time; the same command goes on where they stopped.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .activation import ActivationTeacher, load_teacher
from .bank import MapBank, MapBankWriter, dataset_digest
from .extras import require

__all__ = ["folder_digest", "main"]


def folder_digest(dataset: Any) -> str:
    """`dataset_digest` of a torchvision ImageFolder: paths relative to its root, with forward slashes.

    Args:
        dataset: anything with ``root`` and ``samples``, a list of (path, label).
    """
    names = [Path(os.path.relpath(path, dataset.root)).as_posix() for path, _ in dataset.samples]
    return dataset_digest(names, [label for _, label in dataset.samples])


def _open_folder(root: Path) -> Any:
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    try:
        return require("torchvision.datasets").ImageFolder(str(root))
    except FileNotFoundError as error:
        raise ValueError(f"{root} must hold one folder of images per class: {error}") from error


def _class_indices(classes: Sequence[str], teacher_classes: int | None, class_map: Path | None) -> list[int]:
    """Which class of the teacher each folder is.

    Args:
        classes: folder names in the order of the labels.
        teacher_classes: K of the teacher, None when it is not known.
        class_map: a text file, ``folder index`` on each line, or None.

    Raises:
        ValueError: there is no telling, or the file is incomplete.
    """
    if class_map is not None:
        known: dict[str, int] = {}
        for number, line in enumerate(class_map.read_text().splitlines(), 1):
            if line.strip():
                folder, _, index = line.strip().rpartition(" ")
                if not folder or not index.isdecimal():
                    raise ValueError(f"{class_map} line {number} must be 'folder index', not {line!r}")
                known[folder.strip()] = int(index)
        absent = [folder for folder in classes if folder not in known]
        if absent:
            raise ValueError(f"{class_map} has no line for {len(absent)} folders, the first is {absent[0]}")
        indices = [known[folder] for folder in classes]
        if teacher_classes is not None and max(indices) >= teacher_classes:
            raise ValueError(f"{class_map} names class {max(indices)}, the teacher has {teacher_classes}")
        return indices
    if len(classes) == teacher_classes:
        return list(range(len(classes)))
    if teacher_classes in (None, 1000):
        synsets = require("timm.data").ImageNetInfo("imagenet-1k").label_names()
        position = {name: index for index, name in enumerate(synsets)}
        if all(folder in position for folder in classes):
            return [position[folder] for folder in classes]
    if teacher_classes is None:
        return list(range(len(classes)))
    raise ValueError(
        f"the data has {len(classes)} classes but the teacher {teacher_classes}, and the folders are not "
        "ImageNet's: say with --class-map which class of the teacher each folder is"
    )


class _Ranks:
    """This process among those that torchrun started; alone without torchrun."""

    def __init__(self) -> None:
        self.launched = dist.is_available() and dist.is_torchelastic_launched()
        self.rank, self.count, self.local = 0, 1, 0
        if self.launched:
            # Slices take differently long, and waiting for the slowest is no failure.
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
            self.rank, self.count = dist.get_rank(), dist.get_world_size()
            self.local = int(os.environ["LOCAL_RANK"])

    def wait(self) -> None:
        if self.launched:
            dist.barrier()

    def leave(self) -> None:
        if self.launched and dist.is_initialized():
            dist.destroy_process_group()


class _Numbered(Dataset[Any]):
    """Some items of a data set, each as (id, content, height and width of the source)."""

    def __init__(self, ids: Tensor, load: Callable[[int], tuple[Tensor, tuple[int, int]]]) -> None:
        self.ids = ids
        self.load = load

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        number = int(self.ids[index])
        content, size = self.load(number)
        return number, content, torch.tensor(size)


def _fill(
    out: Path,
    dataset: Any,
    grid: tuple[int, int],
    teacher: str,
    load: Callable[[int], tuple[Tensor, tuple[int, int]]],
    to_maps: Callable[[Tensor, Tensor], Tensor],
    ranks: _Ranks,
    args: argparse.Namespace,
) -> None:
    """Write the maps that are missing, each process its slice of them, and finish the bank.

    Args:
        load: id to (content, (height, width) of the source), run in the loader's workers.
        to_maps: (content of a batch, ids [B]) to maps [B, h, w].
    """
    labels = [label for _, label in dataset.samples]
    digest = folder_digest(dataset)
    if ranks.rank == 0:
        writer = MapBankWriter.create(out, len(labels), grid, labels, None, teacher, digest, save_every=args.save_every)
        ranks.wait()
    else:
        ranks.wait()
        writer = MapBankWriter.open_partial(out, save_every=args.save_every)
    with writer:
        pending = writer.pending()
        ranks.wait()  # nobody writes before everybody knows what is missing
        done = len(labels) - len(pending)
        if ranks.rank == 0 and done:
            print(f"{done} of {len(labels)} maps are there already, going on", flush=True)
        mine = pending.tensor_split(ranks.count)[ranks.rank]
        loader: Iterable[Any] = DataLoader(
            _Numbered(mine, load),
            batch_size=args.batch_size,
            num_workers=args.workers,
            pin_memory=torch.cuda.is_available(),
        )
        alone = ranks.count == 1
        start = time.monotonic()
        with require("tqdm").tqdm(
            total=len(labels) if alone else len(mine),
            initial=done if alone else 0,
            desc=out.name if alone else f"{out.name}, process 1 of {ranks.count}",
            unit="map",
            disable=ranks.rank != 0,
        ) as bar:
            for ids, content, sizes in loader:
                writer.write(ids, to_maps(content, ids), sizes)
                bar.update(len(ids))
        writer.save()
        ranks.wait()
        if ranks.rank == 0:
            bank = writer.finish()
            elapsed = time.monotonic() - start
            empty = int((bank.scales == 0).sum())
            print(
                f"{out}: {len(bank)} maps of {grid[0]}x{grid[1]}, {out.stat().st_size / 1e6:.1f} MB, "
                f"{len(pending)} of them new in {elapsed:.0f} s; {100 * empty / len(bank):.1f} % are all zero"
            )
    ranks.wait()


def _read_image(path: str) -> Any:
    image_module = require("PIL.Image")
    try:
        with open(path, "rb") as file:
            return image_module.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"the image {path} cannot be read: {error}") from error


class _ResizedImages:
    """Loads whole images, resized to the teacher's input without cropping, so that maps cover all of it."""

    def __init__(self, samples: list[tuple[str, int]], size: tuple[int, int], interpolation: str) -> None:
        self.samples, self.size, self.interpolation = samples, size, interpolation

    def __call__(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        functional = require("torchvision.transforms.functional")
        image = _read_image(self.samples[number][0])
        resized = functional.resize(image, self.size, functional.InterpolationMode(self.interpolation))
        return functional.pil_to_tensor(resized), (image.height, image.width)


def _build(args: argparse.Namespace) -> None:
    ranks = _Ranks()
    dataset = _open_folder(args.data)
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already: delete it or give another --out")
    model: Any = load_teacher(args.model, args.weights, num_classes=args.num_classes)
    config = model.pretrained_cfg
    given = args.size or list(config["input_size"][1:])
    if len(given) > 2 or min(given) < 1:
        raise ValueError(f"--size must be a side or height and width, at least 1, not {given}")
    for name, values in (("--mean", args.mean), ("--std", args.std)):
        if values and len(values) not in (1, 3):
            raise ValueError(f"{name} must be one number or three, not {len(values)}")
    size = (given[0], given[-1])
    if size != tuple(config["input_size"][1:]) and hasattr(model, "set_input_size"):
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ValueError(
                f"--size must be multiples of the patch size {patch[0]}x{patch[1]} of {args.model}, "
                f"not {size[0]}x{size[1]}"
            )
        model.set_input_size(img_size=size)
    device = args.device or (f"cuda:{ranks.local}" if torch.cuda.is_available() else "cpu")
    teacher = ActivationTeacher(
        model,
        method=args.method,
        mean=tuple(args.mean) if args.mean else None,
        std=tuple(args.std) if args.std else None,
    ).to(device)
    classes = torch.tensor(_class_indices(dataset.classes, teacher.num_classes, args.class_map))
    labels = classes[torch.tensor([label for _, label in dataset.samples])]

    empty = torch.zeros(1, 3, *size, dtype=torch.uint8, device=device)
    h, w = teacher(empty, torch.zeros(1, dtype=torch.int64)).shape[1:]
    weights = args.weights.name if args.weights else "pretrained"
    description = f"{args.model} ({teacher.method}, {size[0]}x{size[1]} px, {weights})"
    load = _ResizedImages(dataset.samples, size, config.get("interpolation", "bicubic"))

    def to_maps(images: Tensor, ids: Tensor) -> Tensor:
        return teacher(images.to(device, non_blocking=True), labels[ids])

    try:
        _fill(args.out, dataset, (h, w), description, load, to_maps, ranks, args)
    finally:
        ranks.leave()


class _LabelMaps:
    """Loads the own-label map out of TokenLabeling's and ReLabel's top-k label maps."""

    def __init__(self, root: Path, samples: list[tuple[str, int]], classes: list[int], region: str) -> None:
        self.root, self.samples, self.classes, self.region = root, samples, classes, region
        self.grid = self.own_map(0).shape

    def path(self, number: int) -> Path:
        image = Path(self.samples[number][0])
        # TokenLabeling cuts the name at its first dot.
        return self.root / image.parent.name / (image.name.partition(".")[0] + ".pt")

    def own_map(self, number: int) -> Tensor:
        """[h, w] float32: the values of the own label, zero where it is not among the top k."""
        path = self.path(number)
        if not path.is_file():
            raise ValueError(f"there is no label map {path} for the image {self.samples[number][0]}")
        try:
            entry = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load has no common error
            raise ValueError(f"the label map {path} cannot be read: {error}") from error
        if not isinstance(entry, Tensor) or entry.ndim != 4 or len(entry) != 2 or 0 in entry.shape:
            shape = list(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(f"the label map {path} must be [2, k, h, w], values and indices, not {shape}")
        label = self.classes[self.samples[number][1]]
        # From these numbers on two class ids share one floating-point number.
        coarse = {torch.float16: 2048, torch.bfloat16: 256}.get(entry.dtype, label + 1)
        if label >= coarse:
            raise ValueError(f"the label map {path} holds class ids as {entry.dtype}, too coarse for {label}")
        values, indices = entry.float()
        if not values.isfinite().all():
            raise ValueError(f"the label map {path} has NaN or infinite values")
        return torch.where(indices == label, values, 0.0).sum(0).clamp(min=0)

    def __call__(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        own = self.own_map(number)
        if own.shape != self.grid:
            raise ValueError(
                f"the label map {self.path(number)} is of {own.shape[0]}x{own.shape[1]}, that of the first "
                f"image of {self.grid[0]}x{self.grid[1]}: all must be of one size"
            )
        source = self.samples[number][0]
        try:
            with require("PIL.Image").open(source) as image:
                width, height = image.size
        except OSError as error:
            raise ValueError(f"the image {source} cannot be read: {error}") from error
        if self.region == "centre":
            own = _from_centre_square(own, height, width)
        return own, (height, width)


def _from_centre_square(own: Tensor, height: int, width: int) -> Tensor:
    """Spread a map [h, w] of an image's centre square over the whole image, zero where it says nothing."""
    side = min(height, width)
    rows = ((torch.arange(own.shape[0]) + 0.5) / own.shape[0] * 2 - 1) * height / side
    columns = ((torch.arange(own.shape[1]) + 0.5) / own.shape[1] * 2 - 1) * width / side
    where = torch.stack(torch.broadcast_tensors(columns[None, :], rows[:, None]), -1)
    return F.grid_sample(own[None, None], where[None], align_corners=False)[0, 0]


def _convert(args: argparse.Namespace) -> None:
    ranks = _Ranks()
    dataset = _open_folder(args.data)
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already: delete it or give another --out")
    if not args.label_maps.is_dir():
        raise FileNotFoundError(f"there is no folder {args.label_maps}")
    classes = _class_indices(dataset.classes, None, args.class_map)
    load = _LabelMaps(args.label_maps, dataset.samples, classes, args.region)
    h, w = load.grid
    description = f"{args.teacher or args.label_maps.resolve().name} (label maps, {args.region})"

    def to_maps(own: Tensor, _ids: Tensor) -> Tensor:
        return own

    try:
        _fill(args.out, dataset, (h, w), description, load, to_maps, ranks, args)
    finally:
        ranks.leave()


def _inspect(args: argparse.Namespace) -> None:
    bank = MapBank.open(args.bank)
    dataset = None
    h, w = bank.grid
    peaks = bank.scales.double() * 255
    seen = (bank.sizes > 0).all(1)
    rows = {
        "file": f"{bank.path}, {bank.path.stat().st_size / 1e6:.1f} MB",
        "maps": f"{len(bank)} of {h}x{w}",
        "teacher": bank.teacher,
        "created": bank.metadata["created"],
        "digest": bank.digest,
        "labels": f"{len(bank.labels.unique())} different, {bank.labels.min()} to {bank.labels.max()}",
        "all-zero maps": f"{int((bank.scales == 0).sum())} (their targets fall back to area shares)",
        "peak of a map": f"median {float(peaks.median()):.4g}, largest {float(peaks.max()):.4g}",
    }
    if seen.any():
        low, high = bank.sizes[seen].amin(0).tolist(), bank.sizes[seen].amax(0).tolist()
        rows["source sizes"] = f"height {low[0]} to {high[0]}, width {low[1]} to {high[1]} px"
    for name, value in rows.items():
        print(f"{name:>14}  {value}")
    if args.verify:
        size = bank.path.stat().st_size
        with require("tqdm").tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
            bank.verify(bar.update)
        print(f"{'checksum':>14}  correct")
    if args.data:
        dataset = _open_folder(args.data)
        labels = [label for _, label in dataset.samples]
        bank.check(count=len(dataset), labels=labels, digest=folder_digest(dataset))
        print(f"{'data':>14}  {args.data} is the data set of the bank")
    spread = np.linspace(0, len(bank) - 1, max(1, min(args.count, len(bank))))
    ids = args.ids or spread.round().astype(int).tolist()
    picture = args.out or bank.path.with_name(bank.path.name + ".png")
    _draw(bank, ids, dataset, picture)
    print(f"{'picture':>14}  {picture}")


def _draw(bank: MapBank, ids: Sequence[int], dataset: Any, picture: Path) -> None:
    """Maps, one panel each; with the data set the image beside its map laid over it."""
    figure_module = require("matplotlib.figure")
    maps = bank.maps(torch.tensor(ids))
    panels = 2 if dataset is not None else 1
    columns = min(len(ids), 4 if panels == 2 else 6)
    lines = -(-len(ids) // columns)
    figure = figure_module.Figure(figsize=(2.1 * panels * columns, 2.4 * lines), layout="constrained")
    axes = np.atleast_2d(figure.subplots(lines, panels * columns, squeeze=False))
    for axis in axes.flat:
        axis.set_axis_off()
    for position, (number, own) in enumerate(zip(ids, maps, strict=True)):
        line, column = divmod(position, columns)
        label = int(bank.labels[number])
        title = f"{number}: {dataset.classes[label] if dataset is not None else f'label {label}'}"
        height, width = bank.sizes[number].tolist()
        if not (height and width):
            height, width = bank.grid
        extent = (0, width, height, 0)
        axis = axes[line, panels * column + panels - 1]
        if dataset is not None:
            image = np.asarray(_read_image(dataset.samples[number][0]))
            grey = image.mean(2)
            beside = axes[line, panels * column]
            beside.imshow(image, extent=extent)
            beside.set_title(title, fontsize=8)
            axis.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=255)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenmix_kernels.maps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    build = commands.add_parser(
        "build",
        help="compute the maps of an image folder with a timm model",
        description="Compute the activation map of every image's own label with a timm classifier. Images "
        "are resized to the teacher's input as a whole, without cropping. Under torchrun every process takes "
        "a share. Killed, the same command goes on.",
    )
    build.add_argument("data", type=Path, help="folder with one folder of images per class")
    build.add_argument("--model", required=True, metavar="NAME", help="timm's name of the teacher")
    build.add_argument("--out", required=True, type=Path, metavar="FILE", help="the bank to write")
    build.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help=".pth or .safetensors checkpoint (default: timm's pretrained weights, downloaded)",
    )
    build.add_argument(
        "--num-classes", type=int, metavar="K", help="classes of the teacher (default: those of the weights)"
    )
    build.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="text file, 'folder index' on each line: the teacher's class of each folder "
        "(default: their order, or ImageNet's for ImageNet's folders)",
    )
    build.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PX",
        help="input of the teacher, side or height and width (default: the model's own)",
    )
    build.add_argument(
        "--method",
        default="auto",
        choices=["auto", "cam", "tokens", "attention"],
        help="kind of map, see ActivationTeacher (default: what fits the model)",
    )
    build.add_argument("--mean", type=float, nargs="+", metavar="M", help="normalisation (default: the model's)")
    build.add_argument("--std", type=float, nargs="+", metavar="S", help="normalisation (default: the model's)")
    build.add_argument("--device", help="where the teacher runs (default: a GPU if there is one)")
    build.set_defaults(run=_build)

    convert = commands.add_parser(
        "convert",
        help="make a bank of TokenLabeling's or ReLabel's label maps",
        description="Take the own label's map out of top-k label maps: one .pt file per image, "
        "FOLDER/class/image.pt, a tensor [2, k, h, w] of values and class indices. Negative values become "
        "zero; an image whose label is in no entry gets an all-zero map, whose target falls back to the area "
        "share.",
    )
    convert.add_argument("label_maps", type=Path, help="folder of the .pt files")
    convert.add_argument("--data", required=True, type=Path, help="the image folder they belong to")
    convert.add_argument("--out", required=True, type=Path, metavar="FILE", help="the bank to write")
    convert.add_argument(
        "--class-map",
        type=Path,
        metavar="FILE",
        help="text file, 'folder index' on each line: the label maps' class of each folder "
        "(default: ImageNet's index for ImageNet's folders, else their order)",
    )
    convert.add_argument(
        "--region",
        default="whole",
        choices=["whole", "centre"],
        help="what of the image the maps cover. Training code reads the published maps as "
        "'whole'; TokenLabeling's generator makes them of the 'centre' square, which this "
        "puts in its place (default: whole)",
    )
    convert.add_argument("--teacher", metavar="NAME", help="name to note in the bank (default: the folder's)")
    convert.set_defaults(run=_convert)

    for command, batch in ((build, 64), (convert, 256)):
        command.add_argument("--batch-size", type=int, default=batch, metavar="N", help=f"(default: {batch})")
        command.add_argument(
            "--workers",
            type=int,
            default=min(4, os.cpu_count() or 1),
            metavar="N",
            help="loader processes (default: %(default)s)",
        )
        command.add_argument(
            "--save-every",
            type=float,
            default=5.0,
            metavar="SECONDS",
            help="between records of progress (default: 5)",
        )

    inspect = commands.add_parser(
        "inspect", help="print what a bank holds and draw some maps",
        description="Print what a bank holds and draw some of its maps, with --data over the images.",
    )  # fmt: skip
    inspect.add_argument("bank", type=Path, help="the bank")
    inspect.add_argument("--data", type=Path, help="its image folder; also checks that it is the right one")
    inspect.add_argument("--out", type=Path, metavar="PNG", help="the picture (default: the bank's name + .png)")
    inspect.add_argument("--count", type=int, default=12, metavar="N", help="maps to draw (default: 12)")
    inspect.add_argument("--ids", type=int, nargs="+", metavar="ID", help="draw these instead")
    inspect.add_argument("--verify", action="store_true", help="read the whole file and compare its checksum")
    inspect.set_defaults(run=_inspect)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 1 after an error, which is printed as one sentence."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError, ImportError) as error:
        # What a loader's worker raises comes with its traceback; the last line is the sentence.
        sentence = str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
        print(f"error: {sentence}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
