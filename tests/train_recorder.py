"""Run the trainer and write down what TokenMix was given and gave, one file per process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook

from tokenmix_kernels import TokenMix
from train.__main__ import main

calls: list[dict[str, Any]] = []


def record(module: torch.nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(module, TokenMix):
        calls.append({"images": inputs[0].clone(), "mixed": output[0].clone()})


register_module_forward_hook(record)
folder, sys.argv[1:] = Path(sys.argv[1]), sys.argv[2:]
code = main()
torch.save(calls, folder / f"calls-{os.environ.get('RANK', 0)}.pt")
sys.exit(code)
