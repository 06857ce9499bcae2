"""How images lie in memory, and in what order the reference goes through them."""

from collections.abc import Iterator
from itertools import groupby
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .draw import Rectangle

__all__ = ["AT_ONCE", "Inside", "Lines", "is_large", "parts"]

AT_ONCE = 1 << 17  # values of the images that are mixed at a time, unless one image has more
WIDE = 8  # bytes of a word from which on a choice of words costs less than two copies
# Types by the bytes of a word, to copy whole words whatever they hold.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def is_large(images: Tensor) -> bool:
    """Whether the images are mixed one at a time."""
    return 2 * images.numel() > AT_ONCE * images.shape[0]


def parts(kinds: list[int], pairs: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Samples (first, last + 1) of one kind that are mixed at a time, for images of `size` values.

    Small images are taken several at a time. A large one is followed by its partner, which is in the cache by then.
    """
    if 2 * size > AT_ONCE:
        todo = dict.fromkeys(j for pair in enumerate(pairs) for j in pair)
        yield from ((i, i + 1) for i in todo)
        return
    step, first = AT_ONCE // size, 0
    for _, run in groupby(kinds):
        end = first + len(list(run))
        yield from ((start, min(start + step, end)) for start in range(first, end, step))
        first = end


class Inside(NamedTuple):
    """What a rectangle takes of a line: whole words, and values beside them.

    Attributes:
        words: [1, 1, H, *] bool, the words that are whole within it.
        beside: (first, last + 1) of the values of a line that are not in such a word, at most twice.
    """

    words: Tensor
    beside: list[tuple[int, int]]


class Lines:
    """How the lines of images lie in memory, so that whole words of them are copied.

    Attributes:
        planes: channels are apart, so that lines [H, W] are a view of each; False: a line holds all channels.
        word: bytes of a word, which lies within one token; 0 where the images have other strides.
    """

    def __init__(self, patch: int, *tensors: Tensor) -> None:
        first = tensors[0]
        self.patch, self.item, self.device = patch, first.element_size(), first.device
        self.planes = all(one.is_contiguous() for one in tensors)
        # Values of a pixel that lie side by side, and bytes of a token's line.
        self.channels = 1 if self.planes else first.shape[1]
        self.word, self.run = 0, patch * self.item * self.channels
        if self.planes or all(one.is_contiguous(memory_format=torch.channels_last) for one in tensors):
            places = [place for one in tensors for place in (one.data_ptr(), one.storage_offset() * self.item)]
            self.word = gcd(self.run, 16 if first.device.type == "cpu" else 8, *places)

    def of(self, images: Tensor, word: int) -> Tensor:
        """The images [n, C, H, W] as words of so many bytes, [n, C, H, *], or [n, 1, H, *] without planes."""
        # In one line first: axes of one element may have any strides.
        channels, height = (images.shape[1] if self.planes else 1), images.shape[2]
        line = (images if self.planes else images.permute(0, 2, 3, 1)).reshape(-1)
        return line.view(WORDS[word]).view(images.shape[0], channels, height, -1)

    def words(self, images: Tensor) -> Tensor:
        """`of` words that lie within a token."""
        return self.of(images, self.word)

    def values(self, images: Tensor) -> Tensor:
        """`of` words that are one value."""
        return self.of(images, self.item)

    def taken(self, mask: Tensor) -> Tensor:
        """A mask of tokens [n, Gh, Gw] on the CPU as one of words [n, 1, H, *] (of pixels, for other strides)."""
        run = self.run // self.word if self.word else self.patch
        each = mask.numpy().repeat(run, 2).repeat(self.patch, 1)
        return torch.from_numpy(each[:, None]).to(self.device)

    def inside(self, rectangle: Rectangle, height: int, width: int) -> Inside | None:
        """What a rectangle of pixels takes of images of `height` lines of `width` pixels; None: words are too small."""
        if self.word < WIDE:
            return None
        top, bottom, left, right = rectangle
        values = self.word // self.item
        start, end = left * self.channels, right * self.channels
        first, last = -(-start // values), end // values
        taken = np.zeros((1, 1, height, width * self.channels // values), np.bool_)
        taken[:, :, top:bottom, first:last] = True
        beside = [(start, end)] if last <= first else [(start, first * values), (last * values, end)]
        return Inside(torch.from_numpy(taken).to(self.device), [(a, b) for a, b in beside if a < b])

    def beside(self, inside: Inside, rectangle: Rectangle) -> list[tuple[slice, ...]]:
        """Where the values beside the words of a rectangle are in `values`."""
        every, rows = slice(None), slice(rectangle[0], rectangle[1])
        return [(every, every, rows, slice(*ends)) for ends in inside.beside]

    def select(self, mask: Tensor, own: Tensor, other: Tensor, out: Tensor) -> None:
        """out = mask ? other : own, for a mask of `taken`."""
        if self.word:
            same, own, out = other is out, self.words(own), self.words(out)
            other = out if same else self.words(other)
        torch.where(mask, other, own, out=out)
