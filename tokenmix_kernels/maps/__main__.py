"""Command line for map banks: build one with a teacher, convert published label maps, inspect one.

    python -m tokenmix_kernels.maps build train/ --model resnet50 --out train.bank
    torchrun --nproc-per-node 8 -m tokenmix_kernels.maps build train/ --model resnet50 --out train.bank
    python -m tokenmix_kernels.maps convert label_top5_train_nfnet/ --data train/ --out train.bank
    python -m tokenmix_kernels.maps inspect train.bank --data train/

`build` and `convert` can be killed at any time; the same command continues where they stopped.
"""

import argparse
import re
import sys
from collections.abc import Sequence

import torch

from . import build, convert, inspect

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 1 after an error, which is printed as one sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenmix_kernels.maps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (build, convert, inspect):
        command.add_parser(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except torch.OutOfMemoryError as error:
        print(f"error: {one_line(error)}; try a smaller --batch-size", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def one_line(error: Exception) -> str:
    """The message of an error. One from a loader's worker comes with its traceback: the last line is the message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "Original Traceback" in str(error):
        return re.sub(r"^[\w.]*(Error|Exception): ", "", lines[-1])
    return " ".join(line.strip() for line in lines)


if __name__ == "__main__":
    sys.exit(main())
