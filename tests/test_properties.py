"""What holds for every mix, over batches, grids, patches, dtypes and layouts that hypothesis makes up."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mix_helpers import (
    DTYPES,
    FLOATS,
    LAYOUTS,
    ULP,
    bits_equal,
    expand,
    generator,
    plain_targets,
    plain_weights,
    pooled_by_torchvision,
    random_boxes,
    random_images,
    reversed_batch,
)

from tokenmix_kernels import TokenMix, TopKMaps, pool_targets, token_mask, tokenmix

MASK_TYPES = ("block", "random", "cutmix")
MODES = ("batch", "pair", "elem")
SEEDS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def batches(draw, dtypes=DTYPES):
    """(images, patch): up to 7 images of 1, 3 or 4 channels on a grid of up to 64x64, at most 2**19 values an image."""
    patch = draw(st.sampled_from([4, 8, 14, 16, 32]))
    channels = draw(st.sampled_from([1, 3, 4]))
    longest = min(64, 512 // patch)
    grid_h = draw(st.integers(1, longest))
    grid_w = draw(st.integers(1, max(1, min(longest, 2**19 // (channels * patch * patch * grid_h)))))
    shape = (draw(st.integers(1, 7)), channels, grid_h * patch, grid_w * patch)
    images = random_images(
        shape, draw(st.sampled_from(dtypes)), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 99))
    )
    return images, patch


@st.composite
def partners(draw, batch):
    """None, or any partners: repeats, itself, not mutual."""
    if draw(st.booleans()):
        return None
    return torch.tensor(draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch)))


@given(st.data())
@settings(max_examples=120)
def test_tokens_come_whole_from_the_image_or_its_partner(data):
    images, patch = data.draw(batches())
    batch = len(images)
    partner = data.draw(partners(batch))
    labels = torch.randint(0, 9, (batch,), generator=generator())
    before = images.clone()
    mixed = tokenmix(
        images, labels, num_classes=9, partner=partner, patch_size=patch, seed=data.draw(SEEDS),
        mask_type=data.draw(st.sampled_from(["block", "random"])), mode=data.draw(st.sampled_from(MODES)),
        lam=data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, "beta"])), minimum_tokens=data.draw(st.integers(0, 20)),
        sample_offset=data.draw(st.integers(0, 2**40)),
    )  # fmt: skip
    assert bits_equal(images, before)
    others = reversed_batch(batch) if partner is None else partner
    assert bits_equal(mixed.images, torch.where(expand(mixed.mask, patch), before[others], before))
    area = mixed.mask.double().mean((1, 2)).float()
    torch.testing.assert_close(mixed.weights, torch.stack([1 - area, area], 1), atol=1e-6, rtol=0)
    expected = plain_targets(mixed.weights, labels, others, 9, 0.1)
    torch.testing.assert_close(mixed.targets, expected, atol=1e-6, rtol=0)


@given(st.data())
@settings(max_examples=80)
def test_a_rectangle_comes_from_the_partner(data):
    images, patch = data.draw(batches())
    batch = len(images)
    seed, mode = data.draw(SEEDS), data.draw(st.sampled_from(MODES))
    options = {"num_classes": 9, "patch_size": patch, "mask_type": "cutmix", "lam": "beta", "mode": mode, "seed": seed}
    labels = torch.arange(batch)
    mixed = tokenmix(images, labels, **options)
    # Where the pixels come from shows in zeros mixed with ones, drawn alike: samples of the two halves are partners.
    moved = []
    for n in range(batch):
        marks = torch.zeros(batch, 1, *images.shape[2:], dtype=torch.uint8)
        marks[batch - 1 - n] = 1
        own = batch - 1 - n == n
        moved.append(
            torch.zeros_like(marks[0], dtype=torch.bool) if own else tokenmix(marks, labels, **options).images[n] == 1
        )
    moved = torch.stack(moved)
    assert bits_equal(mixed.images, torch.where(moved, images.flip(0), images))
    for n in range(batch):
        if batch - 1 - n == n:
            continue
        one = moved[n, 0]
        assert torch.equal(one, one.any(1)[:, None] & one.any(0))
        assert abs(one.double().mean() - mixed.weights[n, 1]) < 1e-6


@given(st.data())
@settings(max_examples=60)
def test_in_place_and_into_out_equal_a_new_batch(data):
    images, patch = data.draw(batches())
    batch = len(images)
    order = data.draw(st.permutations(range(batch)))
    partner = torch.arange(batch)
    for one, other in zip(order[::2], order[1::2], strict=False):
        partner[one], partner[other] = other, one
    mix = TokenMix(
        mixup_alpha=data.draw(st.sampled_from([0.0, 0.8])), prob=data.draw(st.sampled_from([0.5, 1.0])),
        num_classes=batch, mode=data.draw(st.sampled_from(MODES)), mask_type=data.draw(st.sampled_from(MASK_TYPES)),
        lam="beta", patch_size=patch, minimum_tokens=3,
    )  # fmt: skip
    seed, labels = data.draw(SEEDS), torch.arange(batch)
    fresh, targets = mix(images, labels, partner=partner, seed=seed)
    out = random_images(tuple(images.shape), images.dtype, data.draw(st.sampled_from(LAYOUTS)), 7)
    into, into_targets = mix(images, labels, partner=partner, seed=seed, out=out)
    assert into is out and bits_equal(out, fresh) and torch.equal(targets, into_targets)
    # `images` may be a view of something larger, whose other values must stay.
    base = images._base if images._base is not None else images
    around = base.clone()
    inside, inside_targets = mix(images, labels, partner=partner, seed=seed, out=images)
    assert inside is images and bits_equal(images, fresh) and torch.equal(targets, inside_targets)
    images.copy_(random_images(tuple(images.shape), images.dtype, seed=1))
    changed = base.clone()
    view = changed.as_strided(images.shape, images.stride(), images.storage_offset())
    view.copy_(around.as_strided(images.shape, images.stride(), images.storage_offset()))
    assert bits_equal(changed, around)


@given(st.data())
@settings(max_examples=60)
def test_normalised_bytes_are_the_bytes_normalised(data):
    images, patch = data.draw(batches(dtypes=(torch.uint8,)))
    channels = images.shape[1]
    mean, std = [10.0, 120.5, 99.0, 1.25][:channels], [3.0, 57.5, 1.0, 128.0][:channels]
    options = {
        "num_classes": 9, "patch_size": patch, "mask_type": data.draw(st.sampled_from(MASK_TYPES)), "mode": "elem",
        "seed": data.draw(SEEDS),
    }  # fmt: skip
    dtype = data.draw(st.sampled_from(FLOATS))
    labels = torch.zeros(len(images), dtype=torch.int64)
    raw = tokenmix(images, labels, **options)
    got = tokenmix(images, labels, mean=mean, std=std, out_dtype=dtype, **options)
    shift, scale = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    expected = (raw.images.double() - shift) / scale
    torch.testing.assert_close(got.images.double(), expected, rtol=ULP[dtype] / 2 + 3 * ULP[torch.float32], atol=1e-6)
    assert torch.equal(got.mask, raw.mask)


@given(st.data())
@settings(max_examples=80)
def test_weights_are_roi_align_of_any_map_on_any_grid(data):
    batch = data.draw(st.integers(1, 6))
    size = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 64))
    grid = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 64))
    source = generator(data.draw(st.integers(0, 999)))
    partner = data.draw(partners(batch))
    labels = torch.randint(0, 5, (batch,), generator=source)
    every = torch.rand(batch, 5, *size, generator=source) ** 2
    boxes = random_boxes(batch, data.draw(st.integers(0, 999))) if data.draw(st.booleans()) else None
    mask = torch.rand(batch, *grid, generator=source) < data.draw(st.floats(0, 1))
    own = every[torch.arange(batch), labels]
    others = reversed_batch(batch) if partner is None else partner
    expected = plain_weights(pooled_by_torchvision(own, boxes, grid), mask, others)
    values, indices = every.sort(1, descending=True)
    for maps in (own, every, TopKMaps(values, indices), TopKMaps(values, indices.short())):
        weights = pool_targets(maps, labels, mask, boxes=boxes, partner=partner)
        torch.testing.assert_close(weights, expected, atol=2e-5, rtol=0)


@given(st.data())
@settings(max_examples=60)
def test_masks_do_not_depend_on_the_rest_of_the_batch(data):
    batch = data.draw(st.integers(2, 9))
    grid = data.draw(st.integers(1, 64)), data.draw(st.integers(1, 64))
    options = {
        "seed": data.draw(SEEDS), "mask_type": data.draw(st.sampled_from(MASK_TYPES)),
        "lam": data.draw(st.sampled_from([0.5, "beta"])),
    }  # fmt: skip
    start = data.draw(st.integers(0, 2**40))
    cut = data.draw(st.integers(1, batch - 1))
    whole = token_mask(batch, grid, sample_offset=start, **options)
    parts = [
        token_mask(cut, grid, sample_offset=start, **options),
        token_mask(batch - cut, grid, sample_offset=start + cut, **options),
    ]
    assert torch.equal(whole, torch.cat(parts))
    tokens = whole.sum((1, 2))
    if options["mask_type"] == "block" and options["lam"] == 0.5:
        count = grid[0] * grid[1]
        assert (tokens <= min(count, count // 2 + (count + 7) // 14)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@given(st.data())
@settings(max_examples=60)
def test_mixup_stays_between_its_images(dtype, data):
    images, patch = data.draw(batches(dtypes=(dtype,)))
    mix = TokenMix(mixup_alpha=0.6, cutmix_alpha=0.0, num_classes=7, patch_size=patch, mode="elem", label_smoothing=0.0)
    labels = torch.arange(len(images))
    out, targets = mix(images, labels, seed=data.draw(SEEDS))
    lam = targets.double()[labels, labels].view(-1, 1, 1, 1)
    middle = torch.arange(len(images)) == reversed_batch(len(images))
    lam[middle] = 1.0
    own, other = images.double(), images.flip(0).double()
    expected = lam * own + (1 - lam) * other
    size = lam * own.abs() + (1 - lam) * other.abs()
    assert (
        (out.double() - expected).abs() <= ULP[dtype] / 2 * expected.abs() + 4 * ULP[torch.float32] * size + 1e-7
    ).all()
    torch.testing.assert_close(targets.sum(1), torch.ones(len(images)), atol=1e-6, rtol=0)
