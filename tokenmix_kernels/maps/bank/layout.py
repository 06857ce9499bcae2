"""The file format of map banks.

One map per image, [h, w], stored as uint8 with one float32 scale: ``map = values * scale``, so the error is at most
half a scale, that is 1/510 of the map's maximum. With the label (int64) and the source size (2 int32) an image takes
``h * w + 20`` bytes: 1,281,167 images at 18x18 are 0.4407 GB.

File layout, little endian, every section at a multiple of 4096 bytes::

    0   8 bytes   magic  \\x89 T M X B \\r \\n \\x1a  (a transfer in text mode breaks it)
    8   uint32    version of the format, 1
    12  uint32    length of the JSON text
    16  uint32    CRC-32 of the JSON text
    20  bytes     JSON: count, grid, teacher, digest, inputs, complete, checksum (CRC-32 of all sections), created
    values [N, h, w] uint8 | scales [N] float32 | labels [N] int64 | sizes [N, 2] int32

A size of (0, 0) is not known; (-1, -1) marks an image that could not be read and has no map.

An unfinished bank is called ``NAME.partial``, says ``complete: false`` and holds NaN as the scale of every image whose
map is not written yet. That is the whole record of progress, so a writer that was killed continues where it stopped.
Behind the sizes it has one more section, which is cut off at the end: ``prints`` [N] uint32, fingerprints of the source
images, by which a writer knows that an image has changed since its map was written.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

__all__ = ["bank_size", "dataset_digest"]

MAGIC = b"\x89TMXB\r\n\x1a"
VERSION = 1
PREFIX = struct.Struct("<8sIII")
ALIGN = 4096
HEADER_SPACE = 4096
SKIPPED = -1  # height and width of an image that could not be read


class Section(NamedTuple):
    """A part of the file: an array of one dtype.

    Attributes:
        offset: first byte in the file.
        dtype: little endian.
        shape: the first dimension is the image.
    """

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def sections_of(count: int, grid: tuple[int, int], unfinished: bool = False) -> dict[str, Section]:
    """The sections of a bank of `count` maps, in the order of the file."""
    sections: dict[str, Section] = {}
    offset = HEADER_SPACE
    for name, dtype, shape in (
        ("values", "u1", (count, *grid)),
        ("scales", "<f4", (count,)),
        ("labels", "<i8", (count,)),
        ("sizes", "<i4", (count, 2)),
        ("prints", "<u4", (count,)),
    )[: 5 if unfinished else 4]:
        sections[name] = Section(offset, np.dtype(dtype), shape)
        offset = -(-(offset + sections[name].nbytes) // ALIGN) * ALIGN
    return sections


def bank_size(count: int, grid: tuple[int, int]) -> int:
    """Bytes of a finished bank of `count` maps of `grid` = (h, w)."""
    last = sections_of(int(count), (int(grid[0]), int(grid[1])))["sizes"]
    return last.offset + last.nbytes


def unfinished_size(count: int, grid: tuple[int, int]) -> int:
    """Bytes of an unfinished bank."""
    last = sections_of(count, grid, unfinished=True)["prints"]
    return last.offset + last.nbytes


def dataset_digest(names: Sequence[str], labels: Sequence[int]) -> str:
    """Compute the SHA-256 of the names and labels of a data set, in its order.

    Args:
        names: one per image, the same on every machine: for an image folder the path relative to its root, with
            forward slashes.
        labels: one integer per image.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: the two differ in length.
    """
    if len(names) != len(labels):
        raise ValueError(f"names and labels must be of one length, got {len(names)} and {len(labels)}")
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\0{int(label)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def pack_header(metadata: dict[str, Any]) -> bytes:
    """The first HEADER_SPACE bytes of a bank with this metadata.

    Raises:
        ValueError: the metadata takes more space.
    """
    text = json.dumps(metadata).encode()
    if PREFIX.size + len(text) > HEADER_SPACE:
        raise ValueError(
            f"teacher and inputs must fit into {HEADER_SPACE - PREFIX.size} bytes of metadata, "
            f"got {len(text)}; teacher has {len(str(metadata.get('teacher')))} characters"
        )
    return (PREFIX.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text).ljust(HEADER_SPACE, b"\0")


def read_header(file: BinaryIO, path: Path) -> dict[str, Any]:
    """Read the metadata of a bank or unfinished bank, with every check that does not read the maps.

    Args:
        file: open at any position; no other file is looked at.
        path: its name, for messages.

    Raises:
        ValueError: not a bank, another version, a damaged header, or a length that does not fit.
    """
    file.seek(0)
    head = file.read(HEADER_SPACE)
    length = os.fstat(file.fileno()).st_size
    if not head:
        raise ValueError(f"{path} is empty, not a map bank")
    if head[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is not a map bank: it does not start with the bank's magic bytes")
    if len(head) < HEADER_SPACE:
        raise ValueError(f"{path} is truncated: {length} bytes, less than a bank's header")
    _, version, text_length, checksum = PREFIX.unpack_from(head)
    if version != VERSION:
        raise ValueError(f"{path} is a map bank of version {version}, this library reads version {VERSION}")
    text = head[PREFIX.size : PREFIX.size + text_length]
    if len(text) != text_length or zlib.crc32(text) != checksum:
        raise ValueError(f"{path} has a damaged header: its checksum does not fit")
    metadata = parse_metadata(text, path)
    expected = bank_size(metadata["count"], metadata["grid"])
    # An unfinished bank without fingerprints was interrupted while it was finished.
    if length != expected and (metadata["complete"] or length != unfinished_size(metadata["count"], metadata["grid"])):
        state = "truncated" if length < expected else "too long"
        raise ValueError(
            f"{path} is {state}: {length} bytes, a bank of {metadata['count']} maps of "
            f"{metadata['grid'][0]}x{metadata['grid'][1]} has {expected}"
        )
    return metadata


def parse_metadata(text: bytes, path: Path) -> dict[str, Any]:
    """The metadata in a header's JSON text.

    Raises:
        ValueError: it is not what `MapBankWriter` writes, though the checksum fits.
    """

    def is_count(value: Any) -> bool:
        return type(value) is int and 1 <= value < 2**40

    try:
        metadata: dict[str, Any] = json.loads(text)
        grid = metadata["grid"]
        metadata.setdefault("inputs", {})
        fits = {
            "count": is_count(metadata["count"]),
            "grid": isinstance(grid, list) and len(grid) == 2 and all(map(is_count, grid)),
            "teacher": isinstance(metadata["teacher"], str),
            "digest": isinstance(metadata["digest"], str),
            "inputs": isinstance(metadata["inputs"], dict),
            "complete": isinstance(metadata["complete"], bool),
            "checksum": isinstance(metadata["checksum"], int if metadata["complete"] else int | None),
            "created": isinstance(metadata["created"], str),
        }
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} has a foreign header: {type(error).__name__} {error}") from error
    wrong = [name for name, right in fits.items() if not right]
    if wrong:
        raise ValueError(f"{path} has a foreign header: {wrong[0]} is {str(metadata[wrong[0]])[:80]!r}")
    return metadata


def read_section(file: BinaryIO, section: Section) -> np.ndarray[Any, Any]:
    """A copy of a section."""
    file.seek(section.offset)
    return np.frombuffer(file.read(section.nbytes), section.dtype).reshape(section.shape)


def compute_checksum(
    file: BinaryIO, sections: dict[str, Section], path: Path, report: Callable[[int], Any] | None = None
) -> int:
    """CRC-32 over the content of all sections; `report` is called with the number of bytes of each block."""
    value = 0
    for section in sections.values():
        file.seek(section.offset)
        remaining = section.nbytes
        while remaining:
            block = file.read(min(remaining, 1 << 22))
            if not block:
                raise ValueError(f"{path} is truncated")
            value = zlib.crc32(block, value)
            remaining -= len(block)
            if report is not None:
                report(len(block))
    return value


def partial_path(path: Path) -> Path:
    """Name of the unfinished bank beside `path`."""
    return path.with_name(path.name + ".partial")


def progress_of(file: BinaryIO, metadata: dict[str, Any], path: Path) -> str:
    """How many maps an unfinished bank holds, and what to do."""
    scales = read_section(file, sections_of(metadata["count"], tuple(metadata["grid"]))["scales"])
    done = metadata["count"] - int(np.isnan(scales).sum())
    return f"{done} of {metadata['count']} maps are in {path}; run the command that writes it again to resume"
