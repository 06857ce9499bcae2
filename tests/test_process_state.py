"""A mix depends on its arguments alone: not on settings of the process, and not on which process it is by accident."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from mix_helpers import random_boxes, random_images
from torch.utils.data import DataLoader
from train_helpers import finish_all, launch
from train_workers import record_masks

from tokenmix_kernels import TokenMix, TopKMaps, pool_targets, token_mask, tokenmix

LABELS = torch.tensor([0, 4, 2, 2, 1])


@contextmanager
def setting(change, value, before):
    change(value)
    try:
        yield
    finally:
        change(before)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "products in bfloat16": lambda: setting(torch.set_float32_matmul_precision, "medium", "highest"),
    "float64 by default": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "float16 by default": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "meta device by default": lambda: torch.device("meta"),
    "deterministic": lambda: setting(torch.use_deterministic_algorithms, True, False),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "one thread": lambda: setting(torch.set_num_threads, 1, torch.get_num_threads()),
}


def every_form():
    """Mixes with all forms of evidence, made before the state is set."""
    images = random_images((5, 3, 32, 48))
    source = torch.Generator().manual_seed(1)
    own = torch.rand(5, 7, 9, generator=source)
    every = torch.rand(5, 5, 7, 9, generator=source)
    top = TopKMaps(torch.rand(5, 2, 6, 7, generator=source), torch.randint(0, 5, (5, 2, 6, 7), generator=source))
    affines = torch.eye(2, 3).repeat(5, 1, 1) + 0.1 * torch.randn(5, 2, 3, generator=source)
    options = {"num_classes": 5, "patch_size": 8, "mode": "elem", "seed": 3}
    mask = token_mask(5, (4, 6), seed=1)
    mix = TokenMix(num_classes=5, patch_size=8, mode="elem", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))

    def run():
        calls = (
            lambda: tokenmix(images, LABELS, **options),
            lambda: tokenmix(images, LABELS, maps=own, boxes=random_boxes_before, **options),
            lambda: tokenmix(images, LABELS, maps=every, affines=affines, mask_type="random", **options),
            lambda: tokenmix(images, LABELS, maps=top, mask_type="cutmix", lam="beta", **options),
            lambda: mix(images, LABELS, own, seed=5),
            lambda: (pool_targets(own, LABELS, mask), token_mask(5, (4, 6), seed=2, device="cpu")),
        )
        return [result for call in calls for result in call()]

    random_boxes_before = random_boxes(5)
    return run


@pytest.mark.parametrize("state", STATES)
def test_results_do_not_follow_the_process(state):
    run = every_form()
    expected = run()
    with ExitStack() as stack:
        stack.enter_context(STATES[state]())
        got = run()
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.device == other.device
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_targets_of_one_size_are_those_of_many_threads():
    run = every_form()
    expected = run()
    with setting(torch.set_num_threads, 2, torch.get_num_threads()):
        for one, other in zip(run(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_every_rank_draws_its_own_masks(tmp_path):
    """With one seed on all ranks and no sample_offset, two halves of a batch are drawn as the whole batch is."""
    finish_all(launch(record_masks, [str(tmp_path)], 2))
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    whole = token_mask(8, (4, 6), seed=7)
    assert torch.equal(torch.cat([half["given"] for half in halves]), whole)
    assert not torch.equal(halves[0]["drawn"], halves[1]["drawn"])
    assert torch.equal(halves[0]["same"], halves[1]["same"])


class Mixes(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.zeros(1, 16, 16), index % 3


class Collate:
    """Mixes in the workers, and gives the masks."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self, samples):
        images = torch.stack([image for image, _ in samples])
        labels = torch.tensor([label for _, label in samples])
        return tokenmix(images, labels, num_classes=3, patch_size=2, mode="elem", generator=self.generator).mask


@pytest.mark.parametrize("given", [False, True])
def test_workers_draw_masks_of_their_own_in_every_epoch(given):
    def epochs(seed):
        collate = Collate(torch.Generator().manual_seed(5) if given else None)
        order = torch.Generator().manual_seed(seed)
        loader = DataLoader(Mixes(), batch_size=4, num_workers=2, collate_fn=collate, generator=order)
        return torch.cat([mask for _ in range(2) for mask in loader])

    masks = epochs(1)
    assert len(torch.unique(masks.flatten(1), dim=0)) == len(masks) == 48
    assert torch.equal(epochs(1), masks)
    assert not torch.equal(epochs(2), masks)


@pytest.mark.parametrize("side, tokens", [(2, 2), (4, 9), (8, 37), (14, 112), (24, 329), (64, 2341)])
def test_minimum_tokens_follow_the_grid(side, tokens):
    """A 14th of the tokens beside half of them: the published 14 of 14x14, and no more of smaller grids."""
    mask = token_mask(1, (side, side), mask_type="random", seed=1)
    assert int(mask.sum()) == tokens


def test_in_eval_mode_images_are_not_mixed_and_labels_are_smoothed():
    images = random_images((5, 3, 32, 48))
    mix = TokenMix(num_classes=5, patch_size=8, mean=(0.5,) * 3, std=(2.0,) * 3).eval()
    out, targets = mix(images, LABELS, seed=1)
    torch.testing.assert_close(out, (images - 0.5) / 2, rtol=1e-6, atol=1e-6)
    expected = torch.full((5, 5), 0.02).scatter_(1, LABELS[:, None], 0.92)
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-6)
    mixed, _ = mix.train()(images, LABELS, seed=1)
    assert not torch.equal(mixed, out)


@pytest.mark.parametrize("name", ["prob", "mix_prob", "switch_prob", "num_classes", "lam", "label_smoothing"])
def test_an_attribute_that_would_do_nothing_cannot_be_set(name):
    mix = TokenMix(num_classes=5)
    with pytest.raises(AttributeError, match=f"{name} must not be set"):
        setattr(mix, name, 0)
    mix.mixup_enabled = False
    assert not mix.mixup_enabled


def test_a_tv_tensor_comes_back_as_one():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    images = tv_tensors.Image(random_images((5, 3, 32, 48)))
    out, targets = TokenMix(num_classes=5, patch_size=8)(images, LABELS, seed=1)
    plain, _ = TokenMix(num_classes=5, patch_size=8)(images.as_subclass(torch.Tensor), LABELS, seed=1)
    assert type(out) is tv_tensors.Image and type(targets) is torch.Tensor
    assert torch.equal(out.as_subclass(torch.Tensor), plain)


def test_half_boxes_are_the_boxes_they_stand_for():
    maps = torch.rand(5, 14, 14, generator=torch.Generator().manual_seed(1))
    half = random_boxes(5).half()
    mask = token_mask(5, (7, 7), seed=1)
    weights = pool_targets(maps, LABELS, mask, boxes=half)
    assert torch.equal(weights, pool_targets(maps, LABELS, mask, boxes=half.float()))
