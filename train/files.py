"""Files that are whole or absent, and the lock of a run's folder."""

import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokenmix_kernels.maps.bank.lock import WriterLock

__all__ = ["lock_folder", "write_atomic", "write_lines"]


class Recorded:
    """A file to write to that keeps the first error: torch.save replaces it by one of its own."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            written: int = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        return written

    def flush(self) -> None:
        self.file.flush()


def write_atomic(path: Path, write: Callable[[Any], Any], previous: Path | None = None) -> None:
    """Call write(binary file) so that `path` holds the old content or all of the new, whatever happens.

    The new content goes to a file beside it, to the disk, and only then takes the name. The other file has a name
    that nobody can guess and prepare, and it is removed when anything fails.

    Args:
        path: the file; its folder is made.
        write: writes the content.
        previous: keep the old content under this name.

    Raises:
        OSError: it cannot be written, the disk is full; the message names the file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    recorded: Recorded | None = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:  # "x": never an existing file or link
                recorded = Recorded(file)
                write(recorded)
                file.flush()
                os.fsync(file.fileno())
            if previous and path.is_file():
                keep(path, previous)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except Exception as error:
        cause = recorded.error if recorded and recorded.error else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{path} cannot be written: {cause.strerror or cause}") from error
        raise


def keep(path: Path, previous: Path) -> None:
    """Give the content of `path` a second name; `path` exists at every moment where the file system has links."""
    link = previous.with_name(f".{previous.name}.{secrets.token_hex(8)}.tmp")
    try:
        os.link(path, link)
    except OSError:
        os.replace(path, previous)
    else:
        os.replace(link, previous)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_lines(lines: Iterable[str], path: Path) -> None:
    """Write lines of text, atomically."""
    write_atomic(path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))


def lock_folder(folder: Path) -> WriterLock:
    """Lock a run's folder until the lock is released or the process ends, and remove what a killed run left there.

    Raises:
        BlockingIOError: another trainer writes there; the message says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = WriterLock(folder / "last.pt")
    except BlockingIOError as error:
        raise BlockingIOError(f"--output {folder} is in use: {error}; give another --output") from None
    for leftover in folder.glob(".*." + "[0-9a-f]" * 16 + ".tmp"):
        leftover.unlink(missing_ok=True)
    return lock
