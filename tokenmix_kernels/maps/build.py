"""`build`: the maps of an image folder by a timm model."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokenmix_kernels import __version__

from ..extras import require
from ..photos import open_image
from .folder import class_indices, fingerprints, open_folder
from .job import Job, Ranks, add_options, check_out, fill, whole
from .teacher import METHODS, ActivationTeacher, load_teacher

__all__ = ["add_parser"]

DEVICES = "cpu, cuda, cuda:N, mps or xpu"


def add_parser(commands: Any) -> None:
    """Add the command `build`."""
    build = commands.add_parser(
        "build",
        help="compute the maps of an image folder with a timm model",
        description="Compute the activation map of every image's own label with a timm classifier. Images are resized "
        "to the teacher's input as a whole, without cropping; EXIF orientation is ignored, as by ImageFolder. Under "
        "torchrun every process computes a share. After an interruption the same command continues.",
    )
    build.add_argument("data", type=Path, help="folder with one folder of images per class")
    build.add_argument("--model", required=True, metavar="NAME", help="timm's name of the teacher")
    build.add_argument("--out", required=True, type=Path, metavar="FILE", help="the bank to write")
    build.add_argument(
        "--weights",
        type=Path,
        metavar="FILE",
        help=".pth or .safetensors checkpoint, of the trainer's best.pt the weights that scored best, raw or averaged "
        "(default: timm's pretrained weights, downloaded)",
    )
    build.add_argument(
        "--num-classes", type=whole(1), metavar="K", help="classes of the teacher (default: those of the weights)"
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
        type=whole(1),
        nargs="+",
        metavar="PX",
        help="input of the teacher, side or height and width (default: the model's own)",
    )
    build.add_argument(
        "--method",
        default="auto",
        choices=METHODS,
        help="kind of map, see ActivationTeacher (default: what fits the model)",
    )
    build.add_argument("--mean", type=float, nargs="+", metavar="M", help="normalisation (default: the model's)")
    build.add_argument("--std", type=float, nargs="+", metavar="S", help="normalisation (default: the model's)")
    build.add_argument(
        "--device", help=f"where the teacher runs: {DEVICES} (default: a GPU of CUDA or ROCm if there is one)"
    )
    add_options(build, batch_size=64)
    build.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Build a bank."""
    with Ranks() as ranks:
        for library in ("timm", "torchvision", "tqdm"):
            require(library)
        check_out(args.out)
        for name, values in (("--mean", args.mean), ("--std", args.std)):
            if values and len(values) not in (1, 3):
                raise ValueError(f"{name} must be one number or three, got {len(values)}")
        device = pick_device(args.device, ranks.local)
        dataset = open_folder(args.data)
        model: Any = load_teacher(args.model, args.weights, num_classes=args.num_classes)
        digest = state_digest(model)
        config = model.pretrained_cfg
        size = set_size(model, args)
        teacher = ActivationTeacher(model, method=args.method, mean=args.mean, std=args.std).to(device)
        classes = class_indices(dataset.classes, teacher.num_classes, args.class_map)
        labels = torch.tensor(classes)[torch.tensor([label for _, label in dataset.samples])]

        blank = torch.zeros(3, *size, dtype=torch.uint8)
        h, w = teacher(blank[None].to(device), torch.zeros(1, dtype=torch.int64)).shape[1:]
        weights = args.weights.name if args.weights else "pretrained"
        interpolation = config.get("interpolation", "bicubic")

        def to_maps(images: Tensor, ids: Tensor) -> Tensor:
            return teacher(images.to(device, non_blocking=True), labels[ids])

        job = Job(
            out=args.out,
            dataset=dataset,
            grid=(h, w),
            teacher=f"{args.model} ({teacher.method}, {size[0]}x{size[1]} px, {weights})",
            inputs={
                "weights": digest,
                "mean": ", ".join(f"{value:g}" for value in teacher.statistics[0]),
                "std": ", ".join(f"{value:g}" for value in teacher.statistics[1]),
                "interpolation": interpolation,
                "classes": hashlib.sha256(str(classes).encode()).hexdigest(),
                "code": f"tokenmix_kernels {__version__}, timm {require('timm').__version__}",
            },
            fingerprints=lambda: fingerprints([path for path, _ in dataset.samples]),
            load=ResizedImages(dataset.samples, size, interpolation),
            blank=blank,
            to_maps=to_maps,
        )
        fill(job, ranks, args)


class ResizedImages:
    """Loads whole images, resized to the teacher's input without cropping, so that maps cover all of it."""

    def __init__(self, samples: list[tuple[str, int]], size: tuple[int, int], interpolation: str) -> None:
        self.samples, self.size, self.interpolation = samples, size, interpolation

    def __call__(self, number: int) -> tuple[Tensor, tuple[int, int]]:
        functional = require("torchvision.transforms.functional")
        image = open_image(self.samples[number][0])
        resized = functional.resize(image, self.size, functional.InterpolationMode(self.interpolation))
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1), (image.height, image.width)


def set_size(model: Any, args: argparse.Namespace) -> tuple[int, int]:
    """(height, width) of the teacher's input, which a vision transformer is told.

    Raises:
        ValueError: --size does not fit the model, or the model does not take RGB images.
    """
    channels, *own = model.pretrained_cfg["input_size"]
    if channels != 3:
        raise ValueError(f"--model must take RGB images, {args.model} takes {channels} channels")
    given = args.size or own
    if len(given) > 2:
        raise ValueError(f"--size must be a side or height and width, got {given}")
    size = (given[0], given[-1])
    if size != tuple(own) and hasattr(model, "set_input_size"):
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1, 1))
        if size[0] % patch[0] or size[1] % patch[1]:
            raise ValueError(
                f"--size must be multiples of the patch size {patch[0]}x{patch[1]} of {args.model}, "
                f"got {size[0]}x{size[1]}"
            )
        model.set_input_size(img_size=size)
    return size


def pick_device(name: str | None, local: int) -> torch.device:
    """The device that --device names, for the process of this number on its machine.

    Raises:
        ValueError: it names none, or one that is not there.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps", "xpu"):
        hint = " (a GPU of NVIDIA or AMD is cuda)" if "gpu" in name.lower() else ""
        raise ValueError(f"--device must be {DEVICES}, got {name!r}{hint}")
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "xpu": torch.xpu.is_available,
    }
    if device.type in available and not available[device.type]():
        raise ValueError(f"--device {name}: there is none on this machine that this torch can use; try --device cpu")
    if device.type == "cuda":
        index = local if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, number {index} is absent")
        device = torch.device("cuda", index)
    return device


def state_digest(model: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
