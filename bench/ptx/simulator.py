"""The PTX simulator, which is no part of this project."""

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Simulator", "load_counter", "load_simulator"]


class Simulator(NamedTuple):
    """The simulator's modules: `ptxsim` runs PTX, `sass` runs machine code, `timing` replays its traces on a card."""

    ptxsim: Any
    sass: Any
    timing: Any


def load_counter(folder: Path) -> Any:
    """Import the module `ptxsim` of a folder.

    Raises:
        SystemExit: the folder has none.
    """
    if not (folder / "ptxsim.py").is_file():
        raise SystemExit(f"--ptxsim must name a folder with a module ptxsim, got {folder}")
    sys.path.insert(0, str(folder))
    return importlib.import_module("ptxsim")


def load_simulator(folder: Path) -> Simulator:
    """Import the modules `ptxsim`, `ptxsim_sass` and `ptxsim_timing` of a folder.

    Raises:
        SystemExit: the folder has none, or numba, which they need, is missing.
    """
    ptxsim = load_counter(folder)
    try:
        return Simulator(ptxsim, importlib.import_module("ptxsim_sass"), importlib.import_module("ptxsim_timing"))
    except ImportError as error:
        raise SystemExit(f"`simulate` needs {error.name}: pip install {error.name}") from None
