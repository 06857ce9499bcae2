"""Tests of the benchmark itself: wrong results are reported, not timed; tables follow from files; clocks are used."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import count, cpu, gpu, growth, growth_counts, host, loader
from bench import table as tables
from bench.__main__ import main as bench
from bench.registry import CASES, IMPLEMENTATIONS, Case, Implementation, Inputs, Ready, make_inputs, ready
from tokenmix_kernels import TopKMaps, kernels, tokenmix
from tokenmix_kernels.transforms import tracked_transform

TINY = CASES["tiny"]
ON_CPU = [one for one in IMPLEMENTATIONS if one.device in ("", "cpu")]
CLONE, EAGER = IMPLEMENTATIONS[0], next(one for one in IMPLEMENTATIONS if one.name == "ours, eager")


@pytest.mark.parametrize("implementation", ON_CPU, ids=lambda one: one.name)
def test_every_implementation_is_right_on_a_tiny_case(implementation: Implementation) -> None:
    built, wrong = ready(TINY, make_inputs(TINY), implementation)
    assert not wrong
    assert built is not None


def spoil_pixel(images: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images[1, 2, 3, 4] += 0.5
    return images, targets, mask


def spoil_side(images: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Targets that give the partner what the image keeps."""
    return images, targets.flip(0), mask


def spoil_targets(images: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    targets[0, 0] += 1e-3
    return images, targets, mask


def spoil_mask(images: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return images, targets, ~mask


def spoil_all_equal(images: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return images, targets, mask[:1].expand_as(mask)


def spoiled(spoil: Callable[..., Any], calls: list[str]) -> Implementation:
    """Ours, with a fault put into its result; every call is noted."""

    def build(case: Case, inputs: Inputs) -> Ready:
        right = EAGER.build(case, inputs)

        def call() -> Any:
            calls.append(spoil.__name__)
            return spoil(*right.call()[:3])

        return Ready(call, right.check)

    return Implementation("spoiled", build, "a fault")


@pytest.mark.parametrize("spoil", [spoil_pixel, spoil_side, spoil_targets, spoil_mask, spoil_all_equal])
@pytest.mark.parametrize("where", ["cpu", "gpu"])
def test_a_wrong_result_is_reported_and_not_timed(spoil: Callable[..., Any], where: str) -> None:
    calls: list[str] = []
    implementations = (CLONE, spoiled(spoil, calls), EAGER)
    if where == "cpu":
        rows = cpu.rows_of(*cpu.measure(TINY, implementations, rounds=3, budget=1, show=False))
    else:
        rows = gpu.measure(TINY, implementations, torch.device("cpu"), counted_clock([])[0])
    by_name = {row["implementation"]: row for row in rows}
    assert by_name["spoiled"]["wrong"]
    assert not any("_p50" in name for name in by_name["spoiled"])
    assert calls == [spoil.__name__]  # the one that was looked at
    assert "wrong" not in by_name["clone"]
    assert "wrong" not in by_name["ours, eager"]


def test_an_implementation_that_fails_is_a_line_of_the_report() -> None:
    def build(case: Case, inputs: Inputs) -> Ready:
        raise RuntimeError("no such card\nand more")

    rows = cpu.rows_of(*cpu.measure(TINY, (CLONE, Implementation("broken", build, "")), 3, 1, show=False))
    assert rows[-1]["wrong"] == "RuntimeError: no such card"


def counted_clock(asked: list[str], microseconds: float = 10.0) -> tuple[gpu.Clock, list[str]]:
    """A clock that calls once and says the same of everything."""

    def clock(kind: str) -> Callable[[Callable[[], Any]], list[float]]:
        def time(call: Callable[[], Any]) -> list[float]:
            asked.append(kind)
            call()
            return [microseconds, 2 * microseconds, 3 * microseconds]

        return time

    return gpu.Clock(clock("cold"), clock("kernel"), clock("host")), asked


def test_rows_of_a_gpu_tell_kernel_call_and_bandwidth_apart() -> None:
    clock, asked = counted_clock([])
    in_place = next(one for one in IMPLEMENTATIONS if one.name == "ours, in place")
    published = next(one for one in IMPLEMENTATIONS if one.name == "published approach")
    rows = gpu.measure(TINY, (CLONE, in_place, published), torch.device("cpu"), clock)
    assert asked == ["cold", "host", "kernel"] * 2 + ["cold", "host"]  # the host draws the published masks: no graph
    assert [row["kernel_us_p50"] for row in rows[:2]] == [20.0, 20.0]
    assert rows[0]["share_of_copy"] == 1.0
    assert rows[1]["share_of_copy"] == pytest.approx((8 * 8 // 2 + 14) / 64)  # the same time for the tokens that move
    assert rows[0]["gbytes_per_s"] == pytest.approx(2 * 4 * 3 * 64 * 64 * 4 / 20e-6 / 1e9)


def fill(grid: tuple[int], named: dict[str, Any], wrong_rows: int | None = None) -> None:
    """Stands for a launch: the same result, whatever the cut; another for one number of rows."""
    assert grid == (len(named["images"]) * named["PROGRAMS"],)
    named["out"].fill_(2 if named["ROWS"] == wrong_rows else 1)
    named["targets"].fill_(0.5)
    named["weights"].fill_(0.5)
    named["mask_out"].fill_(True)


def test_a_call_that_a_graph_cannot_hold_keeps_its_other_figures() -> None:
    def kernel(call: Callable[[], Any]) -> list[float]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    clock = counted_clock([])[0]._replace(kernel=kernel)
    (row,) = gpu.measure(TINY, (CLONE,), torch.device("cpu"), clock)
    assert row["no_graph"] == "operation not permitted when stream is capturing"
    assert row["cold_us_p50"] == 20.0
    assert "kernel_us_p50" not in row


def test_the_sweep_finds_the_fastest_cut_and_leaves_out_wrong_ones(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[dict[str, Any]] = []

    def launch(grid: tuple[int], named: dict[str, Any]) -> None:
        fill(grid, named, wrong_rows=2)
        if named["num_warps"] == 2:
            raise MemoryError("shared memory\nand more")
        tried.append(named)

    def kernel(call: Callable[[], Any]) -> list[float]:
        call()
        time = 5.0 if (tried[-1]["ROWS"], tried[-1]["num_warps"]) == (1, 8) else 9.0
        return [time] * 3

    setting = gpu.Setting(torch.uint8, torch.float16, True, 16, 2)
    rows = gpu.sweep(torch.device("cpu"), gpu.Clock(kernel, kernel, kernel), 60, [setting], launch, side=64)
    best = [row for row in rows if row.get("best")]
    assert [(row["ROWS"], row["num_warps"]) for row in best] == [(1, 8)]
    assert sum(row["now"] for row in rows) == 1
    assert all(("wrong" in row) == (row["ROWS"] == 2 or row["num_warps"] == 2) for row in rows if not row["now"])
    assert {row["wrong"] for row in rows if row["num_warps"] == 2} == {"MemoryError: shared memory"}
    cuts = [(row["PROGRAMS"], row["num_warps"]) for row in rows]
    assert len(set(cuts)) == len(cuts)
    assert all(row["PROGRAMS"] == 2 + -(-4 // row["ROWS"]) for row in rows)
    assert "ROWS 1, 8 warps, 5.0 us" in capsys.readouterr().out


def test_the_sweep_stops_in_time() -> None:
    clock, asked = counted_clock([])
    assert gpu.sweep(torch.device("cpu"), clock, -1.0, gpu.settings_swept(), fill) == []
    assert not asked


def test_the_copy_is_one_and_ratios_are_of_the_same_round() -> None:
    rows = cpu.rows_of({"clone": [1.0, 2.0, 4.0], "slow": [3.0, 6.0, 12.0]}, {"bad": "why"})
    assert [row.get("ratio_p50") for row in rows] == [1.0, 3.0, None]
    assert rows[1]["ratio_p20"] == rows[1]["ratio_p80"] == 3.0
    assert rows[2]["wrong"] == "why"


def test_extra_memory_is_seen() -> None:
    taken = cpu.watched(lambda: torch.ones(2**25, dtype=torch.uint8).max())
    assert 2**24 < taken < 2**27


def test_a_file_is_written_and_its_table_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.json"
    bench(["cpu", "--case", "tiny", "--rounds", "3", "--no-memory", "--threads", "1", "--out", str(out)])
    assert out.with_suffix(".csv").is_file()
    assert out.with_suffix(".png").stat().st_size > 5000
    record = json.loads(out.read_text())
    assert record["machine"]["versions"]["torch"] == version("torch")
    assert {row["implementation"] for row in record["rows"]} == {one.name for one in ON_CPU}
    capsys.readouterr()
    printed = []
    for _ in range(2):
        bench(["table", str(out)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    for row in record["rows"]:
        line = next(line for line in printed[0].splitlines() if line.startswith(f"| {row['implementation']} |"))
        assert f"{row['ratio_p50']:.2f}" in line


def test_a_table_says_what_misses_its_bar() -> None:
    row = {
        "case": "fp16", "sm": 90, "classes": 1000, "samples": 40, "registers": 70, "spills": 0, "shared_bytes": 0,
        "rows": 7, "programs": 4, "num_warps": 4, "load_bytes_per_thread": [8, 16], "store_bytes_per_thread": [16],
        "traffic": "copy", "traffic_ratio": 0.9, "longest_warp_mean": 1400.0, "longest_warp_p95": 1500.0,
        "longest_warp_max": 1600, "warp_instructions_per_image": 26000.0, "of_pixels": 13000.0, "of_targets": 13000.0,
        "images_and_masks_equal": True, "target_error": 0.0, "races": 0, "bars": count.bars(count.CASES[0]),
    }  # fmt: skip
    record = {
        "kind": "counts", "command": "python -m bench count", "machine": {"versions": {}, "gpu": "none"},
        "rows": [row, row | {"images_and_masks_equal": False}], "by_classes": [row],
    }  # fmt: skip
    first, second = (line for line in tables.table(record).splitlines() if line.startswith("| fp16 |"))
    assert "70 > 64 **fail**" in first
    assert "8 < 16 **fail**" in first
    assert "26,000 > 25,000 **fail**" in first
    assert "1,400 ≤ 1,500" in first
    assert "**no**" not in first
    assert "**no**" in second
    with pytest.raises(SystemExit, match="kind must be one of"):
        tables.table({"kind": "other"})


def test_loaders_are_compared_on_the_same_images() -> None:
    transforms = {"timm": loader.timm_transform(), "ours": tracked_transform(224, **loader.RECIPE)}
    loader.check(transforms, images=6)
    others = transforms | {"ours": tracked_transform(224, **loader.RECIPE | {"hflip": 1.0})}
    with pytest.raises(RuntimeError, match="differ"):
        loader.check(others, images=6)


def test_a_round_of_loaders_is_a_line_of_the_table() -> None:
    row = loader.measure(workers=0, images=4, rounds=3, batch=2, show=False)
    assert row["ratio_p20"] <= row["ratio_p50"] <= row["ratio_p80"]
    record = {
        "kind": "loader", "command": "python -m bench loader", "machine": {"versions": {}, "gpu": "none"},
        "source": loader.SOURCE, "rounds": 3, "rows": [row | {"ratio_p50": 1.03}, row | {"ratio_p50": 1.01}],
    }  # fmt: skip
    first, second = (line for line in tables.table(record).splitlines() if line.startswith("| 0 |"))
    assert "> 1.02 **fail**" in first
    assert "≤ 1.02" in second


@pytest.mark.parametrize("name", ["mixers", "study"])
def test_the_trainer_s_results_are_tables_too(name: str) -> None:
    record = json.loads((Path(__file__).parents[1] / "train" / "results" / f"{name}.json").read_text())
    lines = tables.table(record).splitlines()
    for one in record["mixers"] if name == "mixers" else record["runs"]:
        line = next(line for line in lines if line.startswith(f"| {one} |"))
        if name == "study":
            tops = [run["top1"] for run in record["runs"][one]]
            assert f"| {sum(tops) / len(tops):.1f} ±" in line
    assert record["command"] in lines[-1]


def test_counting_needs_a_simulator(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ptxsim"):
        bench(["count", "--ptxsim", str(tmp_path)])


# `tokenmix` always mixes tokens: Mixup is for `TokenMix` alone.
@pytest.mark.parametrize("case", [c for c in count.CASES if "Mixup" not in c.name], ids=lambda case: case.name)
def test_what_is_counted_would_be_equal_to_the_reference(case: count.Case) -> None:
    """The comparison that counting relies on tells a right result from a wrong one."""
    launch = count.prepare(case, 0, 1000, batch=2)
    labels, _, values, indices, boxes, _, seed, _ = launch.inputs
    given: dict[str, Any] = launch.settings._asdict()
    constants = {name: given[name] for name in ("minimum_tokens", "mask_type", "mode", "label_smoothing")}
    mixed = tokenmix(
        launch.before, labels, num_classes=1000, maps=TopKMaps(values, indices), boxes=boxes, seed=seed,
        lam="beta" if given["lam"] < 0 else given["lam"], mean=given["mean"] or None, std=given["std"] or None,
        out_dtype=launch.out.dtype, **constants,
    )  # fmt: skip
    launch.out.copy_(mixed.images)
    launch.targets.copy_(mixed.targets)
    launch.weights.copy_(mixed.weights)
    launch.mask.copy_(mixed.mask)
    same, error = count.difference(launch, case.in_place)
    assert same
    assert error <= 1e-6
    launch.out[1, 1, 7, 7] += 1
    assert not count.difference(launch, case.in_place)[0]


def test_the_host_is_timed_from_the_bare_launch_on() -> None:
    arguments, rows = host.measure(rounds=5, each=20, batch=2)
    assert arguments > 40
    assert rows[0]["ratio"] == 1.0
    barred = [row for row in rows if "bar" in row]
    assert barred
    # A whole call holds a launch and more.
    assert all(row["ratio"] > 1 for row in barred)


def test_a_line_is_found_through_what_grows() -> None:
    line, constant, slope = growth.predicted([1.0, 10.0, 100.0], [5.0, 23.0, 203.0])
    assert line == pytest.approx([5.0, 23.0, 203.0])
    assert (constant, slope) == pytest.approx((3.0, 2.0))
    flat, constant, slope = growth.predicted([0.0, 0.0], [4.0, 4.0])
    assert (flat, constant, slope) == (pytest.approx([4.0, 4.0]), pytest.approx(4.0), 0.0)


class Simulator:
    """Stands for the PTX simulator: every program takes 10 instructions and moves a copy's sectors."""

    def __init__(self) -> None:
        self.ran: list[list[int]] = []

    def compile_kernel(self, kernel: Any, named: dict[str, Any], **options: Any) -> Any:
        assert set(options) == {"arch", *kernels.OPTIONS}
        return None

    def run(self, compiled: Any, grid: tuple[int], named: dict[str, Any], ctas: list[int], **options: Any) -> Any:
        assert max(ctas) < grid[0]
        self.ran.append(ctas)
        images = len(ctas) // named["PROGRAMS"]
        sectors = images * named["images"][0].numel() * 2 // 32
        return SimpleNamespace(
            total_warp_insts=10 * len(ctas), max_warp_insts=4,
            buffers={
                "images": {"read_sectors": sectors, "written_sectors": 0},
                "out": {"read_sectors": 0, "written_sectors": sectors},
                "targets": {"read_sectors": 0, "written_sectors": images},
            },
        )  # fmt: skip


@pytest.mark.parametrize(("batch", "images"), [(1, 1), (2, 2), (3, 3), (5, 3), (64, 4)])
def test_counts_of_a_sample_are_those_of_an_image(batch: int, images: int) -> None:
    simulator = Simulator()
    found = growth_counts.count_case(simulator, TINY._replace(batch=batch), 90, pairs=2)
    ran = [cta for ctas in simulator.ran for cta in ctas]
    assert len(set(ran)) == len(ran)
    assert len(ran) % images == 0
    assert found["instructions"] == 10 * len(ran) / images
    assert found["sectors"] == 1.0
    assert found["bytes_written"] == 32.0
    assert found["longest"] == 4.0
