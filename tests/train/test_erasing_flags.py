"""Random erasing of the trainer: in the launch that mixes, and nowhere else."""

from pathlib import Path

import pytest
import torch
from train_helpers import make_folder, tiny

from train.config import parse
from train.data import EpochLoader, load_data
from train.loop import train
from train.model import make_mixer, make_model

MODES = {"const": lambda values: (values == 0).all(), "pixel": lambda values: values.std() > 0.5}


def arguments(tmp_path: Path, *more: str) -> list[str]:
    folder = tmp_path / "images"
    if not folder.exists():
        make_folder(folder, 3, 6, 2)
    return tiny(folder, tmp_path / "run", "--aa", "none", "--color-jitter", "0", "--no-repeated-aug", *more)


@pytest.mark.parametrize("mode", MODES)
def test_images_are_erased_where_they_are_mixed_as_the_flags_say(tmp_path: Path, mode: str) -> None:
    plain, erasing = (
        parse(arguments(tmp_path, "--mixer", "none", *flags))
        for flags in (("--reprob", "0"), ("--reprob", "1", "--remode", mode, "--recount", "3"))
    )
    data = load_data(erasing)
    mixers = [make_mixer(args, data, make_model(args, len(data.classes))) for args in (plain, erasing)]
    assert mixers[1].settings.erase_count == (1, 3)
    labels = torch.arange(8) % 3
    images = torch.full((8, 3, erasing.input_size, erasing.input_size), 200, dtype=torch.uint8)
    expected, erased = (mix(images, labels, seed=3)[0] for mix in mixers)
    gone = (erased != expected).any(1)
    share = gone.float().mean((1, 2))
    assert (share > 0.01).all() and (share < 0.4).all() and len(set(share.tolist())) > 4
    assert MODES[mode](erased.movedim(1, -1)[gone])
    assert torch.equal(mixers[1].eval()(images, labels, seed=3)[0], expected)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--reprob", "1.5"), "--reprob must be a probability in [0, 1], got 1.5"),
        (("--recount", "0"), "--recount must be in [1, 16], got 0"),
        (("--recount", "17"), "--recount must be in [1, 16], got 17"),
        (("--reprob", "0", "--remode", "rand"), "--remode is for --reprob above 0"),
        (("--reprob", "0", "--recount", "2"), "--recount is for --reprob above 0"),
    ],
)
def test_flags_out_of_range_or_without_effect_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    with pytest.raises(SystemExit):
        parse(arguments(tmp_path, *flags))
    assert said in capsys.readouterr().err


def test_the_loader_erases_nothing(tmp_path: Path) -> None:
    batches = []
    for share in ("0", "1"):
        args = parse(arguments(tmp_path, "--reprob", share))
        batches.append(next(iter(EpochLoader(load_data(args), args, 0, 1).epoch(0))).images)
    assert torch.equal(*batches)


def test_a_run_that_erases_repeats_itself(tmp_path: Path) -> None:
    losses = []
    for output in ("one", "two"):
        args = parse([*arguments(tmp_path, "--reprob", "0.5", "--epochs", "1"), "--output", str(tmp_path / output)])
        losses.append([record["train_loss"] for record in train(args)])
    assert losses[0] == losses[1] != []
