"""The curves of `growth`, counted in the compiled kernel: warp instructions of an image and of a warp, sectors.

What an image costs is predicted to be flat against the batch and linear against the rest, as `growth` says in what. A
program takes whole rows of tokens, at most so many that its warps stay short, so the counts go up in steps.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tokenmix_kernels import kernels
from tokenmix_kernels.settings import Settings

from .count import load_simulator
from .growth import CURVES, predicted
from .machine import describe, write_json
from .registry import Case

__all__ = ["add_arguments", "count_case", "counted_curves", "main"]

SECTOR = 32  # bytes
PAIRS = 6  # of each launch, whose programs are run; the rest of the launch is like them


def count_case(ptxsim: Any, case: Case, arch: int, pairs: int = PAIRS) -> dict[str, float]:
    """Counts of the fp16 launch of a case, by a sample of its images.

    Returns:
        instructions: warp instructions of an image, means; longest: the longest warp of a pair, mean; sectors: of
        the pixels, as a multiple of a copy's; bytes_written: of the targets, of an image.
    """
    batch, grid = case.batch, (case.height // case.patch_size, case.width // case.patch_size)
    source = torch.Generator().manual_seed(0)
    # What pixels hold makes no difference to a count.
    images = torch.zeros(batch, case.channels, case.height, case.width, dtype=torch.float16)
    out = torch.zeros_like(images)
    labels = torch.randint(0, case.num_classes, (batch,), generator=source)
    values = torch.rand(batch, 5, case.map_size, case.map_size, generator=source).half()
    indices = torch.randint(0, case.num_classes, values.shape, generator=source)
    indices[:, 0] = labels[:, None, None]
    low = torch.rand(batch, 2, generator=source) * 0.5
    boxes = torch.cat([low, low + 0.3 + torch.rand(batch, 2, generator=source) * 0.2], 1)
    targets, weights = torch.zeros(batch, case.num_classes), torch.zeros(batch, 2)
    mask = torch.zeros(batch, *grid, dtype=torch.bool)
    settings = Settings(num_classes=case.num_classes, patch_size=case.patch_size, mode="elem")
    launch, named = kernels.arguments(
        images, out, labels, None, values, indices, boxes, None, torch.tensor(7), 0, targets, weights, mask,
        tuple(images.shape), settings, images.device,
    )  # fmt: skip
    options = {name: named.pop(name) for name in kernels.OPTIONS if name in named}
    compiled = ptxsim.compile_kernel(kernels.mix_kernel, named, arch=arch, **options)
    programs = named["PROGRAMS"]
    firsts = sorted({int(n) for n in np.linspace(0, (batch - 1) // 2, min(pairs, (batch + 1) // 2))})
    instructions = moved = written = sampled = 0
    longest: list[int] = []
    for first in firsts:
        pair = sorted({first, batch - 1 - first})
        ours = [c for n in pair for c in range(n * programs, (n + 1) * programs)]
        stats = ptxsim.run(compiled, launch, named, ctas=ours, races="off")
        instructions += stats.total_warp_insts
        longest.append(stats.max_warp_insts)
        sampled += len(pair)
        for name, sectors in stats.buffers.items():
            parts = set(name.split("/"))
            if parts & {"images", "out"}:
                moved += SECTOR * (sectors["read_sectors"] + sectors["written_sectors"])
            elif "targets" in parts:
                written += SECTOR * sectors["written_sectors"]
    image_bytes = images[0].numel() * images.element_size()
    return {
        "instructions": instructions / sampled,
        "longest": float(np.mean(longest)),
        "sectors": moved / (2 * sampled * image_bytes),
        "bytes_written": written / sampled,
    }


def counted_curves(ptxsim: Any, arch: int, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """Every curve of `growth`, counted on one architecture."""
    found = []
    for against, (cases, unit) in CURVES.items():
        counts = [count_case(ptxsim, case, arch, pairs) for case in tqdm(cases.values(), desc=f"{against}, sm_{arch}")]
        units = [0.0 if against == "batch" else unit(case) for case in cases.values()]
        line, constant, slope = predicted(units, [count["instructions"] for count in counts])
        points = [
            {"at": at, **count, "predicted_instructions": guess}
            for at, count, guess in zip(cases, counts, line, strict=True)
        ]
        found.append({
            "against": against, "predicted": "linear" if any(units) else "flat", "sm": arch,
            "constant_instructions": constant, "instructions_per_unit": slope, "points": points,
        })  # fmt: skip
    return found


def plot(record: dict[str, Any], path: Path) -> None:
    """One panel for each curve: instructions of an image beside what is predicted, and the longest warp."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axes, against in zip(panels.flat, CURVES, strict=True):
        for number, one in enumerate(curve for curve in record["curves"] if curve["against"] == against):
            at = [point["at"] for point in one["points"]]
            style = {"markersize": 4, "marker": "os"[number % 2], "label": f"an image, sm_{one['sm']}"}
            axes.plot(at, [point["instructions"] for point in one["points"]], color=f"C{number}", **style)
            style["label"] = f"longest warp of a pair, sm_{one['sm']}"
            axes.plot(at, [point["longest"] for point in one["points"]], color=f"C{number}", linestyle=":", **style)
            if number == 0:
                line = [point["predicted_instructions"] for point in one["points"]]
                axes.plot(at, line, "k--", linewidth=1, label=f"predicted: {one['predicted']}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(at, [f"{value:,}" for value in at], fontsize=8)
        axes.minorticks_off()
        axes.set_xlabel(against)
        axes.set_ylabel("warp instructions")
    panels.flat[0].legend(fontsize=8)
    figure.suptitle("Warp instructions of the compiled kernel, counted, not timed (fp16)")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"written to {path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ptxsim", type=Path, required=True, help="folder of the PTX simulator")
    parser.add_argument("--out", type=Path, default=Path("bench/results/growth_counts.json"))
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, as 80 90")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="pairs of images that stand for a batch")


def main(asked: argparse.Namespace) -> None:
    ptxsim = load_simulator(asked.ptxsim)
    started = time.perf_counter()
    curves = [curve for arch in asked.arch for curve in counted_curves(ptxsim, arch, asked.pairs)]
    record = {
        "kind": "growth_counts",
        "command": "python -m bench growth_counts --ptxsim DIR",
        "machine": describe(),
        "seconds": round(time.perf_counter() - started),
        "curves": curves,
    }
    write_json(asked.out, record)
    plot(record, asked.out.with_suffix(".png"))
