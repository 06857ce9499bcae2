"""Weights and targets against the published code's numbers, torchvision's roi_align and plain loops."""

import math

import pytest
import torch
from mix_helpers import (
    DTYPES,
    GOLDEN_CASES,
    bits_equal,
    generator,
    golden,
    plain_targets,
    plain_weights,
    pooled_by_torchvision,
    random_boxes,
    random_images,
    reversed_batch,
)

from tokenmix_kernels import TopKMaps, pool_targets, tokenmix
from tokenmix_kernels.reference import Draw
from tokenmix_kernels.reference.targets import write_targets
from tokenmix_kernels.settings import MASK_RULES, Settings


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_targets_reproduce_the_published_code(case):
    """To 1e-5, but for sides without evidence: there the published weight is 0 and ours is the share of the area."""
    g = golden(case)
    batch, classes = g.target.shape
    images = torch.zeros(batch, 3, 224, 224)
    maps = TopKMaps(g.values, g.indices)
    mixed = tokenmix(images, g.labels, num_classes=classes, maps=maps, boxes=g.boxes, mask=g.mask)

    partner = reversed_batch(batch)
    own = torch.where(g.indices == g.labels[:, None, None, None], g.values.float(), 0.0).sum(1)
    blind = pooled_by_torchvision(own, g.boxes, (14, 14)).sum((1, 2)) <= 0
    assert blind.sum() == {"absent": batch // 2}.get(case, 0)
    expected = g.target.clone()
    taken = g.mask[0].float().mean()
    for n in range(batch):
        if blind[n]:
            expected[n, g.labels[n]] += 1 - taken
        if blind[partner[n]]:
            expected[n, g.labels[partner[n]]] += taken
    torch.testing.assert_close(mixed.targets, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(mixed.weights[blind, 0], (1 - taken).expand(int(blind.sum())), atol=1e-6, rtol=0)
    assert mixed.targets.min() > -0.05
    assert torch.equal(mixed.weights, pool_targets(maps, g.labels, g.mask, boxes=g.boxes))


def random_maps(batch, form, labels, size, source):
    """Maps of one form, and the own-label map [B, h, w] that is in them."""
    classes, k = 7, 4
    every = torch.rand(batch, classes, *size, generator=source) ** 3
    own = every[torch.arange(batch), labels]
    if form == "own":
        return own, own
    if form == "all":
        return every, own
    values, indices = every.topk(k, 1)
    kept = torch.where(indices == labels[:, None, None, None], values, 0.0).sum(1)
    return TopKMaps(values, indices), kept


@pytest.mark.parametrize("form", ["own", "all", "topk"])
@pytest.mark.parametrize(
    "size, grid", [((18, 18), (14, 14)), ((7, 7), (14, 14)), ((5, 9), (4, 3)), ((64, 33), (6, 11)), ((1, 1), (3, 5))]
)
@pytest.mark.parametrize("boxed", [False, True])
def test_pooling_is_roi_align(form, size, grid, boxed):
    batch = 40
    source = generator(size[0])
    labels = torch.randint(0, 7, (batch,), generator=source)
    maps, own = random_maps(batch, form, labels, size, source)
    boxes = random_boxes(batch) if boxed else None
    mask = torch.rand(batch, *grid, generator=source) < 0.5
    partner = torch.randint(0, batch, (batch,), generator=source)
    weights = pool_targets(maps, labels, mask, boxes=boxes, partner=partner)
    expected = plain_weights(pooled_by_torchvision(own, boxes, grid), mask, partner)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)


def test_pooling_is_roi_align_token_by_token():
    # Masks of one token each read the normalised map off, one number at a time.
    box = torch.tensor([0.13, 0.4, 0.71, 0.93])
    own = torch.rand(9, 11, generator=generator(1))
    tokens = torch.eye(20, dtype=torch.bool).view(20, 4, 5)
    maps, boxes = own.expand(20, 9, 11).contiguous(), box.repeat(20, 1)
    weights = pool_targets(maps, torch.zeros(20, dtype=torch.int64), tokens, boxes=boxes)
    pooled = pooled_by_torchvision(own[None], box[None], (4, 5))[0]
    torch.testing.assert_close(weights[:, 1], (pooled / pooled.sum()).flatten(), atol=1e-6, rtol=0)
    torch.testing.assert_close(weights[:, 0], 1 - weights[:, 1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32])
def test_map_and_index_dtypes(dtype, index_dtype):
    source = generator(2)
    values = torch.randint(0, 200, (6, 3, 5, 5), generator=source).to(dtype)
    indices = (
        torch.stack([torch.randperm(9, generator=source)[:3] for _ in range(150)]).T.reshape(3, 6, 5, 5).transpose(0, 1)
    )
    indices = indices.contiguous().to(index_dtype)
    labels = torch.arange(6)
    mask = torch.rand(6, 4, 4, generator=source) < 0.5
    own = torch.where(indices.long() == labels[:, None, None, None], values.float(), 0.0).sum(1)
    expected = plain_weights(pooled_by_torchvision(own, None, (4, 4)), mask, reversed_batch(6))
    torch.testing.assert_close(pool_targets(TopKMaps(values, indices), labels, mask), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("what", ["zeros", "negative", "nan", "inf", "absent"])
def test_maps_without_evidence_give_the_area_share(what):
    maps = torch.rand(5, 6, 6, generator=generator())
    maps[1] = {"zeros": 0.0, "negative": -maps[1], "nan": math.nan, "inf": math.inf, "absent": 0.0}[what]
    given = maps
    labels = torch.arange(5)
    if what == "absent":
        indices = labels[:, None, None, None].expand(5, 1, 6, 6).clone()
        indices[1] = 4
        given = TopKMaps(maps[:, None], indices)
    mask = torch.zeros(5, 4, 4, dtype=torch.bool)
    mask[:, :, 0] = True
    weights = pool_targets(given, labels, mask)
    assert weights[1, 0] == 0.75  # sample 1 itself
    assert weights[3, 1] == 0.25  # sample 1 as the partner of 3
    assert weights.isfinite().all()
    assert (weights[[0, 2, 4]] != 0.75).all() and (weights[[0, 2, 4]] != 0.25).all()


def packed_batch(values, indices, crops, labels):
    """The layout of TokenLabeling's label-map files."""
    packed = torch.zeros(len(values), 3, *values.shape[1:])
    packed[:, 0], packed[:, 1] = values.float(), indices.float()
    packed[:, 2, 0, 0, :4] = crops
    packed[:, 2, 0, 0, 5] = labels.float()
    return packed


@pytest.mark.parametrize("axes", ["correct", "published"])
def test_packed_label_maps(axes):
    batch = 6
    source = generator(4)
    indices = torch.randint(0, 3000, (batch, 5, 18, 18), generator=source)
    labels = torch.randint(2049, 3000, (batch,), generator=source)
    indices[:, 0] = labels[:, None, None]
    indices[:, 1:] %= 2048  # the label in the first plane alone
    values = torch.rand(batch, 5, 18, 18, generator=source)
    crops = (
        torch.rand(batch, 4, generator=source) * torch.tensor([0.4, 0.3, 0.5, 0.6]) + 0.05
    )  # top, left, height, width
    top, left, height, width = crops.unbind(1)
    if axes == "correct":
        boxes = torch.stack([left, top, left + width, top + height], 1)
    else:
        boxes = torch.stack([top, left, top + height, left + width], 1)
    images = random_images((batch, 3, 64, 96))
    given = tokenmix(images, packed_batch(values, indices, crops, labels), num_classes=3000, seed=9, crop_axes=axes)
    apart = tokenmix(images, labels, maps=TopKMaps(values, indices), boxes=boxes, num_classes=3000, seed=9)
    assert bits_equal(given.images, apart.images)
    assert torch.equal(given.mask, apart.mask)
    torch.testing.assert_close(given.weights, apart.weights, atol=1e-6, rtol=0)
    torch.testing.assert_close(given.targets, apart.targets, atol=1e-6, rtol=0)
    expected = plain_weights(pooled_by_torchvision(values[:, 0], boxes, (4, 6)), given.mask, reversed_batch(batch))
    torch.testing.assert_close(given.weights, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("mask_type", ["block", "random"])
def test_targets_are_the_papers(smoothing, mask_type):
    labels = torch.tensor([3, 0, 3, 1, 6])
    partner = torch.tensor([2, 4, 1, 3, 0])  # equal labels for the first, itself for the fourth
    maps = torch.rand(5, 8, 8, generator=generator(3))
    mixed = tokenmix(
        random_images((5, 1, 32, 48)), labels, num_classes=7, maps=maps, partner=partner, patch_size=8,
        mask_type=mask_type, label_smoothing=smoothing, mode="elem", seed=2,
    )  # fmt: skip
    expected = plain_weights(pooled_by_torchvision(maps, None, (4, 6)), mixed.mask, partner)
    torch.testing.assert_close(mixed.weights, expected, atol=1e-5, rtol=0)
    dense = plain_targets(mixed.weights, labels, partner, 7, smoothing)
    torch.testing.assert_close(mixed.targets, dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [-1, 3, 99])
def test_a_label_out_of_range_adds_nothing(bad):
    """As on a GPU, where values are not looked at; on a CPU the operators refuse it before."""
    drawn = Draw(
        [MASK_RULES["block"].kind] * 2, [32768] * 2, torch.zeros(2, 1, 1, dtype=torch.bool), [0] * 2,
        [(0, 0, 0, 0)] * 2,
    )  # fmt: skip
    weights, partner = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([1, 0])
    settings = Settings(num_classes=3, patch_size=8, label_smoothing=0.3)
    targets = write_targets(weights, torch.tensor([bad, 1]), partner, drawn, settings)
    expected = torch.tensor([[0.1, 0.75 - 0.15 + 0.1, 0.1], [0.1, 0.5 - 0.15 + 0.1, 0.1]])
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-6)
