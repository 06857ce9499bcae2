"""The study's figures: means, intervals and differences, and the page and plots made of them."""

import json
import shutil
from pathlib import Path

import pytest
from scipy import stats
from study_helpers import LABELS, made_up, make_plan, save

from bench.study.__main__ import main
from bench.study.report import page, write_report
from bench.study.summary import interval, load_summary, summarise

ROOT = Path(__file__).parents[2]


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
