"""Command line of the trainer: `python -m train --help`."""

import sys

EXTRAS = ("PIL", "matplotlib", "safetensors", "timm", "torchvision", "tqdm")


def main() -> int:
    # Imported here, so that a package that is missing can be named in a sentence.
    try:
        from .config import parse
        from .guard import NonFiniteLoss, replay
        from .loop import train
        from .profile_mixers import profile_mixers
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        print(f'train: error: {error}: pip install "tokenmix_kernels[train]"', file=sys.stderr)
        return 2
    args = parse()
    try:
        if args.replay:
            replay(args)
        elif args.profile_mixers:
            profile_mixers(args)
        else:
            train(args)
    except NonFiniteLoss as error:
        print(error, file=sys.stderr)
        return 3
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        print(f"train: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
