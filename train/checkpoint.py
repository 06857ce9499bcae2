"""Checkpoints with a digest, and the random states that make a resumed run the same run."""

import argparse
import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from tokenmix_kernels.maps.weights import read_tensors

from .files import write_atomic

__all__ = ["best_is", "digest", "gather", "load", "plain_args", "rng_state", "save", "set_rng_state"]


def digest(value: Any) -> str:
    """SHA-256 of nested dicts, sequences, tensors and plain values, with types, names and shapes."""
    sha = hashlib.sha256()
    feed(sha, value)
    return sha.hexdigest()


def feed(sha: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        sha.update(f"dict {len(value)}\n".encode())
        for key, item in value.items():
            sha.update(f"{key!r}\n".encode())
            feed(sha, item)
    elif isinstance(value, (list, tuple)):
        sha.update(f"{type(value).__name__} {len(value)}\n".encode())
        for item in value:
            feed(sha, item)
    elif isinstance(value, Tensor):
        sha.update(f"{value.dtype} {list(value.shape)}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        sha.update(f"{type(value).__name__} {value!r}\n".encode())


def save(state: Mapping[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint with its digest, atomically; the one that was there is kept as `previous` if that is given."""
    content = dict(state)
    write_atomic(path, lambda file: torch.save(content | {"digest": digest(content)}, file), previous)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint that `save` wrote onto the CPU; only tensors and plain Python values are accepted.

    Raises:
        ValueError: no such file, not one that this trainer wrote, or a damaged one.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint {path}")
    state = read_tensors(path, "checkpoint")
    if not isinstance(state, dict) or "digest" not in state:
        raise ValueError(f"the checkpoint {path} cannot be read: it was not written by this trainer")
    found = state.pop("digest")
    if found != digest(state):
        raise ValueError(f"the checkpoint {path} is damaged: its content does not match its digest")
    return cast("dict[str, Any]", state)


def best_is(record: Mapping[str, Any], averaged: bool) -> str:
    """Which weights an epoch's record says are the better ones by top-1: "ema" (the averaged ones) or "model"."""
    return "ema" if averaged and record.get("ema_top1", -1.0) >= record.get("val_top1", 0.0) else "model"


def rng_state(device: torch.device) -> dict[str, Any]:
    """States of every generator that a training step could draw from, as tensors and plain values."""
    name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state())
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device.type).get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put the states of `rng_state` back."""
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if device.type in state:
        torch.get_device_module(device.type).set_rng_state(state[device.type], device)


def gather(value: Any) -> Sequence[Any]:
    """Collect the values of all processes, in order of rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def plain_args(args: argparse.Namespace) -> dict[str, Any]:
    """Make a dict of the arguments that a checkpoint or a JSON file can hold."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(args).items()}
