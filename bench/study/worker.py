"""One run of a study: train, select on the held-out training images, then measure on the test images once."""

import fcntl
import platform
import shutil
import string
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.optim import muon
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from tokenmix_kernels.transforms import EvalTransform
from train import checkpoint, files
from train.config import parse
from train.data import Data, Kept, load_data, restrict
from train.loop import train
from train.mixers import teacher_of
from train.model import make_mixer, make_model
from train.run import build
from train.teacher import make_teacher, whole_maps

from .measure import OCCLUDED, occlusion, scores
from .plan import Spec
from .result import compact, rounded

__all__ = ["BUSY", "run_one"]

BUSY = 75  # exit status: another process works on this run
EVALUATIONS = 10  # of a run on the held-out images
PROBED = 0.25  # of the training images, by the teacher whose maps say where the evidence of test images is
DIGITS = string.digits + string.ascii_lowercase
SHOWN = (
    *("data", "model", "model_kwargs", "input_size", "in_memory", "shift_crops", "hflip"),
    *("bce_loss", "smoothing", "opt", "lr", "batch_size"),
)


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


@contextmanager
def exact_muon() -> Iterator[None]:
    """Let timm's Muon orthogonalise in fp32 while inside.

    It takes bfloat16 and has no flag for it; a CPU that has to emulate bfloat16 is ten times slower with it.
    """
    original = muon.zeropower_via_newtonschulz
    muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
    try:
        yield
    finally:
        muon.zeropower_via_newtonschulz = original


def run_one(spec: Spec, results: Path, work: Path) -> int:
    """Do one run, or go on with it, and write its result `NAME.json`.

    Args:
        spec: of the run.
        results: folder of the results.
        work: folder of what only unfinished runs need, and of maps that several of them share.

    Returns:
        0, or BUSY if another process works on this run.
    """
    output, cache = work / spec.name, work / "cache"
    with locked(work / f"{spec.name}.lock", wait=False) as mine:
        if not mine:
            return BUSY
        args = parse(
            [
                *(*spec.flags, "--output", str(output), "--cache", str(cache), "--resume", "auto"),
                *("--eval-every", str(max(1, spec.epochs // EVALUATIONS)), "--save-epochs", str(spec.epochs)),
                *("--no-picture", "--device", "cpu", "--threads", "1", "--num-workers", "0"),
            ]
        )
        # Maps that several runs share are made by the first of them.
        with locked(cache / "teacher.lock", wait=True):
            build(args)
        with exact_muon():
            history = train(args)
        result = {
            "kind": "study-run",
            **{key: list(value) if key == "flags" else value for key, value in spec._asdict().items()},
            "args": {name: vars(args)[name] for name in SHOWN},
            "seconds": round(sum(record["seconds"] for record in history), 1),
            "updates": history[-1]["updates"],
            "torch": torch.__version__,
            "timm": timm.__version__,
            "cpu": platform.processor() or platform.machine(),
            **evaluate(args, cache),
            "history": curves(history),
        }
        files.write_lines([compact(rounded(result))], results / f"{spec.name}.json")
        shutil.rmtree(output)
    return 0


def curves(history: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What was measured at the evaluated epochs: counts of epochs, training loss, and accuracy on held-out images."""
    seen = [record for record in history if "val_top1" in record]
    names = {
        "train_loss": "train_loss",
        "held_out_top1": "val_top1",
        "held_out_loss": "val_loss",
        "held_out_top1_averaged": "ema_top1",
    }
    return {
        "epochs": [record["epoch"] + 1 for record in seen],
        **{name: [record[key] for record in seen] for name, key in names.items() if key in seen[0]},
    }


def evaluate(args: Namespace, cache: Path) -> dict[str, Any]:
    """Scores of the selected and of the last weights of a finished run.

    Selected is the epoch with the best accuracy on the held-out training images, of the raw weights or, where the run
    keeps them, of the averaged ones.
    """
    data = load_data(args)
    whole = load_data(Namespace(**{**vars(args), "holdout": 0.0, "label_fraction": 1.0}))
    model = make_model(args, len(data.classes)).eval()
    patch = make_mixer(args, data, model).settings.patch_size
    test, labels, boxes = pixels(args, data, whole.val)
    trained, trained_labels, _ = pixels(args, data, data.train)
    grid = args.input_size // patch
    evidence = token_evidence(args, whole, grid, boxes, cache) if teacher_of(args) else None

    def predict(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(part).float() for part in images.split(128)])

    best = checkpoint.load(Path(args.output) / "best.pt")
    record = best["record"]
    last = checkpoint.load(Path(args.output) / "last.pt")
    averaged = best["best_is"] == "ema"
    choices = {"selected": best["ema" if averaged else "model"], "last": last["ema"] or last["model"]}
    found: dict[str, Any] = {
        "classes": len(data.classes),
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
        del found[name]["confusion"]  # follows from what was predicted
        found[name]["predicted"] = digits(logits.argmax(1))
        on_training = scores(predict(trained), trained_labels)
        found[name]["train_top1"], found[name]["train_nll"] = on_training["top1"], on_training["nll"]
        if name == "selected":
            found["occlusion"] = occlusion(predict, test, labels, grid, evidence)
    found["test_labels"] = digits(labels)
    return found


def digits(classes: Tensor) -> str:
    """[N] classes below 36 as one character each, so that a result stays small."""
    return "".join(DIGITS[number] for number in classes.tolist())


def pixels(args: Namespace, data: Data, source: Dataset[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor, Tensor]:
    """All images of a split [N, 3, S, S], resized, cropped and normalised as for validation, labels [N], boxes [N, 4].

    A box is what of an image is shown, (x0, y0, x1, y1), relative to it.
    """
    transform = EvalTransform(args.input_size, crop_pct=args.eval_crop_ratio)
    if args.in_memory:
        source = Kept(source, args.in_memory)
    samples = [source[index] for index in range(len(source))]  # type: ignore[arg-type]
    shown = [transform(image) for image, _ in samples]
    images = data.normalise(torch.stack([image for image, _ in shown]))
    return images, torch.tensor([label for _, label in samples]), torch.stack([geometry.box for _, geometry in shown])


def token_evidence(args: Namespace, whole: Data, grid: int, boxes: Tensor, cache: Path) -> Tensor:
    """[N, grid, grid], evidence for the test images' own labels in their boxes [N, 4]: the same for all runs of a task.

    The maps are of a teacher whose probe was fitted on a quarter of all training images, and are kept in `cache`.
    """
    path = cache / f"test-maps-{whole.digest[:12]}.pt"
    with locked(cache / "teacher.lock", wait=True):
        if path.is_file():
            maps: Tensor = checkpoint.load(path)["maps"]
        else:
            device = torch.device("cpu")
            teacher = make_teacher(args, restrict(whole, 0.0, PROBED, 0), device)
            parts = whole_maps(teacher, whole.val, whole.val.targets, range(len(whole.val)), device, 0)
            maps = torch.cat([part.cpu() for _, part, _ in parts])
            checkpoint.save({"maps": maps}, path)
    side = maps.shape[-1]
    corners = side * boxes - 0.5
    number = torch.arange(len(maps))[:, None].float()
    return roi_align(maps[:, None], torch.cat([number, corners], 1), (grid, grid))[:, 0]
