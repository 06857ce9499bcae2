"""DeiT's training transform, which also tells what it did to the geometry of each image.

The images are those of timm's `create_transform` for the same arguments and random state, bit for bit (but posterize
keeps at least one bit). Beside them comes where every output position is in the source image, so that an activation map
of the source can be sampled at the right positions instead of being warped along.

Coordinates are continuous and relative: (0, 0) is the upper left corner of the upper left pixel, (1, 1) the lower right
corner of the lower right one, x runs to the right, y downwards.

Images are converted by `photos.to_rgb`: greyscale of 16 bits and floating point is scaled, and EXIF orientation is
ignored, as ImageFolder ignores it. Default dtype, default device and autocast of the process have no influence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arguments import as_count, as_number, as_numbers
from .extras import require
from .photos import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EvalTransform", "Geometry", "TrackedTransform", "tracked_transform"]

# Two rows of a 3x3 matrix that maps output to input coordinates: x' = a x + b y + c, y' = d x + e y + f.
Affine = tuple[float, float, float, float, float, float]
IDENTITY: Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Geometry(NamedTuple):
    """What was done to one image; `torch.utils.data.default_collate` makes batches of it.

    Attributes:
        box: [4] float32 (x0, y0, x1, y1), the crop relative to the source image, before the flip.
        flip: [] bool, mirrored left to right.
        affine: [2, 3] float32, takes an output position (x, y, 1) in [0, 1]^2 to its position in the source image in
            [0, 1]^2: crop, flip, rotation, shear and translation together. What is outside the crop, or was pushed out
            of the frame by an earlier operation, shows the fill colour.
    """

    box: Tensor
    flip: Tensor
    affine: Tensor


def compose(outer: Affine, inner: Affine) -> Affine:
    """The map that applies `inner` to a position, then `outer`."""
    a, b, c, d, e, f = outer
    p, q, r, s, t, u = inner
    return (
        a * p + b * s, a * q + b * t, a * r + b * u + c,
        d * p + e * s, d * q + e * t, d * r + e * u + f,
    )  # fmt: skip


def rotation(size: tuple[int, int], degrees: float) -> Affine:
    """Where `PIL.Image.rotate` takes an output position from: a turn about the centre, in pixels."""
    width, height = size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # In pixels x' = cos x - sin y, y' = sin x + cos y about the centre; relative units scale the mixed terms.
    b, d = -sin * height / width, sin * width / height
    return cos, b, 0.5 * (1 - cos - b), d, cos, 0.5 * (1 - d - cos)


# How timm's geometric operations map relative output coordinates to relative input coordinates, given the
# image's (width, height) and the operation's argument.
GEOMETRIC: dict[str, Callable[[tuple[int, int], float], Affine]] = {
    "Rotate": rotation,
    "ShearX": lambda size, factor: (1.0, factor * size[1] / size[0], 0.0, 0.0, 1.0, 0.0),
    "ShearY": lambda size, factor: (1.0, 0.0, 0.0, factor * size[0] / size[1], 1.0, 0.0),
    "TranslateX": lambda size, pixels: (1.0, 0.0, pixels / size[0], 0.0, 1.0, 0.0),
    "TranslateY": lambda size, pixels: (1.0, 0.0, 0.0, 0.0, 1.0, pixels / size[1]),
    "TranslateXRel": lambda _size, share: (1.0, 0.0, share, 0.0, 1.0, 0.0),
    "TranslateYRel": lambda _size, share: (1.0, 0.0, 0.0, 0.0, 1.0, share),
}


class Recorder:
    """Takes the place of one of timm's geometric operations and notes what it was asked to do."""

    def __init__(self, name: str, function: Callable[..., Image], track: list[Affine]) -> None:
        self.name = name  # and not the function: lambdas cannot be pickled
        self.function = function
        self.track = track

    def __call__(self, image: Image, argument: float, **options: Any) -> Image:
        self.track.append(GEOMETRIC[self.name](image.size, argument))
        return self.function(image, argument, **options)


class AtLeastOneBit:
    """Takes the place of timm's posterize, whose 0 bits at full magnitude give black, or an error from Pillow 13."""

    def __init__(self, function: Callable[..., Image]) -> None:
        self.function = function

    def __call__(self, image: Image, bits: int, **options: Any) -> Image:
        return self.function(image, max(1, bits), **options)


class Jitter:
    """torchvision's ColorJitter, but its random numbers do not follow default dtype and device of the process."""

    def __init__(self, strengths: Sequence[float]) -> None:
        self.ranges = require("torchvision.transforms").ColorJitter(*strengths)

    def __call__(self, image: Image) -> Image:
        from torchvision.transforms import functional

        ranges = self.ranges
        order = torch.randperm(4, device="cpu").tolist()
        steps = [
            (adjust, None if span is None else draw_uniform(*span))
            for adjust, span in (
                (functional.adjust_brightness, ranges.brightness),
                (functional.adjust_contrast, ranges.contrast),
                (functional.adjust_saturation, ranges.saturation),
                (functional.adjust_hue, ranges.hue),
            )
        ]
        for adjust, factor in (steps[index] for index in order):
            if factor is not None:
                image = adjust(image, factor)
        return image


def draw_uniform(low: float, high: float) -> float:
    """A random number as torchvision draws it."""
    return float(torch.empty(1, dtype=torch.float32, device="cpu").uniform_(low, high))


def as_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from a side or a pair, in numbers of Python or NumPy."""
    sides = (size, size) if isinstance(size, Integral) else tuple(size)  # type: ignore[arg-type]
    if len(sides) != 2:
        raise ValueError(f"size must be a side or (height, width), got {size}")
    return as_count("size", sides[0], 1), as_count("size", sides[1], 1)


def as_range(name: str, values: Sequence[float], what: str) -> tuple[float, float]:
    """(smallest, largest) in numbers of Python or NumPy."""
    numbers = as_numbers(name, values)
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1]:
        raise ValueError(f"{name} must be the smallest and the largest {what}, both above 0, got {values}")
    return numbers[0], numbers[1]


def as_channels(name: str, values: Sequence[float]) -> tuple[float, ...]:
    """Three numbers, one for each channel."""
    numbers = as_numbers(name, values)
    if len(numbers) != 3:
        raise ValueError(f"{name} must be three numbers, got {values}")
    return numbers


def as_geometry(box: tuple[float, float, float, float], flip: bool, rest: Sequence[Affine]) -> Geometry:
    x0, y0, x1, y1 = box
    affine: Affine = (x1 - x0, 0.0, x0, 0.0, y1 - y0, y0)
    if flip:
        affine = compose(affine, (-1.0, 0.0, 1.0, 0.0, 1.0, 0.0))
    for step in rest:  # an output position goes back through the last operation first
        affine = compose(affine, step)
    # By way of NumPy: half the time of three tensors made from Python's numbers, once for every image.
    numbers = torch.from_numpy(np.array((*box, *affine), dtype=np.float32))
    return Geometry(numbers[:4], torch.from_numpy(np.array(flip)), numbers[4:].view(2, 3))


class TrackedTransform:
    """DeiT's training transform (arXiv 2012.12877, table 9) with its geometry tracked.

    Args:
        size: side of the output in pixels, or (height, width).
        scale, ratio: range of the crop's share of the area and of its aspect ratio.
        hflip: probability of the flip.
        auto_augment: a timm policy, ``'rand-...'``, ``'original'``, ``'v0'``, ``'3a'`` and their variants;
            None for none. ``'augmix'`` blends several warps and cannot be tracked.
        color_jitter: strength of brightness, contrast and saturation (three or, with hue, four numbers, or
            one for the three); only used without `auto_augment` or with ``'3a'``, as in timm and DeiT.
        geometric: keep the rotations, shears and translations of the policy, tracked in
            `Geometry.affine`. False leaves them out of the policy, so that box and flip are enough.
        interpolation: ``'bicubic'``, ``'bilinear'`` or ``'random'``.
        erasing: probability of random erasing (DeiT: 0.25). Maps do not show it: the evidence of erased pixels
            still counts.
        erasing_mode: ``'pixel'`` noise, ``'rand'`` one random colour, ``'const'`` the mean colour.
        mean, std: per channel in units of [0, 1]; the fill colour of warps and the colours of erasing.

    Calling it takes a PIL image to (uint8 [3, H, W], `Geometry`). It can be pickled and used in DataLoader workers.
    Random numbers come from `random`, `numpy.random` and `torch`, as in timm. Also named `tracked_transform`.

    Raises:
        ValueError: an argument out of range or a policy that cannot be tracked.
        ImportError: timm or torchvision is missing; the message says how to install them.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float | Sequence[float] | None = 0.3,
        geometric: bool = True,
        interpolation: str = "bicubic",
        erasing: float = 0.0,
        erasing_mode: str = "pixel",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        data = require("timm.data.transforms")
        require("torchvision.transforms.functional")
        self.size = as_size(size)
        self.hflip = as_number("hflip", hflip, 0, 1, "a probability")
        self.erasing = as_number("erasing", erasing, 0, 1, "a probability")
        mean, std = as_channels("mean", mean), as_channels("std", std)
        self.crop = data.RandomResizedCropAndInterpolation(
            self.size,
            scale=as_range("scale", scale, "share of the area"),
            ratio=as_range("ratio", ratio, "aspect ratio"),
            interpolation=interpolation,
        )
        self.track: list[Affine] = []
        self.steps: list[Callable[[Image], Image]] = []
        if auto_augment:
            self.steps.append(self.make_augment(auto_augment, geometric, interpolation, mean))
        if color_jitter is not None and (not auto_augment or "3a" in auto_augment):
            strengths = (color_jitter,) * 3 if isinstance(color_jitter, Real) else color_jitter
            strengths = as_numbers("color_jitter", strengths)
            if any(strengths):
                self.steps.append(Jitter(strengths))
        self.eraser: Any = None
        if self.erasing:
            eraser = require("timm.data.random_erasing").RandomErasing
            self.eraser = eraser(1.0, mode=erasing_mode, device="cpu")
        self.mean, self.std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").reshape(3, 1, 1) for values in (mean, std)
        )

    def make_augment(
        self, config: str, geometric: bool, interpolation: str, mean: Sequence[float]
    ) -> Callable[[Image], Image]:
        augment = require("timm.data.auto_augment")
        hparams: dict[str, Any] = {
            "translate_const": int(min(self.size) * 0.45),
            "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        }
        if interpolation != "random":
            hparams["interpolation"] = require("timm.data.transforms").str_to_pil_interp(interpolation)
        policy: Any
        if config.startswith("rand"):
            policy = augment.rand_augment_transform(config, hparams)
            if not geometric:
                kept = [op.name not in GEOMETRIC for op in policy.ops]
                policy.ops = [op for op, keep in zip(policy.ops, kept, strict=True) if keep]
                if policy.choice_weights is not None:
                    weights = policy.choice_weights[kept]
                    policy.choice_weights = weights / weights.sum()
            operations = policy.ops
        elif config.startswith("augmix"):
            raise ValueError(
                "auto_augment must be a RandAugment or AutoAugment policy, got 'augmix...': it blends several warps, "
                "and no single affine describes that"
            )
        else:
            policy = augment.auto_augment_transform(config, hparams)
            if not geometric:
                policy.policy = [
                    [op for op in steps if getattr(op, "name", None) not in GEOMETRIC] for steps in policy.policy
                ]
            operations = [op for steps in policy.policy for op in steps]
        for operation in operations:
            name = getattr(operation, "name", "")
            if name in GEOMETRIC:
                operation.aug_fn = Recorder(name, operation.aug_fn, self.track)
            elif name.startswith("Posterize"):
                operation.aug_fn = AtLeastOneBit(operation.aug_fn)
        return policy

    def __call__(self, image: Image) -> tuple[Tensor, Geometry]:
        """Transform one image.

        Args:
            image: PIL image of any mode, converted by `photos.to_rgb`.

        Returns:
            uint8 [3, H, W] and its `Geometry`.

        Raises:
            ValueError: the image's values have no known range, see `photos.to_rgb`.
        """
        image = to_rgb(image)
        source_w, source_h = image.size
        crop = self.crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        interpolation = crop.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        from torchvision.transforms import functional  # `require` in __init__ has it; its price is too high per image

        image = functional.resized_crop(image, top, left, height, width, self.size, interpolation)
        flip = self.hflip > 0 and float(torch.rand(1, dtype=torch.float32, device="cpu")) < self.hflip
        if flip:
            image = functional.hflip(image)
        self.track.clear()
        for step in self.steps:
            image = step(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self.eraser is not None and random.random() < self.erasing:
            self.erase(pixels)
        box = (
            left / source_w, top / source_h,
            (left + width) / source_w, (top + height) / source_h,
        )  # fmt: skip
        return pixels, as_geometry(box, flip, self.track)

    def erase(self, pixels: Tensor) -> None:
        # timm erases normalised images; the rectangle it fills is carried over to bytes.
        canvas = self.eraser(torch.full(pixels.shape, math.nan, dtype=torch.float32, device="cpu"))
        colour = ((canvas * self.std + self.mean) * 255).round_().clamp_(0, 255)
        erased = ~canvas.isnan()
        pixels[erased] = colour[erased].to(torch.uint8)


tracked_transform = TrackedTransform


class EvalTransform:
    """Resize, then centre crop, with its geometry.

    Args:
        size: side of the output in pixels, or (height, width).
        crop_pct: the output is this share of the resized image's shorter side (DeiT: 0.875).
        interpolation: ``'bicubic'`` or ``'bilinear'``.

    Raises:
        ValueError: an argument out of range.
        ImportError: torchvision is missing; the message says how to install it.
    """

    def __init__(self, size: int | Sequence[int], *, crop_pct: float = 0.875, interpolation: str = "bicubic") -> None:
        functional = require("torchvision.transforms.functional")
        self.size = as_size(size)
        self.crop_pct = as_number("crop_pct", crop_pct, 2**-20, 1, "in (0, 1]")
        self.interpolation = functional.InterpolationMode(interpolation)

    def __call__(self, image: Image) -> tuple[Tensor, Geometry]:
        """Transform one image: PIL image of any mode to uint8 [3, H, W] and its `Geometry`. Errors of `to_rgb`."""
        image = to_rgb(image)
        from torchvision.transforms import functional

        source_w, source_h = image.size
        height, width = self.size
        least_h, least_w = math.floor(height / self.crop_pct), math.floor(width / self.crop_pct)
        # The smallest size of the source's shape that covers (least_h, least_w), rounded as torchvision does.
        if least_h * source_w <= least_w * source_h:
            resized_h, resized_w = max(least_h, int(least_w * source_h / source_w)), least_w
        else:
            resized_h, resized_w = least_h, max(least_w, int(least_h * source_w / source_h))
        image = functional.resize(image, [resized_h, resized_w], self.interpolation)
        top, left = round((resized_h - height) / 2), round((resized_w - width) / 2)
        image = functional.crop(image, top, left, height, width)
        box = (left / resized_w, top / resized_h, (left + width) / resized_w, (top + height) / resized_h)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels, as_geometry(box, False, ())
