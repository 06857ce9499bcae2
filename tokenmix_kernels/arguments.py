"""Plain values from what users pass: numbers of Python or NumPy, pairs, devices; and the errors where they are not."""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_count", "as_device", "as_grid", "as_number", "as_numbers", "as_offset", "as_patch_size", "as_seed_number",
    "names", "one_of", "shown",
]  # fmt: skip


def names(*dtypes: torch.dtype) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def shown(value: Any) -> str:
    """A wrong value in a message of one line."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {names(value.dtype)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def as_number(name: str, value: Any, low: float, high: float, what: str) -> float:
    """A Python float from a number of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        raise ValueError(f"{name} must be {what}, got {shown(value)}")
    return float(value)


def as_count(name: str, value: Any, low: int) -> int:
    """A Python int from a whole number of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not low <= int(value) < 2**31:
        raise ValueError(f"{name} must be a whole number of at least {low}, below 2**31, got {shown(value)}")
    return int(value)


def as_numbers(name: str, values: Any) -> tuple[float, ...]:
    """A sequence, array or tensor of numbers as a tuple; nothing where it is None."""
    if values is None:
        return ()
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be a sequence of numbers, got {shown(values)}") from error


def as_patch_size(value: Any) -> int:
    """A side from a number or a pair of equal numbers, as timm's models have it."""
    if isinstance(value, (tuple, list)):
        if len(value) != 2 or value[0] != value[1]:
            raise ValueError(f"patch_size must be one side, or two equal ones, got {shown(value)}")
        value = value[0]
    return as_count("patch_size", value, 1)


def as_grid(value: Any) -> tuple[int, int]:
    """(Gh, Gw) from a pair of whole numbers."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"grid must be a pair of whole numbers, got {shown(value)}")
    return as_count("grid", value[0], 0), as_count("grid", value[1], 0)


def as_device(value: Any) -> torch.device:
    """A device from one or its name; 'cuda' is the current one, with its index, as tensors on it have it."""
    try:
        if not isinstance(value, (str, torch.device)):
            raise TypeError
        device = torch.device(value)
    except (TypeError, RuntimeError, ValueError) as error:
        raise ValueError(f"device must be a torch.device or its name, got {shown(value)}") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def as_offset(value: Any) -> Any:
    """A sample offset as an int; a symbolic integer of a traced graph is left as it is."""
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**62:
        raise TypeError(f"sample_offset must be a whole number in [0, 2**62), got {shown(value)}")
    return int(value)


def as_seed_number(value: Any) -> int:
    """A 64-bit integer of Python or NumPy."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not -(2**63) <= int(value) < 2**63:
        raise ValueError(f"seed must be a 64-bit integer or a 0-d int64 tensor, got {shown(value)}")
    return int(value)


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {shown(value)}")
