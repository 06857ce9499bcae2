"""What a trained model is measured by, on images that took no part in training or in selecting it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmix_kernels import token_mask

__all__ = ["OCCLUDED", "evidence_first", "occlusion", "replace_tokens", "scores"]

OCCLUDED = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # shares of the tokens that are blanked
BINS = 15  # of the calibration error, as in Guo et al., arXiv 1706.04599

Predict = Callable[[Tensor], Tensor]


def scores(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Scores of logits [N, K] for labels [N].

    Returns:
        `top1` and `balanced` accuracy (mean of the classes' recalls) in percent, `nll` in nats, `ece`, the expected
        calibration error over 15 bins of equal width in percent, and `confusion` [K, K], label by prediction.
    """
    logits = logits.double()
    confidence, predicted = logits.softmax(1).max(1)
    hits = (predicted == labels).double()
    classes = logits.shape[1]
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((labels, predicted), torch.tensor(1), accumulate=True)
    counts = confusion.sum(1)
    recalls = confusion.diagonal()[counts > 0] / counts[counts > 0]
    bins = (confidence * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # (0, 1/15], (1/15, 2/15], ...
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, confidence - hits)
    return {
        "top1": 100 * hits.mean().item(),
        "balanced": 100 * recalls.mean().item(),
        "nll": F.cross_entropy(logits, labels).item(),
        "ece": 100 * (gaps.abs().sum() / len(labels)).item(),
        "confusion": confusion.tolist(),
    }


def replace_tokens(images: Tensor, others: Tensor, mask: Tensor) -> Tensor:
    """images where mask [N, GH, GW] is False, others where it is True, token by token."""
    patch = images.shape[-1] // mask.shape[-1]
    pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]  # [N, 1, H, W]
    return torch.where(pixels, others, images)


def evidence_first(evidence: Tensor, count: int) -> Tensor:
    """[N, GH, GW] bool, the `count` tokens with the most evidence [N, GH, GW] of each image."""
    chosen = evidence.flatten(1).topk(count).indices
    return torch.zeros(evidence.flatten(1).shape, dtype=torch.bool).scatter_(1, chosen, True).view(evidence.shape)


def occlusion(
    predict: Predict,
    images: Tensor,
    labels: Tensor,
    grid: int,
    evidence: Tensor | None = None,
    shares: Sequence[float] = OCCLUDED,
) -> dict[str, list[float]]:
    """Top-1 in percent after a share of the tokens was set to the mean colour (Naseer et al., arXiv 2105.10497).

    Args:
        predict: normalised images [N, 3, S, S] to logits [N, K].
        images: normalised images [N, 3, S, S], so that 0 is the mean colour.
        labels: [N].
        grid: tokens at a side.
        evidence: [N, grid, grid], if there is a teacher.
        shares: of the tokens, in (0, 1).

    Returns:
        Lists over the shares: `random`, with tokens drawn at random, and, where evidence is given, `evidence`, with
        those with the most of it.
    """
    tokens = grid * grid
    orders = ("random",) if evidence is None else ("random", "evidence")
    curves: dict[str, list[float]] = {order: [] for order in orders}
    for share in shares:
        count = round(share * tokens)
        lam = 1 - count / tokens
        masks = {"random": token_mask(len(images), (grid, grid), lam=lam, minimum_tokens=0, mask_type="random", seed=1)}
        if evidence is not None:
            masks["evidence"] = evidence_first(evidence, count)
        for name, mask in masks.items():
            predicted = predict(replace_tokens(images, torch.zeros_like(images), mask)).argmax(1)
            curves[name].append(100 * (predicted == labels).double().mean().item())
    return curves
