"""The bench of whole input pipelines counts what they do."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench import pipeline, report

SHAPE = (8, 3, 32, 32)
VALUES = 8 * 3 * 32 * 32
HALF = torch.float16


def test_bytes_and_launches_of_plain_operations() -> None:
    one, other = torch.zeros(10, device="meta"), torch.zeros(10, device="meta")
    with pipeline.Traffic("meta") as traffic:
        one[2:4].view(2)  # no launch
        assert (traffic.launches, traffic.bytes) == (0, 0)
        one + other
        assert (traffic.launches, traffic.bytes) == (1, 120)
        one[:5] = other[5:]
        assert (traffic.launches, traffic.bytes) == (2, 160)
        one.mul_(2)
        assert (traffic.launches, traffic.bytes) == (3, 240)
        torch.zeros(10).to("meta")  # a copy, no kernel
        assert traffic.launches == 3


def test_timm_moves_29_bytes_for_a_blended_half_and_ours_4() -> None:
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 0.0, "num_classes": 2}
    timm = pipeline.count("timm", options, HALF, SHAPE, 4, erase=False)
    # Convert 1 + 2, subtract 4, divide 4, flip 4, scale 4 + 4, add 6; six small ones for the targets.
    assert timm["launches"] == 13
    assert timm["bytes"] == pytest.approx(29, rel=0.01)
    ours = pipeline.count("ours", options, HALF, SHAPE, 4, erase=False)
    assert ours["launches"] == 1 and ours["bytes"] == pytest.approx(4, rel=0.02)
    tokens = pipeline.count("ours", {**options, "mixup_alpha": 0.0, "cutmix_alpha": 1.0}, HALF, SHAPE, 2, erase=False)
    assert tokens["launches"] == 1 and tokens["bytes"] == pytest.approx(3, rel=0.02)


def test_erasing_costs_timm_two_launches_for_every_fourth_image() -> None:
    options = {"mixup_alpha": 0.8, "num_classes": 2}
    counted = [pipeline.count("timm", options, HALF, SHAPE, 40, erase)["launches"] for erase in (False, True)]
    assert pipeline.count("ours", options, HALF, SHAPE, 2)["launches"] == 1
    assert counted[1] - counted[0] == pytest.approx(8 * 0.25 * 2, abs=1)


def test_the_bench_writes_its_table(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    pipeline.add_arguments(parser)
    sides = ["4", "3", "32", "32"]
    pipeline.main(parser.parse_args([
        "--out", str(tmp_path / "p.json"), "--draws", "2", "--rounds", "2", "--shape", *sides, "--cpu-shape", *sides,
    ]))  # fmt: skip
    record = json.loads((tmp_path / "p.json").read_text())
    text = report.table(record)
    assert "| ours, CutMix or tokens | float16 | 1 |" in text and "B = 4, 3x32x32, uint8 in" in text
    assert all(row["timm_ms"] > 0 and row["ours_ms"] > 0 for row in record["cpu"])
