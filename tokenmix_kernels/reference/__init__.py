"""The mix in pure PyTorch: what the operators compute on a CPU, and what every kernel is compared with.

Files and functions have the names and the order of those in `kernels/`.
"""

import numpy as np
import torch
from torch import Tensor

from ..inputs import Evidence, Result
from ..settings import MIXUP, Settings
from .attention import attention_targets
from .draw import CPU, Draw, draw, partner_of
from .erasing import draw_rectangles, erase_pixels
from .evidence import pool, pool_tokens
from .pixels import mix_pixels, mutual, swap_pixels
from .targets import as_labels, row_weights, taken_share, visible_share, write_targets, write_weights

__all__ = ["Draw", "attention_targets", "draw", "mix", "pool_targets", "pool_tokens", "token_mask"]


def mix(
    images: Tensor,
    out: Tensor,
    labels: Tensor,
    partner: Tensor | None,
    evidence: Evidence,
    mask: Tensor | None,
    seed: Tensor,
    sample_offset: int,
    settings: Settings,
) -> Result:
    """Mix a batch into `out`, in place where that is `images`; partners must then be mutual."""
    device = images.device
    labels = as_labels(labels)
    pairs = partner_of(partner, images.shape[0])
    key, size = int(seed), (images.shape[2], images.shape[3])
    drawn = draw(key, sample_offset, pairs, mask, *size, settings)
    rectangles = None
    if settings.erase_prob > 0:
        rectangles = draw_rectangles(key, sample_offset, images.shape[0], *size, settings)
    # Before the pixels, which push all else out of the cache.
    visible = None
    if rectangles is not None and settings.erase_evidence:
        visible = visible_share(rectangles, (drawn.mask.shape[1], drawn.mask.shape[2]), settings.patch_size)
    weights = write_weights(evidence, labels, pairs, drawn, visible, settings)
    targets = write_targets(weights, labels, pairs, drawn, settings)
    weights = row_weights(weights, labels, pairs)
    before, others = images, pairs
    if out is images:
        if rectangles is not None and MIXUP in drawn.kind:
            before = images.clone()
        others = mutual(pairs)
        swap_pixels(images, others, drawn, settings)
    else:
        mix_pixels(images, out, pairs, drawn, settings)
    if rectangles is not None:
        erase_pixels(before, out, others, drawn, rectangles, key, sample_offset, settings)
    kind = torch.from_numpy(np.array(drawn.kind, np.uint8))
    mask = taken_share(drawn, settings).float() if settings.shares else drawn.mask
    result = Result(targets, mask, weights, kind)
    return result if device.type == "cpu" else Result(*(part.to(device) for part in result))


def token_mask(batch: int, grid: tuple[int, int], seed: Tensor, sample_offset: int, settings: Settings) -> Tensor:
    """Masks alone, [B, Gh, Gw] bool."""
    height, width = (side * settings.patch_size for side in grid)
    return draw(int(seed), sample_offset, partner_of(None, batch), None, height, width, settings).mask


def pool_targets(evidence: Evidence, labels: Tensor, mask: Tensor, partner: Tensor | None) -> Tensor:
    """Weights alone, [B, 2] fp32 (own, partner), for masks that are already there."""
    pairs = partner_of(partner, len(mask))
    labels = as_labels(labels)
    return row_weights(pool(evidence, labels, pairs, mask.to(CPU).double()).float(), labels, pairs)
