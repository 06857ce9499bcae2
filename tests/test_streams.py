"""timm's readers: streams that resume exactly and share out their images, folders that are like --data imagefolder."""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from train_helpers import assert_same_run, finish, make_bank, make_folder, start, tiny

from train import checkpoint
from train.config import parse
from train.data import Batch, EpochLoader, load_data, to_device
from train.guard import NonFiniteLoss, replay
from train.loop import train
from train.run import Progress, save_checkpoint
from train.teacher import make_evidence

CLASSES = 5
TRAIN_SHARDS, VAL_SHARDS = 6, 3
PER_TRAIN_SHARD, PER_VAL_SHARD = 12, 7
# Every pixel of an image is its number: seen in a crop whose colours are left alone.
PLAIN = ["--aa", "none", "--color-jitter", "0", "--reprob", "0", "--no-repeated-aug"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_shards(root: Path, split: str, shards: int, images: int) -> dict[str, object]:
    """Shards of flat images, number n of the split in class n % CLASSES; returns their entry of _info.json."""
    names = [f"{split}-{shard}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        with tarfile.open(root / name, "w") as tar:
            for index in range(images):
                number = shard * images + index
                png = io.BytesIO()
                Image.fromarray(np.full((20, 24, 3), number, dtype=np.uint8)).save(png, "png")
                for suffix, content in (("png", png.getvalue()), ("cls", str(number % CLASSES).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    lengths = [images] * shards
    return {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    splits = {
        "train": write_shards(root, "train", TRAIN_SHARDS, PER_TRAIN_SHARD),
        "validation": write_shards(root, "validation", VAL_SHARDS, PER_VAL_SHARD),
    }
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


def stream(shards: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a run on the shards that takes seconds."""
    extra = ["--data", "timm:wds/tiny", "--num-classes", str(CLASSES), "--num-workers", "2", *more]
    return tiny(shards, output, *extra)


def loader(arguments: list[str], rank: int = 0, world: int = 1) -> EpochLoader:
    args = parse(arguments)
    return EpochLoader(load_data(args), args, rank, world)


def message(expected: type[BaseException], call: Callable[[], Any]) -> str:
    """What a call raises says; unlike pytest.raises it leaves no cycle around the traceback.

    A loader that is found in a cycle waits five seconds for each of its workers.
    """
    try:
        call()
    except expected as error:
        return str(error)
    pytest.fail(f"no {expected.__name__} was raised")


def assert_same_batches(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name, x, y in zip(Batch._fields, a, b, strict=True):
            assert torch.equal(x, y), name


def numbers(batches: list[Batch]) -> list[int]:
    """Which images a run with PLAIN saw, in order."""
    for batch in batches:
        assert bool((batch.images == batch.images[:, :1, :1, :1]).all())
    return [int(number) for batch in batches for number in batch.images[:, 0, 0, 0]]


@pytest.mark.parametrize("flag", ["--repeated-aug", "--no-repeated-aug"])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_an_epoch_goes_on_from_any_step(shards: Path, workers: int, flag: str) -> None:
    batches = loader(stream(shards, Path("unused"), "--num-workers", str(workers), flag, "--batch-size", "5"))
    whole = list(batches.epoch(3))
    # ceil(72 / workers) samples of each worker, filled up to batches of 5
    assert len(whole) == batches.steps == {1: 15, 2: 16, 3: 15}[workers]
    fresh = loader(stream(shards, Path("unused"), "--num-workers", str(workers), flag, "--batch-size", "5"))
    for first in (1, 4, batches.steps - 1):
        assert_same_batches(list(fresh.epoch(3, first)), whole[first:])
    assert torch.cat([batch.positions for batch in whole]).tolist() == list(range(5 * batches.steps))
    assert all(torch.equal(batch.ids, batch.positions) for batch in whole)
    assert [batch.labels.tolist() for batch in whole] != [batch.labels.tolist() for batch in fresh.epoch(4)]


def test_samples_are_those_of_the_reader_each_with_its_own_crop(shards: Path) -> None:
    seen = list(loader(stream(shards, Path("unused"), *PLAIN, "--batch-size", "6")).epoch(0))
    # 3 shards of 12 images for each worker are 6 whole batches, so nothing is filled up.
    assert sorted(numbers(seen)) == list(range(72))
    assert torch.cat([batch.labels for batch in seen]).tolist() == [number % CLASSES for number in numbers(seen)]
    assert numbers(seen) != list(range(72)), "not shuffled"
    assert len(torch.cat([batch.boxes for batch in seen]).unique(dim=0)) > 70
    batches = loader(stream(shards, Path("unused"), *PLAIN, "--batch-size", "6"))
    shares = {frozenset(numbers(list(batches.epoch(epoch))[::2])) for epoch in range(4)}
    assert len(shares) > 1, "a worker has the same shards in every epoch"
    three = list(loader(stream(shards, Path("unused"), *PLAIN, "--batch-size", "6", "--repeated-aug")).epoch(0))
    places = numbers(three[::2])  # of one worker
    assert len(places) == 36 and places == [number for number in places[::3] for _ in range(3)]
    assert len(torch.cat([batch.boxes for batch in three]).unique(dim=0)) > 70


def test_two_processes_share_out_the_images(shards: Path) -> None:
    parts = [loader(stream(shards, Path("unused"), *PLAIN, "--batch-size", "4"), rank, 2) for rank in range(2)]
    # Six shards for four workers: 18 samples and 2 to fill up for each.
    assert [part.steps for part in parts] == [10, 10]
    epochs = [list(part.epoch(1)) for part in parts]
    seen = [set(numbers(epoch)) for epoch in epochs]
    assert not seen[0] & seen[1] and min(map(len, seen)) >= 24
    positions = torch.cat([batch.positions for epoch in epochs for batch in epoch])
    assert sorted(positions.tolist()) == list(range(80))
    # Three shards of seven images for four workers.
    images = [
        numbers_of for part in parts for pixels, _ in part.validation() for numbers_of in pixels[:, 0, 0, 0].tolist()
    ]
    assert sorted(images) == list(range(21))
    fresh = loader(stream(shards, Path("unused"), *PLAIN, "--batch-size", "4"), 1, 2)
    assert_same_batches(list(fresh.epoch(1, 5)), epochs[1][5:])
    # A batch of any process can be had again by one that is alone.
    alone = loader(stream(shards, Path("unused"), *PLAIN, "--batch-size", "4"))
    for epoch in epochs:
        assert_same_batches([alone.batch(1, epoch[7].positions, epoch[7].ids, world=2)], [epoch[7]])


def test_a_run_equals_itself_and_the_one_that_was_stopped(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--save-every", "3", "--batch-size", "4"]
    outputs = [tmp_path / name for name in ("whole", "again", "broken")]
    for output in outputs[:2]:
        train(parse(stream(shards, output, *settings)))
    assert_same_run(*outputs[:2])
    for stop in (1, 18):  # at odd steps of both epochs: the two workers are amid a round

        def save_and_stop(run: Any, progress: Progress, stop: int = stop) -> None:
            save_checkpoint(run, progress)
            if progress.step % 2 and progress.updates > stop:
                raise KeyboardInterrupt

        monkeypatch.setattr("train.loop.save_checkpoint", save_and_stop)
        message(KeyboardInterrupt, lambda: train(parse(stream(shards, outputs[2], *settings, "--resume", "auto"))))
        state = checkpoint.load(outputs[2] / "last.pt")["progress"]
        assert state["step"] % 2 == 1
    assert state["epoch"] == 1
    monkeypatch.undo()
    other = stream(shards, outputs[2], *settings, "--resume", "auto", "--num-workers", "3")
    assert "--num-workers 2 (now 3)" in message(ValueError, lambda: train(parse(other)))
    train(parse(stream(shards, outputs[2], *settings, "--resume", "auto")))
    assert_same_run(outputs[0], outputs[2])


def test_two_processes_train_and_validate(shards: Path, tmp_path: Path) -> None:
    finish(start(stream(shards, tmp_path, "--batch-size", "4", "--epochs", "1", "--eval-every", "1"), 2))
    state = checkpoint.load(tmp_path / "last.pt")
    assert (state["world"], state["progress"]["updates"]) == (2, 10)
    # Top-1 in percent of exactly the 21 images
    (record,) = state["progress"]["history"]
    assert record["val_top1"] * 21 / 100 == pytest.approx(round(record["val_top1"] * 21 / 100), abs=1e-9)


def test_nonfinite_loss_of_a_stream_replays(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = stream(shards, tmp_path, "--lr", "1e37", "--warmup-epochs", "0", "--log-every", "1")
    assert "--replay" in message(NonFiniteLoss, lambda: train(parse(arguments)))
    (path,) = tmp_path.glob("nonfinite-*.pt")
    entry = checkpoint.load(path)["steps"][0][0]
    repeated: list[Batch] = []

    def watched(batch: Batch, *more: Any) -> Batch:
        repeated.append(batch)
        return to_device(batch, *more)

    monkeypatch.setattr("train.guard.to_device", watched)
    replay(parse(["--replay", str(path), "--device", "cpu"]))
    first = next(loader(arguments).epoch(entry["epoch"], entry["step"]))
    assert_same_batches(repeated, [first])


def test_a_teacher_runs_along_but_makes_no_bank(shards: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=CLASSES).state_dict(), teacher)
    settings = ["--epochs", "1", "--max-steps", "2", "--picture", "--cache", str(tmp_path / "cache")]
    with_teacher = ["--teacher", "resnet10t", "--teacher-weights", str(teacher), "--teacher-size", "64"]
    history = train(parse(stream(shards, tmp_path / "online", *settings, *with_teacher, "--online")))
    assert history[0]["train_loss"] > 0
    assert (tmp_path / "online" / "mix.png").read_bytes().startswith(b"\x89PNG")
    train(parse(stream(shards, tmp_path / "area", *settings, "--maps", "area")))
    for wrong in (with_teacher, [*with_teacher, "--online", "--probe"], ["--maps", "some.bank"]):
        with pytest.raises(ValueError, match=r"is a stream without ids.* --online, or --maps area"):
            train(parse(stream(shards, tmp_path / "wrong", *settings, *wrong)))
    assert np.isnan(load_data(parse(stream(shards, tmp_path))).majority())


def test_bad_arguments_get_a_sentence(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def problem(*more: str) -> str:
        return message(ValueError, lambda: list(loader(stream(shards, tmp_path, *more)).epoch(0)))

    assert "split 'test'" in problem("--val-split", "test")
    assert "not one of 3 classes" in problem("--num-classes", "3")
    # There are 6 shards.
    assert "needs a shard for each of the 7 workers" in problem("--num-workers", "7")
    assert "--train-num-samples" in problem("--train-split", "train-{0..5}.tar")
    assert "--val-num-samples" in problem("--val-split", "validation-{0..2}.tar")
    assert len(load_data(parse(stream(shards, tmp_path, "--val-split", "validation-{0..2}.tar|21"))).val) == 21
    args = parse(stream(shards, tmp_path))
    with pytest.raises(ValueError, match="give --num-classes"):
        load_data(argparse.Namespace(**{**vars(args), "num_classes": None}))
    with pytest.raises(ValueError, match="needs --data-path"):
        load_data(argparse.Namespace(**{**vars(args), "data_path": None}))
    for data, module, package in (
        ("wds/x", "webdataset", "webdataset"),
        ("tfds/x", "tensorflow_datasets", "tensorflow-datasets"),
        ("hfds/x", "datasets", "datasets"),
        ("hfids/x", "datasets", "datasets"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"{package}" in problem("--data", f"timm:{data}").partition("pip install ")[2]
    for name in ("imagenet", "timm:imagenet", "timm:web/x", "timm:wds"):
        with pytest.raises(SystemExit):
            parse(["--data", name])
        assert f"argument --data: '{name}' is none of elpv, digits, imagefolder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=4, train=9, val=3)


def test_timm_folder_gives_the_batches_of_imagefolder(folder: Path, tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "maps.bank", ImageFolder(folder / "train"))
    settings = ["--no-repeated-aug", "--maps", str(bank)]
    one = parse(tiny(folder, tmp_path / "one", *settings))
    other = parse(tiny(folder, tmp_path / "other", *settings, "--data", "timm:folder"))
    ours, timms = load_data(one), load_data(other)
    assert (timms.labels, timms.digest, list(timms.classes)) == (ours.labels, ours.digest, ours.classes)
    assert timms.majority() == ours.majority()
    batches = [list(EpochLoader(data, one, 0, 1).epoch(1)) for data in (ours, timms)]
    assert_same_batches(*batches)
    evidence = make_evidence(other, timms, torch.device("cpu"), 0)
    assert evidence.bank is not None, "a bank of the folder is one of timm's folder"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train").symlink_to(folder / "train")
    (tmp_path / "half").mkdir()
    for name in ("class0", "class1"):
        (tmp_path / "half" / name).symlink_to(folder / "train" / name)
    with pytest.raises(ValueError, match="classes of the splits train and validation differ"):
        (tmp_path / "images" / "val").symlink_to(tmp_path / "half")
        load_data(parse(tiny(tmp_path / "images", tmp_path, "--data", "timm:folder")))
    with pytest.raises(ValueError, match="train and validate on the same images"):
        load_data(parse(tiny(tmp_path / "half", tmp_path, "--data", "timm:folder")))


def test_tars_of_one_folder(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    settings = ["--train-split", "train.tar", "--val-split", "val.tar"]
    data = load_data(parse(tiny(tmp_path, tmp_path, "--data", "timm:tar", *settings)))
    expected = load_data(parse(tiny(folder, tmp_path)))
    assert (len(data.train), len(data.val), data.labels) == (36, 12, expected.labels)
    assert data.train[20][0].tobytes() == expected.train[20][0].tobytes()


@pytest.mark.skipif(find_spec("datasets") is None, reason="the package datasets is not installed")
def test_hugging_face_readers(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    images = tmp_path / "images"
    for split in ("train", "validation"):
        found = ImageFolder(folder / ("val" if split == "validation" else split))
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=found.classes)})
        for part in range(2):
            rows = [{"image": {"path": None, "bytes": Path(path).read_bytes()}, "label": label}
                    for path, label in found.samples[part::2]]  # fmt: skip
            datasets.Dataset.from_list(rows, features=features).to_parquet(images / f"{split}-{part}.parquet")
    settings = ["--num-workers", "2", "--batch-size", "4", "--no-repeated-aug"]
    arguments = tiny(tmp_path / "cache", tmp_path, *settings, "--data", f"timm:hfds/{images}")
    data = load_data(parse(arguments))
    assert not data.stream and sorted(data.labels) == sorted(ImageFolder(folder / "train").targets)
    assert list(data.classes) == [f"class{label}" for label in range(4)]
    seen = torch.cat([batch.ids for batch in loader(arguments).epoch(0)])
    assert sorted(seen.tolist()) == list(range(36))
    counts = ["--train-num-samples", "36", "--val-num-samples", "12"]
    arguments = tiny(tmp_path / "cache", tmp_path, *settings, *counts, "--data", f"timm:hfids/{images}")
    batches = loader(arguments)
    whole = list(batches.epoch(1))
    assert batches.steps == 10 and len(load_data(parse(arguments)).classes) == 4
    assert_same_batches(list(loader(arguments).epoch(1, 3)), whole[3:])
    assert sorted(int(label) for _, labels in batches.validation() for label in labels) == sorted([0, 1, 2, 3] * 3)
