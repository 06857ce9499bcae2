"""timm's own loaders with TokenMix in them, in workers and on the device."""

import importlib
import pickle
import random
import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from mix_helpers import generator
from PIL import Image
from torch.utils.data import DataLoader, Dataset

pytest.importorskip("timm", reason="needs the extra 'maps'")

from timm.data import FastCollateMixup, create_loader
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.mixup import mixup_target

from tokenmix_kernels import RandomErasing, TokenMix, tokenmix
from tokenmix_kernels.timm_loader import TokenMixCollate, TokenMixLoader, WithPlaces, collate_places
from tokenmix_kernels.transforms import TrackedTransform

CPU = torch.device("cpu")
SIDE, CLASSES, COUNT = 32, 5, 16
PIXELS = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
MAPS = torch.rand(COUNT, 7, 7, generator=generator(1))


class Pictures(Dataset):
    """As timm's ImageDataset: a transform of PIL images that can be set."""

    transform = None

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = Image.fromarray(PIXELS[index])
        return (image if self.transform is None else self.transform(image)), index % CLASSES


def make(dataset=None, **options):
    options = {"is_training": True, "no_aug": True, "num_workers": 0, "persistent_workers": False, **options}
    return create_loader(dataset or Pictures(), (3, SIDE, SIDE), 8, device=CPU, **options)


def settings(**options):
    return {"num_classes": CLASSES, "patch_size": 8, **options}


def restart():
    """All generators from the start: the same order and the same crops."""
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def is_mixed(images, originals):
    """Whether an image holds pixels that are those of no original at their places, or of two."""
    sources = (images[None] == originals[:, None]).flatten(2).all(2)  # [N, B]
    return ~sources.any(0)


@pytest.mark.parametrize("img_dtype", [torch.float32, torch.float16])
def test_the_loader_mixes_what_the_prefetcher_would_have_normalised(img_dtype):
    plain = make(img_dtype=img_dtype)
    loader = TokenMixLoader(make(img_dtype=img_dtype), TokenMix(**settings(mixup_alpha=0.0)), generator=generator(5))
    seeds = generator(5)
    torch.manual_seed(3)
    expected = list(plain)
    torch.manual_seed(3)
    given = list(loader)
    assert len(given) == len(expected) == 2
    for (images, targets), (normalised, labels) in zip(given, expected, strict=True):
        assert images.dtype == img_dtype and targets.dtype == torch.float32
        mixed = tokenmix(normalised, labels, num_classes=CLASSES, patch_size=8, generator=seeds)
        # timm rounds to half three times, ours once.
        atol = 2e-6 if img_dtype == torch.float32 else 6e-3
        torch.testing.assert_close(images.float(), mixed.images.float(), atol=atol, rtol=1e-5)
        torch.testing.assert_close(targets, mixed.targets, atol=1e-6, rtol=0)
        assert (images - normalised).abs().max() > 0.1


def test_the_loader_has_the_attributes_of_the_prefetcher():
    prefetcher = make()
    loader = TokenMixLoader(prefetcher, TokenMix(**settings()))
    assert len(loader) == len(prefetcher) == 2
    for name in ("sampler", "batch_sampler", "dataset"):
        assert getattr(loader, name) is getattr(prefetcher, name)
    assert loader.mixup_enabled is True


def test_switched_off_the_loader_is_the_prefetcher_with_smoothed_targets():
    """What --mixup-off-epoch does."""
    loader = TokenMixLoader(make(), TokenMix(**settings()))
    loader.mixup_enabled = False
    assert loader.mixup_enabled is False
    torch.manual_seed(3)
    expected = list(make())
    torch.manual_seed(3)
    for (images, targets), (normalised, labels) in zip(loader, expected, strict=True):
        torch.testing.assert_close(images, normalised, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(targets, mixup_target(labels, CLASSES, 1.0, 0.1), atol=1e-6, rtol=0)


def test_images_are_erased_before_they_are_mixed():
    """In the launch that mixes, by the numbers of timm's own object. Both images of a pair bring theirs."""
    options = {
        "re_prob": 1.0,
        "re_mode": "pixel",
        "re_count": 2,
        "no_aug": False,
        "scale": (1, 1),
        "hflip": 0,
        "color_jitter": None,
    }
    prefetcher = make(**options)
    loader = TokenMixLoader(prefetcher, TokenMix(**settings(mixup_alpha=0.0)), generator=generator(5))
    assert loader.random_erasing is prefetcher.random_erasing is not None
    erasing = RandomErasing(1.0, mode="pixel", max_count=2)
    restart()
    batches = list(prefetcher.loader)
    seeds = generator(5)
    for erased in (erasing, None):
        restart()
        for (images, _), (pixels, labels) in zip(loader, batches, strict=True):
            expected = tokenmix(
                pixels, labels, num_classes=CLASSES, patch_size=8, generator=seeds, mean=loader.mean, std=loader.std,
                erasing=erased,
            )  # fmt: skip
            torch.testing.assert_close(images, expected.images, atol=0, rtol=0)
        loader.random_erasing = None


def test_erasing_is_the_loaders_or_the_mixs():
    mix = TokenMix(**settings(mixup_alpha=0.0), erasing=RandomErasing(1.0))
    assert (next(iter(TokenMixLoader(make(), mix)))[0] == 0).float().mean() > 0.05
    with pytest.raises(ValueError, match="mix must be made without erasing where the loader erases"):
        TokenMixLoader(make(re_prob=0.5, no_aug=False), mix)
    with pytest.raises(ValueError, match="erasing must not be given to a collate function"):
        TokenMixCollate(**settings(), erasing=RandomErasing())


def test_maps_come_to_their_images_by_id():
    dataset = WithPlaces(Pictures())
    prefetcher = make(dataset, collate_fn=collate_places)
    prefetcher.dataset.transform = TrackedTransform(SIDE, auto_augment=None, color_jitter=None)
    assert dataset.dataset.transform is prefetcher.dataset.transform
    loader = TokenMixLoader(prefetcher, TokenMix(**settings(mixup_alpha=0.0)), MAPS, generator=generator(5))
    restart()
    batches = list(prefetcher.loader)
    restart()
    seeds = generator(5)
    differ = []
    for (images, targets), (pixels, labels, places) in zip(loader, batches, strict=True):
        assert set(places) == {"ids", "affines"} and places["affines"].shape == (8, 2, 3)
        assert torch.equal(labels, places["ids"] % CLASSES)
        mixed = tokenmix(
            pixels, labels, num_classes=CLASSES, patch_size=8, maps=MAPS, generator=seeds, mean=loader.mean,
            std=loader.std, **places,
        )  # fmt: skip
        assert torch.equal(images, mixed.images) and torch.equal(targets, mixed.targets)
        differ.append((mixed.weights.sum(1) - 1).abs().max())
    assert max(differ) > 0.01, "weights follow the area"


def test_a_plain_data_loader_of_bytes_does_too():
    plain = make(use_prefetcher=True).loader
    loader = TokenMixLoader(
        plain, TokenMix(**settings()), device="cpu", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    other = TokenMixLoader(make(), TokenMix(**settings()))
    torch.testing.assert_close(loader.mean, other.mean, atol=1e-4, rtol=0)
    torch.manual_seed(3)
    expected = list(other)
    torch.manual_seed(3)
    for one, two in zip(loader, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_the_collate_function_is_timms():
    """PrefetchLoader knows it by its class, and its attributes are those that timm reads."""
    arguments = {
        "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "cutmix_minmax": None, "prob": 0.9, "switch_prob": 0.4, "mode": "elem",
        "label_smoothing": 0.2, "num_classes": CLASSES,
    }  # fmt: skip
    collate, theirs = TokenMixCollate(**arguments, patch_size=8), FastCollateMixup(**arguments)
    for name in vars(theirs):
        assert getattr(collate, name) == getattr(theirs, name), name
    loader = make(collate_fn=collate)
    assert type(loader) is PrefetchLoader and loader.mixup_enabled
    loader.mixup_enabled = False
    assert not loader.mixup_enabled and not collate.mixup_enabled


def test_the_collate_function_moves_whole_tokens_of_bytes():
    collate = TokenMixCollate(**settings(mixup_alpha=0.0, label_smoothing=0.0))
    samples = [(np.ascontiguousarray(PIXELS[n].transpose(2, 0, 1)), n % CLASSES) for n in range(8)]
    torch.manual_seed(3)
    images, targets = collate(samples)
    originals, labels = fast_collate(samples)
    torch.manual_seed(3)
    expected = tokenmix(originals, labels, num_classes=CLASSES, patch_size=8, label_smoothing=0.0)
    assert images.dtype == torch.uint8
    assert torch.equal(images, expected.images) and torch.equal(targets, expected.targets)
    assert is_mixed(images, originals).all()
    tensors = [(torch.from_numpy(image), label) for image, label in samples]
    torch.manual_seed(3)
    assert torch.equal(collate(tensors)[0], images)


def test_the_collate_function_takes_multi_label_rows():
    rows = np.random.default_rng(0).random((8, CLASSES)) < 0.5
    options = {"mixup_alpha": 0.8, "cutmix_alpha": 0.0, "mode": "batch", "num_classes": CLASSES, "multi_label": True}
    collate, theirs = TokenMixCollate(**options, patch_size=8), FastCollateMixup(**options)
    assert collate.multi_label is theirs.multi_label is True
    samples = [(np.ascontiguousarray(PIXELS[n].transpose(2, 0, 1)), rows[n]) for n in range(8)]
    _, targets = collate(samples)
    kept = torch.from_numpy(rows).float()
    differs = rows != rows[::-1]
    lam = float(((targets - 0.05) / 0.9)[torch.from_numpy(rows & differs)].mean())
    theirs._params_per_batch = lambda: (lam, False)
    _, expected = theirs([(image, torch.from_numpy(row)) for image, row in samples])
    torch.testing.assert_close(targets, expected.float(), atol=1e-5, rtol=0)
    loader = DataLoader([(image, row.astype(np.float32)) for image, row in samples], 8, collate_fn=collate_places)
    mix = TokenMix(num_classes=CLASSES, patch_size=8, mixup_alpha=0.0, cutmix_alpha=1.0, prob=0.0, multi_label=True)
    ((_, unmixed),) = TokenMixLoader(loader, mix, device=CPU, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(unmixed, kept * 0.9 + 0.05)


def test_running_workers_follow_mixup_enabled():
    """(timm's own collate function, copied into persistent workers, goes on mixing after --mixup-off-epoch)"""
    collate = TokenMixCollate(**settings(mixup_alpha=0.0))
    loader = DataLoader(Bytes(), 8, num_workers=1, persistent_workers=True, collate_fn=collate)
    prefetcher = PrefetchLoader(loader, device=CPU, mean=(0.0,) * 3, std=(1.0,) * 3)
    originals = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    seen = []
    for enabled in (True, False, True):
        prefetcher.mixup_enabled = enabled
        images = torch.cat([images for images, _ in prefetcher]).mul(255).round().byte()
        seen.append(is_mixed(images, originals).tolist())
    assert seen == [[True] * COUNT, [False] * COUNT, [True] * COUNT]
    sent = pickle.loads(ForkingPickler.dumps(collate))  # what a worker gets that is spawned, not forked
    collate.mixup_enabled = False
    assert not sent.mixup_enabled


class Bytes(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return np.ascontiguousarray(PIXELS[index].transpose(2, 0, 1)), index % CLASSES


class Numbered(Bytes):
    """Images of their own number, so that masks can be read off mixed ones."""

    def __getitem__(self, index):
        return np.full((3, SIDE, SIDE), index, np.uint8), index % CLASSES


def test_each_worker_draws_masks_of_its_own():
    collate = TokenMixCollate(**settings(mixup_alpha=0.0, mode="elem", patch_size=2))
    loader = DataLoader(Numbered(), 4, num_workers=2, collate_fn=collate, generator=generator(1))
    masks = torch.cat([images[:, 0] != images[:, 0, :1, :1] for _ in range(2) for images, _ in loader])
    masks = masks ^ masks[:, :1, :1]
    assert len(torch.unique(masks.flatten(1), dim=0)) == 2 * COUNT


def test_the_collate_function_takes_maps():
    dataset = WithPlaces(Pictures(), tracked=False)
    collate = TokenMixCollate(**settings(mixup_alpha=0.0), maps=MAPS)
    loader = make(dataset, collate_fn=collate, persistent_workers=False)
    torch.manual_seed(3)
    targets = torch.cat([targets for _, targets in loader])
    assert (targets.sum(1) - 1).abs().max() > 0.01


LOADER_ERRORS = {
    "mixed": ({"loader": "mixed"}, ValueError, r"loader must not mix in its collate function.*FastCollateMixup"),
    "mix": ({"mix": None}, TypeError, "mix must be a TokenMix, got None"),
    "mean": ({"mix": TokenMix(mean=(1,) * 3, std=(1,) * 3)}, ValueError, "mix must be made without mean"),
    "device": ({"device": "cpu"}, ValueError, "device must not be given beside a PrefetchLoader"),
    "plain": ({"loader": "plain"}, ValueError, "device, mean and std must be given where loader is not"),
}


@pytest.mark.parametrize("case", LOADER_ERRORS)
def test_the_loaders_errors_name_the_argument(case):
    given, error, message = LOADER_ERRORS[case]
    loaders = {"mixed": lambda: make(collate_fn=FastCollateMixup(num_classes=CLASSES)), "plain": lambda: make().loader}
    given = {"mix": TokenMix(), **given, "loader": loaders.get(given.get("loader"), make)()}
    with pytest.raises(error, match=message):
        TokenMixLoader(**given)


def test_batches_that_do_not_fit_are_named():
    mix = TokenMix(**settings())
    with pytest.raises(TypeError, match="images must be uint8"):
        next(iter(TokenMixLoader(make(use_prefetcher=False), mix, device="cpu", mean=(0.5,) * 3, std=(0.5,) * 3)))
    with pytest.raises(ValueError, match="maps must come with samples that say which is theirs"):
        next(iter(TokenMixLoader(make(), mix, MAPS)))
    with pytest.raises(ValueError, match="maps must come with samples that say which is theirs"):
        TokenMixCollate(**settings(), maps=MAPS)([Bytes()[0], Bytes()[1]])
    with pytest.raises(TypeError, match="images must be uint8"):
        collate_places([(torch.zeros(3, 8, 8), 0)])
    with pytest.raises(TypeError, match=r"transform must be a TrackedTransform.*got Compose.*set it after"):
        next(iter(TokenMixLoader(make(WithPlaces(Pictures()), collate_fn=collate_places), mix, MAPS)))
    with pytest.raises(TypeError, match="images must be arrays or tensors, got a tuple of 2: wrap"):
        TokenMixCollate(**settings())([((Bytes()[0][0], None), 0)])
    with pytest.raises(TypeError, match=r"a batch must be \(images, labels\)"):
        TokenMixCollate(**settings(), maps=MAPS)([(*Bytes()[0], 3), (*Bytes()[1], 4)])
    with pytest.raises(ValueError, match="mean must not be given to a collate function"):
        TokenMixCollate(mean=(1,) * 3)
    with pytest.raises(ValueError, match="mode must be one of"):
        TokenMixCollate(mode="half")


def test_without_timm_a_sentence_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "tokenmix_kernels.timm_loader")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is needed for this and is not installed: pip install .*\[maps\]"):
        importlib.import_module("tokenmix_kernels.timm_loader")


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_a_gpu_gives_what_a_cpu_gives(workers):
    """The side stream: each batch is read, and its memory released, while the next one is made."""
    given = {}
    for name in ("cpu", "cuda"):
        prefetcher = create_loader(
            Pictures(), (3, SIDE, SIDE), 2, is_training=True, no_aug=True, num_workers=workers,
            device=torch.device(name), pin_memory=name == "cuda",
        )  # fmt: skip
        loader = TokenMixLoader(prefetcher, TokenMix(**settings()), generator=generator(5))
        torch.manual_seed(3)
        given[name] = [(images.cpu(), targets.cpu()) for _ in range(3) for images, targets in loader]
    assert len(given["cuda"]) == 24
    for one, two in zip(given["cpu"], given["cuda"], strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
