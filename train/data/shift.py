"""Crops at whole pixels: weak augmentation that costs next to nothing."""

import argparse
import hashlib
import struct

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tokenmix_kernels.transforms import Geometry, as_geometry

__all__ = ["ShiftedCrop", "make_shifted_crop"]


class ShiftedCrop:
    """A crop of an image's pixels as they are, at a random place and flipped by chance, with its geometry.

    Args:
        size: side of the crop in pixels.
        hflip: probability of the flip.
    """

    def __init__(self, size: int, hflip: float) -> None:
        self.size = size
        self.hflip = hflip

    def __call__(self, image: Image.Image, *key: int) -> tuple[Tensor, Geometry]:
        """Crop one image.

        Args:
            image: RGB.
            key: place and flip follow from it, in every process and at any time.

        Returns:
            uint8 [3, S, S] and its `Geometry`.

        Raises:
            ValueError: the image is smaller than the crop.
        """
        width, height = image.size
        if min(width, height) < self.size:
            raise ValueError(
                f"--shift-crops needs images of at least --input-size {self.size} pixels a side, got {width}x{height}"
            )
        across, down, chance = struct.unpack("<3Q", hashlib.blake2b(repr(key).encode(), digest_size=24).digest())
        left, top = across % (width - self.size + 1), down % (height - self.size + 1)
        right, bottom = left + self.size, top + self.size
        image = image.crop((left, top, right, bottom))
        flip = chance < self.hflip * 2**64
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        box = left / width, top / height, right / width, bottom / height
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), as_geometry(box, flip, ())


def make_shifted_crop(args: argparse.Namespace) -> ShiftedCrop | None:
    """The crop of --shift-crops; None without it.

    Raises:
        ValueError: flags that it does not go with.
    """
    if not args.shift_crops:
        return None
    if args.in_memory is None or args.in_memory < args.input_size:
        raise ValueError(
            f"--shift-crops cuts from kept images: give --in-memory at least --input-size {args.input_size}"
        )
    for flag, off in (("aa", "none"), ("color_jitter", 0)):
        if getattr(args, flag) != off:
            raise ValueError(f"--shift-crops takes the place of --{flag.replace('_', '-')}: give {off} for it")
    return ShiftedCrop(args.input_size, args.hflip)
