"""Unfinished banks as files: begun whole or not at all, and opened without following links."""

import errno
import glob
import os
import secrets
import stat
from pathlib import Path
from typing import Any

import numpy as np

from . import layout

__all__ = ["begin", "open_unfinished", "remove_leftovers"]


def begin(path: Path, header: bytes, size: int, contents: dict[layout.Section, np.ndarray[Any, Any]]) -> None:
    """Make an unfinished bank with all its space reserved.

    It is made under another name, which nobody can guess and prepare, so that a file called .partial is always whole.
    """
    partial = layout.partial_path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:  # "x": never an existing file or link
                reserve(file.fileno(), size)
                file.write(header)
                for section, content in contents.items():
                    file.seek(section.offset)
                    file.write(content.astype(section.dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, partial)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, f"{partial} ({size / 1e6:.1f} MB) cannot be written: {error.strerror}") from error


def reserve(number: int, size: int) -> None:
    """Make a file so long, with its space on the disk, so that a full disk is found now and not after hours."""
    try:
        os.posix_fallocate(number, 0, size)
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        os.ftruncate(number, size)  # a system that cannot


def open_unfinished(partial: Path) -> Any:
    """The unfinished bank, unbuffered, for reading and writing. Links and what is not a file are refused."""
    try:
        number = os.open(partial, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise ValueError(f"{partial} is not an unfinished bank: delete it, or choose another name for the bank")
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no unfinished bank {partial}") from None
    except OSError as error:
        what = "a link" if partial.is_symlink() else "a folder" if partial.is_dir() else error.strerror
        raise OSError(
            error.errno, f"{partial} cannot be continued ({what}): delete it, or choose another name for the bank"
        ) from error
    return open(number, "r+b", buffering=0)


def remove_leftovers(path: Path) -> None:
    """Remove what writers left that were killed in `begin`. Only for the holder of the lock."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        leftover.unlink(missing_ok=True)
