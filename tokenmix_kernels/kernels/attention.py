"""Targets by the model's attention, in Triton. Beside `reference/attention.py`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_inputs import AttentionMix
from .draw import partner_of
from .groups import CONST, Pairs
from .ready import current

__all__ = ["attention_arguments", "attention_kernel", "attention_targets"]


@triton.jit
def pool_attention(attention, taken, area):
    """The share of the attention that the own image has; of the `area` where the attention has no positive sum.

    `attention` and `taken`, the share of each patch that is the partner's, are [TOKENS] fp32.
    """
    total = tl.sum(attention, 0)
    kept = tl.sum((1.0 - taken) * attention, 0)
    return tl.where((total > 0) & (total < float("inf")), tl.div_rn(kept, tl.where(total > 0, total, 1.0)), area)


@triton.jit
def own_weight(mix, lam_stride, i, COUNT: tl.constexpr):
    """The weight of the own label of sample i; that of the partner's is the rest."""
    token = tl.arange(0, triton.next_power_of_2(COUNT))
    real = token < COUNT
    attention = tl.load(mix.attention + i * COUNT + token, real, 0).to(tl.float32)
    taken = tl.load(mix.mask + i * COUNT + token, real, 0).to(tl.float32)
    area = 1.0 - tl.sum(taken, 0) * (1.0 / COUNT)
    share = pool_attention(attention, taken, area)
    ratio = tl.cast(mix.ratio, tl.float32) if mix.ratios is None else tl.load(mix.ratios + i)
    weight = area + ratio * (share - area)
    if mix.kind is not None:
        weight = tl.where(tl.load(mix.kind + i) <= CONST.value.MIXUP, tl.load(mix.lam + i * lam_stride), weight)
    return weight


@triton.jit(do_not_specialize=["batch"])
def attention_kernel(
    targets,  # [B, K] fp32
    mix,  # attention_inputs.AttentionMix
    lam_stride,  # of mix.lam
    pairs,  # groups.Pairs
    smoothing,  # epsilon of the targets
    batch,  # B
    COUNT: tl.constexpr,  # N, patches of an image
    K: tl.constexpr,
    LABEL_ROWS: tl.constexpr,  # labels are [B, K]
    MULTI_LABEL: tl.constexpr,
):
    """One program for each sample."""
    BLOCK: tl.constexpr = min(1024, triton.next_power_of_2(K))
    i = tl.program_id(0).to(tl.int64)
    j = partner_of(pairs.partner, i, batch)
    if not LABEL_ROWS:
        label_i = tl.load(pairs.labels + i * pairs.labels_stride).to(tl.int64)
        label_j = tl.load(pairs.labels + j * pairs.labels_stride).to(tl.int64)
    keeps = 1.0 - tl.cast(smoothing, tl.float32)
    own = own_weight(mix, lam_stride, i, COUNT) * keeps
    rest = tl.div_rn(tl.cast(smoothing, tl.float32), tl.full([], 2 if MULTI_LABEL else K, tl.float32))
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        if LABEL_ROWS:
            row_i = tl.load(pairs.labels + i * pairs.labels_stride + column, column < K, 0).to(tl.float32)
            row_j = tl.load(pairs.labels + j * pairs.labels_stride + column, column < K, 0).to(tl.float32)
            value = rest + own * row_i + (keeps - own) * row_j
        else:
            value = rest + tl.where(column == label_i, own, 0.0) + tl.where(column == label_j, keeps - own, 0.0)
        tl.store(targets + i * K + column, value, column < K)


def attention_arguments(
    targets: Tensor,
    mix: AttentionMix,
    labels: Tensor,
    partner: Tensor | None,
    smoothing: float,
    multi_label: bool = False,
) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the arguments of a launch. Nothing here waits for a device."""
    batch, classes = targets.shape
    arguments = {
        "targets": targets,
        "mix": mix,
        "lam_stride": 1 if mix.lam is None else mix.lam.stride(0),
        "pairs": Pairs(labels, labels.stride(0), partner),
        "smoothing": smoothing,
        "batch": batch,
        "COUNT": mix.mask.shape[1] * mix.mask.shape[2],
        "K": classes,
        "LABEL_ROWS": labels.dim() == 2,
        "MULTI_LABEL": multi_label,
    }
    return (batch,), arguments


def attention_targets(
    mix: AttentionMix,
    labels: Tensor,
    partner: Tensor | None,
    num_classes: int,
    smoothing: float,
    multi_label: bool = False,
) -> Tensor:
    """Dense soft targets [B, K] fp32, in one launch."""
    targets = torch.empty(len(labels), num_classes, dtype=torch.float32, device=labels.device)
    grid, arguments = attention_arguments(targets, mix, labels, partner, smoothing, multi_label)
    with current(labels.device):
        attention_kernel[grid](**arguments)
    return targets
