"""Checkpoints that are whole or absent, and the random states that make a resumed run the same run."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist


def write_atomic(path: Path, write: Any) -> None:
    """Call write(binary file) so that path holds the old content or all of the new, whatever happens.

    The new content goes to a file beside it, to the disk, and only then takes the name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def save(state: Mapping[str, Any], path: Path) -> None:
    """torch.save, atomically."""
    write_atomic(path, lambda file: torch.save(dict(state), file))


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Text lines, atomically."""
    write_atomic(path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))


def load(path: str | Path) -> dict[str, Any]:
    """A checkpoint onto the CPU; only tensors and plain Python values are accepted.

    Raises:
        ValueError: no such file, or not one that this trainer wrote.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of this trainer: {error}") from error
    return state


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of every generator that a training step could draw from, as tensors and plain values."""
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the states of `rng_state` back."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def gather(value: Any) -> Sequence[Any]:
    """The values of all processes, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def plain_args(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as a dict that a checkpoint or a JSON file can hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(args).items()}
