"""Loaders that mix on a pretended GPU."""

import torch
from mix_helpers import random_images
from pretend_tensor import no_host_reads
from rehearsal_helpers import CLASSES, assert_same
from timm.data import FastCollateMixup
from torch.utils.data import Dataset

from tokenmix_kernels import TokenMix
from tokenmix_kernels.timm_data import create_loader
from tokenmix_kernels.timm_loader import TokenMixLoader


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
