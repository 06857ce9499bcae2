"""Whole training steps with each mixer, interleaved: what mixing costs beside the model it feeds."""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from timm.data import Mixup
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor
from tqdm import tqdm

from tokenmix_kernels import TokenMix, naive

from .device import choose_device, mixing_device
from .files import write_lines

Mixer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
WARM_UP = 2


class PublishedMix:
    """TokenMix in the tensor steps of the published code, by `naive.py`: one mask for the batch, drawn in Python,
    images blended by multiplication, and dense maps of all classes, pooled with roi_align, for targets.

    The published code has a label smoothing of 0.1.

    Args:
        values, indices: [B, k, h, w], top-k label maps.
        num_classes: K.
        patch_size: side of a token in pixels.
        minimum_tokens: masked beside half of the tokens.
        seed: of the masks.
    """

    def __init__(
        self, values: Tensor, indices: Tensor, num_classes: int, patch_size: int, minimum_tokens: int, seed: int = 0
    ) -> None:
        self.values, self.indices = values, indices
        self.num_classes, self.patch_size, self.minimum_tokens = num_classes, patch_size, minimum_tokens
        self.source = random.Random(seed)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] float and labels [B] to mixed images and targets [B, K]."""
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        count = grid[0] * grid[1]
        tokens = min(count, count // 2 + self.minimum_tokens)
        mask = naive.block_mask(grid, tokens, self.source).to(images.device).expand(len(labels), *grid)
        return naive.published_mix(images, labels, self.values, self.indices, None, mask, self.num_classes)


def make_mixers(args: argparse.Namespace, labels: Tensor, num_classes: int, patch_size: int) -> dict[str, Mixer]:
    """Each takes (images uint8, labels) to (normalised images, dense targets)."""
    device, batch = labels.device, len(labels)
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN, device=device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_DEFAULT_STD, device=device).view(1, 3, 1, 1) * 255
    off = args.smoothing / num_classes

    def normalised(images: Tensor) -> Tensor:
        return (images.float() - mean) / std

    def none(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        targets = torch.full((batch, num_classes), off, device=device)
        return normalised(images), targets.scatter_(1, labels[:, None], 1 - args.smoothing + off)

    # Top-5 label maps of 18x18, the own label first, as the published ones are.
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(batch, 5, 18, 18, generator=generator).to(device)
    others = (labels[:, None] + torch.arange(1, 5, device=device)) % num_classes
    indices = torch.cat([labels[:, None], others], 1)[:, :, None, None].expand(values.shape).contiguous()
    cutmix = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, label_smoothing=args.smoothing, num_classes=num_classes)
    minimum_tokens = args.minimum_tokens
    if minimum_tokens is None:
        minimum_tokens = ((args.input_size // patch_size) ** 2 + 7) // 14
    published = PublishedMix(values, indices, num_classes, patch_size, minimum_tokens, args.seed)
    ours = TokenMix(
        mixup_alpha=0.0,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
        patch_size=patch_size,
        minimum_tokens=minimum_tokens,
        mode="elem",
        mean=[255 * value for value in IMAGENET_DEFAULT_MEAN],
        std=[255 * value for value in IMAGENET_DEFAULT_STD],
    )
    own_maps = values[:, 0].contiguous()
    return {
        "none": none,
        "timm CutMix": lambda images, labels: cutmix(normalised(images), labels),
        "published TokenMix": lambda images, labels: published(normalised(images), labels),
        "tokenmix_kernels": lambda images, labels: ours(images, labels, own_maps),
    }


class Clock:
    """Seconds between marks, and the most memory in use: by events on a CUDA device, by the host elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        if not self.cuda:
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif platform.system() == "Linux":
            Path("/proc/self/clear_refs").write_text("5")  # the kernel starts the peak of resident memory anew

    def peak(self) -> float | None:
        """Bytes since `reset_peak`; None where nobody counts."""
        if self.cuda:
            return float(torch.cuda.max_memory_allocated())
        if platform.system() == "Linux":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM"):
                    return 1024.0 * int(line.split()[1])
        return None


def profile_mixers(args: argparse.Namespace) -> dict[str, Any]:
    """Time --max-steps (default 20) whole steps with each mixer in turn; print a table, write JSON and a picture.

    Images are random: reading and augmenting them is the same for all mixers and is left out.
    """
    device = choose_device(args.device)
    if mixing_device(device) != device:
        raise ValueError(f"--profile-mixers compares mixing on the device of the model: not on {device.type}")
    if args.threads:
        torch.set_num_threads(args.threads)
    rounds = args.max_steps or 20
    torch.manual_seed(args.seed)
    num_classes = 1000
    model: Any = timm.create_model(
        args.model,
        num_classes=num_classes,
        img_size=args.input_size,
        drop_path_rate=args.drop_path,
        **args.model_kwargs,
    ).to(device)
    patch_size = args.patch_size or model.patch_embed.patch_size[0]
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=1e-4, weight_decay=args.weight_decay)
    criterion = BinaryCrossEntropy()
    images = torch.randint(0, 256, (args.batch_size, 3, args.input_size, args.input_size), dtype=torch.uint8).to(device)
    labels = torch.randint(0, num_classes, (args.batch_size,)).to(device)
    mixers = make_mixers(args, labels, num_classes, patch_size)
    net: Any = torch.compile(model) if args.compile else model
    autocast = device.type == "cuda" if args.amp is None else args.amp
    clock = Clock(device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in mixers}  # (mixing, whole step)
    memory: dict[str, list[float]] = {name: [] for name in mixers}
    order = list(mixers)
    model.train()
    for turn in tqdm(range(WARM_UP + rounds), desc="steps with each mixer", disable=None):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            clock.reset_peak()
            begin = clock.mark()
            mixed, targets = mixers[name](images, labels)
            middle = clock.mark()
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                logits = net(mixed)
            criterion(logits.float(), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            end = clock.mark()
            whole, mixing = clock.between(begin, end), clock.between(begin, middle)
            peak = clock.peak()
            del mixed, targets, logits
            if turn >= WARM_UP:
                seconds[name].append((mixing, whole))
                if peak is not None:
                    memory[name].append(peak)

    rows = {}
    for name, times in seconds.items():
        mixing, whole = (statistics.median(column) for column in zip(*times, strict=True))
        # Shares and ratios are formed within a round, where the machine was in one mood, and then the median taken.
        share = statistics.median(a / b for a, b in times)
        ratio = statistics.median(b / none for (_, b), (_, none) in zip(times, seconds["none"], strict=True))
        rows[name] = {
            "mixing_ms": 1000 * mixing,
            "step_ms": 1000 * whole,
            "mixing_share": share,
            "step_to_none": ratio,
            "images_per_second": args.batch_size / whole,
            "peak_memory_mb": statistics.median(memory[name]) / 1e6 if memory[name] else None,
        }
    cuda = device.type == "cuda"
    result = {
        "kind": "mixers",
        "command": f"python -m train --profile-mixers --recipe {args.recipe} --batch-size {args.batch_size} "
        f"--max-steps {rounds}",
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "input_size": args.input_size,
        "batch_size": args.batch_size,
        "rounds": rounds,
        "mixers": rows,
    }
    output = Path(args.output)
    write_lines([json.dumps(result, indent=1)], output / "mixers.json")
    draw(result, output / "mixers.png")
    print(
        f"{args.model}, {args.batch_size} images of {args.input_size}x{args.input_size}, {result['device']}, "
        f"medians of {rounds} interleaved steps"
    )
    print(f"{'mixer':<20}{'mixing ms':>11}{'step ms':>10}{'mixing':>9}{'to none':>9}{'images/s':>10}{'peak MB':>9}")
    for name, row in rows.items():
        most = f"{row['peak_memory_mb']:.0f}" if row["peak_memory_mb"] else "-"
        print(
            f"{name:<20}{row['mixing_ms']:>11.2f}{row['step_ms']:>10.1f}{row['mixing_share']:>9.1%}"
            f"{row['step_to_none']:>9.3f}{row['images_per_second']:>10.1f}{most:>9}"
        )
    print(f"\nrecords  {output / 'mixers.json'}\npicture  {output / 'mixers.png'}")
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    rows: dict[str, dict[str, float]] = result["mixers"]
    figure = Figure(figsize=(8.6, 0.62 * len(rows) + 1.5), layout="constrained")
    axis = figure.subplots()
    for y, (name, row) in enumerate(rows.items()):
        rest = row["step_ms"] - row["mixing_ms"]
        axis.barh(y, rest, color="#cbd5e0", height=0.62)
        colour = "#2b6cb0" if name == "tokenmix_kernels" else "#dd6b20"
        axis.barh(y, row["mixing_ms"], left=rest, color=colour, height=0.62)
        axis.text(
            row["step_ms"],
            y,
            f"  mixing {row['mixing_ms']:.1f} ms, {row['mixing_share']:.1%}   {row['images_per_second']:.4g} images/s",
            va="center",
            fontsize=9,
        )
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlim(0, max(row["step_ms"] for row in rows.values()) * 1.7)
    axis.set_xlabel("milliseconds per step: model and optimiser (grey), mixing (colour)")
    title = f"{result['model']}, {result['batch_size']} images of {result['input_size']} pixels, {result['device']}"
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
