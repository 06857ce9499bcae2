"""TokenMix (arXiv 2207.08409) in plain loops: the oracle of the tests and the published approach of the benches.

Nothing here is fast or shared with the rest of the package. A mask is True where a token comes from the partner; `lam`
is the share kept of the own image; `partner` [B] holds the index of each image's partner.
"""

import math
import random

import torch
from torch import Tensor

__all__ = ["blended", "block_mask", "mixed", "pooled", "published_mix", "targets", "weights"]


def block_mask(grid: tuple[int, int], tokens: int, source: random.Random) -> Tensor:
    """Draw a mask [Gh, Gw] bool as the published code does: rectangles until `tokens` tokens are masked."""
    mask = torch.zeros(grid, dtype=torch.bool)
    remaining, failures = tokens, 0
    while remaining > 0 and failures < 10:
        area = source.uniform(1, remaining)
        aspect = math.exp(source.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if h < grid[0] and w < grid[1]:
            top, left = source.randint(0, grid[0] - h), source.randint(0, grid[1] - w)
            new = h * w - int(mask[top : top + h, left : left + w].sum())
            if 0 < new <= remaining:
                mask[top : top + h, left : left + w] = True
                remaining, failures = remaining - new, 0
    return mask


def mixed(images: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """Replace the masked tokens of images [B, C, H, W] by the partner's, in a copy. mask [B, Gh, Gw]."""
    result = images.clone()
    height, width = images.shape[2] // mask.shape[1], images.shape[3] // mask.shape[2]  # of a token
    for i, row, column in mask.nonzero().tolist():
        y, x = slice(row * height, (row + 1) * height), slice(column * width, (column + 1) * width)
        result[i, :, y, x] = images[partner[i], :, y, x]
    return result


def blended(images: Tensor, lam: Tensor, partner: Tensor) -> Tensor:
    """Compute Mixup in float64: lam * own + (1 - lam) * partner. images [B, C, H, W], lam [B]."""
    return torch.stack([lam[i] * own.double() + (1 - lam[i]) * images[partner[i]] for i, own in enumerate(images)])


def pooled(maps: Tensor, boxes: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Sample maps [B, h, w] or [B, K, h, w] on the token grid, [B, Gh, Gw] or [B, K, Gh, Gw], by roi_align.

    boxes [B, 4] are crops (x0, y0, x1, y1) as shares of the image; None is the whole image.
    """
    from torchvision.ops import roi_align

    stacked = maps.float().reshape(len(maps), -1, *maps.shape[-2:])  # [B, 1 or K, h, w]
    corners = stacked.new_tensor([[0.0, 0.0, 1.0, 1.0]] * len(maps)) if boxes is None else boxes.float()
    # The published code takes half a map cell off each corner.
    corners = corners * stacked.new_tensor([maps.shape[-1], maps.shape[-2]] * 2) - 0.5
    return roi_align(stacked, list(corners[:, None]), grid, aligned=False).reshape(*maps.shape[:-2], *grid)


def weights(evidence: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """Weigh own image and partner, [B, 2], by the share of their evidence [B, Gh, Gw] that is shown (eq. 5 and 6).

    An image whose evidence does not sum to more than 0 is weighed by its share of the area.
    """
    result = torch.zeros(len(mask), 2, dtype=torch.float64)
    for i, taken in enumerate(mask.double()):
        for side, source, shown in ((0, i, 1 - taken), (1, int(partner[i]), taken)):
            own = evidence[source].double()
            result[i, side] = (own * shown).sum() / (own.sum() + 1e-8) if own.sum() > 0 else shown.mean()
    return result.float()


def targets(
    weights: Tensor, labels: Tensor, partner: Tensor, classes: int, smoothing: float, rule: str = "paper"
) -> Tensor:
    """Add both sides' smoothed labels, [B, K]: eps/(2K), plus w - eps/2 at the label (eq. 7; timm: w (1 - eps))."""
    result = torch.full((len(labels), classes), smoothing / classes, dtype=torch.float64)
    for i, pair in enumerate(weights.tolist()):
        for w, label in zip(pair, (labels[i], labels[partner[i]]), strict=True):
            result[i, label] += w * (1 - smoothing) if rule == "timm" else w - smoothing / 2
    return result.float()


def published_mix(
    images: Tensor, labels: Tensor, top: Tensor, indices: Tensor, boxes: Tensor | None, mask: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Mix a batch with its reverse in the tensor steps of the published code: (images [B, C, H, W], targets [B, K])."""
    pixels = mask.repeat_interleave(images.shape[2] // mask.shape[1], 1)
    pixels = pixels.repeat_interleave(images.shape[3] // mask.shape[2], 2)[:, None].to(images.dtype)  # [B, 1, H, W]
    dense = top.new_zeros(len(top), classes, *top.shape[2:]).scatter_(1, indices.long(), top)  # [B, K, h, w]
    own = pooled(dense, boxes, (mask.shape[1], mask.shape[2]))[range(len(labels)), labels]  # [B, Gh, Gw]
    own = own / (own.sum((1, 2), keepdim=True) + 1e-8)
    pair = torch.stack([(own * ~mask).sum((1, 2)), (own.flip(0) * mask).sum((1, 2))], 1)  # [B, 2]
    smoothed = own.new_full((len(labels), classes), 0.1 / classes)
    smoothed.scatter_add_(1, torch.stack([labels, labels.flip(0)], 1), pair - 0.05)
    return images * (1 - pixels) + images.flip(0) * pixels, smoothed
