"""Random numbers, tables and masks against published vectors, closed forms and the published code's statistics."""

import math
import random

import numpy as np
import pytest
import torch
from mix_helpers import mask_stats
from scipy import special, stats

from tokenmix_kernels import token_mask
from tokenmix_kernels.reference.draw import AT_ONCE, coverage, first_words, philox, philox_one, philox_several
from tokenmix_kernels.tables import beta_table, ratio_table


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    sample = counter[0] | counter[1] << 32
    sample -= (sample >> 63) << 64  # as int64
    seed = key[0] | key[1] << 32
    seed -= (seed >> 63) << 64
    drawn = philox(seed, torch.tensor(sample), torch.tensor(counter[2]), counter[3])
    assert drawn.tolist() == words
    assert philox_several(seed, sample, counter[2], counter[3], 1) == [tuple(words)]
    assert philox_one(seed, sample, counter[2], counter[3]) == words


@pytest.mark.parametrize("seed, sample", [(0, 0), (-1, -1), (2**63 - 1, 2**62 + 2**32 - 1), (-(2**40) + 3, 2**32)])
def test_several_counters_at_once_draw_what_each_draws_alone(seed, sample):
    for first, stream in ((0, 2), (7, 3), (2**32 - AT_ONCE, 2**32 - 1)):
        alone = philox(seed, torch.tensor(sample), torch.arange(first, first + AT_ONCE), stream).tolist()
        assert philox_several(seed, sample, first, stream, AT_ONCE) == [tuple(words) for words in alone]


@pytest.mark.parametrize("sample", [0, 2**32 - 1, 2**32 + 3, 2**62 + 5])
def test_a_sample_alone_draws_what_it_draws_among_others(sample):
    for stream in range(3):
        alone, among = first_words(-7, [sample], stream), first_words(-7, [sample, 5], stream)
        assert list(alone[0]) == list(among[0]) == philox(-7, torch.tensor(sample), torch.tensor(0), stream).tolist()


@pytest.mark.parametrize("patch, grid", [(8, (3, 4)), (14, (1, 2)), (1, (5, 3))])
def test_coverage_counts_the_pixels_of_each_token(patch, grid):
    height, width = grid[0] * patch, grid[1] * patch
    source = np.random.default_rng(patch)
    for case in range(60):
        top, bottom = sorted(source.integers(0, height + 1, 2).tolist())
        left, right = sorted(source.integers(0, width + 1, 2).tolist())
        if case == 0:
            top, bottom, left, right = 0, height, 0, width
        pixels = np.zeros((height, width), np.int64)
        pixels[top:bottom, left:right] = 1
        expected = pixels.reshape(grid[0], patch, grid[1], patch).sum((1, 3))
        assert coverage((top, bottom, left, right), grid, patch).tolist() == expected.tolist()


def test_ratio_table_is_log_uniform():
    table = np.array(ratio_table())
    height, width = table & 0xFFFF, table >> 16
    slices = (np.arange(len(table)) + 0.5) / len(table)
    ratio = np.exp(np.log(0.3) + slices * (np.log(1 / 0.3) - np.log(0.3)))
    assert np.abs(height - 2**14 * np.sqrt(ratio)).max() <= 0.51
    assert np.abs(width - 2**14 / np.sqrt(ratio)).max() <= 0.51


@pytest.mark.parametrize(
    "alpha, quantile",
    [
        (1.0, lambda u: u),
        (0.5, lambda u: np.sin(np.pi * u / 2) ** 2),
        (2.0, lambda u: 0.5 - np.sin(np.arcsin(1 - 2 * u) / 3)),
        *((alpha, lambda u, alpha=alpha: special.betaincinv(alpha, alpha, u)) for alpha in (0.1, 0.2, 0.8, 5.0, 100.0)),
    ],
)
def test_beta_table_holds_the_quantiles(alpha, quantile):
    table = np.array(beta_table(alpha))
    expected = quantile(np.linspace(0, 1, len(table))) * 65536
    assert len(table) == 4097
    # Rounded to whole units. The two ends, between which 1 of 2,048 draws is made, are where the integral is not 0.
    assert np.abs(table - expected)[1:-1].max() <= 0.51
    assert (table + table[::-1] == 65536).all()
    assert (np.diff(table) >= 0).all()


@pytest.mark.parametrize("name", ["lam0.5_min14", "lam0.3_min14", "lam0.8_min14", "lam0.9_min0"])
def test_block_masks_have_the_published_distribution(name):
    """Two-sample tests against the published code's counts. The seed is fixed, so the outcome is too.

    A threshold of 5 standard errors for the largest of 196 tokens leaves a correct implementation 1 chance in 10,000
    for an unlucky seed.
    """
    published = mask_stats()[name]
    # The default at full power; the others differ from it in the number of tokens alone.
    count = 40_000 if name == "lam0.5_min14" else 10_000
    mask = torch.cat(
        [
            token_mask(
                10_000,
                (14, 14),
                lam=published["lam"],
                minimum_tokens=published["minimum_tokens"],
                seed=3,
                sample_offset=start,
            )
            for start in range(0, count, 10_000)
        ]
    )
    drawn = mask.double()
    coverage, expected = drawn.mean(0), torch.tensor(published["coverage"], dtype=torch.float64)
    together = (coverage * count + expected * published["n"]) / (count + published["n"])
    error = (together * (1 - together) * (1 / count + 1 / published["n"])).sqrt()
    z = (coverage - expected) / error
    assert z.abs().max() < 5
    # A bias of all tokens, or a tilt over rows or columns, would show in sums long before it does in single tokens.
    ramp = torch.linspace(-1, 1, 14, dtype=torch.float64)
    for tilt in (
        ramp[:, None].expand(14, 14),
        ramp.expand(14, 14),
        (ramp[:, None] * ramp).abs(),
        ramp[:, None] ** 2 + ramp**2,
    ):
        ours = (drawn * tilt).sum((1, 2))
        spread = ours.std() * math.sqrt(1 / count + 1 / published["n"])
        assert abs(ours.mean() - (expected * tilt).sum()) < 4.5 * spread

    tokens = mask.sum((1, 2))
    ours = torch.bincount(tokens, minlength=197)
    theirs = torch.zeros(197, dtype=torch.int64)
    for key, value in published["count_hist"].items():
        theirs[int(key)] = value
    assert ours.sum() == count and theirs.sum() == published["n"]
    full = max(int(key) for key in published["count_hist"])
    assert tokens.max() == full
    # Bins joined from the low end until both samples expect at least 10 in each.
    table, joined = [], torch.zeros(2)
    for pair in torch.stack([ours, theirs], 1).float():
        joined = joined + pair
        if joined.sum() >= 40:
            table.append(joined.tolist())
            joined = torch.zeros(2)
    table[-1] = (torch.tensor(table[-1]) + joined).tolist()
    if len(table) > 1:
        assert stats.chi2_contingency(np.array(table).T).pvalue > 1e-3

    for key, one, other in (
        ("same_right_neighbour", mask[:, :, 1:], mask[:, :, :-1]),
        ("same_lower_neighbour", mask[:, 1:], mask[:, :-1]),
    ):
        same = (one == other).double().mean((1, 2))
        error = same.std() * math.sqrt(1 / count + 1 / published["n"])
        assert abs(same.mean() - published[key]) < 4.5 * error


def plain_block_mask(rng, grid_h, grid_w, tokens):
    """The method's words as a loop over floats, on a set of tokens."""
    covered = set()
    while len(covered) < tokens:
        for _ in range(10):
            remaining = tokens - len(covered)
            area = rng.uniform(1, remaining)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < grid_h and w < grid_w:
                top, left = rng.randint(0, grid_h - h), rng.randint(0, grid_w - w)
                rectangle = {(y, x) for y in range(top, top + h) for x in range(left, left + w)}
                if 0 < len(rectangle - covered) <= remaining:
                    covered |= rectangle
                    break
        else:
            break
    return covered


@pytest.mark.parametrize("grid, lam, least", [((2, 2), 0.5, 14), ((5, 9), 0.5, 3), ((12, 3), 0.2, 0), ((8, 8), 0.4, 5)])
def test_block_masks_of_other_grids_have_the_distribution_of_a_plain_loop(grid, lam, least):
    rng = random.Random(0)
    plain, count = 2000, 10_000
    size = grid[0] * grid[1]
    theirs = torch.zeros(plain, *grid, dtype=torch.bool)
    for n in range(plain):
        for y, x in plain_block_mask(rng, *grid, min(size, int((1 - lam) * size) + least)):
            theirs[n, y, x] = True
    ours = token_mask(count, grid, lam=lam, minimum_tokens=least, seed=1)
    one, other = ours.double().mean(0), theirs.double().mean(0)
    error = (other * (1 - other) * (1 / plain + 1 / count)).sqrt()
    assert ((one - other).abs() < 4.5 * error).all()
    counts = [torch.bincount(mask.sum((1, 2)), minlength=size + 1) for mask in (ours, theirs)]
    common = counts[1] >= 10
    table = [[*c[common].tolist(), int(c[~common].sum()) + 1] for c in counts]
    assert stats.chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1)])
def test_a_grid_of_one_row_or_column_has_no_rectangle(grid):
    # A rectangle is shorter than the grid on both axes.
    assert not token_mask(32, grid, seed=0).any()
    assert token_mask(32, grid, minimum_tokens=1, mask_type="random", seed=0).any((1, 2)).all()


@pytest.mark.parametrize(
    "lam, least, wanted", [(0.5, 14, 112), (1.0, 0, 0), (1.0, 3, 3), (0.0, 0, 196), (0.25, 9, 156)]
)
def test_random_masks_have_exactly_the_tokens_and_no_pattern(lam, least, wanted):
    count = 10_000
    mask = token_mask(count, (14, 14), lam=lam, minimum_tokens=least, mask_type="random", seed=1)
    assert (mask.sum((1, 2)) == wanted).all()
    share = wanted / 196
    error = math.sqrt(share * (1 - share) / count)
    assert ((mask.double().mean(0) - share).abs() <= 5 * error).all()
    # Any two tokens are both masked as often as in draws without replacement.
    both = share * (wanted - 1) / 195
    error = math.sqrt(max(both * (1 - both), 0) / count)
    flat = mask.flatten(1)
    for distance in (1, 2, 3, 4, 14, 64, 128):
        joint = (flat[:, distance:] & flat[:, :-distance]).double().mean(0)
        assert ((joint - both).abs() <= 5 * error).all()


@pytest.mark.parametrize("mask_type", ["block", "random"])
def test_drawn_lam_sets_the_tokens(mask_type):
    count = 8_000
    mask = token_mask(count, (8, 8), lam="beta", minimum_tokens=5, mask_type=mask_type, seed=5)
    tokens = mask.sum((1, 2))
    if mask_type == "random":
        # lam uniform: floor((1 - lam) * 64) is uniform on 0 ... 63, then 5 more and at most 64.
        expected = torch.full((65,), count / 64)
        expected[:5] = 0
        expected[64] = 5 * count / 64
        ours = torch.bincount(tokens, minlength=65).double()
        assert (ours[:5] == 0).all()
        assert stats.chisquare(ours[5:], expected[5:].double()).pvalue > 1e-3
    else:
        # The same draw with single tokens has what was wanted; rectangles may end before.
        options = {"lam": "beta", "minimum_tokens": 5, "seed": 5}
        wanted = token_mask(count, (8, 8), mask_type="random", **options).sum((1, 2))
        assert (tokens <= wanted).all() and (tokens == wanted).float().mean() > 0.7


def test_masks_depend_on_seed_and_sample_alone():
    whole = token_mask(12, (7, 9), seed=11)
    assert torch.equal(whole, token_mask(12, (7, 9), seed=11))
    assert torch.equal(whole, token_mask(12, (7, 9), seed=torch.tensor(11)))
    assert torch.equal(whole[4:], token_mask(8, (7, 9), seed=11, sample_offset=4))
    assert not torch.equal(whole, token_mask(12, (7, 9), seed=12))
    # Both halves of the seed and of the sample's number count.
    for other in (11 + (1 << 32), -11, 11 - (1 << 63)):
        assert not torch.equal(whole, token_mask(12, (7, 9), seed=other))
    far = token_mask(12, (7, 9), seed=11, sample_offset=1 << 32)
    assert not torch.equal(whole, far)
    across = token_mask(4, (7, 9), seed=11, sample_offset=(1 << 32) - 2)
    assert torch.equal(across[2:], far[:2])
