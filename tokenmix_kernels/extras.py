"""Import of the optional libraries, with one clear sentence when one of them is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["require"]


def require(module: str, *, extra: str = "maps") -> ModuleType:
    """Import `module`, which belongs to the optional dependencies named `extra`.

    Args:
        module: dotted name of the module, e.g. ``"torchvision.datasets"``.
        extra: the extra of this package that brings it.

    Raises:
        ImportError: the library is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise  # the library is there, something that it needs itself is not
        raise ImportError(
            f"{library} is needed for this and is not installed: pip install 'tokenmix_kernels[{extra}]'"
        ) from error
