"""Count the curves of `growth` in the compiled kernel: warp instructions of an image and of a warp, sectors.

Instructions of an image are predicted to be flat against the batch and linear in the unit that `growth` names for the
other curves. A program takes whole rows of tokens, so the counts go up in steps.
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..cases import Case
from ..growth import CURVES, predicted
from ..launch import launch_of, programs_of
from ..machine import describe, write_json
from .simulator import load_counter

__all__ = ["add_arguments", "count_case", "counted_curves", "main"]

SECTOR = 32  # bytes
PAIRS = 6  # of each launch, whose programs are run; the rest of the launch is like them


def count_case(ptxsim: Any, case: Case, arch: int, pairs: int = PAIRS) -> dict[str, float]:
    """Counts of the fp16 launch of a case, by a sample of its images.

    Returns:
        instructions: warp instructions of an image, means; longest: the longest warp of a pair, mean; sectors: of
        the pixels, as a multiple of a copy's; bytes_written: of the targets, of an image.
    """
    launch = launch_of(dataclasses.replace(case, dtype=torch.float16))
    compiled = ptxsim.compile_kernel(launch.kernel, launch.args, arch=arch, **launch.options)
    batch, (_, image_of) = case.batch, programs_of(launch)
    firsts = sorted({int(n) for n in np.linspace(0, (batch - 1) // 2, min(pairs, (batch + 1) // 2))})
    instructions = moved = written = sampled = 0
    longest: list[int] = []
    for first in firsts:
        pair = sorted({first, batch - 1 - first})
        mine = [c for c in range(launch.grid[0]) if image_of(c)[0] in pair]
        stats = ptxsim.run(compiled, launch.grid, launch.args, ctas=mine, races="off")
        instructions += stats.total_warp_insts
        longest.append(stats.max_warp_insts)
        sampled += len(pair)
        for name, sectors in stats.buffers.items():
            parts = set(name.split("/"))
            if parts & {"images", "out"}:
                moved += SECTOR * (sectors["read_sectors"] + sectors["written_sectors"])
            elif "results" in parts:
                written += SECTOR * sectors["written_sectors"]
    image_bytes = launch.before[0].numel() * launch.before.element_size()
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
    ptxsim = load_counter(asked.ptxsim)
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
