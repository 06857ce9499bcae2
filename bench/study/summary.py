"""The figures of a study: means, intervals and paired differences of its finished runs."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenmix_kernels.extras import require
from train import files

from .plan import Plan, Spec
from .result import compact, rounded
from .runner import finished
from .worker import SHOWN

__all__ = ["MEASURES", "interval", "load_summary", "save_summary", "summarise"]

KIND = "study"
LOSSES = {True: "binary cross-entropy", False: "cross-entropy"}


class Measure(NamedTuple):
    """One column of the tables.

    Attributes:
        title: heading of the column.
        better: 1 if more is better, -1 if less is.
        digits: shown after the point.
        part: of a run's result, "selected" or "last" weights.
        key: in that part.
    """

    title: str
    better: int
    digits: int
    part: str
    key: str


MEASURES = {
    "top1": Measure("top-1, %", 1, 1, "selected", "top1"),
    "balanced": Measure("balanced, %", 1, 1, "selected", "balanced"),
    "nll": Measure("NLL, nats", -1, 3, "selected", "nll"),
    "ece": Measure("ECE, %", -1, 1, "selected", "ece"),
    "last_top1": Measure("last: top-1, %", 1, 1, "last", "top1"),
    "last_nll": Measure("last: NLL, nats", -1, 3, "last", "nll"),
    "last_train_top1": Measure("last: training top-1, %", 1, 1, "last", "train_top1"),
}


def interval(values: Sequence[float]) -> list[float] | None:
    """Two-sided 95 % confidence interval of the mean of `values`, by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    quantile = require("scipy.stats", extra="test").t.ppf(0.975, len(values) - 1)
    half = float(quantile) * statistics.stdev(values) / math.sqrt(len(values))
    return [statistics.mean(values) - half, statistics.mean(values) + half]


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """`values`, one per seed, with their `mean` and its `interval`."""
    return {"mean": statistics.mean(values), "interval": interval(values), "values": list(values)}


def over_images(run: dict[str, Any], other: dict[str, Any]) -> list[int]:
    """[N], for each test image 1 if only `run` has it right, -1 if only `other` has, else 0."""
    if run["test_labels"] != other["test_labels"]:
        raise ValueError(
            f"the runs {spec_name(run)} and {spec_name(other)} were tested on different images: move one of them away"
        )
    labels, first, second = run["test_labels"], run["selected"]["predicted"], other["selected"]["predicted"]
    return [(p == label) - (q == label) for p, q, label in zip(first, second, labels, strict=True)]


def spec_name(run: dict[str, Any]) -> str:
    """Name of the run that a result is of."""
    return Spec(run["mixer"], run["task"], run["label_fraction"], run["epochs"], run["seed"], ()).name


def image_interval(runs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> list[float]:
    """95 % interval of the mean difference in top-1 over the test images, in points, with the trained models fixed.

    Args:
        runs: pairs of results of the same seed; the difference of an image is averaged over them.
    """
    columns = zip(*(over_images(run, other) for run, other in runs), strict=True)
    differences = [statistics.mean(column) for column in columns]  # [N]
    mean = statistics.mean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return [100 * (mean - half), 100 * (mean + half)]


def compare(runs: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """Differences run minus baseline over the seeds that both have; None if there is none."""
    seeds = [seed for seed in runs if seed in baseline]
    if not seeds:
        return None
    found: dict[str, Any] = {"seeds": seeds}
    for name, measure in MEASURES.items():
        found[name] = estimate([read(runs[seed], measure) - read(baseline[seed], measure) for seed in seeds])
    found["top1"]["image_interval"] = image_interval([(runs[seed], baseline[seed]) for seed in seeds])
    return found


def read(run: dict[str, Any], measure: Measure) -> float:
    """The value of a measure in a run's result."""
    return float(run[measure.part][measure.key])


def curves(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Occlusion curves: shares of blanked tokens, from none on, and for each order top-1 [seeds][shares]."""
    return {
        "shares": [0.0, *runs[0]["occluded"]],
        **{
            order: [[run["selected"]["top1"], *run["occlusion"][order]] for run in runs]
            for order in ("random", "evidence")
            if order in runs[0]["occlusion"]
        },
    }


def summarise(plan: Plan, results: Path) -> dict[str, Any]:
    """The figures of all runs that are finished.

    Args:
        plan: of the study; its first mixer is what the others are compared with.
        results: folder of the run files; runs that are not there yet are left out and counted.

    Raises:
        ValueError: no run is finished, or a file is not a result of this plan.
    """
    done = finished(plan, results)
    if not done:
        raise ValueError(f"--results {results} has no finished run of {plan.path} yet: run the study first")
    baseline, tasks = plan.mixers[0], list(dict.fromkeys(spec.task for spec in plan.specs))
    settings = []
    for key in dict.fromkeys(spec.setting for spec in plan.specs):
        mine = [spec for spec in plan.specs if spec.setting == key]
        runs = {
            mixer: {spec.seed: done[spec.name] for spec in mine if spec.mixer == mixer and spec.name in done}
            for mixer in plan.mixers
        }
        if any(runs.values()):
            planned = {mixer: sum(spec.mixer == mixer for spec in mine) for mixer in plan.mixers}
            settings.append(one_setting(key, runs, baseline, planned))
    path = plan.path.resolve()
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else Path(path.name)
    summary = {
        "kind": KIND,
        "command": f"python -m bench.study --plan {shown}",
        "versions": {name: sorted({run[name] for run in done.values()}) for name in ("torch", "timm", "cpu")},
        "loss": sorted({LOSSES[run["args"]["bce_loss"]] for run in done.values()}),
        "tasks": {
            task: about(next(run for run in done.values() if run["task"] == task))
            for task in dict.fromkeys(spec.task for spec in plan.specs if spec.name in done)
        },
        "runs": {"planned": len(plan.specs), "finished": len(done)},
        "seconds": round(sum(run["seconds"] for run in done.values())),
        "baseline": baseline,
        "mixers": list(plan.mixers),
        "settings": sorted(
            settings, key=lambda setting: (tasks.index(setting["task"]), setting["label_fraction"], setting["epochs"])
        ),
    }
    whole: dict[str, Any] = rounded(summary)
    return whole


def about(run: dict[str, Any]) -> dict[str, Any]:
    """What all runs of a task share."""
    labels = run["test_labels"]
    return {
        **{key: run["args"][key] for key in SHOWN if key not in ("bce_loss", "smoothing")},
        "images": {key: run["images"][key] for key in ("held_out", "test")},
        "classes": run["classes"],
        "largest_class": 100 * max(Counter(labels).values()) / len(labels),
    }


def one_setting(
    key: tuple[str, float, int], runs: dict[str, dict[int, dict[str, Any]]], baseline: str, planned: dict[str, int]
) -> dict[str, Any]:
    """The figures of the runs that differ only in mixer and seed."""
    task, label_fraction, epochs = key
    mixers = {}
    for mixer, by_seed in runs.items():
        if not by_seed:
            continue
        mine = list(by_seed.values())
        mixers[mixer] = {
            "seeds": list(by_seed),
            "planned": planned[mixer],
            **{name: estimate([read(run, measure) for run in mine]) for name, measure in MEASURES.items()},
            "held_out_top1": [run["selected_held_out_top1"] for run in mine],
            "history": [run["history"] for run in mine],
            "selected_epoch": [run["selected_epoch"] for run in mine],
            "seconds": [run["seconds"] for run in mine],
            "occlusion": curves(mine),
            "difference": None if mixer == baseline else compare(by_seed, runs[baseline]),
        }
    return {
        "task": task,
        "label_fraction": label_fraction,
        "epochs": epochs,
        "updates": next(run["updates"] for by_seed in runs.values() for run in by_seed.values()),
        "train_images": next(run["images"]["train"] for by_seed in runs.values() for run in by_seed.values()),
        "mixers": mixers,
    }


def save_summary(summary: dict[str, Any], path: Path) -> None:
    """Write a summary, atomically."""
    files.write_lines([compact(summary)], path)


def load_summary(path: Path) -> dict[str, Any]:
    """Read a summary that `save_summary` wrote.

    Raises:
        ValueError: the file is missing or is not a summary of a study.
    """
    if not path.is_file():
        raise ValueError(f"--from-summary: no file {path}")
    try:
        summary = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--from-summary {path} is not JSON: {error}") from error
    if not isinstance(summary, dict) or summary.get("kind") != KIND or "settings" not in summary:
        raise ValueError(f"--from-summary {path} must be a study.json that --report wrote")
    return summary
