"""Small synthetic data and small models for the trainer's tests."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tokenmix_kernels.maps import folder_digest
from tokenmix_kernels.maps.bank import MapBankWriter
from train import checkpoint

ROOT = Path(__file__).parents[1]
MODEL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 2}


def make_folder(root: Path, classes: int, train: int, val: int, size: tuple[int, int] = (40, 48)) -> Path:
    """train/ and val/ of noise images whose mean depends on the class."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                low = 200 * label // classes
                pixels = rng.integers(low, low + 56, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def make_bank(path: Path, dataset: Any, grid: tuple[int, int] = (5, 6)) -> Path:
    """A bank of random maps for an ImageFolder."""
    count = len(dataset)
    maps = torch.rand(count, *grid, generator=torch.Generator().manual_seed(0)) ** 4
    with MapBankWriter.create(
        path, count, grid, dataset.targets, torch.full((count, 2), 40), "random", folder_digest(dataset)
    ) as writer:
        writer.write(torch.arange(count), maps)
        writer.finish()
    return path


def tiny(folder: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a run that takes a second."""
    return [
        "--data", "imagefolder", "--data-path", str(folder), "--output", str(output), "--model-kwargs",
        json.dumps(MODEL), "--model", "deit_tiny_patch16_224", "--input-size", "32", "--batch-size", "8", "--epochs",
        "2", "--warmup-epochs", "1", "--minimum-tokens", "2", "--num-workers", "0", "--threads", "1", "--lr", "1e-3",
        "--unscale-lr", "--model-ema-warmup", "--device", "cpu", "--mixup-mode", "elem", "--no-picture", *more,
    ]  # fmt: skip


def start(arguments: Sequence[str], processes: int = 1, script: Path | None = None) -> subprocess.Popen[str]:
    """`python -m train ...` or its torchrun twin."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(script)] if script else ["-m", "train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], timeout: float = 100) -> str:
    """Output of a run that must succeed."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output


def launch(target: Callable[[list[str]], None], arguments: list[str], processes: int) -> list[BaseProcess]:
    """Call target(arguments) in processes joined as torchrun does, forked from a server that has imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.loop"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started: list[BaseProcess] = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        environment = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        started.append(context.Process(target=call_at, args=(environment, target, arguments)))
        started[-1].start()
    return started


def call_at(environment: dict[str, str], target: Callable[[list[str]], None], arguments: list[str]) -> None:
    os.environ.update(environment)
    # Loader workers as a run from a shell has them: those of a forkserver would outlive a rank that is killed.
    multiprocessing.set_start_method("fork", force=True)
    target(arguments)


def finish_all(processes: Sequence[BaseProcess], timeout: float = 100) -> None:
    """Wait for processes that must succeed."""
    for process in processes:
        process.join(timeout)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def records(output: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Bit-equal weights, averages, moments, random states and records."""
    assert records(one) == records(other)
    a, b = checkpoint.load(one / "last.pt"), checkpoint.load(other / "last.pt")
    for name in ("model", "ema"):
        assert a[name].keys() == b[name].keys()
        assert all(torch.equal(a[name][key], b[name][key]) for key in a[name]), name
    for index, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[key], b["optimizer"]["state"][index][key]) for key in state)
    assert a["scheduler"] == b["scheduler"]
    for ours, theirs in zip(a["rng"], b["rng"], strict=True):
        assert torch.equal(ours["torch"], theirs["torch"])
