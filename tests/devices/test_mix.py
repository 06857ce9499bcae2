"""Each device against the reference: masks and pixels bit for bit, targets to 1e-6."""

from typing import Any

import pytest
import torch
from device_helpers import Device
from mix_helpers import bits_equal, random_boxes, random_images
from torch import Tensor

from tokenmix_kernels import TokenMix, TopKMaps, call, kernels, pool_targets, token_mask, tokenmix
from tokenmix_kernels.inputs import Evidence
from tokenmix_kernels.kernels.groups import Results
from tokenmix_kernels.settings import Settings

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
BYTES = {"mean": MEAN, "std": STD}
TOLERANCE = 1e-6
CLASSES = 7
SHAPE = (5, 3, 32, 48)

DRAWS: dict[str, dict[str, Any]] = {
    "block": {"mode": "elem"},
    "block, beta": {"mode": "elem", "lam": "beta"},
    "block, batch": {"mode": "batch"},
    "block, pair": {"mode": "pair"},
    "random": {"mask_type": "random", "mode": "elem"},
    "random, beta": {"mask_type": "random", "mode": "pair", "lam": "beta"},
    "grid": {"mask_type": "grid", "mode": "elem", "grid_cell": 2},
    "grid, beta": {"mask_type": "grid", "mode": "pair", "lam": "beta", "grid_cell": 3},
    "cutmix": {"mask_type": "cutmix", "mode": "elem", "lam": "beta"},
    "cutmix, half": {"mask_type": "cutmix", "mode": "elem", "lam": 0.5},
    "cutmix, minmax": {"mask_type": "cutmix", "mode": "elem", "cutmix_minmax": (0.2, 0.7)},
}


def maps_of(form: str, batch: int, h: int = 7, w: int = 9) -> Any:
    torch.manual_seed(3)
    if form == "none":
        return None
    if form == "own":
        return torch.rand(batch, h, w, dtype=torch.float16)
    if form == "all":
        return torch.rand(batch, CLASSES, h, w)
    if form == "bytes":
        return torch.randint(0, 256, (batch, h, w), dtype=torch.uint8)
    assert form == "topk"
    return TopKMaps(torch.rand(batch, 3, h, w), torch.randint(0, CLASSES, (batch, 3, h, w), dtype=torch.int16))


def labels_of(batch: int) -> Tensor:
    return torch.randint(0, CLASSES, (batch,), generator=torch.Generator().manual_seed(1))


def both(device: Device, images: Tensor, labels: Tensor, **options: Any) -> Any:
    """The mix by the reference on a CPU, and on the device; the latter into memory that held NaN (or 0xAA)."""
    options = {"num_classes": CLASSES, "patch_size": 8, "minimum_tokens": 2, "seed": 11} | options
    dtype = options.pop("out_dtype", None) or (torch.float32 if "mean" in options else images.dtype)
    expected = tokenmix(images, labels, backend="reference", out_dtype=dtype, **options)
    there = device.put(images)
    poison = torch.empty_like(there, dtype=dtype).fill_(float("nan") if dtype.is_floating_point else 0xAA)
    options = device.put(options)
    got = tokenmix(there, device.put(labels), backend=device.backend, out_dtype=dtype, out=poison, **options)
    assert bits_equal(there.cpu(), images)
    return expected, got


def assert_same(expected: Any, got: Any) -> None:
    assert torch.equal(expected.mask, got.mask.cpu())
    assert bits_equal(expected.images, got.images.cpu())
    assert_close(got.weights, expected.weights)
    assert_close(got.targets, expected.targets)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.interpreter_takes(every=3)
@pytest.mark.parametrize("form", ["none", "own", "all", "topk"])
@pytest.mark.parametrize("draw", DRAWS)
def test_every_draw_with_every_form_of_maps(device, draw, form):
    options = dict(DRAWS[draw])
    if form != "none":
        options |= {"maps": maps_of(form, 5), "boxes": random_boxes(5)}
    assert_same(*both(device, random_images(SHAPE), labels_of(5), **options))


@pytest.mark.interpreter_takes(every=3)
@pytest.mark.parametrize("layout", ["channels_last", "batch_slice", "spatial_slice", "transposed", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("draw", ["block", "cutmix"])
def test_every_layout_and_dtype(device, draw, dtype, layout):
    assert_same(*both(device, random_images((3, 3, 32, 48), dtype, layout), labels_of(3), **DRAWS[draw]))


@pytest.mark.interpreter_takes(every=3)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("draw", ["block", "cutmix"])
def test_bytes_are_normalised(device, draw, layout, out_dtype):
    images = random_images((3, 3, 32, 48), torch.uint8, layout)
    assert_same(*both(device, images, labels_of(3), out_dtype=out_dtype, **BYTES, **DRAWS[draw]))


def test_bytes_to_bfloat16_are_rounded_where_the_kernels_are_compiled(device):
    """The interpreter's stores cut float32 off: so, within one unit in the last place."""
    images = random_images((3, 3, 32, 48), torch.uint8)
    expected, got = both(device, images, labels_of(3), out_dtype=torch.bfloat16, mode="elem", **BYTES)
    if device.rounds:
        assert_same(expected, got)
    torch.testing.assert_close(got.images.cpu(), expected.images, rtol=2.0**-7, atol=0)


@pytest.mark.interpreter_takes(every=5)
@pytest.mark.parametrize(
    ("patch", "size"), [(4, (20, 12)), (8, (8, 72)), (14, (42, 28)), (16, (48, 80)), (32, (64, 96)), (4, (132, 16))]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_patch_size_and_grids_that_are_not_square(device, patch, size, channels):
    images = random_images((2, channels, *size))
    assert_same(*both(device, images, labels_of(2), patch_size=patch, mode="elem", minimum_tokens=1))


def test_a_grid_wider_than_a_word(device):
    images = random_images((2, 1, 64, 160))
    for mask_type in ("block", "random"):
        assert_same(*both(device, images, labels_of(2), patch_size=4, mode="elem", mask_type=mask_type))


@pytest.mark.interpreter_takes(every=4)
@pytest.mark.parametrize("draw", ["block", "block, batch", "block, pair", "random", "cutmix"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_slice"])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_in_place(device, draw, layout, batch):
    images = random_images((batch, 3, 32, 48), torch.float16, layout)
    options = {"num_classes": CLASSES, "patch_size": 8, "seed": 4, **DRAWS[draw]}
    apart = tokenmix(images, labels_of(batch), backend="reference", **options)
    there = device.put(images)
    got = tokenmix(there, device.put(labels_of(batch)), backend=device.backend, out=there, **options)
    assert got.images is there
    assert_same(apart, got)
    assert_same(apart, tokenmix(images, labels_of(batch), backend="reference", out=images, **options))


@pytest.mark.interpreter_takes(every=5)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8], ids=str)
def test_all_branches_per_element(device, dtype, mask_type, in_place):
    mix = TokenMix(
        prob=0.8, mode="elem", num_classes=CLASSES, mask_type=mask_type, patch_size=8, minimum_tokens=2, lam="beta"
    )
    images = random_images((9, 3, 16, 24), dtype)
    there, labels = device.put(images), device.put(labels_of(9))
    got, got_targets = mix(there, labels, seed=5, backend=device.backend, out=there if in_place else None)
    expected, targets = mix(images, labels_of(9), seed=5, backend="reference", out=images if in_place else None)
    assert bits_equal(got.cpu(), expected)
    assert_close(got_targets, targets)


def test_nothing_mixed_still_normalises(device):
    mix = TokenMix(num_classes=CLASSES, patch_size=8, **BYTES)
    mix.mixup_enabled = False
    images = random_images((3, 3, 16, 24), torch.uint8)
    expected, targets = mix(images, labels_of(3), seed=1, backend="reference")
    got, got_targets = mix(device.put(images), device.put(labels_of(3)), seed=1, backend=device.backend)
    assert bits_equal(got.cpu(), expected)
    assert_close(got_targets, targets)


@pytest.mark.interpreter_takes(every=2)
@pytest.mark.parametrize("partner", [[3, 3, 1, 0, 2], [0, 1, 2, 3, 4], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_any_partner(device, partner, mode):
    options = {"partner": torch.tensor(partner), "mode": mode, "maps": maps_of("own", 5)}
    assert_same(*both(device, random_images(SHAPE), labels_of(5), **options))


@pytest.mark.devices("interpreter", "gpu")
def test_partner_and_labels_out_of_range_are_harmless(device):
    """What a GPU cannot be asked about: the sample itself is its partner, and the label counts for nothing."""
    images, labels, partner = random_images((3, 3, 16, 24)), torch.tensor([0, 99, -1]), torch.tensor([77, -5, 1])
    there, evidence = device.put(images), device.put(Evidence(maps_of("all", 3)))
    out = torch.full_like(there, float("nan"))
    settings = Settings(num_classes=CLASSES, patch_size=8, mode="elem")
    labels, partner = device.put(labels), device.put(partner)
    targets, _, weights, _ = kernels.mix(there, out, labels, partner, evidence, None, torch.tensor(2), 0, settings)
    assert bits_equal(out[:2].cpu(), images[:2])
    assert targets.isfinite().all() and weights.isfinite().all()
    rest = 0.1 / CLASSES
    assert_close(targets[1], torch.full((CLASSES,), rest))
    assert_close(targets[2], torch.full((CLASSES,), rest))


def test_mask_that_is_given(device):
    mask = torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    assert_same(*both(device, random_images(SHAPE), labels_of(5), mask=mask, maps=maps_of("topk", 5)))


@pytest.mark.parametrize("place", ["ids", "flips", "affines"])
def test_places_in_maps(device, place):
    torch.manual_seed(5)
    options: dict[str, Any] = {"mode": "elem"}
    if place == "ids":
        options |= {"maps": maps_of("bytes", 11), "ids": torch.randint(0, 11, (5,)), "boxes": random_boxes(5)}
    elif place == "flips":
        options |= {"maps": maps_of("own", 5), "flips": torch.rand(5) < 0.5, "boxes": random_boxes(5)}
    else:
        affines = torch.eye(2, 3) + 0.3 * torch.randn(5, 2, 3)
        options |= {"maps": maps_of("bytes", 11), "ids": torch.arange(5, dtype=torch.int32), "affines": affines}
    assert_same(*both(device, random_images(SHAPE), labels_of(5), **options))


def test_packed_label_maps(device):
    packed = torch.rand(4, 3, 5, 8, 8)
    packed[:, 1] = torch.randint(0, CLASSES, (4, 5, 8, 8)).float()
    packed[:, 2, 0, 0, :4] = torch.tensor([0.1, 0.2, 0.5, 0.6])
    packed[:, 2, 0, 0, 5] = labels_of(4).float()
    for crop_axes in ("correct", "published"):
        assert_same(*both(device, random_images((4, 3, 32, 48)), packed, crop_axes=crop_axes, mode="elem"))


def test_maps_without_evidence(device):
    maps = torch.rand(5, 7, 9)
    maps[0], maps[1], maps[2, 0, 0], maps[3, 0, 0] = 0.0, -1.0, float("nan"), float("inf")
    expected, got = both(device, random_images(SHAPE), labels_of(5), maps=maps, mode="elem")
    assert_same(expected, got)
    area = expected.mask.float().mean((1, 2))
    for row in range(4):
        assert abs(expected.weights[row, 0] - (1 - area[row])) < TOLERANCE


@pytest.mark.devices("interpreter", "gpu")
def test_seed_in_memory(device):
    """A seed that is on the device is read by the kernel: under the interpreter too, through a pointer."""
    settings = Settings(num_classes=1, patch_size=1, mode="elem")
    for number in (0, 1, -1, 2**62 + 12345, -(2**63), 2**32 - 1):
        mask = torch.zeros(2, 6, 6, dtype=torch.bool, device=device.home)
        shape, results = (2, 1, 6, 6), Results(None, None, mask, None)
        ready = kernels.prepare(
            None, None, None, None, Evidence(), None, torch.tensor(number), 0, settings, results, shape, mask.device
        )
        seed = torch.tensor(number, device=device.home)
        ready._replace(arguments=ready.arguments | {"seed": seed, "seed_high": None}).run()
        assert torch.equal(mask.cpu(), token_mask(2, (6, 6), seed=number, backend="reference"))


@pytest.mark.parametrize("mask_type", ["block", "random", "grid", "cutmix"])
def test_parts(device, mask_type):
    options: dict[str, Any] = {"mask_type": mask_type, "seed": 9, "sample_offset": 2**33 + 5, "lam": "beta"}
    mask = token_mask(4, (5, 7), backend="reference", **options)
    got = token_mask(4, (5, 7), device=device.home, backend=device.backend, **options)
    assert got.device.type == device.home and torch.equal(mask, got.cpu())
    given = {"maps": maps_of("own", 4), "labels": labels_of(4), "mask": mask, "boxes": random_boxes(4)}
    weights = pool_targets(**device.put(given), backend=device.backend)
    assert_close(weights, pool_targets(**given, backend="reference"))


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 6, 9, 1025, 5000])
def test_target_rows_of_any_width(device, classes):
    """All pairs of labels near the ends of a row and in one four; rows begin anywhere between 16-byte borders."""
    near = sorted({label for label in (0, 3, classes - 2, classes - 1) if 0 <= label < classes})
    pairs = [(own, other) for own in near for other in near]
    labels = torch.tensor([label for pair in pairs for label in pair])
    partner = torch.arange(len(labels)).view(-1, 2).flip(1).flatten()
    images = random_images((len(labels), 1, 8, 8))
    # A rectangle each, which is drawn in a moment: the interpreter takes seconds for other masks.
    options = {"num_classes": classes, "partner": partner, "mode": "elem", "mask_type": "cutmix", "patch_size": 4}
    assert_same(*both(device, images, labels, **options))


@pytest.mark.interpreter_takes(every=3)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("draw", ["block", "cutmix"])
def test_each_channel_has_its_own_mean(device, draw, channels):
    images = random_images((2, channels, 16, 40), torch.uint8, "channels_last")
    mean, std = [10.0 + 20 * c for c in range(channels)], [50.0 + c for c in range(channels)]
    assert_same(*both(device, images, labels_of(2), mean=mean, std=std, out_dtype=torch.float16, **DRAWS[draw]))


@pytest.mark.interpreter_takes(every=5)
@pytest.mark.parametrize(
    "into", ["contiguous", "channels_last", "batch_slice", "spatial_slice", "transposed", "offset"]
)
@pytest.mark.parametrize(
    ("layout", "draw"), [("contiguous", "block"), ("channels_last", "block"), ("contiguous", "cutmix")]
)
def test_out_may_lie_in_memory_in_another_way(device, draw, layout, into):
    images = random_images((2, 3, 16, 24), torch.float16, layout)
    out = device.put(random_images((2, 3, 16, 24), torch.float16, into, seed=1).fill_(float("nan")))
    options = {"num_classes": CLASSES, "patch_size": 8, "minimum_tokens": 2, "seed": 11, **DRAWS[draw]}
    got = tokenmix(device.put(images), device.put(labels_of(2)), backend=device.backend, out=out, **options)
    assert got.images is out
    assert_same(tokenmix(images, labels_of(2), backend="reference", **options), got)


@pytest.mark.devices("interpreter", "gpu")
def test_a_step_on_a_gpu_repeats_no_checks_but_misses_no_change(device, monkeypatch):
    """What an eager call on a GPU does, on CPU tensors too: no operator, and each form of inputs is checked once."""
    monkeypatch.setattr(call, "launches_at_once", lambda images: True)
    monkeypatch.setattr(call, "PASSED", {})
    asked = []
    real = call.inputs.check_form
    monkeypatch.setattr(call.inputs, "check_form", lambda *given: asked.append(1) or real(*given))
    images, labels, maps = random_images((5, 1, 16, 24)), labels_of(5), maps_of("own", 5)
    options: dict[str, Any] = {"num_classes": CLASSES, "patch_size": 8, "mode": "elem", "seed": 3}
    expected = tokenmix(images, labels, maps=maps, backend="reference", **options)
    fewer = tokenmix(images[:4], labels[:4], maps=maps[:4], backend="reference", **options)
    images, labels, maps = map(device.put, (images, labels, maps))
    asked.clear()
    for _ in range(3):
        assert_same(expected, tokenmix(images, labels, maps=maps, **options))
    assert len(asked) == 1
    assert_same(fewer, tokenmix(images[:4], labels[:4], maps=maps[:4], **options))
    with pytest.raises(ValueError, match="maps must be of the same 4 images"):
        tokenmix(images[:4], labels[:4], maps=maps, **options)
    with pytest.raises(ValueError, match="patch_size"):
        tokenmix(images[:, :, :-1], labels, maps=maps, **options)
    with pytest.raises(ValueError, match="require grad"):
        tokenmix(images.clone().requires_grad_(), labels, maps=maps, **options)
