"""The operators as PyTorch sees them: opcheck, tracing, torch.compile, autograd."""

import shutil
from typing import NamedTuple

import pytest
import torch
from mix_helpers import bits_equal, random_boxes, random_images
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenmix_kernels import TokenMix, TopKMaps, pool_targets, token_mask, tokenmix
from tokenmix_kernels.inputs import Evidence
from tokenmix_kernels.settings import Settings, as_text

OPS = torch.ops.tokenmix_kernels
SETTINGS = Settings(num_classes=5, patch_size=8, mode="elem", minimum_tokens=2)
INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler for the CPU"),
)
BACKENDS = ["aot_eager", INDUCTOR]


class Given(NamedTuple):
    """Images, and the tensors that all three mixing operators take after them."""

    images: torch.Tensor
    labels: torch.Tensor
    partner: torch.Tensor | None
    evidence: Evidence
    mask: torch.Tensor | None
    seed: torch.Tensor

    def rest(self, settings):
        """An operator's arguments after the images."""
        return (self.labels, self.partner, *self.evidence, self.mask, self.seed, 0, as_text(settings))


def inputs(batch=4, form="none", dtype=torch.float32, layout="contiguous", given=False, partner=False, rows=False):
    images = random_images((batch, 3, 32, 48), dtype, layout)
    source = torch.Generator().manual_seed(1)
    maps = indices = boxes = None
    if form == "own":
        maps, boxes = torch.rand(batch, 6, 7, generator=source), random_boxes(batch)
    elif form == "all":
        maps = torch.rand(batch, 5, 6, 7, generator=source)
    elif form == "topk":
        maps, boxes = torch.rand(batch, 2, 6, 7, generator=source), random_boxes(batch)
        indices = torch.randint(0, 5, (batch, 2, 6, 7), generator=source)
    mask = torch.rand(batch, 4, 6, generator=source) < 0.5 if given else None
    partners = torch.arange(batch).roll(1) if partner else None
    labels = torch.randint(0, 5, (batch,), generator=source)
    labels = torch.rand(batch, 5, generator=source).half() if rows else labels
    return Given(images, labels, partners, Evidence(maps, indices, boxes=boxes), mask, torch.tensor(3))


VARIANTS = {
    "plain": ({}, {}),
    "one image": ({"batch": 1}, {}),
    "own maps, any partner": ({"form": "own", "partner": True}, {}),
    "all maps": ({"form": "all"}, {"mask_type": "random", "mode": "pair"}),
    "top-k maps": ({"form": "topk"}, {"lam": -1.0}),
    "given mask": ({"given": True}, {"mask_type": "given"}),
    "half, channels_last, all branches": (
        {"dtype": torch.float16, "layout": "channels_last"},
        {"mixup_alpha": 0.8, "switch_prob": 0.5, "prob": 0.9, "mask_type": "cutmix", "lam": -1.0},
    ),
    "label rows, own maps": ({"form": "own", "rows": True}, {"multi_label": True, "clamp_targets": True}),
    "label rows, top-k maps, any partner": ({"form": "topk", "rows": True, "partner": True}, {}),
    "strided": ({"layout": "spatial_slice"}, {"mode": "batch"}),
    "erased": ({"form": "own"}, {"erase_prob": 0.5, "erase_mode": "pixel", "erase_evidence": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_mix(variant):
    made, settings = VARIANTS[variant]
    given = inputs(**made)
    torch.library.opcheck(OPS.mix, (given.images, given.images.dtype, *given.rest(SETTINGS._replace(**settings))))


def test_opcheck_mix_normalises_bytes():
    given = inputs(dtype=torch.uint8)
    settings = SETTINGS._replace(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    torch.library.opcheck(OPS.mix, (given.images, torch.float16, *given.rest(settings)))


@pytest.mark.parametrize("operator", ["mix", "mix_out", "mix_"])
def test_opcheck_places(operator):
    given = inputs(form="own")
    maps = torch.randint(0, 256, (20, 6, 7), dtype=torch.uint8)
    ids, flips = torch.tensor([3, 19, 0, 3]), torch.tensor([True, False, False, True])
    affines = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(4, 1, 1)
    second = {"mix": (torch.float32,), "mix_out": (torch.empty_like(given.images),), "mix_": ()}[operator]
    for evidence in (
        Evidence(maps, ids=ids, boxes=given.evidence.boxes, flips=flips), Evidence(maps, ids=ids, affines=affines)
    ):  # fmt: skip
        arguments = given._replace(evidence=evidence).rest(SETTINGS)
        torch.library.opcheck(getattr(OPS, operator), (given.images, *second, *arguments))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "strided"])
def test_opcheck_mix_out(variant):
    made, settings = VARIANTS[variant]
    given = inputs(**made)
    rest = given.rest(SETTINGS._replace(**settings))
    torch.library.opcheck(OPS.mix_out, (given.images, torch.empty_like(given.images), *rest))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "partner" not in name and name != "strided"])
def test_opcheck_mix_in_place(variant):
    made, settings = VARIANTS[variant]
    given = inputs(**made)
    torch.library.opcheck(OPS.mix_, (given.images, *given.rest(SETTINGS._replace(**settings))))


@pytest.mark.parametrize("mask_type", ["block", "random", "cutmix"])
@pytest.mark.parametrize("batch", [1, 6])
def test_opcheck_token_mask(mask_type, batch):
    settings = as_text(SETTINGS._replace(mask_type=mask_type))
    torch.library.opcheck(OPS.token_mask, (torch.tensor(1), 7, batch, 5, 9, settings))


@pytest.mark.parametrize("form", ["own", "all", "topk"])
def test_opcheck_pool_targets(form):
    given = inputs(form=form)
    mask = torch.rand(4, 3, 5) < 0.5
    ids, affines = torch.tensor([3, 0, 0, 1]), torch.eye(2, 3).repeat(4, 1, 1)
    head = (given.labels, mask)
    torch.library.opcheck(OPS.pool_targets, (*head, None, *given.evidence))
    torch.library.opcheck(OPS.pool_targets, (*head, torch.tensor([1, 1, 0, 3]), *given.evidence))
    flipped = given.evidence._replace(ids=ids, flips=torch.tensor([True, False] * 2))
    torch.library.opcheck(OPS.pool_targets, (*head, None, *flipped))
    torch.library.opcheck(OPS.pool_targets, (*head, None, *flipped._replace(flips=None, boxes=None, affines=affines)))


BAD_VALUES = {
    "label rows": (lambda given: given._replace(labels=torch.full((4, 5), -1)), r"labels of int64 .* in \[0, 1\]"),
    "labels": (lambda given: given._replace(labels=torch.tensor([0, 5, 1, 2])), r"labels must be in \[0, 5\), got 5"),
    "partner": (lambda given: given._replace(partner=torch.tensor([0, 1, 2, -1])), "partner must be in .*, got -1"),
    "ids": (
        lambda given: given._replace(evidence=given.evidence._replace(ids=torch.tensor([0, 1, 2, 99]))),
        "ids must be in .*, got 99",
    ),
    "boxes": (
        lambda given: given._replace(evidence=given.evidence._replace(boxes=torch.ones(4, 4))),
        "boxes must be .* for image 0",
    ),
}


@pytest.mark.parametrize("operator", ["mix", "mix_out", "mix_"])
@pytest.mark.parametrize("name", BAD_VALUES)
def test_an_operator_refuses_values_out_of_range(name, operator):
    spoil, message = BAD_VALUES[name]
    given = spoil(inputs(form="own"))
    second = {"mix": (torch.float32,), "mix_out": (torch.empty_like(given.images),), "mix_": ()}[operator]
    with pytest.raises(ValueError, match=message):
        getattr(OPS, operator)(given.images, *second, *given.rest(SETTINGS))


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_compiled_mix_refuses_values_out_of_range(name, fresh_dynamo):
    spoil, message = BAD_VALUES[name]
    given = spoil(inputs(form="own"))
    evidence = given.evidence

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(images, labels, partner, maps, boxes, ids):
        return tokenmix(images, labels, maps=maps, boxes=boxes, ids=ids, partner=partner, num_classes=5, patch_size=8)

    with pytest.raises(ValueError, match=message):
        step(given.images, given.labels, given.partner, evidence.maps, evidence.boxes, evidence.ids)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["clone", "itself", "view", "slice"])
def test_compiled_in_place_reads_no_pixel_that_it_wrote(kind, backend, fresh_dynamo):
    """A compiler may drop the clone and hand one memory to both: every token from partner [3, 0, 1, 2]."""
    partner, mask = torch.tensor([3, 0, 1, 2]), torch.ones(4, 4, 6, dtype=torch.bool)

    @torch.compile(fullgraph=True, backend=backend)
    def step(images):
        source = {"clone": images.clone, "itself": lambda: images, "view": lambda: images.view_as(images),
                  "slice": lambda: images[:]}[kind]()  # fmt: skip
        return tokenmix(
            source, torch.arange(4), partner=partner, mask=mask, num_classes=5, patch_size=8, out=images
        ).images

    images = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 48).clone()
    if kind == "itself":
        with pytest.raises(ValueError, match="partner must be its own inverse"):
            step(images)
    else:
        assert step(images)[:, 0, 0, 0].tolist() == [3, 0, 1, 2]


def test_the_fields_of_settings_reach_the_mix_under_their_names():
    """Each alpha is that of its branch: a Beta(1000) is close to one half, a Beta(0.1) close to an end."""
    given = inputs(64)
    settings = SETTINGS._replace(mixup_alpha=1000.0, cutmix_alpha=0.1, switch_prob=0.0)
    weights = OPS.mix(given.images, torch.float32, *given.rest(settings))[3]
    assert (weights - 0.5).abs().max() < 0.1
    swapped = OPS.mix(given.images, torch.float32, *given.rest(settings._replace(mixup_alpha=0.1, cutmix_alpha=1000.0)))
    assert (swapped[3] - 0.5).abs().mean() > 0.3
    for text in ("[]", '{"num_classes": 5, "mixup": 1}', "no JSON", "{}"):
        with pytest.raises(ValueError, match="settings must be a JSON object"):
            OPS.token_mask(torch.tensor(1), 0, 2, 4, 4, text)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fake_tensors_have_the_real_shapes(layout):
    images = inputs(layout=layout, dtype=torch.uint8).images
    options = {"num_classes": 5, "patch_size": 8, "mean": [100, 0, 0], "std": [1, 1, 1], "out_dtype": torch.bfloat16}
    real = tokenmix(images, torch.arange(4), **options, seed=1)
    with FakeTensorMode() as mode:
        fake = tokenmix(mode.from_tensor(images), mode.from_tensor(torch.arange(4)), **options, seed=1)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    with FakeTensorMode():
        assert token_mask(3, (4, 6), seed=1).shape == (3, 4, 6)
        weights = pool_targets(torch.rand(2, 4, 4), torch.arange(2), torch.zeros(2, 3, 3, dtype=torch.bool))
        assert weights.shape == (2, 2) and weights.dtype == torch.float32


def test_it_runs_on_the_meta_device():
    images = torch.empty(4, 3, 32, 32, device="meta")
    mixed = tokenmix(images, torch.empty(4, dtype=torch.int64, device="meta"), num_classes=9, patch_size=8)
    assert mixed.images.shape == (4, 3, 32, 32) and mixed.images.is_meta
    place = torch.empty(4, 3, 32, 32, device="meta")
    assert tokenmix(images, mixed.weights[:, 0].long(), num_classes=9, patch_size=8, out=place).images is place
    assert mixed.targets.shape == (4, 9) and mixed.mask.shape == (4, 4, 4) and mixed.weights.shape == (4, 2)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_whole_with_changing_batches(backend, dynamic, fresh_dynamo):
    mix = TokenMix(num_classes=5, patch_size=8, mode="elem", prob=0.9)
    graphs = CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=graphs)
    def step(images, labels, seed):
        out, targets = mix(images * 2, labels, seed=seed)
        return out.mean(1), targets.sum()

    for number, batch in enumerate((4, 6, 3, 7, 4)):
        images, labels = inputs(batch)[:2]
        seed = torch.tensor(number)
        out, targets = step(images, labels, seed)
        expected, expected_targets = mix(images * 2, labels, seed=seed)
        torch.testing.assert_close(out, expected.mean(1))
        torch.testing.assert_close(targets, expected_targets.sum())
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_with_label_rows(backend, fresh_dynamo):
    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def step(images, rows, seed):
        options = {"num_classes": 5, "patch_size": 8, "mode": "elem", "multi_label": True, "clamp_targets": True}
        return tokenmix(images, rows, seed=seed, **options)

    for batch in (4, 6):
        images, rows = random_images((batch, 3, 32, 48)), torch.rand(batch, 5)
        expected = tokenmix(
            images, rows, num_classes=5, patch_size=8, mode="elem", multi_label=True, clamp_targets=True, seed=3
        )
        assert all(map(torch.equal, step(images, rows, torch.tensor(3)), expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["own", "all", "topk"])
def test_compiled_equals_eager_with_maps(backend, form, fresh_dynamo):
    @torch.compile(fullgraph=True, backend=backend)
    def step(images, labels, values, indices, boxes, seed):
        maps = values if indices is None else TopKMaps(values, indices)
        return tokenmix(images, labels, maps=maps, boxes=boxes, num_classes=5, patch_size=8, mode="pair", seed=seed)

    for batch in (4, 5):
        images, labels, _, (values, indices, _, boxes, *_), *_ = inputs(batch, form)
        maps = values if indices is None else TopKMaps(values, indices)
        seed = torch.tensor(8)
        got = step(images, labels, values, indices, boxes, seed)
        expected = tokenmix(images, labels, maps=maps, boxes=boxes, num_classes=5, patch_size=8, mode="pair", seed=seed)
        assert bits_equal(got.images, expected.images)
        assert torch.equal(got.mask, expected.mask)
        assert torch.equal(got.weights, expected.weights)
        assert torch.equal(got.targets, expected.targets)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_seed_every_call_draws_afresh(backend, fresh_dynamo):
    @torch.compile(fullgraph=True, backend=backend)
    def step(images, labels):
        return tokenmix(images, labels, num_classes=5, patch_size=8, mode="elem").mask

    images, labels = inputs(8)[:2]
    torch.manual_seed(0)
    masks = torch.stack([step(images, labels) for _ in range(4)])
    assert len(torch.unique(masks, dim=0)) == 4
    torch.manual_seed(0)
    assert torch.equal(step(images, labels), masks[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_place_and_into_out(backend, fresh_dynamo):
    options = {"num_classes": 5, "patch_size": 8, "mode": "elem"}

    @torch.compile(fullgraph=True, backend=backend)
    def inside(images, labels, seed):
        return tokenmix(images, labels, out=images, seed=seed, **options).targets

    @torch.compile(fullgraph=True, backend=backend)
    def into(images, labels, out, seed):
        return tokenmix(images, labels, out=out, seed=seed, **options).targets

    for batch in (4, 5):
        images, labels = inputs(batch)[:2]
        seed = torch.tensor(2)
        expected = tokenmix(images, labels, seed=seed, **options)
        out = torch.full_like(images, float("nan"))
        assert torch.equal(into(images, labels, out, seed), expected.targets)
        assert bits_equal(out, expected.images)
        place = images.clone()
        assert torch.equal(inside(place, labels, seed), expected.targets)
        assert bits_equal(place, expected.images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_parts(backend, fresh_dynamo):
    @torch.compile(fullgraph=True, backend=backend)
    def weights(maps, labels, seed):
        mask = token_mask(maps.shape[0], (4, 6), seed=seed)
        return mask, pool_targets(maps, labels, mask)

    for batch in (3, 4, 6):
        maps, seed = torch.rand(batch, 5, 5, generator=torch.Generator().manual_seed(1)), torch.tensor(4)
        mask, pooled = weights(maps, torch.arange(batch), seed)
        assert torch.equal(mask, token_mask(batch, (4, 6), seed=4))
        assert torch.equal(pooled, pool_targets(maps, torch.arange(batch), mask))


@pytest.mark.parametrize("compiled", [False, True])
def test_images_that_require_grad_are_refused(compiled, fresh_dynamo):
    images, labels = inputs()[:2]
    images.requires_grad_()

    def mixed(images, labels):
        return tokenmix(images, labels, num_classes=5, patch_size=8, seed=1)

    step = torch.compile(mixed, backend="aot_eager") if compiled else mixed
    with pytest.raises(ValueError, match="images must not require grad"):
        step(images, labels)
    with torch.no_grad():
        assert not mixed(images, labels).images.requires_grad
    assert not mixed(images.detach(), labels).images.requires_grad


def test_a_model_behind_the_mix_trains():
    images, labels = inputs()[:2]
    model = torch.nn.Linear(3 * 32 * 48, 5)
    out, targets = TokenMix(num_classes=5, patch_size=8)(images, labels, seed=1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(out.flatten(1)), targets)
    loss.backward()
    assert model.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_sees_the_operator():
    """Within a transform of torch.func, tensors have no memory that the reference could be given at once."""
    images, labels = random_images((6, 3, 32, 48)).view(3, 2, 3, 32, 48), torch.tensor([1, 4])

    def mix(two):
        return tokenmix(two, labels, num_classes=5, patch_size=8, seed=3)[:2]

    mixed, targets = torch.vmap(mix)(images)
    for i, two in enumerate(images):
        expected = mix(two)
        assert torch.equal(mixed[i], expected[0]) and torch.equal(targets[i], expected[1])
