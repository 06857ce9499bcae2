"""Where every pixel of a mix comes from, and what others got wrong."""

import math

import numpy as np
import pytest
import torch
from mix_helpers import (
    DTYPES,
    FLOATS,
    LAYOUTS,
    ULP,
    bits_equal,
    expand,
    generator,
    numbered_images,
    plain_targets,
    random_images,
)

from tokenmix_kernels import TokenMix, TopKMaps, tokenmix


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mask_type", ["block", "random", "given"])
@pytest.mark.parametrize(
    "shape, patch", [((5, 3, 48, 80), 16), ((4, 1, 28, 14), 14), ((3, 4, 32, 32), 4), ((1, 3, 64, 64), 32)]
)
def test_every_pixel_comes_from_the_right_place(mode, mask_type, shape, patch):
    batch, channels, height, width = shape
    grid = (height // patch, width // patch)
    images = numbered_images(shape)
    mask = torch.rand(batch, *grid, generator=generator()) < 0.4 if mask_type == "given" else None
    drawn = {} if mask_type == "given" else {"mask_type": mask_type}
    mixed = tokenmix(
        images,
        torch.arange(batch),
        num_classes=batch,
        mask=mask,
        patch_size=patch,
        mode=mode,
        minimum_tokens=1,
        seed=6,
        **drawn,
    )
    assert torch.equal(images, numbered_images(shape))
    if mask is not None:
        assert torch.equal(mixed.mask, mask)
    seen = mixed.images.numpy().astype(np.int64)
    b, c, y, x = np.indices(shape)
    source = np.where(mixed.mask.numpy()[b, y // patch, x // patch], batch - 1 - b, b)
    assert (seen == ((source * channels + c) * height + y) * width + x).all()
    share = mixed.mask.double().mean((1, 2)).float()
    torch.testing.assert_close(mixed.weights, torch.stack([1 - share, share], 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("partner", [[2, 2, 2, 2, 2], [1, 2, 3, 4, 0], [0, 1, 2, 3, 4], [4, 0, 4, 0, 1]])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_any_partner(partner, dtype):
    images = numbered_images((5, 3, 32, 32))
    partner = torch.tensor(partner, dtype=dtype)
    labels = torch.tensor([4, 2, 0, 1, 3])
    mixed = tokenmix(
        images, labels, num_classes=5, partner=partner, patch_size=8, mode="elem", minimum_tokens=2, seed=1
    )
    assert torch.equal(mixed.images, torch.where(expand(mixed.mask, 8), images[partner.long()], images))
    dense = plain_targets(mixed.weights, labels, partner, 5, 0.1)
    torch.testing.assert_close(mixed.targets, dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_dtypes_are_the_same_mix(layout, dtype):
    images = random_images((5, 3, 32, 48), dtype, layout)
    before = images.clone()
    options = {"num_classes": 5, "patch_size": 8, "mode": "elem", "minimum_tokens": 2, "seed": 1}
    mixed = tokenmix(images, torch.arange(5), **options)
    assert bits_equal(images, before)
    assert bits_equal(mixed.images, torch.where(expand(mixed.mask, 8), before.flip(0), before))
    assert torch.equal(mixed.mask, tokenmix(before.float(), torch.arange(5), **options).mask)
    assert mixed.images.dtype == dtype
    if layout in ("contiguous", "channels_last"):
        assert mixed.images.stride() == images.stride()


MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.mark.parametrize("out_dtype", [None, *FLOATS])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "spatial_slice"])
@pytest.mark.parametrize("mask_type", ["block", "cutmix"])
def test_uint8_is_normalised_on_the_way(out_dtype, layout, mask_type):
    images = random_images((3, 3, 32, 32), torch.uint8, layout)
    options = {
        "num_classes": 3,
        "patch_size": 8,
        "minimum_tokens": 2,
        "mask_type": mask_type,
        "mode": "elem",
        "seed": 4,
    }
    mixed = tokenmix(images, torch.arange(3), mean=MEAN, std=STD, out_dtype=out_dtype, **options)
    raw = tokenmix(images, torch.arange(3), **options)
    dtype = out_dtype or torch.float32
    assert mixed.images.dtype == dtype and raw.images.dtype == torch.uint8
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (raw.images.double() - mean) / std
    # Subtract, reciprocal, multiply, round: a little over one unit of fp32, and one rounding to the dtype.
    torch.testing.assert_close(mixed.images.double(), expected, rtol=ULP[dtype] / 2 + 3 * ULP[torch.float32], atol=1e-7)
    assert torch.equal(mixed.targets, raw.targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixup_blends(dtype, layout):
    images = random_images((6, 3, 16, 32), dtype, layout)
    before = images.clone()
    mix = TokenMix(mixup_alpha=0.8, cutmix_alpha=0, mode="elem", num_classes=6)
    out, targets = mix(images, torch.arange(6), seed=3)
    assert bits_equal(images, before)
    lam = (targets.gather(1, torch.arange(6)[:, None]) - 0.1 / 6) / 0.9
    assert (lam > 0.001).all() and (lam < 0.999).all() and lam.unique().numel() == 6
    lam = lam.double().view(6, 1, 1, 1)
    expected = lam * before.double() + (1 - lam) * before.flip(0).double()
    if dtype == torch.uint8:
        assert (out.double() - expected).abs().max() <= 0.5 + 1e-3
    else:
        scale = before.double().abs().max().item()
        torch.testing.assert_close(out.double(), expected, rtol=ULP[dtype], atol=2e-6 * scale)


def mixers():
    for mask_type in ("block", "random", "cutmix"):
        for mode in ("batch", "pair", "elem"):
            for both in (False, True):
                options = {"mixup_alpha": 0.8, "prob": 0.8} if both else {"mixup_alpha": 0.0}
                lam = "beta" if mask_type == "cutmix" else 0.5
                settings = {"mask_type": mask_type, "mode": mode, "lam": lam, **options}
                yield pytest.param(settings, id=f"{mask_type}-{mode}{'-mixup' if both else ''}")


@pytest.mark.parametrize("settings", list(mixers()))
@pytest.mark.parametrize(
    "dtype, layout",
    [*((dtype, "contiguous") for dtype in DTYPES), (torch.float16, "channels_last"), (torch.float32, "spatial_slice")],
)
@pytest.mark.parametrize("batch, partner", [(6, None), (5, None), (6, [0, 3, 5, 1, 4, 2]), (1, None)])
def test_in_place_equals_out_of_place(settings, dtype, layout, batch, partner):
    images = random_images((batch, 3, 32, 48), dtype, layout)
    partner = None if partner is None else torch.tensor(partner)
    mix = TokenMix(num_classes=batch, patch_size=8, minimum_tokens=3, **settings)
    for seed in range(3):
        apart, targets = mix(images, torch.arange(batch), partner=partner, seed=seed)
        given = torch.empty_like(images)
        if given.is_floating_point():
            given.fill_(math.nan)
        into, into_targets = mix(images, torch.arange(batch), partner=partner, seed=seed, out=given)
        assert into is given and bits_equal(given, apart) and torch.equal(targets, into_targets)
        place = images.clone(memory_format=torch.preserve_format)
        inside, inside_targets = mix(place, torch.arange(batch), partner=partner, seed=seed, out=place)
        assert inside is place and bits_equal(place, apart) and torch.equal(targets, inside_targets)


@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix"])
def test_parts_of_a_batch_draw_what_the_whole_does(mask_type):
    images = random_images((8, 3, 32, 32))
    labels = torch.arange(8)
    partner = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    mix = TokenMix(
        num_classes=8, patch_size=8, minimum_tokens=2, mode="elem", mask_type=mask_type, lam="beta", prob=0.7
    )
    whole, targets = mix(images, labels, partner=partner, seed=7, sample_offset=100)
    for part in (slice(0, 2), slice(2, 4), slice(4, 8)):
        some, some_targets = mix(
            images[part], labels[part], partner=partner[part] - part.start, seed=7, sample_offset=100 + part.start
        )
        assert bits_equal(some, whole[part])
        torch.testing.assert_close(some_targets, targets[part], atol=1e-7, rtol=0)


def test_modes_share_what_they_say():
    images = numbered_images((6, 1, 32, 32))
    options = {"num_classes": 6, "patch_size": 4, "minimum_tokens": 5, "seed": 8}
    batch, pair, elem = (
        tokenmix(images, torch.arange(6), mode=mode, **options).mask for mode in ("batch", "pair", "elem")
    )
    assert (batch == batch[:1]).all()
    assert torch.equal(pair, pair.flip(0)) and len(torch.unique(pair, dim=0)) == 3
    assert len(torch.unique(elem, dim=0)) == 6
    assert torch.equal(elem[0], batch[0]) and torch.equal(pair[:3], elem[:3])


def test_seeds_come_from_torch_or_a_generator():
    images = random_images((4, 3, 64, 64))

    def mask(**options):
        return tokenmix(images, torch.arange(4), num_classes=4, patch_size=8, **options).mask

    torch.manual_seed(0)
    first, second = mask(), mask()
    torch.manual_seed(0)
    assert torch.equal(first, mask()) and not torch.equal(first, second)
    assert torch.equal(mask(generator=generator(3)), mask(generator=generator(3)))
    assert not torch.equal(mask(generator=generator(3)), mask(generator=generator(4)))


def test_switched_off_it_hands_the_images_on():
    images = random_images((3, 3, 32, 32), torch.uint8)
    mix = TokenMix(num_classes=4, mean=MEAN, std=STD)
    mix.mixup_enabled = False
    out, targets = mix(images, torch.tensor([3, 0, 1]), torch.rand(3, 5, 5), seed=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(out, (images - mean) / std)
    expected = torch.full((3, 4), 0.025)
    expected[[0, 1, 2], [3, 0, 1]] = 0.925
    torch.testing.assert_close(targets, expected)


@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix", "given"])
def test_the_larger_share_of_pixels_has_the_larger_weight(mask_type):
    """Mask and lam are not inverted against the target (OpenMixup, kornia)."""
    images = torch.zeros(64, 1, 32, 32)
    images[32:] = 1.0  # what is taken from a partner of the other half shows
    labels = torch.arange(64) // 32
    mask = torch.zeros(64, 8, 8, dtype=torch.bool)
    mask[:, :2] = True
    drawn = {"mask": mask} if mask_type == "given" else {"mask_type": mask_type}
    mixed = tokenmix(
        images, labels, num_classes=2, patch_size=4, mode="elem", lam="beta", minimum_tokens=0, label_smoothing=0.0,
        seed=2, **drawn,
    )  # fmt: skip
    ones = mixed.images.mean((1, 2, 3))
    torch.testing.assert_close(mixed.targets[:, 1], ones, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed.targets[:, 0], 1 - ones, atol=1e-6, rtol=0)
    assert mask_type == "given" or ones.std() > 0.1


@pytest.mark.parametrize("label", [257, 2049, 21842])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_class_numbers_are_not_rounded(label, dtype):
    """Half floats hold whole numbers up to 256 (bfloat16, kornia) and 2048 (float16, the published code)."""
    images = random_images((2, 3, 32, 32), dtype)
    labels = torch.tensor([label, label - 1])
    values = torch.ones(2, 2, 4, 4, dtype=dtype)
    indices = torch.stack([labels, labels.flip(0)], 1)[:, :, None, None].expand(2, 2, 4, 4).contiguous()
    values[0, 0, :, :2] = 0  # all of 0's evidence lies on the right
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[:, :, 0] = True
    mixed = tokenmix(images, labels, num_classes=21843, maps=TopKMaps(values, indices), mask=mask, label_smoothing=0.0)
    assert mixed.targets.dtype == torch.float32
    assert mixed.targets[0].nonzero().flatten().tolist() == sorted(labels.tolist())
    # Pooling reads half a cell to the left of a box (aligned=False), so the edge between them is blurred a little.
    assert mixed.targets[0, label] > 0.7 and mixed.targets[0, label - 1] == mixed.weights[0, 1]


@pytest.mark.parametrize("mask_type", ["block", "cutmix"])
@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_probability_is_applied_once(mask_type, prob):
    count = 4000
    images = torch.zeros(count, 1, 16, 16)
    images[count // 2 :] = 1.0
    mix = TokenMix(
        mixup_alpha=0, prob=prob, mode="elem", mask_type=mask_type, patch_size=4, num_classes=2, minimum_tokens=0
    )
    out, _ = mix(images, torch.zeros(count, dtype=torch.int64), seed=1)
    changed = (out != images).flatten(1).any(1).double().mean().item()
    assert abs(changed - prob) <= 4.5 * math.sqrt(prob * (1 - prob) / count)


def test_every_sample_has_its_own_rectangle():
    """(kornia: one rectangle for the whole batch)"""
    mixed = tokenmix(
        numbered_images((16, 1, 64, 64)),
        torch.arange(16),
        num_classes=16,
        mask_type="cutmix",
        mode="elem",
        seed=1,
        patch_size=4,
    )
    changed = mixed.images != numbered_images((16, 1, 64, 64))
    assert len(torch.unique(changed, dim=0)) == 16


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_odd_batches_mix_and_keep_their_input(batch, mode):
    """(timm and the published code assert even batches; timm changes the input silently)"""
    images = random_images((batch, 3, 32, 32))
    before = images.clone()
    for mask_type in ("block", "random", "cutmix"):
        mix = TokenMix(mode=mode, mask_type=mask_type, num_classes=batch, patch_size=8, mixup_alpha=0.0, lam=0.5)
        out, targets = mix(images, torch.arange(batch), seed=1)
        assert bits_equal(images, before) and out.data_ptr() != images.data_ptr()
        middle = batch // 2  # its own partner in a batch that is reversed
        assert bits_equal(out[middle], before[middle])
        assert targets[middle].argmax() == middle
        assert batch == 1 or not torch.equal(out, before)


def test_without_maps_weights_are_exactly_what_was_masked():
    mixed = tokenmix(
        torch.zeros(200, 1, 56, 56),
        torch.zeros(200, dtype=torch.int64),
        num_classes=1,
        patch_size=4,
        mode="elem",
        seed=5,
    )
    tokens = mixed.mask.sum((1, 2)).double()
    assert tokens.min() < 112  # some end early
    torch.testing.assert_close(mixed.weights[:, 1].double(), tokens / 196, atol=1e-7, rtol=0)
    torch.testing.assert_close(mixed.weights.sum(1), torch.ones(200), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("into", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_out_may_lie_in_memory_in_another_way(layout, into, dtype):
    images, out = random_images((5, 3, 32, 48), dtype, layout), random_images((5, 3, 32, 48), dtype, into, seed=1)
    options = {"num_classes": 5, "patch_size": 8, "mode": "elem", "seed": 3}
    expected = tokenmix(images, torch.arange(5), **options)
    assert tokenmix(images, torch.arange(5), out=out, **options).images is out
    assert bits_equal(out, expected.images)
