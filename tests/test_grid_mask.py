"""Grid masks, MixPro's MaskMix: square cells of tokens, each of one image."""

import math

import pytest
import torch
from mix_helpers import random_images

from tokenmix_kernels import TokenMix, token_mask, tokenmix


def cells_of(mask, cell):
    """Masks [B, Gh, Gw] as cells [B, rows, columns]; every cell is of one image."""
    rows, columns = (-(-side // cell) for side in mask.shape[1:])
    padded = torch.full((len(mask), rows * cell, columns * cell), -1)
    padded[:, : mask.shape[1], : mask.shape[2]] = mask
    blocks = padded.view(len(mask), rows, cell, columns, cell).transpose(2, 3).flatten(3)
    first = blocks[..., :1]
    assert ((blocks == first) | (blocks == -1)).all()
    return first[..., 0].bool()


@pytest.mark.parametrize("grid, cell", [((14, 14), 2), ((14, 14), 4), ((16, 16), 4), ((5, 9), 2), ((3, 7), 1)])
@pytest.mark.parametrize("lam", [0.5, 0.25, 0.9375])
def test_cells_are_taken_with_the_share_and_without_a_pattern(grid, cell, lam):
    count = 4000
    cells = cells_of(token_mask(count, grid, lam=lam, mask_type="grid", grid_cell=cell, seed=1), cell)
    size = cells[0].numel()
    wanted = math.floor(round((1 - lam) * size, 6))  # MixPro keeps ceil(lam * cells)
    assert (cells.sum((1, 2)) == wanted).all()
    # A hypergeometric draw: each cell with the same probability, any two as often as without replacement.
    share = wanted / size
    error = math.sqrt(share * (1 - share) / count)
    assert ((cells.double().mean(0) - share).abs() <= 5 * error + 1e-12).all()
    both = share * (wanted - 1) / (size - 1)
    error = math.sqrt(max(both * (1 - both), 0) / count)
    flat = cells.flatten(1)
    for distance in (1, 2, 5):
        joint = (flat[:, distance:] & flat[:, :-distance]).double().mean(0)
        assert ((joint - both).abs() <= 5 * error + 1e-12).all()


def test_a_drawn_lam_gives_every_number_of_cells_the_same_chance():
    count = 8000
    mask = token_mask(count, (8, 8), lam="beta", mask_type="grid", grid_cell=2, seed=2)
    cells = cells_of(mask, 2).sum((1, 2))
    # lam uniform: floor((1 - lam) * 16) is uniform on 0 ... 15.
    seen = torch.bincount(cells, minlength=17).double() / count
    assert seen[16] == 0
    assert ((seen[:16] - 1 / 16).abs() < 5 * math.sqrt(1 / 16 / count)).all()


def test_a_cell_of_one_token_is_a_random_mask():
    options = {"lam": "beta", "minimum_tokens": 0, "seed": 3}
    grid = token_mask(50, (6, 7), mask_type="grid", grid_cell=1, **options)
    assert torch.equal(grid, token_mask(50, (6, 7), mask_type="random", **options))


def test_targets_are_shares_of_the_area_with_timms_smoothing():
    images, labels = random_images((6, 3, 40, 56)), torch.tensor([0, 1, 2, 3, 4, 4])
    mixed = tokenmix(
        images, labels, num_classes=5, patch_size=8, mask_type="grid", grid_cell=2, mode="elem", lam=0.4, seed=1
    )
    own = 1 - mixed.mask.float().mean((1, 2))
    assert len(own.unique()) > 1  # cells at the edges are smaller
    expected = torch.full((6, 5), 0.1 / 5)
    expected[range(6), labels] += 0.9 * own
    expected[range(6), labels.flip(0)] += 0.9 * (1 - own)
    torch.testing.assert_close(mixed.targets, expected, rtol=0, atol=1e-6)


def test_a_grid_of_one_cell_is_refused():
    mixer = TokenMix(num_classes=5, patch_size=8, mask_type="grid", grid_cell=7)
    with pytest.raises(ValueError, match="grid_cell must be below the longer side of the token grid, 5x7, got 7"):
        mixer(random_images((2, 3, 40, 56)), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="grid_cell must be below"):
        token_mask(2, (4, 4), mask_type="grid")
    with pytest.raises(ValueError, match="grid_cell must be a whole number of at least 1"):
        TokenMix(num_classes=5, mask_type="grid", grid_cell=0)
