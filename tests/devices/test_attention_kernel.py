"""`attention_targets` on each device against the reference."""

import pytest
import torch
from device_helpers import Device
from mix_helpers import random_images

from tokenmix_kernels import TokenMix, kernels
from tokenmix_kernels.attention_inputs import AttentionMix
from tokenmix_kernels.transmix import attention_targets

TOLERANCE = 1e-6


def both(device: Device, attention, mask, labels, partner=None, **options):
    expected = attention_targets(attention, mask, labels, partner, backend="reference", **options)
    given = map(device.put, (attention, mask, labels, partner))
    targets = attention_targets(*given, backend=device.backend, **device.put(options)).cpu()
    assert targets.isfinite().all()
    torch.testing.assert_close(targets, expected, rtol=0, atol=TOLERANCE)
    return targets


@pytest.mark.parametrize("classes", [1, 2, 7, 1000, 1500])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (14, 14)])
@pytest.mark.parametrize("form", ["bool", "shares"])
def test_targets(device, form, grid, classes):
    source = torch.Generator().manual_seed(1)
    mask = torch.rand(4, *grid, generator=source)
    mask = mask < 0.5 if form == "bool" else mask
    attention = torch.rand(4, grid[0] * grid[1], generator=source)
    labels = torch.tensor([0, classes - 1, classes // 2, 0])
    both(device, attention, mask, labels, num_classes=classes, smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_kinds_ratios_partners_and_dtypes(device, dtype):
    source = torch.Generator().manual_seed(2)
    attention, mask = torch.rand(5, 6, generator=source).to(dtype), torch.rand(5, 2, 3, generator=source)
    labels = torch.arange(10, dtype=torch.int16)[::2] // 2  # not contiguous
    options = {
        "kind": torch.tensor([0, 1, 2, 4, 3], dtype=torch.uint8), "lam": torch.rand(5, generator=source),
        "ratio": torch.rand(5, generator=source),
    }  # fmt: skip
    partner = torch.tensor([1, 1, 0, 4, 3], dtype=torch.int32)
    with_kinds = both(device, attention, mask, labels, partner, num_classes=5, **options)
    without = both(device, attention, mask, labels, partner, num_classes=5, ratio=options["ratio"])
    assert not torch.equal(with_kinds[0], without[0]) and torch.equal(with_kinds[2:], without[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
@pytest.mark.parametrize("classes", [1, 7, 1500])
def test_label_rows(device, classes, dtype):
    source = torch.Generator().manual_seed(1)
    rows = torch.rand(6, classes, generator=source).round(decimals=0 if dtype == torch.bool else 3).to(dtype)[::2]
    attention, mask = torch.rand(3, 15, generator=source), torch.rand(3, 3, 5, generator=source) < 0.5
    for multi in (False, True):
        both(device, attention, mask, rows, num_classes=classes, smoothing=0.1, multi_label=multi)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_without_attention_the_area_counts(device, bad):
    mask = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(3)) < 0.5
    both(device, torch.full((2, 9), bad), mask, torch.tensor([0, 1]), num_classes=2, ratio=1.0)


@pytest.mark.devices("interpreter", "gpu")
def test_partner_and_labels_out_of_range_are_harmless(device):
    mix = AttentionMix(torch.rand(3, 4), torch.ones(3, 2, 2, dtype=torch.bool))
    labels, partner = torch.tensor([0, 99, -1]), torch.tensor([77, -5, 1])
    targets = kernels.attention_targets(*map(device.put, (mix, labels, partner)), 4, 0.2).cpu()
    expected = torch.full((3, 4), 0.05)
    expected[0, 0] += 0.8
    torch.testing.assert_close(targets, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("mask_type", ["block", "cutmix"])
def test_the_mix_that_targets_are_made_from(device, mask_type):
    mixer = TokenMix(
        num_classes=7, patch_size=12, mode="elem", mask_type=mask_type, lam="beta", prob=0.8, return_mix=True
    )
    images, labels = random_images((8, 1, 24, 36)), torch.arange(8) % 7
    expected = mixer(images, labels, seed=3, backend="reference")[2]
    there = mixer(device.put(images), device.put(labels), seed=3, backend=device.backend)[2]
    got = type(there)(*(value.cpu() if isinstance(value, torch.Tensor) else value for value in there))
    torch.testing.assert_close(got.mask, expected.mask, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(got.lam, expected.lam, rtol=0, atol=TOLERANCE)
    assert torch.equal(got.kind, expected.kind) and len(got.kind.unique()) == 3
    assert mask_type == "block" or ((got.mask > 0) & (got.mask < 1)).any()
    options = {"num_classes": 7, "smoothing": 0.1}
    both(device, torch.rand(8, 6), got.mask, got.labels, got.partner, kind=got.kind, lam=got.lam, **options)
