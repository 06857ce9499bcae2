"""Time one call on the CPU against batch, image size, grid and number of classes, beside a prediction."""

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .baselines import ours
from .cases import Case, make_inputs
from .machine import describe, described_case, write_json

__all__ = ["CURVES", "add_arguments", "curve", "main"]

BASE = Case("growth", batch=32)

# For each curve, the case at each point, and the unit in which time is predicted to be linear: bytes of the images,
# tokens (a CPU moves each by itself), or values of the targets. A call has a constant part besides.
CURVES: dict[str, tuple[dict[int, Case], Callable[[Case], float]]] = {
    "batch": (
        {batch: replace(BASE, batch=batch) for batch in (1, 4, 16, 64, 256, 1024)},
        lambda case: float(case.batch),
    ),
    "image size": (
        {side: replace(BASE, height=side, width=side) for side in (32, 64, 128, 224, 384, 512)},
        lambda case: float(case.height * case.width),
    ),
    "tokens a side (256 pixels)": (
        {side: replace(BASE, height=256, width=256, patch_size=256 // side) for side in (4, 8, 16, 32, 64)},
        lambda case: (case.height / case.patch_size) ** 2,
    ),
    "classes": (
        {classes: replace(BASE, num_classes=classes) for classes in (100, 1000, 10000, 21841)},
        lambda case: float(case.num_classes),
    ),
}


def quick_ms(cases: Iterable[Case], budget: float) -> list[float]:
    """Milliseconds of one call into `out` of each case: the 20th percentile of its calls.

    Cases take turns: nine rounds, or as many as fit in `budget` seconds, but at least three. Other work on the machine
    only makes calls slower, and no copy is timed beside them, so a low percentile is steadier than the median.
    """
    calls = []
    for case in cases:
        inputs = make_inputs(case)
        # Into `out`: above some size a new output costs page faults, which would bend the curve.
        calls.append(ours(case, inputs, inputs.images, out=torch.zeros_like(inputs.images)))
        calls[-1]()
    times: list[list[float]] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 9 and time.perf_counter() - started < budget):
        times.append([])
        for call in calls:
            begun = time.perf_counter()
            call()
            times[-1].append(time.perf_counter() - begun)
    return (np.percentile(times, 20, axis=0) * 1e3).tolist()


def predicted(units: list[float], times: list[float]) -> tuple[list[float], float, float]:
    """The line a + b * unit that fits best in relative terms, and a, b; a flat line where the unit does not grow."""
    y = np.array(times)
    columns = np.stack([np.ones(len(units)), np.array(units)], 1)
    if not columns[:, 1].any():
        columns = columns[:, :1]
    # Relative errors: without weights the largest point would decide alone. No part of a time is negative.
    found = np.linalg.lstsq(columns / y[:, None], np.ones(len(y)), rcond=None)[0]
    if len(found) > 1 and found[1] < 0:
        columns = columns[:, :1]
        found = np.array([(1 / y).sum() / (1 / y**2).sum()])
    elif found.min() < 0:
        growing = columns[:, 1]
        found = np.array([0.0, float((growing / y).sum() / ((growing / y) ** 2).sum())])
    constant, slope = float(found[0]), float(found[1]) if len(found) > 1 else 0.0
    return (columns @ found).tolist(), constant, slope


def curve(name: str, budget: float) -> dict[str, Any]:
    """Time one curve."""
    cases, unit = CURVES[name]
    times = quick_ms(cases.values(), budget)
    units = [unit(case) for case in cases.values()]
    line, constant, slope = predicted(units, times)
    points = [
        {"at": at, "unit": size, "ms": ms, "predicted_ms": guess}
        for at, size, ms, guess in zip(cases, units, times, line, strict=True)
    ]
    shape = "flat" if not any(units) else "linear"
    return {"against": name, "predicted": shape, "constant_ms": constant, "ms_per_unit": slope, "points": points}


def plot(record: dict[str, Any], path: Path) -> None:
    """One panel for each curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 6.5), layout="constrained")
    for axes, one in zip(panels.flat, record["curves"], strict=True):
        at = [point["at"] for point in one["points"]]
        axes.plot(at, [point["ms"] for point in one["points"]], "o-", label="timed")
        label = "flat" if one["predicted"] == "flat" else f"{one['constant_ms']:.2g} ms + linear part"
        line = [point["predicted_ms"] for point in one["points"]]
        axes.plot(at, line, "k--", linewidth=1, label=f"predicted: {label}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(at, [f"{value:,}" for value in at])
        axes.minorticks_off()
        axes.set_xlabel(one["against"])
        axes.set_ylabel("ms a call")
        axes.legend()
    figure.suptitle(f"One call into `out`, {record['machine']['cpu']}, {record['machine']['threads']} threads")
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"written to {path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results/growth.json"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15, help="about so long for each curve")


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    started = time.perf_counter()
    curves = [curve(name, asked.seconds) for name in tqdm(CURVES, desc="curves")]
    record = {
        "kind": "growth",
        "command": "python -m bench growth",
        "machine": describe(),
        "base": described_case(BASE),
        "seconds": round(time.perf_counter() - started),
        "curves": curves,
    }
    write_json(asked.out, record)
    plot(record, asked.out.with_suffix(".png"))
