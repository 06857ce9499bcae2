"""Memory for a mixed batch on the CPU.

A new block of memory costs several times what is written into it: the system hands it out page by page, each at its
first touch. `images.clone()` of a large batch spends most of its time so. Blocks of results that have died are
therefore kept for the next results of their size, as the CUDA caching allocator does.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

__all__ = ["Pool", "empty_images", "release"]

LEAST = 1 << 19  # bytes of a result that is worth a block
MOST = 512 << 20  # bytes that are kept
EACH = 4  # blocks of one size that are kept
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
# Pages that are asked for together cost a fifth less than one by one (Linux).
TOGETHER = {"flags": PRIVATE["flags"] | mmap.MAP_POPULATE} if hasattr(mmap, "MAP_POPULATE") else PRIVATE


class Pool:
    """Blocks of memory whose tensors have died, kept for the next of their size.

    Threads may share it. A block comes back when its storage dies, so never while a tensor, a view, an array or a
    saved graph still shows it. The newest keeps its pages; those of the others are the system's to take when it runs
    short (Linux: MADV_FREE). A forked process starts with an empty pool.
    """

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        """Start anew in a child: another thread of the parent may have held the lock."""
        self.lock = threading.Lock()
        self.kept: list[mmap.mmap] = []  # the newest last
        self.returned: deque[mmap.mmap] = deque()  # not yet among them

    def take(self, size: int) -> Tensor:
        """Memory of `size` bytes, as uint8 [size], not initialised.

        Raises:
            OSError: the system has no memory left, even without what was kept.
        """
        with self.lock:
            same = [block for block in self.kept if len(block) == size]
            if same:
                self.kept.remove(same[-1])
        self.settle()
        block = same[-1] if same else self.map(size)
        # The tensor's storage holds the view until it dies itself, in whatever thread.
        view = memoryview(block)
        weakref.finalize(view, self.give, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def map(self, size: int) -> mmap.mmap:
        # Several threads touch pages faster, each its own.
        how = TOGETHER if torch.get_num_threads() == 1 else PRIVATE
        try:
            return mmap.mmap(-1, size, **how)
        except OSError:
            self.release()
            return mmap.mmap(-1, size, **how)

    def give(self, block: mmap.mmap) -> None:
        """Keep a block that no tensor shows any more."""
        self.returned.append(block)
        self.settle()

    def settle(self) -> None:
        """Put what came back among what is kept; beyond the bounds the oldest goes to the system.

        A block may come back while its own thread is in here, by a garbage collection: it then waits its turn.
        """
        while self.returned and self.lock.acquire(blocking=False):
            try:
                block = self.returned.popleft()
                if self.kept and hasattr(mmap, "MADV_FREE"):
                    self.kept[-1].madvise(mmap.MADV_FREE)
                same = [one for one in self.kept if len(one) == len(block)]
                if len(same) == EACH:
                    self.kept.remove(same[0])
                self.kept.append(block)
                while sum([len(one) for one in self.kept]) > MOST:
                    self.kept.pop(0)
            finally:
                self.lock.release()

    def release(self) -> None:
        """Give all that is kept to the system."""
        with self.lock:
            self.kept = []


POOL = Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=POOL.after_fork)


def release() -> None:
    """Give the memory of results that have died, which was kept for the next ones, to the system."""
    POOL.release()


def empty_images(images: Tensor, dtype: torch.dtype) -> Tensor:
    """`torch.empty_like(images, dtype=dtype)`, on a CPU in memory that was used before where it is large.

    Args:
        images: of any shape, layout and device.
        dtype: of the result.

    Returns:
        Not initialised, with the strides of `torch.empty_like`. `resize_` cannot make large results on a CPU larger.
    """
    size = images.numel() * dtype.itemsize
    if not images.is_cpu or not LEAST <= size <= MOST:
        return torch.empty_like(images, dtype=dtype)
    try:
        raw = POOL.take(size)
    except OSError:  # torch says so
        return torch.empty_like(images, dtype=dtype)
    like = torch.empty_like(images, dtype=dtype, device="meta")
    out = torch.empty(0, dtype=dtype, device="cpu")
    return out.set_(raw.untyped_storage(), 0, like.shape, like.stride())
