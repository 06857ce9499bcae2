"""What cheaper maps cost: the error of the weights against full float maps of the demo's teacher.

    python -m bench.fidelity [--images 480] [--out bench/results/fidelity.json]

Takes whole photographs of the elpv set (the demo's extra is needed), random crops as DeiT makes them, and one block
mask for each image; compares both weights of every pair with those from float32 maps at 18x18 (the teacher at 576
pixels).
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Subset
from torchvision.transforms import RandomResizedCrop

from tokenmix_kernels import pool_targets, token_mask
from tokenmix_kernels.maps.bank import MapBank, MapBankWriter
from tokenmix_kernels.maps.teacher import ActivationTeacher, load_teacher
from train.config import parse
from train.data import Data, load_data
from train.teacher import LITE0, LITE0_MEAN, LITE0_STD, Teacher, fit_probe, make_teacher, weights_file, whole_maps

from .machine import describe, write_json

CPU = torch.device("cpu")
FEW = 100  # labelled photographs of the weaker teacher


def maps_of(teacher: Teacher, data: Data, ids: list[int]) -> Tensor:
    """Float maps [N, h, w] of the own labels of some whole training images."""
    rows = [maps for _, maps, _ in whole_maps(teacher, data.train, data.labels, ids, CPU, 0)]
    return torch.cat(rows)


def as_bytes(maps: Tensor, labels: Tensor) -> Tensor:
    """The maps after a round trip through a bank."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "maps.bank"
        sizes = torch.full((len(maps), 2), 300)
        grid = (maps.shape[1], maps.shape[2])
        with MapBankWriter.create(path, len(maps), grid, labels, sizes, "fidelity", "fidelity") as writer:
            writer.write(torch.arange(len(maps)), maps)
            writer.finish()
        return MapBank.open(path).maps(torch.arange(len(maps))).clone()


def crops(count: int) -> Tensor:
    """Boxes [count, 4] of DeiT's random crops of a 300x300 photograph."""
    torch.manual_seed(0)
    photograph = torch.empty(3, 300, 300)
    boxes = []
    for _ in range(count):
        top, left, height, width = RandomResizedCrop.get_params(photograph, [0.08, 1.0], [3 / 4, 4 / 3])
        boxes.append([left / 300, top / 300, (left + width) / 300, (top + height) / 300])
    return torch.tensor(boxes)


def weak_teacher(data: Data, folder: Path) -> Teacher:
    """The demo's network at 224 pixels with a linear probe that saw FEW photographs."""
    args = parse(["--recipe", "demo"])
    model = load_teacher(LITE0, weights_file(LITE0, args.teacher_weights))
    few = list(range(0, len(data.labels), len(data.labels) // FEW))
    small = replace(data, train=Subset(data.train, few), labels=[data.labels[i] for i in few])
    fit_probe(model, small, 224, LITE0_MEAN, LITE0_STD, CPU, folder / "weak.pt", 0)
    return Teacher(ActivationTeacher(model, mean=LITE0_MEAN, std=LITE0_STD), 224, "weak", folder / "weak.bank")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=480, help="photographs to compare on")
    parser.add_argument("--out", type=Path, default=Path("bench/results/fidelity.json"))
    asked = parser.parse_args()

    args = parse(["--recipe", "demo"])
    data = load_data(args)
    step = max(1, len(data.labels) // asked.images)
    ids = list(range(0, len(data.labels), step))[: asked.images]
    labels = torch.tensor(data.labels)[ids]
    full = maps_of(make_teacher(parse(["--recipe", "demo", "--teacher-size", "576"]), data, CPU), data, ids)
    small = maps_of(make_teacher(parse(["--recipe", "demo", "--teacher-size", "224"]), data, CPU), data, ids)
    with tempfile.TemporaryDirectory() as folder:
        weak = maps_of(weak_teacher(data, Path(folder)), data, ids)
    averaged = torch.nn.functional.adaptive_avg_pool2d(full, 7)
    variants = {
        "18x18 in bytes": as_bytes(full, labels),
        "18x18 averaged to 7x7": averaged,
        "18x18 averaged to 7x7, in bytes": as_bytes(averaged, labels),
        "7x7, the teacher at 224 pixels": small,
        f"7x7, its probe fitted on {FEW} photographs": weak,
        "none: shares of the area": torch.ones(len(ids), 1, 1),
    }
    boxes = crops(len(ids))
    mask = token_mask(len(ids), (14, 14), seed=0)
    truth = pool_targets(full, labels, mask, boxes=boxes)
    rows = []
    for name, maps in variants.items():
        error = (pool_targets(maps, labels, mask, boxes=boxes) - truth).abs().flatten()
        rows.append(
            {
                "maps": name,
                "mean_error": float(error.mean()),
                "p95_error": float(error.quantile(0.95)),
                "kilobytes_per_image": maps[0].numel() * (1 if "bytes" in name else 4) / 1000,
            }
        )
        print(f"{name:45} mean |error| {rows[-1]['mean_error']:.4f}   95 % below {rows[-1]['p95_error']:.4f}")
    record = {
        "kind": "fidelity",
        "command": f"python -m bench.fidelity --images {asked.images}",
        "machine": describe(),
        "images": len(ids),
        "truth": "float32 18x18",
        "rows": rows,
    }
    write_json(asked.out, record)


if __name__ == "__main__":
    main()
