"""What is timed: ours and others, each checked for right results before it is timed.

An implementation is made for one case by its builder: a function without arguments that mixes once, and a check that
says what is wrong with what it returns.
"""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from torch import Tensor
from torchvision.transforms import v2

from tokenmix_kernels import naive, pool_targets, token_mask, tokenmix

from .cases import MEAN, SEED, STD, Case, Inputs

__all__ = ["IMPLEMENTATIONS", "Implementation", "Ready", "find_wrong", "ours", "ready"]

# Largest error of targets and of blended pixels: sums of up to 324 map cells, one rounding of each dtype.
TARGET_TOLERANCE = 1e-5
PIXEL_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Ready(NamedTuple):
    """An implementation for one case.

    Attributes:
        call: what is timed.
        check: what is wrong with a result, '' where nothing is.
        reset: undoes what the call changes in its inputs.
    """

    call: Callable[[], Any]
    check: Callable[[Any], str]
    reset: Callable[[], None] | None = None


class Implementation(NamedTuple):
    """Something that is timed.

    Attributes:
        name: as tables show it.
        build: makes it for a case.
        text: what it is.
        makes_output: whether a call allocates the mixed images.
        device: the one kind of device it is for, or ''.
    """

    name: str
    build: Callable[[Case, Inputs], Ready]
    text: str
    makes_output: bool = True
    device: str = ""


def find_wrong(
    case: Case, inputs: Inputs, before: Tensor, images: Tensor, targets: Tensor, mask: Tensor, normalised: bool = False
) -> str:
    """What is wrong with the result of a TokenMix call, by the plain formulas of `naive`; '' where nothing is."""
    before, images, targets, mask = (tensor.cpu() for tensor in (before, images, targets, mask))
    labels, top, indices = inputs.labels.cpu(), inputs.maps.values.cpu(), inputs.maps.indices.cpu()
    partner = torch.arange(case.batch).flip(0)
    wanted = masked_tokens(case)
    covered = mask.flatten(1).sum(1)
    # Ten tries in a row that do not fit end a mask early; never by much, and none is empty.
    if int(covered.max()) > wanted or int(covered.min()) < 1:
        return f"masks cover {int(covered.min())} to {int(covered.max())} tokens, not up to {wanted}"
    if case.batch > 2 and bool((mask == mask[0]).all()):
        return "all masks are equal, though each image draws its own"
    right = naive.mixed(before, mask, partner)
    if normalised:
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
        right = (right.float() - mean) / std
        if not torch.allclose(images.float(), right, rtol=1e-5, atol=PIXEL_TOLERANCE[images.dtype]):
            return f"pixels are off by up to {(images.float() - right).abs().max().item():.2g}"
    elif not torch.equal(images, right):
        share = (images != right).float().mean().item()
        return f"{share:.1%} of the pixels are not those of the own image or the partner's, as the mask says"
    own = torch.where(indices == labels[:, None, None, None], top.float(), 0.0).sum(1)
    weights = naive.weights(naive.pooled(own, inputs.boxes.cpu(), case.grid), mask, partner)
    error = (targets - naive.targets(weights, labels, partner, case.num_classes, 0.1)).abs().max().item()
    return "" if error <= TARGET_TOLERANCE else f"targets are off by up to {error:.2g}"


def masked_tokens(case: Case) -> int:
    """How many tokens of each image come from the partner: half of them and `minimum_tokens`."""
    tokens = case.grid[0] * case.grid[1]
    return min(tokens, tokens // 2 + case.minimum_tokens)


def build_clone(case: Case, inputs: Inputs) -> Ready:
    return Ready(
        lambda: inputs.images.clone(memory_format=torch.preserve_format),
        lambda result: "" if torch.equal(result, inputs.images) else "the copy is not equal",
    )


def ours(case: Case, inputs: Inputs, images: Tensor, **more: Any) -> Callable[[], Any]:
    """A call of ours with all that a training step passes."""
    seed = torch.tensor(SEED, device=images.device)
    return lambda: tokenmix(
        images, inputs.labels, num_classes=case.num_classes, maps=inputs.maps, boxes=inputs.boxes,
        patch_size=case.patch_size, minimum_tokens=case.minimum_tokens, mode="elem", seed=seed, **more,
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
    """Pixels and targets fused by Inductor; masks and weights come from our own operators."""
    patch, classes = case.patch_size, case.num_classes

    @torch.compile
    def mix(images: Tensor, labels: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]  # [B, 1, H, W]
        targets = torch.full((len(labels), classes), 0.1 / classes, device=labels.device)
        targets.scatter_add_(1, torch.stack([labels, labels.flip(0)], 1), weights - 0.05)
        return torch.where(pixels, images.flip(0), images), targets

    def call() -> tuple[Tensor, Tensor, Tensor]:
        mask = token_mask(
            case.batch, case.grid, mode="elem", minimum_tokens=case.minimum_tokens, seed=SEED,
            device=inputs.images.device,
        )  # fmt: skip
        weights = pool_targets(inputs.maps, inputs.labels, mask, boxes=inputs.boxes)
        return (*mix(inputs.images, inputs.labels, mask, weights), mask)

    return Ready(call, tokenmix_check(case, inputs, inputs.images))


def build_timm(case: Case, inputs: Inputs) -> Ready:
    """timm's CutMix with a rectangle for each image. It mixes in place, so it gets a batch of its own."""
    mixup = Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem", label_smoothing=0.1, num_classes=case.num_classes)
    images = inputs.images.clone(memory_format=torch.preserve_format)

    def check(result: tuple[Tensor, Tensor]) -> str:
        mixed, targets = result
        own, other = inputs.images, inputs.images.flip(0)
        if not bool(((mixed == own) | (mixed == other)).all()):
            return "pixels are neither the own image's nor the partner's"
        # The target of the own label is the share of the image's own pixels.
        share = (mixed == own).float().mean((1, 2, 3))
        rows = torch.arange(case.batch, device=own.device)
        differ = inputs.labels != inputs.labels.flip(0)
        target_share = (targets[rows, inputs.labels] - 0.1 / case.num_classes) / 0.9
        off = (target_share - share)[differ].abs().max().item()
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


def build_published(case: Case, inputs: Inputs) -> Ready:
    """The tensor steps of the published code, with masks from a loop on the host, one for each image."""

    def call() -> tuple[Tensor, Tensor, Tensor]:
        source = random.Random(SEED)
        masks = [naive.block_mask(case.grid, masked_tokens(case), source) for _ in range(case.batch)]
        mask = torch.stack(masks).to(inputs.images.device)
        top, indices = inputs.maps
        mixed, targets = naive.published_mix(
            inputs.images, inputs.labels, top.float(), indices, inputs.boxes, mask, case.num_classes
        )
        return mixed, targets, mask

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
    except Exception as error:  # what cannot run is a line of the report, not the end of it
        wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return (None, wrong) if wrong else (built, "")
