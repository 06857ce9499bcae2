"""One step: a batch is mixed with the masks of its step, and gives a loss."""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor

from .data import Batch
from .meters import StepTimer
from .run import Run

__all__ = ["forward", "mixing_seed", "seed_all", "set_mixing"]


def mixing_seed(seed: int, epoch: int, step: int) -> int:
    """The seed of one step's masks, the same on all ranks: they differ by their sample offset."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(seed: int) -> None:
    """Start every generator that a training step could draw from, but that of the masks, at a seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def set_mixing(run: Run, epoch: int) -> None:
    """Switch mixing on or off for an epoch, as --mixer and --mixup-off-epoch say."""
    off = run.args.mixup_off_epoch
    run.mix.mixup_enabled = run.args.mixer != "none" and not (off and epoch >= off)


def forward(run: Run, batch: Batch, seed: int, timer: StepTimer | None = None, rank: int | None = None) -> Tensor:
    """The loss of a batch that is on the mixing device, mixed with the masks of (seed, rank)."""
    offset = (run.rank if rank is None else rank) * run.args.batch_size
    images, targets, *mix = run.mix(batch.images, batch.labels, **run.evidence(batch), seed=seed, sample_offset=offset)
    images = images.to(run.device, non_blocking=True)
    if timer:
        timer.mark("mixing")
    with run.autocast():
        logits = run.net(images)
    if run.attention:
        if timer:
            timer.mark("forward")
        targets = run.attention.targets(logits, targets, mix[0])
        if timer:
            timer.mark("mixing")
    loss: Tensor = run.criterion(logits.float(), targets.to(run.device, non_blocking=True))
    if timer:
        timer.mark("forward")
    return loss
