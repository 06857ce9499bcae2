"""The runs of a plan, side by side in processes of one thread each, and how far they are."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .plan import Plan, Spec
from .worker import BUSY, run_one

__all__ = ["finished", "run_in_turn", "run_plan", "status"]

Start = Callable[[Spec, Plan, Path, Path], subprocess.Popen[bytes]]
POLL = 1.0  # seconds between two looks at the processes


def finished(plan: Plan, results: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by name, in the plan's order.

    Raises:
        ValueError: a file cannot be read as a result, or was made with other settings than the plan's.
    """
    found = {}
    for spec in plan.specs:
        path = results / f"{spec.name}.json"
        if path.is_file():
            try:
                result = json.loads(path.read_text())
                digest, flags = result["digest"], " ".join(result["flags"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is not the result of a run: move it away, and the run is done again"
                ) from error
            if digest != spec.digest:
                raise ValueError(
                    f"{path} was made with other settings than the plan's: {flags}; "
                    "move it away, or give the mixer or task another name in the plan"
                )
            found[spec.name] = result
    return found


def start(spec: Spec, plan: Plan, results: Path, work: Path) -> subprocess.Popen[bytes]:
    """A process that does one run; what it prints is in WORK/NAME.log."""
    command = [sys.executable, "-m", "bench.study", "--plan", str(plan.path), "--results", str(results)]
    threads = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    log = work / f"{spec.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as file:
        return subprocess.Popen(
            [*command, "--work", str(work), "--only", spec.name],
            env={**os.environ, **threads},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def run_plan(plan: Plan, results: Path, work: Path, jobs: int, start: Start = start) -> int:
    """Do all runs that are not finished; one that fails does not stop the others.

    Args:
        plan: of the study.
        results: folder of the run files.
        work: folder of what only unfinished runs need.
        jobs: runs at a time.
        start: makes the process of a run.

    Returns:
        How many failed.
    """
    done = finished(plan, results)
    waiting = [spec for spec in plan.specs if spec.name not in done]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = 0
    with tqdm(total=len(plan.specs), initial=len(done), unit="run", dynamic_ncols=True, disable=None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    spec = waiting.pop(0)
                    running[spec.name] = start(spec, plan, results, work)
                bar.set_postfix_str(", ".join(running))
                time.sleep(POLL)
                for name, process in list(running.items()):
                    code = process.poll()
                    if code is None:
                        continue
                    del running[name]
                    bar.update(code == 0)
                    if code == 0:
                        tqdm.write(f"{name}: done")
                    if code == BUSY:
                        tqdm.write(f"{name}: left to the other process that works on it")
                    elif code:
                        failed += 1
                        tqdm.write(f"{name}: failed with status {code}, see {work / f'{name}.log'}")
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()
    return failed


def run_in_turn(plan: Plan, results: Path, work: Path) -> int:
    """Do the runs that are not finished one after the other in this process; several such processes share a plan.

    Args:
        plan: of the study.
        results: folder of the run files.
        work: folder of what only unfinished runs need.

    Returns:
        How many failed; one that fails does not stop the others.
    """
    failed = 0
    for spec in plan.specs:
        if (results / f"{spec.name}.json").is_file():
            continue
        try:
            run_one(spec, results, work)
        except Exception:
            failed += 1
            traceback.print_exc()
            tqdm.write(f"{spec.name}: failed")
    return failed


def passes(spec: Spec) -> float:
    """What a run costs, up to a factor that all runs of one task share."""
    return spec.epochs * (spec.label_fraction + 0.02)


def status(plan: Plan, results: Path, work: Path, jobs: int) -> str:
    """What is finished, what is under way, and about how long the rest takes."""
    done = finished(plan, results)
    epochs_done: dict[str, int] = {}
    for spec in plan.specs:
        records = work / spec.name / "metrics.jsonl"
        if spec.name not in done and records.is_file():
            epochs_done[spec.name] = len(records.read_text().splitlines())
    rates: dict[str, list[float]] = {}
    for spec in plan.specs:
        if spec.name in done:
            rates.setdefault(spec.task, []).append(done[spec.name]["seconds"] / passes(spec))
    lines = []
    left = 0.0
    for spec in plan.specs:
        share = 1.0 if spec.name in done else epochs_done.get(spec.name, 0) / spec.epochs
        if spec.name in done:
            result = done[spec.name]
            text = f"done in {result['seconds']:.0f} s, test top-1 {result['selected']['top1']:.1f} %"
        else:
            text = f"epoch {epochs_done[spec.name]} of {spec.epochs}" if spec.name in epochs_done else "waiting"
        if spec.task in rates:
            left += (1 - share) * passes(spec) * sum(rates[spec.task]) / len(rates[spec.task])
        lines.append(f"{spec.name:<50} {text}")
    unknown = any(spec.task not in rates for spec in plan.specs)
    more = " and what tasks without a finished run take" if unknown else ""
    lines.append(f"{len(done)} of {len(plan.specs)} runs done; about {left / jobs / 60:.0f} minutes left{more}")
    return "\n".join(lines)
