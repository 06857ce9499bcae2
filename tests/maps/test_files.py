"""Locks, planted files and full disks: what happens to a bank in a folder that others use too."""

import errno
import fcntl
import os
import re
import signal
import socket
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from bank_helpers import COUNT, create, random_maps

from tokenmix_kernels.maps.bank import MapBank


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


def test_a_lock_file_that_its_holder_removes_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """Else the second writer locks a file that nobody sees any more, and the third locks a new one."""
    path, lock, real, removed = tmp_path / "f.bank", tmp_path / ".f.bank.lock", fcntl.lockf, []

    def lockf(*arguments):
        if not removed:
            removed.append(os.stat(lock).st_ino)
            lock.rename(tmp_path / "removed")
        real(*arguments)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with create(path):
        assert lock.exists() and os.stat(lock).st_ino != removed[0]
        with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
            assert "is being written by process" in pool.submit(try_to_create, path).result()


def hold(path, pipe):
    """Creates a bank, forks a child as a loader does, and waits to be killed."""
    writer = create(path)
    child = os.fork()
    if child:
        pipe.send(child)
    time.sleep(100)
    writer.close()


def test_the_lock_of_a_killed_writer_is_free_though_its_workers_live(tmp_path):
    receive, send = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=hold, args=(tmp_path / "k.bank", send))
    process.start()
    worker = receive.recv()
    try:
        with pytest.raises(BlockingIOError, match=f"written by process {process.pid} on "):
            create(tmp_path / "k.bank")
        process.kill()
        process.join()
        create(tmp_path / "k.bank").close()
    finally:
        os.kill(worker, signal.SIGKILL)


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
    create(tmp_path / "victim.bank").close()  # a link to it would fit
    partial, victim = tmp_path / "p.bank.partial", tmp_path / "victim.bank.partial"
    before = victim.read_bytes()
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
    assert victim.read_bytes() == before and os.path.lexists(partial)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.bank.partial", "victim.bank.partial"]


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


def test_no_space_is_found_before_the_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"r\.bank\.partial \(0\.0 MB\) cannot be written: No space left"):
        create(tmp_path / "r.bank")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve_space_are_used_without(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with create(tmp_path / "r.bank") as writer:
        writer.write(torch.arange(COUNT), random_maps())
        writer.finish().verify()


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
