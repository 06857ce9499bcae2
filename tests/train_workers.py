"""What the processes do that the tests start: train, and write down what TokenMix was given and gave."""

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules.module import register_module_forward_hook

from tokenmix_kernels import TokenMix, tokenmix
from train.config import parse
from train.loop import train


def train_quietly(arguments: list[str]) -> None:
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
