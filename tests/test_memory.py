"""Large results on the CPU: huge pages where they are to be had, and tensors like any other."""

import io
import mmap
import threading
from pathlib import Path

import pytest
import torch

from tokenmix_kernels import memory, tokenmix
from tokenmix_kernels.memory import empty_images

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="huge pages on request are Linux's")
LARGE = (15, 3, 512, 400)  # 37 MB of float32


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.fixture
def blocks(monkeypatch):
    """Sizes of the blocks that are mapped."""
    sizes = []
    real = mmap.mmap

    def counted(fileno, size, **options):
        sizes.append(size)
        return real(fileno, size, **options)

    monkeypatch.setattr(memory.mmap, "mmap", counted)
    return sizes


@linux
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_results_are_like_any_others(dtype, layout, blocks):
    images = torch.empty(LARGE, dtype=torch.float32).contiguous(memory_format=layout)
    out, plain = empty_images(images, dtype), torch.empty_like(images, dtype=dtype)
    assert len(blocks) == 1
    assert (out.shape, out.stride(), out.dtype) == (plain.shape, plain.stride(), dtype)
    assert out.data_ptr() % memory.HUGE == 0 and not out._is_view()
    values = torch.rand(LARGE, generator=torch.Generator().manual_seed(0)).to(dtype)
    out.copy_(values)
    file = io.BytesIO()
    torch.save(out[-1], file)
    file.seek(0)
    assert torch.equal(torch.load(file), values[-1])
    assert torch.equal(out.share_memory_(), values)


@linux
def test_memory_goes_back_whoever_drops_it():
    images = torch.empty(LARGE)
    size = images.numel() * 4
    before = resident()
    held = [empty_images(images, torch.float32).fill_(1.0) for _ in range(4)]
    assert resident() - before > 3.9 * size
    for _ in range(3):
        held.pop()
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    assert resident() - before < 0.5 * size


def test_small_results_are_ordinary(blocks):
    assert empty_images(torch.empty(2, 3, 32, 32), torch.float16).shape == (2, 3, 32, 32)
    assert empty_images(torch.empty(LARGE, device="meta"), torch.float32).device.type == "meta"
    assert not blocks


@pytest.mark.parametrize("why", ["another system", "refused"])
def test_without_huge_pages(why, monkeypatch):
    def refuse(*args, **options):
        raise OSError("no")

    if why == "refused":
        monkeypatch.setattr(memory.mmap, "mmap", refuse)
    else:
        monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE", raising=False)
    assert empty_images(torch.empty(LARGE), torch.float32).untyped_storage().nbytes() == 4 * torch.Size(LARGE).numel()


@linux
def test_a_large_batch_is_mixed_into_such_memory(blocks):
    images, labels = torch.rand(64, 3, 224, 224), torch.arange(64)
    mixed = tokenmix(images, labels, num_classes=64, mode="elem", seed=1)
    expected = tokenmix(images, labels, num_classes=64, mode="elem", seed=1, out=torch.empty_like(images))
    assert len(blocks) == 1
    assert torch.equal(mixed.images, expected.images)
