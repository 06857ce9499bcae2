"""What the arguments of a bank must look like."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...arguments import as_count, as_number

__all__ = ["as_grid", "as_ids", "as_labels", "as_metadata", "as_seconds", "check_maps", "check_sizes"]


def show(value: Any) -> str:
    """Dtype and shape of a tensor or array, else the value."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    return repr(value)[:80]


def as_grid(grid: Any) -> tuple[int, int]:
    """(h, w) of every map."""
    if not isinstance(grid, Sequence) or isinstance(grid, (str, bytes)) or len(grid) != 2:
        raise ValueError(f"grid must be (h, w), got {show(grid)}")
    return as_count("grid", grid[0], 1), as_count("grid", grid[1], 1)


def as_labels(labels: Any, count: int) -> np.ndarray[Any, Any]:
    """[count] integers."""
    try:
        array = torch.as_tensor(labels, device="cpu").numpy()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be {count} integers, got {show(labels)}") from error
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(f"labels must be {count} integers, got {show(array)}")
    return array


def check_sizes(sizes: Any, count: int) -> None:
    """Raise ValueError where sizes are neither None nor [count, 2]."""
    if sizes is not None and (not isinstance(sizes, Tensor) or tuple(sizes.shape) != (count, 2)):
        raise ValueError(f"sizes must be a tensor [{count}, 2] of (height, width), got {show(sizes)}")


def check_maps(maps: Any, count: int, grid: tuple[int, int]) -> None:
    """Raise ValueError where maps are not [count, h, w]."""
    if not isinstance(maps, Tensor) or tuple(maps.shape) != (count, *grid):
        raise ValueError(f"maps must be a tensor [{count}, {grid[0]}, {grid[1]}], got {show(maps)}")


def as_ids(ids: Any) -> Tensor:
    """int64 [B]."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.ndim != 1:
        raise ValueError(f"ids must be an int64 tensor of shape [B], got {show(ids)}")
    return ids


def as_seconds(save_every: Any) -> float:
    """Time between records."""
    return as_number("save_every", save_every, 0, float("inf"), "a number of seconds, at least 0")


def as_metadata(teacher: Any, digest: Any, inputs: Any) -> dict[str, Any]:
    """Texts in the header by name."""
    for name, value in (("teacher", teacher), ("digest", digest)):
        if not isinstance(value, str):
            raise ValueError(f"{name} must be text, got {show(value)}")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise ValueError(f"inputs must be a dict of texts by name, got {show(inputs)}")
    return {
        "teacher": teacher,
        "digest": digest,
        "inputs": {str(name): str(value) for name, value in (inputs or {}).items()},
    }
