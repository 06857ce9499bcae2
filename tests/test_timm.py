"""The Mixup and CutMix branches against `timm.data.Mixup`: same formulas, same distributions."""

import math

import numpy as np
import pytest
import torch
from mix_helpers import random_images
from scipy import stats
from timm.data import Mixup
from timm.data.mixup import mixup_target, rand_bbox, rand_bbox_minmax

from tokenmix_kernels import TokenMix, tokenmix

COUNT = 8000


def own_weight(targets, labels, classes, smoothing=0.1):
    """lam of each sample, read off targets of two different labels."""
    return (targets.gather(1, labels[:, None])[:, 0].double() - smoothing / classes) / (1 - smoothing)


def drawn_lam(seed=0, **options):
    """lam of COUNT samples, each with a draw of its own, and whether the sample was blended, or a part replaced."""
    images = torch.zeros(COUNT, 1, 32, 32)
    images[COUNT // 2 :] = 1
    labels = torch.arange(COUNT) // (COUNT // 2)
    mix = TokenMix(mode="elem", num_classes=2, patch_size=4, mask_type="cutmix", lam="beta", **options)
    out, targets = mix(images, labels, seed=seed)
    whole = (out == 0) | (out == 1)
    blended = ~whole.flatten(1).any(1)
    moved = whole.flatten(1).all(1) & (out != images).flatten(1).any(1)
    return own_weight(targets, labels, 2).numpy(), blended.numpy(), moved.numpy()


@pytest.fixture
def numpy_seed():
    state = np.random.get_state()
    np.random.seed(0)
    yield
    np.random.set_state(state)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 4.0])
def test_lam_of_mixup_is_timms(alpha, numpy_seed):
    lam, _, moved = drawn_lam(mixup_alpha=alpha, cutmix_alpha=0.0)
    theirs = Mixup(mixup_alpha=alpha, cutmix_alpha=0.0, mode="elem")._params_per_elem(COUNT)[0]
    # Ours are multiples of 2**-16, and small alphas put several percent below the first: compared in steps of 2**-10.
    steps = np.arange(1, 1024) / 1024
    ours, expected = (lam[:, None] < steps).mean(0), stats.beta(alpha, alpha).cdf(steps)
    assert np.abs(ours - (theirs[:, None] < steps).mean(0)).max() < stats.kstwobign.isf(1e-3) * math.sqrt(2 / COUNT)
    assert np.abs(ours - expected).max() < stats.kstwobign.isf(1e-3) / math.sqrt(COUNT)
    spread = 0.5 / math.sqrt(2 * alpha + 1)
    assert abs(lam.mean() - 0.5) < 4.5 * spread / math.sqrt(COUNT)
    assert not moved[lam > 1e-4].any()


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixup_is_timms_for_the_same_lam(mode, smoothing):
    images = random_images((6, 3, 16, 32))
    labels = torch.tensor([3, 1, 0, 4, 1, 2])
    ours = TokenMix(mixup_alpha=0.8, cutmix_alpha=0.0, mode=mode, label_smoothing=smoothing, num_classes=5)
    theirs = Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, mode=mode, label_smoothing=smoothing, num_classes=5)
    for seed in range(4):
        out, targets = ours(images, labels, seed=seed)
        distinct = torch.arange(6)
        same_draw = TokenMix(mixup_alpha=0.8, cutmix_alpha=0.0, mode=mode, num_classes=6)(images, distinct, seed=seed)
        lam = own_weight(same_draw[1], distinct, 6).numpy()
        if mode == "batch":
            assert np.ptp(lam) < 1e-6
            theirs._params_per_batch = lambda lam=lam: (float(lam[0]), False)
        else:
            theirs._params_per_elem = lambda size, lam=lam: (lam[:size].astype(np.float32), np.zeros(size, bool))
        expected, expected_targets = theirs(images.clone(), labels)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(targets, expected_targets, atol=1e-6, rtol=0)


@pytest.mark.parametrize("correct_lam", [True, False])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_cutmix_targets_are_timms_for_the_same_rectangle(correct_lam, minmax):
    images = torch.zeros(64, 1, 32, 48)
    images[32:] = 1
    labels = torch.arange(64) // 32 * 2
    mixed = tokenmix(
        images, labels, num_classes=4, mask_type="cutmix", mode="elem", lam="beta", cutmix_minmax=minmax,
        correct_lam=correct_lam, patch_size=4, seed=1,
    )  # fmt: skip
    moved = (mixed.images != images)[:, 0]
    for one in moved:  # a rectangle, and nothing else
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns)
        for line in (rows, columns):
            assert (line.int().diff() != 0).sum() <= 2
    share = 1 - moved.double().mean((1, 2))
    lam = mixed.weights[:, 0].double()
    if correct_lam or minmax is not None:
        torch.testing.assert_close(lam, share, atol=1e-6, rtol=0)
    else:
        # The drawn lam: never above what the border leaves of the rectangle, but for whole pixels.
        assert (lam < share + 1e-6).all() and (lam < share - 0.05).any()
    torch.testing.assert_close(mixed.weights.sum(1), torch.ones(64), atol=1e-6, rtol=0)
    expected = mixup_target(labels, 4, lam.float()[:, None], 0.1)
    torch.testing.assert_close(mixed.targets, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(32, 32), (24, 56)])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8), (0.4, 0.6)])
def test_rectangles_have_timms_distribution(shape, minmax, numpy_seed):
    images = torch.zeros(COUNT, 1, *shape, dtype=torch.uint8)
    images[COUNT // 2 :] = 1
    out = tokenmix(
        images, torch.zeros(COUNT, dtype=torch.int64), num_classes=1, mask_type="cutmix", mode="elem", lam="beta",
        cutmix_alpha=0.7, cutmix_minmax=minmax, patch_size=8, seed=2,
    ).images  # fmt: skip
    moved = (out != images)[:, 0]
    theirs = torch.zeros_like(moved)
    for n, lam in enumerate(np.random.beta(0.7, 0.7, COUNT)):
        box = rand_bbox(images.shape, lam) if minmax is None else rand_bbox_minmax(images.shape, minmax)
        theirs[n, box[0] : box[1], box[2] : box[3]] = True
    for measure in (lambda m: m.sum((1, 2)), lambda m: m.any(1).sum(1), lambda m: m.any(2).sum(1)):
        assert stats.ks_2samp(measure(moved), measure(theirs)).pvalue > 1e-3
    one, other = moved.double().mean(0), theirs.double().mean(0)
    error = ((one * (1 - one) + other * (1 - other)) / COUNT).sqrt()
    assert ((one - other).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("prob, switch_prob", [(1.0, 0.5), (0.6, 0.25), (0.0, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_branches_are_taken_as_often_as_timms(prob, switch_prob):
    _, blended, moved = drawn_lam(mixup_alpha=0.8, cutmix_alpha=1.0, prob=prob, switch_prob=switch_prob)
    # One rectangle in a thousand is smaller than a pixel, and a few lam of Mixup round to 0 or 1.
    for seen, share in ((blended.mean(), prob * (1 - switch_prob)), (moved.mean(), prob * switch_prob)):
        assert abs(seen - share) <= 4.5 * math.sqrt(share * (1 - share) / COUNT) + 0.002


def test_a_range_of_one_size_is_that_size():
    """(numpy, and with it timm, refuses an empty range)"""
    images = torch.zeros(16, 1, 32, 32)
    images[8:] = 1
    labels = torch.zeros(16, dtype=torch.int64)
    options = {"num_classes": 1, "patch_size": 8, "mask_type": "cutmix", "mode": "elem", "seed": 0}
    moved = tokenmix(images, labels, cutmix_minmax=(0.5, 0.5), **options).images != images
    assert (moved.sum((1, 2, 3)) == 256).all() and len(torch.unique(moved, dim=0)) > 8


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_it_takes_timms_arguments_in_a_training_loop(mode):
    """The one line that a timm loop changes."""
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.9, "switch_prob": 0.5, "mode": mode,
               "correct_lam": True, "label_smoothing": 0.1, "num_classes": 10}  # fmt: skip
    images, labels = random_images((4, 3, 32, 32)), torch.tensor([1, 2, 3, 9])
    theirs, their_targets = Mixup(**options)(images.clone(), labels)
    positional = TokenMix(0.8, 1.0, None, 0.9, 0.5, mode, True, 0.1, 10)
    ours, targets = positional(images, labels)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert targets.shape == their_targets.shape and targets.dtype == their_targets.dtype
    assert positional.mixup_enabled is Mixup(**options).mixup_enabled
    assert positional.settings == TokenMix(**options).settings
    for mixer in (positional, Mixup(**options)):
        mixer.mixup_enabled = False
        out, unmixed = mixer(images.clone(), labels)
        assert torch.equal(out, images)
        torch.testing.assert_close(unmixed, mixup_target(labels, 10, 1.0, 0.1), atol=1e-7, rtol=0)
