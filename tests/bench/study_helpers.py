"""A small plan of a study, and made-up results of its runs."""

import json
from pathlib import Path
from typing import Any

from bench.study.plan import Plan, Spec, load_plan

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
