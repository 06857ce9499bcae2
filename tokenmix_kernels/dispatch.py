"""The operators in `torch.ops.tokenmix_kernels`: schemas, shapes for tracing, and which code runs where.

A CPU gets the reference, a GPU the kernels. None of them is differentiable. `settings` is JSON: the fields of
`Settings`, as `settings.as_text` writes them. Values are checked here, inside the operators, where they are known: see
`values.py`.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference
from .attention_inputs import AttentionMix, check_attention_values
from .inputs import Evidence, Result, shares_memory
from .memory import empty_images
from .settings import Settings, from_text
from .values import check_values

__all__ = [
    "attention_targets", "backend_of", "kernels", "mix", "mix_inplace", "mix_into", "mix_out", "pool_targets",
    "token_mask",
]  # fmt: skip

EVIDENCE = "Tensor? indices, Tensor? ids, Tensor? boxes, Tensor? flips, Tensor? affines, str box_format"
INPUTS = (
    f"Tensor labels, Tensor? partner, Tensor? maps, {EVIDENCE}, Tensor? mask, Tensor seed, SymInt sample_offset, "
    "str settings"
)
RESULT = "Tensor targets, Tensor mask, Tensor weights, Tensor kind"


@cache
def kernels() -> ModuleType:
    """The kernels, imported when they are first asked for: a machine without Triton has the reference alone."""
    from . import kernels as module

    return module


def backend_of(images: Tensor) -> ModuleType:
    """The module that computes a mix on the device of `images`."""
    return kernels() if images.is_cuda else reference


def check_float64(name: str, tensor: Tensor) -> None:
    """Raise ValueError for a tensor on a device that has no float64, which the reference counts in."""
    if tensor.device.type == "mps":
        raise ValueError(f"{name} must be on the CPU, since mps has no float64: mix there, and move the result")


def mix_into(
    module: ModuleType,
    images: Tensor,
    out: Tensor,
    labels: Tensor,
    partner: Tensor | None,
    evidence: Evidence,
    mask: Tensor | None,
    seed: Tensor,
    sample_offset: int,
    settings: Settings,
    in_place: bool = False,
    fresh: bool = False,
    **options: Any,
) -> Result:
    """Mix by `module`, the reference or the kernels, into `out`, which is `images` where the mix is `in_place`.

    Otherwise an `out` on the memory of `images` was meant to be apart (a compiler may drop a clone): the images are
    then copied first. `fresh`: `out` was allocated for this mix.

    Raises:
        ValueError: a value out of range (on a CPU), or `out` overlaps with `images` in part.
    """
    if in_place and settings.mean:
        raise ValueError("out must not be images where mean and std are given: only what moves is touched in place")
    if mask is None and settings.mask_type == "given":
        raise ValueError("mask must be given where mask_type is 'given'")
    if settings.mean and images.dtype == torch.uint8:
        check_float64("images in bytes that are normalised", images)
    if not images.is_cuda:
        check_values(labels, partner, evidence, settings.num_classes, in_place)
    if not (in_place or fresh) and shares_memory(images, out):
        images = images.clone()
    return module.mix(images, out, labels, partner, evidence, mask, seed, sample_offset, settings, **options)


def split(rest: tuple[Any, ...]) -> tuple[Tensor, Tensor | None, Evidence, Tensor | None, Tensor, int, Settings]:
    """(labels, partner, evidence, mask, seed, sample_offset, settings) of an operator's arguments."""
    labels, partner, maps, indices, ids, boxes, flips, affines, box_format, mask, seed, sample_offset, settings = rest
    evidence = Evidence(maps, indices, ids, boxes, flips, affines, box_format)
    return labels, partner, evidence, mask, seed, sample_offset, from_text(settings)


def implementations(module_of: Callable[[Tensor], ModuleType]) -> dict[str, Callable[..., Any]]:
    """The operators' bodies by the functions of the module for a tensor."""

    def mix(images: Tensor, out_dtype: torch.dtype, *rest: Any) -> tuple[Tensor, ...]:
        out = empty_images(images, out_dtype)
        return out, *mix_into(module_of(images), images, out, *split(rest), fresh=True)

    def mix_out(images: Tensor, out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(mix_into(module_of(images), images, out, *split(rest)))

    def mix_inplace(images: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(mix_into(module_of(images), images, images, *split(rest), in_place=True))

    def token_mask(seed: Tensor, sample_offset: int, batch: int, grid_h: int, grid_w: int, settings: str) -> Tensor:
        masks = module_of(seed).token_mask(batch, (grid_h, grid_w), seed, sample_offset, from_text(settings))
        return masks.to(seed.device)

    def pool_targets(labels: Tensor, mask: Tensor, partner: Tensor | None, maps: Tensor, *rest: Any) -> Tensor:
        evidence = Evidence(maps, *rest)
        if not maps.is_cuda:
            check_values(labels, partner, evidence, None)
        return module_of(maps).pool_targets(evidence, labels, mask, partner).to(maps.device)

    def attention_targets(
        labels: Tensor, partner: Tensor | None, num_classes: int, smoothing: float, multi_label: bool, *rest: Any
    ) -> Tensor:
        mix = AttentionMix(*rest)
        check_float64("attention", mix.attention)
        if not labels.is_cuda:
            check_attention_values(mix, labels, partner, num_classes)
        return module_of(labels).attention_targets(mix, labels, partner, num_classes, smoothing, multi_label)

    return {
        "mix": mix, "mix_out": mix_out, "mix_": mix_inplace, "token_mask": token_mask, "pool_targets": pool_targets,
        "attention_targets": attention_targets,
    }  # fmt: skip


def fake_result(images: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = from_text(text)
    batch, _, height, width = images.shape
    patch = settings.patch_size
    mask_dtype = torch.float32 if settings.shares else torch.bool
    return (
        images.new_empty(batch, settings.num_classes, dtype=torch.float32),
        images.new_empty(batch, height // patch, width // patch, dtype=mask_dtype),
        images.new_empty(batch, 2, dtype=torch.float32),
        images.new_empty(batch, dtype=torch.uint8),
    )


def fake_mix(images: Tensor, out_dtype: torch.dtype, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(images, dtype=out_dtype), *fake_result(images, rest[-1])


def fake_mix_out(images: Tensor, out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_result(images, rest[-1])


def fake_mix_inplace(images: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_result(images, rest[-1])


def fake_token_mask(seed: Tensor, sample_offset: int, batch: int, grid_h: int, grid_w: int, settings: str) -> Tensor:
    return seed.new_empty(batch, grid_h, grid_w, dtype=torch.bool)


def fake_pool_targets(labels: Tensor, mask: Tensor, partner: Tensor | None, maps: Tensor, *rest: Any) -> Tensor:
    return maps.new_empty(mask.shape[0], 2, dtype=torch.float32)


def fake_attention_targets(labels: Tensor, partner: Tensor | None, num_classes: int, *rest: Any) -> Tensor:
    return labels.new_empty(labels.shape[0], num_classes, dtype=torch.float32)


BODIES = implementations(backend_of)
mix = custom_op(
    "tokenmix_kernels::mix",
    BODIES["mix"],
    mutates_args=(),
    schema=f"(Tensor images, ScalarType out_dtype, {INPUTS}) -> (Tensor images, {RESULT})",
)
mix_out = custom_op(
    "tokenmix_kernels::mix_out",
    BODIES["mix_out"],
    mutates_args=("out",),
    schema=f"(Tensor images, Tensor(a!) out, {INPUTS}) -> ({RESULT})",
)
mix_inplace = custom_op(
    "tokenmix_kernels::mix_",
    BODIES["mix_"],
    mutates_args=("images",),
    schema=f"(Tensor(a!) images, {INPUTS}) -> ({RESULT})",
)
token_mask = custom_op(
    "tokenmix_kernels::token_mask",
    BODIES["token_mask"],
    mutates_args=(),
    schema="(Tensor seed, SymInt sample_offset, SymInt batch, int grid_h, int grid_w, str settings) -> Tensor",
)
pool_targets = custom_op(
    "tokenmix_kernels::pool_targets",
    BODIES["pool_targets"],
    mutates_args=(),
    schema=f"(Tensor labels, Tensor mask, Tensor? partner, Tensor maps, {EVIDENCE}) -> Tensor",
)
attention_targets = custom_op(
    "tokenmix_kernels::attention_targets",
    BODIES["attention_targets"],
    mutates_args=(),
    schema=(
        "(Tensor labels, Tensor? partner, int num_classes, float smoothing, bool multi_label, Tensor attention, "
        "Tensor mask, Tensor? kind, Tensor? lam, Tensor? ratios, float ratio) -> Tensor"
    ),
)
mix.register_fake(fake_mix)
mix_out.register_fake(fake_mix_out)
mix_inplace.register_fake(fake_mix_inplace)
token_mask.register_fake(fake_token_mask)
pool_targets.register_fake(fake_pool_targets)
attention_targets.register_fake(fake_attention_targets)
