"""Activation maps pooled over the mask, in PyTorch on the CPU. Beside `kernels/evidence.py`.

Products and sums are in float64: neither autocast, nor the precision of float32 products, nor the number of threads
changes a result beyond the last bits of float32.
"""

import numpy as np
import torch
from torch import Tensor

from ..inputs import Evidence
from .draw import CPU, counting

__all__ = ["pool", "pool_tokens"]

MOST_AT_ONCE = 4096  # maps that are pooled together
MOST_SAMPLES = 64.0  # of a map along one axis of a token


def own_map(evidence: Evidence, labels: Tensor) -> Tensor:
    """The activation map of each image's own label, [B, h, w] float64; zeros where the label or the id is absent.

    Of equal top-k indices the last counts.
    """
    assert evidence.maps is not None
    maps, indices = evidence.maps, evidence.indices
    listed = None
    if evidence.ids is not None:
        ids = evidence.ids.to(maps.device, torch.int64)
        listed = (ids >= 0) & (ids < len(maps))
        ids = torch.where(listed, ids, 0)
        if maps.dim() == 4 and indices is None:  # of all classes, one is read
            known = (labels >= 0) & (labels < maps.shape[1])
            maps = maps[ids, labels.clamp(0, maps.shape[1] - 1).to(maps.device)]
            listed = listed & known.to(maps.device)
        else:
            maps, indices = maps[ids], None if indices is None else indices[ids]
    maps = maps.to(CPU)
    if indices is not None:
        own = torch.zeros(len(maps), *maps.shape[2:], dtype=torch.float64, device=CPU)
        for values, classes in zip(maps.unbind(1), indices.to(CPU).unbind(1), strict=True):
            own = torch.where(classes == labels[:, None, None], values.double(), own)
    elif maps.dim() == 4:
        known = (labels >= 0) & (labels < maps.shape[1])
        chosen = maps[counting(len(maps)), labels.clamp(0, maps.shape[1] - 1)]
        own = torch.where(known[:, None, None], chosen.double(), 0.0)
    else:
        own = maps.double()
    return own if listed is None else torch.where(listed.to(CPU)[:, None, None], own, 0.0)


def corners(evidence: Evidence, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, y0, x1, y1), each [B] float32, from the boxes in their format; the whole map without boxes."""
    if evidence.boxes is None:
        zeros = torch.zeros(batch, dtype=torch.float32, device=CPU)
        return zeros, zeros, zeros + 1, zeros + 1
    a, b, c, d = evidence.boxes.to(CPU, torch.float32).unbind(1)
    if evidence.box_format == "xyxy":
        return a, b, c, d
    if evidence.box_format == "crop":
        return b, a, b + d, a + c
    return a, b, a + c, b + d


def resample(low: Tensor, high: Tensor, size: int, grid: int) -> Tensor:
    """Weights [B, grid, size] float64 with which `roi_align` averages a map's axis over the grid's cells.

    `low` and `high` [B] are the box's relative ends on that axis. torchvision's rule with aligned=False and an adaptive
    sampling ratio: box * size - 0.5, at least one map cell long, ceil(extent / grid) samples in each cell.
    """
    extent = torch.clamp((high - low) * size, min=1.0)
    first = low * size - 0.5
    cell = extent / grid
    samples = torch.ceil(cell).nan_to_num(1.0).clamp(max=MOST_SAMPLES)  # [B]
    weights = torch.zeros(len(low), grid, size, dtype=torch.float64, device=CPU)
    cells, positions = counting(grid).float(), counting(size).float()
    for s in range(int(samples.max())):
        at = first[:, None] + (cells + ((s + 0.5) / samples)[:, None]) * cell[:, None]  # [B, grid]
        used = (at >= -1.0) & (at <= size) & (s < samples)[:, None]
        at = torch.clamp(at, 0.0, size - 1.0)
        distance = (at[:, :, None] - positions).abs()
        weights += torch.where(used[:, :, None], torch.clamp(1 - distance, min=0.0), 0.0)
    return weights / samples[:, None, None]


def resample_affine(maps: Tensor, affines: Tensor, grid_h: int, grid_w: int) -> Tensor:
    """Maps [B, h, w] averaged over the tokens that affines [B, 2, 3] take into them, by the rule of `resample`.

    Output (u, v) in [0, 1]^2 shows (x, y) = affine (u, v, 1) of the map; a token's side is sampled as often as it is
    map cells long.
    """
    height, width = maps.shape[1:]
    flat = maps.flatten(1)
    (a, b, c), (d, e, f) = (row.unbind(1) for row in affines.to(CPU).unbind(1))
    across = torch.clamp(torch.maximum(a.abs() * width, d.abs() * height), min=1.0) / grid_w
    down = torch.clamp(torch.maximum(b.abs() * width, e.abs() * height), min=1.0) / grid_h
    across, down = (torch.ceil(n).nan_to_num(1.0).clamp(max=MOST_SAMPLES)[:, None, None] for n in (across, down))
    a, b, c, d, e, f = (value[:, None, None] for value in (a, b, c, d, e, f))
    columns, rows = counting(grid_w).float(), counting(grid_h).float()[:, None]
    total = torch.zeros(len(maps), grid_h, grid_w, dtype=torch.float64, device=CPU)
    for t in range(int(down.max())):
        v = (rows + (t + 0.5) / down) / grid_h
        for s in range(int(across.max())):
            u = (columns + (s + 0.5) / across) / grid_w
            x = (a * u + b * v + c) * width - 0.5  # [B, Gh, Gw]
            y = (d * u + e * v + f) * height - 0.5
            used = (x >= -1.0) & (x <= width) & (y >= -1.0) & (y <= height) & (s < across) & (t < down)
            x, y = x.nan_to_num().clamp(0.0, width - 1.0), y.nan_to_num().clamp(0.0, height - 1.0)
            left, top = x.long(), y.long()
            right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
            x, y = x - left.float(), y - top.float()
            near_top, far_top, near_bottom, far_bottom = (
                flat.gather(1, (q * width + p).flatten(1)).view_as(total) for q in (top, bottom) for p in (left, right)
            )
            upper, lower = near_top + x * (far_top - near_top), near_bottom + x * (far_bottom - near_bottom)
            total += torch.where(used, upper + y * (lower - upper), 0.0)
    return total / (across * down)


def pool_box(own: Tensor, evidence: Evidence, grid: tuple[int, int]) -> Tensor:
    """Maps [B, h, w] averaged over the tokens of the grid on their boxes, mirrored where flipped: [B, Gh, Gw]."""
    x0, y0, x1, y1 = corners(evidence, len(own))
    rows = resample(y0, y1, own.shape[1], grid[0])
    columns = resample(x0, x1, own.shape[2], grid[1])
    pooled = rows @ own @ columns.transpose(1, 2)
    if evidence.flips is None:
        return pooled
    return torch.where(evidence.flips.to(CPU)[:, None, None], pooled.flip(2), pooled)


def pool_tokens(evidence: Evidence, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The activation map of each image's own label on its token grid, [B, Gh, Gw] float64 on the CPU, not normalised.

    Args:
        evidence: with maps.
        labels: [B] int64 on the CPU.
        grid: (Gh, Gw).
    """
    own = own_map(evidence, labels)
    if evidence.affines is not None:
        return resample_affine(own, evidence.affines, *grid)
    return pool_box(own, evidence, grid)


def pool(
    evidence: Evidence, labels: Tensor, partner: Tensor, taken: Tensor, visible: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The share of its evidence that each image of a pair keeps, [B, 2] float64 (own, partner): eq. 5 and 6.

    `taken` [B, Gh, Gw] float64 is the share of each token that comes from the partner, `visible` of the same shape the
    share of an image's own token that is not erased: all of it where it is None. An image without evidence (its
    sum is not a positive number) has its share of the area.

    Labels [B, K] beside maps of several classes: [B, 2, K], see `pool_classes`.
    """
    shares = areas(taken) if visible is None else kept(visible, partner, taken) / both(visible.sum((1, 2)), partner)
    if evidence.maps is None:
        return shares
    if labels.dim() == 2 and evidence.maps.dim() == 4:
        return pool_classes(evidence, labels, partner, taken, visible, shares)
    pooled = pool_tokens(evidence, labels, (taken.shape[1], taken.shape[2]))
    if visible is not None:
        pooled = pooled * visible
    total = both(pooled.sum((1, 2)), partner)
    return torch.where((total > 0) & (total < torch.inf), kept(pooled, partner, taken) / (total + 1e-8), shares)


def both(values: Tensor, partner: Tensor) -> Tensor:
    """A value [B] of each image and of its partner, [B, 2]."""
    return torch.stack([values, values[partner]], 1)


def kept(pooled: Tensor, partner: Tensor, taken: Tensor) -> Tensor:
    """What each image of a pair keeps of values of its tokens [B, Gh, Gw], [B, 2]."""
    return torch.stack([pooled * (1 - taken), pooled[partner] * taken], 1).sum((2, 3))


def pool_classes(
    evidence: Evidence, labels: Tensor, partner: Tensor, taken: Tensor, visible: Tensor | None, area: Tensor
) -> Tensor:  # fmt: skip
    """`pool` for each class of labels [B, K], by its own map: [B, 2, K] float64.

    Maps of classes whose label is 0 are not read: they have the share of the `area` [B, 2].
    """
    weights = area[:, :, None].repeat(1, 1, labels.shape[1])
    grid = (taken.shape[1], taken.shape[2])
    for side, (source, share) in enumerate(((counting(len(labels)), 1 - taken), (partner, taken))):
        found = labels[source].nonzero()  # [n, 2]
        for rows, classes in (part.unbind(1) for part in found.split(MOST_AT_ONCE) if len(part)):
            pooled = pool_tokens(of_images(evidence, source[rows]), classes, grid)
            if visible is not None:
                pooled = pooled * visible[source[rows]]
            total, kept = pooled.sum((1, 2)), (pooled * share[rows]).sum((1, 2))
            known = (total > 0) & (total < torch.inf)
            weights[rows, side, classes] = torch.where(known, kept / (total + 1e-8), area[rows, side])
    return weights


def of_images(evidence: Evidence, images: Tensor) -> Evidence:
    """The evidence of the images with these places in the batch, which may repeat."""

    def each(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[images.to(value.device)]

    return evidence._replace(
        ids=images if evidence.ids is None else each(evidence.ids),
        boxes=each(evidence.boxes),
        flips=each(evidence.flips),
        affines=each(evidence.affines),
    )


def areas(taken: Tensor) -> Tensor:
    """The share of the area that each image of a pair has, [B, 2] float64."""
    count = taken.shape[1] * taken.shape[2]
    shares = np.empty((taken.shape[0], 2))
    shares[:, 1] = taken.numpy().reshape(-1, count).sum(1)
    shares[:, 0] = count - shares[:, 1]
    return torch.from_numpy(shares / count)
