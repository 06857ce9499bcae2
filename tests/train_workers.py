"""What the processes do that the tests start: train, and write down what TokenMix was given and gave."""

import os
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from tokenmix_kernels import TokenMix
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
