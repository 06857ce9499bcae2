"""A lock file for the one process that may create or continue a bank."""

import os
import socket
import threading
import time
from pathlib import Path
from typing import ClassVar

__all__ = ["WriterLock"]


class WriterLock:
    """An exclusive lock on the writing of one file, held until `release` or the end of the process.

    The lock is on ``.NAME.lock`` beside the file, which says who holds it. It is a POSIX record lock: forked children,
    such as DataLoader workers, do not hold it, so the lock of a killed process is free at once. File systems without
    locks are taken as they are: there two writers are not told apart.

    Args:
        path: the file that is going to be written.

    Raises:
        BlockingIOError: it is being written; the message says by whom.
        OSError: the folder is missing or cannot be written.
    """

    # Record locks do not exclude the process that holds them, and closing any descriptor of the file frees them.
    held: ClassVar[set[tuple[int, str]]] = set()  # (process, lock file): a forked child holds none
    guard = threading.Lock()

    def __init__(self, path: Path) -> None:
        self.name = str(path.parent.resolve() / f".{path.name}.lock")
        self.owner = os.getpid()
        with self.guard:
            if (self.owner, self.name) in self.held:
                raise BlockingIOError(f"{path} is being written by {describe_process()} already")
            self.file = lock_file(self.name, path)
            self.held.add((self.owner, self.name))

    def release(self) -> None:
        """Remove the lock file and give up the lock."""
        with self.guard:
            if self.file >= 0 and self.owner == os.getpid():
                Path(self.name).unlink(missing_ok=True)
                os.close(self.file)
                self.held.discard((self.owner, self.name))
            self.file = -1


def lock_file(name: str, path: Path) -> int:
    """Descriptor of the locked file `name`, which says who locked it."""
    import fcntl  # POSIX only; readers of banks do without

    while True:
        try:
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}") from error
        except OSError as error:
            raise OSError(error.errno, f"{name} cannot be locked: {error.strerror}") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise BlockingIOError(f"{path} is being written by {holder}") from None
        except OSError:
            pass  # a file system without locks
        try:
            current = os.stat(name, follow_symlinks=False).st_ino == os.fstat(file).st_ino
        except FileNotFoundError:
            current = False
        if current:
            os.truncate(file, 0)
            os.pwrite(file, f"{describe_process()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode(), 0)
            return file
        os.close(file)  # the holder removed it between our opening and our lock


def describe_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"
