"""The operators in `torch.ops.tokenmix_kernels`: schemas, shapes for tracing, and which code runs where.

A CPU gets the reference, a GPU the kernels. None of them is differentiable. All but `token_mask` and `pool_targets`
take the constant part as the fields of `Settings`, in their order.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_fake, register_kernel

from . import reference
from .settings import Settings

__all__: list[str] = []

# `mode` has another name here: what functionalises operators that mutate has a parameter of that name itself.
SETTINGS = (
    "int num_classes, int patch_size, str mask_type, str mixing_mode, float lam, int minimum_tokens, "
    "float mixup_alpha, float cutmix_alpha, float prob, float switch_prob, float[] minmax, bool correct_lam, "
    "float label_smoothing, float[] mean, float[] std, str box_format"
)
INPUTS = (
    "Tensor labels, Tensor? partner, Tensor? maps, Tensor? indices, Tensor? boxes, Tensor? mask, Tensor seed, "
    "SymInt sample_offset"
)
RESULTS = "Tensor targets, Tensor mask, Tensor weights"


def as_settings(values: tuple[Any, ...]) -> Settings:
    """Settings from an operator's arguments, hashable."""
    return Settings._make(tuple(value) if isinstance(value, list) else value for value in values)


def fake_results(images: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width = images.shape
    patch = settings.patch_size
    return (
        images.new_empty(batch, settings.num_classes, dtype=torch.float32),
        images.new_empty(batch, height // patch, width // patch, dtype=torch.bool),
        images.new_empty(batch, 2, dtype=torch.float32),
    )


def _mix(
    images: Tensor, labels: Tensor, partner: Tensor | None, maps: Tensor | None, indices: Tensor | None,
    boxes: Tensor | None, mask: Tensor | None, seed: Tensor, sample_offset: int, out_dtype: torch.dtype, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = torch.empty_like(images, dtype=out_dtype)
    with_settings = as_settings(settings)
    return out, *reference.mix(
        images, labels, out, partner, maps, indices, boxes, mask, seed, sample_offset, with_settings
    )


def _mix_out(
    images: Tensor, out: Tensor, labels: Tensor, partner: Tensor | None, maps: Tensor | None, indices: Tensor | None,
    boxes: Tensor | None, mask: Tensor | None, seed: Tensor, sample_offset: int, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with_settings = as_settings(settings)
    return reference.mix(images, labels, out, partner, maps, indices, boxes, mask, seed, sample_offset, with_settings)


def _mix_inplace(
    images: Tensor, labels: Tensor, partner: Tensor | None, maps: Tensor | None, indices: Tensor | None,
    boxes: Tensor | None, mask: Tensor | None, seed: Tensor, sample_offset: int, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return reference.mix_inplace(
        images, labels, partner, maps, indices, boxes, mask, seed, sample_offset, as_settings(settings)
    )


def _token_mask(seed: Tensor, sample_offset: int, batch: int, grid_h: int, grid_w: int, *settings: Any) -> Tensor:
    return reference.token_mask(batch, (grid_h, grid_w), seed, sample_offset, as_settings(settings)).to(seed.device)


def _pool_targets(
    maps: Tensor, indices: Tensor | None, labels: Tensor, mask: Tensor, boxes: Tensor | None, partner: Tensor | None,
    box_format: str,
) -> Tensor:  # fmt: skip
    return reference.pool_targets(maps, indices, labels, mask, boxes, partner, box_format).to(maps.device)


mix = custom_op(
    "tokenmix_kernels::mix",
    _mix,
    mutates_args=(),
    schema=f"(Tensor images, {INPUTS}, ScalarType out_dtype, {SETTINGS}) -> (Tensor images, {RESULTS})",
)
mix_out = custom_op(
    "tokenmix_kernels::mix_out",
    _mix_out,
    mutates_args=("out",),
    schema=f"(Tensor images, Tensor(a!) out, {INPUTS}, {SETTINGS}) -> ({RESULTS})",
)
mix_inplace = custom_op(
    "tokenmix_kernels::mix_",
    _mix_inplace,
    mutates_args=("images",),
    schema=f"(Tensor(a!) images, {INPUTS}, {SETTINGS}) -> ({RESULTS})",
)
token_mask = custom_op(
    "tokenmix_kernels::token_mask",
    _token_mask,
    mutates_args=(),
    schema=f"(Tensor seed, SymInt sample_offset, SymInt batch, int grid_h, int grid_w, {SETTINGS}) -> Tensor",
)
pool_targets = custom_op(
    "tokenmix_kernels::pool_targets",
    _pool_targets,
    mutates_args=(),
    schema="(Tensor maps, Tensor? indices, Tensor labels, Tensor mask, Tensor? boxes, Tensor? partner, "
    "str box_format) -> Tensor",
)


@register_fake("tokenmix_kernels::mix")
def _(
    images: Tensor, labels: Tensor, partner: Any, maps: Any, indices: Any, boxes: Any, mask: Any, seed: Tensor,
    sample_offset: int, out_dtype: torch.dtype, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(images, dtype=out_dtype), *fake_results(images, as_settings(settings))


@register_fake("tokenmix_kernels::mix_out")
def _(
    images: Tensor, out: Tensor, labels: Tensor, partner: Any, maps: Any, indices: Any, boxes: Any, mask: Any,
    seed: Tensor, sample_offset: int, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fake_results(images, as_settings(settings))


@register_fake("tokenmix_kernels::mix_")
def _(
    images: Tensor, labels: Tensor, partner: Any, maps: Any, indices: Any, boxes: Any, mask: Any, seed: Tensor,
    sample_offset: int, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return fake_results(images, as_settings(settings))


@register_fake("tokenmix_kernels::token_mask")
def _(seed: Tensor, sample_offset: int, batch: int, grid_h: int, grid_w: int, *settings: Any) -> Tensor:
    return seed.new_empty(batch, grid_h, grid_w, dtype=torch.bool)


@register_fake("tokenmix_kernels::pool_targets")
def _(maps: Tensor, indices: Any, labels: Tensor, mask: Tensor, boxes: Any, partner: Any, box_format: str) -> Tensor:
    return maps.new_empty(mask.shape[0], 2, dtype=torch.float32)


def register_kernels() -> None:
    """Register the Triton kernels for CUDA and ROCm devices; a machine without Triton has the reference alone."""
    try:
        from . import kernels
    except ImportError:
        return

    @register_kernel("tokenmix_kernels::mix", "cuda")
    def _(
        images: Tensor, labels: Tensor, partner: Any, maps: Any, indices: Any, boxes: Any, mask: Any, seed: Tensor,
        sample_offset: int, out_dtype: torch.dtype, *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        out = torch.empty_like(images, dtype=out_dtype)
        with_settings = as_settings(settings)
        results = kernels.mix(
            images, labels, out, partner, maps, indices, boxes, mask, seed, sample_offset, with_settings
        )
        return out, *results

    @register_kernel("tokenmix_kernels::mix_out", "cuda")
    def _(
        images: Tensor, out: Tensor, labels: Tensor, partner: Any, maps: Any, indices: Any, boxes: Any, mask: Any,
        seed: Tensor, sample_offset: int, *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with_settings = as_settings(settings)
        return kernels.mix(images, labels, out, partner, maps, indices, boxes, mask, seed, sample_offset, with_settings)

    @register_kernel("tokenmix_kernels::mix_", "cuda")
    def _(
        images: Tensor, labels: Tensor, partner: Any, maps: Any, indices: Any, boxes: Any, mask: Any, seed: Tensor,
        sample_offset: int, *settings: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with_settings = as_settings(settings)
        return kernels.mix(
            images, labels, images, partner, maps, indices, boxes, mask, seed, sample_offset, with_settings
        )

    @register_kernel("tokenmix_kernels::token_mask", "cuda")
    def _(seed: Tensor, sample_offset: int, batch: int, grid_h: int, grid_w: int, *settings: Any) -> Tensor:
        return kernels.token_mask(batch, (grid_h, grid_w), seed, sample_offset, as_settings(settings))

    @register_kernel("tokenmix_kernels::pool_targets", "cuda")
    def _(
        maps: Tensor, indices: Any, labels: Tensor, mask: Tensor, boxes: Any, partner: Any, box_format: str
    ) -> Tensor:
        return kernels.pool_targets(maps, indices, labels, mask, boxes, partner, box_format)


register_kernels()
