"""The activation maps of a whole data set in one memory-mapped file.

One map per image, [h, w], stored as uint8 with one float32 scale: ``map = values * scale``, so the error is
at most half a scale, that is 1/510 of the map's maximum. With the label (int64) and the source size (2 int32)
an image takes ``h * w + 20`` bytes: 1,281,167 images at 18x18 are 0.4407 GB.

File layout, little endian, every section at a multiple of 4096 bytes::

    0   8 bytes   magic  \\x89 T M X B \\r \\n \\x1a  (a transfer in text mode breaks it)
    8   uint32    version of the format, 1
    12  uint32    length of the JSON text
    16  uint32    CRC-32 of the JSON text
    20  bytes     JSON: count, grid, teacher, digest, complete, checksum (CRC-32 of all sections), created
    values [N, h, w] uint8 | scales [N] float32 | labels [N] int64 | sizes [N, 2] int32

While it is written the file is called ``NAME.partial``, says ``complete: false`` and holds NaN as the scale
of every image that is not there yet: that is the whole record of progress, so that a writer that was killed
goes on where it stopped.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["MapBank", "MapBankWriter", "bank_size", "dataset_digest"]

_MAGIC = b"\x89TMXB\r\n\x1a"
_VERSION = 1
_HEADER = struct.Struct("<8sIII")
_ALIGN = 4096
_HEADER_SPACE = 4096


class _Section(NamedTuple):
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def _sections(count: int, grid: tuple[int, int]) -> dict[str, _Section]:
    """Where everything lies in a bank of `count` maps."""
    sections: dict[str, _Section] = {}
    offset = _HEADER_SPACE
    for name, dtype, shape in (
        ("values", "u1", (count, *grid)),
        ("scales", "<f4", (count,)),
        ("labels", "<i8", (count,)),
        ("sizes", "<i4", (count, 2)),
    ):
        sections[name] = _Section(offset, np.dtype(dtype), shape)
        offset = -(-(offset + sections[name].nbytes) // _ALIGN) * _ALIGN
    return sections


def bank_size(count: int, grid: tuple[int, int]) -> int:
    """Bytes of a finished bank of `count` maps of `grid` = (h, w)."""
    last = _sections(count, grid)["sizes"]
    return last.offset + last.nbytes


def dataset_digest(names: Sequence[str], labels: Sequence[int]) -> str:
    """SHA-256 over the names and labels of a data set, in its order.

    Args:
        names: one per image, the same on every machine: for an image folder the path relative to its root,
            with forward slashes.
        labels: one integer per image.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: the two differ in length.
    """
    if len(names) != len(labels):
        raise ValueError(f"names and labels must be of one length, not {len(names)} and {len(labels)}")
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{name}\0{int(label)}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _pack_header(metadata: dict[str, Any]) -> bytes:
    text = json.dumps(metadata).encode()
    if _HEADER.size + len(text) > _HEADER_SPACE:
        raise ValueError(
            f"the metadata of a map bank must fit {_HEADER_SPACE - _HEADER.size} bytes; "
            f"teacher has {len(str(metadata.get('teacher')))} characters"
        )
    return (_HEADER.pack(_MAGIC, _VERSION, len(text), zlib.crc32(text)) + text).ljust(_HEADER_SPACE, b"\0")


def _read_header(path: Path) -> dict[str, Any]:
    """The metadata of a bank or partial bank, after every check that costs nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a bank, another version, a damaged header, or a length that does not fit.
    """
    with open(path, "rb") as file:
        head = file.read(_HEADER_SPACE)
        length = os.fstat(file.fileno()).st_size
    if not head:
        raise ValueError(f"{path} is empty, not a map bank")
    if head[: len(_MAGIC)] != _MAGIC:
        raise ValueError(f"{path} is not a map bank: it does not start with the bank's magic bytes")
    if len(head) < _HEADER_SPACE:
        raise ValueError(f"{path} is truncated: {length} bytes, less than a bank's header")
    _, version, text_length, checksum = _HEADER.unpack_from(head)
    if version != _VERSION:
        raise ValueError(f"{path} is a map bank of version {version}, this library reads {_VERSION}")
    text = head[_HEADER.size : _HEADER.size + text_length]
    if len(text) != text_length or zlib.crc32(text) != checksum:
        raise ValueError(f"{path} has a damaged header: its checksum does not fit")
    metadata: dict[str, Any] = json.loads(text)
    expected = bank_size(metadata["count"], tuple(metadata["grid"]))
    if length != expected:
        state = "truncated" if length < expected else "too long"
        raise ValueError(
            f"{path} is {state}: {length} bytes, a bank of {metadata['count']} maps of "
            f"{metadata['grid'][0]}x{metadata['grid'][1]} has {expected}"
        )
    return metadata


def _map_section(path: Path, section: _Section) -> np.ndarray[Any, Any]:
    # Copy-on-write: the file cannot be changed through it, and PyTorch, which knows no read-only
    # tensors, takes it without a copy and without a warning.
    if 0 in section.shape:
        return np.zeros(section.shape, section.dtype)
    return np.memmap(path, section.dtype, "c", section.offset, section.shape)


def _checksum(path: Path, sections: dict[str, _Section], report: Callable[[int], Any] | None = None) -> int:
    """CRC-32 over the content of all sections."""
    value = 0
    with open(path, "rb") as file:
        for section in sections.values():
            file.seek(section.offset)
            left = section.nbytes
            while left:
                block = file.read(min(left, 1 << 22))
                if not block:
                    raise ValueError(f"{path} is truncated")
                value = zlib.crc32(block, value)
                left -= len(block)
                if report is not None:
                    report(len(block))
    return value


class MapBank:
    """The activation maps of a data set, read through memory mapping. Made by `MapBank.open`.

    Any number of processes can read one file; they share the pages in memory. Pickling a bank, as
    DataLoader workers do under spawn, carries its path only.

    Attributes:
        path: the file.
        grid: (h, w) of every map.
        values: [N, h, w] uint8, a view of the file, or resident on the device that was asked for.
        scales: [N] float32 beside `values`; ``map = values * scale``.
        labels: [N] int64 on the CPU, the label each map belongs to.
        sizes: [N, 2] int32 on the CPU, (height, width) of each source image in pixels.
        teacher: name of the model (or of the label maps) the maps come from.
        digest: `dataset_digest` of the data set.
        metadata: everything in the header.
    """

    path: Path
    grid: tuple[int, int]
    values: Tensor
    scales: Tensor
    labels: Tensor
    sizes: Tensor
    teacher: str
    digest: str
    metadata: dict[str, Any]
    _device: torch.device | None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> MapBank:
        """Open a finished bank; takes milliseconds, whatever its size, unless `device` is given.

        Args:
            path: the file.
            device: copy `values` and `scales` there, for instance to ``'cuda'`` (0.42 GB for ImageNet at
                18x18). None leaves them in the file, to be read as they are needed.

        Raises:
            FileNotFoundError: no such file; the message says so when there is an unfinished one.
            ValueError: foreign, truncated, damaged or unfinished; the message says which.
        """
        path = Path(path)
        if not path.exists() and _partial_path(path).exists():
            raise FileNotFoundError(f"{path} is not finished: {_progress(_partial_path(path))}")
        metadata = _read_header(path)
        if not metadata["complete"]:
            raise ValueError(f"{path} is not finished: {_progress(path)}")

        bank = cls()
        bank.path = path
        bank.metadata = metadata
        bank.grid = (metadata["grid"][0], metadata["grid"][1])
        bank.teacher = metadata["teacher"]
        bank.digest = metadata["digest"]
        sections = _sections(metadata["count"], bank.grid)
        for name in ("values", "scales", "labels", "sizes"):
            setattr(bank, name, torch.from_numpy(_map_section(path, sections[name])))
        bank._device = None if device is None else torch.device(device)
        if device is not None:
            bank.values = bank.values.to(device, copy=True)
            bank.scales = bank.scales.to(device, copy=True)
        return bank

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(MapBank.open, device=self._device), (self.path,)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        h, w = self.grid
        return f"MapBank({str(self.path)!r}, {len(self)} maps of {h}x{w}, teacher={self.teacher!r})"

    def maps(self, ids: Tensor) -> Tensor:
        """The maps of some images.

        Args:
            ids: [B] int64, positions in the data set. Ids on a GPU need a bank that is resident there.

        Returns:
            [B, h, w] float32, non-negative, on the device of `values`.

        Raises:
            ValueError: wrong dtype or shape, ids on a GPU without the bank, or (ids on the CPU) an id
                outside [0, N). Ids on a GPU are not read, for that would wait for the device: one out of
                range gives an all-zero map, for which the operator falls back to the area share.
        """
        if ids.dtype != torch.int64 or ids.ndim != 1:
            raise ValueError(f"ids must be int64 of shape [B], not {ids.dtype} {list(ids.shape)}")
        if ids.device.type == "cpu":
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(self)):
                raise ValueError(
                    f"ids must lie in [0, {len(self)}), the images of the bank; "
                    f"found {int(ids.min())} to {int(ids.max())}"
                )
            ids = ids.to(self.values.device, non_blocking=True)
            scales = self.scales[ids]
        elif self.values.device != ids.device:
            raise ValueError(
                f"ids are on {ids.device} but the bank is on {self.values.device}: "
                f"open it with device='{ids.device}' or pass ids from the CPU"
            )
        else:
            inside = (ids >= 0) & (ids < len(self))
            ids = ids.clamp(0, len(self) - 1)
            scales = self.scales[ids] * inside
        return self.values[ids] * scales[:, None, None]

    def check(
        self,
        *,
        count: int | None = None,
        labels: Tensor | Sequence[int] | None = None,
        digest: str | None = None,
    ) -> None:
        """Make sure that the bank belongs to a data set; what is None is not compared.

        Args:
            count: number of images.
            labels: [N], the label of each image.
            digest: `dataset_digest` of the data set.

        Raises:
            ValueError: says what differs, and where.
        """
        start = f"{self.path} is the bank of another data set: "
        if count is not None and count != len(self):
            raise ValueError(f"{start}it holds {len(self)} maps, the data set has {count} images")
        if labels is not None:
            given = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
            if given.shape != self.labels.shape:
                raise ValueError(f"{start}it holds {len(self)} labels, given were {list(given.shape)}")
            differing = (given != self.labels).nonzero()
            if len(differing):
                first = int(differing[0])
                raise ValueError(
                    f"{start}{len(differing)} of {len(self)} labels differ, first that of image {first}: "
                    f"{int(self.labels[first])} in the bank, {int(given[first])} in the data set"
                )
        if digest is not None and digest != self.digest:
            raise ValueError(
                f"{start}digest {self.digest[:12]}... in the bank, {digest[:12]}... of the data set: "
                "file names, labels or their order differ"
            )

    def verify(self, report: Callable[[int], Any] | None = None) -> None:
        """Read the whole file and compare its checksum.

        Args:
            report: called with the number of bytes of each block that was read, for a progress bar.

        Raises:
            ValueError: the content is not what was written.
        """
        found = _checksum(self.path, _sections(len(self), self.grid), report)
        if found != self.metadata["checksum"]:
            raise ValueError(
                f"{self.path} is damaged: checksum {found:08x}, written was {self.metadata['checksum']:08x}"
            )


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _progress(path: Path) -> str:
    metadata = _read_header(path)
    section = _sections(metadata["count"], tuple(metadata["grid"]))["scales"]
    done = metadata["count"] - int(np.isnan(_map_section(path, section)).sum())
    return f"{done} of {metadata['count']} maps are in {path}; run the command that writes it again to resume"


class MapBankWriter:
    """Writes a bank, in any order, from one process or several, and resumes one that was left unfinished.

    Maps become visible to a later run only after their bytes are safe on disk: values first, then (every
    `save_every` seconds, in `save` and in `finish`) the scales that mark them as written. Killed at any
    moment, the file holds nothing half written that counts as written, and writing a map twice changes
    nothing. Needs a POSIX system. A context manager: leaving it saves and closes.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], save_every: float) -> None:
        """Not called directly: `create` or `open_partial`."""
        self.path = path
        self.partial = _partial_path(path)
        self.metadata = metadata
        self.grid: tuple[int, int] = (metadata["grid"][0], metadata["grid"][1])
        self.save_every = save_every
        self._layout = _sections(metadata["count"], self.grid)
        self._file = os.open(self.partial, os.O_RDWR)
        self._unmarked: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self._last_save = time.monotonic()

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        count: int,
        grid: tuple[int, int],
        labels: Tensor | Sequence[int],
        sizes: Tensor | None,
        teacher: str,
        digest: str,
        *,
        save_every: float = 5.0,
    ) -> MapBankWriter:
        """Begin a bank, or go on with the unfinished one of the same content.

        Only one process may create; others of the same job join with `open_partial` afterwards.

        Args:
            path: the file to be; written as ``path + '.partial'`` beside it until `finish`.
            count: number of images N.
            grid: (h, w) of every map.
            labels: [N] integers.
            sizes: [N, 2] (height, width) of the source images in pixels, or None when they come with
                `write`.
            teacher: name of the model.
            digest: `dataset_digest` of the data set.
            save_every: seconds between records of progress.

        Raises:
            FileExistsError: there is a finished bank at `path`.
            ValueError: the unfinished file beside it belongs to other data or another teacher, or an
                argument is not as described.
            BlockingIOError: another process is writing it.
        """
        path = Path(path)
        if path.exists():
            raise FileExistsError(f"{path} exists already")
        given_labels = torch.as_tensor(labels, device="cpu").numpy()
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid must be (h, w), both at least 1, not {tuple(grid)}")
        if given_labels.shape != (count,) or given_labels.dtype.kind not in "iu":
            raise ValueError(f"labels must be {count} integers, not {given_labels.dtype} {list(given_labels.shape)}")
        if sizes is not None and tuple(sizes.shape) != (count, 2):
            raise ValueError(f"sizes must be [{count}, 2] (height, width), not {list(sizes.shape)}")
        metadata = {
            "count": int(count),
            "grid": [int(grid[0]), int(grid[1])],
            "teacher": teacher,
            "digest": digest,
            "complete": False,
            "checksum": None,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        header = _pack_header(metadata)

        partial = _partial_path(path)
        if not partial.exists():
            # Prepared under another name, so that a file called .partial is always whole.
            preparing = partial.with_name(f"{partial.name}.{os.getpid()}")
            layout = _sections(count, (grid[0], grid[1]))
            with open(preparing, "wb") as file:
                file.truncate(bank_size(count, (grid[0], grid[1])))
                file.write(header)
                for name, content in (
                    ("scales", np.full(count, np.nan)),
                    ("labels", given_labels),
                    ("sizes", np.zeros((count, 2)) if sizes is None else sizes.cpu().numpy()),
                ):
                    file.seek(layout[name].offset)
                    file.write(content.astype(layout[name].dtype).tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.rename(preparing, partial)
        writer = cls.open_partial(path, save_every=save_every)
        try:
            writer._lock()
            for key in ("count", "grid", "teacher", "digest"):
                if writer.metadata[key] != metadata[key]:
                    raise ValueError(
                        f"{partial} is the beginning of another bank ({key} {writer.metadata[key]!r}, asked "
                        f"for is {metadata[key]!r}): delete it to start anew"
                    )
            if not np.array_equal(_map_section(partial, writer._layout["labels"]), given_labels):
                raise ValueError(f"{partial} is the beginning of a bank with other labels: delete it to start anew")
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def open_partial(cls, path: str | os.PathLike[str], *, save_every: float = 5.0) -> MapBankWriter:
        """Join in writing the bank that another process has created.

        Args:
            path: as given to `create`, without ``.partial``.
            save_every: seconds between records of progress.

        Raises:
            FileNotFoundError: no unfinished bank there.
            ValueError: what is there is damaged.
        """
        path = Path(path)
        return cls(path, _read_header(_partial_path(path)), save_every)

    def pending(self) -> Tensor:
        """[M] int64, ascending: the images whose map is not written yet."""
        self.save()
        scales = _map_section(self.partial, self._layout["scales"])
        return torch.from_numpy(np.flatnonzero(np.isnan(scales)).astype(np.int64))

    def write(self, ids: Tensor, maps: Tensor, sizes: Tensor | None = None) -> None:
        """Write the maps of some images.

        Args:
            ids: [B] int64.
            maps: [B, h, w], non-negative and finite, in any floating dtype, on any device.
            sizes: [B, 2] (height, width) of the source images in pixels, if `create` was not given them.

        Raises:
            ValueError: wrong shapes, ids out of range, or a map with NaN, infinite or negative values;
                nothing is written then.
        """
        count = self.metadata["count"]
        rows = ids.detach().cpu().numpy()
        if rows.ndim != 1 or rows.dtype != np.int64:
            raise ValueError(f"ids must be int64 of shape [B], not {ids.dtype} {list(ids.shape)}")
        if len(rows) and (rows.min() < 0 or rows.max() >= count):
            raise ValueError(f"ids must lie in [0, {count}); found {rows.min()} to {rows.max()}")
        if tuple(maps.shape) != (len(rows), *self.grid):
            raise ValueError(f"maps must be [{len(rows)}, {self.grid[0]}, {self.grid[1]}], not {list(maps.shape)}")
        if sizes is not None and tuple(sizes.shape) != (len(rows), 2):
            raise ValueError(f"sizes must be [{len(rows)}, 2] (height, width), not {list(sizes.shape)}")
        content = maps.detach().to("cpu", torch.float32).numpy().reshape(len(rows), -1)
        for what, wrong in (
            ("NaN or infinite", ~np.isfinite(content).all(1)),
            ("negative", (content < 0).any(1)),
        ):
            if wrong.any():
                raise ValueError(f"the map of image {rows[wrong.argmax()]} has {what} values")

        peaks = content.max(1)  # [B]
        # A scale below the smallest normal float32 would lose its precision or vanish.
        scales = np.where(peaks / 255 < np.finfo(np.float32).tiny, 0, peaks / 255).astype(np.float32)
        divisors = np.where(scales == 0, np.inf, scales)[:, None]
        values = np.rint(content / divisors).clip(0, 255).astype(np.uint8)
        for first, stop in _runs(rows):
            self._put("values", rows[first], values[first:stop])
            if sizes is not None:
                self._put("sizes", rows[first], sizes[first:stop].cpu().numpy())
        self._unmarked.append((rows.copy(), scales))
        if time.monotonic() - self._last_save >= self.save_every:
            self.save()

    def save(self) -> None:
        """Record what has been written so far; a killed writer resumes from the last such record."""
        if self._unmarked:
            os.fsync(self._file)
            for rows, scales in self._unmarked:
                for first, stop in _runs(rows):
                    self._put("scales", rows[first], scales[first:stop])
            self._unmarked.clear()
            os.fsync(self._file)
        self._last_save = time.monotonic()

    def finish(self) -> MapBank:
        """Check that every map is there, seal the file and give it its name, all or nothing.

        Raises:
            ValueError: maps are missing; the message says how many.
        """
        missing = self.pending()
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {self.metadata['count']} maps are not written yet, "
                f"the first is that of image {int(missing[0])}"
            )
        checksum = _checksum(self.partial, self._layout)
        header = _pack_header({**self.metadata, "complete": True, "checksum": checksum})
        os.pwrite(self._file, header, 0)
        os.fsync(self._file)
        os.rename(self.partial, self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        self.close()
        return MapBank.open(self.path)

    def close(self) -> None:
        """Record the progress and let go of the file."""
        if self._file >= 0:
            try:
                self.save()
            finally:
                os.close(self._file)  # this also gives up the lock
                self._file = -1

    def __enter__(self) -> MapBankWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, section: str, row: int, content: np.ndarray[Any, Any]) -> None:
        """Store consecutive rows of a section."""
        where = self._layout[section]
        data = memoryview(np.ascontiguousarray(content, where.dtype).tobytes())
        offset = where.offset + int(row) * (where.nbytes // self.metadata["count"])
        while data:
            written = os.pwrite(self._file, data, offset)
            data, offset = data[written:], offset + written

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is writing {self.partial}") from None
        except OSError:
            pass  # a file system without locks


def _runs(rows: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """(first, stop) of the stretches of `rows` that are consecutive numbers."""
    edges = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = [0, *edges.tolist()]
    for first, stop in zip(starts, [*edges.tolist(), len(rows)], strict=True):
        if first < stop:
            yield first, stop
