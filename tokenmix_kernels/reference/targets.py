"""Weights and soft targets on the CPU. Beside `kernels/targets.py`.

One or two numbers for each sample take plain loops or few calls of NumPy: of a small batch, calls are the cost.
"""

import numpy as np
import torch
from torch import Tensor

from ..inputs import Evidence
from ..settings import COPY, MASK_RULES, MIXUP, Settings
from .draw import CPU, Draw, Rectangle, coverage
from .evidence import pool

__all__ = ["as_labels", "row_weights", "taken_share", "visible_share", "write_targets", "write_weights"]

PAPER = {rule.kind for rule in MASK_RULES.values() if rule.as_in_paper}


def taken_share(drawn: Draw, settings: Settings) -> Tensor:
    """The share of each token that comes from the partner, [B, Gh, Gw] float64."""
    patch = settings.patch_size
    if MASK_RULES[settings.mask_type].whole_tokens:
        return drawn.mask.double()
    grid = (drawn.mask.shape[1], drawn.mask.shape[2])
    return (torch.stack([coverage(own, grid, patch) for own in drawn.rectangle]) / (patch * patch)).double()


def as_labels(labels: Tensor) -> Tensor:
    """Labels on the CPU: class numbers [B] int64, or rows [B, K] float32."""
    return labels.to(CPU, torch.int64 if labels.dim() == 1 else torch.float32)


def erased_pixels(rectangles: list[Rectangle], grid: tuple[int, int], patch: int) -> Tensor:
    """The pixels of each token that are in one of the rectangles, [Gh, Gw] int64."""
    if len(rectangles) < 2:
        return coverage(rectangles[0] if rectangles else (0, 0, 0, 0), grid, patch)
    pixels = np.zeros((grid[0] * patch, grid[1] * patch), bool)
    for top, bottom, left, right in rectangles:
        pixels[top:bottom, left:right] = True
    return torch.from_numpy(pixels.reshape(grid[0], patch, grid[1], patch).sum((1, 3)))


def visible_share(rectangles: list[list[Rectangle]], grid: tuple[int, int], patch: int) -> Tensor:
    """The share of each token that is not erased, [B, Gh, Gw] float64."""
    erased = torch.stack([erased_pixels(own, grid, patch) for own in rectangles])
    return (patch * patch - erased).double() / (patch * patch)


def write_weights(
    evidence: Evidence, labels: Tensor, partner: Tensor, drawn: Draw, visible: Tensor | None, settings: Settings
) -> Tensor:
    """Weights [B, 2] fp32 (own, partner): lam for Mixup, evidence or area for what was taken from the partner.

    Labels [B, K] beside maps of several classes have weights [B, 2, K], one for each class.
    """
    by_lam = {COPY, MIXUP}
    rule = MASK_RULES[settings.mask_type]
    if not rule.whole_tokens and evidence.maps is None and not settings.correct_lam and not settings.minmax:
        by_lam.add(rule.kind)
    if evidence.maps is None and visible is None:
        return lam_or_area(drawn, by_lam, settings)
    weights = pool(evidence, labels, partner, taken_share(drawn, settings), visible)
    use_lam = [kind in by_lam for kind in drawn.kind]
    if not any(use_lam):
        return weights.float()
    both, chosen = lam_or_area(drawn, set(drawn.kind), settings), torch.tensor(use_lam, device=CPU)
    if weights.dim() == 3:
        return torch.where(chosen[:, None, None], both[:, :, None], weights.float())
    return torch.where(chosen[:, None], both, weights.float())


def lam_or_area(drawn: Draw, by_lam: set[int], settings: Settings) -> Tensor:
    """The weights that lam gives for kinds `by_lam`, and those of the area that was moved for others: [B, 2] fp32."""
    count, moved = drawn.mask.shape[1] * drawn.mask.shape[2], drawn.tokens
    if not MASK_RULES[settings.mask_type].whole_tokens:
        count *= settings.patch_size**2
        moved = [(bottom - top) * (right - left) for top, bottom, left, right in drawn.rectangle]
    pairs = [
        (lam / 65536, (65536 - lam) / 65536) if kind in by_lam else ((count - part) / count, part / count)
        for kind, lam, part in zip(drawn.kind, drawn.lam, moved, strict=True)
    ]
    return torch.from_numpy(np.array(pairs, np.float32))


def row_weights(weights: Tensor, labels: Tensor, partner: Tensor) -> Tensor:
    """Weights [B, 2] fp32; where each class has one of its own, [B, 2, K], their mean by the labels."""
    if weights.dim() == 2:
        return weights
    pair = torch.stack([labels, labels[partner]], 1)  # [B, 2, K]
    total = pair.sum(2)
    # Classes whose label is 0 have the area's weight, or lam.
    return torch.where(total > 0, (weights * pair).sum(2) / total, weights[:, :, 0])


def write_targets(weights: Tensor, labels: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> Tensor:
    """Dense soft targets [B, K] fp32.

    By the rule of the mask the paper's, (w - eps/2) y for each side y of labels; or timm's, w (1 - eps) y, which Mixup
    always has. Every class has eps/K more, or eps/2 where labels are yes or no for each class. A class number out of
    range adds nothing.
    """
    classes, smoothing = settings.num_classes, settings.label_smoothing
    # A weight w becomes (w - less) * times.
    rule_of = {kind: (smoothing / 2, 1.0) if kind in PAPER else (0.0, 1 - smoothing) for kind in set(drawn.kind)}
    rules = [rule_of[kind] for kind in drawn.kind]
    rest = smoothing / (2 if settings.multi_label else classes)
    dense = np.full((labels.shape[0], classes), rest, np.float32)
    if labels.dim() == 2:
        shape = (labels.shape[0], *[1] * (weights.dim() - 1))
        lower, scale = (
            torch.tensor(part, dtype=torch.float32, device=CPU).view(shape) for part in zip(*rules, strict=True)
        )
        raised = (weights - lower) * scale
        own, other = (raised[:, 0], raised[:, 1]) if raised.dim() == 3 else raised.split(1, 1)
        torch.from_numpy(dense).add_(own * labels).add_(other * labels[partner])
    else:
        values, numbers = dense.reshape(-1), labels.tolist()
        row = 0
        for label, j, (less, times), (own, other) in zip(
            numbers, partner.tolist(), rules, weights.tolist(), strict=True
        ):
            label_j = numbers[j]
            if 0 <= label < classes:
                values[row + label] += (own - less) * times
            if 0 <= label_j < classes:
                values[row + label_j] += (other - less) * times
            row += classes
    targets = torch.from_numpy(dense)
    return targets.clamp_(max=1) if settings.clamp_targets else targets
