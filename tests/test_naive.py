"""The oracle itself, against the published code's numbers, timm and numbers worked out by hand."""

import random
from pathlib import Path

import pytest
import torch
from mix_helpers import GOLDEN_CASES, golden, mask_stats, numbered_images, reversed_batch
from timm.data.mixup import mixup_target

from tokenmix_kernels import naive


@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_published_mix_gives_the_published_targets(case):
    g = golden(case)
    batch, classes = g.target.shape
    images = torch.zeros(batch, 3, 28, 28)
    _, targets = naive.published_mix(images, g.labels, g.values.float(), g.indices, g.boxes, g.mask, classes)
    torch.testing.assert_close(targets, g.target, atol=1e-5, rtol=0)


def test_loops_agree_with_the_published_steps():
    g = golden("crop_block")
    batch, classes = g.target.shape
    images, partner = numbered_images((batch, 3, 28, 28)), reversed_batch(batch)
    mask = g.mask.clone()
    mask[1:3] = ~mask[1:3]  # not one mask for all
    mixed, targets = naive.published_mix(images, g.labels, g.values.float(), g.indices, g.boxes, mask, classes)
    own = torch.where(g.indices == g.labels[:, None, None, None], g.values.float(), 0.0).sum(1)
    weights = naive.weights(naive.pooled(own, g.boxes, (14, 14)), mask, partner)
    assert torch.equal(naive.mixed(images, mask, partner), mixed)
    torch.testing.assert_close(naive.targets(weights, g.labels, partner, classes, 0.1), targets, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["lam0.5_min14", "lam0.9_min0"])
def test_block_masks_have_the_published_distribution(name):
    published, count = mask_stats()[name], 2000
    tokens = min(196, int((1 - published["lam"]) * 196 + 1e-9) + published["minimum_tokens"])
    source = random.Random(5)
    drawn = torch.stack([naive.block_mask((14, 14), tokens, source) for _ in range(count)])
    # 6 standard errors of a share for each of the 196 tokens; neighbours and counts vary less than that.
    expected = torch.tensor(published["coverage"])
    error = (expected * (1 - expected) / count).sqrt()
    assert ((drawn.float().mean(0) - expected).abs() < 6 * error).all()
    same = (drawn[:, :, 1:] == drawn[:, :, :-1]).float().mean()
    assert same == pytest.approx(published["same_right_neighbour"], abs=0.004)
    full = published["count_hist"][str(tokens)] / published["n"]
    assert (drawn.sum((1, 2)) == tokens).float().mean() == pytest.approx(full, abs=0.015)
    assert drawn.sum((1, 2)).max() == tokens


def test_pooling_takes_the_mean_of_bilinear_samples():
    """A map that grows by 1 a column, a box over columns 1 to 3: samples half a cell to the left of cell centres."""
    ramp = torch.arange(8.0).repeat(1, 8, 1)  # [1, 8, 8]
    box = torch.tensor([[1 / 8, 0.25, 3 / 8, 0.75]])
    # x from 0.5 to 2.5 in two bins of one cell each, sampled in the middle.
    assert naive.pooled(ramp, box, (2, 2)).tolist() == [[[1.0, 2.0], [1.0, 2.0]]]
    both = naive.pooled(torch.stack([ramp, 2 * ramp], 1), box, (2, 2))  # [1, 2, 2, 2]
    assert both[0, 1].tolist() == [[2.0, 4.0], [2.0, 4.0]]


def test_weights_are_shares_of_the_evidence_shown():
    evidence = torch.tensor([[[1.0, 3.0]], [[4.0, 1.0]], [[0.0, 0.0]]])
    mask = torch.tensor([[[True, False]]] * 3)
    weights = naive.weights(evidence, mask, torch.tensor([1, 2, 0]))
    expected = torch.tensor([[0.75, 0.8], [0.2, 0.5], [0.5, 0.25]])  # without evidence: the area
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)


def test_mixup_and_its_targets_are_timms():
    images, labels = numbered_images((4, 1, 2, 2)), torch.tensor([2, 0, 1, 2])
    partner, lam = reversed_batch(4), torch.full((4,), 0.3)
    expected = images.double() * lam[:, None, None, None] + images.flip(0) * (1 - lam[:, None, None, None])
    torch.testing.assert_close(naive.blended(images, lam, partner), expected)
    targets = naive.targets(torch.stack([lam, 1 - lam], 1), labels, partner, 3, 0.1, rule="timm")
    torch.testing.assert_close(targets, mixup_target(labels, 3, lam=0.3, smoothing=0.1))


def test_the_oracle_stays_short():
    lines = Path(str(naive.__file__)).read_text().splitlines()
    assert len(lines) < 100
