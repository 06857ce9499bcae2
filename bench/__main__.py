"""Measure the mix: `python -m bench --help`."""

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

# Modules by command, and what the command does.
COMMANDS = {
    "cpu": ("cpu", "time ours and others on the CPU"),
    "gpu": ("gpu", "time ours and others on a GPU, and sweep the launch shapes"),
    "host": ("host", "time the host's part of a call, without the launch"),
    "loader": ("loader", "time DeiT's training transform by timm and by this package, in a loader"),
    "pipeline": ("pipeline", "count and time timm's whole input pipeline on the device and ours"),
    "growth": ("growth", "time a call on the CPU against batch, image size, grid and classes"),
    "count": ("ptx.count", "count registers, memory accesses and instructions of the compiled kernel"),
    "growth_counts": ("ptx.growth_counts", "count against batch, image size, grid and classes"),
    "simulate": ("ptx.simulate", "simulate the compiled kernel's time on models of an A100 and an H100"),
    "stale": ("stale", "list result files whose measured code has changed since: exit status 1 if any has"),
    "report": ("report", "write the tables of docs/performance.md from result files, or check them"),
}


def module_of(command: str) -> ModuleType:
    """Import the module of a command.

    Raises:
        SystemExit: a package that it needs is not installed.
    """
    try:
        return importlib.import_module(f"bench.{COMMANDS[command][0]}")
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"`python -m bench {command}` needs {error.name}: pip install 'tokenmix_kernels[test]'"
        ) from None


def parser_of(wanted: list[str]) -> argparse.ArgumentParser:
    """The command line, with the options of the wanted commands: importing them all takes seconds."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--all", action="store_true", help="run everything that this machine can run")
    parser.add_argument("--out", dest="folder", type=Path, default=Path("runs/bench"), help="folder of --all's results")
    commands = parser.add_subparsers(dest="command")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in wanted:
            module = module_of(name)
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    return parser


def run_all(folder: Path) -> None:
    """Run all that times something on this machine, one result file for each command: below eight minutes."""
    results = {name: [name, "--out", str(folder / f"{name}.json")] for name in ("cpu", "host", "loader", "growth")}
    if torch.cuda.is_available():
        # Most of the eight minutes are the GPU's.
        results["cpu"] += ["--seconds", "30"]
        results = {"gpu": ["gpu", "--out", str(folder), "--model-seconds", "50", "--sweep-seconds", "110"], **results}
    else:
        print("no GPU: the CPU alone is timed")
    for arguments in results.values():
        print("python -m bench " + " ".join(arguments))
        main(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(given)
    asked = parser.parse_args(given)
    if asked.all:
        run_all(asked.folder)
    elif asked.command:
        asked.run(asked)
    else:
        parser.error("name a command, or --all")


if __name__ == "__main__":
    main()
