"""The PTX simulator, which is no part of this project."""

import functools
import importlib
import operator
import re
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Simulator", "load_counter", "load_simulator", "read_exits", "read_literals"]


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


def read_exits(sass: Any) -> None:
    """Make the executor of machine code read the predicate of `EXIT P0`, which it takes for an `EXIT` of all threads.

    It does read that of `@P1 EXIT`. Both together mean that threads leave for which both hold.
    """
    decode, predicate = sass.decode, sass.pred

    def decode_all(ops: list[Any]) -> list[Any]:
        for op in ops:
            if op.name == "EXIT" and op.args:
                if op.guard is not None:
                    op.args.append(("!" if op.neg else "") + op.guard)
                op.guard, op.neg = "PT", False
        return list(decode(ops))

    def predicate_of(op: Any, name: str, *rest: Any) -> Any:
        if op.name != "EXIT" or not op.args:
            return predicate(op, name, *rest)
        terms = [predicate(op, term) for term in op.args]
        return lambda machine: functools.reduce(operator.and_, [term(machine) for term in terms])

    sass.decode, sass.pred = decode_all, predicate_of


def literals(cubin: bytes) -> bytes:
    """The assembler's own constants, which the code reads as `c[0x2]`: a section of an ELF file of 64 bits."""
    table, width, count, names = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + n * width) for n in range(count)]
    for name, _, _, _, start, size in sections:
        at = sections[names][4] + name
        if cubin[at : cubin.index(0, at)].startswith(b".nv.constant2"):
            return cubin[start : start + size]
    return b""


def read_literals(sass: Any) -> None:
    """Give the executor of machine code the 64-bit literals that it does not read, as immediate numbers."""
    disassemble = sass.disassemble

    def disassemble_all(cubin: bytes) -> list[Any]:
        ops: list[Any] = disassemble(cubin)
        for op in ops:
            found = re.fullmatch(r"c\[0x2\]\[(0x[0-9a-f]+)\]", op.args[-1]) if op.args else None
            if found and op.name == "IMAD" and "WIDE" in op.mods:  # whose last operand has 64 bits
                op.args[-1] = hex(*struct.unpack_from("<Q", literals(cubin), int(found[1], 16)))
        return ops

    sass.disassemble = disassemble_all


@functools.cache
def load_simulator(folder: Path) -> Simulator:
    """Import the modules `ptxsim`, `ptxsim_sass` and `ptxsim_timing` of a folder.

    Raises:
        SystemExit: the folder has none, or numba, which they need, is missing.
    """
    ptxsim = load_counter(folder)
    try:
        sass, timing = importlib.import_module("ptxsim_sass"), importlib.import_module("ptxsim_timing")
    except ImportError as error:
        raise SystemExit(f"`simulate` needs {error.name}: pip install {error.name}") from None
    read_exits(sass)
    read_literals(sass)
    return Simulator(ptxsim, sass, timing)
