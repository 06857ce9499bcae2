"""Time the registry on a GPU with a cold L2 cache, and sweep how a launch is cut up.

Every result is checked first. The kernel's own time comes from replays of a CUDA graph, apart from the time between two
events around an ordinary call, and from the time for which a call keeps the host busy.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from tokenmix_kernels import kernels
from tokenmix_kernels.settings import Settings

from .machine import describe, write_csv, write_json
from .registry import CASES, IMPLEMENTATIONS, MEAN, STD, Case, Implementation, make_inputs, ready

__all__ = ["Clock", "add_arguments", "main", "measure", "moved_bytes", "real_clock", "sweep"]

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
SWEPT_ROWS, SWEPT_WARPS = (1, 2, 3, 4, 5, 7, 14), (2, 4, 8)


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
        count = (case.height // case.patch_size) * (case.width // case.patch_size)
        return 2.0 * values * size * min(count, count // 2 + 14) / count
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


class Setting(NamedTuple):
    """What one row of the launch table is for."""

    dtype: torch.dtype
    out_dtype: torch.dtype
    channels_last: bool
    patch: int
    batch: int

    def text(self) -> str:
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.out_dtype)]
        layout = "channels_last" if self.channels_last else "contiguous"
        return f"{' to '.join(dict.fromkeys(dtypes))}, {layout}, P = {self.patch}, B = {self.batch}"


def settings_swept(batches: Iterable[int] = (32, 128, 512)) -> list[Setting]:
    """The sweep, most wanted first: a sweep that runs out of time has done these."""
    half, full, byte = torch.float16, torch.float32, torch.uint8
    kinds = [
        (half, half, False, 16), (byte, half, False, 16), (full, full, False, 16), (half, half, True, 16),
        (byte, half, True, 16), (half, half, False, 32), (byte, half, False, 32), (half, half, False, 8),
        (full, full, True, 16), (half, half, False, 14), (byte, half, False, 8), (full, full, False, 32),
    ]  # fmt: skip
    return [Setting(*kind, batch) for kind in kinds for batch in batches]


def launch_of(setting: Setting, device: torch.device, side: int = 224) -> tuple[tuple[int], dict[str, Any]]:
    """The launch of `mix_kernel` for a setting as it would be made now: grid and arguments by name."""
    case = Case(
        "sweep", setting.batch, 3, side, side, setting.out_dtype, setting.patch, channels_last=setting.channels_last
    )
    inputs = make_inputs(case, device)
    byte = setting.dtype == torch.uint8
    images = inputs.raw if byte else inputs.images
    mix = Settings(num_classes=case.num_classes, patch_size=setting.patch, mode="elem")
    if byte:
        mix = mix._replace(mean=MEAN, std=STD)
    grid = (side // setting.patch, side // setting.patch)
    out = torch.empty_like(images, dtype=setting.out_dtype)
    targets = torch.empty(case.batch, case.num_classes, device=device)
    weights = torch.empty(case.batch, 2, device=device)
    mask = torch.empty(case.batch, *grid, dtype=torch.bool, device=device)
    seed = torch.tensor(7, device=device)
    return kernels.arguments(
        images, out, inputs.labels, None, *inputs.maps, inputs.boxes, None, seed, 0, targets, weights, mask,
        tuple(images.shape), mix, device,
    )  # fmt: skip


def candidates(named: dict[str, Any]) -> list[dict[str, int]]:
    """Other ways to cut the launch up: token rows of a program and warps, without those that come to the same."""
    grid_h = named["H"] // named["P"]
    first = named["PROGRAMS"] - -(-grid_h // named["ROWS"])  # programs for the targets
    seen: dict[tuple[int, int], dict[str, int]] = {}
    for rows in (named["ROWS"], *SWEPT_ROWS):
        programs = -(-grid_h // min(rows, grid_h))
        for warps in (named["num_warps"], *SWEPT_WARPS):
            even = -(-grid_h // programs)
            seen.setdefault((programs, warps), {"ROWS": even, "PROGRAMS": first + programs, "num_warps": warps})
    return list(seen.values())


def launch(grid: tuple[int], named: dict[str, Any]) -> None:
    kernels.mix_kernel[grid](**named)


def sweep(
    device: torch.device,
    clock: Clock,
    seconds: float,
    wanted: Iterable[Setting] | None = None,
    launch: Callable[[tuple[int], dict[str, Any]], None] = launch,
    side: int = 224,
) -> list[dict[str, Any]]:
    """Time every candidate for every setting: one row each, `now` for what is launched today, `best` for the fastest.

    Results of candidates must equal those of today's launch; no setting is begun after `seconds`.
    """
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for setting in tqdm(list(settings_swept() if wanted is None else wanted), desc="sweep", unit="setting"):
        if time.perf_counter() - started > seconds:
            print(f"out of time before {setting.text()}", file=sys.stderr)
            break
        grid, named = launch_of(setting, device, side)
        launch(grid, named)
        expected = [named[name].clone() for name in ("out", "targets", "weights", "mask_out")]
        found = []
        for number, cut in enumerate(candidates(named)):
            tried = {**named, **cut}
            grid = (setting.batch * cut["PROGRAMS"],)
            row: dict[str, Any] = {
                "dtype": str(setting.dtype).removeprefix("torch."),
                "out_dtype": str(setting.out_dtype).removeprefix("torch."),
                "layout": "channels_last" if setting.channels_last else "contiguous", "patch_size": setting.patch,
                "batch": setting.batch, **cut, "now": number == 0,
            }  # fmt: skip
            rows.append(row)
            named["out"].zero_()
            named["targets"].fill_(float("nan"))
            try:
                launch(grid, tried)
            except Exception as error:  # A cut that asks for more than the card has is a line of the table.
                row["wrong"] = f"{type(error).__name__}: {first_line(error)}"
                continue
            got = [named[name] for name in ("out", "targets", "weights", "mask_out")]
            if not all(equal(one, other) for one, other in zip(got, expected, strict=True)):
                row["wrong"] = "differs from today's launch"
            else:
                low, middle, high = clock.kernel(lambda grid=grid, tried=tried: launch(grid, tried))  # type: ignore[misc]
                row |= {"us_p20": low, "us_p50": middle, "us_p80": high, "best": False}
                found.append(row)
        if not found:
            continue
        best = min(found, key=lambda row: row["us_p50"])
        best["best"] = True
        today = next((row for row in found if row["now"]), best)
        print(
            f"{setting.text()}: ROWS {best['ROWS']}, {best['num_warps']} warps, {best['us_p50']:.1f} us; "
            f"now ROWS {today['ROWS']}, {today['num_warps']} warps, {today['us_p50']:.1f} us "
            f"({today['us_p50'] / best['us_p50'] - 1:+.1%})"
        )
    return rows


def equal(one: Tensor, other: Tensor) -> bool:
    """Equal but for the last bits of sums, which another number of warps adds in another order."""
    return torch.allclose(one, other, rtol=0, atol=1e-6) if one.dtype == torch.float32 else torch.equal(one, other)


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
    record = {"kind": "gpu", "command": "python -m bench gpu", "machine": describe(), "rows": rows, "launch_table": []}
    for name in tqdm(names, desc="cases", unit="case"):
        case = CASES[name]._replace(batch=asked.batch) if asked.batch else CASES[name]
        rows += measure(case, chosen, device, clock)
        write_json(path, {**record, "seconds": round(time.perf_counter() - started)})
    write_csv(path.with_suffix(".csv"), rows)
    plot(record, path.with_suffix(".png"))
    if asked.sweep_seconds > 0:
        table = sweep(device, real_clock(min(25, asked.milliseconds)), asked.sweep_seconds)
        write_json(path, {**record, "launch_table": table, "seconds": round(time.perf_counter() - started)})
        write_csv(path.with_name(f"{path.stem}-launch.csv"), table)
