"""The tracked transform: timm's images, and a geometry that says where every pixel came from."""

import pickle
import random
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

timm_data = pytest.importorskip("timm.data", reason="needs the extra 'maps'")

from PIL import Image, ImageOps  # noqa: E402
from timm.data.auto_augment import AugmentOp  # noqa: E402

from tokenmix_kernels.transforms import (  # noqa: E402
    EvalTransform,
    Geometry,
    Recorder,
    as_geometry,
    tracked_transform,
)

GEOMETRIC = ["Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"]


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def noise_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ramp_image(width, height):
    """Red grows with x, green with y, blue is full: each pixel says where it lies and that it is one."""
    x = (np.arange(width) + 0.5) / width * 255
    y = (np.arange(height) + 0.5) / height * 255
    pixels = np.stack(np.broadcast_arrays(x[None, :], y[:, None], 255.0), -1)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def assert_geometry_tells_the_source(pixels, geometry, least_inside, whole=True):
    """Compare the position each output pixel shows with the one that the affine gives for it."""
    height, width = pixels.shape[1:]
    rows, columns = (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    expected = torch.einsum("ij,jhw->ihw", geometry.affine, torch.stack([x, y, torch.ones_like(x)]))
    solid = pixels[2] == 255  # not filled, and not interpolated with the fill colour
    # One pixel further in, because bicubic interpolation overshoots beside an edge.
    core = -torch.nn.functional.max_pool2d((~solid).float()[None], 5, 1, 2)[0] == 0
    assert core.float().mean() > least_inside
    error = (pixels[:2].float() / 255 - expected).abs()[:, core]
    assert error.max() < 0.012, error.max()
    if not whole:
        return
    # And all that comes from within the crop is there, not filled.
    x0, y0, x1, y1 = geometry.box
    margin = 0.02
    deep = (
        (expected[0] > x0 + margin) & (expected[0] < x1 - margin)
        & (expected[1] > y0 + margin) & (expected[1] < y1 - margin)
    )  # fmt: skip
    assert solid[deep].float().mean() > 0.995


POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m5-n4-mstd101-tweights", "original", "3a", None]


@pytest.mark.parametrize("config", POLICIES)
@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
def test_images_are_those_of_timm(config, interpolation):
    image = noise_image(120, 90)
    ours = tracked_transform(64, auto_augment=config, color_jitter=0.3, interpolation=interpolation)
    theirs = timm_data.create_transform(
        64, is_training=True, auto_augment=config, color_jitter=0.3, interpolation=interpolation,
        re_prob=0.0, normalize=False,
    )  # fmt: skip
    for step in theirs.transforms:
        operations = getattr(step, "ops", None) or [op for steps in getattr(step, "policy", []) for op in steps]
        for operation in operations:
            if getattr(operation, "name", "").startswith("Posterize"):  # 0 bits: black in Pillow 12, an error in 13
                operation.aug_fn = lambda image, bits, **_: ImageOps.posterize(image, max(1, bits))
    flips = 0
    for seed in range(12):
        seed_all(seed)
        pixels, geometry = ours(image)
        flips += int(geometry.flip)
        seed_all(seed)
        assert torch.equal(pixels, theirs(image))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 64, 64)
    assert 0 < flips < 12


def test_posterize_keeps_a_bit():
    transform = tracked_transform(32, auto_augment="rand-m10-n1-p1-inc1")
    transform.steps[0].ops = [op for op in transform.steps[0].ops if op.name == "PosterizeIncreasing"]
    assert set(transform(noise_image(60, 50))[0].unique().tolist()) == {0, 128}


@pytest.mark.parametrize("names", [*([name] for name in GEOMETRIC), GEOMETRIC], ids="+".join)
@pytest.mark.parametrize("size", [128, (96, 160)])
def test_affine_tells_where_each_pixel_came_from(names, size):
    count = len(names[:2])
    config = f"rand-m9-n{count}-p1-mstd2-inc1"
    transform = tracked_transform(size, scale=(0.3, 1.0), auto_augment=config)
    policy = transform.steps[0]
    policy.ops = [op for op in policy.ops if op.name in names]
    assert len(policy.ops) == len(names)
    for seed in range(6):
        seed_all(seed)
        pixels, geometry = transform(ramp_image(300, 200))
        plain = geometry.affine[0, 1] == 0 and geometry.affine[1, 0] == 0
        assert plain == names[0].startswith("Translate") or len(names) > 1
        # With several, the first may push out of the frame what the second would bring back.
        assert_geometry_tells_the_source(pixels, geometry, 0.2, whole=count == 1)


def test_absolute_translations_of_autoaugment_policies():
    """No current policy of timm has them, but its policies may: they move by pixels."""
    fill = {"translate_const": 40, "img_mean": (124, 116, 104)}
    track = []
    for name, size in (("TranslateX", (128, 96)), ("TranslateY", (96, 128))):
        operation = AugmentOp(name, 1.0, 6, fill)
        operation.aug_fn = Recorder(name, operation.aug_fn, track)
        pixels = torch.from_numpy(np.asarray(operation(ramp_image(*size))).copy()).permute(2, 0, 1)
        assert_geometry_tells_the_source(pixels, as_geometry((0.0, 0.0, 1.0, 1.0), False, track[-1:]), 0.5)
    assert len(track) == 2


def test_box_and_flip_say_all_without_geometric_operations():
    transform = tracked_transform((48, 80), geometric=False, auto_augment="rand-m9-n3-mstd0.5-inc1")
    assert not {op.name for op in transform.steps[0].ops} & set(GEOMETRIC)
    assert len(transform.steps[0].ops) == 10
    weighted = tracked_transform(48, geometric=False, auto_augment="rand-m9-tweights-inc1")
    assert not {op.name for op in weighted.steps[0].ops} & set(GEOMETRIC)
    policy = tracked_transform(48, geometric=False, auto_augment="original")
    assert not {op.name for steps in policy.steps[0].policy for op in steps} & set(GEOMETRIC)
    for seed in range(8):
        for chosen in (transform, weighted, policy):
            seed_all(seed)
            _, (box, flip, affine) = chosen(noise_image(70, 50))
            x0, y0, x1, y1 = box.tolist()
            left, right = (x1, x0) if flip else (x0, x1)
            expected = torch.tensor([[right - left, 0, left], [0, y1 - y0, y0]])
            torch.testing.assert_close(affine, expected, rtol=0, atol=1e-6)
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


def test_crop_alone_is_a_cut_out_of_the_source():
    """At the crop's own size nothing is interpolated: the box must give the very pixels."""
    image = noise_image(60, 40)
    transform = tracked_transform((40, 30), scale=(0.5, 0.5), ratio=(0.75, 0.75), auto_augment=None,
                                  color_jitter=None, hflip=0.0)  # fmt: skip
    for seed in range(5):
        seed_all(seed)
        pixels, geometry = transform(image)
        x0, y0, x1, y1 = (geometry.box * torch.tensor([60, 40, 60, 40])).round().int().tolist()
        assert (x1 - x0, y1 - y0) == (30, 40)
        source = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        assert torch.equal(pixels, source[:, y0:y1, x0:x1])


@pytest.mark.parametrize("source", [(300, 200), (120, 333), (64, 64), (50, 40)])
@pytest.mark.parametrize("size", [64, (64, 96)])
def test_eval_transform(source, size):
    transform = EvalTransform(size)
    pixels, geometry = transform(ramp_image(*source))
    assert pixels.shape == (3, *((size, size) if isinstance(size, int) else size)) and not geometry.flip
    assert_geometry_tells_the_source(pixels, geometry, 0.8)
    if isinstance(size, int):
        image = noise_image(*source)
        theirs = timm_data.create_transform(size, crop_pct=0.875, interpolation="bicubic", normalize=False)
        assert torch.equal(transform(image)[0], theirs(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode(mode):
    for transform in (tracked_transform(32), EvalTransform(32)):
        pixels, _ = transform(noise_image(50, 40).convert(mode))
        assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8


def test_erasing_writes_noise_of_the_data_sets_statistics():
    image = Image.new("RGB", (64, 64), (7, 7, 7))
    options = {"auto_augment": None, "color_jitter": None, "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.1, 0.1)}
    transform = tracked_transform(64, erasing=1.0, **options)
    erased = []
    for seed in range(20):
        seed_all(seed)
        pixels, _ = transform(image)
        changed = (pixels != 7).any(0)
        rows, columns = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()  # one full rectangle
        erased.append(pixels[:, changed].float() / 255)
    noise = torch.cat(erased, 1)
    torch.testing.assert_close(noise.mean(1), torch.tensor([0.5, 0.4, 0.3]), rtol=0, atol=0.01)
    torch.testing.assert_close(noise.std(1), torch.full((3,), 0.1), rtol=0, atol=0.01)

    constant = tracked_transform(64, erasing=1.0, erasing_mode="const", **options)(image)[0]
    assert {7, 128} == set(constant[0].unique().tolist())
    hits = 0
    half = tracked_transform(64, erasing=0.5, **options)
    for seed in range(40):
        seed_all(seed)
        hits += int((half(image)[0] != 7).any())
    assert 10 < hits < 30


class Noise(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return *self.transform(noise_image(50 + index, 40, index)), index


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_dataloader_workers(context):
    loader = DataLoader(Noise(tracked_transform(32)), batch_size=5, num_workers=1,
                        multiprocessing_context=get_context(context))  # fmt: skip
    for images, geometry, _ in loader:
        assert images.shape == (5, 3, 32, 32) and images.dtype == torch.uint8
        assert isinstance(geometry, Geometry)
        assert geometry.box.shape == (5, 4) and geometry.box.dtype == torch.float32
        assert geometry.flip.shape == (5,) and geometry.flip.dtype == torch.bool
        assert geometry.affine.shape == (5, 2, 3) and geometry.affine.dtype == torch.float32


def test_a_pickled_copy_tracks_for_itself():
    transform = tracked_transform(32, auto_augment="rand-m9-n2-p1-inc1")
    copy = pickle.loads(pickle.dumps(transform))
    for seed in range(10):
        seed_all(seed)
        ours = transform(noise_image(60, 50))
        seed_all(seed)
        theirs = copy(noise_image(60, 50))
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1].affine, theirs[1].affine)
    collated = default_collate([transform(noise_image(60, 50))[1] for _ in range(3)])
    assert collated.flip.shape == (3,) and collated.affine.shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"auto_augment": "augmix-m3"}, "cannot|no single affine"),
        ({"scale": (0.5, 0.2)}, "scale must be"),
        ({"ratio": (0.0, 1.0)}, "ratio must be"),
        ({"hflip": 1.5}, "hflip must be a probability"),
        ({"erasing": -0.1}, "erasing must be a probability"),
        ({"size": 0}, "size must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        tracked_transform(**{"size": 32, **arguments})


def test_bad_crop_share():
    with pytest.raises(ValueError, match=r"crop_pct must be in \(0, 1\]"):
        EvalTransform(32, crop_pct=1.5)


TRANSFORMS = {
    "tracked": {"auto_augment": "3a", "color_jitter": [0.3, 0.3, 0.3, 0.1], "erasing": 1.0},
    "rand": {"erasing": 1.0, "erasing_mode": "rand"},
}


def results(make, image):
    """What a transform makes of an image with ten seeds, as numbers."""
    transform = make()
    found = []
    for seed in range(10):
        seed_all(seed)
        pixels, geometry = transform(image)
        assert all(tensor.device.type == "cpu" for tensor in (pixels, *geometry))
        found.append((pixels.tolist(), *(tensor.tolist() for tensor in geometry)))
    return found


@pytest.mark.parametrize("state", ["default dtype", "default device", "autocast", "deterministic"])
@pytest.mark.parametrize("name", [*TRANSFORMS, "eval"])
def test_state_of_the_process_has_no_influence(name, state):
    def make():
        return EvalTransform(16) if name == "eval" else tracked_transform(16, **TRANSFORMS[name])

    image = noise_image(40, 30)
    expected = results(make, image)
    try:
        if state == "default dtype":
            torch.set_default_dtype(torch.float64)
        if state == "deterministic":
            torch.use_deterministic_algorithms(True)
        context = {"default device": torch.device("meta"), "autocast": torch.autocast("cpu", torch.bfloat16)}
        with context.get(state, torch.no_grad()):
            found = results(make, image)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
    assert found == expected


@pytest.mark.parametrize("make", [lambda: tracked_transform(16, auto_augment=None, color_jitter=None), EvalTransform])
def test_16_bit_images_are_scaled(make):
    """A 16-bit image gives what its 8-bit version gives, not a white page."""
    narrow = np.random.default_rng(0).integers(0, 256, (40, 30)).astype(np.uint8)
    wide = Image.fromarray(narrow.astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    transform = make() if make is not EvalTransform else make(16)
    seed_all(3)
    expected = transform(Image.fromarray(narrow))[0]
    seed_all(3)
    assert torch.equal(transform(wide)[0], expected) and expected.float().std() > 10


def test_numbers_may_come_from_numpy():
    image = noise_image(40, 30)
    ours = tracked_transform(
        np.int64(16), scale=np.array([0.5, 1.0]), hflip=np.float32(0.5), auto_augment=None,
        color_jitter=np.float32(0.5), mean=np.full(3, 0.5), std=np.full(3, 0.25, np.float32), erasing=np.float64(1),
    )  # fmt: skip
    plain = tracked_transform(
        16, scale=(0.5, 1.0), auto_augment=None, color_jitter=0.5, mean=(0.5,) * 3, std=(0.25,) * 3, erasing=1.0
    )
    seed_all(1)
    expected = plain(image)[0]
    seed_all(1)
    assert torch.equal(ours(image)[0], expected)
    assert EvalTransform(np.array([16, 24]), crop_pct=np.float32(1))(image)[0].shape == (3, 16, 24)
