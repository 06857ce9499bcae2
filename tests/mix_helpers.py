"""Inputs for the tests of the mix, and slow plain versions of its parts to compare with."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

DATA = Path(__file__).parent / "data"
GOLDEN_CASES = ("full_block", "crop_block", "crop_random", "crop_block_k3_h14", "absent", "c21k")

# One unit in the last place of the dtype, relative.
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
FLOATS = tuple(ULP)
DTYPES = (*FLOATS, torch.uint8)


class Golden(NamedTuple):
    """One case of `official_targets.npz`; the mask is repeated for every sample."""

    values: Tensor
    indices: Tensor
    boxes: Tensor
    labels: Tensor
    mask: Tensor
    target: Tensor


def golden(case: str) -> Golden:
    with np.load(DATA / "official_targets.npz") as stored:
        names = ("values", "indices", "boxes_xyxy", "labels", "mask", "target")
        values, indices, boxes, labels, mask, target = (torch.from_numpy(stored[f"{case}/{name}"]) for name in names)
    return Golden(values, indices, boxes, labels, mask.bool().repeat(len(values), 1, 1), target)


def mask_stats() -> dict[str, Any]:
    return json.loads((DATA / "mask_stats.json").read_text())


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0
) -> Tensor:
    """Images of distinct-looking values, in one of the layouts that a user may hand over.

    Layouts: 'contiguous', 'channels_last', 'batch_slice' (every other image), 'spatial_slice' (a window of a larger
    image), 'transposed' (H and W swapped in memory), 'offset' (starts at an odd element, so nothing is aligned).
    """
    source = generator(seed)

    def fresh(*size: int) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(0, 256, size, dtype=torch.uint8, generator=source)
        return torch.randn(size, generator=source).to(dtype)

    b, c, h, w = shape
    if layout == "contiguous":
        return fresh(b, c, h, w)
    if layout == "channels_last":
        return fresh(b, h, w, c).permute(0, 3, 1, 2)
    if layout == "batch_slice":
        return fresh(2 * b, c, h, w)[::2]
    if layout == "spatial_slice":
        return fresh(b, c, h + 5, w + 3)[:, :, 2 : 2 + h, 3:]
    if layout == "transposed":
        return fresh(b, c, w, h).transpose(2, 3)
    assert layout == "offset"
    return fresh(b * c * h * w + 1)[1:].view(b, c, h, w)


LAYOUTS = ("contiguous", "channels_last", "batch_slice", "spatial_slice", "transposed", "offset")


def numbered_images(shape: tuple[int, ...]) -> Tensor:
    """Images whose every value is its own position in the batch, as float32 (exact below 2**24)."""
    count = int(np.prod(shape))
    assert count < 2**24
    return torch.arange(count, dtype=torch.float32).view(shape)


def random_boxes(batch: int, seed: int = 0) -> Tensor:
    """Boxes (x0, y0, x1, y1): ordinary ones, tiny ones, ones at the border, and the whole image."""
    rng = np.random.default_rng(seed)
    boxes = np.empty((batch, 4), np.float32)
    for n in range(batch):
        size = rng.uniform(0.2, 0.9, 2) if n % 4 else rng.uniform(1e-4, 2e-2, 2)
        low = rng.uniform(0, 1 - size)
        if n % 5 == 1:
            low = np.array([0.0, 1.0 - size[1]])
        elif n % 5 == 2:
            low = np.array([1.0 - size[0], 0.0])
        boxes[n] = *low, *np.minimum(low + size, 1.0)
    boxes[-1] = 0, 0, 1, 1
    return torch.from_numpy(boxes)


def expand(mask: Tensor, patch: int) -> Tensor:
    """Token masks [B, Gh, Gw] as pixels [B, 1, H, W]."""
    return mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]


def reversed_batch(batch: int) -> Tensor:
    return torch.arange(batch - 1, -1, -1)


def pooled_by_torchvision(own: Tensor, boxes: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """The own-label maps [B, h, w] on the token grid, by `torchvision.ops.roi_align`, one image at a time."""
    size = torch.tensor([own.shape[2], own.shape[1]] * 2, dtype=torch.float32)
    pooled = []
    for n, one in enumerate(own.float()):
        box = torch.tensor([0.0, 0.0, 1.0, 1.0]) if boxes is None else boxes[n].float()
        # A box in map cells; the half cell is what the published code takes off before it calls roi_align.
        region = (box * size - 0.5)[None]
        pooled.append(roi_align(one[None, None], [region], grid, aligned=False)[0, 0])
    return torch.stack(pooled)


def plain_weights(pooled: Tensor, mask: Tensor, partner: Tensor) -> Tensor:
    """Weights [B, 2] from pooled maps [B, Gh, Gw]: eq. 5 and 6 of the paper, the area share without evidence."""
    rows = []
    for n, taken in enumerate(mask.double()):
        row = []
        for source, share in ((n, 1 - taken), (int(partner[n]), taken)):
            evidence = pooled[source].double()
            total = evidence.sum()
            row.append((evidence * share).sum() / (total + 1e-8) if total > 0 else share.mean())
        rows.append(torch.stack(row))
    return torch.stack(rows).float()


def plain_targets(weights: Tensor, labels: Tensor, partner: Tensor, classes: int, smoothing: float) -> Tensor:
    """TokenMix targets, one label at a time: w - eps/2 + eps/(2K) for each side, everything else eps/(2K), summed."""
    dense = torch.full((len(labels), classes), smoothing / classes, dtype=torch.float64)
    for n in range(len(labels)):
        dense[n, labels[n]] += weights[n, 0].item() - smoothing / 2
        dense[n, labels[partner[n]]] += weights[n, 1].item() - smoothing / 2
    return dense.float()


def bits_equal(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit (so that a NaN equals itself and 0.0 is not -0.0)."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    as_integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.contiguous().view(as_integer), other.contiguous().view(as_integer))
