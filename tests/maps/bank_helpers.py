"""A small bank for the tests of banks."""

import torch

from tokenmix_kernels.maps.bank import MapBankWriter, dataset_digest

COUNT, GRID = 37, (5, 7)
NAMES = [f"class/{i}.png" for i in range(COUNT)]
LABELS = [i * i % 11 for i in range(COUNT)]
DIGEST = dataset_digest(NAMES, LABELS)


def random_maps(count=COUNT, grid=GRID, seed=0):
    """Maps of very different scales, one of them all zero."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(count, *grid, generator=generator) * torch.logspace(-30, 30, count)[:, None, None]
    maps[3] = 0
    return maps


def create(path, **changes):
    sizes = torch.stack([torch.arange(COUNT) + 100, torch.arange(COUNT) + 300], 1)
    arguments = {"count": COUNT, "grid": GRID, "labels": LABELS, "sizes": sizes}
    arguments.update(teacher="t", digest=DIGEST)
    return MapBankWriter.create(path, **{**arguments, **changes})
