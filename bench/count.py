"""Counts in the compiled kernel: registers, widths of accesses, sectors of memory, instructions of each warp.

The PTX that Triton compiles is executed on the CPU by a simulator that is not part of this project: `--ptxsim DIR`
names a folder with a module `ptxsim` that offers `compile_kernel` and `run`. Every result is compared with the
reference.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tokenmix_kernels import kernels, reference
from tokenmix_kernels.settings import Settings

from .machine import describe, write_json

__all__ = ["CASES", "Case", "add_arguments", "main"]

CHUNK = 40  # samples of one launch; their number in the whole run goes into the draws as sample_offset
SECTOR = 32  # bytes
BYTES = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)  # ImageNet's mean and standard deviation, for uint8
CLASS_COUNTS = (100, 1000, 10000, 21841)


class Case(NamedTuple):
    """One launch that is counted.

    Attributes:
        name: as the table shows it.
        samples: how many masks.
        dtype, out_dtype: of the images before and after.
        channels_last, in_place: layout, and whether the images are mixed into themselves.
        settings: what differs from per-element block masks.
        access: least bytes per thread of image loads and stores.
        traffic: what the unique sectors are divided by, 'copy', 'moved' (bytes of the tokens that move, read and
            written once) or 'converted' (bytes of one read and one write of the two dtypes).
        limit: bar of that ratio.
        timed: whether the bars of warps and instructions are stated for this case.
    """

    name: str
    samples: int
    dtype: torch.dtype = torch.float16
    out_dtype: torch.dtype = torch.float16
    channels_last: bool = False
    in_place: bool = False
    settings: dict[str, Any] = {}  # noqa: RUF012
    access: int = 16
    traffic: str = "copy"
    limit: float = 1.0
    timed: bool = False


NORMALISED: dict[str, Any] = {"mean": BYTES[0], "std": BYTES[1]}
CASES = (
    Case("fp16", 1000, timed=True),
    Case("fp32", 200, torch.float32, torch.float32),
    Case("bf16", 200, torch.bfloat16, torch.bfloat16),
    Case("uint8 to fp16", 200, torch.uint8, torch.float16, settings=NORMALISED, access=8, traffic="converted",
         limit=1.02),
    Case("uint8 to bf16", 80, torch.uint8, torch.bfloat16, settings=NORMALISED, access=8, traffic="converted",
         limit=1.02),
    Case("fp16 channels_last", 400, channels_last=True, timed=True),
    Case("fp16 in place, one mask", 400, in_place=True, settings={"mode": "batch"}, traffic="moved", limit=1.05),
    Case("fp16 in place, mask per element", 80, in_place=True, limit=1.0),
    Case("fp16 Mixup and blocks", 80, settings={"mixup_alpha": 0.8, "switch_prob": 0.5}),
    Case("fp16 CutMix", 80, settings={"mask_type": "cutmix", "lam": -1.0}),
    Case("fp16 random tokens", 80, settings={"mask_type": "random"}),
)  # fmt: skip


class Launch(NamedTuple):
    """The tensors and settings of one chunk, ready to run."""

    grid: tuple[int]
    named: dict[str, Any]
    options: dict[str, Any]
    before: Tensor
    out: Tensor
    targets: Tensor
    weights: Tensor
    mask: Tensor
    inputs: tuple[Any, ...]
    settings: Settings


def prepare(case: Case, offset: int, classes: int, batch: int = CHUNK) -> Launch:
    """A chunk of 3x224x224 images with top-5 18x18 maps and boxes; outputs poisoned."""
    source = torch.Generator().manual_seed(offset)
    settings = Settings(num_classes=classes, **{"mode": "elem", **case.settings})
    images = torch.randn(batch, 3, 224, 224, generator=source).mul_(50).add_(120)
    images = images.clamp_(0, 255).to(case.dtype) if case.dtype == torch.uint8 else images.to(case.dtype)
    if case.channels_last:
        images = images.to(memory_format=torch.channels_last)
    labels = (torch.arange(batch) + offset) % classes
    values = torch.rand(batch, 5, 18, 18, generator=source).half()
    indices = torch.randint(0, classes, (batch, 5, 18, 18), generator=source)
    indices[:, 0] = labels[:, None, None]
    low = torch.rand(batch, 2, generator=source) * 0.5
    boxes = torch.cat([low, low + 0.3 + torch.rand(batch, 2, generator=source) * 0.2], 1)
    boxes[::2] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    before = images.clone(memory_format=torch.preserve_format)
    out = images if case.in_place else torch.full_like(images, float("nan"), dtype=case.out_dtype)
    targets, weights = torch.full((batch, classes), float("nan")), torch.full((batch, 2), float("nan"))
    mask = torch.zeros(batch, 14, 14, dtype=torch.bool)
    inputs = (None, values, indices, boxes, None, torch.tensor(7), offset)
    grid, named = kernels.arguments(
        images, out, labels, *inputs, targets, weights, mask, tuple(images.shape), settings, torch.device("cpu")
    )
    options = {name: named.pop(name) for name in kernels.OPTIONS if name in named}
    return Launch(grid, named, options, before, out, targets, weights, mask, (labels, *inputs), settings)


def difference(launch: Launch, in_place: bool) -> tuple[bool, float]:
    """Whether images and masks equal the reference's bit for bit, and how far targets and weights are off at most."""
    labels = launch.inputs[0]
    rest: list[Any] = [*launch.inputs[1:], launch.settings]
    if in_place:
        images = launch.before.clone(memory_format=torch.preserve_format)
        targets, mask, weights = reference.mix_inplace(images, labels, *rest)
    else:
        images = torch.empty_like(launch.out)
        targets, mask, weights = reference.mix(launch.before, labels, images, *rest)
    error = max((targets - launch.targets).abs().max().item(), (weights - launch.weights).abs().max().item())
    return torch.equal(images, launch.out) and torch.equal(mask, launch.mask), error


def least_traffic(case: Case, launch: Launch) -> float:
    """Bytes that the pixels of a chunk must move, as `Case.traffic` says."""
    values = launch.before.numel()
    in_bytes, out_bytes = launch.before.element_size(), launch.out.element_size()
    if case.traffic == "moved":
        return 2.0 * float(launch.mask.float().mean()) * values * in_bytes
    return float(values * (in_bytes + out_bytes))


def count(ptxsim: Any, case: Case, arch: int, classes: int, samples: int, bar: Any) -> dict[str, Any]:
    """Run a case and count."""
    first = prepare(case, 0, classes)
    compiled = ptxsim.compile_kernel(kernels.mix_kernel, first.named, arch=arch, **first.options)
    programs = first.named["PROGRAMS"]
    longest: list[int] = []
    instructions = 0
    by_kind = {"targets": 0, "pixels": 0}
    widths: Counter[tuple[str, int]] = Counter()
    moved = needed = 0.0
    exact, error, races = True, 0.0, 0
    for offset in range(0, samples, CHUNK):
        launch = first if offset == 0 else prepare(case, offset, classes)
        pixel_programs = [c for c in range(launch.grid[0]) if c % programs < programs - 2]
        # One launch for each sample's longest warp, on copies in place, where a second launch would mix back.
        for n in range(CHUNK):
            mine = list(range(n * programs, (n + 1) * programs))
            stats = ptxsim.run(compiled, launch.grid, launch.named, ctas=mine, races="off", copy=case.in_place)
            longest.append(stats.max_warp_insts)
            instructions += stats.total_warp_insts
            bar.update()
        if case.in_place:
            stats = ptxsim.run(compiled, launch.grid, launch.named, races="off")
        pixels = ptxsim.run(compiled, launch.grid, launch.named, ctas=pixel_programs, races="off", copy=True)
        widths.update(pixels.widths)
        by_kind["pixels"] += pixels.total_warp_insts
        for name, sectors in pixels.buffers.items():
            if {"images", "out"} & set(name.split("/")):
                moved += SECTOR * (sectors["read_sectors"] + sectors["written_sectors"])
        needed += least_traffic(case, launch)
        same, off = difference(launch, case.in_place)
        exact, error = exact and same, max(error, off)
        if offset == 0:
            fresh = prepare(case, 0, classes, 4)
            checked = ptxsim.run(compiled, fresh.grid, fresh.named, races="record")
            races = len(checked.races)
    by_kind["targets"] = instructions - by_kind["pixels"]
    count_of = len(longest)
    # What the pixel programs load beside pixels are 4-byte entries of the draw's tables.
    accesses = sorted({width for (kind, width), n in widths.items() if kind == "ld.global" and width != 4})
    stores = sorted({width for (kind, width), n in widths.items() if kind == "st.global"})
    return {
        "case": case.name,
        "sm": arch,
        "classes": classes,
        "samples": count_of,
        "registers": compiled.n_regs,
        "spills": compiled.n_spills,
        "shared_bytes": compiled.shared,
        "rows": first.named["ROWS"],
        "programs": programs,
        "num_warps": first.options["num_warps"],
        "load_bytes_per_thread": accesses,
        "store_bytes_per_thread": stores,
        "traffic": case.traffic,
        "traffic_ratio": moved / needed,
        "longest_warp_mean": float(np.mean(longest)),
        "longest_warp_p95": float(np.percentile(longest, 95)),
        "longest_warp_max": int(max(longest)),
        "warp_instructions_per_image": instructions / count_of,
        "of_pixels": by_kind["pixels"] / count_of,
        "of_targets": by_kind["targets"] / count_of,
        "images_and_masks_equal": exact,
        "target_error": error,
        "races": races,
        "bars": bars(case),
    }


def bars(case: Case) -> dict[str, float]:
    """The bars that are stated for a case."""
    stated: dict[str, float] = {"registers": 64, "spills": 0, "access": case.access, "traffic_ratio": case.limit}
    if case.timed:
        stated |= {"longest_warp_mean": 1500, "warp_instructions_per_image": 25000}
    return stated


def load_simulator(folder: Path) -> Any:
    """The module `ptxsim` of a folder."""
    if not (folder / "ptxsim.py").is_file():
        raise SystemExit(f"--ptxsim must name a folder with a module ptxsim, and {folder} has none")
    sys.path.insert(0, str(folder))
    return importlib.import_module("ptxsim")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ptxsim", type=Path, required=True, help="folder of the PTX simulator")
    parser.add_argument("--out", type=Path, default=Path("bench/results/counts.json"))
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, as 80 90")
    parser.add_argument("--samples", type=int, help="at most so many masks for each case")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in CASES], help="these cases alone")


def main(asked: argparse.Namespace) -> None:
    ptxsim = load_simulator(asked.ptxsim)
    started = time.perf_counter()
    cases = [case for case in CASES if not asked.cases or case.name in asked.cases]
    jobs = [(case, arch, 1000, case.samples) for case in cases for arch in asked.arch]
    jobs += [(CASES[0], arch, classes, CHUNK) for arch in asked.arch for classes in CLASS_COUNTS]
    jobs = [(c, a, k, -(-min(n, asked.samples or n) // CHUNK) * CHUNK) for c, a, k, n in jobs]
    rows: list[dict[str, Any]] = []
    by_classes: list[dict[str, Any]] = []
    with tqdm(total=sum(job[3] for job in jobs), unit="mask") as bar:
        for number, (case, arch, classes, samples) in enumerate(jobs):
            bar.set_description(f"{case.name}, sm_{arch}, K = {classes}")
            row = count(ptxsim, case, arch, classes, samples, bar)
            (rows if number < len(jobs) - len(asked.arch) * len(CLASS_COUNTS) else by_classes).append(row)
    record = {
        "kind": "counts",
        "command": "python -m bench count --ptxsim DIR",
        "machine": describe(),
        "seconds": round(time.perf_counter() - started),
        "shape": [3, 224, 224],
        "patch_size": 16,
        "maps": "top-5 18x18 float16, int64 class numbers, boxes",
        "rows": rows,
        "by_classes": by_classes,
    }
    write_json(asked.out, record)
