"""How a launch is divided, and what is prefetched: plain functions of the shape, the dtype, the batch and the card."""

from fractions import Fraction

import pytest
import torch

from tokenmix_kernels.kernels.launch import Card, card_of, launch_shape
from tokenmix_kernels.tables import byte_shift

A100, H100 = Card(108, 40 << 20, True), Card(132, 50 << 20, True)


def shape(
    batch=128, in_bytes=2, out_bytes=2, height=224, patch=16, dense=True, erases=False, in_place=False, card=H100
):
    return launch_shape(
        batch, 3, height, 224, patch, False, in_bytes, out_bytes, 16, dense, in_bytes != out_bytes, False, False,
        erases, in_place, card,
    )[0]  # fmt: skip


@pytest.mark.parametrize("card", [A100, H100])
@pytest.mark.parametrize("batch", [16, 32, 64, 128, 256, 1024])
def test_every_multiprocessor_gets_pixels_where_rows_suffice(batch, card):
    tile = shape(batch, card=card)
    assert tile.PIXELS * tile.ROWS >= 14 > (tile.PIXELS - 1) * tile.ROWS
    assert batch * tile.PIXELS >= min(1.5 * card.multiprocessors, batch * 14)


@pytest.mark.parametrize("in_bytes", [1, 2, 4])
def test_programs_that_erase_are_short(in_bytes):
    assert shape(in_bytes=in_bytes, out_bytes=max(in_bytes, 2), erases=True).ROWS == 1


@pytest.mark.parametrize("card", [A100, H100])
@pytest.mark.parametrize("in_bytes", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 32, 128, 1024])
def test_programs_that_run_at_once_prefetch_a_fifth_of_the_cache_at_most(batch, in_bytes, card):
    tile = shape(batch, in_bytes, max(in_bytes, 2), card=card)
    at_once = min(batch * tile.PIXELS, 8 * card.multiprocessors)
    assert 0 < tile.AHEAD * at_once * 3 * 224 * in_bytes <= card.l2_bytes / 5


@pytest.mark.parametrize("height", [16, 48, 224, 400])
@pytest.mark.parametrize("batch", [1, 5, 128])
def test_no_program_prefetches_beyond_its_sample(batch, height):
    tile = shape(batch, height=height)
    assert height >= (tile.PIXELS - 1) * tile.ROWS * 16 + tile.AHEAD


@pytest.mark.parametrize("without", [{"dense": False}, {"in_place": True}, {"card": Card(132, 50 << 20, False)}])
def test_nothing_is_prefetched_where_it_would_be_in_vain(without):
    assert shape(**without).AHEAD == 0


@pytest.mark.parametrize(
    "batch, in_bytes, card, first",
    [(16, 2, H100, False), (32, 2, H100, False), (128, 2, H100, True), (128, 2, A100, True), (128, 1, H100, True),
     (128, 1, A100, False), (1024, 2, H100, False)],
)  # fmt: skip
def test_targets_come_first_where_there_are_many_programs_with_room_for_all(batch, in_bytes, card, first):
    tile = shape(batch, in_bytes, card=card)
    assert first == tile.TARGETS_FIRST
    assert not first or batch * (tile.PIXELS + 2) <= 8 * card.multiprocessors


def test_a_machine_without_gpu_has_a_stated_card():
    assert card_of(torch.device("cpu")) == card_of(torch.device("meta")) == Card(108, 0, False)


@pytest.mark.parametrize("mean", [0.0, 1e-30, 1e-7, 0.5, 123.675, 255.0, -255.0])
@pytest.mark.parametrize("std", [1e-3, 0.2, 1.0, 57.375, 127.5, 1e4])
def test_a_byte_times_scale_plus_shift_is_exact_in_float64(mean, std):
    """So rounding it to fp32 is what a fused multiply-add does. Mixtures of bytes count in units of 2**-16."""
    (shift,) = byte_shift((mean,), (std,)).tolist()
    scale = (1 / torch.tensor(std, dtype=torch.float32)).item()
    assert shift == pytest.approx(-mean * scale, rel=1e-7, abs=scale * 2**-42)
    for units in (*range(0, 256 * 65536, 65536 * 5), 255 * 65536, 1, 12345677, 16711679):
        exact = Fraction(units, 65536) * Fraction(scale) + Fraction(shift)
        assert Fraction(units / 65536 * scale + shift) == exact
