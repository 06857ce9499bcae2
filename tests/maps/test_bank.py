"""The map bank: what was written comes back, at the promised size, or the file is refused with the reason."""

import hashlib
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch

from tokenmix_kernels.maps.bank import MapBank, MapBankWriter, bank_size, dataset_digest

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


@pytest.fixture
def bank(tmp_path):
    with create(tmp_path / "a.bank") as writer:
        writer.write(torch.arange(COUNT), random_maps())
        writer.finish()
    return MapBank.open(tmp_path / "a.bank")


def test_imagenet_fits_into_045_gigabytes():
    assert bank_size(1_281_167, (18, 18)) <= 0.45e9
    assert bank_size(1_281_167, (7, 7)) <= 0.09e9


def test_a_bank_of_thousands_has_the_size_of_the_arithmetic(tmp_path):
    count, grid = 4001, (18, 18)
    maps = torch.rand(count, *grid, generator=torch.Generator().manual_seed(1))
    path = tmp_path / "many.bank"
    with MapBankWriter.create(path, count, grid, [0] * count, None, "t", "d") as writer:
        for ids in torch.randperm(count, generator=torch.Generator().manual_seed(2)).split(500):
            writer.write(ids, maps[ids])
        writer.finish()
    assert path.stat().st_size == bank_size(count, grid) <= count * 0.45e9 / 1_281_167 + 5 * 4096
    ids = torch.tensor([4000, 0, 77, 77])
    torch.testing.assert_close(MapBank.open(path).maps(ids), maps[ids], rtol=0, atol=0.5 / 255 + 1e-6)


def test_what_was_written_comes_back(bank):
    maps = random_maps()
    assert len(bank) == COUNT and bank.grid == GRID and bank.teacher == "t" and bank.digest == DIGEST
    assert bank.labels.dtype == torch.int64 and bank.labels.tolist() == LABELS
    assert bank.sizes[5].tolist() == [105, 305]
    assert bank.values.dtype == torch.uint8 and bank.scales.dtype == torch.float32
    ids = torch.tensor([36, 0, 3, 3, 17])
    found = bank.maps(ids)
    assert found.dtype == torch.float32 and found.shape == (5, *GRID)
    peaks = maps[ids].amax((1, 2))
    errors = (found - maps[ids]).abs().amax((1, 2))
    assert (errors <= peaks * (0.5 / 255 + 1e-6)).all()
    torch.testing.assert_close(found.amax((1, 2)), peaks, rtol=1e-6, atol=0)
    assert found[2].eq(0).all()
    assert bank.maps(torch.empty(0, dtype=torch.int64)).shape == (0, *GRID)
    bank.verify()


def test_values_are_a_private_view_of_the_file(bank):
    before = bank.path.read_bytes()
    again = MapBank.open(bank.path)
    again.values[:] = 7
    again.scales[:] = 1.0
    assert bank.path.read_bytes() == before
    assert not torch.equal(bank.values, again.values)


def test_resident_on_a_device(bank):
    resident = MapBank.open(bank.path, device="cpu")
    ids = torch.arange(COUNT)
    assert torch.equal(resident.maps(ids), bank.maps(ids))
    placed = MapBank.open(bank.path, device="meta")
    assert placed.values.is_meta and placed.scales.is_meta and not placed.labels.is_meta
    with pytest.raises(ValueError, match="on meta but the bank is on cpu: open it with device='meta'"):
        bank.maps(ids.to("meta"))


def read_in_process(arguments):
    bank, ids = arguments
    return hashlib.sha256(bank.maps(ids).numpy().tobytes()).hexdigest()


def test_many_processes_read_one_file(bank):
    assert len(pickle.dumps(bank)) < 1000  # the path, not the maps
    jobs = [(bank, torch.arange(i, COUNT)) for i in range(6)]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        assert list(pool.map(read_in_process, jobs)) == [read_in_process(job) for job in jobs]


@pytest.mark.parametrize("ids", [[COUNT], [-1], [0, 2**40]])
def test_ids_out_of_range(bank, ids):
    with pytest.raises(ValueError, match=rf"ids must be in \[0, {COUNT}\)"):
        bank.maps(torch.tensor(ids))


@pytest.mark.parametrize("ids", [torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.tensor(3)])
def test_ids_of_the_wrong_kind(bank, ids):
    with pytest.raises(ValueError, match="ids must be an int64 tensor of shape"):
        bank.maps(ids)


def test_check_says_what_differs(bank):
    bank.check()
    bank.check(count=COUNT, labels=torch.tensor(LABELS), digest=DIGEST)
    with pytest.raises(ValueError, match=f"holds {COUNT} maps, the data set has 36 images"):
        bank.check(count=36)
    other = list(LABELS)
    other[20] += 1
    with pytest.raises(ValueError, match="1 of 37 labels differ, first that of image 20: 4 in the bank, 5 "):
        bank.check(labels=other)
    with pytest.raises(ValueError, match=f"holds {COUNT} labels"):
        bank.check(labels=LABELS[:-1])
    with pytest.raises(ValueError, match="another data set: digest"):
        bank.check(digest=dataset_digest(NAMES[::-1], LABELS))


def test_digest_sees_names_labels_and_order():
    # The published definition, so that other programs can compute it.
    expected = hashlib.sha256(b"a/1.png\x000\nb/2.png\x001\n").hexdigest()
    assert dataset_digest(["a/1.png", "b/2.png"], [0, 1]) == expected
    others = [(["b/2.png", "a/1.png"], [0, 1]), (["a/1.png", "b/2.png"], [1, 0]), (["a/1.png"], [0])]
    assert len({dataset_digest(*other) for other in others} | {expected}) == 4
    with pytest.raises(ValueError, match="one length"):
        dataset_digest(["a"], [])


@pytest.mark.parametrize("length", [0, 5, 19, 4095, 4096, 5000, -1])
def test_truncated_files_are_refused(bank, length):
    content = bank.path.read_bytes()
    bank.path.write_bytes(content[:length])
    reason = "empty" if length == 0 else "not a map bank" if length == 5 else "truncated"
    with pytest.raises(ValueError, match=f"a.bank is .*{reason}"):
        MapBank.open(bank.path)


def test_a_file_that_is_too_long_is_refused(bank):
    with open(bank.path, "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="too long"):
        MapBank.open(bank.path)


def test_foreign_and_damaged_files_are_refused(bank):
    content = bytearray(bank.path.read_bytes())
    foreign = bank.path.with_name("foreign.bank")
    torch.save({"maps": torch.zeros(2000)}, foreign)
    with pytest.raises(ValueError, match="not a map bank"):
        MapBank.open(foreign)
    with pytest.raises(FileNotFoundError):
        MapBank.open(bank.path.with_name("absent.bank"))

    damaged = bytearray(content)
    damaged[30] ^= 1
    bank.path.write_bytes(damaged)
    with pytest.raises(ValueError, match="damaged header"):
        MapBank.open(bank.path)

    later = bytearray(content)
    later[8:12] = struct.pack("<I", 2)
    bank.path.write_bytes(later)
    with pytest.raises(ValueError, match="version 2"):
        MapBank.open(bank.path)


@pytest.mark.parametrize("position", [4096, 4096 + COUNT * 35 - 1, -1])
def test_verify_finds_a_changed_byte(bank, position):
    content = bytearray(bank.path.read_bytes())
    content[position] ^= 1
    bank.path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: checksum"):
        MapBank.open(bank.path).verify()


def test_header_is_as_documented(bank):
    content = bank.path.read_bytes()
    magic, version, length, checksum = struct.unpack_from("<8sIII", content)
    assert magic == b"\x89TMXB\r\n\x1a" and version == 1
    assert zlib.crc32(content[20 : 20 + length]) == checksum
    values = np.frombuffer(content, np.uint8, COUNT * 35, 4096).reshape(COUNT, *GRID)
    assert np.array_equal(values, bank.values.numpy())


def test_unfinished_banks_are_refused_and_resumed(tmp_path):
    path, maps = tmp_path / "b.bank", random_maps()
    with create(path) as writer:
        writer.write(torch.arange(10, 20), maps[10:20])
        with pytest.raises(ValueError, match=r"27 of 37 maps are not written yet.* image 0$"):
            writer.finish()
    with pytest.raises(FileNotFoundError, match=r"not finished: 10 of 37 maps are in .*b\.bank\.partial"):
        MapBank.open(path)
    with pytest.raises(ValueError, match="not finished: 10 of 37"):
        MapBank.open(tmp_path / "b.bank.partial")

    with create(path) as writer:
        pending = writer.pending()
        assert pending.tolist() == [*range(10), *range(20, COUNT)]
        writer.write(pending.flip(0), maps[pending.flip(0)])
        bank = writer.finish()
    # The same bytes as from a run that was never interrupted (but for the time in the header).
    with create(tmp_path / "c.bank") as writer:
        writer.write(torch.arange(COUNT), maps)
        writer.finish()
    assert path.read_bytes()[4096:] == (tmp_path / "c.bank").read_bytes()[4096:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.bank", "c.bank"]
    bank.verify()
    with pytest.raises(FileExistsError, match="exists already"):
        create(path)


def test_sizes_may_come_with_the_maps(tmp_path):
    ids = torch.arange(COUNT)
    with create(tmp_path / "s.bank", sizes=None) as writer:
        writer.write(ids, random_maps(), torch.stack([ids + 1, ids + 2], 1))
        bank = writer.finish()
    assert bank.sizes.tolist() == [[i + 1, i + 2] for i in range(COUNT)]


def test_several_writers_share_a_file(tmp_path):
    maps = random_maps()
    with create(tmp_path / "d.bank") as first, MapBankWriter.open_partial(tmp_path / "d.bank") as second:
        second.write(torch.arange(1, COUNT, 2), maps[1::2])
        first.write(torch.arange(0, COUNT, 2), maps[::2])
        second.save()
        bank = first.finish()
    peaks = maps.amax((1, 2), keepdim=True)
    assert ((bank.maps(torch.arange(COUNT)) - maps).abs() <= peaks * (0.5 / 255 + 1e-6)).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"grid": (7, 5)}, "grid"),
        ({"teacher": "another"}, "teacher"),
        ({"digest": "another"}, "digest"),
        ({"labels": [0] * COUNT}, "other labels"),
    ],
)
def test_an_unfinished_bank_of_something_else_is_not_continued(tmp_path, changes, says):
    create(tmp_path / "e.bank").close()
    with pytest.raises(ValueError, match=f"beginning of .*{says}"):
        create(tmp_path / "e.bank", **changes)
    create(tmp_path / "e.bank").close()  # and it is left as it was


def test_two_jobs_cannot_write_one_bank(tmp_path):
    with create(tmp_path / "f.bank"), pytest.raises(BlockingIOError, match="another process is writing"):
        create(tmp_path / "f.bank")
    create(tmp_path / "f.bank").close()


@pytest.mark.parametrize(
    ("ids", "change", "says"),
    [
        ([0, 1], lambda maps: maps[1].fill_(float("nan")), "map of image 1 has NaN"),
        ([0, 1], lambda maps: maps[0, 0, 0].fill_(float("inf")), "map of image 0 has NaN or infinite"),
        ([4, 9], lambda maps: maps[1, 2, 2].fill_(-1e-3), "map of image 9 has negative"),
        ([0, COUNT], None, "ids must be in"),
        ([-1, 0], None, "ids must be in"),
        ([0, 1, 2], None, r"maps must be \[3, 5, 7\], got \[2, 5, 7\]"),
    ],
)
def test_bad_maps_are_not_written(tmp_path, ids, change, says):
    maps = torch.ones(2, *GRID)
    if change:
        change(maps)
    with create(tmp_path / "g.bank") as writer:
        with pytest.raises(ValueError, match=says):
            writer.write(torch.tensor(ids), maps)
        assert len(writer.pending()) == COUNT


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"count": 0, "labels": []}, "count must be a whole number of at least 1"),
        ({"grid": (0, 3)}, "grid must be"),
        ({"labels": LABELS[1:]}, "labels must be 37 integers"),
        ({"labels": [0.5] * COUNT}, "labels must be 37 integers"),
        ({"sizes": torch.zeros(COUNT, 3)}, "sizes must be"),
        ({"teacher": "x" * 5000}, "teacher has 5000 characters"),
    ],
)
def test_bad_arguments_leave_no_file(tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        create(tmp_path / "h.bank", **changes)
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_has_recorded_nothing_that_is_not_there(tmp_path):
    """kill -9 in full flight; what counts as written is what was meant, and the rest can be added."""
    script = textwrap.dedent(
        """
        import sys, torch
        from tokenmix_kernels.maps.bank import MapBankWriter
        count, grid = 3000, (4, 4)
        labels = list(range(count))
        writer = MapBankWriter.create(sys.argv[1], count, grid, labels, None, "t", "d", save_every=0.0)
        for ids in writer.pending().split(3):
            writer.write(ids, (ids[:, None, None] + 1.0).expand(-1, *grid))
            print(int(ids[-1]), flush=True)
        """
    )
    path = tmp_path / "k.bank"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) > 300:
            break
    time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.stdout.read()
    assert process.wait() == -signal.SIGKILL

    with MapBankWriter.create(path, 3000, (4, 4), list(range(3000)), None, "t", "d") as writer:
        pending = writer.pending()
        done = 3000 - len(pending)
        assert 300 < done < 3000 and pending.tolist() == list(range(done, 3000))
        # Only the missing ones are added, with another content: the old ones must be right already.
        writer.write(pending, torch.zeros(len(pending), 4, 4))
        bank = writer.finish()
    ids = torch.arange(3000)
    expected = torch.where(ids < done, ids + 1.0, 0.0)[:, None, None].expand(-1, 4, 4)
    torch.testing.assert_close(bank.maps(ids), expected, rtol=1e-6, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_resident_on_a_gpu(bank):
    resident = MapBank.open(bank.path, device="cuda")
    ids = torch.tensor([0, 36, COUNT, -1])
    found = resident.maps(ids.cuda())
    assert found.is_cuda and torch.equal(found[:2].cpu(), bank.maps(ids[:2]))
    assert found[2:].eq(0).all()  # out of range, without a look at the ids
