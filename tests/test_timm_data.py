"""timm's train.py with one import changed: every flag of its loader is obeyed or refused."""

import inspect
from functools import partial

import pytest
import torch
from mix_helpers import generator
from test_timm_loader import CLASSES, COUNT, CPU, SIDE, Pictures, restart, settings

pytest.importorskip("timm", reason="needs the extra 'maps'")

import timm.data
from timm.data import AugMixDataset, FastCollateMixup, Mixup
from timm.data.loader import MultiEpochsDataLoader, PrefetchLoader

from tokenmix_kernels import TokenMix
from tokenmix_kernels.timm_data import create_loader
from tokenmix_kernels.timm_loader import TokenMixCollate, TokenMixLoader

MIXING = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": CLASSES}
# The flags of train.py that reach create_loader, one by one; what the loader gives is compared with timm's own below.
FLAGS = {
    "defaults": {},
    "--reprob 1": {"re_prob": 1.0},
    "--reprob 1 --resplit --workers 1": {"re_prob": 1.0, "re_split": True, "num_workers": 1},
    "--reprob 1 --remode pixel --recount 2": {"re_prob": 1.0, "re_mode": "pixel", "re_count": 2},
    "--aug-repeats 3, on one process": {"num_aug_repeats": 3, "distributed": True},
    "--no-aug": {"no_aug": True, "re_prob": 1.0},
    "--train-crop-mode rkrr --scale 1 1 --ratio 1 1": {"train_crop_mode": "rkrr", "scale": (1, 1), "ratio": (1, 1)},
    "--hflip 0 --vflip 1": {"hflip": 0.0, "vflip": 1.0},
    "--color-jitter 0.5 --color-jitter-prob 1 --grayscale-prob 0.5": {
        "color_jitter": 0.5, "color_jitter_prob": 1.0, "grayscale_prob": 0.5,
    },
    "--gaussian-blur-prob 1": {"gaussian_blur_prob": 1.0},
    "--aa rand-m9-mstd0.5-inc1": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "--train-interpolation random": {"interpolation": "random"},
    "--mean 0.5 --std 0.25": {"mean": (0.5,) * 3, "std": (0.25,) * 3},
    "--amp --amp-dtype bfloat16 images": {"img_dtype": torch.bfloat16},
    "--fp16 images": {"img_dtype": torch.float16},
    "fp16=True": {"fp16": True},
    "--use-multi-epochs-loader --workers 1": {"use_multi_epochs_loader": True, "num_workers": 1},
    "--worker-seeding part --workers 2": {"worker_seeding": "part", "num_workers": 2},
    "--pin-mem": {"pin_memory": True},
    "--input-size-choices": {"input_size_choices": [SIDE, 2 * SIDE], "batch_size_choices": [8, 4], "num_batches": 3},
}  # fmt: skip


def make(maker, collate=True, **options):
    options = {"is_training": True, "device": CPU, "num_workers": 0, "persistent_workers": False, **options}
    if collate:
        options["collate_fn"] = FastCollateMixup(**MIXING)
    return maker(Pictures(), (3, SIDE, SIDE), 8, **options)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_gives_the_images_that_timm_gives(name, request):
    options = dict(FLAGS[name])
    if options.get("distributed"):
        request.getfixturevalue("one_process")
    ours = make(partial(create_loader, mix={"patch_size": 8}), **options)
    theirs = make(timm.data.create_loader, collate=False, **options)  # what is to be mixed
    assert type(ours) is TokenMixLoader and len(ours) == len(theirs)
    assert type(ours.loader) is type(theirs.loader) and type(ours.sampler) is type(theirs.sampler)
    if options.get("use_multi_epochs_loader"):
        assert type(ours.loader) is MultiEpochsDataLoader
    assert (ours.random_erasing is None) == (theirs.random_erasing is None)
    ours.generator = generator(1)  # without workers, augmentation draws from the global one too
    expected = batches(theirs)
    ours.mixup_enabled = False
    for (images, targets), (plain, labels) in zip(batches(ours), expected, strict=True):
        assert images.dtype == plain.dtype and images.shape == plain.shape
        # timm rounds to the dtype at every step.
        atol = {torch.float32: 2e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}[images.dtype]
        if options.get("re_prob") and not options.get("no_aug"):
            assert not torch.equal(images, plain), "what is erased is drawn anew"
            left_alone = len(images) // 2 if options.get("re_split") else 0
            torch.testing.assert_close(images[:left_alone], plain[:left_alone], atol=atol, rtol=1e-5)
            continue
        torch.testing.assert_close(images, plain, atol=atol, rtol=1e-5)
        assert torch.equal(targets.argmax(1), labels)
    ours.mixup_enabled = True
    mixed = [(targets > 0.1 / CLASSES + 1e-6).sum(1) for _, targets in batches(ours)]
    assert max(int(count.max()) for count in mixed) == 2


def batches(loader):
    restart()
    return list(loader)


def test_flags_of_create_loader_are_all_tried_or_not_about_training():
    tried = {name for options in FLAGS.values() for name in options}
    elsewhere = {
        "dataset", "input_size", "batch_size", "is_training", "device", "collate_fn", "persistent_workers",  # in all
        "num_aug_splits", "use_prefetcher",  # refused
        "crop_pct", "crop_mode", "crop_border_pixels", "tf_preprocessing",  # of evaluation
        "batch_choice_weights", "batch_choice_seed", "batch_choice_schedule", "batch_schedule_epochs",
        "batch_schedule_spread", "batch_schedule_random_mix",  # of the batch sampler, which is timm's
    }  # fmt: skip
    known = set(inspect.signature(timm.data.create_loader).parameters)
    assert known - tried - elsewhere == set()


def test_mixing_flags_are_those_of_the_collate_function():
    arguments = {
        "mixup_alpha": 0.3, "cutmix_alpha": 0.7, "cutmix_minmax": (0.2, 0.8), "prob": 0.9, "switch_prob": 0.4,
        "mode": "pair", "correct_lam": False, "label_smoothing": 0.2, "num_classes": CLASSES, "multi_label": True,
    }  # fmt: skip
    more = {"mask_type": "cutmix", "patch_size": 8}
    loader = create_loader(
        Pictures(), (3, SIDE, SIDE), 8, is_training=True, collate_fn=FastCollateMixup(**arguments), device=CPU, mix=more
    )
    assert loader.mix.settings == TokenMix(**arguments, **more).settings
    off = FastCollateMixup(**MIXING)
    off.mixup_enabled = False
    assert not create_loader(Pictures(), (3, SIDE, SIDE), 8, is_training=True, collate_fn=off, device=CPU).mixup_enabled


def test_the_lines_of_train_py():
    """Its order of calls: a loader, the number of updates, epochs with --mixup-off-epoch, evaluation."""
    mixup_args = {**MIXING, "prob": 1.0, "switch_prob": 0.5, "mode": "batch", "label_smoothing": 0.1}
    collate_fn = FastCollateMixup(**mixup_args)
    loader_train = create_loader(
        Pictures(), input_size=(3, SIDE, SIDE), batch_size=8, is_training=True, no_aug=False, re_prob=0.0,
        num_workers=1, persistent_workers=True, collate_fn=collate_fn, device=CPU, use_prefetcher=True,
    )  # fmt: skip
    loader_eval = create_loader(Pictures(), (3, SIDE, SIDE), 8, is_training=False, device=CPU, num_workers=0)
    assert type(loader_eval) is PrefetchLoader
    assert (len(loader_train) + 2 - 1) // 2 == 1 and len(loader_train.dataset) == COUNT
    mixed = []
    for epoch in range(3):
        if hasattr(loader_train.sampler, "set_epoch"):
            loader_train.sampler.set_epoch(epoch)
        if epoch >= 2 and loader_train.mixup_enabled:
            loader_train.mixup_enabled = False
        targets = torch.cat([target for _, target in loader_train])
        assert targets.shape == (COUNT, CLASSES)
        mixed.append(bool((targets > 0.03).sum(1).max() == 2))
    assert mixed == [True, True, False]


ERRORS = {
    "--no-prefetcher": ({"use_prefetcher": False}, ValueError, "use_prefetcher must be True"),
    "--aug-splits": ({"num_aug_splits": 3}, ValueError, "num_aug_splits must be 0"),
    "twice": ({"mix": {"mode": "elem", "patch_size": 8}}, ValueError, "mix must not have mode, which collate_fn has"),
    "ours": ({"collate_fn": TokenMixCollate(**settings())}, TypeError, "got a TokenMixCollate, which mixes in the"),
    "nothing": ({"collate_fn": None, "mix": {"patch_size": 8}}, ValueError, r"mix must not be given .* no FastCollate"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_obeyed_is_refused(name):
    given, error, message = ERRORS[name]
    options = {"is_training": True, "collate_fn": FastCollateMixup(**MIXING), "device": CPU, **given}
    with pytest.raises(error, match=message):
        create_loader(Pictures(), (3, SIDE, SIDE), 8, **options)


def test_without_mixing_the_loader_is_timms():
    assert type(make(create_loader, collate=False)) is PrefetchLoader
    assert type(make(create_loader, collate=False, use_prefetcher=False)) is torch.utils.data.DataLoader
    assert Mixup is timm.data.Mixup


def test_views_of_an_image_are_not_mixed():
    dataset = AugMixDataset(Pictures(), num_splits=2)
    loader = timm.data.create_loader(dataset, (3, SIDE, SIDE), 8, is_training=True, num_aug_splits=2, device=CPU)
    with pytest.raises(ValueError, match="loader must not have augmentation splits"):
        TokenMixLoader(loader, TokenMix(**settings()))
