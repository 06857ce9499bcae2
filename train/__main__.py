"""Command line of the trainer: `python -m train --help`."""

from __future__ import annotations

import sys

from .config import parse
from .guard import NonFiniteLoss, replay
from .loop import train


def main() -> int:
    args = parse()
    try:
        if args.replay:
            replay(args)
        elif args.profile_mixers:
            from .profile_mixers import profile_mixers

            profile_mixers(args)
        else:
            train(args)
    except NonFiniteLoss as error:
        print(error, file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        if args.traceback:
            raise
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
