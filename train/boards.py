"""Boards that a run's records are shown on: TensorBoard and Weights & Biases, beside the files in the output folder."""

import argparse
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from . import checkpoint

__all__ = ["Boards", "check_boards"]

Record = Mapping[str, Any]


class Board(Protocol):
    def write(self, record: Record) -> None:
        """Show the record of an epoch."""

    def close(self, failed: bool) -> None:
        """The run has ended."""


def load(flag: str, package: str, module: str, needed: str) -> Any:
    """An optional package.

    Raises:
        ValueError: it is not installed. A folder of its name, as W&B leaves them behind, is no package.
    """
    try:
        found = importlib.import_module(module)
        if hasattr(found, needed):
            return found
    except ImportError:
        pass
    raise ValueError(f"{flag} needs the package {package}: pip install 'tokenmix_kernels[{package}]'")


def load_tensorboard() -> Any:
    return load("--tensorboard", "tensorboard", "torch.utils.tensorboard", "SummaryWriter")


def load_wandb() -> Any:
    return load("--log-wandb", "wandb", "wandb", "init")


def check_boards(args: argparse.Namespace) -> None:
    """Refuse a board before the run whose package is missing.

    Raises:
        ValueError: a package is not installed.
    """
    if args.tensorboard:
        load_tensorboard()
    if args.log_wandb:
        load_wandb()


class TensorBoard:
    """Scalars by epoch, in event files in the output folder."""

    def __init__(self, output: str, history: Sequence[Record]) -> None:
        # What earlier calls wrote is hidden: the records are all that is known of them.
        self.writer = load_tensorboard().SummaryWriter(output, purge_step=0 if history else None)
        for record in history:
            self.write(record)

    def write(self, record: Record) -> None:
        for key, value in record.items():
            self.writer.add_scalar(key, value, record["epoch"])

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases whose steps are epochs.

    Attributes:
        id: of the run there.
    """

    def __init__(self, args: argparse.Namespace, history: Sequence[Record], known: str | None) -> None:
        wandb = load_wandb()
        try:
            self.run = wandb.init(
                project=args.wandb_project,
                name=args.wandb_name or Path(args.output).name,
                tags=list(args.wandb_tags) or None,
                config=checkpoint.plain_args(args),
                dir=args.output,
                id=args.wandb_resume_id or known,
                resume="must" if args.wandb_resume_id else "allow",
            )
        except Exception as error:  # of many kinds: no login, no network, a service that does not start
            raise ValueError(
                f"--log-wandb: the run cannot be made: {error}; log in with `wandb login`, or set WANDB_MODE=offline "
                "and send it later with `wandb sync`"
            ) from error
        self.id: str = self.run.id
        # A kill may come after last.pt is written and before the epoch is shown, so the last one may be missing.
        for record in history[-1:] if known == self.id else history:
            if record["epoch"] >= self.run.step:
                self.write(record)

    def write(self, record: Record) -> None:
        self.run.log(dict(record), step=record["epoch"])

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Boards:
    """The boards that --tensorboard and --log-wandb ask for, closed at the end of a `with`.

    Args:
        args: of the run.
        history: records of the epochs that are done.
        wandb_id: of the W&B run that this one has had so far.

    Attributes:
        wandb_id: of the W&B run that this one has from now on.
    """

    def __init__(self, args: argparse.Namespace, history: Sequence[Record] = (), wandb_id: str | None = None) -> None:
        self.boards: list[Board] = []
        self.wandb_id = wandb_id
        if args.log_wandb:
            board = WandB(args, history, wandb_id)
            self.boards.append(board)
            self.wandb_id = board.id
        if args.tensorboard:
            self.boards.append(TensorBoard(args.output, history))

    def write(self, record: Record) -> None:
        """Show the record of an epoch, a line of metrics.jsonl."""
        for board in self.boards:
            board.write(record)

    def __enter__(self) -> "Boards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for board in self.boards:
            board.close(failed=error is not None)
