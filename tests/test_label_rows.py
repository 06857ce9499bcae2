"""Labels [B, K] (one-hot, soft, multi-label) against class numbers, plain loops, timm and torchvision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mix_helpers import bits_equal, generator, pooled_by_torchvision, random_boxes, random_images
from timm.data import Mixup
from torchvision.transforms import v2

from tokenmix_kernels import TokenMix, TopKMaps, attention_targets, pool_targets, tokenmix

AWKWARD = [1, 2, 3, 5, 1000, 1001]
ROW_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
EPS = 0.1


def soft_rows(batch, classes, seed=0):
    return torch.rand(batch, classes, generator=generator(seed)).softmax(1)


def multi_hot(batch, classes, seed=0, share=0.4):
    return torch.rand(batch, classes, generator=generator(seed)) < share


def maps_of(form, batch, classes, seed=1):
    source = generator(seed)
    if form == "none":
        return None
    if form == "own":
        return torch.rand(batch, 5, 6, generator=source)
    every = torch.rand(batch, classes, 5, 6, generator=source)
    return every if form == "all" else TopKMaps(*every.topk(min(3, classes), 1))


def class_map(maps, image, c):
    """The map of a class [h, w], whatever the form is."""
    if isinstance(maps, TopKMaps):
        return torch.where(maps.indices[image] == c, maps.values[image], 0.0).sum(0)
    return maps[image] if maps.dim() == 3 else maps[image, c]


def naive(mixed, rows, partner, maps, boxes, rule, rest):
    """Targets [B, K] in float64, sample by sample and class by class."""
    batch, classes = rows.shape
    targets = torch.full((batch, classes), rest, dtype=torch.float64)
    for i in range(batch):
        taken = mixed.mask[i].double()
        for source, shown in ((i, 1 - taken), (int(partner[i]), taken)):
            for c in range(classes):
                label = float(rows[source, c])
                if not label:
                    continue
                weight = shown.mean()
                if maps is not None:
                    box = None if boxes is None else boxes[source : source + 1]
                    pooled = pooled_by_torchvision(class_map(maps, source, c)[None], box, taken.shape)[0].double()
                    weight = (pooled * shown).sum() / pooled.sum() if pooled.sum() > 0 else weight
                targets[i, c] += (weight - EPS / 2 if rule == "paper" else weight * (1 - EPS)) * label
    return targets


@pytest.mark.parametrize("form", ["none", "own", "all", "topk"])
@pytest.mark.parametrize("mask_type", ["block", "cutmix", "grid"])
@pytest.mark.parametrize("classes", AWKWARD)
def test_one_hot_rows_are_class_numbers(classes, mask_type, form):
    if form in ("all", "topk") and classes > 5:
        pytest.skip("maps of a thousand classes tell nothing that those of five do not")
    labels = torch.randint(0, classes, (6,), generator=generator(classes))
    options = {
        "num_classes": classes, "patch_size": 4, "mode": "elem", "mask_type": mask_type, "grid_cell": 2, "seed": 3,
        "lam": "beta", "maps": maps_of(form, 6, classes), "partner": torch.tensor([2, 0, 0, 5, 4, 1]),
    }  # fmt: skip
    images = random_images((6, 1, 24, 16))
    numbers = tokenmix(images, labels, **options)
    for dtype in ROW_DTYPES:
        rows = tokenmix(images, F.one_hot(labels, classes).to(dtype), **options)
        assert torch.equal(rows.weights, numbers.weights)
        torch.testing.assert_close(rows.targets, numbers.targets, rtol=0, atol=2e-7)


@pytest.mark.parametrize("form", ["none", "own", "all", "topk"])
@pytest.mark.parametrize("rule", ["paper", "timm"])
@pytest.mark.parametrize("kind", ["soft", "multi"])
@pytest.mark.parametrize("classes", [1, 2, 5, 17])
def test_targets_are_those_of_plain_loops(classes, kind, rule, form):
    multi = kind == "multi"
    rows = multi_hot(5, classes) if multi else soft_rows(5, classes)
    maps, partner = maps_of(form, 5, classes), torch.tensor([1, 4, 4, 3, 0])
    if form == "own":
        maps[1] = 0  # no evidence: the area
    boxes = None if maps is None else random_boxes(5)
    mixed = tokenmix(
        random_images((5, 1, 16, 24)), rows, num_classes=classes, patch_size=4, mode="elem", maps=maps, boxes=boxes,
        mask_type="block" if rule == "paper" else "grid", grid_cell=2, partner=partner, label_smoothing=EPS, seed=7,
        multi_label=multi,
    )  # fmt: skip
    expected = naive(mixed, rows, partner, maps, boxes, rule, EPS / 2 if multi else EPS / classes)
    torch.testing.assert_close(mixed.targets.double(), expected, rtol=0, atol=1e-6)


def test_classes_of_an_image_have_weights_of_their_own():
    """A person on the left, a dog on the right: with the right half gone, the person stays and the dog does not."""
    maps = torch.zeros(2, 2, 4, 4)
    maps[:, 0, :, :1], maps[:, 1, :, 3:] = 1, 1
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :, 2:] = True
    rows = torch.tensor([[1, 1], [0, 0]])
    images = torch.zeros(2, 1, 16, 16)
    options = {"num_classes": 2, "patch_size": 4, "mask": mask, "label_smoothing": 0.0, "multi_label": True}
    mixed = tokenmix(images, rows, maps=maps, **options)
    assert mixed.targets[0, 0] > 0.9 and mixed.targets[0, 1] < 0.1
    torch.testing.assert_close(mixed.weights[0, 0], mixed.targets[0].mean())
    # Of the image without a label, the area.
    torch.testing.assert_close(mixed.weights[1, 0], torch.tensor(0.5))
    assert torch.equal(pool_targets(maps, rows, mask), mixed.weights)


@pytest.mark.parametrize("where", ["rows of a bank", "flips", "affines"])
def test_maps_of_several_classes_know_where_they_are(where):
    """The same maps, one for each image; class numbers say what one-hot rows must give."""
    labels = torch.tensor([2, 0, 1, 1])
    maps, given = maps_of("all", 9, 3), {}
    given["ids"] = torch.tensor([8, 3, 3, 0])
    if where == "flips":
        given |= {"boxes": random_boxes(4), "flips": torch.tensor([True, False, True, False])}
    elif where == "affines":
        given["affines"] = torch.eye(2, 3).repeat(4, 1, 1) + 0.2 * torch.randn(4, 2, 3, generator=generator())
    options = {"num_classes": 3, "patch_size": 4, "mode": "elem", "seed": 1, "maps": maps, **given}
    images = random_images((4, 1, 16, 24))
    numbers, rows = (tokenmix(images, y, **options) for y in (labels, F.one_hot(labels, 3)))
    torch.testing.assert_close(rows.targets, numbers.targets, rtol=0, atol=2e-7)
    assert torch.equal(rows.weights, numbers.weights)
    soft = soft_rows(4, 3)
    one_by_one = [tokenmix(images, torch.full((4,), c), **options).weights for c in range(3)]
    mean = sum(w[:, :1] * soft[:, c : c + 1] for c, w in enumerate(one_by_one))
    torch.testing.assert_close(tokenmix(images, soft, **options).weights[:, :1], mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", ["boxes", "affines"])
def test_a_batch_without_any_label_has_shares_of_the_area(place):
    given = {"boxes": random_boxes(3), "affines": torch.eye(2, 3).repeat(3, 1, 1)}[place]
    mixed = tokenmix(
        random_images((3, 1, 16, 24)), torch.zeros(3, 4), num_classes=4, patch_size=4, seed=1, label_smoothing=0.0,
        maps=maps_of("all", 3, 4), **{place: given},
    )  # fmt: skip
    assert not mixed.targets.any()
    torch.testing.assert_close(mixed.weights[:, 1], mixed.mask.float().mean((1, 2)))


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_multi_label_mixup_is_timms_for_the_same_lam(mode, smoothing):
    images, rows = random_images((6, 3, 16, 32)), multi_hot(6, 5)
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 0.0, "mode": mode, "label_smoothing": smoothing, "num_classes": 5}
    theirs = Mixup(**options, multi_label=True)
    settings = (0.8, 0.0, None, 1.0, 0.5, mode, True, smoothing, 5, True)  # in timm's order
    for seed in range(3):
        out, targets, mix = TokenMix(*settings, return_mix=True)(images, rows, seed=seed)
        lam = mix.lam.numpy()
        assert mix.labels is rows
        theirs._params_per_batch = lambda lam=lam: (float(lam[0]), False)
        theirs._params_per_elem = lambda size, lam=lam: (lam[:size].astype(np.float32), np.zeros(size, bool))
        expected, expected_targets = theirs(images.clone(), rows)
        torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(targets, expected_targets, atol=1e-6, rtol=0)


@pytest.mark.parametrize("branch", ["mixup", "cutmix"])
def test_soft_rows_are_torchvisions_for_the_same_lam(branch):
    images, rows = random_images((6, 3, 16, 32)), soft_rows(6, 5)
    theirs = {"mixup": v2.MixUp, "cutmix": v2.CutMix}[branch](num_classes=5)
    alphas = {"mixup_alpha": 1.0, "cutmix_alpha": 0.0} if branch == "mixup" else {"mixup_alpha": 0.0}
    mix = TokenMix(
        **alphas, mask_type="cutmix", lam="beta", patch_size=4, num_classes=5, label_smoothing=0.0, return_mix=True
    )
    partner = torch.arange(6).roll(1)
    out, targets, how = mix(images, rows, partner=partner, seed=2)
    lam = float(how.lam[0])
    if branch == "mixup":
        theirs.make_params = lambda flat: {"lam": lam}
    else:
        ys, xs = (out != images).any(1).any(0).nonzero().unbind(1)
        box = (int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1)
        theirs.make_params = lambda flat: {"box": box, "lam_adjusted": lam}
    expected, expected_targets = theirs(images.clone(), rows)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(targets, expected_targets, atol=1e-6, rtol=0)


@pytest.mark.parametrize("multi", [False, True])
def test_unmixed_rows_are_smoothed_alone(multi):
    rows = multi_hot(4, 3) if multi else soft_rows(4, 3)
    mix = TokenMix(num_classes=3, multi_label=multi, patch_size=4).eval()
    images = random_images((4, 3, 16, 16))
    out, targets = mix(images, rows)
    assert bits_equal(out, images)
    torch.testing.assert_close(targets, rows * 0.9 + (0.05 if multi else 0.1 / 3), rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", ["numbers", "one-hot", "multi"])
def test_clamped_targets_are_at_most_1(form):
    """The left half of one image and the right half of another, all of whose evidence is there: weights 1 and 1."""
    maps = torch.zeros(2, 4, 4)
    maps[0, :, 0], maps[1, :, 3] = 1, 1
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :, 2:] = True
    labels = torch.tensor([1, 1])
    labels = labels if form == "numbers" else F.one_hot(labels, 3)
    options = {"num_classes": 3, "patch_size": 4, "maps": maps, "mask": mask, "multi_label": form == "multi"}
    free, clamped = (
        tokenmix(torch.zeros(2, 1, 16, 16), labels, clamp_targets=clamp, **options).targets for clamp in (False, True)
    )
    assert free[0, 1] > 1.8
    assert torch.equal(clamped, free.clamp(max=1)) and clamped[0, 1] == 1


@pytest.mark.parametrize("multi", [False, True])
def test_targets_by_attention_take_rows(multi):
    source = generator(4)
    rows = multi_hot(4, 7) if multi else soft_rows(4, 7)
    attention, mask = torch.rand(4, 6, generator=source), torch.rand(4, 2, 3, generator=source) < 0.5
    partner = torch.tensor([1, 1, 0, 2])
    options = {"num_classes": 7, "smoothing": 0.1}
    targets = attention_targets(attention, mask, rows.half(), partner, multi_label=multi, **options)
    taken = (attention * mask.flatten(1)).sum(1) / attention.sum(1)
    own = 0.5 * (1 - taken) + 0.5 * (1 - mask.float().mean((1, 2)))
    rows = rows.half().float()
    expected = own[:, None] * rows + (1 - own)[:, None] * rows[partner]
    torch.testing.assert_close(targets, expected * 0.9 + (0.05 if multi else 0.1 / 7), rtol=0, atol=1e-6)
    labels = torch.tensor([3, 0, 6, 6])
    numbers = attention_targets(attention, mask, labels, partner, **options)
    torch.testing.assert_close(
        attention_targets(attention, mask, F.one_hot(labels, 7), partner, **options), numbers, rtol=0, atol=2e-7
    )


def test_strided_rows_are_read_where_they_are():
    wide = soft_rows(8, 5)
    images = random_images((4, 1, 16, 16))
    options = {"num_classes": 5, "patch_size": 4, "seed": 1}
    expected = tokenmix(images, wide[::2].contiguous(), **options).targets
    assert torch.equal(tokenmix(images, wide[::2], **options).targets, expected)


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (torch.zeros(4, 6), {}, ValueError, r"or \[B, num_classes\], one value .*, here \[4, 5\], got \[4, 6\]"),
        (torch.zeros(3, 5), {}, ValueError, r"here \[4, 5\], got \[3, 5\]"),
        (torch.zeros(4, 5).T.contiguous().T, {}, ValueError, "contiguous within a row; call labels.contiguous"),
        (torch.zeros(4, 5, dtype=torch.complex64), {}, TypeError, "labels must be one of float32"),
        (torch.full((4, 5), float("nan")), {}, ValueError, r"must be in \[0, 1\], got values from nan to nan"),
        (torch.full((4, 5), float("inf")), {}, ValueError, r"must be in \[0, 1\], got values from inf to inf"),
        (torch.full((4, 5), -0.5), {}, ValueError, r"must be in \[0, 1\], got values from -0.5 to -0.5"),
        (torch.full((4, 5), 3), {}, ValueError, r"labels of int64 \[B, num_classes\] must be in \[0, 1\]"),
        (torch.arange(4), {"multi_label": True}, ValueError, "where multi_label is True.*leave it out for class num"),
        (torch.arange(4), {"multi_label": 1}, ValueError, "multi_label must be True or False, got 1"),
        (torch.arange(4), {"clamp_targets": "no"}, ValueError, "clamp_targets must be True or False, got 'no'"),
        (torch.zeros(4, 5, requires_grad=True), {}, ValueError, "labels must not require grad"),
        (torch.zeros(4, 3, 2).long(), {}, ValueError, r"labels must be \[4\]"),
    ],
)  # fmt: skip
def test_wrong_rows_are_named(rows, options, error, message):
    with pytest.raises(error, match=message):
        tokenmix(torch.zeros(4, 1, 16, 16), rows, num_classes=5, patch_size=4, **options)
