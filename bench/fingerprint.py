"""Fingerprints of measured code: a hash of each source file that a measurement runs, for result files to record."""

import ast
import functools
import hashlib
import time
from pathlib import Path
from typing import Any, NamedTuple

import tokenmix_kernels

__all__ = ["MEASURED", "ROOT", "counts", "fingerprint", "measured", "sources_in"]

ROOT = Path(__file__).parents[1]
SIMULATED = "bench/results/simulated.json"
# What writes results, and the list of the public names with the version: neither is measured.
NEVER = ("bench/machine.py", "bench/fingerprint.py", "tokenmix_kernels/__init__.py")
KERNELS, REFERENCE = "tokenmix_kernels/kernels/", "tokenmix_kernels/reference/"
# What looks for errors in arguments, which a counted launch has none of.
CHECKS = ("tokenmix_kernels/arguments.py", "tokenmix_kernels/values.py")
# Of the kernels, what runs on a GPU alone.
ON_THE_GPU = tuple(f"{KERNELS}{name}.py" for name in ("draw", "evidence", "look_ahead", "pixels", "targets", "window"))


class Measured(NamedTuple):
    """The code behind a result file: what its module imports, directly or not.

    Attributes:
        entry: path of the module.
        without: paths, or beginnings of paths, of what is imported and neither run nor compiled for the figures.
        also: a result file that figures are taken from.
    """

    entry: str
    without: tuple[str, ...] = ()
    also: str | None = None


# By the `kind` of a result file. The runs of `bench.study` are not here: training was spread over many versions.
MEASURED = {
    "cpu": Measured("bench/cpu.py", (KERNELS,)),
    "growth": Measured("bench/growth.py", (KERNELS,)),
    "pipeline": Measured("bench/pipeline.py", (KERNELS,), also=SIMULATED),
    "loader": Measured("bench/loader.py", (KERNELS,)),
    "fidelity": Measured("bench/fidelity.py", (KERNELS,)),
    "evidence-cost": Measured("bench/evidence_cost.py", (KERNELS,)),
    "mixers": Measured("train/profile_mixers.py", (KERNELS,)),
    "host": Measured("bench/host.py", (REFERENCE, *ON_THE_GPU)),
    "gpu": Measured("bench/gpu.py", (REFERENCE,), also=SIMULATED),
    "counts": Measured("bench/ptx/count.py", (REFERENCE, *CHECKS)),
    "growth_counts": Measured("bench/ptx/growth_counts.py", (REFERENCE, *CHECKS, "bench/baselines.py")),
    "simulated": Measured("bench/ptx/simulate.py", (REFERENCE, *CHECKS)),
}


def counts(path: str) -> bool:
    """Whether a file can be behind a figure: the project's Python, and the result file that others read."""
    return path == SIMULATED or (path.startswith(("bench/", "tokenmix_kernels/", "train/")) and path.endswith(".py"))


def sources_in(root: Path) -> dict[str, str]:
    """The files that count, by path from the root."""
    paths = (path for name in ("bench", "tokenmix_kernels", "train") for path in (root / name).rglob("*.*"))
    return {name: path.read_text() for path in paths if counts(name := path.relative_to(root).as_posix())}


@functools.lru_cache(1024)
def parsed(source: str) -> ast.Module:
    """The syntax tree of a file without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return tree


def shape(node: Any) -> Any:
    """A syntax tree as nested tuples; what is empty is left out, of which Pythons show different parts."""
    if isinstance(node, ast.AST):
        fields = [(name, shape(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return type(node).__name__, *fields
    return [shape(one) for one in node] if isinstance(node, list) else repr(node)


@functools.lru_cache(1024)
def short_hash(path: str, source: str) -> str:
    """A hash of a file: of Python, comments, docstrings and layout do not count."""
    text = repr(shape(parsed(source))) if path.endswith(".py") else source
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def imported(path: str, sources: dict[str, str]) -> set[str]:
    """The project's files that a file imports."""

    def file_of(module: str) -> str | None:
        places = (f"{module}.py", f"{module}/__init__.py")
        return next((place for place in places if place in sources), None)

    def base_of(place: str, node: ast.ImportFrom) -> str:
        above = place.split("/")[: -node.level] if node.level else []
        return "/".join(above + (node.module.split(".") if node.module else []))

    def origin(module: str, name: str) -> str | None:
        """Where a name comes from: not from a package that only hands it on."""
        place = file_of(f"{module}/{name}") or file_of(module)
        if place == f"{module}/__init__.py":
            for node in parsed(sources[place]).body:
                if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
                    return origin(base_of(place, node), name)
        return place

    found: set[str | None] = set()
    for node in ast.walk(parsed(sources[path])):
        if isinstance(node, ast.Import):
            found |= {file_of(one.name.replace(".", "/")) for one in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {origin(base_of(path, node), one.name) for one in node.names}
    return {place for place in found if place}


def fingerprint(kind: str, sources: dict[str, str]) -> dict[str, str]:
    """Hashes of what a result file of a kind measures, by path."""
    entry, without, also = MEASURED[kind]
    found, waiting = set(), {entry} & sources.keys()
    while waiting:
        found |= waiting
        reached = set().union(*(imported(path, sources) for path in waiting))
        waiting = {path for path in reached - found if not path.startswith((*NEVER, *without))}
    found |= {also} & sources.keys() if also else set()
    return {path: short_hash(path, sources[path]) for path in sorted(found)}


def sources_of_this_process() -> dict[str, str]:
    """As `sources_in`, with the package that is imported: an installed one may stand before that of a checkout."""
    package = sources_in(Path(tokenmix_kernels.__file__).parents[1])
    return {
        **sources_in(ROOT),
        **{path: text for path, text in package.items() if path.startswith("tokenmix_kernels/")},
    }


# Read here, at the start of a process: files that are edited while a measurement runs are not what it measures.
RUN = sources_of_this_process()


@functools.cache
def measured(kind: str) -> dict[str, Any]:
    """What a result file of a kind records: the day, and the fingerprint of the code that this process runs."""
    return {"day": time.strftime("%Y-%m-%d"), "sources": fingerprint(kind, RUN)}
