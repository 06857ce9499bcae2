"""Writing map banks: resumed after kills, never mixed, and nothing written that is wrong."""

import os
import time
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from bank_helpers import COUNT, DIGEST, GRID, LABELS, create, random_maps

from tokenmix_kernels.maps.bank import MapBank, MapBankWriter, bank_size


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
        with pytest.raises(ValueError, match="prints must be an array uint32"):
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


@pytest.mark.parametrize(
    ("ids", "change", "says"),
    [
        ([0, 1], lambda maps: maps[1].fill_(float("nan")), "map of image 1 has NaN"),
        ([0, 1], lambda maps: maps[0, 0, 0].fill_(float("inf")), "map of image 0 has NaN or infinite"),
        ([4, 9], lambda maps: maps[1, 2, 2].fill_(-1e-3), "map of image 9 has negative"),
        ([0, COUNT], None, "ids must be in"),
        ([-1, 0], None, "ids must be in"),
        ([5, 5], None, "ids must be different, got 5 2 times"),
        ([0, 1, 2], None, r"maps must be a tensor \[3, 5, 7\], got torch.float32 \[2, 5, 7\]"),
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


def write_forever(path, pipe):
    """Writes the maps of 3000 images, three at a time, and reports each."""
    with MapBankWriter.create(path, 3000, (4, 4), list(range(3000)), None, "t", "d", save_every=0.0) as writer:
        for ids in writer.pending().split(3):
            writer.write(ids, (ids[:, None, None] + 1.0).expand(-1, 4, 4))
            pipe.send(int(ids[-1]))


def test_a_killed_writer_has_recorded_nothing_that_is_not_there(tmp_path):
    """kill -9 in full flight; what counts as written is what was meant, and the rest can be added."""
    path = tmp_path / "k.bank"
    receive, send = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=write_forever, args=(path, send))
    process.start()
    while receive.recv() < 300:
        pass
    time.sleep(0.01)
    process.kill()
    process.join()

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


FIVE, HALF, TEXT, PAIR, NOTHING = 5, 2.5, "x", [1, 2], {}
FOREIGN = [
    None,
    FIVE,
    -1,
    HALF,
    TEXT,
    b"x",
    (),
    (1,),
    PAIR,
    NOTHING,
    np.zeros(3),
    torch.zeros(3),
    float("nan"),
    object(),
]
FITTING = {  # of the values above, those that an argument may have
    "sizes": [None], "grid": [PAIR], "teacher": [TEXT], "digest": [TEXT], "inputs": [None, NOTHING],
    "save_every": [FIVE, HALF],
}  # fmt: skip


@pytest.mark.parametrize("name", ["count", "grid", "labels", "sizes", "teacher", "digest", "inputs", "save_every"])
def test_foreign_arguments_are_named_and_leave_no_file(tmp_path, name):
    for value in FOREIGN:
        if not any(value is fitting for fitting in FITTING.get(name, [])):
            named = "labels" if name == "count" and value is FIVE else name  # a count, but of other labels
            with pytest.raises(ValueError, match=rf"^{named} must"):
                create(tmp_path / "h.bank", **{name: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ids", "maps", "sizes", "prints"])
def test_foreign_arguments_are_not_written(tmp_path, name):
    with create(tmp_path / "h.bank") as writer:
        for value in FOREIGN:
            if not any(value is fitting for fitting in FITTING.get(name, [])):
                with pytest.raises(ValueError, match=rf"^{name} must be"):
                    if name == "prints":
                        writer.compare_images(value)
                    else:
                        good = {"ids": torch.arange(3), "maps": torch.ones(3, *GRID), "sizes": None}
                        writer.write(**{**good, name: value})
        assert len(writer.pending()) == COUNT
