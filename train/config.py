"""Arguments of a run: the command line's over those of a recipe over the parser's defaults."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .mixers import MIXERS, check
from .parser import RECIPES, build_parser, recipe_names
from .values import checkpoint_flags


def load_recipe(name: str) -> dict[str, object]:
    """A recipe by name or path, as a dict of flag defaults ("_" keys are comments).

    Raises:
        ValueError: no such recipe.
    """
    path = Path(name) if name.endswith(".json") else RECIPES / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"--recipe must be one of {', '.join(recipe_names())} or a .json file, got {name!r}")
    recipe: dict[str, object] = json.loads(path.read_text())
    return {key.replace("-", "_"): value for key, value in recipe.items() if not key.startswith("_")}


def default_output(args: argparse.Namespace) -> str:
    """Where a run is written that does not say."""
    return f"runs/{Path(args.recipe).stem if args.recipe else args.model}"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments from the command line over those of the recipe over the defaults."""
    parser = build_parser()
    recipe_name = parser.parse_known_args(argv)[0].recipe
    recipe: dict[str, object] = {}
    if recipe_name:
        try:
            recipe = load_recipe(recipe_name)
        except ValueError as error:
            parser.error(str(error))
        unknown = set(recipe) - set(vars(parser.parse_args([])))
        if unknown:
            parser.error(f"recipe {recipe_name} sets unknown flags: {', '.join(sorted(unknown))}")
    first = parser.parse_known_args(argv)[0]
    if first.eval and first.resume:
        output = first.output or recipe.get("output") or default_output(first)
        path = Path(f"{output}/last.pt" if first.resume == "auto" else first.resume)
        parser.set_defaults(**checkpoint_flags(parser, path))
    parser.set_defaults(**recipe)
    mixer = parser.parse_known_args(argv)[0].mixer
    if mixer not in MIXERS:  # of a recipe: argparse looks at the command line alone
        parser.error(f"--mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
    # A recipe that names the mixer has set what it wants of the mixer's numbers, another one has set another mixer's.
    named = set(recipe) if recipe.get("mixer") == mixer else set()
    parser.set_defaults(**{name: value for name, value in MIXERS[mixer].flags.items() if name not in named})
    args = parser.parse_args(argv)
    if args.output is None:
        args.output = default_output(args)
    if args.cache is None:
        args.cache = "runs/cache"
    if args.eval and not args.resume:
        parser.error("--eval needs the checkpoint to evaluate: --resume FILE")
    for name in ("batch_size", "accumulate", "epochs", "log_every", "eval_every", "save_epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("mixup_off_epoch", "save_every", "max_steps", "num_workers", "threads"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(args, name)}")
    if args.in_memory is not None and args.in_memory < 1:
        parser.error(f"--in-memory must be at least 1, got {args.in_memory}")
    try:
        check(args, given(argv))
    except ValueError as error:
        parser.error(str(error))
    return args


def given(argv: Sequence[str] | None) -> dict[str, object]:
    """The arguments that stand on the command line itself."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))
