"""List the committed result files, and what has changed since in the code that each of them measured.

A result file records a hash of each source file behind its figures; comments, docstrings and layout do not count. A
file that records none is compared with the sources of the commit that it came with, where git has that commit. Changed
sources say that a figure may have changed. Whether machine code has: `--ptxsim DIR` compiles what was simulated.
"""

import argparse
import io
import json
import subprocess
import tarfile
import textwrap
from pathlib import Path
from typing import Any

from .fingerprint import MEASURED, ROOT, counts, fingerprint, sources_in

__all__ = ["add_arguments", "changes", "main", "state_of"]


def git(root: Path, *arguments: str) -> bytes | None:
    """What a git command prints; None where it fails, or there is no git."""
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None


def commit_of(root: Path, path: Path) -> tuple[str, str] | None:
    """(hash, day) of the commit that a file came with; None if it differs from that, or git does not know."""
    whole = git(root, "rev-parse", "--is-shallow-repository") == b"false\n"
    if not whole or git(root, "diff", "--quiet", "HEAD", "--", str(path)) is None:
        return None
    found = (git(root, "log", "-1", "--format=%h %cs", "--", str(path)) or b"").decode().split()
    return (found[0], found[1]) if found else None


def sources_at(root: Path, commit: str) -> dict[str, str]:
    """As `sources_in`, of a commit."""
    archive = git(root, "archive", commit) or b""
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        found = {one.name: files.extractfile(one) for one in files if one.isfile() and counts(one.name)}
        return {name: file.read().decode() for name, file in found.items() if file}


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Paths whose hashes differ, or that one of the two lacks."""
    return sorted(path for path in before.keys() | now.keys() if before.get(path) != now.get(path))


def state_of(root: Path, path: Path, record: dict[str, Any], now: dict[str, str]) -> tuple[str, list[str] | None]:
    """When a result file was measured, and what has changed in its code since: None if that is not known.

    Args:
        root: of the project.
        path: of the file, from the root.
        record: its contents.
        now: the sources to compare with, as `sources_in` gives them.
    """
    kind = record["kind"]
    if kind not in MEASURED:
        return "by several versions", None
    if "measured" in record:
        known = record["measured"]
        return (known["day"], changes(known["sources"], fingerprint(kind, now))) if known else ("in parts", None)
    commit = commit_of(root, path)
    if commit is None:
        return "no fingerprint", None
    before = fingerprint(kind, sources_at(root, commit[0]))
    return f"{commit[1]}, commit {commit[0]}", changes(before, fingerprint(kind, now))


def by_folder(paths: list[str]) -> str:
    """Paths in order, each folder named once."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder and f"{folder}/ ", []).append(name)
    return "; ".join(folder + ", ".join(names) for folder, names in folders.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ptxsim", type=Path, metavar="DIR", help="compare the machine code of simulated rows")


def main(asked: argparse.Namespace) -> None:
    now = sources_in(ROOT)
    stale = 0
    for path in sorted(path for name in ("bench", "train") for path in (ROOT / name / "results").glob("*.json")):
        record = json.loads(path.read_text())
        when, changed = state_of(ROOT, path.relative_to(ROOT), record, now)
        if asked.ptxsim and record["kind"] == "simulated":
            changed = recompiled(asked.ptxsim, path)
        stale += bool(changed)
        state = "unknown" if changed is None else "stale" if changed else "current"
        print(f"{path.relative_to(ROOT)!s:<34} {state:<8} {when:<28} {record['command']}")
        if changed:
            print(textwrap.indent(textwrap.fill(f"changed: {by_folder(changed)}", 112), " " * 4))
    if stale:
        raise SystemExit(f"{stale} stale: run their commands again")


def recompiled(folder: Path, path: Path) -> list[str]:
    """Simulated rows whose machine code is another today, compiled by the simulator of a folder."""
    from .ptx.simulate import changed_rows

    return changed_rows(folder, path)
