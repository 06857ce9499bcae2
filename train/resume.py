"""Going on with a run from one of its checkpoints."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import checkpoint
from .data import EpochOrder
from .flags import PER_PROCESS, changed_flags
from .run import Progress, Run, say
from .step import mixing_seed, seed_all

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
    moved = state["world"] != run.world  # to another number of processes
    other = changed_flags(saved, now, run.data.stream, PER_PROCESS if moved and not run.data.stream else ())
    if moved and run.data.stream:
        other.append(f"{state['world']} process(es) (now {run.world}), on which the order of a stream depends")
    if other:
        raise ValueError(f"{path} was written with {', '.join(other)}; resume with the same")
    if state["data"] != run.data.digest:
        raise ValueError(f"{path} was written on other data than --data-path {run.args.data_path} holds now")
    progress = Progress(**state["progress"])
    if moved:
        share_out(run, progress, state)
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
        if moved:
            seed_all(mixing_seed(run.args.seed, -2 - progress.updates, run.rank))
        else:
            checkpoint.set_rng_state(state["rng"][run.rank], run.device)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not fit this run: {error}") from error
    say(run, f"resumed {path}: epoch {progress.epoch}, step {progress.step}")
    if run.args.epochs > before:
        extend(run, progress, state)
    # What is not last.pt, or is damaged, must not take the place of the good one before it.
    run.keep_previous = path == Path(run.args.output) / "last.pt"
    return progress


def share_out(run: Run, progress: Progress, state: Mapping[str, Any]) -> None:
    """Go on with another number of processes: an update has the images that it would have had.

    The samples of an epoch have one order, whatever the number of processes, and each takes its share of it. So as many
    samples as have been used are skipped, and updates follow that have as many as before.

    Raises:
        ValueError: an update would have another number of images, or an epoch another number of updates.
    """
    saved, args = state["args"], run.args
    before = saved["batch_size"] * saved["accumulate"] * state["world"]
    images = args.batch_size * args.accumulate * run.world
    if images != before:
        fitting, rest = divmod(before, args.accumulate * run.world)
        raise ValueError(
            f"the run has updates of {before} images (--batch-size {saved['batch_size']} --accumulate "
            f"{saved['accumulate']} on {state['world']} process(es)), they would have {images} (--batch-size "
            f"{args.batch_size} --accumulate {args.accumulate} on {run.world}): "
            + (f"use --batch-size {fitting}" if not rest else "use a number of processes that divides them")
        )
    order = EpochOrder(run.data, argparse.Namespace(**{**vars(args), **saved}), 0, state["world"])
    steps = len(order) // saved["batch_size"]
    updates = (min(steps, saved["max_steps"]) if saved["max_steps"] else steps) // saved["accumulate"]
    now = run.steps_per_epoch() // args.accumulate
    if now != updates:
        raise ValueError(
            f"an epoch of the run has {updates} updates, on {run.world} process(es) it would have {now}"
            + (f": --max-steps was {saved['max_steps']}, of steps of other sizes" if saved["max_steps"] else "")
        )
    # Saved between updates: whole steps here too.
    used = progress.step * saved["batch_size"] * state["world"]
    progress.step = used // (args.batch_size * run.world)
    progress.loss_sum *= args.accumulate / saved["accumulate"]  # means of as many batches as there are steps
    say(
        run,
        f"{state['world']} -> {run.world} process(es): the images of every update are those of the run, and their "
        "augmentation; which of them are mixed with each other, masks and dropout are drawn anew",
    )


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
