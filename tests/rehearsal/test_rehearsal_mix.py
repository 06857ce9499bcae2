"""The public face on a pretended GPU: what the reference says, on the right device, without a wait of the host."""

import pytest
import torch
from mix_helpers import LAYOUTS, random_boxes, random_images
from pretend_cuda import pretended_gpus
from pretend_tensor import HostRead, held, no_host_reads, to_gpu
from timm.data import FastCollateMixup
from torch.utils._pytree import tree_flatten
from torch.utils.data import Dataset

from tokenmix_kernels import (
    TokenMix,
    TopKMaps,
    attention_targets,
    call,
    pool_targets,
    progressive_ratio,
    token_mask,
    tokenmix,
)
from tokenmix_kernels.kernels import launch
from tokenmix_kernels.timm_data import create_loader
from tokenmix_kernels.timm_loader import TokenMixLoader

BATCH, CLASSES = 6, 5
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
MASK_TYPES = ("block", "random", "grid", "cutmix")


def random_maps(form):
    source = torch.Generator().manual_seed(5)
    shape = {"own": (7, 9), "all": (CLASSES, 7, 9), "topk": (3, 7, 9), "bank": (7, 9)}[form]
    values = torch.rand(4 if form == "bank" else BATCH, *shape, generator=source)
    if form != "topk":
        return values
    return TopKMaps(values, torch.randint(0, CLASSES, values.shape, generator=source))


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert one.device == torch.device("cuda:0")
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert torch.equal(held(one), other)


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


@pytest.mark.parametrize("place", ["fresh", "out", "in place"])
def test_a_captured_mix_draws_anew_at_each_replay(gpu, place):
    mix = TokenMix(mixup_alpha=0.0, num_classes=CLASSES, mode="elem", patch_size=4, minimum_tokens=2)
    source, labels = torch.randn(BATCH, 3, 32, 32), to_gpu(torch.arange(BATCH) % CLASSES)
    images = to_gpu(source.clone())
    out = {"fresh": None, "out": to_gpu(torch.empty_like(source)), "in place": images}[place]
    mix(images, labels, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed, _ = mix(images, labels, out=out)
    seen = []
    for _ in range(4):
        images.copy_(source)
        graph.replay()
        seen.append(held(mixed).clone())
        assert torch.equal(torch.where(held(mixed) != source, source.flip(0), source), held(mixed))
    assert len(torch.unique(torch.stack(seen).flatten(1), dim=0)) == 4


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


def test_a_loader_mixes_the_next_batch_on_the_gpu(gpu):
    generator = torch.Generator().manual_seed(0)
    batches = [(random_images((4, 3, 32, 32), torch.uint8, seed=seed), torch.arange(4) % CLASSES) for seed in range(3)]
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mode="elem", mixup_alpha=0)
    there = [(images.pin_memory(), labels.pin_memory()) for images, labels in batches]
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
    loader = TokenMixLoader(there, mix, device="cuda", generator=generator, **options)
    got = list(loader)
    with no_host_reads():
        again = list(loader)
    generator.manual_seed(0)
    expected = list(TokenMixLoader(batches, mix, device="cpu", generator=generator, **options))
    for one, other in zip(got, expected, strict=True):
        assert_same(one, other)
    assert len(again) == 3


def test_a_batch_of_timms_loader_is_one_launch_on_the_gpu(gpu, monkeypatch):
    """What train.py gets with one import changed: a copy to the device, and one kernel."""
    collate = FastCollateMixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES)
    dataset = [(image.numpy(), n % CLASSES) for n, image in enumerate(random_images((8, 3, 32, 32), torch.uint8))]
    # timm's statistics are made on the device; its own loop is not used.
    loader = create_loader(
        Listed(dataset), (3, 32, 32), 4, is_training=True, collate_fn=collate, num_workers=0,
        device=torch.device("cuda"), img_dtype=torch.float16, mix={"patch_size": 8},
    )  # fmt: skip
    before = len(gpu.launches)
    batches = list(loader)
    assert [name for name, *_ in gpu.launches[before:]] == ["mix_kernel"] * 2
    for images, targets in batches:
        assert images.is_cuda and images.dtype == torch.float16 and targets.shape == (4, CLASSES)


class Listed(Dataset):
    """Samples of a list; timm sets a transform, which is not used."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def test_a_second_launch_of_a_form_goes_to_the_compiled_kernel_at_once(gpu, monkeypatch):
    """Triton's look at all arguments is left out: seeds, offsets, values and addresses of the second call count."""
    prepared = []
    prepare = launch.prepare
    monkeypatch.setattr(launch, "prepare", lambda *given: prepared.append(1) or prepare(*given))
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mode="elem", return_mix=True)
    for step in range(4):
        images, labels = random_images((BATCH, 3, 32, 48), seed=step), (torch.arange(BATCH) + step) % CLASSES
        maps = torch.rand(BATCH, 7, 9, generator=torch.Generator().manual_seed(step))
        boxes, partner = random_boxes(BATCH), torch.arange(BATCH).roll(step)
        places = {"maps": maps, "boxes": boxes, "partner": partner}
        expected = mix(images, labels, **places, seed=step - 2, sample_offset=7 * step)
        images, labels, places = to_gpu((images, labels, places))
        with no_host_reads():
            got = mix(images, labels, **places, seed=step - 2, sample_offset=7 * step)
        assert_same(got[:2], expected[:2])
        assert_same((got[2].mask, got[2].kind, got[2].lam), (expected[2].mask, expected[2].kind, expected[2].lam))
    assert len(prepared) == 1
    assert len(gpu.launches) == 4


@pytest.mark.parametrize("change", ["address", "offset", "seed on the GPU", "in place", "partner"])
def test_what_triton_compiles_apart_is_not_relaunched(gpu, monkeypatch, change):
    prepared = []
    prepare = launch.prepare
    monkeypatch.setattr(launch, "prepare", lambda *given: prepared.append(1) or prepare(*given))
    images, labels = random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES
    options = {"num_classes": CLASSES, "patch_size": 8, "mode": "elem", "seed": 3, "sample_offset": 0}
    given = to_gpu(images.clone()), to_gpu(labels)
    for _ in range(2):
        tokenmix(*given, **options)
    assert len(prepared) == 1
    changed = dict(options)
    if change == "address":
        moved = to_gpu(torch.cat([torch.zeros(1), images.flatten()]))[1:].view(images.shape)
        given = moved, given[1]
    elif change == "offset":
        options["sample_offset"] = changed["sample_offset"] = 1 << 31
    elif change == "seed on the GPU":
        changed["seed"] = to_gpu(torch.tensor(3))
    elif change == "in place":
        changed["out"] = given[0]
    else:
        options["partner"] = torch.arange(BATCH).roll(2)
        changed["partner"] = to_gpu(options["partner"])
    expected = tokenmix(images, labels, **options)
    with no_host_reads():
        got = tokenmix(*given, **changed)
    assert len(prepared) == 2
    assert_same(got, expected)


def test_a_form_keeps_no_tensors(gpu):
    images, labels, maps = to_gpu((random_images((2, 3, 32, 48)), torch.arange(2), torch.rand(2, 7, 9)))
    partner = to_gpu(torch.tensor([1, 0]))
    mask = to_gpu(torch.rand(2, 4, 6) < 0.5)
    mixed = tokenmix(images, labels, maps=maps, mask=mask, partner=partner, num_classes=CLASSES, patch_size=8)
    (form,) = call.PASSED.values()
    kept = {id(leaf) for leaf in tree_flatten(list(vars(form.relaunch).values()))[0]}
    assert not kept & {id(tensor) for tensor in (images, labels, maps, mask, partner, *mixed)}


def test_a_launch_goes_to_the_gpu_of_the_images():
    """Not to the current one: Triton would launch there, on memory of another GPU."""
    images, labels = random_images((BATCH, 3, 32, 48)), torch.arange(BATCH) % CLASSES
    options = {"num_classes": CLASSES, "patch_size": 8, "seed": 3}
    expected = tokenmix(images, labels, **options)
    with pretended_gpus(2):
        for device in ("cuda:1", "cuda:1", "cuda:0"):
            got = tokenmix(images.to(device), labels.to(device), **options)
            assert got.images.device == torch.device(device)
            assert torch.equal(held(got.images), expected.images)
            attention = torch.ones(BATCH, 24, device=device)
            targets = attention_targets(attention, got.mask, labels.to(device), num_classes=CLASSES)
            assert targets.device == torch.device(device)
            assert torch.cuda.current_device() == 0
