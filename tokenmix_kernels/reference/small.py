"""Small images on a CPU, mixed by NumPy: there calls are the cost, and NumPy's cost less than PyTorch's.

The steps are those of `pixels.py`, and so are the results, bit for bit.
"""

from itertools import groupby
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..settings import COPY, MASK_RULES, MIXUP, Settings
from .draw import Draw
from .lines import AT_ONCE, is_large, parts

__all__ = ["fits", "mix_small"]

BLENDED = (torch.float32, torch.float64)
# Types by the bytes of a word, to copy whole words whatever they hold.
WORDS = {1: "u1", 2: "u2", 4: "u4", 8: "u8", 16: "c16"}


def fits(images: Tensor, out: Tensor, kinds: list[int], settings: Settings) -> bool:
    """Whether `mix_small` can mix these, and other threads could not do it faster."""
    return (
        images.is_cpu
        and not is_large(images)
        and (images.numel() <= AT_ONCE or torch.get_num_threads() == 1)
        and images.dtype == out.dtype
        and not settings.mean
        and (images.dtype in BLENDED or MIXUP not in kinds)
        and (in_planes(images, out) or in_pixels(images, out))
    )


def in_planes(images: Tensor, out: Tensor) -> bool:
    return images.is_contiguous() and out.is_contiguous()


def in_pixels(images: Tensor, out: Tensor) -> bool:
    last = torch.channels_last
    return images.is_contiguous(memory_format=last) and out.is_contiguous(memory_format=last)


def as_lines(images: Tensor, planes: bool) -> NDArray[Any]:
    """The memory of images as [B, C, H, W], or as [B, 1, H, W * C] where they lie pixel by pixel."""
    if images.requires_grad:
        images = images.detach()
    if images.dtype == torch.bfloat16:  # NumPy has none
        images = images.view(torch.int16)
    if planes:
        return images.numpy()
    batch, channels, height, width = images.shape
    return images.permute(0, 2, 3, 1).numpy().reshape(batch, 1, height, width * channels)


def rows_of(pairs: list[int]) -> slice | list[int]:
    """These rows; as a slice where they count down, so that nothing is gathered."""
    last, end = pairs[0], pairs[0] - len(pairs)
    return slice(last, end if end >= 0 else None, -1) if pairs == list(range(last, end, -1)) else pairs


def mix_small(images: Tensor, out: Tensor, pairs: list[int], kinds: list[int], drawn: Draw, settings: Settings) -> None:
    """`mix_pixels` for images that `fits`."""
    planes = in_planes(images, out)
    own, mixed = as_lines(images, planes), as_lines(out, planes)
    rule, patch, channels = MASK_RULES[settings.mask_type], settings.patch_size, 1 if planes else images.shape[1]
    one_mask = settings.mode == "batch" and rule.drawn
    taken: NDArray[np.bool_] | None = None
    spare: NDArray[Any] | None = None
    for first, last in parts(kinds, pairs, images.numel() // images.shape[0]):
        kind, some, others = kinds[first], slice(first, last), rows_of(pairs[first:last])
        if kind == MIXUP:
            lams = drawn.lam[some]
            number = own.dtype.type
            lam: Any = number(lams[0]) * number(2.0**-16)
            if len(set(lams)) > 1:
                lam = (np.array(lams, own.dtype) * number(2.0**-16)).reshape(-1, 1, 1, 1)
            if spare is None or len(spare) != last - first:
                spare = np.empty_like(own[some])
            with np.errstate(invalid="ignore", over="ignore"):  # PyTorch does not warn of what is not finite
                np.multiply(own[some], lam, out=mixed[some])
                np.multiply(own[others], 1 - lam, out=spare)
                np.add(mixed[some], spare, out=mixed[some])
            continue
        mixed[some] = own[some]
        if kind == COPY:
            continue
        if not rule.whole_tokens:
            for (top, bottom, left, right), same in groupby(range(first, last), drawn.rectangle.__getitem__):
                members = list(same)
                these, rows = slice(members[0], members[-1] + 1), rows_of(pairs[members[0] : members[-1] + 1])
                box = (slice(None), slice(top, bottom), slice(left * channels, right * channels))
                mixed[(these, *box)] = own[(slice(None), *box)][rows]
            continue
        run = patch * channels * own.itemsize
        word = gcd(run, 16, images.data_ptr(), out.data_ptr())
        if taken is None or not one_mask:
            mask = drawn.mask.numpy()[first : first + 1 if one_mask else last]
            taken = mask.repeat(run // word, 2).repeat(patch, 1)[:, None]
        words = [one.view(WORDS[word]) for one in (own, mixed)]
        np.copyto(words[1][some], words[0][others], where=taken)
