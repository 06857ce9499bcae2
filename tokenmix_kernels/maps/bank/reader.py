"""Reading map banks."""

import functools
import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from .checks import as_ids
from .layout import SKIPPED, bank_size, compute_checksum, partial_path, progress_of, read_header, sections_of

__all__ = ["MapBank"]


class MapBank:
    """The activation maps of a data set, read through memory mapping. Made by `MapBank.open`.

    Any number of processes can read one file; they share its pages in memory. Pickling a bank, as DataLoader workers
    do under spawn, carries its path only; a worker that finds another bank there refuses it.

    Replace a bank by renaming another file onto it (``os.replace``, ``mv``): whoever has it open keeps the old one.
    Never write into a bank or shorten it in place: its pages are mapped, and a process that touches a page that the
    file no longer has is killed by SIGBUS. `maps`, `check` and `verify` look at the length first and raise instead.

    Attributes:
        path: the file.
        grid: (h, w) of every map.
        values: [N, h, w] uint8, a view of the file, or resident on the device that was asked for.
        scales: [N] float32 beside `values`; ``map = values * scale``.
        labels: [N] int64 on the CPU, the label each map belongs to.
        sizes: [N, 2] int32 on the CPU, (height, width) of each source image in pixels; (0, 0) where not known,
            (-1, -1) where the image could not be read.
        teacher: name of the model (or of the label maps) the maps come from.
        digest: `dataset_digest` of the data set.
        metadata: everything in the header; ``inputs`` says what the maps were computed from.
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
    file: BinaryIO
    device: torch.device | None

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> "MapBank":
        """Open a finished bank; takes milliseconds, whatever its size, unless `device` is given.

        Args:
            path: the file. It is opened once, so a bank that is replaced meanwhile is read as the old one or the new
                one, never as a mixture.
            device: copy `values` and `scales` there, for instance to ``'cuda'`` (0.42 GB for ImageNet at 18x18).
                None leaves them in the file, to be read as they are needed.

        Raises:
            FileNotFoundError: no such file; the message says so when there is an unfinished one.
            ValueError: foreign, truncated, damaged or unfinished; the message says which.
        """
        path = Path(path)
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is not a map bank but a {'folder' if path.is_dir() else 'device'}")
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError as error:
            raise FileNotFoundError(absent(path)) from error
        bank = cls()
        bank.path = path
        bank.file = file
        bank.metadata = read_header(file, path)
        if not bank.metadata["complete"]:
            raise ValueError(f"{path} is not finished: {progress_of(file, bank.metadata, path)}")
        bank.grid = (bank.metadata["grid"][0], bank.metadata["grid"][1])
        bank.teacher = bank.metadata["teacher"]
        bank.digest = bank.metadata["digest"]
        bank.device = None if device is None else torch.device(device)
        # Copy-on-write: the file cannot be changed through it, and PyTorch, which knows no read-only tensors, takes
        # it without a copy and without a warning.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for name, section in sections_of(bank.metadata["count"], bank.grid).items():
            flat = np.frombuffer(mapped, section.dtype, int(np.prod(section.shape)), section.offset)
            setattr(bank, name, torch.from_numpy(flat.reshape(section.shape)))
        if device is not None:
            bank.values = bank.values.to(device, copy=True)
            bank.scales = bank.scales.to(device, copy=True)
        return bank

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(reopen, device=self.device), (self.path, self.metadata)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        h, w = self.grid
        return f"MapBank({str(self.path)!r}, {len(self)} maps of {h}x{w}, teacher={self.teacher!r})"

    @property
    def skipped(self) -> Tensor:
        """[M] int64 on the CPU, ascending: ids of images that could not be read. Their maps are all zero."""
        return (self.sizes[:, 0] == SKIPPED).nonzero()[:, 0]

    def maps(self, ids: Tensor) -> Tensor:
        """Read the maps of some images.

        Args:
            ids: [B] int64, positions in the data set. Ids on a GPU need a bank that is resident there.

        Returns:
            [B, h, w] float32, non-negative, on the device of `values`.

        Raises:
            ValueError: wrong dtype or shape, ids on a GPU without the bank, a file that has been shortened, or (ids
                on the CPU) an id outside [0, N). Ids on a GPU are not read, for that would wait for the device: one
                out of range gives an all-zero map, for which the operator falls back to the area share.
        """
        as_ids(ids)
        if self.device is None:
            self.check_length()
        if ids.device.type == "cpu":
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= len(self)):
                raise ValueError(
                    f"ids must be in [0, {len(self)}), the images of the bank, got {int(ids.min())} to {int(ids.max())}"
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
        self.check_length()
        start = f"{self.path} is the bank of another data set: "
        if count is not None and count != len(self):
            raise ValueError(f"{start}it holds {len(self)} maps, the data set has {count} images")
        if labels is not None:
            given = torch.as_tensor(labels, dtype=torch.int64, device="cpu")
            if given.shape != self.labels.shape:
                raise ValueError(f"{start}it holds {len(self)} labels, got {list(given.shape)}")
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
        self.check_length()
        found = compute_checksum(self.file, sections_of(len(self), self.grid), self.path, report)
        if found != self.metadata["checksum"]:
            raise ValueError(
                f"{self.path} is damaged: checksum {found:08x}, written was {self.metadata['checksum']:08x}"
            )

    def check_length(self) -> None:
        """Raise ValueError where the open file has become shorter."""
        length, expected = os.fstat(self.file.fileno()).st_size, bank_size(len(self), self.grid)
        if length < expected:
            raise ValueError(
                f"{self.path} was truncated while it was open: {length} of {expected} bytes are left; "
                "replace a bank by renaming another file onto it, never in place"
            )


def absent(path: Path) -> str:
    """What to say where there is no bank at `path`."""
    partial = partial_path(path)
    try:
        with open(partial, "rb", buffering=0) as file:
            return f"{path} is not finished: {progress_of(file, read_header(file, partial), partial)}"
    except OSError:
        return f"there is no map bank {path}"
    except ValueError as error:
        return f"there is no map bank {path}, and {error}"


def reopen(path: Path, metadata: dict[str, Any], device: torch.device | None) -> MapBank:
    """Open the bank that was pickled.

    Raises:
        ValueError: its path holds another bank by now.
    """
    bank = MapBank.open(path, device=device)
    if bank.metadata != metadata:
        raise ValueError(f"{path} holds another bank than the one that was pickled: it has been replaced since")
    return bank
