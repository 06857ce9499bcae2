"""The map bank: what was written comes back, at the promised size, or the file is refused with the reason."""

import errno
import hashlib
import json
import os
import pickle
import re
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
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
        ({"inputs": {"weights": "2", "mean": "0.5"}}, "weights was 1, is 2. Delete it"),
        ({"inputs": {"weights": "1", "mean": "0.5", "std": "3"}}, "std was None, is 3"),
        ({"inputs": None}, "weights was 1, is None; mean was 0.5, is None"),
    ],
)
def test_an_unfinished_bank_of_something_else_is_not_continued(tmp_path, changes, says):
    changes = {"inputs": {"weights": "1", "mean": "0.5"}} | changes
    same = {"inputs": {"weights": "1", "mean": "0.5"}}
    create(tmp_path / "e.bank", **same).close()
    with pytest.raises(ValueError, match=f"beginning of .*{says}"):
        create(tmp_path / "e.bank", **changes)
    create(tmp_path / "e.bank", **same).close()  # and it is left as it was


def test_a_second_process_with_another_teacher_cannot_join(tmp_path):
    with create(tmp_path / "e.bank", inputs={"weights": "1", "mean": "0.5"}) as writer:
        MapBankWriter.open_partial(tmp_path / "e.bank", inputs={"weights": "1"}).close()
        with pytest.raises(ValueError, match="beginning of another bank: weights was 1, is 2"):
            MapBankWriter.open_partial(tmp_path / "e.bank", inputs={"weights": "2"})
        writer.write(torch.arange(COUNT), random_maps())
        assert writer.finish().metadata["inputs"] == {"weights": "1", "mean": "0.5"}


def test_changed_images_are_told_from_repaired_ones(tmp_path):
    prints = np.arange(COUNT, dtype=np.uint32) + 1
    with create(tmp_path / "e.bank") as writer:
        assert not len(writer.compare_images(prints))
        writer.write(torch.arange(10), random_maps()[:10])
    changed = prints.copy()
    changed[[12, 20]] += 100  # no maps yet: a broken image that was repaired
    with create(tmp_path / "e.bank") as writer:
        assert not len(writer.compare_images(changed))
        writer.write(torch.arange(10, 15), random_maps()[10:15])
    with create(tmp_path / "e.bank") as writer:
        assert not len(writer.compare_images(changed))
        assert writer.compare_images(prints).tolist() == [12]
        with pytest.raises(ValueError, match="prints must be uint32"):
            writer.compare_images(prints[1:])
        writer.write(torch.arange(15, COUNT), random_maps()[15:])
        bank = writer.finish()
    bank.verify()
    assert bank.path.stat().st_size == bank_size(COUNT, GRID)


def test_a_writer_killed_while_it_finishes_can_finish_again(tmp_path, monkeypatch):
    """Every map is written and the fingerprints are cut off, but the header does not say so yet."""
    with create(tmp_path / "e.bank") as writer:
        writer.compare_images(np.ones(COUNT, np.uint32))
        writer.write(torch.arange(COUNT), random_maps())
        writer.save()
        monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
        monkeypatch.undo()
    with create(tmp_path / "e.bank") as writer:
        assert not len(writer.compare_images(np.full(COUNT, 2, np.uint32))) and not len(writer.pending())
        writer.finish().verify()


def test_the_second_writer_is_told_who_holds_the_lock(tmp_path):
    path = tmp_path / "f.bank"
    holder = rf"f\.bank is being written by process {os.getpid()} on {socket.gethostname()}"
    with create(path):
        with pytest.raises(BlockingIOError, match=holder):
            create(path)
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            assert re.search(rf"{holder} since \d", pool.submit(try_to_create, path).result())
    create(path).close()
    assert [p.name for p in tmp_path.iterdir()] == ["f.bank.partial"]


def try_to_create(path):
    try:
        create(path).close()
        return "created"
    except BlockingIOError as error:
        return str(error)


def race(path, start, results):
    start.wait()
    try:
        writer = create(path)
        results.put(os.getpid())
        start.wait()  # both have tried
        writer.close()
    except BlockingIOError:
        results.put(None)
        start.wait()


def test_of_two_writers_that_begin_at_once_one_wins(tmp_path):
    context = get_context("fork")
    for attempt in range(10):
        start, results = context.Barrier(2), context.Queue()
        pair = [context.Process(target=race, args=(tmp_path / f"{attempt}.bank", start, results)) for _ in range(2)]
        for process in pair:
            process.start()
        found = [results.get(timeout=60) for _ in pair]
        for process in pair:
            process.join()
        assert found.count(None) == 1, found
    assert {p.suffix for p in tmp_path.iterdir()} == {".partial"}


def test_the_lock_of_a_killed_writer_is_free_though_its_workers_live(tmp_path):
    script = (
        "import os, sys, time\n"
        "from tokenmix_kernels.maps.bank import MapBankWriter\n"
        "writer = MapBankWriter.create(sys.argv[1], 3, (2, 2), [0, 1, 2], None, 't', 'd')\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "time.sleep(100)\n"
    )
    path = tmp_path / "k.bank"
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    try:
        with pytest.raises(BlockingIOError, match=f"written by process {process.pid} on "):
            MapBankWriter.create(path, 3, (2, 2), [0, 1, 2], None, "t", "d")
        process.kill()
        process.wait()
        MapBankWriter.create(path, 3, (2, 2), [0, 1, 2], None, "t", "d").close()
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


@pytest.mark.parametrize(
    ("ids", "change", "says"),
    [
        ([0, 1], lambda maps: maps[1].fill_(float("nan")), "map of image 1 has NaN"),
        ([0, 1], lambda maps: maps[0, 0, 0].fill_(float("inf")), "map of image 0 has NaN or infinite"),
        ([4, 9], lambda maps: maps[1, 2, 2].fill_(-1e-3), "map of image 9 has negative"),
        ([0, COUNT], None, "ids must be in"),
        ([-1, 0], None, "ids must be in"),
        ([5, 5], None, "ids must be different, got 5 2 times"),
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


def test_a_map_is_written_once(tmp_path):
    """Else a kill between new values and their scale would leave a map that is neither of the two."""
    with create(tmp_path / "g.bank") as writer:
        writer.write(torch.tensor([7, 3]), torch.ones(2, *GRID))
        for _ in range(2):
            with pytest.raises(ValueError, match="ids must be of images without a map: that of 3 is written"):
                writer.write(torch.tensor([2, 3]), torch.ones(2, *GRID))
            writer.save()
    with create(tmp_path / "g.bank") as writer, pytest.raises(ValueError, match="that of 7 is written"):
        writer.skip(torch.tensor([7]))


def test_skipped_images_have_no_map_and_are_listed(tmp_path):
    with create(tmp_path / "g.bank", sizes=None) as writer:
        writer.skip(torch.tensor([30, 4]))
        rest = writer.pending()
        assert len(rest) == COUNT - 2
        writer.write(rest, random_maps()[rest] + 1, torch.ones(len(rest), 2))
        bank = writer.finish()
    assert bank.skipped.tolist() == [4, 30] and bank.sizes[4].tolist() == [-1, -1]
    assert bank.maps(torch.tensor([4, 30])).eq(0).all() and bank.maps(torch.tensor([5])).gt(0).all()


def test_a_bank_replaced_while_it_is_opened_is_the_old_or_the_new_one(tmp_path):
    """Banks whose labels and digest agree, swapped by rename as fast as it goes."""
    for number in (1, 2):
        with create(tmp_path / f"{number}.bank", labels=[number] * COUNT, digest=str(number)) as writer:
            writer.write(torch.arange(COUNT), torch.full((COUNT, *GRID), float(number)))
            writer.finish()
    path, stop = tmp_path / "now.bank", threading.Event()
    os.link(tmp_path / "1.bank", path)

    def swap():
        while not stop.is_set():
            for number in (2, 1):
                os.link(tmp_path / f"{number}.bank", tmp_path / "next.bank")
                os.replace(tmp_path / "next.bank", path)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(1500):
            bank = MapBank.open(path)
            assert {str(int(bank.labels[0])), str(round(float(bank.maps(torch.tensor([0])).max())))} == {bank.digest}
    finally:
        stop.set()
        thread.join()


def test_a_worker_does_not_take_another_bank_for_the_pickled_one(bank, tmp_path):
    pickled = pickle.dumps(bank)
    assert torch.equal(pickle.loads(pickled).values, bank.values)
    with create(tmp_path / "new.bank", teacher="another") as writer:
        writer.write(torch.arange(COUNT), random_maps(seed=1))
        writer.finish()
    before = bank.values.clone()
    os.replace(tmp_path / "new.bank", bank.path)
    assert torch.equal(bank.values, before)  # who has it open keeps the old one
    bank.verify()
    with pytest.raises(ValueError, match="holds another bank than the one that was pickled"):
        pickle.loads(pickled)


def test_a_bank_truncated_while_open_is_an_error_and_no_signal(bank):
    resident = MapBank.open(bank.path, device="cpu")
    os.truncate(bank.path, 5000)
    for look in (lambda: bank.maps(torch.tensor([0])), bank.check, bank.verify):
        with pytest.raises(ValueError, match=r"a\.bank was truncated while it was open: 5000 of .* renaming another"):
            look()
    assert resident.maps(torch.tensor([0])).shape == (1, *GRID)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[1, 2]", "TypeError"),
        (b"{}", "KeyError 'grid'"),
        (b"null", "TypeError"),
        (b"\xff", "UnicodeDecodeError"),
        (b"[" * 3000, "foreign header"),
        ({"count": -5}, "count is '-5'"),
        ({"count": 1.5}, "count is '1.5'"),
        ({"count": True}, "count is 'True'"),
        ({"grid": [5]}, "grid is"),
        ({"grid": "57"}, "grid is"),
        ({"grid": [5, 0]}, "grid is"),
        ({"teacher": None}, "teacher is 'None'"),
        ({"complete": 1}, "complete is '1'"),
        ({"checksum": "x"}, "checksum is 'x'"),
        ({"checksum": None}, "checksum is 'None'"),
        ({"count": 10**15}, "count is"),
    ],
)
def test_foreign_headers_with_a_right_checksum_are_refused(bank, text, says):
    if isinstance(text, dict):
        text = json.dumps(bank.metadata | text).encode()
    content = bytearray(bank.path.read_bytes())
    head = struct.pack("<8sIII", content[:8], 1, len(text), zlib.crc32(text)) + text
    content[: len(head)] = head
    bank.path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.bank has a foreign header: .*{says}" if says[0] != "f" else says):
        MapBank.open(bank.path)


def test_places_that_are_no_files_are_refused(tmp_path):
    (tmp_path / "folder.bank").mkdir()
    os.mkfifo(tmp_path / "pipe.bank")
    for name, what in (("folder.bank", "folder"), ("pipe.bank", "device")):
        with pytest.raises(ValueError, match=f"{name} is not a map bank but a {what}"):
            MapBank.open(tmp_path / name)
        with pytest.raises(FileExistsError, match=f"{name} exists already"):
            create(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*absent for a\.bank"):
        create(tmp_path / "absent" / "a.bank")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "rubbish", "empty"])
def test_what_is_planted_as_the_unfinished_bank_is_refused_and_left_alone(tmp_path, kind):
    partial, victim = tmp_path / "p.bank.partial", tmp_path / "victim"
    victim.write_bytes(b"precious" * 10000)
    if kind == "link":
        partial.symlink_to(victim)
    elif kind == "folder":
        partial.mkdir()
    elif kind == "pipe":
        os.mkfifo(partial)
    else:
        partial.write_bytes(b"x" * 9000 if kind == "rubbish" else b"")
    with pytest.raises((ValueError, OSError), match=r"p\.bank\.partial.*delete it, or choose another name"):
        create(tmp_path / "p.bank")
    assert victim.read_bytes() == b"precious" * 10000 and os.path.lexists(partial)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.bank.partial", "victim"]


def test_a_planted_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".p.bank.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.p\.bank\.lock cannot be locked"):
        create(tmp_path / "p.bank")
    assert (tmp_path / "victim").read_text() == "precious"


def test_leftovers_of_killed_writers_are_removed(tmp_path):
    names = [".q[1].bank.0123456789abcdef.tmp", ".other.bank.0123456789abcdef.tmp", ".q1.bank.0123456789abcdef.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    create(tmp_path / "q[1].bank").close()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names[1:], "q[1].bank.partial"])


def create_in_little_space(path):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
    try:
        create(path)
    except OSError as error:
        return str(error)


def test_no_space_is_found_before_the_work(tmp_path):
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        says = pool.submit(create_in_little_space, tmp_path / "r.bank").result()
    assert re.search(r"r\.bank\.partial \(0\.0 MB\) cannot be written: File too large", says)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_gets_full_keeps_what_was_recorded(tmp_path, monkeypatch):
    maps = random_maps()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        pytest.raises(OSError, match=r"r\.bank\.partial cannot be written: No space left"),
        create(tmp_path / "r.bank") as writer,
    ):
        writer.write(torch.arange(10), maps[:10])
        writer.save()
        writer.write(torch.arange(10, 12), maps[10:12])
        monkeypatch.setattr(os, "pwrite", full)
        writer.write(torch.arange(12, 20), maps[12:20])
    monkeypatch.undo()
    with create(tmp_path / "r.bank") as writer:
        assert writer.pending().tolist() == list(range(10, COUNT))


def test_numbers_may_come_from_numpy(tmp_path):
    grid = (np.int64(GRID[0]), np.int32(GRID[1]))
    labels = [np.int64(label) for label in LABELS]
    with create(tmp_path / "n.bank", count=np.int64(COUNT), grid=grid, labels=labels) as writer:
        writer.write(torch.arange(COUNT), random_maps())
        bank = writer.finish()
    bank.check(count=np.int64(COUNT), labels=np.array(LABELS), digest=DIGEST)


def test_state_of_the_process_has_no_influence(tmp_path):
    def content(name):
        with create(tmp_path / name, sizes=None) as writer:
            ids = writer.pending()
            writer.write(ids, maps, sizes)
            bank = writer.finish()
        found = bank.maps(ids)
        assert found.dtype == torch.float32 and found.device.type == "cpu"
        return bank.path.read_bytes()[4096:], found.tolist()

    maps, sizes = random_maps(), torch.ones(COUNT, 2)
    expected = content("a")
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert content("b") == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_resident_on_a_gpu(bank):
    resident = MapBank.open(bank.path, device="cuda")
    ids = torch.tensor([0, 36, COUNT, -1])
    found = resident.maps(ids.cuda())
    assert found.is_cuda and torch.equal(found[:2].cpu(), bank.maps(ids[:2]))
    assert found[2:].eq(0).all()  # out of range, without a look at the ids
