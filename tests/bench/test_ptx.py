"""Counting and simulating: what is compared, sampled and kept, with stand-ins for the simulator."""

import dataclasses
import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import main as bench
from bench.cases import CASES, SIMULATED, Case
from bench.launch import Launch, difference, expected, launch_of, programs_of
from bench.ptx import count, growth_counts, simulate
from bench.ptx.copies import Baseline, Baselines, baseline_of
from bench.ptx.simulator import Simulator, read_exits, read_literals

TINY = CASES["tiny"]


@pytest.mark.parametrize("command", ["count", "growth_counts", "simulate"])
def test_a_folder_without_the_simulator_is_a_sentence(command: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--ptxsim must name a folder with a module ptxsim, got "):
        bench([command, "--ptxsim", str(tmp_path)])


def small(case: Case) -> Case:
    return dataclasses.replace(case, batch=2, num_classes=10)


COMPARED = {case.name: case for case in [*SIMULATED.values(), *(counted.case for counted in count.CASES)]}


@pytest.mark.parametrize("name", COMPARED)
def test_the_comparison_tells_a_right_result_from_a_wrong_one(name: str) -> None:
    launch = launch_of(small(COMPARED[name]))
    assert not difference(launch)[0]  # poisoned
    for got, right in zip(launch.out, expected(launch), strict=True):
        got.copy_(right)
    assert difference(launch) == (True, 0.0)
    launch.out.targets[1, 1] += 1e-3
    assert difference(launch)[1] == pytest.approx(1e-3, rel=1e-2)
    launch.out.images[1, 1, 7, 7] += 1
    assert not difference(launch)[0]


class Counter:
    """Stands for the PTX simulator: every program takes 10 instructions and moves a copy's sectors."""

    def __init__(self, launch: Launch) -> None:
        self.programs = programs_of(launch)[0]
        self.image_bytes = launch.before[0].numel() * launch.before.element_size()
        self.ran: list[list[int]] = []

    def compile_kernel(self, kernel: Any, args: dict[str, Any], **options: Any) -> Any:
        assert options["arch"] == 90
        return None

    def run(self, compiled: Any, grid: tuple[int], args: dict[str, Any], ctas: list[int], **options: Any) -> Any:
        assert max(ctas) < grid[0]
        self.ran.append(ctas)
        images = len(ctas) // self.programs
        sectors = images * self.image_bytes // 32
        return SimpleNamespace(
            total_warp_insts=10 * len(ctas), max_warp_insts=4,
            buffers={
                "images": {"read_sectors": sectors, "written_sectors": 0},
                "out": {"read_sectors": 0, "written_sectors": sectors},
            },
        )  # fmt: skip


@pytest.mark.parametrize(("batch", "images"), [(1, 1), (2, 2), (3, 3), (5, 3), (64, 4)])
def test_counts_of_a_sample_are_those_of_an_image(batch: int, images: int) -> None:
    case = dataclasses.replace(TINY, batch=batch)
    counter = Counter(launch_of(dataclasses.replace(case, dtype=torch.float16)))
    found = growth_counts.count_case(counter, case, 90, pairs=2)
    ran = [cta for ctas in counter.ran for cta in ctas]
    assert len(set(ran)) == len(ran)
    assert len(ran) == images * counter.programs
    assert found["instructions"] == 10 * counter.programs
    assert found["sectors"] == 1.0
    assert found["longest"] == 4.0


def test_a_batch_is_compared_with_the_kernel_that_moves_its_bytes() -> None:
    half, full = SIMULATED["fp16 B 256"], SIMULATED["fp32"]
    assert baseline_of(half) == baseline_of(full)  # the same bytes: one copy serves both
    assert baseline_of(half).kind == "copy"
    assert baseline_of(SIMULATED["uint8 to fp16"]) == Baseline("convert", 128, 3 * 224 * 224, 1, 2)


def model(calls: list[dict[str, float]], results: Any = None) -> Simulator:
    """Stands for the model of a card: 100 cycles, half as many where stores cost nothing."""
    import bench.ptx as stand_in

    def run(trace: Any, card: str, **change: float) -> Any:
        calls.append(change)
        return SimpleNamespace(cycles=50.0 if change.get("write_cost") == 0 else 100.0 + trace)

    return Simulator(stand_in, stand_in, SimpleNamespace(simulate=run))  # type: ignore[arg-type]


def test_a_baseline_is_the_fastest_kernel_and_is_simulated_once(tmp_path: Path, monkeypatch: Any) -> None:
    calls: list[dict[str, float]] = []
    recorded = iter([3, 1, 2, 5, 5, 5])  # cycles above 100 of each shape
    monkeypatch.setattr("bench.ptx.copies.record_baseline", lambda *_: next(recorded))
    monkeypatch.setattr("bench.ptx.copies.source_of", lambda module: "same")
    baselines = Baselines(model(calls), tmp_path / "deep" / "baselines.json")
    copy = Baseline("copy", 1, 1000, 8, 8)
    assumed = {"nominal": {}, "free stores": {"write_cost": 0.0}}
    assert baselines.cycles(copy, "A100", 80, assumed) == {"nominal": 101.0, "free stores": 50.0}
    assert len(calls) == 6
    again = Baselines(model(calls), tmp_path / "deep" / "baselines.json")
    assert again.cycles(copy, "A100", 80, {"nominal": {}})["nominal"] == 101.0
    assert len(calls) == 6  # from the file
    again.cycles(copy, "H100", 90, {"nominal": {}})
    assert len(calls) == 9  # another card is another baseline
    record = json.loads((tmp_path / "deep" / "baselines.json").read_text())
    (tmp_path / "deep" / "baselines.json").write_text(json.dumps({**record, "digest": "other"}))
    assert again.read() == {}  # of another simulator


def instruction(name: str, guard: str | None, neg: bool, *args: str) -> Any:
    return SimpleNamespace(name=name, guard=guard, neg=neg, args=list(args), text=name)


@pytest.mark.parametrize(
    ("exit_of", "leaves"),
    [
        (instruction("EXIT", None, False, "P0"), "P0"),
        (instruction("EXIT", None, False, "!P0"), "!P0"),
        (instruction("EXIT", "P1", True, "P0"), "P0 and !P1"),
        (instruction("EXIT", "P1", False, "!P0"), "!P0 and P1"),
        (instruction("EXIT", "P1", True), "!P1"),
        (instruction("EXIT", None, False), "all"),
    ],
)
def test_threads_leave_where_the_predicates_of_an_exit_hold(exit_of: Any, leaves: str) -> None:
    values = {"P0": np.array([False, False, True, True]), "P1": np.array([False, True, False, True])}
    values |= {"PT": np.ones(1, bool)} | {f"!{name}": ~value for name, value in values.items()}
    sass = SimpleNamespace(decode=list, pred=lambda op, name: lambda machine: machine[name])
    read_exits(sass)
    (op,) = sass.decode([exit_of])
    found = np.ones(4, bool)
    if op.guard is not None:  # as the executor reads a guard
        held = np.broadcast_to(sass.pred(op, op.guard)(values), (4,))
        found = ~held if op.neg else held
    right = np.ones(4, bool)
    for term in leaves.split(" and ") if leaves != "all" else []:
        right = right & values[term]
    assert np.array_equal(found, right)


def elf_of(data: bytes) -> bytes:
    """An ELF file of 64 bits whose section `.nv.constant2.mix` has `data`."""
    names = b"\0.text\0.nv.constant2.mix\0.shstrtab\0"
    sections = [(0, 0, 0), (1, 64, 0), (7, 64, len(data)), (25, 64 + len(data), len(names))]
    table = b"".join(struct.pack("<IIQQQQ24x", name, 1, 0, 0, start, size) for name, start, size in sections)
    head = struct.pack("<40xQ10x3H", 64 + len(data) + len(names), 64, len(sections), 3)
    return head + data + names + table


def test_literals_of_64_bits_become_immediate_numbers() -> None:
    def disassemble(cubin: bytes) -> list[Any]:
        wide = instruction("IMAD", None, False, "R2", "R4", "R6", "c[0x2][0x8]")
        narrow = instruction("IMAD", None, False, "R2", "R4", "R6", "c[0x2][0x8]")
        argument = instruction("IMAD", None, False, "R2", "R4", "R6", "c[0x0][0x8]")
        wide.mods, narrow.mods, argument.mods = ["WIDE", "U32"], [], ["WIDE"]
        return [wide, narrow, argument, instruction("EXIT", None, False)]

    sass = SimpleNamespace(disassemble=disassemble)
    read_literals(sass)
    wide, narrow, argument, _ = sass.disassemble(elf_of(struct.pack("<2Q", 5, 1 << 40)))
    assert int(wide.args[-1], 16) == 1 << 40
    assert (narrow.args[-1], argument.args[-1]) == ("c[0x2][0x8]", "c[0x0][0x8]")  # as the executor has them


def test_every_simulated_row_has_a_bar() -> None:
    names = [name for case in SIMULATED.values() for name in simulate.rows_of(case)]
    assert sorted(names) == sorted(simulate.BARS)
    assert all(bar.aim <= bar.bar for bar in simulate.BARS.values() if bar)
    assert [name for name, bar in simulate.BARS.items() if bar is None] == [
        "uint8 to fp16, erasing", "fp16, erasing",
    ]  # fmt: skip


def test_assumptions_change_what_they_say() -> None:
    timing = SimpleNamespace(
        COMMON={"shfl": 20, "redux": 10, "xu": 4, "s2r": 4, "ldc": 4, "bar": 4, "branch": 4},
        GPUS={"A100": {"l1": 40, "lds": 20, "l2": 200, "dram_lat": 400}},
    )
    found = simulate.assumptions(timing, "A100")
    assert found["nominal"] == {}
    assert found["latencies +25 %"]["l2"] == 250
    assert found["latencies -25 %"]["shfl"] == 15
    assert found["stores absorbed by L2"] == {"write_cost": 0.0}
