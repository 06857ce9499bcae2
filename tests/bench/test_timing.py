"""Timing: wrong results are reported and not timed, clocks are used as they say, files hold what was timed."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import cpu, gpu, growth, host, loader, report
from bench.__main__ import main as bench
from bench.baselines import IMPLEMENTATIONS, Implementation, Ready, ready
from bench.cases import CASES, Case, Inputs, make_inputs
from bench.launch import Cut, Launch, cut_of
from bench.model import cases, compare, simulated_microseconds
from bench.sweep import cases_swept, sweep
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
    assert rows[1]["share_of_copy"] == pytest.approx((8 * 8 // 2 + 5) / 64)  # the same time for the tokens that move
    assert rows[0]["gbytes_per_s"] == pytest.approx(2 * 4 * 3 * 64 * 64 * 4 / 20e-6 / 1e9)


def test_a_call_that_a_graph_cannot_hold_keeps_its_other_figures() -> None:
    def kernel(call: Callable[[], Any]) -> list[float]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    clock = counted_clock([])[0]._replace(kernel=kernel)
    (row,) = gpu.measure(TINY, (CLONE,), torch.device("cpu"), clock)
    assert row["no_graph"] == "operation not permitted when stream is capturing"
    assert row["cold_us_p50"] == 20.0
    assert "kernel_us_p50" not in row


def fill(launch: Launch, wrong_rows: int | None = None) -> None:
    """Write the same result whatever the cut, and another one for one number of rows."""
    launch.out.images.fill_(2 if cut_of(launch).rows == wrong_rows else 1)
    launch.out.targets.fill_(0.5)
    launch.out.weights.fill_(0.5)
    launch.out.mask.fill_(True)


def test_the_sweep_finds_the_fastest_cut_and_leaves_out_wrong_ones(capsys: pytest.CaptureFixture[str]) -> None:
    tried: list[Cut] = []

    def launched(launch: Launch) -> None:
        fill(launch, wrong_rows=2)
        if cut_of(launch).warps == 2:
            raise MemoryError("shared memory\nand more")
        tried.append(cut_of(launch))

    def timed(call: Callable[[], Any]) -> list[float]:
        call()
        return [5.0 if tried[-1] == Cut(1, 8) else 9.0] * 3

    case = Case("small", 2, height=64, width=64, dtype=torch.uint8, out_dtype=torch.float16, channels_last=True)
    rows = sweep(torch.device("cpu"), timed, 60, [case], launched)
    best = [row for row in rows if row.get("best")]
    assert [(row["rows"], row["warps"]) for row in best] == [(1, 8)]
    assert sum(row["now"] for row in rows) == 1
    assert all(("wrong" in row) == (row["rows"] == 2 or row["warps"] == 2) for row in rows if not row["now"])
    assert {row["wrong"] for row in rows if row["warps"] == 2} == {"MemoryError: shared memory"}
    cuts = [(row["rows"], row["warps"]) for row in rows]
    assert len(set(cuts)) == len(cuts)
    assert {row["rows"] for row in rows} == {1, 2, 4}  # 4 rows of tokens: 3 rows would come to 2
    assert "1 rows, 8 warps, 5.0 us" in capsys.readouterr().out


def test_the_sweep_stops_in_time() -> None:
    timed = counted_clock([])[0].kernel
    assert sweep(torch.device("cpu"), timed, -1.0, cases_swept(), fill) == []


def test_what_is_simulated_is_timed_cold_and_warm_in_three_ways() -> None:
    known = {
        "rows": [
            {"case": "small", "card": "H100", "microseconds": 10.0},
            {"case": "small", "card": "A100", "microseconds": 99.0},
        ]
    }
    case = Case("small", 2, height=80, width=64, dtype=torch.float16)
    cold, warm = counted_clock([], 10.0)[0].kernel, counted_clock([], 3.0)[0].kernel
    of_card = simulated_microseconds(known, "NVIDIA H100 80GB HBM3")
    rows = compare(torch.device("cpu"), cold, warm, of_card, 60, [case], fill)
    assert [row["launch"] for row in rows] == ["as launched", "without look-ahead of pixels", "two warps, 4 rows"]
    assert [(row["cold_us_p50"], row["warm_us_p50"]) for row in rows] == [(20.0, 6.0)] * 3
    assert [row.get("cold_to_simulated") for row in rows] == [2.0, None, None]


def test_a_variant_that_gives_another_result_is_not_timed() -> None:
    case = Case("small", 2, height=96, width=64, dtype=torch.float16)
    clock = counted_clock([])[0].kernel
    rows = compare(torch.device("cpu"), clock, clock, {}, 60, [case], lambda launch: fill(launch, wrong_rows=3))
    assert [row.get("wrong") for row in rows] == [None, None, "differs from today's launch"]
    assert compare(torch.device("cpu"), clock, clock, {}, -1.0, cases(), fill) == []


def test_the_copy_is_one_and_ratios_are_of_the_same_round() -> None:
    rows = cpu.rows_of({"clone": [1.0, 2.0, 4.0], "slow": [3.0, 6.0, 12.0]}, {"bad": "why"})
    assert [row.get("ratio_p50") for row in rows] == [1.0, 3.0, None]
    assert rows[1]["ratio_p20"] == rows[1]["ratio_p80"] == 3.0
    assert rows[2]["wrong"] == "why"


def test_extra_memory_is_seen() -> None:
    # From 32 MB on the C library never gives out memory that was used before.
    taken = cpu.watched(lambda: torch.ones(2**27, dtype=torch.uint8).max())
    assert 2**26 < taken < 2**29


def test_a_file_is_written_and_its_table_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cpu.json"
    quick = ["--rounds", "3", "--no-memory", "--timm-rounds", "1", "--threads", "1"]
    bench(["cpu", "--case", "tiny", *quick, "--out", str(out)])
    assert out.with_suffix(".csv").is_file()
    assert out.with_suffix(".png").stat().st_size > 5000
    record = json.loads(out.read_text())
    assert record["machine"]["versions"]["torch"] == version("torch")
    assert {row["implementation"] for row in record["rows"]} == {one.name for one in ON_CPU}
    capsys.readouterr()
    printed = []
    for _ in range(2):
        bench(["report", str(out)])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    for row in record["rows"]:
        line = next(line for line in printed[0].splitlines() if line.startswith(f"| {row['implementation']} |"))
        assert f"{row['ratio_p50']:.2f}" in line


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
    first, second = (line for line in report.table(record).splitlines() if line.startswith("| 0 |"))
    assert "> 1.02 **fail**" in first
    assert "≤ 1.02" in second


def test_the_host_is_timed_from_the_bare_launch_on() -> None:
    arguments, rows = host.measure(rounds=5, each=20, batch=2)
    assert arguments > 40
    assert rows[0]["ratio"] == 1.0
    barred = [row for row in rows if "bar" in row]
    assert barred


def test_a_line_is_found_through_what_grows() -> None:
    line, constant, slope = growth.predicted([1.0, 10.0, 100.0], [5.0, 23.0, 203.0])
    assert line == pytest.approx([5.0, 23.0, 203.0])
    assert (constant, slope) == pytest.approx((3.0, 2.0))
    flat, constant, slope = growth.predicted([0.0, 0.0], [4.0, 4.0])
    assert (flat, constant, slope) == (pytest.approx([4.0, 4.0]), pytest.approx(4.0), 0.0)
