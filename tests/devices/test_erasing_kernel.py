"""Random erasing, each device against the reference: pixels bit for bit, targets and weights to 1e-6."""

import pytest
import torch
from mix_helpers import bits_equal, random_images
from test_mix import CLASSES, assert_close, assert_same, both, maps_of

from tokenmix_kernels import RandomErasing, TokenMix
from tokenmix_kernels.settings import ERASE_MODES

LABELS = torch.tensor([1, 4, 0, 2])


@pytest.mark.parametrize("mask_type", ["block", "cutmix"])
@pytest.mark.parametrize("mode", ERASE_MODES)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.interpreter_takes(every=2)
def test_what_is_erased_of_both_images(device, count, mode, mask_type):
    """Eights of columns that are erased in part, rows of tokens that are no power of two, rectangles that overlap."""
    erasing = RandomErasing(0.8, max_area=0.9, mode=mode, min_count=1, max_count=count)
    for width in (24, 30):  # whole eights of a line, and not
        images = random_images((3, 3, 12, width))
        options = {"patch_size": 6, "mask_type": mask_type, "mode": "elem", "seed": 3}
        assert_same(*both(device, images, LABELS[:3], erasing=erasing, **options))


@pytest.mark.parametrize("mode", ERASE_MODES)
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_erased_of_blended_images(device, count, mode):
    erasing = RandomErasing(0.8, max_area=0.9, mode=mode, min_count=1, max_count=count)
    mix = TokenMix(0.8, 0.0, mode="elem", num_classes=CLASSES, patch_size=8, erasing=erasing)
    images = random_images((4, 3, 16, 24))
    expected = mix(images, LABELS, seed=2, backend="reference")
    got = mix(device.put(images), device.put(LABELS), seed=2, backend=device.backend)
    assert bits_equal(got[0].cpu(), expected[0])
    assert_close(got[1], expected[1])


@pytest.mark.parametrize("form", [None, "own"])
@pytest.mark.parametrize("patch", [7, 40])
def test_evidence_is_what_is_left_beside_the_union_of_rectangles(device, patch, form):
    """Rectangles that overlap in a token, whose lines have more columns than a word of 32 bits."""
    erasing = RandomErasing(1.0, min_area=0.5, max_area=0.9, min_count=2, max_count=3, evidence=True)
    options = {} if form is None else {"maps": maps_of(form, 2)}
    images = random_images((2, 1, patch, 3 * patch))
    options |= {"patch_size": patch, "minimum_tokens": 1, "mask_type": "cutmix", "mode": "elem"}
    assert_same(*both(device, images, LABELS[:2], erasing=erasing, seed=1, **options))
