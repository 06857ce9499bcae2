"""Wide sweeps of layouts, dtypes, grids and maps: too many pixels for the interpreter, which has `test_mix` alone."""

import pytest
import torch
from device_helpers import INTERPRETED
from mix_helpers import DTYPES, FLOATS, LAYOUTS, bits_equal, random_boxes, random_images

from tokenmix_kernels import TokenMix, TopKMaps, pool_targets, token_mask, tokenmix

if INTERPRETED:
    pytest.skip("has too many pixels for Triton's interpreter", allow_module_level=True)

pytestmark = pytest.mark.devices("reference", "gpu")

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def random_maps(form, batch, classes, dtype=torch.float32):
    source = torch.Generator().manual_seed(5)
    if form == "own":
        return torch.rand(batch, 7, 9, generator=source).to(dtype)
    if form == "all":
        return torch.rand(batch, classes, 7, 9, generator=source).to(dtype)
    values = torch.rand(batch, 5, 18, 18, generator=source).to(dtype)
    return TopKMaps(values, torch.randint(0, classes, (batch, 5, 18, 18), generator=source))


def assert_same(device, got, expected):
    assert got.images.device.type == device.home and got.targets.device.type == device.home
    assert torch.equal(got.mask.cpu(), expected.mask)
    assert bits_equal(got.images.cpu(), expected.images)
    assert_close(got.weights, expected.weights)
    assert_close(got.targets, expected.targets)


def assert_close(got, expected):
    torch.testing.assert_close(got.cpu(), expected, atol=1e-6, rtol=0)


def poison(images, dtype=None):
    """Where a result goes: NaN, or 0xAA."""
    dtype = dtype or images.dtype
    return torch.empty_like(images, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else 0xAA)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix", "given"])
def test_mixes_what_the_reference_does(device, mask_type, dtype, layout):
    images = random_images((7, 3, 48, 80), dtype, layout)
    labels = torch.arange(7).flip(0)
    mask = torch.rand(7, 3, 5, generator=torch.Generator().manual_seed(2)) < 0.5 if mask_type == "given" else None
    for mode in ("batch", "pair", "elem"):
        options = {"num_classes": 7, "minimum_tokens": 1, "mode": mode, "seed": 11, "lam": "beta"}
        if mask is None:
            options["mask_type"] = mask_type
        there = device.put(images)
        got = tokenmix(there, device.put(labels), mask=device.put(mask), out=poison(there), **options)
        assert_same(device, got, tokenmix(images, labels, mask=mask, backend="reference", **options))
        assert bits_equal(there.cpu(), images)


@pytest.mark.parametrize("patch, shape", [(4, (3, 1, 256, 64)), (8, (1, 4, 8, 512)), (14, (5, 3, 224, 70)),
                                          (32, (2, 3, 96, 64)), (16, (9, 3, 224, 224))])  # fmt: skip
@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix"])
def test_patches_and_grids(device, patch, shape, mask_type):
    images, labels = random_images(shape, torch.float16), torch.arange(shape[0])
    options = {"num_classes": 1000, "patch_size": patch, "mask_type": mask_type, "mode": "elem"}
    for seed in device.seeds(4):
        there = device.put(images)
        got = tokenmix(there, device.put(labels), seed=seed, out=poison(there), **options)
        assert_same(device, got, tokenmix(images, labels, seed=seed, backend="reference", **options))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "spatial_slice"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix"])
def test_all_branches_out_of_place_into_out_and_in_place(device, mask_type, dtype, layout):
    mix = TokenMix(num_classes=6, mask_type=mask_type, mode="elem", lam="beta", prob=0.8, patch_size=8)
    images, labels = random_images((6, 3, 32, 48), dtype, layout), torch.arange(6)
    partner = torch.tensor([1, 0, 2, 5, 4, 3])
    for seed in device.seeds(6):
        expected, targets = mix(images, labels, partner=partner, seed=seed, backend="reference")
        call = {"partner": device.put(partner), "seed": seed}
        fresh = device.put(images)
        out = poison(fresh)
        for given in (None, out, fresh):
            got, got_targets = mix(fresh, device.put(labels), out=given, **call)
            assert given is None or got is given
            assert bits_equal(got.cpu(), expected)
            assert_close(got_targets, targets)


@pytest.mark.parametrize("out_dtype", [None, *FLOATS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_normalised_bit_for_bit(device, layout, out_dtype):
    mix = TokenMix(num_classes=8, mode="elem", mean=MEAN, std=STD, out_dtype=out_dtype, patch_size=8)
    images, labels = random_images((8, 3, 32, 48), torch.uint8, layout), torch.arange(8)
    for seed in device.seeds(4):
        expected, _ = mix(images, labels, seed=seed, backend="reference")
        there = device.put(images)
        for out in (None, poison(there, expected.dtype)):
            got, _ = mix(there, device.put(labels), seed=seed, out=out)
            assert got.dtype == (out_dtype or torch.float32)
            assert bits_equal(got.cpu(), expected)


@pytest.mark.parametrize("form", ["own", "all", "topk"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", ["whole", "boxes", "flips", "affines", "ids"])
def test_maps(device, form, dtype, place):
    batch, classes = 9, 11
    images, labels = random_images((batch, 3, 64, 96)), torch.randint(0, classes, (batch,))
    given = {"maps": random_maps(form, batch, classes, dtype)}
    if place in ("boxes", "flips"):
        given["boxes"] = random_boxes(batch)
    if place == "flips":
        given["flips"] = torch.arange(batch) % 2 == 0
    if place == "affines":
        given["affines"] = torch.eye(2, 3).repeat(batch, 1, 1) + torch.rand(batch, 2, 3) * 0.3
    if place == "ids":
        given["ids"] = torch.randint(0, batch, (batch,))
    options = {"num_classes": classes, "mode": "elem", "minimum_tokens": 2, "seed": 3}
    there, home = device.put(given), device.put(images)
    got = tokenmix(home, device.put(labels), out=poison(home), **there, **options)
    expected = tokenmix(images, labels, backend="reference", **given, **options)
    assert_same(device, got, expected)
    parts = pool_targets(there.pop("maps"), device.put(labels), got.mask, **there)
    assert_close(parts, expected.weights)


@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix"])
@pytest.mark.parametrize("grid", [(1, 1), (14, 14), (5, 64), (64, 64)])
def test_masks_alone(device, mask_type, grid):
    options = {"mask_type": mask_type, "seed": -7, "sample_offset": 2**33 - 2}
    there = token_mask(6, grid, device=device.home, **options)
    assert there.device.type == device.home
    assert torch.equal(there.cpu(), token_mask(6, grid, backend="reference", **options))
    key = torch.tensor(-7, device=device.home)
    assert torch.equal(token_mask(6, grid, **{**options, "seed": key}), there)
