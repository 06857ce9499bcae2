"""The operators in `torch.ops.tokenmix_kernels`: schemas, shapes for tracing, and which code runs where.

A CPU gets the reference, a GPU the kernels. None of them is differentiable. All but `token_mask` and `pool_targets`
take the constant part as the fields of `Settings`, in their order.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference
from .memory import empty_images
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
# Where an image finds its map, and how it shows it; last, so that calls without them stay as they are.
PLACES = "Tensor? ids=None, Tensor? flips=None, Tensor? affines=None"
RESULTS = "Tensor targets, Tensor mask, Tensor weights"


def as_settings(values: tuple[Any, ...]) -> Settings:
    """Settings from an operator's arguments, hashable."""
    fields = values[: len(Settings._fields)]
    return Settings._make(tuple(value) if isinstance(value, list) else value for value in fields)


def split(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """(settings, ids, flips, affines) from the end of an operator's arguments."""
    return as_settings(values), *values[len(Settings._fields) :]


def fake_results(images: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width = images.shape
    patch = settings.patch_size
    return (
        images.new_empty(batch, settings.num_classes, dtype=torch.float32),
        images.new_empty(batch, height // patch, width // patch, dtype=torch.bool),
        images.new_empty(batch, 2, dtype=torch.float32),
    )


def implementations(module: ModuleType) -> dict[str, Callable[..., Any]]:
    """The operators' bodies by the functions of `reference` or of `kernels`, with the same names and arguments."""

    def mix(images: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        inputs, out_dtype, constant = rest[:7], rest[7], split(rest[8:])
        out = empty_images(images, out_dtype)
        return out, *module.mix(images, labels, out, *inputs, *constant)

    def mix_out(images: Tensor, out: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return module.mix(images, labels, out, *rest[:7], *split(rest[7:]))

    def mix_inplace(images: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return module.mix_inplace(images, labels, *rest[:7], *split(rest[7:]))

    def token_mask(seed: Tensor, sample_offset: int, batch: int, grid_h: int, grid_w: int, *settings: Any) -> Tensor:
        return module.token_mask(batch, (grid_h, grid_w), seed, sample_offset, as_settings(settings)).to(seed.device)

    def pool_targets(maps: Tensor, *rest: Any) -> Tensor:
        return module.pool_targets(maps, *rest).to(maps.device)

    return {
        "mix": mix, "mix_out": mix_out, "mix_": mix_inplace, "token_mask": token_mask, "pool_targets": pool_targets,
    }  # fmt: skip


def fake_mix(images: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(images, dtype=rest[7]), *fake_results(images, as_settings(rest[8:]))


def fake_mix_out(images: Tensor, out: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_results(images, as_settings(rest[7:]))


def fake_mix_inplace(images: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_results(images, as_settings(rest[7:]))


def fake_token_mask(seed: Tensor, sample_offset: int, batch: int, grid_h: int, grid_w: int, *settings: Any) -> Tensor:
    return seed.new_empty(batch, grid_h, grid_w, dtype=torch.bool)


def fake_pool_targets(maps: Tensor, indices: Any, labels: Tensor, mask: Tensor, *rest: Any) -> Tensor:
    return maps.new_empty(mask.shape[0], 2, dtype=torch.float32)


bodies = implementations(reference)
mix = custom_op(
    "tokenmix_kernels::mix",
    bodies["mix"],
    mutates_args=(),
    schema=f"(Tensor images, {INPUTS}, ScalarType out_dtype, {SETTINGS}, {PLACES}) -> (Tensor images, {RESULTS})",
)
mix_out = custom_op(
    "tokenmix_kernels::mix_out",
    bodies["mix_out"],
    mutates_args=("out",),
    schema=f"(Tensor images, Tensor(a!) out, {INPUTS}, {SETTINGS}, {PLACES}) -> ({RESULTS})",
)
mix_inplace = custom_op(
    "tokenmix_kernels::mix_",
    bodies["mix_"],
    mutates_args=("images",),
    schema=f"(Tensor(a!) images, {INPUTS}, {SETTINGS}, {PLACES}) -> ({RESULTS})",
)
token_mask = custom_op(
    "tokenmix_kernels::token_mask",
    bodies["token_mask"],
    mutates_args=(),
    schema=f"(Tensor seed, SymInt sample_offset, SymInt batch, int grid_h, int grid_w, {SETTINGS}) -> Tensor",
)
pool_targets = custom_op(
    "tokenmix_kernels::pool_targets",
    bodies["pool_targets"],
    mutates_args=(),
    schema="(Tensor maps, Tensor? indices, Tensor labels, Tensor mask, Tensor? boxes, Tensor? partner, "
    f"str box_format, {PLACES}) -> Tensor",
)
mix.register_fake(fake_mix)
mix_out.register_fake(fake_mix_out)
mix_inplace.register_fake(fake_mix_inplace)
token_mask.register_fake(fake_token_mask)
pool_targets.register_fake(fake_pool_targets)


def register_kernels() -> None:
    """Register the Triton kernels for CUDA and ROCm devices; a machine without Triton has the reference alone."""
    try:
        from . import kernels
    except ImportError:
        return
    launchers = implementations(kernels)
    for operator, name in (
        (mix, "mix"), (mix_out, "mix_out"), (mix_inplace, "mix_"), (token_mask, "token_mask"),
        (pool_targets, "pool_targets"),
    ):  # fmt: skip
        operator.register_kernel("cuda")(launchers[name])


register_kernels()
