"""Image folders: one folder of images per class, in the order of torchvision's ImageFolder."""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from .bank import dataset_digest

__all__ = ["folder_digest"]

STAT_THREADS = 16  # on a network file system each look takes a round trip


def folder_digest(dataset: Any) -> str:
    """Compute `dataset_digest` of a torchvision ImageFolder: paths relative to its root, with forward slashes.

    Args:
        dataset: anything with ``root`` and ``samples``, a list of (path, label).
    """
    names = [Path(os.path.relpath(path, dataset.root)).as_posix() for path, _ in dataset.samples]
    return dataset_digest(names, [label for _, label in dataset.samples])


def open_folder(root: Path) -> Any:
    """The ImageFolder at `root`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it has no folders of images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    try:
        return require("torchvision.datasets").ImageFolder(str(root))
    except FileNotFoundError as error:
        raise ValueError(f"{root} must hold one folder of images per class: {error}") from error


def fingerprints(paths: Sequence[str | Path]) -> np.ndarray[Any, Any]:
    """[N] uint32, for each file a CRC-32 of its size and modification time."""

    def look(part: Sequence[str | Path]) -> list[int]:
        prints = []
        for path in part:
            try:
                found = os.stat(path)
                prints.append(zlib.crc32(f"{found.st_size} {found.st_mtime_ns}".encode()))
            except OSError:
                prints.append(1)  # whoever reads it says why
        return prints

    with ThreadPoolExecutor(STAT_THREADS) as pool:
        parts = pool.map(look, [paths[i : i + 1000] for i in range(0, len(paths), 1000)])
        return np.concatenate([np.array(part, np.uint32) for part in parts])


def class_indices(classes: Sequence[str], teacher_classes: int | None, class_map: Path | None) -> list[int]:
    """Which class of the teacher each folder is.

    Args:
        classes: folder names in the order of the labels.
        teacher_classes: K of the teacher, None when it is not known.
        class_map: a text file, ``folder index`` on each line, or None.

    Raises:
        ValueError: it cannot be told, or the file is incomplete.
    """
    if class_map is not None:
        return read_class_map(classes, teacher_classes, class_map)
    if len(classes) == teacher_classes:
        return list(range(len(classes)))
    if teacher_classes in (None, 1000):
        synsets = require("timm.data").ImageNetInfo("imagenet-1k").label_names()
        position = {name: index for index, name in enumerate(synsets)}
        if all(folder in position for folder in classes):
            return [position[folder] for folder in classes]
    if teacher_classes is None:
        return list(range(len(classes)))
    raise ValueError(
        f"the data has {len(classes)} classes but the teacher {teacher_classes}, and the folders are not "
        "ImageNet's: say with --class-map which class of the teacher each folder is"
    )


def read_class_map(classes: Sequence[str], teacher_classes: int | None, class_map: Path) -> list[int]:
    """`class_indices` from a file."""
    if not class_map.is_file():
        raise FileNotFoundError(f"there is no class map {class_map}")
    try:
        lines = class_map.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the class map {class_map} must be text, 'folder index' on each line") from error
    known: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        folder, _, index = line.strip().rpartition(" ")
        folder = folder.strip()
        if not folder or not (index.isascii() and index.isdecimal()):
            raise ValueError(f"{class_map} line {number} must be 'folder index', got {line!r}")
        if known.setdefault(folder, int(index)) != int(index):
            raise ValueError(f"{class_map} line {number} gives folder {folder} a second class, {index}")
    absent = [folder for folder in classes if folder not in known]
    if absent:
        raise ValueError(f"{class_map} has no line for {len(absent)} folders, the first is {absent[0]}")
    indices = [known[folder] for folder in classes]
    if teacher_classes is not None and max(indices) >= teacher_classes:
        raise ValueError(f"{class_map} names class {max(indices)}, the teacher has {teacher_classes}")
    return indices
