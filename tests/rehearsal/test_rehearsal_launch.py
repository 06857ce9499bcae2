"""Launches on a pretended GPU: graphs, and what a second launch of a form leaves out."""

import pytest
import torch
from mix_helpers import random_boxes, random_images
from pretend_cuda import pretended_gpus
from pretend_tensor import held, no_host_reads, to_gpu
from rehearsal_helpers import BATCH, CLASSES, assert_same
from torch.utils._pytree import tree_flatten

from tokenmix_kernels import TokenMix, attention_targets, call, tokenmix
from tokenmix_kernels.kernels import launch


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
