"""Each way in which the reference goes through memory gives the same bits: NumPy or PyTorch, words or rectangles."""

import math

import pytest
import torch
from mix_helpers import DTYPES, bits_equal, random_images

from tokenmix_kernels import TokenMix, tokenmix
from tokenmix_kernels.reference import draw, lines, pixels, small

BRANCHES = {
    "mixup": {"cutmix_alpha": 0.0},
    "block": {"mixup_alpha": 0.0},
    "cutmix": {"mixup_alpha": 0.0, "mask_type": "cutmix", "lam": "beta"},
    "either": {"mask_type": "cutmix", "lam": "beta", "prob": 0.8},
}
PARTNERS = {
    "reversed": None,
    "down": [3, 2, 1, 0, 6, 5, 4],
    "not mutual": [0, 0, 5, 1, 2, 2, 4],
    "one": [6] * 7,
}


def both_ways(monkeypatch: pytest.MonkeyPatch, call, module, name, value):
    """The results of a call as the library makes it, and with a function or number of a module replaced."""
    used = call()
    with monkeypatch.context() as patched:
        patched.setattr(module, name, value)
        return used, call()


@pytest.mark.parametrize("partner", PARTNERS, ids=str)
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize(
    "dtype, layout",
    [
        *((dtype, "contiguous") for dtype in (*DTYPES, torch.float64)),
        (torch.float32, "channels_last"), (torch.bfloat16, "channels_last"), (torch.float32, "offset"),
    ],
)  # fmt: skip
def test_numpy_and_pytorch_mix_alike(dtype, layout, branch, mode, partner, monkeypatch):
    images = random_images((7, 3, 24, 40), dtype, layout)
    others = None if PARTNERS[partner] is None else torch.tensor(PARTNERS[partner])
    mix = TokenMix(num_classes=7, patch_size=8, mode=mode, **BRANCHES[branch])
    places = ["apart", "in place"] if others is None or partner == "down" else ["apart"]
    for place in places:
        for seed in range(3):

            def call(seed=seed, place=place):
                own = images.clone(memory_format=torch.preserve_format)
                out = own
                if place == "apart":
                    out = torch.empty_like(own)
                    out.fill_(math.nan if out.is_floating_point() else 0)
                return mix(own, torch.arange(7), partner=others, seed=seed, out=out)[0]

            used, plain = both_ways(monkeypatch, call, pixels, "fits", lambda *_: False)
            assert bits_equal(used, plain), f"{place}, seed {seed}"


@pytest.mark.parametrize("count, threads, expected", [(8, 2, True), (200, 1, True), (200, 2, False)])
def test_numpy_mixes_where_no_other_thread_could_help(count, threads, expected, monkeypatch):
    images = random_images((count, 3, 16, 16))
    seen = []
    monkeypatch.setattr(pixels, "mix_small", lambda *given: (seen.append(True), small.mix_small(*given)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    TokenMix(num_classes=9, patch_size=8)(images, torch.zeros(count, dtype=torch.int64))
    assert bool(seen) == expected


def test_images_that_require_a_gradient_are_mixed_by_numpy():
    images = random_images((4, 3, 16, 16)).requires_grad_()
    with torch.no_grad():
        mixed = tokenmix(images, torch.arange(4), num_classes=4, patch_size=8, seed=1)
    plain = tokenmix(images.detach(), torch.arange(4), num_classes=4, patch_size=8, seed=1)
    assert bits_equal(mixed.images, plain.images) and not mixed.images.requires_grad


@pytest.mark.filterwarnings("error")
def test_numpy_blends_what_is_not_finite_without_a_warning(monkeypatch):
    images = torch.zeros(4, 3, 16, 16)
    images[0], images[1], images[2], images[3] = math.inf, 3e38, 3e38, -math.inf
    mix = TokenMix(cutmix_alpha=0, num_classes=4, patch_size=8)
    used, plain = both_ways(
        monkeypatch, lambda: mix(images, torch.arange(4), seed=2)[0], pixels, "fits", lambda *_: False
    )  # fmt: skip
    assert used[0].isnan().all() and torch.equal(used.isnan(), plain.isnan())
    assert torch.equal(used.nan_to_num(), plain.nan_to_num())


@pytest.mark.parametrize("mask_type", ["block", "cutmix"])
def test_large_images_that_require_a_gradient_are_mixed(mask_type):
    images = random_images((2, 3, 160, 160)).requires_grad_()
    options = {"num_classes": 2, "mask_type": mask_type, "lam": 0.37, "seed": 1}
    with torch.no_grad():
        mixed = tokenmix(images, torch.arange(2), **options)
    assert bits_equal(mixed.images, tokenmix(images.detach(), torch.arange(2), **options).images)


def test_large_images_take_rectangles_by_words(monkeypatch):
    """Rectangles of any width at any column, also within one word: against slices of the partner."""
    partner = torch.tensor([1, 0, 2])
    widths = set()
    for dtype, layout, width in (
        (torch.float32, "contiguous", 224), (torch.float32, "channels_last", 224), (torch.float16, "contiguous", 240),
        (torch.float64, "contiguous", 176), (torch.uint8, "channels_last", 160), (torch.float32, "offset", 224),
    ):  # fmt: skip
        images = random_images((3, 3, 176, width), dtype, layout)
        assert lines.is_large(images)
        for mode in ("batch", "elem"):
            for seed in range(12):
                mix = TokenMix(
                    mixup_alpha=0, mask_type="cutmix", lam=1 - 0.0004 * 4**seed if seed < 6 else "beta", mode=mode,
                    num_classes=3, return_mix=True,
                )  # fmt: skip
                out = torch.empty_like(images)
                out.fill_(math.nan if out.is_floating_point() else 0)

                def call(mix=mix, out=out, seed=seed, images=images):
                    return mix(images, torch.arange(3), partner=partner, seed=seed, out=out)[0].clone()

                drawn = draw(seed, 0, partner, None, 176, width, mix.settings)
                expected = images.clone()
                for i, (top, bottom, left, right) in enumerate(drawn.rectangle):
                    expected[i, :, top:bottom, left:right] = images[partner[i], :, top:bottom, left:right]
                    widths.add(right - left)
                used, plain = both_ways(monkeypatch, call, lines, "WIDE", 99)
                assert bits_equal(used, expected) and bits_equal(plain, expected), (dtype, layout, mode, seed)
    assert min(widths) <= 3 and len(widths) > 30
