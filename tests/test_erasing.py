"""Random erasing on a CPU: against images that were erased by hand, against timm's draws, and what it leaves alone."""

import random

import numpy as np
import pytest
import torch
from mix_helpers import bits_equal, plain_weights, pooled_by_torchvision, random_images, reversed_batch
from scipy import stats
from torch import Tensor

from tokenmix_kernels import RandomErasing, TokenMix, tokenmix
from tokenmix_kernels.erasing import erase_settings
from tokenmix_kernels.reference.erasing import draw_rectangles, noise
from tokenmix_kernels.settings import ERASE_MODES, Settings
from tokenmix_kernels.tables import aspect_table, normal_segments, normal_table, ratio_table

CLASSES, PATCH = 7, 8
SHAPE = (5, 3, 32, 48)
OPTIONS = {"num_classes": CLASSES, "patch_size": PATCH, "minimum_tokens": 2}
MEAN, STD = (0.4, -0.3, 0.1), (0.5, 2.0, 1.0)
LABELS = torch.tensor([3, 0, 6, 1, 1])


def erased_by_hand(images: Tensor, seed: int, offset: int = 0, **erasing) -> Tensor:
    """Images with what the rectangles become in their place."""
    settings = Settings(CLASSES, **erase_settings(RandomErasing(**erasing)))
    batch, channels, height, width = images.shape
    result = images.clone()
    for i, own in enumerate(draw_rectangles(seed, offset, batch, height, width, settings)):
        filled = noise(seed, offset + i, own, channels, width, settings)
        for (top, bottom, left, right), values in zip(own, filled, strict=True):
            result[i, :, top:bottom, left:right] = values.to(images.dtype)
    return result


@pytest.mark.parametrize("draw", ["block", "cutmix", "mixup", "unmixed"])
@pytest.mark.parametrize("mode", ERASE_MODES)
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "half, ten channels", "float64", "in place"])
def test_a_mix_of_erased_images_is_that_of_images_that_were_erased_before(form, mode, draw):
    shape = (5, 10, 32, 48) if "ten" in form else SHAPE
    dtype = {"half, ten channels": torch.float16, "float64": torch.float64}.get(form, torch.float32)
    images = random_images(shape, dtype, form if form == "channels_last" else "contiguous")
    erasing = {"probability": 0.7, "mode": mode, "max_area": 0.6, "min_count": 1, "max_count": 3}
    second = {"mixup": 0.0, "unmixed": 0.5}.get(draw, 1.0)
    options = {
        "mixup_alpha": 0.8, "switch_prob": second, "prob": float(draw != "unmixed"), "label_smoothing": 0.0,
        "mask_type": "cutmix" if draw == "cutmix" else "block", "lam": 0.4, "mode": "elem", **OPTIONS,
    }  # fmt: skip
    erased = erased_by_hand(images, 5, 100, **erasing)
    given = images.clone()
    out = given if form == "in place" else None
    expected, targets = TokenMix(**options)(erased, LABELS, seed=5, sample_offset=100)
    got, got_targets = TokenMix(**options, erasing=RandomErasing(**erasing))(
        given, LABELS, seed=5, sample_offset=100, out=out
    )
    assert bits_equal(got, expected) and torch.equal(got_targets, targets)
    assert not bits_equal(erased, images)
    assert form == "in place" or bits_equal(given, images)


def test_erasing_comes_after_normalisation():
    """Of bytes too; a pixel that is not erased is as without erasing, whatever else is in its row."""
    images = random_images(SHAPE, torch.uint8)
    mean, std = tuple(255 * 0.5 for _ in range(3)), tuple(255 * 0.2 for _ in range(3))
    options = {**OPTIONS, "mean": mean, "std": std, "seed": 8, "mode": "elem"}
    erased = erased_by_hand(torch.zeros(SHAPE), 8, probability=1.0, mode="pixel")
    gone = erased != 0
    plain = tokenmix(images, LABELS, **options)
    got = tokenmix(images, LABELS, **options, erasing=RandomErasing(1.0, mode="pixel"))
    pixels = plain.mask.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)[:, None]
    shown = torch.where(pixels, gone.flip(0), gone)
    assert torch.equal(got.images[shown], torch.where(pixels, erased.flip(0), erased)[shown])
    assert torch.equal(got.images[~shown], plain.images[~shown])
    assert 0.1 < shown.float().mean() < 0.4


def test_blended_pixels_are_blended_of_noise_and_normalised_pixels():
    images = random_images(SHAPE)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 0.0, "mode": "elem", **OPTIONS}
    erased = erased_by_hand((images - mean) * (1 / std), 2, probability=1.0, mode="rand")
    expected, _ = TokenMix(**options)(erased, LABELS, seed=2)
    erasing = RandomErasing(1.0, mode="rand")
    got, _ = TokenMix(**options, mean=MEAN, std=STD, erasing=erasing)(images, LABELS, seed=2)
    # Where nothing is erased, pixels are normalised after they are blended.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    gone = (erased != (images - mean) * (1 / std)).all(1, keepdim=True)
    assert torch.equal(got.where(gone, 0), expected.where(gone, 0)) and gone.any()


def test_what_is_erased_depends_on_the_place_among_all_samples():
    images = random_images((8, 3, 32, 48))
    options = {"erasing": RandomErasing(0.5, mode="pixel"), "prob": 0.0, **OPTIONS}
    mix = TokenMix(**options)
    whole, _ = mix(images, torch.zeros(8, dtype=torch.int64), seed=3, sample_offset=40)
    parts = [
        mix(images[at : at + 4], torch.zeros(4, dtype=torch.int64), seed=3, sample_offset=40 + at)[0] for at in (0, 4)
    ]
    assert bits_equal(whole, torch.cat(parts))
    other, _ = mix(images, torch.zeros(8, dtype=torch.int64), seed=4, sample_offset=40)
    assert not bits_equal(whole, other)


def test_the_numbers_of_a_seed_stay_what_they_are():
    settings = Settings(CLASSES, **erase_settings(RandomErasing(1.0, max_count=2, mode="pixel")))
    assert draw_rectangles(1, 0, 3, 224, 224, settings) == [
        [(0, 67, 103, 164), (107, 150, 2, 40)],
        [(17, 130, 114, 157), (26, 93, 17, 118)],
        [(70, 180, 49, 109), (120, 211, 140, 196)],
    ]
    drawn = noise(1, 2, [(10, 11, 22, 26)], 3, 219, settings)[0]
    # Four pixels of three channels, of two draws each.
    assert (drawn * 2**16)[:, 0].tolist() == [
        [-88997, 168433, 33856, -54815],
        [-75939, -9511, 24349, 63742],
        [-24023, -59142, -11529, 85969],
    ]


def rectangle_of(image: Tensor) -> tuple[int, int, int, int] | None:
    """(top, bottom, left, right) of the zeros in an image [1, H, W] of ones."""
    rows, columns = (image[0] == 0).any(1).nonzero().flatten(), (image[0] == 0).any(0).nonzero().flatten()
    if not len(rows):
        return None
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize("options", [{}, {"min_area": 0.1, "max_area": 0.7, "min_aspect": 0.1, "max_aspect": 5.0}])
def test_rectangles_have_the_distribution_of_timms(options):
    """Two-sample tests against timm's draws. The seeds are fixed, so the outcome is too."""
    erase = pytest.importorskip("timm.data.random_erasing").RandomErasing
    count, height, width = 3000, 48, 64
    random.seed(1)
    timm = erase(0.5, mode="const", device="cpu", **options)
    theirs = [rectangle_of(timm(torch.ones(1, height, width))) for _ in range(count)]
    settings = Settings(CLASSES, **erase_settings(timm))
    ours = [own[0] if own else None for own in draw_rectangles(7, 0, count, height, width, settings)]
    shares = [sum(one is not None for one in drawn) / count for drawn in (theirs, ours)]
    assert abs(shares[0] - shares[1]) < 5 * (0.5 / count) ** 0.5
    sides = [np.array([one for one in drawn if one is not None]) for drawn in (theirs, ours)]
    measured = [
        {
            "area": (own[:, 1] - own[:, 0]) * (own[:, 3] - own[:, 2]),
            "aspect": (own[:, 1] - own[:, 0]) / (own[:, 3] - own[:, 2]),
            "top": own[:, 0] / (height - own[:, 1] + own[:, 0]),
            "left": own[:, 2] / (width - own[:, 3] + own[:, 2]),
        }
        for own in sides
    ]
    for name in measured[0]:
        assert stats.ks_2samp(measured[0][name], measured[1][name]).pvalue > 1e-3, name


def test_several_rectangles_share_the_area_as_timms_do():
    erase = pytest.importorskip("timm.data.random_erasing").RandomErasing
    count, height, width = 2000, 48, 64
    random.seed(2)
    timm = erase(1.0, mode="const", min_count=1, max_count=4, device="cpu")
    theirs = [float((timm(torch.ones(1, height, width)) == 0).float().mean()) for _ in range(count)]
    drawn = draw_rectangles(3, 0, count, height, width, Settings(CLASSES, **erase_settings(timm)))
    ours = []
    for own in drawn:
        image = torch.ones(height, width)
        for top, bottom, left, right in own:
            image[top:bottom, left:right] = 0
        ours.append(float((image == 0).float().mean()))
    assert stats.ks_2samp(theirs, ours).pvalue > 1e-3
    numbers = np.bincount([len(own) for own in drawn], minlength=5)[1:]
    assert stats.chisquare(numbers).pvalue > 1e-3


def test_noise_is_standard_normal():
    settings = Settings(CLASSES, **erase_settings(RandomErasing(1.0, mode="pixel")))
    drawn = noise(11, 3, [(5, 205, 10, 210)], 3, 224, settings)[0]
    values = drawn.double().flatten().numpy()
    number = len(values)
    assert abs(values.mean()) < 5 / number**0.5
    assert abs(values.var() - 1) < 5 * (2 / number) ** 0.5
    assert abs(stats.kurtosis(values)) < 5 * (24 / number) ** 0.5
    assert stats.kstest(values, "norm").pvalue > 1e-3
    for one, other in (
        (drawn[:, :, :-1], drawn[:, :, 1:]), (drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])
    ):  # fmt: skip
        assert abs((one * other).mean()) < 5 / one.numel() ** 0.5
    assert len(np.unique(values)) > 40000


def test_a_colour_is_one_for_each_channel_of_a_rectangle():
    settings = Settings(CLASSES, **erase_settings(RandomErasing(1.0, mode="rand", max_count=2)))
    box = (0, 4, 0, 5)
    drawn = torch.stack([torch.stack(noise(11, n, [box, box], 9, 32, settings)) for n in range(500)])
    assert (drawn == drawn[..., :1, :1]).all()
    values = drawn[..., 0, 0].flatten().numpy()
    assert len(np.unique(values)) > 3000 and stats.kstest(values, "norm").pvalue > 1e-3


def test_tables_hold_quantiles_and_ratios():
    starts = [2**octave * (1 + n / 8) for octave in range(16) for n in range(8)]
    exact = stats.norm.isf(np.array(starts) * 2.0**-17) * 2**16
    assert np.abs([entry & 0x7FFFF for entry in normal_segments()] - exact).max() <= 0.51
    # No entry is so near the middle of two units that another mathematical library could round it to the other.
    assert np.abs(exact - np.floor(exact) - 0.5).min() > 1e-3
    words = np.arange(1 << 16)
    normals = np.abs(normal_table())
    assert np.abs(normals - stats.norm.isf((words | 1) * 2.0**-17)).max() < 0.001
    assert (np.signbit(normal_table()) == (words & 1 == 1)).all()
    assert abs((normals**2).mean(dtype=np.float64) - 1) < 0.0005
    assert abs((normals**4).mean(dtype=np.float64) / (normals**2).mean(dtype=np.float64) ** 2 - 3) < 0.005
    for low, high in ((0.3, 1 / 0.3), (0.001, 1000.0), (2.0, 2.0)):
        table = np.array(aspect_table(low, high))
        ratio = np.exp(np.log(low) + (np.arange(1024) + 0.5) / 1024 * (np.log(high) - np.log(low)))
        assert np.abs((table & 0xFFFFFFFF) - 2**14 * np.sqrt(ratio)).max() <= 0.51
        assert np.abs((table >> 32) - 2**14 / np.sqrt(ratio)).max() <= 0.51
    assert [height | width << 16 for height, width in zip(table_of(0xFFFFFFFF), table_of(None), strict=True)] == list(
        ratio_table()
    )


def table_of(mask: int | None) -> list[int]:
    """Heights or widths of the default's table."""
    return [entry & mask if mask else entry >> 32 for entry in aspect_table(0.3, 1 / 0.3)]


def visible_of(images: Tensor, erased: Tensor) -> Tensor:
    """The share of each token that is not erased, [B, Gh, Gw]."""
    kept = (images == erased).all(1).float()
    return torch.nn.functional.avg_pool2d(kept[:, None], PATCH)[:, 0]


@pytest.mark.parametrize("mask_type", ["block", "cutmix"])
@pytest.mark.parametrize("with_maps", [True, False])
@pytest.mark.parametrize("count", [(1, 1), (2, 3)])
def test_erased_pixels_carry_no_evidence_where_asked(count, with_maps, mask_type):
    images, labels = random_images((4, 3, 32, 48)), LABELS[:4]
    maps = torch.rand(4, 7, 9, generator=torch.Generator().manual_seed(3)) if with_maps else None
    options = {**OPTIONS, "maps": maps, "seed": 9, "mode": "elem", "mask_type": mask_type}
    plain = tokenmix(images, labels, **options)
    erasing = RandomErasing(0.8, min_count=count[0], max_count=count[1], max_area=0.8)
    off, on = (tokenmix(images, labels, erasing=erasing._replace(evidence=on), **options) for on in (False, True))
    assert torch.equal(off.targets, plain.targets) and torch.equal(off.images, on.images)
    visible = visible_of(images, erased_by_hand(images, 9, **erasing._asdict()))
    pooled = torch.ones(4, 4, 6) if maps is None else pooled_by_torchvision(maps, None, (4, 6))
    moved = (plain.images != images).any(1).float()
    taken = torch.nn.functional.avg_pool2d(moved[:, None], PATCH)[:, 0]
    expected = plain_weights(pooled * visible, taken, reversed_batch(4))
    torch.testing.assert_close(on.weights, expected, rtol=0, atol=1e-5)
    assert (on.weights - off.weights).abs().max() > 0.02


def test_off_by_default_and_in_eval_mode():
    images = random_images(SHAPE)
    mix = TokenMix(**OPTIONS, prob=0.0, erasing=RandomErasing(1.0))
    assert TokenMix(**OPTIONS).settings.erase_prob == 0 and "erase" not in repr(TokenMix(**OPTIONS))
    assert "erase_mode='const'" in repr(mix)
    erased = mix(images, LABELS, seed=1)[0]
    assert bits_equal(erased, erased_by_hand(images, 1, probability=1.0))
    mix.mixup_enabled = False
    assert bits_equal(mix(images, LABELS, seed=1)[0], erased), "as in timm: --mixup-off-epoch does not end erasing"
    assert bits_equal(mix.eval()(images, LABELS, seed=1)[0], images)


@pytest.mark.parametrize("splits, untouched", [(0, 0), (1, 0), (2, 2), (3, 1)])
def test_the_first_split_of_a_batch_is_not_erased(splits, untouched):
    images = random_images(SHAPE)
    got = TokenMix(**OPTIONS, prob=0.0, erasing=RandomErasing(1.0, num_splits=splits))(images, LABELS, seed=1)[0]
    expected = erased_by_hand(images, 1, probability=1.0)
    expected[:untouched] = images[:untouched]
    assert bits_equal(got, expected)


def test_a_compiled_mix_erases_as_an_eager_one():
    images = random_images(SHAPE)
    mix = TokenMix(**OPTIONS, mode="elem", erasing=RandomErasing(0.7, mode="pixel"))
    compiled = torch.compile(mix, backend="aot_eager", fullgraph=True)
    assert bits_equal(compiled(images, LABELS, seed=3)[0], mix(images, LABELS, seed=3)[0])


def test_timms_own_object_is_taken():
    erase = pytest.importorskip("timm.data.random_erasing").RandomErasing
    got = TokenMix(**OPTIONS, erasing=erase(0.25, mode="pixel", max_count=3)).settings
    want = TokenMix(**OPTIONS, erasing=RandomErasing(0.25, mode="pixel", max_count=3)).settings
    assert got.erase_aspect == pytest.approx(want.erase_aspect, rel=1e-12)
    assert got._replace(erase_aspect=()) == want._replace(erase_aspect=())


@pytest.mark.parametrize(
    "erasing, message",
    [
        ({"probability": 1.5}, "probability of erasing must be in"),
        ({"min_area": 0.5}, "max_area must be at least min_area, 0.5"),
        ({"max_area": 2}, "max_area must be a share"),
        ({"min_aspect": 0}, "min_aspect must be a ratio"),
        ({"min_aspect": 3}, "max_aspect must be at least min_aspect"),
        ({"mode": "noise"}, "mode of erasing must be one of 'const', 'rand', 'pixel'"),
        ({"min_count": 0}, "min_count must be a whole number"),
        ({"max_count": 17}, "max_count must be at most 16"),
        ({"evidence": 1}, "evidence of erasing must be True or False"),
    ],
)
def test_settings_out_of_range_are_refused(erasing, message):
    with pytest.raises(ValueError, match=message):
        TokenMix(erasing=RandomErasing(**erasing))


def test_what_cannot_be_erased_is_refused():
    with pytest.raises(TypeError, match=r"erasing must be a RandomErasing, ours or timm's, got 0\.25"):
        TokenMix(erasing=0.25)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mean and std must be given where uint8 images are erased"):
        tokenmix(random_images(SHAPE, torch.uint8), LABELS, erasing=RandomErasing(), **OPTIONS)
