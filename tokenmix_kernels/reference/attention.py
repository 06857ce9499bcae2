"""Targets by the model's attention in PyTorch. Beside `kernels/attention.py`."""

import torch
from torch import Tensor

from ..attention_inputs import AttentionMix
from ..settings import MIXUP

__all__ = ["attention_targets"]


def pool_attention(attention: Tensor, taken: Tensor, area: Tensor) -> Tensor:
    """The share of the attention that the own image has, [B] float64.

    `taken` [B, N] float64 is the share of each patch that is the partner's. Without attention (its sum is not a
    positive number) it is the share of the `area` [B].
    """
    total = attention.sum(1)
    return torch.where((total > 0) & (total < torch.inf), ((1 - taken) * attention).sum(1) / total, area)


def own_weight(mix: AttentionMix) -> Tensor:
    """The weight of the own label, [B] float64; that of the partner's is the rest."""
    taken = mix.mask.flatten(1).double()  # [B, N]
    area = 1 - taken.mean(1)
    share = pool_attention(mix.attention.flatten(1).double(), taken, area)
    ratio = mix.ratio if mix.ratios is None else mix.ratios.double()
    weight = area + ratio * (share - area)
    if mix.kind is None or mix.lam is None:
        return weight
    return torch.where(mix.kind <= MIXUP, mix.lam.double(), weight)


def attention_targets(
    mix: AttentionMix,
    labels: Tensor,
    partner: Tensor | None,
    num_classes: int,
    smoothing: float,
    multi_label: bool = False,
) -> Tensor:
    """Dense soft targets [B, K] fp32: w * (1 - eps) at each label, eps / K everywhere, added up.

    Of labels [B, K] each row times its w * (1 - eps); eps / 2 everywhere where they are yes or no for each class.
    A label out of range adds nothing, a partner out of range is the sample itself.
    """
    batch, device = len(labels), labels.device
    own = torch.arange(batch, dtype=torch.int64, device=device)
    pairs = own.flip(0) if partner is None else partner.long()
    pairs = torch.where((pairs >= 0) & (pairs < batch), pairs, own)
    weight = own_weight(mix) * (1 - smoothing)
    raised = torch.stack([weight, 1 - smoothing - weight], 1).float()
    rest = smoothing / (2 if multi_label else num_classes)
    dense = torch.full((batch, num_classes), rest, dtype=torch.float32, device=device)
    if labels.dim() == 2:
        rows = labels.float()
        return dense.add_(raised[:, :1] * rows).add_(raised[:, 1:] * rows[pairs])
    both = torch.stack([labels.long(), labels.long()[pairs]], 1)
    known = (both >= 0) & (both < num_classes)
    return dense.scatter_add_(1, both.clamp(0, num_classes - 1), torch.where(known, raised, 0.0))
