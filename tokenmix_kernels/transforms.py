"""DeiT's training transform, which also tells what it did to the geometry of each image.

The images are those of timm's `create_transform` for the same arguments and random state, bit for bit
(but that posterize keeps at least one bit); beside them comes where every output position lies in the source
image, so that an activation map of the source can be sampled at the right places instead of being warped
along.

Coordinates are continuous and relative: (0, 0) is the upper left corner of the upper left pixel, (1, 1) the
lower right corner of the lower right one, x runs to the right, y downwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["EvalTransform", "Geometry", "TrackedTransform", "tracked_transform"]

# Two rows of a 3x3 matrix that maps output to input coordinates: x' = a x + b y + c, y' = d x + e y + f.
_Affine = tuple[float, float, float, float, float, float]
_IDENTITY: _Affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Geometry(NamedTuple):
    """What was done to one image; `torch.utils.data.default_collate` makes batches of it.

    Attributes:
        box: [4] float32 (x0, y0, x1, y1), the crop relative to the source image, before the flip.
        flip: [] bool, mirrored left to right.
        affine: [2, 3] float32, takes an output position (x, y, 1) in [0, 1]^2 to its place in the source
            image in [0, 1]^2: crop, flip, rotation, shear and translation together. What lies outside the
            crop, or was pushed out of the frame by an earlier operation, shows the fill colour.
    """

    box: Tensor
    flip: Tensor
    affine: Tensor


def _compose(outer: _Affine, inner: _Affine) -> _Affine:
    """The map that applies `inner` to a position, then `outer`."""
    a, b, c, d, e, f = outer
    p, q, r, s, t, u = inner
    return (
        a * p + b * s, a * q + b * t, a * r + b * u + c,
        d * p + e * s, d * q + e * t, d * r + e * u + f,
    )  # fmt: skip


def _rotation(size: tuple[int, int], degrees: float) -> _Affine:
    """Where `PIL.Image.rotate` takes an output position from: a turn about the centre, in pixels."""
    width, height = size
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # In pixels x' = cos x - sin y, y' = sin x + cos y about the centre; relative units scale the mixed terms.
    b, d = -sin * height / width, sin * width / height
    return cos, b, 0.5 * (1 - cos - b), d, cos, 0.5 * (1 - d - cos)


# How timm's geometric operations map relative output coordinates to relative input coordinates, given the
# image's (width, height) and the operation's argument.
_GEOMETRIC: dict[str, Callable[[tuple[int, int], float], _Affine]] = {
    "Rotate": _rotation,
    "ShearX": lambda size, factor: (1.0, factor * size[1] / size[0], 0.0, 0.0, 1.0, 0.0),
    "ShearY": lambda size, factor: (1.0, 0.0, 0.0, factor * size[0] / size[1], 1.0, 0.0),
    "TranslateX": lambda size, pixels: (1.0, 0.0, pixels / size[0], 0.0, 1.0, 0.0),
    "TranslateY": lambda size, pixels: (1.0, 0.0, 0.0, 0.0, 1.0, pixels / size[1]),
    "TranslateXRel": lambda _size, share: (1.0, 0.0, share, 0.0, 1.0, 0.0),
    "TranslateYRel": lambda _size, share: (1.0, 0.0, 0.0, 0.0, 1.0, share),
}


class _Recorder:
    """Stands for the function of one of timm's geometric operations and notes what it was asked to do."""

    def __init__(self, name: str, function: Callable[..., Image], track: list[_Affine]) -> None:
        self.name = name  # and not the function: lambdas cannot be pickled
        self.function = function
        self.track = track

    def __call__(self, image: Image, argument: float, **options: Any) -> Image:
        self.track.append(_GEOMETRIC[self.name](image.size, argument))
        return self.function(image, argument, **options)


class _AtLeastOneBit:
    """Stands for timm's posterize, whose 0 bits at full magnitude mean black, or an error from Pillow 13."""

    def __init__(self, function: Callable[..., Image]) -> None:
        self.function = function

    def __call__(self, image: Image, bits: int, **options: Any) -> Image:
        return self.function(image, max(1, bits), **options)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, not {size}")
    return height, width


def _as_geometry(box: tuple[float, float, float, float], flip: bool, rest: Sequence[_Affine]) -> Geometry:
    x0, y0, x1, y1 = box
    affine: _Affine = (x1 - x0, 0.0, x0, 0.0, y1 - y0, y0)
    if flip:
        affine = _compose(affine, (-1.0, 0.0, 1.0, 0.0, 1.0, 0.0))
    for step in rest:  # an output position goes back through the last operation first
        affine = _compose(affine, step)
    # By way of NumPy: half the time of three tensors made from Python's numbers, once for every image.
    numbers = torch.from_numpy(np.array((*box, *affine), dtype=np.float32))
    return Geometry(numbers[:4], torch.from_numpy(np.array(flip)), numbers[4:].view(2, 3))


class TrackedTransform:
    """Random crop, flip, RandAugment and colour jitter with the geometry tracked. See `tracked_transform`."""

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
        self.size = _pair(size)
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale must be (least, largest) share of the area, both above 0, not {scale}")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio must be (least, largest) aspect ratio, both above 0, not {ratio}")
        for name, value in (("hflip", hflip), ("erasing", erasing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be a probability, not {value}")
        self.hflip = hflip
        self._crop = data.RandomResizedCropAndInterpolation(
            self.size, scale=tuple(scale), ratio=tuple(ratio), interpolation=interpolation
        )
        self._track: list[_Affine] = []
        self._steps: list[Callable[[Image], Image]] = []
        if auto_augment:
            self._steps.append(self._make_augment(auto_augment, geometric, interpolation, mean))
        if color_jitter and (not auto_augment or "3a" in auto_augment):
            jitter = [color_jitter] * 3 if isinstance(color_jitter, (int, float)) else list(color_jitter)
            self._steps.append(require("torchvision.transforms").ColorJitter(*jitter))
        self._erasing = erasing
        self._eraser: Any = None
        if erasing:
            eraser = require("timm.data.random_erasing").RandomErasing
            self._eraser = eraser(1.0, mode=erasing_mode, device="cpu")
        self._mean = torch.tensor(list(mean)).reshape(3, 1, 1)
        self._std = torch.tensor(list(std)).reshape(3, 1, 1)

    def _make_augment(
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
                kept = [op.name not in _GEOMETRIC for op in policy.ops]
                policy.ops = [op for op, keep in zip(policy.ops, kept, strict=True) if keep]
                if policy.choice_weights is not None:
                    weights = policy.choice_weights[kept]
                    policy.choice_weights = weights / weights.sum()
            operations = policy.ops
        elif config.startswith("augmix"):
            raise ValueError(
                "auto_augment='augmix...' blends several warps of an image, no single affine describes that: "
                "use a RandAugment or AutoAugment policy"
            )
        else:
            policy = augment.auto_augment_transform(config, hparams)
            if not geometric:
                policy.policy = [
                    [op for op in steps if getattr(op, "name", None) not in _GEOMETRIC] for steps in policy.policy
                ]
            operations = [op for steps in policy.policy for op in steps]
        for operation in operations:
            name = getattr(operation, "name", "")
            if name in _GEOMETRIC:
                operation.aug_fn = _Recorder(name, operation.aug_fn, self._track)
            elif name.startswith("Posterize"):
                operation.aug_fn = _AtLeastOneBit(operation.aug_fn)
        return policy

    def __call__(self, image: Image) -> tuple[Tensor, Geometry]:
        """Transform one image.

        Args:
            image: PIL image of any mode; converted to RGB.

        Returns:
            uint8 [3, H, W] and its `Geometry`.
        """
        if image.mode != "RGB":
            image = image.convert("RGB")
        source_w, source_h = image.size
        crop = self._crop
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        interpolation = crop.interpolation
        if isinstance(interpolation, (tuple, list)):
            interpolation = random.choice(interpolation)
        from torchvision.transforms import functional  # there since __init__, and dear to ask for at every image

        image = functional.resized_crop(image, top, left, height, width, self.size, interpolation)
        flip = self.hflip > 0 and bool(torch.rand(1) < self.hflip)
        if flip:
            image = functional.hflip(image)
        self._track.clear()
        for step in self._steps:
            image = step(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        if self._eraser is not None and random.random() < self._erasing:
            self._erase(pixels)
        box = (
            left / source_w, top / source_h,
            (left + width) / source_w, (top + height) / source_h,
        )  # fmt: skip
        return pixels, _as_geometry(box, flip, self._track)

    def _erase(self, pixels: Tensor) -> None:
        # timm erases normalised images; the rectangle it fills is carried over to bytes.
        canvas = self._eraser(torch.full(pixels.shape, math.nan))
        colour = ((canvas * self._std + self._mean) * 255).round_().clamp_(0, 255)
        erased = ~canvas.isnan()
        pixels[erased] = colour[erased].to(torch.uint8)


def tracked_transform(
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
) -> TrackedTransform:
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
            `Geometry.affine`. False leaves them out of the policy, so that box and flip say all.
        interpolation: ``'bicubic'``, ``'bilinear'`` or ``'random'``.
        erasing: probability of random erasing (DeiT: 0.25). Maps do not know of it: the evidence of an
            erased place still counts.
        erasing_mode: ``'pixel'`` noise, ``'rand'`` one random colour, ``'const'`` the mean colour.
        mean, std: per channel in units of [0, 1]; the fill colour of warps and the colours of erasing.

    Returns:
        A callable, PIL image to (uint8 [3, H, W], `Geometry`), that can be pickled and used in DataLoader
        workers. Random numbers come from `random`, `numpy.random` and `torch`, as in timm.

    Raises:
        ValueError: an argument out of range or a policy that cannot be tracked.
        ImportError: timm or torchvision is missing; the message says how to install them.
    """
    return TrackedTransform(
        size,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        auto_augment=auto_augment,
        color_jitter=color_jitter,
        geometric=geometric,
        interpolation=interpolation,
        erasing=erasing,
        erasing_mode=erasing_mode,
        mean=mean,
        std=std,
    )


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
        self.size = _pair(size)
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct must lie in (0, 1], not {crop_pct}")
        self.crop_pct = crop_pct
        self.interpolation = functional.InterpolationMode(interpolation)

    def __call__(self, image: Image) -> tuple[Tensor, Geometry]:
        """Transform one image: PIL image of any mode to uint8 [3, H, W] and its `Geometry`."""
        if image.mode != "RGB":
            image = image.convert("RGB")
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
        return functional.pil_to_tensor(image), _as_geometry(box, False, ())
