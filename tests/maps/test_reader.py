"""Reading map banks: what was written comes back, or the file is refused with the reason."""

import hashlib
import json
import os
import pickle
import struct
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from bank_helpers import COUNT, DIGEST, GRID, LABELS, NAMES, create, random_maps

from tokenmix_kernels.maps.bank import MapBank, MapBankWriter, bank_size, dataset_digest


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_resident_on_a_gpu(bank):
    resident = MapBank.open(bank.path, device="cuda")
    ids = torch.tensor([0, 36, COUNT, -1])
    found = resident.maps(ids.cuda())
    assert found.is_cuda and torch.equal(found[:2].cpu(), bank.maps(ids[:2]))
    assert found[2:].eq(0).all()  # out of range, without a look at the ids
