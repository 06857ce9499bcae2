"""Simulate the time of the compiled kernel on a model of an A100 and an H100, against the fastest copy of the batch.

The machine code that Triton and ptxas make is executed on the CPU, its results are compared with the reference, and
its trace is replayed on a model of the card, by a simulator that is no part of this project. `--ptxsim DIR` names a
folder with the modules `ptxsim`, `ptxsim_sass` and `ptxsim_timing`. Figures are of a model: nothing is timed.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from tokenmix_kernels.kernels import Card

from ..cases import SIMULATED, Case
from ..launch import Launch, difference, launch_of
from ..machine import describe, write_json
from .copies import Baselines, baseline_of
from .simulator import Simulator, load_simulator

__all__ = ["BARS", "CARDS", "NOMINAL", "add_arguments", "changed_rows", "main", "simulate_case"]

CARDS = {"A100": 80, "H100": 90}
SHAPES = {"A100": Card(108, 40 << 20, True), "H100": Card(132, 50 << 20, True)}
NOMINAL = "nominal"
WARM = "images in L2"
LATENCIES = ("l1", "lds", "l2", "dram_lat", "shfl", "redux", "xu", "s2r", "ldc", "bar", "branch")
TARGET_TOLERANCE = 1e-6


class Bar(NamedTuple):
    """What a case's ratio must not exceed, and what it aims at."""

    bar: float
    aim: float


BARS: dict[str, Bar | None] = {
    "fp16 B 32": Bar(1.25, 1.10),
    "fp16 B 64": Bar(1.10, 1.03),
    "fp16 B 128": Bar(0.98, 0.965),
    "fp16 B 256": Bar(0.98, 0.965),
    "fp32": Bar(0.98, 0.955),
    "uint8 to fp16": Bar(1.03, 0.97),
    "uint8 to fp16, erasing": None,
    "fp16, erasing": None,
    "channels_last fp16": Bar(1.00, 0.97),
    "in place, one mask": Bar(0.62, 0.58),
    "Mixup and blocks": Bar(1.06, 1.00),
    "CutMix": Bar(1.06, 1.00),
    WARM: Bar(1.15, 1.00),
}


def assumptions(timing: Any, card: str) -> dict[str, dict[str, float]]:
    """The assumptions that figures are given for: changed parameters of the model by name of the assumption."""
    nominal = {**timing.COMMON, **timing.GPUS[card]}
    return {
        NOMINAL: {},
        "instruction cache warm": {"icache": 0, "cmiss": 0},
        "3 lines of instruction prefetch": {"iprefetch": 3},
        "half of the stores absorbed by L2": {"write_cost": 0.5},
        "stores absorbed by L2": {"write_cost": 0.0},
        "L2 share 0.4": {"l2_use": 0.4},
        "L2 share 0.6": {"l2_use": 0.6},
        "latencies -25 %": {name: 0.75 * nominal[name] for name in LATENCIES},
        "latencies +25 %": {name: 1.25 * nominal[name] for name in LATENCIES},
    }


def rows_of(case: Case) -> dict[str, dict[str, float]]:
    """The rows of a case by name, and what of the model each changes: the main case also counts with images in L2."""
    return {case.name: {}, **({WARM: {"warm_reads": 1}} if case.name == "fp16 B 128" else {})}


def code_of(simulator: Simulator, compiled: Any, launch: Launch, baselines: Baselines) -> str:
    """A hash of the machine code, the launch and the baselines: what a row depends on."""
    code = [op.text for op in simulator.sass.decode(simulator.sass.disassemble(compiled.cubin))]
    return hashlib.sha256("\n".join([*code, str(launch.grid), baselines.digest]).encode()).hexdigest()[:16]


def compiled_case(simulator: Simulator, case: Case, card: str) -> tuple[Launch, Any]:
    """The launch of a case on a card, and what is compiled for it."""
    launch = launch_of(case, card=SHAPES[card])
    return launch, simulator.ptxsim.compile_kernel(launch.kernel, launch.args, arch=CARDS[card], **launch.options)


def changed_rows(folder: Path, path: Path) -> list[str]:
    """The rows of a result file whose machine code, launch or baselines are others today; nothing is simulated."""
    torch.set_num_threads(1)
    simulator, known, changed = load_simulator(folder), known_rows(path), []
    baselines = Baselines(simulator, Path(os.devnull))
    for case in tqdm(SIMULATED.values(), unit="case", disable=None):
        for card in CARDS:
            launch, compiled = compiled_case(simulator, case, card)
            code = code_of(simulator, compiled, launch, baselines)
            names = [name for name in rows_of(case) if known.get((name, card), {}).get("code") != code]
            changed += [f"{name} on {card}" for name in names]
    return changed


def simulate_case(
    simulator: Simulator, baselines: Baselines, case: Case, card: str, names: Iterable[str], sensitivities: bool,
    known: dict[tuple[str, str], dict[str, Any]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Run a case's launch, compare it with the reference, and replay it on a card.

    Args:
        simulator: the simulator.
        baselines: cycles of copies and conversions.
        case: the batch.
        card: 'A100' or 'H100'.
        names: of the rows wanted, as `rows_of` names them.
        sensitivities: whether to replay under all assumptions, not the nominal one alone.
        known: earlier rows by case and card. They are taken as they are where the machine code is the same.

    Returns:
        One row for each name. `by_assumption` holds the ratio of cycles to the baseline's under each assumption.
    """
    launch, compiled = compiled_case(simulator, case, card)
    code = code_of(simulator, compiled, launch, baselines)
    wanted = {k: change for k, change in assumptions(simulator.timing, card).items() if sensitivities or k == NOMINAL}
    before = [known.get((name, card), {}) for name in names]
    if all(row.get("code") == code and wanted.keys() <= row["by_assumption"].keys() for row in before):
        return before
    trace = simulator.sass.record(compiled, launch.grid, launch.args)
    equal, error = difference(launch)
    rows = []
    for name in names:
        always = rows_of(case)[name]
        changes = {kind: {**change, **always} for kind, change in wanted.items()}
        keys = {kind: f"{kind}, {WARM}" if always else kind for kind in changes}
        against = baselines.cycles(
            baseline_of(case), card, CARDS[card], {keys[kind]: change for kind, change in changes.items()}
        )
        results = {kind: simulator.timing.simulate(trace, card, **change) for kind, change in changes.items()}
        ratios = {kind: float(result.cycles) / against[keys[kind]] for kind, result in results.items()}
        nominal = results[NOMINAL]
        bar = BARS[name]
        rows.append({
            "case": name, "card": card, "sm": CARDS[card], "batch": case.batch, "code": code,
            "cycles": float(nominal.cycles), "microseconds": float(nominal.microseconds),
            "against": baseline_of(case).kind, "baseline_cycles": against[keys[NOMINAL]],
            "ratio": ratios[NOMINAL], "lowest": min(ratios.values()), "highest": max(ratios.values()),
            "by_assumption": ratios, "bar": bar.bar if bar else None, "aim": bar.aim if bar else None,
            "first_load": float(nominal.first_load), "first_store": float(nominal.first_store),
            "dram_share": float(nominal.utilisation()), "issue_share": float(nominal.issue_share),
            "programs": int(trace.n_ctas), "programs_per_sm": int(nominal.ctas_per_sm),
            "registers": compiled.n_regs, "spills": compiled.n_spills, "num_warps": compiled.num_warps,
            "warp_instructions_per_image": len(trace.pcs) / case.batch,
            "images_and_masks_equal": equal, "target_error": error,
        })  # fmt: skip
    return rows


def line(row: dict[str, Any], seconds: float) -> str:
    """A row in one line."""
    spread = f" ({row['lowest']:.3f} to {row['highest']:.3f})" if len(row["by_assumption"]) > 1 else ""
    right = row["images_and_masks_equal"] and row["target_error"] <= TARGET_TOLERANCE
    bar = ", no bar"
    if row["bar"] is not None:
        bar = f" {'<=' if row['ratio'] <= row['bar'] else '>'} {row['bar']:.2f}, aim {row['aim']:.3f}"
    return (
        f"{row['case']:<22} {row['card']}  {row['ratio']:.3f}{spread}{bar}; "
        f"{row['cycles']:,.0f} / {row['baseline_cycles']:,.0f} cycles; first "
        f"load {row['first_load']:,.0f}, store {row['first_store']:,.0f}; DRAM {row['dram_share']:.0%}, issue "
        f"{row['issue_share']:.0%}; {row['programs']} programs, {row['programs_per_sm']} an SM, {row['num_warps']} "
        f"warps, {row['registers']} registers, {row['spills']} spills, {row['warp_instructions_per_image']:,.0f} "
        f"instructions an image; {'equal' if right else 'NOT EQUAL to the reference'}; {seconds:.1f} s"
    )


def keys() -> list[tuple[str, str]]:
    """All rows of the table by case and card, in its order."""
    return [(name, card) for case in SIMULATED.values() for card in CARDS for name in rows_of(case)]


def known_rows(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a result file by case and card; none if there is no such file."""
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {(row["case"], row["card"]): row for row in rows}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [name for case in SIMULATED.values() for name in rows_of(case)]
    parser.add_argument("--ptxsim", type=Path, required=True, help="folder of the simulator")
    parser.add_argument("--out", type=Path, default=Path("bench/results/simulated.json"))
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help="these alone; the file's others stay")
    parser.add_argument("--cards", nargs="+", choices=list(CARDS), default=list(CARDS))
    parser.add_argument("--sensitivities", action="store_true", help="also under other assumptions about the card")
    parser.add_argument("--quick", action="store_true", help="print a line for each case and card, write no file")
    parser.add_argument(
        "--baselines", type=Path, default=Path("runs/bench/baselines.json"), help="where cycles of copies are kept"
    )


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    simulator = load_simulator(asked.ptxsim)
    baselines = Baselines(simulator, asked.baselines)
    jobs = [
        (case, card, names)
        for case in SIMULATED.values()
        for card in asked.cards
        if (names := [name for name in rows_of(case) if not asked.cases or name in asked.cases])
    ]
    started = time.perf_counter()
    known = known_rows(asked.out)
    left = set(keys()) & known.keys()  # not yet looked at by this run
    record: dict[str, Any] = {
        "kind": "simulated",
        "command": "python -m bench simulate --ptxsim DIR" + (" --sensitivities" if asked.sensitivities else ""),
        "machine": describe(),
        "shape": [3, 224, 224],
        "patch_size": 16,
        "maps": "top-5 18x18 float16, int64 class numbers, boxes",
    }
    for case, card, names in tqdm(jobs, unit="case", disable=None):
        begun = time.perf_counter()
        rows = simulate_case(simulator, baselines, case, card, names, asked.sensitivities, known)
        for row in rows:
            tqdm.write(line(row, time.perf_counter() - begun))
        known |= {(row["case"], card): row for row in rows}
        left -= {(row["case"], card) for row in rows}
        record["rows"] = [known[key] for key in keys() if key in known]
        record["seconds"] = round(time.perf_counter() - started)
        if not asked.quick:
            write_json(asked.out, record, anew=not left)  # after each case: a run that is stopped keeps what it has
