"""What the processes do that the tests start: train, and write down what TokenMix was given and gave."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_hook

from tokenmix_kernels import TokenMix, tokenmix
from train import loop
from train.config import parse
from train.loop import train
from train.run import Progress, Run, save_checkpoint


def train_quietly(arguments: list[str]) -> None:
    train(parse(arguments))


def train_and_stop(arguments: list[str]) -> None:
    """Train until the first checkpoint, and end there without a word, as if killed."""

    def save_and_stop(run: Run, progress: Progress) -> None:
        save_checkpoint(run, progress)
        while run.rank and not (Path(run.args.output) / "last.pt").is_file():  # the first one still reads from here
            time.sleep(0.01)
        os._exit(0)

    loop.save_checkpoint = save_and_stop
    train(parse(arguments))


def train_and_record(arguments: list[str]) -> None:
    """Train, and write OUTPUT/calls-RANK.pt."""
    calls: list[dict[str, Any]] = []

    def record(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, TokenMix):
            calls.append({"images": inputs[0].clone(), "mixed": output[0].clone()})

    register_module_forward_hook(record)
    args = parse(arguments)
    train(args)
    torch.save(calls, Path(args.output) / f"calls-{os.environ['RANK']}.pt")


def record_masks(arguments: list[str]) -> None:
    """Draw a rank's masks without and with an offset, and write FOLDER/RANK.pt."""
    dist.init_process_group("gloo")
    images, labels = torch.zeros(4, 1, 32, 48), torch.arange(4)
    options: dict[str, Any] = {"num_classes": 4, "patch_size": 8, "mode": "elem", "seed": 7}
    torch.manual_seed(0)
    drawn = tokenmix(images, labels, **{**options, "seed": None}).mask
    given = tokenmix(images, labels, **options).mask
    same = tokenmix(images, labels, sample_offset=0, **options).mask
    torch.save({"drawn": drawn, "given": given, "same": same}, Path(arguments[0]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
