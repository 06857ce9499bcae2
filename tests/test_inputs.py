"""Bad input gets one sentence that names the argument, before anything is computed."""

import numpy as np
import pytest
import torch
from bad_inputs import (
    BAD,
    BATCH,
    BYTES,
    CLASSES,
    INT,
    PATCH,
    affines,
    boxes,
    images,
    in_place,
    ints,
    maps,
    packed,
    within,
)  # fmt: skip
from mix_helpers import bits_equal

from tokenmix_kernels import TokenMix, TopKMaps, pool_targets, token_mask, tokenmix


def same(one, other):
    return one.device.type == "meta" or bits_equal(one, other)


def within_operator(says):
    """Whether the error is one of values, which are checked inside the operator, after the seed was drawn."""
    values = ("must be in ", "must be finite", "must be invertible", "must be its own inverse")
    return any(part in says.replace("\\", "") for part in values) or (says.startswith("boxes") and "one of" not in says)


@pytest.mark.parametrize("given, error, says", BAD.values(), ids=BAD)
def test_tokenmix(given, error, says):
    call = {"images": images(), "labels": ints(0, 1, 2, 4), "num_classes": CLASSES, "patch_size": PATCH, **given}
    if "out" not in call and isinstance(call["images"], torch.Tensor) and call["images"].dim() == 4:
        dtype = call.get("out_dtype", call["images"].dtype)
        fits = not call["images"].requires_grad and dtype not in (INT, BYTES)
        if fits and "mean" not in call and "std" not in call:
            call["out"] = torch.full(call["images"].shape, 7, dtype=dtype)
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    before = {name: value.detach().clone() for name, value in tensors.items() if value.dtype.is_floating_point}
    state = torch.get_rng_state()
    with pytest.raises(error, match=says) as caught:
        tokenmix(**call)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 260
    for name, value in before.items():
        if tensors[name].element_size() <= 4:
            assert same(tensors[name].detach(), value), name
    if not within_operator(says):
        assert torch.equal(torch.get_rng_state(), state)


CONSTRUCTOR = {
    "probability": ({"prob": 1.5}, ValueError, r"prob must be a probability in \[0, 1\], got 1\.5"),
    "switch": ({"switch_prob": -0.5}, ValueError, r"switch_prob must be a probability in \[0, 1\], got -0\.5"),
    "switch-none": ({"switch_prob": None}, ValueError, "switch_prob must be a probability in .*got None"),
    "mixup": ({"mixup_alpha": -0.8}, ValueError, r"mixup_alpha must be in \[0, 1000\]; 0 switches the branch off"),
    "none": ({"mixup_alpha": 0, "cutmix_alpha": 0}, ValueError, "one of mixup_alpha and cutmix_alpha must be above 0"),
    "mode": ({"mode": "half"}, ValueError, "mode must be one of"),
    "mask-type": ({"mask_type": "given"}, ValueError, "mask_type must be one of .*'grid', got"),
    "out-dtype": ({"out_dtype": torch.complex64}, TypeError, "out_dtype must be float32"),
    "crop-axes": ({"crop_axes": "theirs"}, ValueError, "crop_axes must be one of"),
    "mean": ({"mean": (1, 2, 3)}, ValueError, "mean and std must be given together"),
}


@pytest.mark.parametrize("given, error, says", CONSTRUCTOR.values(), ids=CONSTRUCTOR)
def test_constructor(given, error, says):
    with pytest.raises(error, match=says):
        TokenMix(**given)


def test_forward_checks_what_tokenmix_does():
    mix = TokenMix(num_classes=CLASSES, patch_size=PATCH)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 9"):
        mix(images(), ints(0, 1, 2, 9))
    mix.mixup_enabled = False
    with pytest.raises(ValueError, match="maps must be of the same 4 images"):
        mix(images(), ints(0, 1, 2, 3), maps(3, 6, 7))


@pytest.mark.parametrize(
    "given, error, says",
    [
        ({"batch": 0}, ValueError, "batch must be a whole number of at least 1, .*got 0"),
        ({"grid": (65, 4)}, ValueError, "grid must be between 1x1 and 64x64, got 65x4"),
        ({"grid": (0, 4)}, ValueError, "grid must be between 1x1 and 64x64, got 0x4"),
        ({"mask_type": "given"}, ValueError, "mask_type must be one of"),
        ({"mode": "all"}, ValueError, "mode must be one of"),
        ({"lam": 2}, ValueError, "lam must be the share to keep"),
        ({"seed": torch.tensor(0.0)}, ValueError, "seed must be"),
        ({"backend": "cpu"}, ValueError, "backend must be one of"),
    ],
)
def test_token_mask(given, error, says):
    with pytest.raises(error, match=says):
        token_mask(**{"batch": 2, "grid": (4, 6), **given})


@pytest.mark.parametrize(
    "given, error, says",
    [
        ({"mask": torch.zeros(4, 6).bool()}, ValueError, r"mask must be \[B, Gh, Gw\], got \[4, 6\]"),
        ({"mask": torch.zeros(4, 4, 6)}, TypeError, "mask must be bool"),
        ({"mask": torch.zeros(4, 65, 6).bool()}, ValueError, "grid must be between"),
        ({"mask": None}, TypeError, r"mask must be a torch\.Tensor"),
        ({"maps": maps(3, 6, 7)}, ValueError, "maps must be of the same 4 images, got maps of 3"),
        ({"maps": maps().requires_grad_()}, ValueError, "maps must not require grad"),
        ({"labels": ints(0, 1)}, ValueError, r"labels must be \[4\]"),
        ({"labels": torch.zeros(4)}, TypeError, "labels must be one of int64, .*class number"),
        ({"boxes": boxes(0, 0, 2, 1)}, ValueError, "boxes must be"),
        ({"flips": torch.zeros(4)}, TypeError, "flips must be bool, got float32"),
        ({"ids": ints(0, 1, 2, 4)}, ValueError, r"ids must be in \[0, 4\), got 4"),
        ({"affines": affines(0, 0, 0, 0, 0, 0)}, ValueError, "affines must be invertible"),
        ({"partner": ints(0, 1, 2, 4)}, ValueError, r"partner must be in \[0, 4\), got 4"),
        ({"backend": "numpy"}, ValueError, "backend must be one of"),
    ],
)
def test_pool_targets(given, error, says):
    call = {"maps": maps(), "labels": ints(0, 1, 2, 3), "mask": torch.zeros(4, 4, 6, dtype=torch.bool), **given}
    with pytest.raises(error, match=says):
        pool_targets(**call)


def test_what_is_at_the_edge_of_these_is_good():
    """So that no check above refuses everything."""
    call = {"images": images(), "labels": ints(0, 1, 2, 4), "num_classes": CLASSES, "patch_size": PATCH, "seed": 1}
    base = tokenmix(**call)
    good = [
        {"images": images().requires_grad_()},
        {"images": images().double()},
        {"labels": ints(0, 1, 2, 4, dtype=torch.int16)},
        {"labels": ints(0, 1, 1, 0, dtype=torch.bool)},
        {"patch_size": (8, 8), "num_classes": np.int64(CLASSES), "lam": np.float32(0.5), "seed": np.int64(1)},
        {"maps": maps(BATCH, 64, 64), "boxes": boxes(0.999, 0, 1, 1)},
        {"maps": maps(BATCH, CLASSES, 6, 7), "boxes": boxes().half()},
        {"maps": TopKMaps(maps(BATCH, 2, 6, 7), maps(BATCH, 2, 6, 7, dtype=torch.int16))},
        {"maps": maps(9, 6, 7), "ids": ints(8, 0, 8, 3), "affines": affines(0, -1, 1, 1, 0, 0)},
        {"labels": packed()},
        {"labels": packed(crop=(0.6, 0.2, 0.4, 0.8)), "crop_axes": "published"},
        {"labels": ints(4, 4, 0, 0, dtype=INT), "partner": ints(3, 3, 0, 0, dtype=INT)},
        within(BATCH * 3 * 32 * 48),
        in_place(images(), partner=ints(1, 0, 2, 3)),
        {"seed": -(2**63)},
        {"seed": 2**63 - 1, "sample_offset": 2**40},
        {"lam": 0, "minimum_tokens": 10**6},
        {"mean": torch.zeros(3), "std": torch.ones(3), "out_dtype": torch.float16},
    ]
    with torch.no_grad():
        for given in good:
            mixed = tokenmix(**{**call, **given})
            assert mixed.targets.shape == base.targets.shape and mixed.targets.isfinite().all()
            assert mixed.images.isfinite().all() and not mixed.images.requires_grad
    assert tokenmix(**{**call, "images": images(1, 1, 512, 512), "labels": ints(0)}).mask.shape == (1, 64, 64)
    assert token_mask(1, (64, 64), seed=0).shape == (1, 64, 64)
