"""A launch of a form that was launched before calls Triton's compiled kernel with what Triton itself would pass.

The kernel is compiled for sm_90; where the driver would be called, the arguments are noted.
"""

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from mix_helpers import random_boxes, random_images
from torch.utils._pytree import tree_flatten
from triton.compiler import LazyDict

from bench import host
from tokenmix_kernels import TokenMix, TopKMaps, call
from tokenmix_kernels.kernels import launch

BATCH, CLASSES = 4, 7


@contextmanager
def launches_noted():
    """The arguments of each call of the driver; images are taken for a GPU's."""
    noted = []
    with (
        mock.patch.object(host, "launched", lambda *given: noted.append(given)),
        mock.patch.object(call, "launches_at_once", lambda images: True),
        mock.patch.object(call, "PASSED", {}),
        host.stubbed(),
    ):
        yield noted


def inputs_of(step, rows=False):
    source = torch.Generator().manual_seed(step)
    values = torch.rand(BATCH, 3, 7, 9, generator=source)
    maps = TopKMaps(values, torch.randint(0, CLASSES, values.shape, generator=source))
    images, labels = random_images((BATCH, 3, 64, 96), torch.float16, seed=step), torch.arange(BATCH)
    if rows:
        labels = torch.rand(BATCH, CLASSES, generator=source).round()
    return images, labels, maps, random_boxes(BATCH)


def described(argument):
    """Tensors by what they hold (not images: nothing was mixed), all else as it is."""
    if not isinstance(argument, torch.Tensor):
        return type(argument) if isinstance(argument, LazyDict) else argument
    return argument.dtype, argument.tolist() if argument.shape[-2:] != (64, 96) else None


@pytest.mark.parametrize(
    "settings",
    [
        {"mixup_alpha": 0.0},
        {"mask_type": "cutmix", "lam": "beta"},
        {"mean": (0.5,) * 3, "std": (0.3,) * 3},
        {"multi_label": True, "clamp_targets": True},
    ],
    ids=["blocks", "cutmix", "normalised", "label rows"],
)
def test_the_compiled_kernel_gets_what_triton_would_pass(settings):
    """The same step twice as a new form and twice as a known one: every argument of the driver is the same."""
    mix = TokenMix(num_classes=CLASSES, mode="elem", return_mix=True, **settings)
    seen, rows = {}, mix.settings.multi_label
    with launches_noted() as noted, mock.patch.object(torch, "empty", torch.zeros):
        for known in (False, True):
            if known:
                mix(*inputs_of(0, rows), seed=0)
            noted.clear()
            for step in (1, 2):
                if not known:
                    call.PASSED.clear()
                images, *rest = inputs_of(step, rows)
                mix(images, *rest, seed=step + (1 << 40), sample_offset=step)
            seen[known] = [[described(leaf) for leaf in tree_flatten(given)[0]] for given in noted]
    assert len(seen[True]) == 2
    assert seen[True] == seen[False]
    assert seen[True][0] != seen[True][1]


def test_triton_is_asked_once_for_a_form():
    mix = TokenMix(num_classes=CLASSES, mode="elem", mixup_alpha=0.0)
    with launches_noted() as noted, mock.patch.object(launch, "prepare", wraps=launch.prepare) as prepare:
        for step in range(3):
            mix(*inputs_of(step))
        assert prepare.call_count == 1
        images, labels, *_ = inputs_of(0)
        for _ in range(2):
            mix(images[:2], labels[:2])
        assert prepare.call_count == 2
    assert len(noted) == 5
