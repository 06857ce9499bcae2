"""What is timed: implementations by cases, each checked for right results before it is timed.

An implementation is made for one case by its builder: a function without arguments that mixes once, and a check that
says what is wrong with what it returns. One whose builder finds that it cannot serve the case is left out.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms import v2

from tokenmix_kernels import TopKMaps, tokenmix

__all__ = [
    "CASES",
    "IMPLEMENTATIONS",
    "Case",
    "Implementation",
    "Inputs",
    "Ready",
    "find_wrong",
    "make_inputs",
    "ready",
]

SEED = 7
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
# Largest error of targets and of blended pixels: sums of up to 324 map cells, one rounding of each dtype.
TARGET_TOLERANCE = 1e-5
PIXEL_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Case(NamedTuple):
    """A batch and the setting it is mixed under.

    Attributes:
        name: as tables show it.
        batch, channels, height, width: of the images.
        dtype: of the images.
        patch_size, num_classes: of the mix.
        map_size: side of the top-5 maps.
        channels_last: layout.
    """

    name: str
    batch: int = 128
    channels: int = 3
    height: int = 224
    width: int = 224
    dtype: torch.dtype = torch.float32
    patch_size: int = 16
    num_classes: int = 1000
    map_size: int = 18
    channels_last: bool = False


class Inputs(NamedTuple):
    """A batch on its device."""

    images: Tensor
    raw: Tensor
    labels: Tensor
    maps: TopKMaps
    boxes: Tensor


class Ready(NamedTuple):
    """One implementation for one case: what is timed, and what is wrong with a result ('' where nothing is).

    `reset` brings back what the call changes, before the result is checked.
    """

    call: Callable[[], Any]
    check: Callable[[Any], str]
    reset: Callable[[], None] | None = None


class Implementation(NamedTuple):
    """A name, a builder, what it is, whether a call makes a new output, and the one kind of device it is for, if so."""

    name: str
    build: Callable[[Case, Inputs], Ready]
    text: str
    makes_output: bool = True
    device: str = ""


CASES = {
    "cpu": Case("cpu"),
    "tiny": Case("tiny", batch=4, height=64, width=64, patch_size=8, num_classes=10, map_size=6),
    "gpu-fp16": Case("gpu-fp16", dtype=torch.float16),
    "gpu-fp32": Case("gpu-fp32"),
    "gpu-fp16-nhwc": Case("gpu-fp16-nhwc", dtype=torch.float16, channels_last=True),
}


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """The batch of a case: always the same one."""
    source = torch.Generator().manual_seed(0)
    shape = (case.batch, case.channels, case.height, case.width)
    images = torch.randn(shape, generator=source).to(case.dtype)
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=source)
    labels = torch.randint(0, case.num_classes, (case.batch,), generator=source)
    size = (case.batch, 5, case.map_size, case.map_size)
    indices = torch.randint(0, case.num_classes, size, generator=source)
    indices[:, 0] = labels[:, None, None]
    # Every class once at most in a cell: what a top-k is, and what a scatter needs to be well defined.
    for k in range(1, 5):
        indices[:, k] = (indices[:, 0] + k * max(1, case.num_classes // 7)) % case.num_classes
    values = torch.rand(size, generator=source)
    low = torch.rand(case.batch, 2, generator=source) * 0.5
    boxes = torch.cat([low, low + 0.3 + torch.rand(case.batch, 2, generator=source) * 0.2], 1)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    return Inputs(
        images.to(device, memory_format=layout), raw.to(device, memory_format=layout), labels.to(device),
        TopKMaps(values.to(device), indices.to(device)), boxes.to(device),
    )  # fmt: skip


def as_pixels(mask: Tensor, patch: int) -> Tensor:
    """Token masks [B, Gh, Gw] as pixels [B, 1, H, W]."""
    return mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]


def plain_weights(inputs: Inputs, mask: Tensor) -> Tensor:
    """Weights [B, 2] of eq. 5 and 6, by torchvision's roi_align on the map of the own label."""
    values, indices = inputs.maps
    own = (values.float() * (indices == inputs.labels[:, None, None, None])).sum(1)  # [B, h, w]
    size = torch.tensor([own.shape[2], own.shape[1]] * 2, dtype=torch.float32, device=own.device)
    rows = (inputs.boxes * size - 0.5).float()
    number = torch.arange(len(own), device=own.device, dtype=torch.float32)[:, None]
    pooled = roi_align(own[:, None], torch.cat([number, rows], 1), mask.shape[1:], aligned=False)[:, 0]
    shares = pooled / pooled.sum((1, 2), keepdim=True)
    taken = mask.float()
    return torch.stack([(shares * (1 - taken)).sum((1, 2)), (shares.flip(0) * taken).sum((1, 2))], 1)


def plain_targets(weights: Tensor, labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Eq. 7 with smoothed labels: w - eps / 2 + eps / (2 K) for each side, eps / (2 K) elsewhere, summed."""
    dense = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    pair = torch.stack([labels, labels.flip(0)], 1)
    return dense.scatter_add_(1, pair, weights - smoothing / 2)


def find_wrong(
    case: Case, inputs: Inputs, before: Tensor, images: Tensor, targets: Tensor, mask: Tensor, normalised: bool = False
) -> str:
    """What is wrong with the result of a TokenMix call, told by plain code that shares nothing with ours."""
    patch = case.patch_size
    count = mask[0].numel()
    wanted = min(count, count // 2 + 14)
    covered = mask.flatten(1).sum(1)
    # Ten tries in a row that do not fit end a mask early; never by much, and none is empty.
    if int(covered.max()) > wanted or int(covered.min()) < 1:
        return f"masks cover {int(covered.min())} to {int(covered.max())} tokens, not up to {wanted}"
    if case.batch > 2 and bool((mask == mask[0]).all()):
        return "all masks are equal, though each sample draws its own"
    expected = torch.where(as_pixels(mask, patch), before.flip(0), before)
    if normalised:
        mean, std = (torch.tensor(numbers, device=expected.device)[:, None, None] for numbers in (MEAN, STD))
        expected = (expected.float() - mean) / std
        if not torch.allclose(images.float(), expected, rtol=1e-5, atol=PIXEL_TOLERANCE[images.dtype]):
            return f"pixels are off by up to {(images.float() - expected).abs().max().item():.2g}"
    elif not torch.equal(images, expected):
        share = (images != expected).float().mean().item()
        return f"{share:.1%} of the pixels are not those of the own image or the partner's, as the mask says"
    weights = plain_weights(inputs, mask)
    error = (targets - plain_targets(weights, inputs.labels, case.num_classes, 0.1)).abs().max().item()
    return "" if error <= TARGET_TOLERANCE else f"targets are off by up to {error:.2g}"


def build_clone(case: Case, inputs: Inputs) -> Ready:
    return Ready(
        lambda: inputs.images.clone(memory_format=torch.preserve_format),
        lambda result: "" if torch.equal(result, inputs.images) else "the copy is not equal",
    )


def ours(case: Case, inputs: Inputs, images: Tensor, **more: Any) -> Callable[[], Any]:
    """A call of ours with everything that a training step hands over."""
    seed = torch.tensor(SEED, device=images.device)
    return lambda: tokenmix(
        images, inputs.labels, num_classes=case.num_classes, maps=inputs.maps, boxes=inputs.boxes,
        patch_size=case.patch_size, mode="elem", seed=seed, **more,
    )  # fmt: skip


def tokenmix_check(case: Case, inputs: Inputs, before: Tensor, normalised: bool = False) -> Callable[[Any], str]:
    return lambda result: find_wrong(case, inputs, before, result[0], result[1], result[2], normalised)


def restore(images: Tensor, before: Tensor) -> None:
    """Undo what a call in place did."""
    images.copy_(before)


def build_eager(case: Case, inputs: Inputs) -> Ready:
    return Ready(ours(case, inputs, inputs.images), tokenmix_check(case, inputs, inputs.images))


def build_out(case: Case, inputs: Inputs) -> Ready:
    out = torch.full_like(inputs.images, float("nan"))
    return Ready(ours(case, inputs, inputs.images, out=out), tokenmix_check(case, inputs, inputs.images))


def build_in_place(case: Case, inputs: Inputs) -> Ready:
    images = inputs.images.clone(memory_format=torch.preserve_format)
    return Ready(
        ours(case, inputs, images, out=images),
        tokenmix_check(case, inputs, inputs.images),
        lambda: restore(images, inputs.images),
    )


def build_uint8(case: Case, inputs: Inputs) -> Ready:
    dtype = torch.float32 if case.dtype == torch.uint8 else case.dtype
    return Ready(
        ours(case, inputs, inputs.raw, mean=MEAN, std=STD, out_dtype=dtype),
        tokenmix_check(case, inputs, inputs.raw, normalised=True),
    )


def build_reference(case: Case, inputs: Inputs) -> Ready:
    return Ready(ours(case, inputs, inputs.images, backend="reference"), tokenmix_check(case, inputs, inputs.images))


def build_compiled_around(case: Case, inputs: Inputs) -> Ready:
    return Ready(
        torch.compile(ours(case, inputs, inputs.images)),
        tokenmix_check(case, inputs, inputs.images),
    )


def build_compiled_reference(case: Case, inputs: Inputs) -> Ready:
    """The pixel part of a plain mix, fused by Inductor; masks drawn and weights pooled by ours, outside of it."""
    from tokenmix_kernels import pool_targets, token_mask

    patch, classes = case.patch_size, case.num_classes
    grid = (case.height // patch, case.width // patch)

    @torch.compile
    def mix(images: Tensor, labels: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        mixed = torch.where(as_pixels(mask, patch), images.flip(0), images)
        return mixed, plain_targets(weights, labels, classes, 0.1)

    def call() -> tuple[Tensor, Tensor, Tensor]:
        mask = token_mask(case.batch, grid, mode="elem", seed=SEED, device=inputs.images.device)
        weights = pool_targets(inputs.maps, inputs.labels, mask, boxes=inputs.boxes)
        return (*mix(inputs.images, inputs.labels, mask, weights), mask)

    return Ready(call, tokenmix_check(case, inputs, inputs.images))


def build_timm(case: Case, inputs: Inputs) -> Ready:
    """timm's CutMix with a rectangle for each image; it works on a batch of its own, as it mixes in place."""
    mixup = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem", label_smoothing=0.1, num_classes=case.num_classes)
    images = inputs.images.clone(memory_format=torch.preserve_format)

    def check(result: tuple[Tensor, Tensor]) -> str:
        mixed, targets = result
        own, other = inputs.images, inputs.images.flip(0)
        if not bool(((mixed == own) | (mixed == other)).all()):
            return "pixels are neither the own image's nor the partner's"
        # What a target says of the own image is the share of its pixels.
        share = (mixed == own).float().mean((1, 2, 3))
        rows = torch.arange(case.batch, device=own.device)
        differ = inputs.labels != inputs.labels.flip(0)
        said = (targets[rows, inputs.labels] - 0.1 / case.num_classes) / 0.9
        off = (said - share)[differ].abs().max().item()
        return "" if off < 1e-3 else f"targets are off by up to {off:.2g} from the share of the pixels"

    def call() -> Any:
        np.random.seed(SEED)
        return mixup(images, inputs.labels)

    return Ready(call, check, lambda: restore(images, inputs.images))


def build_torchvision(case: Case, inputs: Inputs) -> Ready:
    """torchvision's CutMix: one rectangle for the batch, partners rolled by one."""
    cutmix = v2.CutMix(num_classes=case.num_classes)

    def check(result: tuple[Tensor, Tensor]) -> str:
        mixed, targets = result
        own, other = inputs.images, inputs.images.roll(1, 0)
        if not bool(((mixed == own) | (mixed == other)).all()):
            return "pixels are neither the own image's nor the partner's"
        share = (mixed == own).float().mean()
        differ = inputs.labels != inputs.labels.roll(1, 0)
        rows = torch.arange(case.batch, device=own.device)
        off = (targets[rows, inputs.labels] - share)[differ].abs().max().item()
        return "" if off < 1e-3 else f"targets are off by up to {off:.2g} from the share of the pixels"

    def call() -> Any:
        torch.manual_seed(SEED)
        return cutmix(inputs.images, inputs.labels)

    return Ready(call, check)


def drawn_by_host(grid_h: int, grid_w: int, wanted: int, source: random.Random) -> Tensor:
    """A block mask by a loop on the host (BEiT's block-wise masking, which the published TokenMix uses)."""
    mask = np.zeros((grid_h, grid_w), bool)
    covered = 0
    while covered < wanted:
        for _ in range(10):
            area = source.uniform(min(14, wanted - covered), wanted - covered)
            aspect = np.exp(source.uniform(np.log(0.3), np.log(1 / 0.3)))
            h, w = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
            if not (0 < h < grid_h and 0 < w < grid_w):
                continue
            top, left = source.randint(0, grid_h - h), source.randint(0, grid_w - w)
            block = mask[top : top + h, left : left + w]
            new = block.size - int(block.sum())
            if 0 < new <= wanted - covered:
                block[:] = True
                covered += new
                break
        else:
            break
    return torch.from_numpy(mask)


def build_published(case: Case, inputs: Inputs) -> Ready:
    """The steps of the published code, in our words, with a mask for each image.

    The masks come from a loop on the host, the top-k maps are scattered into one map for each class [B, K, h, w],
    roi_align runs over all classes, and images are blended with a mask of their own dtype.
    """
    patch, classes, batch = case.patch_size, case.num_classes, case.batch
    grid = (case.height // patch, case.width // patch)
    wanted = min(grid[0] * grid[1], grid[0] * grid[1] // 2 + 14)
    values, indices = inputs.maps
    device = inputs.images.device

    def call() -> tuple[Tensor, Tensor, Tensor]:
        source = random.Random(SEED)
        mask = torch.stack([drawn_by_host(*grid, wanted, source) for _ in range(batch)]).to(device)
        dense = torch.zeros(batch, classes, case.map_size, case.map_size, device=device)
        dense.scatter_(1, indices, values.float())
        boxes = inputs.boxes * case.map_size - 0.5
        number = torch.arange(batch, device=device, dtype=torch.float32)[:, None]
        pooled = roi_align(dense, torch.cat([number, boxes], 1), grid, aligned=False)  # [B, K, Gh, Gw]
        rows = torch.arange(batch, device=device)
        shares = pooled[rows, inputs.labels]
        shares = shares / shares.sum((1, 2), keepdim=True)
        taken = mask.float()
        weights = torch.stack([(shares * (1 - taken)).sum((1, 2)), (shares.flip(0) * taken).sum((1, 2))], 1)
        blend = as_pixels(mask, patch).to(inputs.images.dtype)
        mixed = inputs.images * (1 - blend) + inputs.images.flip(0) * blend
        return mixed, plain_targets(weights, inputs.labels, classes, 0.1), mask

    return Ready(call, tokenmix_check(case, inputs, inputs.images))


IMPLEMENTATIONS = (
    Implementation("clone", build_clone, "`images.clone()`, the copy floor"),
    Implementation("ours, eager", build_eager, "`tokenmix(images, ...)`"),
    Implementation("ours, into out", build_out, "`tokenmix(images, ..., out=out)`", makes_output=False),
    Implementation("ours, in place", build_in_place, "`tokenmix(images, ..., out=images)`", makes_output=False),
    Implementation("ours, uint8 normalised", build_uint8, "`tokenmix(raw, ..., mean=, std=)`"),
    Implementation("reference", build_reference, "`tokenmix(..., backend='reference')`", device="cuda"),
    Implementation("ours, compiled around", build_compiled_around, "`torch.compile` of a function that calls ours"),
    Implementation(
        "where(), compiled", build_compiled_reference, "`torch.compile` of `where(mask, flip, images)` and targets"
    ),
    Implementation("timm Mixup", build_timm, "`timm.data.Mixup`, CutMix by element, in place", makes_output=False),
    Implementation("torchvision CutMix", build_torchvision, "`torchvision.transforms.v2.CutMix`, one rectangle"),
    Implementation("published approach", build_published, "host loop, dense scatter, roi_align over K, blend"),
)


def ready(case: Case, inputs: Inputs, implementation: Implementation) -> tuple[Ready | None, str]:
    """Build an implementation for a case and check one result: (what to time, '') or (None, what is wrong)."""
    try:
        built = implementation.build(case, inputs)
        if built.reset:
            built.reset()
        wrong = built.check(built.call())
    except Exception as error:  # A rival that cannot run is a line of the report, not the end of it.
        wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return (None, wrong) if wrong else (built, "")
