"""One run of a study: train, select on the held-out training images, then measure on the test images once."""

import fcntl
import json
import platform
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from tokenmix_kernels.transforms import EvalTransform
from train import checkpoint, files
from train.config import parse
from train.data import Data, load_data
from train.loop import train
from train.model import make_mixer, make_model
from train.run import build
from train.teacher import make_teacher, whole_maps

from .measure import OCCLUDED, occlusion, scores
from .plan import Spec

__all__ = ["BUSY", "run_one"]

BUSY = 75  # exit status: another process works on this run
EVALUATIONS = 40  # of a run on the held-out images


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path` while inside; False if another process holds it and `wait` is False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def run_one(spec: Spec, results: Path) -> int:
    """Do one run, or go on with it, and write its result `NAME.json`.

    Args:
        spec: of the run.
        results: folder of the study.

    Returns:
        0, or BUSY if another process works on this run.
    """
    work = results / "work" / spec.name
    with locked(results / "work" / f"{spec.name}.lock", wait=False) as mine:
        if not mine:
            return BUSY
        args = parse(
            [
                *(*spec.flags, "--output", str(work), "--cache", str(results / "cache"), "--resume", "auto"),
                *("--eval-every", str(max(1, spec.epochs // EVALUATIONS)), "--no-picture", "--device", "cpu"),
                *("--threads", "1", "--num-workers", "0"),
            ]
        )
        begin = time.perf_counter()
        # Maps that several runs share are made by the first of them.
        with locked(results / "cache" / "teacher.lock", wait=True):
            build(args)
        history = train(args)
        seconds = time.perf_counter() - begin
        result = {
            "kind": "study-run",
            **{key: value for key, value in spec._asdict().items() if key != "flags"},
            "flags": list(spec.flags),
            "args": reproducible(args),
            "seconds": round(sum(record["seconds"] for record in history), 1),
            "seconds_of_last_start": round(seconds, 1),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "cpu": platform.processor() or platform.machine(),
            **evaluate(args, history, results / "cache"),
            "history": history,
        }
        files.write_lines([json.dumps(result)], results / f"{spec.name}.json")
        shutil.rmtree(work)
    return 0


def reproducible(args: Namespace) -> dict[str, Any]:
    """The arguments that decide a run's numbers."""
    paths = ("output", "cache", "resume", "device", "threads", "traceback", "tensorboard", "replay")
    arguments = checkpoint.plain_args(args).items()
    return {key: value for key, value in arguments if key not in paths and "wandb" not in key}


def evaluate(args: Namespace, history: list[dict[str, Any]], cache: Path) -> dict[str, Any]:
    """Scores of the selected and of the last weights of a finished run.

    Selected is the epoch with the best accuracy on the held-out training images, of the raw or the averaged weights.
    """
    data = load_data(args)
    whole = load_data(Namespace(**{**vars(args), "holdout": 0.0, "label_fraction": 1.0}))
    model = make_model(args, len(data.classes)).eval()
    patch = make_mixer(args, data, model).settings.patch_size
    test, labels = pixels(args, data, whole.val)
    trained, trained_labels = pixels(args, data, data.train)
    evidence = token_evidence(args, whole, args.input_size // patch, cache)

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(part).float() for part in images.split(128)])

    best = checkpoint.load(Path(args.output) / "best.pt")
    record = best["record"]
    averaged = record.get("ema_top1", -1.0) >= record["val_top1"]
    choices = {
        "selected": best["ema" if averaged else "model"],
        "last": checkpoint.load(Path(args.output) / "last.pt")["ema"],
    }
    found: dict[str, Any] = {
        "images": {"train": len(data.train), "held_out": len(data.val), "test": len(whole.val)},
        "selected_epoch": record["epoch"] + 1,
        "selected_weights": "averaged" if averaged else "raw",
        "selected_held_out_top1": record["ema_top1" if averaged else "val_top1"],
        "occluded": OCCLUDED,
    }
    for name, weights in choices.items():
        model.load_state_dict(weights)
        logits = predict(test)
        found[name] = scores(logits, labels)
        found[name]["predicted"] = logits.argmax(1).tolist()
        on_training = scores(predict(trained), trained_labels)
        found[name]["train_top1"], found[name]["train_nll"] = on_training["top1"], on_training["nll"]
        if name == "selected":
            found["occlusion"] = occlusion(predict, test, labels, evidence)
    found["test_labels"] = labels.tolist()
    return found


def pixels(args: Namespace, data: Data, source: Dataset[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor]:
    """All images of a split [N, 3, S, S], resized, cropped and normalised as for validation, and its labels [N]."""
    transform = EvalTransform(args.input_size, crop_pct=args.eval_crop_ratio)
    samples = [source[index] for index in range(len(source))]  # type: ignore[arg-type]
    images = torch.stack([transform(image)[0] for image, _ in samples])
    return data.normalise(images), torch.tensor([label for _, label in samples])


def token_evidence(args: Namespace, whole: Data, grid: int, cache: Path) -> Tensor:
    """[N, grid, grid], evidence of the test images' own labels: the same for all runs, whatever these were trained on.

    The maps are of a teacher whose probe was fitted on all training images, and are kept in `cache`.
    """
    path = cache / "test-maps.pt"
    with locked(cache / "teacher.lock", wait=True):
        if path.is_file():
            maps: Tensor = checkpoint.load(path)["maps"]
        else:
            device = torch.device("cpu")
            everything = Namespace(**{**vars(args), "holdout": 0.0, "label_fraction": 1.0})
            teacher = make_teacher(everything, whole, device)
            parts = whole_maps(teacher, whole.val, whole.val.targets, range(len(whole.val)), device, 0)
            maps = torch.cat([part.cpu() for _, part, _ in parts])
            checkpoint.save({"maps": maps}, path)
    side = maps.shape[-1]
    corners = torch.tensor([0.0, 0.0, side, side]).expand(len(maps), 4) - 0.5
    number = torch.arange(len(maps))[:, None].float()
    return roi_align(maps[:, None], torch.cat([number, corners], 1), (grid, grid))[:, 0]
