"""Import of the optional libraries, with one clear sentence when one of them is missing."""

import importlib
from types import ModuleType

__all__ = ["require"]

# Modules that are not called as their package is.
PACKAGES = {"PIL": "Pillow"}


def require(module: str, *, extra: str = "maps") -> ModuleType:
    """Import a module of the optional dependencies.

    Args:
        module: dotted name of the module, e.g. ``"torchvision.datasets"``.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: the library is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        library = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != library:
            raise  # the library is installed, something that it needs itself is not
        package = PACKAGES.get(library, library)
        raise ImportError(
            f"{package} is needed for this and is not installed: pip install 'tokenmix_kernels[{extra}]'"
        ) from error
