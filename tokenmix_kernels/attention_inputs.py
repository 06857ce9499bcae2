"""What the arguments of `attention_targets` must look like. Forms before the operator, values inside it."""

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import (
    FLOATS,
    LABEL_DTYPES,
    Evidence,
    check_grid,
    check_labels,
    check_partner,
    check_tensor,
    show,
)
from .values import check_values

__all__ = ["AttentionMix", "check_attention", "check_attention_values"]


class AttentionMix(NamedTuple):
    """A mixed batch and the model's attention to it.

    Attributes:
        attention: [B, N] or [B, Gh, Gw] of any float dtype, the class token's attention to the patches of the mixed
            images. Its scale does not matter.
        mask: [B, Gh, Gw] bool, or float32 share of each patch that is the partner's.
        kind: [B] uint8, of `inputs.Result`; None: all samples are mixed by the mask.
        lam: [B] float32, weight of the own label of samples of kind `COPY` and `MIXUP`.
        ratios: [B] float32, share of the attention in each sample's weight; None: `ratio` for all.
        ratio: the same for all samples.
    """

    attention: Tensor
    mask: Tensor
    kind: Tensor | None = None
    lam: Tensor | None = None
    ratios: Tensor | None = None
    ratio: float = 0.5


def check_attention(
    mix: AttentionMix, labels: Tensor, partner: Tensor | None, num_classes: int, multi_label: bool
) -> None:
    """Raise TypeError or ValueError for the first argument whose type, shape or device is wrong."""
    mask, attention = mix.mask, mix.attention
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 3 or mask.shape[0] == 0:
        raise ValueError(f"mask must be [B, Gh, Gw] with at least one image, got {show(mask)}")
    batch, device = mask.shape[0], mask.device
    grid_h, grid_w = mask.shape[1:]
    check_grid(grid_h, grid_w)
    check_tensor("mask", mask, (torch.bool, torch.float32), device, contiguous=True)
    check_tensor("attention", attention, FLOATS, device, contiguous=True)
    if attention.shape not in ((batch, grid_h * grid_w), (batch, grid_h, grid_w)):
        raise ValueError(
            f"attention must be [{batch}, {grid_h * grid_w}], one value for each patch of the mask {show(mask)}, got "
            f"{show(attention)}; mix with the model's patch_size"
        )
    check_labels(labels, batch, device, LABEL_DTYPES, num_classes, multi_label)
    if partner is not None:
        check_partner(partner, batch, device)
    if (mix.kind is None) != (mix.lam is None):
        raise ValueError("kind and lam must be given together: lam weighs the samples that kind says have no mask")
    for name, dtype in (("kind", torch.uint8), ("lam", torch.float32), ("ratios", torch.float32)):
        given = getattr(mix, name)
        if given is not None:
            shown = "ratio" if name == "ratios" else name
            check_tensor(shown, given, (dtype,), device, (batch,), ", one for each image", contiguous=name != "lam")


def check_shares(name: str, shares: Tensor) -> None:
    """Raise ValueError unless all values are in [0, 1]."""
    low, high = (float(value) for value in torch.aminmax(shares))
    if not (low >= 0 and high <= 1):
        raise ValueError(f"{name} must be in [0, 1], got values from {low} to {high}")


def check_attention_values(mix: AttentionMix, labels: Tensor, partner: Tensor | None, num_classes: int) -> None:
    """Raise ValueError for the first value that is out of its range. Tensors must be on the CPU."""
    check_values(labels, partner, Evidence(), num_classes)
    if mix.mask.dtype != torch.bool:
        check_shares("mask", mix.mask)
    if mix.lam is not None:
        check_shares("lam", mix.lam)
    if mix.ratios is not None:
        check_shares("ratio", mix.ratios)
