"""Weights and soft targets in PyTorch on the CPU. Beside `kernels/targets.py`."""

import torch
from torch import Tensor

from ..inputs import Evidence
from ..settings import COPY, MASK_RULES, MIXUP, Settings
from .draw import CPU, Draw, coverage
from .evidence import pool

__all__ = ["taken_share", "write_targets", "write_weights"]


def taken_share(drawn: Draw, settings: Settings) -> Tensor:
    """The share of each token that comes from the partner, [B, Gh, Gw] float64."""
    taken = drawn.mask.double()
    rule, patch = MASK_RULES[settings.mask_type], settings.patch_size
    if not rule.whole_tokens:
        grid = (taken.shape[1], taken.shape[2])
        for i, kind in enumerate(drawn.kind):
            if kind == rule.kind:
                taken[i] = coverage(drawn.rectangle[i], grid, patch) / (patch * patch)
    return taken


def write_weights(evidence: Evidence, labels: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> Tensor:
    """Weights [B, 2] fp32 (own, partner): lam for Mixup, evidence or area for what was taken from the partner."""
    weights = pool(evidence, labels, partner, taken_share(drawn, settings))
    by_lam = {COPY, MIXUP}
    rule = MASK_RULES[settings.mask_type]
    if not rule.whole_tokens and evidence.maps is None and not settings.correct_lam and not settings.minmax:
        by_lam.add(rule.kind)
    use_lam = torch.tensor([kind in by_lam for kind in drawn.kind], device=CPU)
    lam = torch.tensor(drawn.lam, dtype=torch.float64, device=CPU) * 2.0**-16
    return torch.where(use_lam[:, None], torch.stack([lam, 1 - lam], 1), weights).float()


def write_targets(weights: Tensor, labels: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> Tensor:
    """Dense soft targets [B, K] fp32.

    By the rule of the mask the paper's, w - eps/2 + eps/(2K) for each side, added up; or timm's, w * (1 - eps) + eps/K,
    which Mixup always has. A label out of range adds nothing.
    """
    classes, smoothing = settings.num_classes, settings.label_smoothing
    paper = {rule.kind for rule in MASK_RULES.values() if rule.as_in_paper}
    tokens = torch.tensor([kind in paper for kind in drawn.kind], device=CPU)[:, None]
    raised = torch.where(tokens, weights - smoothing / 2, weights * (1 - smoothing))  # [B, 2]
    pair = torch.stack([labels, labels[partner]], 1)
    known = (pair >= 0) & (pair < classes)
    dense = torch.full((len(labels), classes), smoothing / classes, dtype=torch.float32, device=CPU)
    return dense.scatter_add_(1, pair.clamp(0, classes - 1), torch.where(known, raised, 0.0))
