"""Values of flags: from the command line, and from files that are not trusted."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint

__all__ = ["DATA", "OWN", "TIMM_DATA", "checkpoint_flags", "data_name", "json_object", "typed"]

DATA = ("elpv", "digits", "imagefolder", "cifar10", "cifar100")
TIMM_DATA = ("folder", "tar", "torch/NAME", "hfds/NAME", "hfids/NAME", "tfds/NAME", "wds/NAME")


def data_name(name: str) -> str:
    """--data as it is, if it names one of our data sets or, after "timm:", one of timm's readers.

    Raises:
        argparse.ArgumentTypeError: it names neither; timm itself would take what it does not know for a folder.
    """
    known = set(TIMM_DATA) | {""}
    reader, slash, _ = name.removeprefix("timm:").partition("/")
    if name in DATA or (name.startswith("timm:") and (f"{reader.lower()}/NAME" if slash else reader) in known):
        return name
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(DATA)}, timm:{', timm:'.join(TIMM_DATA)}")


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, for flags that take one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f'{text!r} is not JSON, as {{"depth": 6}}: {error}') from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object, as {{"depth": 6}}, got {text!r}')
    return value


# Not taken from a checkpoint: what this call does, where it writes, and on what.
OWN = ("recipe", "output", "resume", "eval", "replay", "profile_mixers", "device", "threads", "amp", "init_from",
       "cache", "compile", "tensorboard", "log_wandb", "wandb_project", "wandb_name", "wandb_tags", "wandb_resume_id",
       "traceback", "picture", "save_every", "save_epochs", "keep_best")  # fmt: skip


def checkpoint_flags(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The flags that a checkpoint was trained with; none where it does not say."""
    if path.suffix == ".safetensors":
        return {}
    try:
        saved = checkpoint.load(path).get("args", {})
    except (ValueError, OSError):
        return {}  # evaluation says what is wrong with it
    return typed(parser, saved, OWN)


def typed(parser: argparse.ArgumentParser, saved: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
    """The arguments in a file that are flags of this trainer, taken as the command line would take them.

    Raises:
        ValueError: one of them has a value that the flag does not take.
    """
    found: dict[str, Any] = {}
    for action in parser._actions:
        name = action.dest
        if name not in saved or name in without or name == "help":
            continue
        value = saved[name]
        kinds = {int: (int,), float: (int, float), json_object: (dict,)}.get(
            action.type,
            (bool,) if action.nargs == 0 else (str,),
        )
        values = value if action.nargs == 2 and isinstance(value, list) else [value]
        right = all(type(item) in kinds for item in values) and (not action.choices or value in action.choices)
        if value is not None and not right:
            raise ValueError(
                f"the file's value of --{name.replace('_', '-')} is not one that the flag takes: {value!r}"
            )
        if value is not None and action.type is data_name:
            data_name(value)
        found[name] = value
    return found
