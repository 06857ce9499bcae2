"""Where an image finds its evidence in a map: ids, flips and affines, against warping the map explicitly."""

import math

import pytest
import torch
import torch.nn.functional as F
from mix_helpers import random_boxes

from tokenmix_kernels import pool_targets, token_mask

TOLERANCE = 2e-6


def warped(one: torch.Tensor, affine: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A map [h, w] on the token grid: sampled by torch's grid_sample at every point of the rule, then averaged."""
    h, w = one.shape
    (a, b, _), (d, e, _) = affine.tolist()
    across = math.ceil(max(abs(a) * w, abs(d) * h, 1) / grid[1])
    down = math.ceil(max(abs(b) * w, abs(e) * h, 1) / grid[0])
    v, u = torch.meshgrid(
        (torch.arange(grid[0] * down) + 0.5) / (grid[0] * down),
        (torch.arange(grid[1] * across) + 0.5) / (grid[1] * across),
        indexing="ij",
    )
    points = torch.stack([u, v, torch.ones_like(u)], -1).double() @ affine.double().T  # [.., 2], x and y in [0, 1]
    cells = points * torch.tensor([w, h]) - 0.5
    inside = ((cells >= -1) & (cells <= torch.tensor([w, h]))).all(-1)
    sampled = F.grid_sample(one.double()[None, None], points[None] * 2 - 1, padding_mode="border", align_corners=False)[
        0, 0
    ]
    return (sampled * inside).view(grid[0], down, grid[1], across).mean((1, 3)).float()


def weights_of(pooled: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    share = pooled / pooled.sum((1, 2), keepdim=True)
    weights = torch.stack([(share * ~mask).sum((1, 2)), (share.flip(0) * mask).sum((1, 2))], 1)
    # A crop that lies beside its map shows no evidence: then it is the area that counts.
    areas = torch.stack([(~mask).float().mean((1, 2)), mask.float().mean((1, 2))], 1)
    return torch.where(weights.isnan(), areas, weights)


@pytest.mark.parametrize("grid", [(14, 14), (4, 6)])
@pytest.mark.parametrize("size", [(18, 18), (7, 9)])
def test_affines_are_warped_maps(grid, size):
    torch.manual_seed(0)
    batch = 24
    maps = torch.rand(batch, *size)
    turn = torch.rand(batch) * 2 - 1
    affines = torch.zeros(batch, 2, 3)
    affines[:, 0] = torch.stack([turn.cos(), -turn.sin(), 0.5 * turn], 1)
    affines[:, 1] = torch.stack([turn.sin(), turn.cos(), -0.4 * turn], 1)
    affines[:, :, :2] *= torch.rand(batch, 1, 1) + 0.2
    affines[: batch // 2] += 0.2 * torch.randn(batch // 2, 2, 3)
    mask = token_mask(batch, grid, seed=1, minimum_tokens=2)
    expected = weights_of(torch.stack([warped(m, a, grid) for m, a in zip(maps, affines, strict=True)]), mask)
    got = pool_targets(maps, torch.zeros(batch).long(), mask, affines=affines)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)


def test_an_affine_can_say_box_and_flip():
    torch.manual_seed(1)
    boxes, flips = random_boxes(20), torch.rand(20) < 0.5
    # Tiny boxes are the one case that differs: roi_align stretches them to one cell of the map.
    boxes = boxes[(boxes[:, 2:] - boxes[:, :2]).amin(1) > 0.2]
    flips, batch = flips[: len(boxes)], len(boxes)
    maps, labels = torch.rand(batch, 7, 9), torch.zeros(batch).long()
    x0, y0, x1, y1 = boxes.unbind(1)
    none = torch.zeros(batch)
    across = torch.where(flips, x0 - x1, x1 - x0)
    affines = torch.stack(
        [torch.stack([across, none, torch.where(flips, x1, x0)], 1), torch.stack([none, y1 - y0, y0], 1)], 1
    )
    mask = token_mask(batch, (5, 6), seed=2, minimum_tokens=2)
    by_box = pool_targets(maps, labels, mask, boxes=boxes, flips=flips)
    by_affine = pool_targets(maps, labels, mask, affines=affines)
    torch.testing.assert_close(by_box, by_affine, rtol=0, atol=TOLERANCE)


def test_flips_are_flipped_maps_and_mirrored_boxes():
    torch.manual_seed(2)
    maps, labels, boxes = torch.rand(12, 7, 9), torch.zeros(12).long(), random_boxes(12)
    x0, y0, x1, y1 = boxes.unbind(1)
    mask = token_mask(12, (5, 6), seed=3, minimum_tokens=2)
    got = pool_targets(maps, labels, mask, boxes=boxes, flips=torch.ones(12, dtype=torch.bool))
    mirrored = torch.stack([1 - x1, y0, 1 - x0, y1], 1)
    large = (boxes[:, 2:] - boxes[:, :2]).amin(1) > 0.2
    expected = pool_targets(maps.flip(2), labels, mask, boxes=mirrored.clamp(0, 1))
    both = large & large.flip(0)
    assert both.any()
    torch.testing.assert_close(got[both], expected[both], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_are_rows_of_maps_and_bytes_need_no_scale(dtype):
    torch.manual_seed(3)
    maps = torch.randint(0, 256, (50, 6, 6), dtype=torch.uint8)
    ids = torch.randint(0, 50, (9,))
    labels, mask = torch.zeros(9).long(), token_mask(9, (4, 4), seed=4, minimum_tokens=1)
    got = pool_targets(maps, labels, mask, ids=ids.to(dtype))
    expected = pool_targets(maps[ids].float() * 0.0123, labels, mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
