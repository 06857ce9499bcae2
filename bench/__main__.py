"""The benchmark's command line: `python -m bench --help`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import torch

COMMANDS = {
    "cpu": "time the registry on the CPU",
    "gpu": "time the registry on a GPU, and sweep the launch shapes",
    "host": "time the host's part of a call, the launch stubbed out",
    "loader": "time DeiT's training transform by timm and by this package, in a loader",
    "growth": "time a call on the CPU against batch, image size, grid and classes",
    "count": "count registers, memory accesses and instructions of the compiled kernel in a PTX simulator",
    "simulate": "simulate the compiled kernel's time on models of an A100 and an H100",
    "growth_counts": "count against batch, image size, grid and classes in a PTX simulator",
    "table": "print result files as Markdown tables",
}
MODULES = {"simulate": "ptx.simulate"}


def run_all(parser: argparse.ArgumentParser, folder: Path) -> None:
    """Everything that this machine has, one result file for each command: below eight minutes."""
    results = {name: [name, "--out", str(folder / f"{name}.json")] for name in ("cpu", "host", "loader", "growth")}
    if torch.cuda.is_available():
        # Most of the eight minutes are the GPU's.
        results["cpu"] += ["--seconds", "30"]
        results = {"gpu": ["gpu", "--out", str(folder), "--sweep-seconds", "150"], **results}
    else:
        print("no GPU: timed on the CPU alone")
    for arguments in results.values():
        print("python -m bench " + " ".join(arguments))
        asked = parser.parse_args(given)
        asked.run(asked)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--all", action="store_true", help="run everything that this machine has")
    parser.add_argument("--out", dest="folder", type=Path, default=Path("runs/bench"), help="folder of --all's results")
    commands = parser.add_subparsers(dest="command")
    given = sys.argv[1:] if arguments is None else arguments
    for name, text in COMMANDS.items():
        if name not in given and "--all" not in given:  # not imported: some take seconds
            commands.add_parser(name, help=text)
            continue
        module = importlib.import_module(f"bench.{MODULES.get(name, name)}")
        command = commands.add_parser(name, help=text, description=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    asked = parser.parse_args(arguments)
    if asked.all:
        run_all(parser, asked.folder)
    elif asked.command:
        asked.run(asked)
    else:
        parser.error("name a command, or --all")


if __name__ == "__main__":
    main()
