"""Large results on the CPU lie in memory of results that died: never in that of a living one."""

import gc
import io
import mmap
import os
import threading

import pytest
import torch

from tokenmix_kernels import memory, tokenmix
from tokenmix_kernels.memory import Pool, empty_images

SHAPE = (2, 3, 256, 256)  # 1.5 MB of float32
SIZE = 4 * 2 * 3 * 256 * 256
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@pytest.fixture
def pool(monkeypatch):
    """A pool of the test's own in place of the process's."""
    own = Pool()
    monkeypatch.setattr(memory, "POOL", own)
    return own


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8], ids=str)
def test_large_results_are_like_any_others(dtype, layout, pool):
    images = torch.empty(4, *SHAPE[1:], 2)[..., 0].contiguous(memory_format=layout)
    images = images if dtype != torch.uint8 else torch.empty(8, *SHAPE[1:]).contiguous(memory_format=layout)
    for _ in range(2):  # in new memory, and in what died
        out, plain = empty_images(images, dtype), torch.empty_like(images, dtype=dtype)
        assert (out.shape, out.stride(), out.dtype) == (plain.shape, plain.stride(), dtype)
        assert out.untyped_storage().nbytes() == plain.untyped_storage().nbytes() and not out._is_view()
        assert out.storage_offset() == 0 and out.data_ptr() % 64 == 0 and out.is_contiguous(memory_format=layout)
        values = (torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 255).to(dtype)
        out.copy_(values)
        file = io.BytesIO()
        torch.save(out[-1], file)
        file.seek(0)
        assert torch.equal(torch.load(file), values[-1])
        assert torch.equal(out.share_memory_(), values)  # moves it: the block comes back
        assert len(pool.kept) == 1
        assert torch.equal(out, values)


def test_memory_of_a_dead_result_is_used_again(pool):
    images = torch.empty(SHAPE)
    out = empty_images(images, torch.float32)
    place = out.data_ptr()
    del out
    assert len(pool.kept) == 1
    assert empty_images(images, torch.float64).data_ptr() != place  # of another size
    assert empty_images(images.view(4, 3, 128, 256), torch.float32).data_ptr() == place


@pytest.mark.parametrize(
    "hold",
    [
        lambda out: out[1, :, 7:9],
        lambda out: out.detach().view(torch.int32),
        lambda out: out.untyped_storage(),
        lambda out: out.numpy(),
        lambda out: out.numpy()[0, 0],
        lambda out: memoryview(out.numpy()),
        lambda out: (out * torch.ones((), requires_grad=True)).grad_fn,
        lambda out: torch.utils.dlpack.to_dlpack(out),
    ],
    ids=["view", "other dtype", "storage", "array", "part of an array", "buffer", "graph", "dlpack"],
)
def test_whatever_shows_a_result_keeps_its_memory(hold, pool):
    images = torch.empty(SHAPE)
    out = empty_images(images, torch.float32).fill_(1.0)
    place, held = out.data_ptr(), hold(out)
    del out
    gc.collect()
    assert not pool.kept
    assert empty_images(images, torch.float32).data_ptr() != place
    del held
    gc.collect()
    assert empty_images(images, torch.float32).data_ptr() in {block_place(block) for block in pool.kept} | {place}
    pool.release()


def block_place(block: mmap.mmap) -> int:
    return torch.frombuffer(block, dtype=torch.uint8).data_ptr()


def test_no_two_threads_get_one_block(pool):
    images = torch.empty(SHAPE)
    wrong, start = [], threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        held = []
        for step in range(60):
            out = empty_images(images, torch.float32)
            out.fill_(100 * number + step)
            held.append((100 * number + step, out))
            if len(held) > 2:
                value, old = held.pop(0)
                if not bool((old == value).all()):
                    wrong.append((number, step))
                del old

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(pool.kept) == memory.EACH and not pool.returned


def test_a_block_that_comes_back_inside_a_call_waits_its_turn(pool):
    out = empty_images(torch.empty(SHAPE), torch.float32)
    with pool.lock:  # as a garbage collection in `take` would find it
        del out
        assert len(pool.returned) == 1 and not pool.kept
    pool.settle()
    assert len(pool.kept) == 1 and not pool.returned


def test_what_is_kept_is_bounded(pool, monkeypatch):
    images = torch.empty(SHAPE)
    held = [empty_images(images, torch.float32) for _ in range(7)]
    held.clear()
    assert len(pool.kept) == memory.EACH
    monkeypatch.setattr(memory, "MOST", 5 * SIZE)
    held = [empty_images(torch.empty(number, *SHAPE[1:]), torch.float32) for number in (4, 3)]  # dies from its end
    held.clear()
    assert [len(block) for block in pool.kept] == [SIZE, SIZE * 3 // 2, SIZE * 2]  # the oldest went
    assert empty_images(torch.empty(11, *SHAPE[1:]), torch.float32).shape[0] == 11
    assert len(pool.kept) == 3  # what is larger than the bound is not kept
    pool.release()
    assert not pool.kept


@pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="lazy release is Linux's")
def test_all_but_the_newest_may_be_taken_by_the_system(pool, monkeypatch):
    freed = []

    class Block(mmap.mmap):
        def madvise(self, advice):
            freed.append((self, advice))

    monkeypatch.setattr(memory.mmap, "mmap", Block)
    held = [empty_images(torch.empty(SHAPE), torch.float32) for _ in range(3)]
    held.clear()
    assert [block for block, _ in freed] == pool.kept[:2]
    assert {advice for _, advice in freed} == {mmap.MADV_FREE}


@pytest.mark.parametrize("times", [1, 2], ids=["once", "for good"])
def test_when_the_system_has_no_memory_what_is_kept_is_released(times, pool, monkeypatch):
    empty_images(torch.empty(SHAPE), torch.float32)
    assert len(pool.kept) == 1
    real, refused = mmap.mmap, []

    def refuse(*arguments, **options):
        refused.append(len(pool.kept))
        if len(refused) <= times:
            raise OSError("no memory")
        return real(*arguments, **options)

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    out = empty_images(torch.empty(3, *SHAPE[1:]), torch.float32)
    assert out.fill_(1.0).sum() == out.numel()
    assert refused == [1, 0] and not pool.kept


@forks
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_starts_anew_and_shares_nothing():
    images = torch.empty(SHAPE)
    memory.release()
    alive = empty_images(images, torch.float32)
    alive.numpy()[:] = 1.0  # NumPy has no threads that a fork would miss
    empty_images(images, torch.float32)
    with memory.POOL.lock:  # as another thread would hold it
        child = os.fork()
        if not child:
            good = False
            try:
                kept = len(memory.POOL.kept)
                new = empty_images(images, torch.float32)
                new.numpy()[:] = 2.0
                good = kept == 0 and new.data_ptr() != alive.data_ptr() and bool((alive.numpy() == 1).all())
                alive.numpy()[:] = 3.0
            finally:
                os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert len(memory.POOL.kept) == 1 and bool((alive == 1).all())


def test_small_results_are_ordinary(pool):
    empty_images(torch.empty(2, 3, 32, 32), torch.float16)
    assert empty_images(torch.empty(SHAPE, device="meta"), torch.float32).device.type == "meta"
    assert not pool.kept


def test_a_large_batch_is_mixed_into_such_memory(pool):
    images, labels = torch.rand(8, 3, 224, 224), torch.arange(8)
    expected = tokenmix(images, labels, num_classes=8, mode="elem", seed=1, out=torch.empty_like(images))
    for _ in range(3):
        mixed = tokenmix(images, labels, num_classes=8, mode="elem", seed=1)
        assert torch.equal(mixed.images, expected.images)
    del mixed
    assert len(pool.kept) == 2
    memory.release()
    assert not pool.kept


@pytest.mark.skipif(not hasattr(mmap, "MAP_POPULATE"), reason="pages come one by one here")
def test_one_thread_gets_the_pages_of_a_new_block_together(pool, monkeypatch):
    import resource

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    images = torch.zeros(8, *SHAPE[1:])
    out = empty_images(images, images.dtype)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    out.numpy().fill(1)
    faults, pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, 4 * SIZE // mmap.PAGESIZE
    assert faults < pages / 4
