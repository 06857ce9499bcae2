"""The benchmark's command line: `python -m bench --help`."""

from __future__ import annotations

import argparse
import importlib

COMMANDS = {
    "cpu": "time the registry on the CPU",
    "table": "print result files as Markdown tables",
    "host": "time a call on the host with the launch stubbed out, beside a bare launch",
    "count": "count registers, memory accesses and instructions of the compiled kernel in a PTX simulator",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"bench.{name}")
        command = commands.add_parser(name, help=text, description=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    asked = parser.parse_args(arguments)
    asked.run(asked)


if __name__ == "__main__":
    main()
