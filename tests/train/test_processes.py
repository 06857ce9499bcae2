"""A run goes on with another number of processes: every update has the images that it would have had."""

from pathlib import Path

import pytest
import torch
from train_helpers import finish_all, launch, make_folder, tiny
from train_workers import train_and_stop, train_quietly

from train import checkpoint
from train.config import parse
from train.loop import train

# What depends on the images of an update alone: no masks, nothing erased, no dropout. A large step, so that other
# images are seen.
PLAIN = (
    "--mixer", "none", "--reprob", "0", "--drop-path", "0", "--opt", "sgd", "--lr", "0.05", "--warmup-epochs", "0",
    "--save-every", "2", "--clip-grad", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=4, train=12, val=3)


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes in `whole`, and what its first two steps left in `stopped/last.pt`."""
    root = tmp_path_factory.mktemp("runs")
    for name, target in (("stopped", train_and_stop), ("whole", train_quietly)):
        finish_all(launch(target, tiny(folder, root / name, *PLAIN, "--batch-size", "4"), 2))
    assert checkpoint.load(root / "stopped" / "last.pt")["progress"]["step"] == 2
    return root


@pytest.mark.parametrize(
    ("processes", "batch", "accumulate"), [(1, 8, 1), (1, 4, 2), (4, 2, 1)], ids=["1", "1-in-two-steps", "4"]
)
def test_other_processes_go_on_with_the_images_of_the_run(
    folder: Path, runs: Path, tmp_path: Path, processes: int, batch: int, accumulate: int
) -> None:
    shares = ["--batch-size", str(batch), "--accumulate", str(accumulate)]
    arguments = [*tiny(folder, tmp_path, *PLAIN, *shares), "--resume", str(runs / "stopped" / "last.pt")]
    if processes == 1:
        train(parse(arguments))
    else:
        finish_all(launch(train_quietly, arguments, processes))
    ours, theirs, early = (checkpoint.load(path / "last.pt") for path in (tmp_path, runs / "whole", runs / "stopped"))
    assert ours["world"] == processes and ours["progress"]["updates"] == theirs["progress"]["updates"] == 12
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, rtol=0, atol=1e-5)
    moved = [(theirs["model"][key] - value).abs().max() for key, value in early["model"].items()]
    assert max(moved) > 1e-2, "nothing was learned in the rest of the run"
    losses = [[line["val_loss"] for line in state["progress"]["history"]] for state in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # The first process's share of the images: others, but not on average far from it.
    first = [state["progress"]["history"][0]["train_loss"] for state in (ours, theirs)]
    assert first[0] == pytest.approx(first[1], rel=0.1)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch-size", "4"], r"updates of 8 images .* they would have 4 .* use --batch-size 8"),
        (["--batch-size", "1", "--accumulate", "3"], r"use a number of processes that divides them"),
        (["--batch-size", "8", "--lr", "0.1"], r"--lr 0\.05 \(now 0\.1\); resume with the same"),
        (["--batch-size", "4", "--accumulate", "2", "--max-steps", "2"], r"has 6 updates, .* it would have 1"),
    ],
)  # fmt: skip
def test_updates_of_another_size_are_refused(
    folder: Path, runs: Path, tmp_path: Path, flags: list[str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        train(parse([*tiny(folder, tmp_path, *PLAIN, *flags), "--resume", str(runs / "stopped" / "last.pt")]))


def test_random_states_of_other_processes_differ(folder: Path, runs: Path, tmp_path: Path) -> None:
    """Dropout must be drawn anew on every process, whether or not the run had as many before."""
    arguments = [*tiny(folder, tmp_path, *PLAIN, "--batch-size", "2"), "--resume", str(runs / "stopped" / "last.pt")]
    finish_all(launch(train_and_stop, arguments, 4))
    states = [state["torch"].numpy().tobytes() for state in checkpoint.load(tmp_path / "last.pt")["rng"]]
    before = [state["torch"].numpy().tobytes() for state in checkpoint.load(runs / "stopped" / "last.pt")["rng"]]
    assert len({*states, *before}) == 6
