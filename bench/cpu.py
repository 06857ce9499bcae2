"""Time ours and others on the CPU: interleaved rounds, medians, ratios to the copy of the same round, extra memory."""

import argparse
import gc
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .baselines import IMPLEMENTATIONS, Implementation, ready
from .beside_timm import beside_timm, large_results
from .cases import CASES, Case, make_inputs
from .machine import describe, described_case, write_csv, write_json

__all__ = ["add_arguments", "main", "measure", "rows_of"]


def measure(
    case: Case, implementations: tuple[Implementation, ...], rounds: int, budget: float, show: bool = True
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every implementation in every round, and what was wrong with those that are not timed.

    Implementations take turns, so that other work on the machine slows all of them alike. After three rounds, no round
    starts later than `budget` seconds.
    """
    inputs = make_inputs(case)
    calls, wrong = {}, {}
    served = [one for one in implementations if one.device in ("", "cpu")]
    for implementation in tqdm(served, desc="checking", disable=not show):
        built, why = ready(case, inputs, implementation)
        if built is None:
            wrong[implementation.name] = why
            print(f"{implementation.name}: not timed, {why}", file=sys.stderr)
        else:
            calls[implementation.name] = built.call
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    started = time.perf_counter()
    for done in tqdm(range(rounds), desc="timing", unit="round", disable=not show):
        if done >= 3 and time.perf_counter() - started > budget:
            break
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    return seconds, wrong


def peak_of(case: Case, name: str, threads: int, answer: Any) -> None:
    """Put the peak of resident memory that a second call adds, in bytes, into `answer`. For a process of its own."""
    torch.set_num_threads(threads)
    implementation = next(one for one in IMPLEMENTATIONS if one.name == name)
    call = implementation.build(case, make_inputs(case)).call
    call()
    peaks = []
    for _ in range(3):
        gc.collect()
        peaks.append(watched(call))
    answer.put(max(peaks))


def watched(call: Callable[[], Any]) -> int:
    """Peak of the resident memory during a call, above what it was before, sampled about every 0.2 ms."""
    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(2e-4):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    result = call()
    peak = max(peak, resident())
    done.set()
    watcher.join()
    del result
    return peak - before


def resident() -> int:
    """Bytes of this process in memory (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def extra_memory(case: Case, implementation: Implementation, threads: int) -> float | None:
    """Peak memory of one call beside its output, as a share of the input; None where it could not be measured."""
    if not Path("/proc/self/statm").exists():
        return None
    # Forks of a server that has imported everything and run nothing start quickly and have no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.cpu", "torch._inductor.compile_fx"])
    answer = context.SimpleQueue()
    process = context.Process(target=peak_of, args=(case, implementation.name, threads, answer))
    process.start()
    process.join()
    if process.exitcode or answer.empty():
        return None
    item = torch.empty((), dtype=case.dtype).element_size()
    size = case.batch * case.channels * case.height * case.width * item
    taken = answer.get() / size
    in_share = 0.25 if implementation.name == "ours, uint8 normalised" else 1.0
    return max(0.0, (taken - implementation.makes_output) / in_share)


def rows_of(seconds: dict[str, list[float]], wrong: dict[str, str]) -> list[dict[str, Any]]:
    """One row for each implementation, in the order of `IMPLEMENTATIONS`."""
    rows: list[dict[str, Any]] = []
    texts = {one.name: one.text for one in IMPLEMENTATIONS}
    for name in (*seconds, *wrong):
        row: dict[str, Any] = {"implementation": name, "text": texts.get(name, "")}
        if name in wrong:
            row["wrong"] = wrong[name]
        else:
            times = np.array(seconds[name]) * 1e3
            ratios = times / (np.array(seconds["clone"]) * 1e3)
            for share in (20, 50, 80):
                row[f"ms_p{share}"] = float(np.percentile(times, share))
                row[f"ratio_p{share}"] = float(np.percentile(ratios, share))
        rows.append(row)
    return rows


def plot(record: dict[str, Any], path: Path) -> None:
    """Bars of the ratios to the copy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["rows"] if "wrong" not in row]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    middle = np.array([row["ratio_p50"] for row in rows])
    spread = np.array([[row["ratio_p50"] - row["ratio_p20"], row["ratio_p80"] - row["ratio_p50"]] for row in rows]).T
    colours = ["#888888" if not row["implementation"].startswith("ours") else "#1f77b4" for row in rows]
    bars = axes.barh([row["implementation"] for row in rows], middle, xerr=spread, color=colours, capsize=2)
    axes.bar_label(bars, [f" {value:.2f}" for value in middle], padding=6)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(0.2, float(middle.max()) * 5)
    axes.set_xlabel("time of a call / clone() of the same round (median, 20 to 80 %)")
    axes.set_title(f"B = {record['case']['batch']}, {record['machine']['threads']} threads, {record['machine']['cpu']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"written to {path}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results/cpu.json"))
    parser.add_argument("--case", choices=list(CASES), default="cpu")
    parser.add_argument("--batch", type=int, help="batch size in place of the case's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30, help="at most so many rounds")
    parser.add_argument("--seconds", type=float, default=90, help="no round starts later than this")
    parser.add_argument("--timm-rounds", type=int, default=30, help="at most so many rounds beside timm's branches")
    parser.add_argument("--loop-rounds", type=int, default=10, help="calls of a loop that mixes large batches")
    parser.add_argument("--no-memory", action="store_true", help="leave the measurement of memory out")


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    started = time.perf_counter()
    case = CASES[asked.case]
    if asked.batch:
        case = replace(case, batch=asked.batch)
    seconds, wrong = measure(case, IMPLEMENTATIONS, asked.rounds, asked.seconds)
    rows = rows_of(seconds, wrong)
    if not asked.no_memory:
        named = {one.name: one for one in IMPLEMENTATIONS}
        for row in tqdm(rows, desc="memory"):
            if "wrong" not in row:
                row["extra_memory"] = extra_memory(case, named[row["implementation"]], asked.threads)
    branches = beside_timm(asked.timm_rounds, asked.seconds)
    loops = [] if asked.no_memory else large_results(asked.loop_rounds)
    record = {
        "kind": "cpu",
        "command": "python -m bench cpu",
        "machine": describe(),
        "case": described_case(case),
        "rounds": len(next(iter(seconds.values()))),
        "seconds": round(time.perf_counter() - started),
        "rows": rows,
        "beside_timm": branches,
        "large": loops,
    }
    write_json(asked.out, record)
    write_csv(asked.out.with_suffix(".csv"), [*rows, *branches, *loops])
    plot(record, asked.out.with_suffix(".png"))
