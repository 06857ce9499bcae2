"""The whole input pipeline on the device, timm's and ours: bytes, launches, CPU time, and what follows for a GPU.

uint8 batches are moved, converted, normalised, erased (probability 0.25, 'pixel'), mixed, and get dense targets. timm's
steps are those of its `PrefetchLoader`, `RandomErasing` and `Mixup`, as they are; ours are those of `TokenMixLoader`.

Launches and bytes are counted: one launch for every operation that writes, the bytes of all that it reads and writes,
for timm on tensors without values. What is drawn differs from batch to batch, so figures are means. The time of timm's
steps on a GPU is not known here. That of their bytes alone at the card's bandwidth is too high where an L2 cache keeps
a batch between two steps, and too low by the gaps between many small launches.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.loader import PrefetchLoader
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from tokenmix_kernels import TokenMix
from tokenmix_kernels.settings import MIXUP
from tokenmix_kernels.timm_loader import TokenMixLoader

from .machine import describe, write_json

__all__ = ["Traffic", "add_arguments", "count", "main", "time_on_cpu"]

ERASING: dict[str, Any] = {"re_prob": 0.25, "re_mode": "pixel", "re_count": 1}
MIXES: dict[str, dict[str, Any]] = {
    "Mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 0.0},
    "CutMix or tokens": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    "either, by batch": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "either, by element": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mode": "elem"},
}
# Peak bandwidths of the data sheets (SXM, 80 GB), in bytes a microsecond.
CARDS = {"A100": 2.039e6, "H100": 3.35e6}
SIMULATED = Path(__file__).parent / "results" / "simulated.json"

aten = torch.ops.aten
# Write without reading what was there.
OVERWRITE = {aten.copy_.default, aten.normal_.default, aten.fill_.Scalar, aten.zero_.default}


class Traffic(TorchDispatchMode):
    """Counts what a GPU would launch, and the bytes that it would read and write.

    Attributes:
        launches: operations that write values on the device.
        bytes: that they read and write; an operation reads each of its inputs once.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.launches = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device.type == self.device]
        moved = any(one.dim() and one.device.type != self.device for one in given)  # a copy to the device
        alone = all(one.dim() == 0 for one in made)  # numbers, which are the host's
        if alone or moved or func.is_view or "empty" in func.__name__ or func is aten.detach.default:
            return result
        read = [one for one in given if one.device.type == self.device]
        if func in OVERWRITE:
            read = read[1:]
        self.launches += 1
        self.bytes += sum(one.numel() * one.element_size() for one in (*read, *made))
        if func.namespace == "tokenmix_kernels":  # images, ... -> ..., kind: a pixel of a blend is made of two
            images, kind = given[0], result[-1]
            self.bytes += int((kind == MIXUP).sum()) * images[0].numel() * images.element_size()
        return result


def batches(shape: tuple[int, int, int, int], count: int, classes: int = 1000) -> list[tuple[Tensor, Tensor]]:
    """The same uint8 batch on the CPU, so many times."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return [(images, torch.randint(0, classes, shape[:1], generator=generator))] * count


def start_from(seed: int) -> None:
    """Put the generators that both draw from to a state that the seed decides."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def timm_batches(loader: Any, options: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader's batches, mixed as timm's train.py and DeiT's engine do."""
    mixup = Mixup(**options)
    for images, labels in loader:
        yield mixup(images, labels)


def our_batches(loader: Any, options: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    return iter(TokenMixLoader(loader, TokenMix(**options)))


PIPELINES: dict[str, Callable[[Any, dict[str, Any]], Iterator[tuple[Tensor, Tensor]]]] = {
    "timm": timm_batches, "ours": our_batches,
}  # fmt: skip


def count(
    name: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    draws: int,
    erase: bool = True,
) -> dict[str, float]:
    """Means over batches: launches, and bytes for each value of an image.

    Args:
        name: of the pipeline, timm or ours.
        options: of its mix.
        dtype: of the mixed images.
        shape: [B, C, H, W] of a batch.
        draws: number of batches.
        erase: with random erasing.
    """
    start_from(0)
    device = "meta" if name == "timm" else "cpu"  # what ours writes does not depend on values, but needs them
    loader = PrefetchLoader(
        batches(shape, draws, options.get("num_classes", 1000)),  # type: ignore[arg-type]
        device=torch.device(device), img_dtype=dtype, **(ERASING if erase else {}),
    )  # fmt: skip
    with Traffic(device) as traffic:
        for images, _ in PIPELINES[name](loader, options):
            assert images.dtype == dtype and images.shape == shape
    return {"launches": traffic.launches / draws, "bytes": traffic.bytes / draws / np.prod(shape)}


def time_on_cpu(options: dict[str, Any], shape: tuple[int, int, int, int], rounds: int, label: str) -> dict[str, Any]:
    """Milliseconds of CPU time for a batch by both, in turn, on one thread, with erasing, to float32."""
    loader = PrefetchLoader(batches(shape, 1), device=torch.device("cpu"), **ERASING)  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {name: [] for name in PIPELINES}
    for number in tqdm(range(rounds + 2), desc=label, unit="round", leave=False, disable=None):
        for name in list(PIPELINES)[:: 1 if number % 2 else -1]:
            start_from(number)
            begin = time.process_time()
            next(PIPELINES[name](loader, options))
            if number >= 2:
                seconds[name].append(time.process_time() - begin)
    ratios = np.array(seconds["ours"]) / np.array(seconds["timm"])
    low, middle, high = np.percentile(ratios, [20, 50, 80])
    milliseconds = {f"{name}_ms": 1000 * median(taken) for name, taken in seconds.items()}
    return {**milliseconds, "ratio_p20": low, "ratio_p50": middle, "ratio_p80": high}


def simulated() -> dict[str, float]:
    """Microseconds of our launch from uint8 to float16 with tokens of each image and erasing, by card."""
    rows = json.loads(SIMULATED.read_text())["rows"]
    return {row["card"]: row["microseconds"] for row in rows if row["case"] == "uint8 to fp16, erasing"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results/pipeline.json"))
    parser.add_argument("--draws", type=int, default=100, help="batches that are counted")
    parser.add_argument("--rounds", type=int, default=15, help="batches that are timed")
    parser.add_argument(
        "--shape", type=int, nargs=4, default=(128, 3, 224, 224), help="of the batches that are counted"
    )
    parser.add_argument("--cpu-shape", type=int, nargs=4, default=(32, 3, 224, 224), help="of those that are timed")


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    shape, cpu_shape = tuple(asked.shape), tuple(asked.cpu_shape)
    values = int(np.prod(shape))
    rows = []
    for label, options in MIXES.items():
        for name in PIPELINES:
            for dtype in (torch.float16, torch.float32):
                # Ours has values, and does for each image the same in a small batch.
                counted = count(name, options, dtype, shape if name == "timm" else (4, *shape[1:]), asked.draws)
                microseconds = {card: counted["bytes"] * values / rate for card, rate in CARDS.items()}
                rows.append({
                    "pipeline": name, "mix": label, "dtype": str(dtype).removeprefix("torch."),
                    **counted, "us_of_bytes": microseconds,
                })  # fmt: skip
    timed = [{"mix": label, **time_on_cpu(options, cpu_shape, asked.rounds, label)} for label, options in MIXES.items()]
    record = {
        "kind": "pipeline", "command": "python -m bench pipeline", "machine": describe(), "shape": shape,
        "draws": asked.draws, "rows": rows, "simulated_us": simulated(), "cpu_shape": cpu_shape,
        "rounds": asked.rounds, "cpu": timed,
    }  # fmt: skip
    write_json(asked.out, record)
