"""The study's runs: which are started, what a run selects by, and what is left when one ends early."""

import json
import subprocess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from study_helpers import make_plan, save
from timm.optim import create_optimizer_v2
from train_helpers import make_folder, tiny

from bench.study import runner, worker
from bench.study.plan import Plan, Spec
from bench.study.summary import summarise
from train import loop


class Process:
    """A run that is finished at the first look, fails, or is interrupted there."""

    def __init__(self, spec: Spec, results: Path, end: str) -> None:
        self.spec, self.results, self.end, self.terminated, self.waited = spec, results, end, False, False

    def poll(self) -> int | None:
        if self.end == "interrupt":
            raise KeyboardInterrupt
        if self.end == "done":
            save(self.results, self.spec, 70.0)
        return {"done": 0, "fail": 1, "busy": worker.BUSY}.get(self.end)

    def terminate(self) -> None:
        self.terminated = True

    def wait(self) -> int:
        self.waited = True
        return 0


def start_with(ends: dict[int, str], started: list[Process]) -> runner.Start:
    """Fake runs: the i-th ends as `ends` says, "done" unless it says something."""

    def start(spec: Spec, plan: Plan, results: Path, work: Path) -> "subprocess.Popen[bytes]":
        started.append(Process(spec, results, ends.get(len(started), "done")))
        return cast("subprocess.Popen[bytes]", started[-1])

    return start


def test_a_killed_study_goes_on_and_keeps_its_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL", 0.0)
    plan, results = make_plan(tmp_path), tmp_path / "results"
    first: list[Process] = []
    with pytest.raises(KeyboardInterrupt):
        runner.run_plan(plan, results, tmp_path / "work", 2, start_with({3: "running", 4: "interrupt"}, first))
    assert [process.spec for process in first] == list(plan.specs[:5])
    left = [process for process in first if process.end != "done"]
    assert all(process.terminated and process.waited for process in left) and len(left) == 2
    kept = {path: path.stat().st_mtime_ns for path in results.glob("*.json")}
    assert len(kept) == 3
    second: list[Process] = []
    assert runner.run_plan(plan, results, tmp_path / "work", 1, start_with({}, second)) == 0
    assert [process.spec for process in second] == list(plan.specs[3:])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert list(runner.finished(plan, results)) == [spec.name for spec in plan.specs]


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "POLL", 0.0)
    plan, started = make_plan(tmp_path), []  # type: ignore[var-annotated]
    assert (
        runner.run_plan(plan, tmp_path / "results", tmp_path / "work", 1, start_with({1: "fail", 2: "busy"}, started))
        == 1
    )
    assert len(started) == len(plan.specs)
    assert len(runner.finished(plan, tmp_path / "results")) == len(plan.specs) - 2


def test_results_of_other_settings_and_broken_files_are_not_mixed_in(tmp_path: Path) -> None:
    plan, results = make_plan(tmp_path), tmp_path / "results"
    save(results, plan.specs[0], 70.0)
    other = make_plan(tmp_path, flags=["--lr", "2e-3"])
    with pytest.raises(ValueError, match=r"none-s0\.json was made with other settings than the plan's: --lr 1e-3"):
        summarise(other, results)
    (results / f"{plan.specs[0].name}.json").write_text('{"flags": [')
    with pytest.raises(ValueError, match=r"none-s0\.json is not the result of a run: move it away"):
        summarise(plan, results)


def test_runs_in_turn_leave_out_what_is_done_and_what_another_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, results = make_plan(tmp_path), tmp_path / "results"
    save(results, plan.specs[1], 70.0)
    tried: list[Spec] = []

    def run_one(spec: Spec, *_: Path) -> int:
        tried.append(spec)
        if spec == plan.specs[2]:
            raise ValueError("no such teacher")
        return worker.BUSY if spec == plan.specs[3] else 0

    monkeypatch.setattr(runner, "run_one", run_one)
    assert runner.run_in_turn(plan, results, tmp_path / "work") == 1
    assert tried == [plan.specs[0], *plan.specs[2:]]


def test_selection_reads_held_out_images_only_and_a_killed_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = make_folder(tmp_path / "images", classes=2, train=16, val=3), tmp_path / "results"
    work = tmp_path / "work"
    flags = tiny(folder, tmp_path, "--mixer", "none", "--holdout", "0.25", "--label-fraction", "0.5", "--model-ema")
    spec = Spec("none", "small", 0.5, 2, 0, tuple(flags))
    opened: list[str] = []
    real_open, real_end, real_train = Image.open, loop.end_epoch, worker.train

    def record_open(file: Any, *given: Any, **more: Any) -> Any:
        opened.append(str(Path(getattr(file, "name", file)).relative_to(folder)))
        return real_open(file, *given, **more)

    def interrupt(*given: Any) -> None:
        real_end(*given)
        raise KeyboardInterrupt

    trained: list[list[str]] = []

    def record_train(args: Any) -> Any:
        history = real_train(args)
        trained.append(list(opened))
        return history

    monkeypatch.setattr(Image, "open", record_open)
    monkeypatch.setattr(worker, "train", record_train)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(loop, "end_epoch", interrupt)
        worker.run_one(spec, results, work)
    assert not list(results.glob("*.json")) and (work / spec.name / "last.pt").is_file()
    in_first = len(opened)
    assert worker.run_one(spec, results, work) == 0
    result = json.loads((results / f"{spec.name}.json").read_text())
    history = result["history"]
    assert history["epochs"] == [1, 2] and result["updates"] == 2 and "evidence" not in result["occlusion"]
    assert len(result["selected"]["predicted"]) == len(result["test_labels"]) == 6
    assert 0 < len(trained[0]) - in_first <= in_first, "the second start trains the second epoch alone"

    assert {path.split("/")[0] for path in trained[0]} == {"train"}, "training and selection read no test image"
    after = opened[len(trained[0]) :]
    tests = [path for path in after if path.startswith("val/")]
    assert len(tests) == len(set(tests)) == result["images"]["test"] == 6, "each test image is read once"
    held_out = {path for path in set(trained[0]) if path not in after}
    assert len(held_out) == result["images"]["held_out"] == 8, "those that were selected on are not trained on"
    raw, averaged = history["held_out_top1"], history["held_out_top1_averaged"]
    best = max(*raw, *averaged)
    first = next(i for i in range(2) if best in (raw[i], averaged[i]))
    weights = "averaged" if averaged[first] >= raw[first] else "raw"
    selected = (result["selected_epoch"], result["selected_weights"], result["selected_held_out_top1"])
    assert selected == (first + 1, weights, pytest.approx(best, abs=1e-3))
    assert not (work / spec.name).exists()


def test_muon_orthogonalises_in_fp32_in_a_run_only() -> None:
    # Equal but for the rounding of bfloat16, and as it was afterwards.
    gradient = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

    def updated() -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(8, 16))
        weight.grad = gradient.clone()
        create_optimizer_v2([weight], opt="muon", lr=1.0, weight_decay=0.0).step()
        return weight.detach()

    in_bfloat16 = updated()
    with worker.exact_muon():
        in_fp32 = updated()
    assert 0 < (in_fp32 - in_bfloat16).norm() < 0.05 * in_fp32.norm()
    assert torch.equal(updated(), in_bfloat16)
