"""Going on with a run from one of its checkpoints."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import checkpoint
from .flags import changed_flags
from .run import Progress, Run, say

__all__ = ["resume", "resume_path"]

PARTS = ("args", "world", "data", "progress", "rng", "model", "optimizer", "scheduler", "ema")


def resume_path(args: argparse.Namespace) -> Path | None:
    """The checkpoint that --resume names; with auto the last one of --output, None where there is none."""
    if not args.resume:
        return None
    if args.resume != "auto":
        return Path(args.resume)
    for name in ("last.pt", "previous.pt"):
        if (path := Path(args.output) / name).exists():
            return path
    return None


def read(path: Path) -> dict[str, Any]:
    """Load the checkpoint of a run.

    Raises:
        ValueError: it cannot be read, is damaged or holds no run; the message names the one before where that is good.
    """
    try:
        state = checkpoint.load(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"--resume: {error}{offer(path)}") from error
    missing = [key for key in PARTS if key not in state]
    if missing:
        raise ValueError(
            f"--resume: {path} holds no run (no {missing[0]}): resume from a last.pt, or start from weights with "
            "--init-from"
        )
    return state


def offer(path: Path) -> str:
    """What to do instead of resuming from a checkpoint that cannot be used."""
    previous = path.with_name("previous.pt")
    if path.name != previous.name and previous.is_file():
        try:
            progress = checkpoint.load(previous)["progress"]
        except (ValueError, OSError, KeyError):
            return f"; {previous} cannot be read either: start again with another --output"
        return (
            f"; the checkpoint before it is good: --resume {previous} goes on from epoch {progress['epoch']}, "
            f"step {progress['step']}"
        )
    return ""


def resume(run: Run, path: Path) -> Progress:
    """Load a checkpoint into the run, random states included.

    Raises:
        ValueError: the checkpoint belongs to another run, or cannot be read.
    """
    state = read(path)
    saved, now = state["args"], checkpoint.plain_args(run.args)
    other = changed_flags(saved, now, run.data.stream)
    if state["world"] != run.world:
        other.append(f"{state['world']} process(es) (now {run.world})")
    if other:
        raise ValueError(f"{path} was written with {', '.join(other)}; resume with the same")
    if state["data"] != run.data.digest:
        raise ValueError(f"{path} was written on other data than --data-path {run.args.data_path} holds now")
    progress = Progress(**state["progress"])
    before = saved["epochs"]
    if run.args.epochs < before:
        raise ValueError(f"--epochs must be at least the run's {before}, got {run.args.epochs}")
    try:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        if run.ema:
            run.ema.module.load_state_dict(state["ema"])
        if run.args.epochs == before or run.args.sched == "plateau":
            run.scheduler.load_state_dict(state["scheduler"])
        checkpoint.set_rng_state(state["rng"][run.rank], run.device)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this run: {error}") from error
    say(run, f"resumed {path}: epoch {progress.epoch}, step {progress.step}")
    if run.args.epochs > before:
        extend(run, progress, state)
    # What is not last.pt, or is damaged, must not take the place of the good one before it.
    run.keep_previous = path == Path(run.args.output) / "last.pt"
    return progress


def extend(run: Run, progress: Progress, state: Mapping[str, Any]) -> None:
    """Go on for more epochs than the run was planned for: its schedule is that of a run of the new length from here."""
    old = run.optimizer.param_groups[0]["lr"]
    # Schedules are functions of the epoch or update, up to the one that follows the metric, which has no end.
    if run.args.sched != "plateau":
        if run.args.sched_on_updates:
            run.scheduler.step_update(progress.updates)
        else:
            run.scheduler.step(progress.epoch)
    new = run.optimizer.param_groups[0]["lr"]
    say(
        run,
        f"--epochs {state['args']['epochs']} -> {run.args.epochs}: the {run.args.sched} schedule is stretched over "
        f"{run.args.epochs} epochs and goes on at learning rate {new:.3g} (was {old:.3g}); epochs that are done keep "
        "theirs, so this is not the run that --epochs would have given from the start",
    )
