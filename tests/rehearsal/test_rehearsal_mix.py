"""The public face on a pretended GPU: what the reference says, on the right device, without a wait of the host."""

import pytest
import torch
from mix_helpers import LAYOUTS, random_boxes, random_images
from pretend_tensor import HostRead, held, no_host_reads, to_gpu
from rehearsal_helpers import BATCH, CLASSES, assert_same, random_maps

from tokenmix_kernels import TokenMix, attention_targets, pool_targets, progressive_ratio, token_mask, tokenmix

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
MASK_TYPES = ("block", "random", "grid", "cutmix")


@pytest.mark.parametrize("seeded", ["integer", "tensor", "tensor on the GPU"])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("mask_type", [*MASK_TYPES, "given"])
def test_tokenmix(gpu, mask_type, mode, seeded):
    images, labels = random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES
    mask = torch.rand(BATCH, 4, 6) < 0.5 if mask_type == "given" else None
    options = {"num_classes": CLASSES, "patch_size": 8, "mode": mode, "lam": "beta", "grid_cell": 2}
    if mask is None:
        options["mask_type"] = mask_type
    seed = 11 if seeded == "integer" else torch.tensor(11)
    expected = tokenmix(images, labels, mask=mask, seed=seed, **options)
    given = to_gpu((images.clone(), labels, mask, seed if seeded == "tensor on the GPU" else None))
    there, there_labels, there_mask, there_seed = given
    tokenmix(there, there_labels, mask=there_mask, seed=seed, **options)  # tables are made in the first call
    with no_host_reads():
        got = tokenmix(there, there_labels, mask=there_mask, seed=seed if there_seed is None else there_seed, **options)
    assert_same(got, expected)
    assert torch.equal(held(there), images)
    assert [name for name, *_ in gpu.launches] == ["mix_kernel"] * 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_module_out_and_in_place(gpu, dtype, layout):
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mode="elem")
    images, labels = random_images((BATCH, 3, 32, 48), dtype, layout), torch.arange(BATCH) % CLASSES
    expected = mix(images, labels, seed=3)
    there, there_labels = to_gpu((images, labels))
    mix(there, there_labels, seed=1)
    for place in ("fresh", "out", "in place"):
        out = {"fresh": None, "out": to_gpu(torch.empty_like(images)), "in place": there}[place]
        with no_host_reads():
            mixed, targets = mix(there, there_labels, seed=3, out=out)
        assert out is None or mixed is out
        assert torch.equal(held(mixed), expected[0])
        assert torch.equal(held(targets), expected[1])
    assert gpu.launches[-1][2]["LAYOUT"].IN_PLACE
    assert not gpu.launches[-2][2]["LAYOUT"].IN_PLACE


def test_what_lies_on_the_same_memory_is_seen_by_address(gpu):
    memory = to_gpu(torch.randn(BATCH + 1, 3, 32, 32))
    images, labels = memory[:-1], to_gpu(torch.arange(BATCH) % CLASSES)
    options = {"num_classes": CLASSES, "patch_size": 8, "mode": "elem", "seed": 1}
    expected = tokenmix(held(images).clone(), held(labels), **options)
    with no_host_reads(), pytest.raises(ValueError, match="out must be images itself or not overlap"):
        tokenmix(images, labels, out=memory[1:], **options)
    with no_host_reads(), pytest.raises(ValueError, match="out must not be images where mean and std are given"):
        tokenmix(images, labels, out=images.view(BATCH, 3, 32, 32), mean=MEAN, std=STD, **options)
    with no_host_reads():
        mixed = tokenmix(images, labels, out=images.detach(), **options)
    assert torch.equal(held(mixed.images), expected.images)
    assert gpu.launches[-1][2]["images"] is gpu.launches[-1][2]["out"]


@pytest.mark.parametrize("place", ["whole", "boxes", "flips", "affines"])
@pytest.mark.parametrize("form", ["own", "all", "topk", "bank"])
def test_maps_of_all_forms(gpu, form, place):
    images, labels = random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES
    given = {"maps": random_maps(form)}
    if place in ("boxes", "flips"):
        given["boxes"] = random_boxes(BATCH)
    if place == "flips":
        given["flips"] = torch.arange(BATCH) % 2 == 0
    if place == "affines":
        given["affines"] = torch.eye(2, 3).repeat(BATCH, 1, 1)
    if form == "bank":
        given["ids"] = torch.arange(BATCH) % 4
    partner = torch.arange(BATCH).roll(1)
    options = {"num_classes": CLASSES, "patch_size": 8, "mode": "elem", "seed": 3}
    expected = tokenmix(images, labels, partner=partner, **given, **options)
    there, there_labels, there_partner, places = to_gpu((images, labels, partner, given))
    with no_host_reads():
        got = tokenmix(there, there_labels, partner=there_partner, **places, **options)
        maps = places.pop("maps")
        weights = pool_targets(maps, there_labels, got.mask, partner=there_partner, **places)
    assert_same(got, expected)
    assert torch.equal(held(weights), expected.weights)


def test_packed_label_maps_and_bytes(gpu):
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mean=MEAN, std=STD, out_dtype=torch.float16, mode="elem")
    images = random_images((BATCH, 3, 32, 48), torch.uint8)
    packed = torch.rand(BATCH, 3, 2, 7, 9)
    packed[:, 1] = packed[:, 1].mul(CLASSES).floor()
    packed[:, 2, 0, 0, :4] = torch.tensor([0.1, 0.2, 0.5, 0.6])
    packed[:, 2, 0, 0, 5] = torch.arange(BATCH) % CLASSES
    expected = mix(images, packed, seed=4)
    there, there_packed = to_gpu((images, packed))
    mix(there, there_packed, seed=1)
    with no_host_reads():
        got = mix(there, there_packed, seed=4)
    assert_same(got, expected)


@pytest.mark.parametrize("mask_type", MASK_TYPES)
def test_masks_alone(gpu, mask_type):
    options = {"mask_type": mask_type, "grid_cell": 2}
    expected = token_mask(BATCH, (4, 6), seed=5, **options)
    with no_host_reads():
        assert_same([token_mask(BATCH, (4, 6), seed=to_gpu(torch.tensor(5)), **options)], [expected])
    # A seed of the CPU is copied to the device without a wait.
    with no_host_reads():
        assert_same([token_mask(BATCH, (4, 6), seed=5, device="cuda", **options)], [expected])


def test_seeds_that_are_not_given_come_from_the_hosts_generator(gpu):
    images, labels = to_gpu((random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES))
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mode="elem", mixup_alpha=0)
    mix(images, labels, seed=1)
    torch.manual_seed(3)
    expected = mix(held(images), held(labels))
    torch.manual_seed(3)
    with no_host_reads():
        assert_same(mix(images, labels), expected)
    generator = torch.Generator().manual_seed(3)
    with no_host_reads():
        assert_same(mix(images, labels, generator=generator), expected)


@pytest.mark.parametrize("return_mix", [False, True])
@pytest.mark.parametrize("switched", ["eval", "mixup_enabled"])
def test_switched_off(gpu, switched, return_mix):
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mean=MEAN, std=STD, return_mix=return_mix)
    if switched == "eval":
        mix.eval()
    else:
        mix.mixup_enabled = False
    images, labels = random_images((BATCH, 3, 32, 48), torch.uint8), torch.arange(BATCH) % CLASSES
    there = to_gpu((images, labels))
    mix(*there)
    with no_host_reads():
        got = mix(*there)
    assert_same(got[:2], mix(images, labels)[:2])


def test_attention_targets_of_a_mixpro_step(gpu):
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mask_type="grid", grid_cell=2, lam="beta", return_mix=True)
    images, labels = random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES
    attention, logits = torch.rand(BATCH, 24), torch.randn(BATCH, CLASSES)

    def step(images, labels, attention, logits):
        _, targets, mixed = mix(images, labels, seed=2)
        ratio = progressive_ratio(logits, targets)
        return attention_targets(attention, **mixed._asdict(), num_classes=CLASSES, ratio=ratio, smoothing=0.1), *mixed

    there = to_gpu((images, labels, attention, logits))
    step(*there)
    with no_host_reads():
        got, *mixed = step(*there)
    expected, *expected_mixed = step(images, labels, attention, logits)
    torch.testing.assert_close(held(got), expected, atol=1e-6, rtol=0)
    assert got.is_cuda
    for one, other in zip(mixed, expected_mixed, strict=True):
        assert other is None or torch.equal(held(one), other)
    assert {name for name, *_ in gpu.launches} == {"mix_kernel", "attention_kernel"}


@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_every_backend(gpu, backend):
    images, labels = random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES
    options = {"num_classes": CLASSES, "patch_size": 8, "seed": 3, "mode": "elem"}
    got = tokenmix(*to_gpu((images, labels)), backend=backend, **options)
    assert_same(got, tokenmix(images, labels, **options))
    mask = token_mask(BATCH, (4, 6), seed=3, device="cuda", backend=backend)
    assert torch.equal(held(mask), token_mask(BATCH, (4, 6), seed=3))
    assert bool(gpu.launches) == (backend != "reference")


def test_the_operators_themselves(gpu):
    """With a mode that watches operators the kernels are not called at once, but by torch's dispatcher."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    seen = []
    images, labels = random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES
    options = {"num_classes": CLASSES, "patch_size": 8, "seed": 3, "mode": "elem"}
    expected = tokenmix(images, labels, **options)
    there, there_labels = to_gpu((images, labels))
    with no_host_reads(), Watch():
        fresh = tokenmix(there, there_labels, **options)
        written = tokenmix(there, there_labels, out=to_gpu(torch.empty_like(images)), **options)
        in_place = tokenmix(there, there_labels, out=there, **options)
    for got in (fresh, written, in_place):
        assert_same(got, expected)
    assert {name for name in seen if "tokenmix" in name} == {
        f"tokenmix_kernels::{name}" for name in ("mix", "mix_out", "mix_")
    }


def test_values_out_of_range_are_not_read(gpu):
    images, labels = to_gpu((random_images((BATCH, 3, 32, 48)), torch.tensor([0, 99, -1, 3, 2**40, 4])))
    options = {"num_classes": CLASSES, "patch_size": 8, "seed": 3}
    tokenmix(images, labels, **options)
    with no_host_reads():
        tokenmix(images, labels, **options)
    with pytest.raises(ValueError, match="labels must be in"):
        tokenmix(held(images), held(labels), **options)


@pytest.mark.parametrize("wrong", ["labels", "partner", "mask", "maps", "seed", "out"])
def test_an_argument_on_another_device_is_named(gpu, wrong):
    images = random_images((BATCH, 3, 32, 48))
    given = {
        "labels": torch.arange(BATCH) % CLASSES, "partner": torch.arange(BATCH), "mask": torch.ones(BATCH, 4, 6) > 0,
        "maps": random_maps("own"), "seed": torch.tensor(1), "out": torch.empty_like(images),
    }  # fmt: skip
    there = to_gpu(given)
    there[wrong] = to_gpu(given[wrong], 1) if wrong == "seed" else given[wrong]
    with pytest.raises((TypeError, ValueError), match=rf"{wrong} must be.*cuda:0"):
        tokenmix(to_gpu(images), there.pop("labels"), num_classes=CLASSES, patch_size=8, **there)


def test_the_stand_in_finds_what_it_is_there_to_find(gpu):
    there, labels = to_gpu((torch.randn(3, 4), torch.arange(3)))
    for read in (
        lambda: there.sum().item(), lambda: bool((there > 0).all()), lambda: int(labels[0]), lambda: there.tolist(),
        lambda: there.cpu(), lambda: there.to("cpu"), lambda: there[there > 0], lambda: there.nonzero(),
        lambda: torch.equal(there, there), lambda: torch.empty(3, 4).copy_(there), torch.cuda.synchronize,
        lambda: torch.tensor([1.0], device="cuda"), lambda: torch.zeros(3).to("cuda"),
    ):  # fmt: skip
        with no_host_reads(), pytest.raises(HostRead):
            read()
    for mixed in (lambda: there + torch.zeros(3, 4), lambda: there + to_gpu(torch.zeros(3, 4), 1)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        there.sum().item()
    assert not isinstance(there + 1, torch.nn.Parameter) and (there + 1).is_cuda
