"""The face on PyTorch's own fake CUDA tensors, as a tracer sees it: devices, shapes and no look at a value."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenmix_kernels import TokenMix, TopKMaps, attention_targets, pool_targets, token_mask, tokenmix

BATCH, CLASSES = 6, 5
CUDA = torch.device("cuda:0")


@pytest.mark.parametrize("seeded", ["no", "integer", "tensor"])
@pytest.mark.parametrize("place", ["fresh", "out", "in place"])
@pytest.mark.parametrize("mask_type", ["block", "cutmix", "given"])
def test_tokenmix(mask_type: str, place: str, seeded: str) -> None:
    with FakeTensorMode():
        images, labels = torch.empty(BATCH, 3, 32, 48, device=CUDA), torch.zeros(BATCH, dtype=torch.int64, device=CUDA)
        mask = torch.ones(BATCH, 4, 6, device=CUDA) > 0 if mask_type == "given" else None
        seed = {"no": None, "integer": 3, "tensor": torch.zeros((), dtype=torch.int64, device=CUDA)}[seeded]
        out = {"fresh": None, "out": torch.empty_like(images), "in place": images}[place]
        options = {} if mask is not None else {"mask_type": mask_type}
        mixed = tokenmix(images, labels, mask=mask, seed=seed, out=out, num_classes=CLASSES, patch_size=8, **options)
        assert {tensor.device for tensor in mixed} == {CUDA}
        assert [list(tensor.shape) for tensor in mixed] == [[6, 3, 32, 48], [6, 5], [6, 4, 6], [6, 2]]


def test_the_parts() -> None:
    with FakeTensorMode():
        labels = torch.zeros(BATCH, dtype=torch.int64, device=CUDA)
        mask = token_mask(BATCH, (4, 6), device=CUDA)
        maps = TopKMaps(
            torch.rand(BATCH, 3, 7, 9, device=CUDA), torch.zeros(BATCH, 3, 7, 9, dtype=torch.int64).to(CUDA)
        )
        weights = pool_targets(maps, labels, mask)
        attention = torch.rand(BATCH, 24, device=CUDA)
        targets = attention_targets(attention, mask, labels, num_classes=CLASSES)
        images = torch.zeros(BATCH, 3, 32, 48, dtype=torch.uint8, device=CUDA)
        mixed, soft = TokenMix(num_classes=CLASSES, patch_size=8, mean=(1, 1, 1), std=(2, 2, 2))(images, labels)
    for tensor, shape in (
        (mask, [6, 4, 6]),
        (weights, [6, 2]),
        (targets, [6, 5]),
        (soft, [6, 5]),
        (mixed, [6, 3, 32, 48]),
    ):
        assert (list(tensor.shape), tensor.device) == (shape, CUDA)
