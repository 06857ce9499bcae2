"""Batches, and the random state in which a sample is made."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    """A training batch; a single sample has the same fields without B.

    Attributes:
        images: [B, 3, S, S] uint8, the augmented crops.
        labels: [B] int64.
        boxes: [B, 4] float32, the crop's (x0, y0, x1, y1) in the source image, relative, before any flip.
        flips: [B] bool, the crop was flipped from left to right.
        affines: [B, 2, 3] float32, from relative output to relative source positions, warps included.
        ids: [B] int64, places of the images in the data set.
        positions: [B] int64, places of the samples in the epoch, over all processes.
    """

    images: Any
    labels: Any
    boxes: Any
    flips: Any
    affines: Any
    ids: Any
    positions: Any


def to_device(batch: Batch, device: torch.device, channels_last: bool = False) -> Batch:
    """The batch on the device, without waiting for it."""
    moved = Batch(*(field.to(device, non_blocking=True) for field in batch))
    return moved._replace(images=moved.images.contiguous(memory_format=torch.channels_last)) if channels_last else moved


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within, all three generators that transforms draw from start from the key; after, they are as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: it also prepares the seeds of devices that no transform draws from, in half a millisecond.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
