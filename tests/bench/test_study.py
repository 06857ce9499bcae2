"""The study: its plan, its runner, what it selects by, its measures and its report."""

import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image
from scipy import stats
from timm.optim import create_optimizer_v2
from train_helpers import make_folder, tiny

from bench.study import runner, worker
from bench.study.__main__ import main
from bench.study.measure import evidence_first, replace_tokens, scores
from bench.study.plan import DEFAULT, Plan, Spec, load_plan, settings_digest
from bench.study.report import page, write_report
from bench.study.summary import interval, load_summary, summarise
from train import loop
from train.config import parse
from train.flags import FIXED
from train.parser import RECIPES

ROOT = Path(__file__).parents[2]
LABELS = [0, 1, 1, 0]
MIXERS = {"none": ["--mixer", "none"], "Mixup": ["--mixer", "mixup"], "CutMix": ["--mixer", "cutmix"]}
BLOCKS = [{"label_fraction": 0.5, "epochs": 10, "seeds": [0, 1, 2]}, {"label_fraction": 1, "epochs": 20, "seeds": [0]}]


def content(**changes: Any) -> dict[str, Any]:
    """A plan of 2 settings, 3 mixers and 4 seeds in all."""
    base = {"flags": ["--lr", "1e-3"], "tasks": {"small": []}, "mixers": MIXERS, "holdout": 0.25, "runs": BLOCKS}
    return {**base, **changes}


def make_plan(folder: Path, **changes: Any) -> Plan:
    (folder / "plan.json").write_text(json.dumps(content(**changes)))
    return load_plan(folder / "plan.json")


def make_result(spec: Spec, top1: float, predicted: list[int] = LABELS, **more: float) -> dict[str, Any]:
    """What a run leaves, with made-up figures; `occlusion` falls from top1 in steps of 10 and of 20."""
    measured = {"top1": top1, "balanced": top1 - 1, "nll": 0.5, "ece": 5.0, "train_top1": top1 + 10, **more}
    setup = {"data": "elpv", "model": "m", "model_kwargs": {"depth": 1}, "input_size": 8, "batch_size": 2}
    setup |= {"in_memory": 9, "shift_crops": True, "hflip": 0.5, "smoothing": 0.1, "opt": "adamw", "lr": 1e-3}
    return {
        **{key: value for key, value in spec._asdict().items() if key != "flags"},
        "flags": list(spec.flags),
        "args": {**setup, "bce_loss": False},
        **{"seconds": 60.0, "torch": "2", "timm": "1", "cpu": "c", "updates": 99, "classes": 2},
        "images": {"train": 9, "held_out": 3, "test": 4},
        **{"selected_epoch": 7, "selected_held_out_top1": 50.0, "occluded": [0.1, 0.3]},
        "test_labels": "".join(map(str, LABELS)),
        "history": {"epochs": [7], "train_loss": [0.1], "held_out_top1": [50.0], "held_out_loss": [0.2]},
        "selected": {**measured, "predicted": "".join(map(str, predicted))},
        "last": {**measured, "top1": top1 - 2},
        "occlusion": {"random": [top1 - 10, top1 - 20], "evidence": [top1 - 20, top1 - 40]},
    }


def save(results: Path, spec: Spec, *given: Any, **more: Any) -> None:
    results.mkdir(exist_ok=True)
    (results / f"{spec.name}.json").write_text(json.dumps(make_result(spec, *given, **more)))


def made_up(folder: Path) -> Plan:
    """none 70, 72, 74 and Mixup 71, 76, 75 with three seeds, CutMix 80 with seed 1 alone, and Mixup without `none`."""
    plan = make_plan(folder)
    tops = {"none": {0: 70.0, 1: 72.0, 2: 74.0}, "Mixup": {0: 71.0, 1: 76.0, 2: 75.0}, "CutMix": {1: 60.0}}
    for spec in plan.specs:
        if spec.epochs == 10 and spec.seed in tops[spec.mixer]:
            calibration = 9.0 if spec.mixer == "none" else 4.0
            save(folder / "results", spec, tops[spec.mixer][spec.seed], ece=calibration)
        if spec.epochs == 20 and spec.mixer == "Mixup":
            save(folder / "results", spec, 90.0)
    return plan


def test_occluded_tokens_are_those_with_the_most_evidence() -> None:
    evidence = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0))
    most = evidence_first(evidence, 4)
    assert most.flatten(1).sum(1).tolist() == [4] * 5
    for i in range(5):
        assert evidence[i][most[i]].min() >= evidence[i][~most[i]].max()
    images, others = torch.zeros(5, 3, 6, 8), torch.ones(5, 3, 6, 8)
    replaced = replace_tokens(images, others, most)
    assert torch.equal(replaced[:, 0, 1::2, 1::2].bool(), most) and replaced.sum() == 5 * 4 * 4 * 3


def test_scores_are_those_of_a_case_worked_by_hand() -> None:
    # Three of class 0, one of class 1; predicted 0, 0, 1, 1 with confidences 0.6, 0.8, 0.7 and 0.9.
    own = torch.tensor([0.6, 0.8, 0.3, 0.1])
    found = scores(torch.stack([own, 1 - own], 1).log(), torch.tensor([0, 0, 0, 1]))
    assert found["top1"] == 75
    assert found["balanced"] == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert found["nll"] == pytest.approx(-torch.tensor([0.6, 0.8, 0.3, 0.9]).log().mean().item(), abs=1e-6)
    # Each falls into a bin of its own: |1 - 0.6|, |1 - 0.8|, |0 - 0.7| and |1 - 0.9|, a quarter of each.
    assert found["ece"] == pytest.approx(100 * (0.4 + 0.2 + 0.7 + 0.1) / 4, abs=1e-4)
    assert found["confusion"] == [[2, 1], [0, 1]]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runs": [{"label_fraction": 1, "seeds": [0]}]}, "has no 'epochs', which its runs need"),
        ({"runs": [{**BLOCKS[0], "mixers": ["Cutmix"]}]}, "has no 'Cutmix', which its runs need"),
        ({"runs": [{**BLOCKS[0], "epochs": "ten"}]}, "is not a plan of a study: invalid literal"),
        ({"runs": []}, "must list at least one run"),
        ({"tasks": {}}, "is not a plan of a study"),
        ({"runs": [BLOCKS[0], BLOCKS[0]]}, "lists small-50pct-10ep-none-s0 twice"),
        ({"flags": ["--lr", "fast"]}, "small-50pct-10ep-none-s0 cannot be trained: argument --lr: invalid float"),
        ({"flags": ["--no-such-flag"]}, "cannot be trained: unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_wrong_plan_gets_one_sentence_before_any_run(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(content(**changes)))
    assert main(["--plan", str(tmp_path / "plan.json"), "--results", str(tmp_path / "results")]) == 2
    printed = capsys.readouterr().err.strip()
    assert printed.startswith(f"study: error: --plan {tmp_path / 'plan.json'}") and sentence in printed
    assert "\n" not in printed and not (tmp_path / "results").exists()


def test_blocks_without_mixers_have_the_plans_default_ones(tmp_path: Path) -> None:
    blocks = [BLOCKS[1], {**BLOCKS[1], "mixers": ["CutMix"]}]
    plan = make_plan(tmp_path, default_mixers=["none", "Mixup"], runs=blocks)
    assert [spec.mixer for spec in plan.specs] == ["none", "Mixup", "CutMix"]
    assert plan.mixers == ("none", "Mixup", "CutMix")


def test_the_studys_mixers_differ_in_masks_and_evidence_only() -> None:
    plan = load_plan(DEFAULT)
    for task, mixers in {"cells": set(plan.mixers), "digits": set(plan.mixers) - {"TokenMix, teacher"}}.items():
        assert {spec.mixer for spec in plan.specs if spec.task == task} == mixers
    own = {"mixer", "evidence", "maps"}
    for spec in plan.specs:
        args = parse(list(spec.flags))
        assert (args.bce_loss, args.smoothing, args.mixup_prob) == (False, 0.1, 1.0)
        assert args.mixup == 0 or args.mixer in ("mixup", "none", "cutmix"), "no second branch"
        plain = next(s for s in plan.specs if s.setting == spec.setting and s.seed == spec.seed and s.mixer == "none")
        other = vars(parse(list(plain.flags)))
        differing = {name for name in FIXED if vars(args)[name] != other[name]}
        assert differing <= own | {"mixup", "mixup_switch_prob", "cutmix"}, differing


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """The command sets a handler of SIGTERM: put the old one back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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


def test_a_digest_is_of_what_decides_the_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def digest(*flags: str) -> str:
        return settings_digest(("--recipe", "demo", *flags))

    assert digest("--threads", "3", "--eval-every", "7", "--output", "elsewhere") == digest()
    assert digest("--lr", "0.001") == digest(), "the recipe's own value"
    changes = [["--lr", "2e-3"], ["--label-fraction", "0.5"], ["--seed", "1"], ["--mixer", "none"], ["--epochs", "3"]]
    assert len({digest(), *(digest(*flags) for flags in changes)}) == 1 + len(changes)
    recipe = tmp_path / "demo.json"
    recipe.write_text((RECIPES / "demo.json").read_text().replace('"clip_grad": 1.0', '"clip_grad": 2.0'))
    assert settings_digest(("--recipe", str(recipe))) != digest(), "a recipe that changed"


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


def test_intervals_are_student_s() -> None:
    values = [71.0, 76.0, 75.0, 70.5]
    expected = stats.t.interval(0.95, 3, stats.tmean(values), stats.sem(values))
    assert interval(values) == pytest.approx(list(expected))
    assert interval([71.0]) is None


def test_means_intervals_and_paired_differences_are_right(tmp_path: Path) -> None:
    summary = summarise(made_up(tmp_path), tmp_path / "results")
    assert summary["runs"] == {"planned": 12, "finished": 8} and summary["seconds"] == 480
    short, long = summary["settings"]
    assert (short["label_fraction"], short["epochs"], short["train_images"]) == (0.5, 10, 9)
    mixup, cutmix = short["mixers"]["Mixup"], short["mixers"]["CutMix"]
    quantile = 4.302653  # of Student's t with 2 degrees of freedom, at 0.975
    assert mixup["top1"]["mean"] == 74
    half = quantile * (7 / 3) ** 0.5  # deviations -3, 2 and 1
    assert mixup["top1"]["interval"] == pytest.approx([74 - half, 74 + half], abs=1e-3)
    difference = mixup["difference"]["top1"]  # 1, 4 and 1
    assert difference["mean"] == 2
    assert difference["interval"] == pytest.approx([2 - quantile, 2 + quantile], abs=1e-3)
    paired = stats.ttest_rel([71, 76, 75], [70, 72, 74]).confidence_interval(0.95)
    assert difference["interval"] == pytest.approx([paired.low, paired.high], abs=1e-3)
    assert cutmix["top1"] == {"mean": 60.0, "interval": None, "values": [60.0]}
    assert cutmix["difference"]["seeds"] == [1] and cutmix["difference"]["top1"]["mean"] == -12
    assert cutmix["planned"] == 3 and "difference" in cutmix and short["mixers"]["none"]["difference"] is None
    assert mixup["last_top1"]["mean"] == 72 and mixup["last_train_top1"]["mean"] == 84
    assert cutmix["occlusion"] == {"shares": [0.0, 0.1, 0.3], "random": [[60, 50, 40]], "evidence": [[60, 40, 20]]}
    assert list(long["mixers"]) == ["Mixup"] and long["mixers"]["Mixup"]["difference"] is None


def test_the_interval_over_images_averages_over_seeds_first(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, runs=[{"label_fraction": 1, "epochs": 10, "seeds": [0, 1], "mixers": ["none", "Mixup"]}])
    # Right are, of none and of Mixup: seed 0 images 1, 2, 3 and 0, 1, 2; seed 1 images 2, 3 and 0, 1, 2, 3.
    wrong = {("none", 0): [0], ("Mixup", 0): [3], ("none", 1): [0, 1], ("Mixup", 1): []}
    for spec in plan.specs:
        missed = wrong[spec.mixer, spec.seed]
        predicted = [1 - label if place in missed else label for place, label in enumerate(LABELS)]
        save(tmp_path / "results", spec, 100 - 25.0 * len(missed), predicted)
    (setting,) = summarise(plan, tmp_path / "results")["settings"]
    top1 = setting["mixers"]["Mixup"]["difference"]["top1"]
    # Of the images: 1, 0.5, 0 and -0.5, with the mean 0.25 and the standard deviation sqrt(1.25 / 3).
    half = 1.96 * (1.25 / 3) ** 0.5 / 2
    assert top1["mean"] == 25
    assert top1["image_interval"] == pytest.approx([100 * (0.25 - half), 100 * (0.25 + half)], abs=1e-3)


def test_runs_on_other_test_images_are_not_compared(tmp_path: Path) -> None:
    plan = made_up(tmp_path)
    path = tmp_path / "results" / f"{plan.specs[1].name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_labels": [1, 1, 1, 0]}))
    with pytest.raises(ValueError, match="mixup-s0 and small-50pct-10ep-none-s0 were tested on different images"):
        summarise(plan, tmp_path / "results")


def test_the_page_counts_and_shows_what_the_figures_are(tmp_path: Path) -> None:
    text = page(summarise(made_up(tmp_path), tmp_path / "results"))
    assert "8 of 12 planned runs are finished; they took 8 minutes" in text
    # The mean of 80, 82 and 84, and no figure of the setting without `none`.
    assert "Top-1 on the training images at the end of training with none: 82.0 % on small. " in text
    assert "crops shifted by 1 pixels at most and flips, AdamW with a learning rate of 0.001, batches of 2" in text
    assert "Top-1 is higher with a mixer than with none in 1 of 2 comparisons" in text
    assert (
        "the best of them is Mixup on small, 50 % of the labels, 10 epochs: +2.0 points with 3 seeds, [-2.3, +6.3]"
        in text
    )
    assert "two seeds or more: 1; their 95 % interval over seeds is above zero in 0 and below zero in 0" in text
    assert "Mixup +2.0 (+2.0 to +2.0, 1); CutMix -12.0 (-12.0 to -12.0, 1)" in text
    assert "calibration error is lower than with none in 2 of 2 comparisons, NLL is lower in 0" in text
    # 20 less than top-1: of Mixup 54 against 52 (three seeds each), of CutMix 40 against none's 52.
    assert "blanked at random, top-1 is higher with a mixer than with none in 1 of 2 comparisons" in text
    assert "that of Mixup on small, 50 % of the labels, 10 epochs: 54.0 against 52.0 %." in text
    assert "| Mixup | 3 of 3 | 74.0 [67.4, 80.6] | 73.0 [66.4, 79.6] | 0.500 [0.500, 0.500] | 4.0 [4.0, 4.0] |" in text
    assert "| CutMix | 1 of 3 | 60.0 | 59.0 | 0.500 | 4.0 | 58.0 | 0.500 | 70.0 | 1.0 |" in text
    assert "| CutMix | 1 | -12.0 |" in text
    assert (
        "| small, 50 % of the labels, 10 epochs | Mixup | 3 | 74.0 | 54.0 (51.0 to 56.0) | 34.0 (31.0 to 36.0) |"
        in text
    )


def test_a_page_without_comparisons_claims_nothing(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    with pytest.raises(ValueError, match="has no finished run of"):
        write_report(plan, tmp_path / "results", tmp_path / "out")
    save(tmp_path / "results", plan.specs[0], 70.0)
    write_report(plan, tmp_path / "results", tmp_path / "out")
    assert "* No mixer can be compared with none yet." in (tmp_path / "out" / "study.md").read_text()


def test_page_and_plots_are_remade_without_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_up(tmp_path)
    given = ["--plan", str(tmp_path / "plan.json"), "--results", str(tmp_path / "results")]
    first, second, figures = tmp_path / "first", tmp_path / "second", tmp_path / "figures" / "study.json"
    assert main([*given, "--report", str(first), "--summary", str(figures)]) == 0
    shutil.rmtree(tmp_path / "results")
    assert main(["--from-summary", str(figures), "--report", str(second)]) == 0
    for name in ("study.md", "study.png", "study-curves.png", "study-occlusion.png"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert str(tmp_path) not in (first / "study.md").read_text() + figures.read_text()
    figures.write_text('{"kind": "cpu"}')
    assert main(["--from-summary", str(figures), "--report", str(second)]) == 2
    assert "must be a study.json that --report wrote" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--from-summary", str(figures)])
    assert "--from-summary needs --report DIR" in capsys.readouterr().err


def test_the_committed_page_follows_from_the_committed_figures() -> None:
    summary = load_summary(ROOT / "bench/results/study.json")
    assert (ROOT / "docs/study.md").read_text() == page(summary) + "\n", "run `python -m bench.study --from-summary`"
