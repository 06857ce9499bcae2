"""Tables follow from result files, and docs/performance.md from both."""

import json
from pathlib import Path

import pytest

from bench import report
from bench.ptx import count

ROOT = Path(__file__).parents[2]


def test_the_pages_match_their_result_files() -> None:
    for path, text in report.rebuilt(ROOT).items():
        assert (ROOT / path).read_text() == text, "run `python -m bench report`"


def test_a_changed_figure_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for path in (report.PAGE, report.README, *report.SOURCES.values()):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text((ROOT / path).read_text())
    monkeypatch.setattr(report, "__file__", str(tmp_path / "bench" / "report.py"))
    check, write = (report_arguments(*given) for given in (["--check"], []))
    report.main(check)
    host = json.loads((tmp_path / report.SOURCES["host"]).read_text())
    host["rows"][0]["us_p50"] += 1
    (tmp_path / report.SOURCES["host"]).write_text(json.dumps(host))
    with pytest.raises(SystemExit, match=r"^docs/performance.md: does not match"):
        report.main(check)
    report.main(write)
    report.main(check)


def report_arguments(*given: str) -> object:
    import argparse

    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args(given)


def test_a_simulated_ratio_stands_beside_its_bar() -> None:
    row = {
        "case": "fp16 B 128", "card": "A100", "batch": 128, "against": "copy", "ratio": 0.97, "lowest": 0.95,
        "highest": 1.0, "by_assumption": {"nominal": 0.97, "other": 1.0}, "bar": 0.98, "aim": 0.965,
        "images_and_masks_equal": True, "target_error": 0.0,
    }  # fmt: skip
    rows = [row, row | {"card": "H100", "ratio": 1.01, "images_and_masks_equal": False}]
    record = {"kind": "simulated", "command": "c", "machine": {"versions": {}, "gpu": "none"}, "rows": rows}
    line = next(line for line in report.table(record).splitlines() if line.startswith("| fp16 B 128"))
    assert "0.970 ≤ 0.98 | 0.950 to 1.000 | 1.010 > 0.98 **fail**" in line
    assert "**no**" in line


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
    first, second = (line for line in report.table(record).splitlines() if line.startswith("| fp16 |"))
    assert "70 > 64 **fail**" in first
    assert "8 < 16 **fail**" in first
    assert "| 26,000 |" in first  # explains, without a bar
    assert "**no**" not in first
    assert "**no**" in second
    with pytest.raises(SystemExit, match="must be one of"):
        report.table({"kind": "other"})


def test_the_trainer_s_results_are_a_table_too() -> None:
    record = json.loads((ROOT / report.SOURCES["mixers"]).read_text())
    lines = report.table(record).splitlines()
    for one in record["mixers"]:
        assert any(line.startswith(f"| {one} |") for line in lines)
    assert record["command"] in lines[-1]
