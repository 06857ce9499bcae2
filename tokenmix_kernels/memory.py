"""Memory for a mixed batch on the CPU.

A new block of memory costs more than what is written into it: the system hands it out page by page, each at its first
touch. `images.clone()` of a large batch spends most of its time so. Where Linux offers huge pages on request, one of
them takes the place of 512.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

__all__ = ["empty_images"]

HUGE = 2 << 20  # bytes of a huge page
# The C library keeps blocks up to this size and gives them out again, touched already; larger ones it maps anew.
KEPT = 32 << 20


def empty_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.empty_like(images, dtype=dtype)`, in huge pages where it is large and they are to be had.

    Args:
        images: of any shape, layout and device.
        dtype: of the result.

    Returns:
        Not initialised, with the strides of `torch.empty_like`. Large results on a CPU lie in memory of their own,
        which the system gets back with the last tensor on it; `resize_` cannot make them larger.
    """
    size = images.numel() * dtype.itemsize
    if images.device.type != "cpu" or size <= KEPT or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty_like(images, dtype=dtype)
    try:
        block = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # no memory, or a kernel without huge pages: torch says so, or does without
        return torch.empty_like(images, dtype=dtype)
    raw = torch.frombuffer(block, dtype=torch.uint8)
    first = -raw.data_ptr() % HUGE // dtype.itemsize
    like = torch.empty_like(images, dtype=dtype, device="meta")
    out = torch.empty(0, dtype=dtype, device="cpu")
    return out.set_(raw.untyped_storage(), first, like.shape, like.stride())
