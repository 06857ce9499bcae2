"""Labels [B, K] and clamped targets, each device against the reference: targets and weights to 1e-6."""

import pytest
import torch
from mix_helpers import bits_equal, random_boxes, random_images
from test_mix import CLASSES, DRAWS, assert_close, assert_same, both, maps_of
from torch import Tensor

from tokenmix_kernels import TokenMix, pool_targets, token_mask, tokenmix


def rows_of(batch: int, classes: int = CLASSES, multi: bool = False) -> Tensor:
    """Labels [B, K]: of the first image, none; else yes for two classes, or shares of three."""
    source = torch.Generator().manual_seed(4)
    rows = torch.zeros(batch, classes)
    for row in rows[1:]:
        some = torch.randperm(classes, generator=source)[: 2 if multi else 3]
        row[some] = 1.0 if multi else torch.rand(len(some), generator=source).softmax(0)
    return rows


@pytest.mark.parametrize("form", ["none", "own", "all", "topk"])
@pytest.mark.parametrize("draw", ["block", "grid, beta", "cutmix"])
@pytest.mark.interpreter_takes(every=3)
def test_every_form_of_maps(device, draw, form):
    multi = form in ("all", "none")
    rows = rows_of(2, multi=multi)
    options = DRAWS[draw] | {"multi_label": multi}
    if form != "none":
        options |= {"maps": maps_of(form, 2), "boxes": random_boxes(2)}
    assert_same(*both(device, random_images((2, 1, 32, 48)), rows.bool() if multi else rows, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 1000, 1025])
@pytest.mark.interpreter_takes(every=7)
def test_rows_of_any_width_and_dtype(device, classes, dtype):
    rows = rows_of(4, classes, multi=not dtype.is_floating_point).to(dtype)[::2]
    assert_same(*both(device, random_images((2, 1, 16, 16)), rows, num_classes=classes, mode="elem"))


def test_rows_of_more_classes_than_one_block(device):
    """Maps of 300 classes: each class is weighed by its own, in whatever block of columns it is."""
    rows = torch.zeros(2, 300)
    rows[0, [3, 127, 128]], rows[1, [0, 299]] = 1, 1
    maps = torch.rand(2, 300, 3, 3, generator=torch.Generator().manual_seed(1))
    assert_same(*both(device, random_images((2, 1, 16, 16)), rows, num_classes=300, maps=maps, mode="elem"))


@pytest.mark.parametrize("form", ["own", "all"])
def test_rows_of_any_branch(device, form):
    mix = TokenMix(
        0.8, 1.0, None, 0.7, 0.5, "elem", True, 0.1, CLASSES, True, patch_size=8, return_mix=True, clamp_targets=True
    )
    images, rows, maps = random_images((6, 1, 16, 16)), rows_of(6, multi=True), maps_of(form, 6)
    expected, targets, how = mix(images, rows, maps, seed=5, backend="reference")
    assert set(how.kind.tolist()) == {0, 1, 2}
    got = mix(*device.put((images, rows, maps)), seed=5, backend=device.backend)
    assert bits_equal(got[0].cpu(), expected)
    assert_close(got[1], targets)
    assert_close(got[2].lam, how.lam)


@pytest.mark.parametrize("form", ["own", "topk"])
def test_weights_of_rows(device, form):
    mask = token_mask(3, (5, 7), seed=9)
    given = {"maps": maps_of(form, 3), "labels": rows_of(3), "mask": mask, "partner": torch.tensor([1, 1, 0])}
    weights = pool_targets(**device.put(given), backend=device.backend)
    assert_close(weights, pool_targets(**given, backend="reference"))


def test_targets_are_clamped(device):
    """Each image's evidence is all in the part that is kept of it: what both labels have counts twice."""
    maps = torch.zeros(4, 2, 2)
    maps[:2, :, 0], maps[2:, :, 1] = 1, 1
    mask = torch.zeros(4, 2, 2, dtype=torch.bool)
    mask[:2, :, 1], mask[2:, :, 0] = True, True
    options = {"mask": mask, "maps": maps, "label_smoothing": 0.0}
    for labels in (torch.tensor([1, 2, 2, 1]), torch.eye(CLASSES)[[1, 2, 2, 1]]):
        images = random_images((4, 1, 16, 16))
        free = tokenmix(images, labels, num_classes=CLASSES, patch_size=8, **options)
        expected, got = both(device, images, labels, clamp_targets=True, **options)
        assert free.targets.max() > 1.3 and expected.targets.max() == 1
        assert_same(expected, got)
