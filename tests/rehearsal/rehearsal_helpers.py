"""What tests of the mix on a pretended GPU share."""

import torch
from pretend_tensor import held

from tokenmix_kernels import TopKMaps

BATCH, CLASSES = 6, 5


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
