"""Time the registry on a GPU with a cold L2 cache, and sweep how a launch is cut up.

Every result is checked first. The kernel's own time comes from replays of a CUDA graph, apart from the time between two
events around an ordinary call, and from the time for which a call keeps the host busy.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from .baselines import IMPLEMENTATIONS, Implementation, masked_tokens, ready
from .cases import CASES, Case, make_inputs
from .machine import describe, write_csv, write_json
from .model import compare, simulated_microseconds, warm_clock
from .sweep import sweep

__all__ = ["Clock", "add_arguments", "main", "measure", "moved_bytes", "real_clock"]

QUANTILES = [0.2, 0.5, 0.8]
# A graph can hold these: no random number from the host, no copy to the device.
CAPTURED = (
    "clone",
    "ours, eager",
    "ours, into out",
    "ours, in place",
    "ours, uint8 normalised",
    "ours, compiled around",
)


class Clock(NamedTuple):
    """How calls are timed; each function takes a call and returns microseconds at 20, 50 and 80 %.

    Attributes:
        cold: between events around a call, the L2 cache cleared before.
        kernel: the replay of a graph that holds one call, the L2 cache cleared before.
        host: for which a call keeps the host busy that finds the GPU idle.
    """

    cold: Callable[[Callable[[], Any]], list[float]]
    kernel: Callable[[Callable[[], Any]], list[float]]
    host: Callable[[Callable[[], Any]], list[float]]


def real_clock(milliseconds: float) -> Clock:
    """The clock of a CUDA or ROCm device; `milliseconds` of runs for each figure."""
    from triton.testing import do_bench

    def cold(call: Callable[[], Any]) -> list[float]:
        times = do_bench(call, warmup=milliseconds / 4, rep=milliseconds, quantiles=QUANTILES)
        return [value * 1e3 for value in times]

    def kernel(call: Callable[[], Any]) -> list[float]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Kept until the graph has gone: it writes there.
            result = call()
        times = cold(graph.replay)
        del graph, result
        return times

    def host(call: Callable[[], Any]) -> list[float]:
        times = []
        for _ in range(60):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        torch.cuda.synchronize()
        cuts = statistics.quantiles(times, n=10)
        return [cuts[1], statistics.median(times), cuts[7]]

    return Clock(cold, kernel, host)


def moved_bytes(case: Case, name: str) -> float:
    """Bytes of pixels that an implementation has to move: each value read and written once."""
    values = case.batch * case.channels * case.height * case.width
    size = torch.empty((), dtype=case.dtype).element_size()
    if name == "ours, uint8 normalised":
        return float(values * (1 + size))
    if name == "ours, in place":
        # Tokens that move, read and written; where both of a pair take a token, it is read once and written once each.
        return 2.0 * values * size * masked_tokens(case) / (case.grid[0] * case.grid[1])
    return 2.0 * values * size


def measure(
    case: Case, implementations: Iterable[Implementation], device: torch.device, clock: Clock
) -> list[dict[str, Any]]:
    """One row for each implementation that serves the device: times, or what is `wrong` with its result."""
    inputs = make_inputs(case, device)
    rows: list[dict[str, Any]] = []
    copied = 0.0  # bytes per microsecond
    for implementation in implementations:
        if implementation.device not in ("", device.type):
            continue
        name = implementation.name
        row: dict[str, Any] = {"case": case.name, "batch": case.batch, "implementation": name}
        rows.append(row)
        built, why = ready(case, inputs, implementation)
        if built is None:
            row["wrong"] = why
            print(f"{case.name}, {name}: not timed, {why}", file=sys.stderr)
            continue
        figures = {"cold": clock.cold(built.call), "call": clock.host(built.call)}
        if name in CAPTURED:
            try:
                figures["kernel"] = clock.kernel(built.call)
            except RuntimeError as error:  # Of the graph: the other figures stand.
                row["no_graph"] = first_line(error)
        for kind, values in figures.items():
            row |= {f"{kind}_us_p{share}": value for share, value in zip((20, 50, 80), values, strict=True)}
        if device.type == "cuda":
            row["extra_bytes"] = peak(built.call)
        rate = moved_bytes(case, name) / figures.get("kernel", figures["cold"])[1]
        if name == "clone":
            copied = rate
        row["gbytes_per_s"] = rate * 1e-3
        if copied:
            row["share_of_copy"] = rate / copied
    return rows


def peak(call: Callable[[], Any]) -> int:
    """Bytes that a call holds at its peak, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def name_of(card: str) -> str:
    """A card's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def plot(record: dict[str, Any], path: Path) -> None:
    """A panel for each case: times of the kernels and of cold calls."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if "wrong" not in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, all_axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.4 * len(rows) + 1.5 * len(cases)), squeeze=False, sharex=True, layout="constrained"
    )
    for axes, case in zip(all_axes[:, 0], cases, strict=True):
        mine = [row for row in rows if row["case"] == case]
        names = [row["implementation"] for row in mine]
        axes.barh(names, [row["cold_us_p50"] for row in mine], color="#cccccc", label="call, cold L2")
        kernel = axes.barh(
            names, [row.get("kernel_us_p50", 0) for row in mine], height=0.5, color="#1f77b4", label="kernel alone"
        )
        shares = [row.get("share_of_copy") for row in mine]
        axes.bar_label(kernel, ["" if s is None else f" {s:.0%} of the copy's bandwidth" for s in shares], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_title(f"{case}, B = {mine[0]['batch']}", fontsize=9)
    all_axes[0, 0].legend(fontsize=8)
    all_axes[-1, 0].set_xlabel("µs")
    figure.suptitle(record["machine"]["gpu"])
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"written to {path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder; files have the card's name")
    parser.add_argument(
        "--case", nargs="+", choices=[n for n in CASES if n.startswith("gpu")], help="these cases alone"
    )
    parser.add_argument("--filter", metavar="REGEX", default="", help="implementations whose name it fits")
    parser.add_argument("--batch", type=int, help="batch size in place of the case's")
    parser.add_argument("--milliseconds", type=float, default=100, help="of runs for each figure (default %(default)s)")
    parser.add_argument("--model-seconds", type=float, default=60, help="time for what is simulated; 0 leaves it out")
    parser.add_argument(
        "--simulated", type=Path, default=Path("bench/results/simulated.json"), help="figures to print beside"
    )
    parser.add_argument("--sweep-seconds", type=float, default=240, help="time for the sweep; 0 leaves it out")


def main(asked: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA or ROCm device; `python -m bench cpu` times the CPU")
    device = torch.device("cuda", torch.cuda.current_device())
    clock = real_clock(asked.milliseconds)
    started = time.perf_counter()
    path = asked.out / f"{name_of(torch.cuda.get_device_name())}.json"
    chosen = [one for one in IMPLEMENTATIONS if one.name == "clone" or re.search(asked.filter, one.name)]
    names = asked.case or [name for name in CASES if name.startswith("gpu")]
    rows: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "kind": "gpu", "command": "python -m bench gpu", "machine": describe(), "rows": rows, "model": [],
        "launch_table": [],
    }  # fmt: skip
    for name in tqdm(names, desc="cases", unit="case"):
        case = replace(CASES[name], batch=asked.batch) if asked.batch else CASES[name]
        rows += measure(case, chosen, device, clock)
        write_json(path, {**record, "seconds": round(time.perf_counter() - started)})
    write_csv(path.with_suffix(".csv"), rows)
    plot(record, path.with_suffix(".png"))
    if asked.model_seconds > 0:
        known = json.loads(asked.simulated.read_text()) if asked.simulated.is_file() else {"rows": []}
        of_card = simulated_microseconds(known, torch.cuda.get_device_name())
        few = min(25, asked.milliseconds)
        record["model"] = compare(
            device, real_clock(few).kernel, warm_clock(few, QUANTILES), of_card, asked.model_seconds
        )
        write_json(path, {**record, "seconds": round(time.perf_counter() - started)})
        write_csv(path.with_name(f"{path.stem}-model.csv"), record["model"])
    if asked.sweep_seconds > 0:
        table = sweep(device, real_clock(min(25, asked.milliseconds)).kernel, asked.sweep_seconds)
        write_json(path, {**record, "launch_table": table, "seconds": round(time.perf_counter() - started)})
        write_csv(path.with_name(f"{path.stem}-launch.csv"), table)
