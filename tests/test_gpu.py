"""What only a GPU can do: graphs, streams, compiled steps, unchecked values, and that the host never waits.

That its kernels do what the reference does is the matrix of `tests/devices`.
"""

import pytest
import torch
from mix_helpers import bits_equal, random_boxes, random_images

from tokenmix_kernels import TokenMix, TopKMaps, pool_targets, token_mask, tokenmix

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Sums of a map's evidence are taken in another order.
TARGET_TOLERANCE = {"atol": 1e-6, "rtol": 0}


def moved(value):
    """A tensor, or a tuple of them, on the GPU with its strides."""
    if isinstance(value, TopKMaps):
        return TopKMaps(*map(moved, value))
    if not isinstance(value, torch.Tensor):
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)
    return there.copy_(value)


def random_maps(form, batch, classes, dtype=torch.float32):
    source = torch.Generator().manual_seed(5)
    if form == "own":
        return torch.rand(batch, 7, 9, generator=source).to(dtype)
    if form == "all":
        return torch.rand(batch, classes, 7, 9, generator=source).to(dtype)
    values = torch.rand(batch, 5, 18, 18, generator=source).to(dtype)
    return TopKMaps(values, torch.randint(0, classes, (batch, 5, 18, 18), generator=source))


def assert_same(got, expected):
    assert got.images.device.type == DEVICE and got.targets.device.type == DEVICE
    assert torch.equal(got.mask.cpu(), expected.mask)
    assert bits_equal(got.images.cpu(), expected.images)
    torch.testing.assert_close(got.weights.cpu(), expected.weights, **TARGET_TOLERANCE)
    torch.testing.assert_close(got.targets.cpu(), expected.targets, **TARGET_TOLERANCE)


def test_values_out_of_range_are_harmless():
    """A label adds nothing to the targets, a partner is the image itself, an id has no evidence."""
    images = moved(random_images((4, 3, 32, 32)))
    labels = torch.tensor([0, 2**31, -1, 5], device=DEVICE)
    partner = torch.tensor([2**40, -3, 0, 4], device=DEVICE)
    options = {"num_classes": 5, "patch_size": 8, "mode": "elem", "seed": 1, "label_smoothing": 0.0}
    mixed = tokenmix(images, labels, partner=partner, **options)
    assert bits_equal(mixed.images[[0, 1, 3]], images[[0, 1, 3]])
    torch.testing.assert_close(mixed.targets[:, 1:], torch.zeros(4, 4, device=DEVICE))
    torch.testing.assert_close(mixed.targets[0, 0].item(), 1.0)
    torch.testing.assert_close(mixed.targets[2, 0], mixed.weights[2, 1])
    ids = torch.tensor([0, 2**40, -1, 2], device=DEVICE)
    bank = torch.rand(2, 6, 6, device=DEVICE)
    with_ids = tokenmix(images, labels, maps=bank, ids=ids, **options)
    share = with_ids.mask.float().mean((1, 2))
    torch.testing.assert_close(with_ids.weights[1:, 0], 1 - share[1:])
    assert with_ids.weights.isfinite().all()


@pytest.fixture
def no_waiting():
    """Makes whatever lets the host wait for the GPU an error, within `with`."""

    class Watch:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    return Watch()


@pytest.mark.parametrize("form", ["none", "own", "topk"])
@pytest.mark.parametrize("seeded", ["no", "integer", "tensor"])
def test_the_host_never_waits(form, seeded, no_waiting):
    mix = TokenMix(num_classes=8, mode="elem", mean=MEAN, std=STD, lam="beta", patch_size=8)
    images, labels = moved(random_images((8, 3, 32, 32), torch.uint8)), torch.arange(8, device=DEVICE)
    maps = None if form == "none" else moved(random_maps(form, 8, 8))
    boxes = None if form == "none" else random_boxes(8).to(DEVICE)
    seed = {"no": None, "integer": 3, "tensor": torch.tensor(3, device=DEVICE)}[seeded]
    partner = torch.arange(8, device=DEVICE).roll(1)
    out = torch.empty(8, 3, 32, 32, device=DEVICE)
    mix(images, labels, maps, boxes)  # tables and kernels are made in the first call
    mask = token_mask(8, (4, 4), device=DEVICE, seed=seed)
    with no_waiting:
        mix(images, labels, maps, boxes, seed=seed)
        mix(images, labels, maps, boxes, seed=seed, partner=partner, out=out)
        token_mask(8, (4, 4), device=DEVICE, seed=seed)
        if maps is not None:
            pool_targets(maps, labels, mask, boxes=boxes, partner=partner)


@pytest.mark.parametrize("place", ["fresh", "out", "in place"])
def test_a_graph_draws_fresh_masks_at_each_replay(place):
    mix = TokenMix(mixup_alpha=0.0, num_classes=8, mode="elem", patch_size=4, minimum_tokens=2)
    source, labels = moved(random_images((8, 3, 32, 32))), torch.arange(8, device=DEVICE)
    images = source.clone()
    out = {"fresh": None, "out": torch.empty_like(images), "in place": images}[place]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        mix(images, labels, out=out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed, targets = mix(images, labels, out=out)
    seen = []
    for _ in range(5):
        images.copy_(source)
        graph.replay()
        taken = mixed != source
        assert torch.equal(torch.where(taken, source.flip(0), source), mixed)
        tokens = taken[:, 0, ::4, ::4]
        assert torch.equal(tokens.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(taken), taken)
        partner_share = tokens.float().mean((1, 2))
        own = targets.gather(1, labels[:, None])[:, 0] + 0.05 - 0.1 / 8
        torch.testing.assert_close(own, 1 - partner_share, **TARGET_TOLERANCE)
        seen.append(tokens.clone())
    assert len(torch.unique(torch.stack(seen).flatten(1), dim=0)) == 5


def test_a_graph_follows_its_seed_tensor():
    images, labels = moved(random_images((6, 3, 32, 32))), torch.arange(6, device=DEVICE)
    options = {"num_classes": 6, "patch_size": 4, "mode": "elem"}
    seed = torch.tensor(0, device=DEVICE)
    tokenmix(images, labels, seed=seed, **options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mixed = tokenmix(images, labels, seed=seed, **options)
    for number in (5, -1, 2**62):
        seed.fill_(number)
        graph.replay()
        assert_same(mixed, tokenmix(images.cpu(), labels.cpu(), seed=number, **options))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_whole_with_changing_batches(mode):
    mix = TokenMix(num_classes=5, patch_size=8, mode="elem", mean=MEAN, std=STD)
    step = torch.compile(lambda *given, **options: mix(*given, **options), fullgraph=True, mode=mode)
    for batch in (4, 6, 3, 6):
        images = random_images((batch, 3, 32, 48), torch.uint8)
        labels = torch.arange(batch) % 5
        out, targets = step(moved(images), labels.to(DEVICE), seed=torch.tensor(batch, device=DEVICE))
        expected, expected_targets = mix(images, labels, seed=batch)
        assert bits_equal(out.cpu(), expected)
        torch.testing.assert_close(targets.cpu(), expected_targets, **TARGET_TOLERANCE)
    images, labels = moved(random_images((4, 3, 32, 48), torch.uint8)), torch.arange(4, device=DEVICE)
    drawn = [step(images, labels)[0].clone() for _ in range(4)]
    assert len(torch.unique(torch.stack(drawn).flatten(1), dim=0)) == 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one():
    images, labels = random_images((4, 3, 32, 32)), torch.arange(4)
    options = {"num_classes": 4, "patch_size": 8, "seed": 1}
    got = tokenmix(images.to("cuda:1"), labels.to("cuda:1"), **options)
    assert got.images.device.index == 1
    assert_same(got, tokenmix(images, labels, **options))
