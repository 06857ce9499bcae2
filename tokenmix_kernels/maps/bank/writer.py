"""Writing map banks, from one process or several, killed and resumed at any moment."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...arguments import as_count
from . import checks, layout
from .files import begin, open_unfinished, remove_leftovers
from .lock import WriterLock
from .reader import MapBank

__all__ = ["MapBankWriter"]


class MapBankWriter:
    """Writes a bank, in any order of ids, and resumes one that was left unfinished.

    Maps become visible to a later run only after their bytes are on disk: values first, then (every `save_every`
    seconds, in `save` and in `finish`) the scales that mark them as written. Killed at any moment, the file holds
    nothing half written that counts as written. Needs a POSIX system. A context manager: leaving it saves and closes.

    Attributes:
        path: the bank to be.
        partial: the unfinished file beside it.
        metadata: its header.
        grid: (h, w) of every map.
    """

    def __init__(self, path: Path, lock: WriterLock | None, save_every: float) -> None:
        """Not called directly: `create` or `open_partial`."""
        self.path = path
        self.partial = layout.partial_path(path)
        self.lock = lock
        self.save_every = save_every
        self.file = open_unfinished(self.partial)
        try:
            self.metadata = layout.read_header(self.file, self.partial)
        except ValueError as error:
            self.file.close()
            raise ValueError(f"{error}; delete it, or choose another name for the bank") from error
        self.grid: tuple[int, int] = (self.metadata["grid"][0], self.metadata["grid"][1])
        self.sections = layout.sections_of(self.metadata["count"], self.grid)
        # [N] bool, by this writer or by earlier ones
        self.written = ~np.isnan(layout.read_section(self.file, self.sections["scales"]))
        self.unmarked: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
        self.last_save = time.monotonic()

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
        inputs: Mapping[str, str] | None = None,
        save_every: float = 5.0,
    ) -> "MapBankWriter":
        """Begin a bank, or continue the unfinished one of the same content.

        Only one process may create; others of the same job join with `open_partial` afterwards.

        Args:
            path: the file to be; written as ``path + '.partial'`` beside it until `finish`.
            count: number of images N.
            grid: (h, w) of every map.
            labels: [N] integers.
            sizes: [N, 2] (height, width) of the source images in pixels, or None when they come with `write`.
            teacher: name of the model.
            digest: `dataset_digest` of the data set.
            inputs: everything else that a map depends on, by name (digests of weights and images, mean and std, and
                so on). An unfinished bank with other ones is not continued. 4 kB together with `teacher`.
            save_every: seconds between records of progress.

        Raises:
            FileExistsError: there is a finished bank at `path`.
            ValueError: the unfinished file beside it belongs to other data, another teacher or other inputs, or an
                argument is not as described.
            BlockingIOError: another process is writing it; the message says which.
            OSError: the folder is missing, cannot be written or has too little space.
        """
        path = Path(path)
        count = as_count("count", count, 1)
        grid = checks.as_grid(grid)
        given_labels = checks.as_labels(labels, count)
        checks.check_sizes(sizes, count)
        save_every = checks.as_seconds(save_every)
        metadata = {
            "count": count,
            "grid": list(grid),
            **checks.as_metadata(teacher, digest, inputs),
            "complete": False,
            "checksum": None,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        header = layout.pack_header(metadata)
        lock = WriterLock(path)
        try:
            if os.path.lexists(path):
                raise FileExistsError(f"{path} exists already: delete it or choose another name")
            partial = layout.partial_path(path)
            remove_leftovers(path)
            if not os.path.lexists(partial):
                sections = layout.sections_of(count, grid, unfinished=True)
                begin(path, header, layout.unfinished_size(count, grid), {
                    sections["scales"]: np.full(count, np.nan),
                    sections["labels"]: given_labels,
                    sections["sizes"]: np.zeros((count, 2)) if sizes is None else sizes.cpu().numpy(),
                })  # fmt: skip
            writer = cls(path, lock, save_every)
        except BaseException:
            lock.release()
            raise
        try:
            writer.compare(metadata)
            if not np.array_equal(layout.read_section(writer.file, writer.sections["labels"]), given_labels):
                raise ValueError(f"{partial} is the beginning of a bank with other labels: delete it to start anew")
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def open_partial(
        cls, path: str | os.PathLike[str], *, inputs: Mapping[str, str] | None = None, save_every: float = 5.0
    ) -> "MapBankWriter":
        """Join in writing the bank that another process has created.

        Args:
            path: as given to `create`, without ``.partial``.
            inputs: as given to `create`; those that are named here must be the same there.
            save_every: seconds between records of progress.

        Raises:
            FileNotFoundError: no unfinished bank there.
            ValueError: what is there is damaged, or has other inputs.
        """
        writer = cls(Path(path), None, checks.as_seconds(save_every))
        try:
            asked = checks.as_metadata(writer.metadata["teacher"], writer.metadata["digest"], inputs)["inputs"]
            writer.compare({**writer.metadata, "inputs": {**writer.metadata["inputs"], **asked}})
        except ValueError:
            writer.close()
            raise
        return writer

    def compare(self, metadata: dict[str, Any]) -> None:
        """Raise ValueError where the unfinished file is not the beginning of a bank with this metadata."""
        differing = [
            f"{name} was {str(old.get(name))[:80]}, is {str(new.get(name))[:80]}"
            for old, new, names in (
                (self.metadata, metadata, ("count", "grid", "teacher", "digest")),
                (self.metadata["inputs"], metadata["inputs"], {**self.metadata["inputs"], **metadata["inputs"]}),
            )
            for name in names
            if old.get(name) != new.get(name)
        ]
        if differing:
            what = "; ".join(differing)
            raise ValueError(
                f"{self.partial} is the beginning of another bank: {what}. Delete it to start anew, "
                "or choose another name for the bank"
            )

    def compare_images(self, prints: np.ndarray[Any, Any]) -> Tensor:
        """Tell which source images have changed since their maps were written, and note the others' fingerprints.

        Args:
            prints: [N] uint32, a fingerprint of each source image, for instance of its size and modification time.

        Returns:
            [M] int64, ascending: images with a map and another fingerprint than when the file was begun or continued.
        """
        section = layout.sections_of(self.metadata["count"], self.grid, unfinished=True)["prints"]
        if not isinstance(prints, np.ndarray) or prints.shape != section.shape or prints.dtype != np.uint32:
            raise ValueError(f"prints must be an array uint32 {list(section.shape)}, got {checks.show(prints)}")
        if os.fstat(self.file.fileno()).st_size < section.offset + section.nbytes:
            return torch.empty(0, dtype=torch.int64, device="cpu")  # every map is written, only the end is missing
        known = layout.read_section(self.file, section)
        changed = np.flatnonzero(self.written & (known != 0) & (known != prints))
        if not len(changed):
            self.pwrite(section.offset, np.where(self.written, known, prints).astype(section.dtype).tobytes())
        return torch.from_numpy(changed.astype(np.int64))

    def pending(self) -> Tensor:
        """[M] int64, ascending: the images whose map no writer has recorded yet."""
        self.save()
        scales = layout.read_section(self.file, self.sections["scales"])
        return torch.from_numpy(np.flatnonzero(np.isnan(scales)).astype(np.int64))

    def write(self, ids: Tensor, maps: Tensor, sizes: Tensor | None = None) -> None:
        """Write the maps of some images.

        Args:
            ids: [B] int64, in any order, none twice and none that is written already.
            maps: [B, h, w], non-negative and finite, in any floating dtype, on any device.
            sizes: [B, 2] (height, width) of the source images in pixels, if `create` was not given them.

        Raises:
            ValueError: wrong shapes, ids out of range or written already, or a map with NaN, infinite or negative
                values; nothing is written then.
            OSError: the disk is full or fails; what was recorded before is kept.
        """
        rows = self.check_ids(ids)
        checks.check_maps(maps, len(rows), self.grid)
        checks.check_sizes(sizes, len(rows))
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
        self.put_all(rows, values, scales, None if sizes is None else sizes.cpu().numpy())

    def skip(self, ids: Tensor) -> None:
        """Leave images out that cannot be read: all-zero maps, and sizes that say so (`MapBank.skipped`).

        Args:
            ids: [B] int64, as for `write`.
        """
        rows = self.check_ids(ids)
        values = np.zeros((len(rows), *self.grid), np.uint8)
        self.put_all(rows, values, np.zeros(len(rows), np.float32), np.full((len(rows), 2), layout.SKIPPED))

    def check_ids(self, ids: Tensor) -> np.ndarray[Any, Any]:
        """The ids as an array [B], after the checks of `write`."""
        rows: np.ndarray[Any, Any] = checks.as_ids(ids).detach().cpu().numpy().copy()
        count = self.metadata["count"]
        if len(rows) and (rows.min() < 0 or rows.max() >= count):
            raise ValueError(f"ids must be in [0, {count}), got {rows.min()} to {rows.max()}")
        unique, times = np.unique(rows, return_counts=True)
        if (times > 1).any():
            raise ValueError(f"ids must be different, got {unique[times.argmax()]} {times.max()} times")
        if self.written[rows].any():
            raise ValueError(f"ids must be of images without a map: that of {rows[self.written[rows]][0]} is written")
        return rows

    def put_all(
        self, rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any], scales: np.ndarray[Any, Any],
        sizes: np.ndarray[Any, Any] | None,
    ) -> None:  # fmt: skip
        """Store what belongs to some images; their scales follow with the next `save`."""
        for first, stop in consecutive(rows):
            self.put("values", rows[first], values[first:stop])
            if sizes is not None:
                self.put("sizes", rows[first], sizes[first:stop])
        self.written[rows] = True
        self.unmarked.append((rows, scales))
        if time.monotonic() - self.last_save >= self.save_every:
            self.save()

    def save(self) -> None:
        """Record what has been written so far; a killed writer resumes from the last such record."""
        if self.unmarked:
            os.fsync(self.file.fileno())
            for rows, scales in self.unmarked:
                for first, stop in consecutive(rows):
                    self.put("scales", rows[first], scales[first:stop])
            self.unmarked.clear()
            os.fsync(self.file.fileno())
        self.last_save = time.monotonic()

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
        checksum = layout.compute_checksum(self.file, self.sections, self.partial)
        os.ftruncate(self.file.fileno(), layout.bank_size(self.metadata["count"], self.grid))
        os.pwrite(self.file.fileno(), layout.pack_header({**self.metadata, "complete": True, "checksum": checksum}), 0)
        os.fsync(self.file.fileno())
        os.rename(self.partial, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.close()
        return MapBank.open(self.path)

    def close(self) -> None:
        """Record the progress, close the file and give up the lock."""
        if not self.file.closed:
            try:
                self.save()
            finally:
                self.file.close()
                if self.lock is not None:
                    self.lock.release()

    def __enter__(self) -> "MapBankWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except OSError:
            if kind is None:
                raise  # else the first error is the one to show

    def put(self, name: str, row: int, content: np.ndarray[Any, Any]) -> None:
        """Store consecutive rows of a section."""
        section = self.sections[name]
        offset = section.offset + int(row) * (section.nbytes // self.metadata["count"])
        self.pwrite(offset, np.ascontiguousarray(content, section.dtype).tobytes())

    def pwrite(self, offset: int, content: bytes) -> None:
        """Store bytes, all of them."""
        data = memoryview(content)
        try:
            while data:
                done = os.pwrite(self.file.fileno(), data, offset)
                data, offset = data[done:], offset + done
        except OSError as error:
            raise OSError(
                error.errno, f"{self.partial} cannot be written: {error.strerror}; maps recorded before are kept"
            ) from error


def consecutive(rows: np.ndarray[Any, Any]) -> Iterator[tuple[int, int]]:
    """(first, stop) of the stretches of `rows` that are consecutive numbers."""
    edges = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = [0, *edges.tolist()]
    for first, stop in zip(starts, [*edges.tolist(), len(rows)], strict=True):
        if first < stop:
            yield first, stop
