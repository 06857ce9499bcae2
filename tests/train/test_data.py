"""Images that cannot be read, images that are not 8-bit, and flags that contradict the data, for every reader."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import make_folder, tiny

from tokenmix_kernels.maps.bank import MapBank
from train.__main__ import main
from train.config import parse
from train.data import EpochLoader, load_data
from train.data.sources import ElpvCells, read_elpv
from train.data.timm_readers import TimmImages
from train.loop import train

PLAIN = ["--aa", "none", "--color-jitter", "0", "--reprob", "0", "--no-repeated-aug", "--hflip", "0"]
BROKEN = "class1/2.png"
CLASSES, TRAIN, VAL = 3, 6, 2


def grey_folder(root: Path) -> Path:
    """Flat images; every pixel of training image number n is 10 * n."""
    for split, count in (("train", TRAIN), ("val", VAL)):
        for label in range(CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
            for index in range(count):
                pixels = np.full((40, 48, 3), 10 * (label * count + index), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / f"{index}.png")
    return root


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Training image 8 (class 1) is truncated, and so is one for validation."""
    root = grey_folder(tmp_path / "images")
    truncate(root / "train" / BROKEN)
    truncate(root / "val" / "class0" / "1.png")
    return root


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return tiny(folder, output, *PLAIN, "--batch-size", "4", "--cache", str(output / "cache"), *more)


def make_tars(folder: Path) -> list[str]:
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            tar.add(folder / split, arcname=".")
    return ["--data", "timm:tar", "--train-split", "train.tar", "--val-split", "val.tar"]


READERS: dict[str, Callable[[Path], list[str]]] = {
    "imagefolder": lambda folder: [],
    "timm:folder": lambda folder: ["--data", "timm:folder"],
    "timm:tar": make_tars,
    "timm:torch/image_folder": lambda folder: ["--data", "timm:torch/image_folder"],
}


def message(call: Callable[[], Any]) -> str:
    """What a ValueError or OSError says; no cycle around the traceback, in which workers would wait."""
    try:
        call()
    except (ValueError, OSError) as error:
        return str(error)
    pytest.fail("nothing was raised")


def epoch(arguments: list[str]) -> dict[int, tuple[int, int]]:
    """(grey value, label) by id of the samples of one epoch."""
    args = parse(arguments)
    loader = EpochLoader(load_data(args), args, 0, 1)
    return {
        int(number): (int(image[0, 0, 0]), int(label))
        for batch in loader.epoch(0)
        for number, image, label in zip(batch.ids, batch.images, batch.labels, strict=True)
    }


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("reader", READERS)
def test_a_broken_image_stops_the_run_by_name(reader: str, workers: str, folder: Path, tmp_path: Path) -> None:
    more = [*READERS[reader](folder), "--num-workers", workers, "--batch-size", "18"]
    said = message(lambda: epoch(arguments(folder, tmp_path, *more)))
    name = BROKEN if "tar" in reader else str(folder / "train" / BROKEN)
    assert said.startswith("the image ") and name in said and " cannot be read: " in said
    assert "\n" not in said and "Traceback" not in said


@pytest.mark.parametrize("reader", READERS)
def test_skipped_images_leave_ids_and_labels_of_the_others(reader: str, folder: Path, tmp_path: Path) -> None:
    more = [*READERS[reader](folder), "--skip-broken", "--batch-size", "1"]
    seen = epoch(arguments(folder, tmp_path, *more))
    assert seen == {n: (10 * n, n // TRAIN) for n in range(CLASSES * TRAIN) if n != 8}
    args = parse(arguments(folder, tmp_path, *more))
    data = load_data(args)
    assert list(data.broken) == [8] and len(data.train) == 18 and len(data.val) == 5
    loader = EpochLoader(data, args, 0, 1)
    assert sum(len(labels) for _, labels in loader.validation()) == 5
    assert [BROKEN in why for why in loader.skipped()].count(True) == len(loader.skipped()) - 1 == 1


def test_an_image_that_is_mended_is_read_again(folder: Path, tmp_path: Path) -> None:
    more = ["--skip-broken", "--batch-size", "1"]
    assert 8 not in epoch(arguments(folder, tmp_path, *more))
    assert len(list((tmp_path / "cache").glob("broken-*.json"))) == 2
    shutil.copy(folder / "train" / "class1" / "0.png", folder / "train" / BROKEN)
    assert epoch(arguments(folder, tmp_path, *more))[8] == (60, 1)


def test_the_command_line_says_one_sentence(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: str) -> int:
        monkeypatch.setattr("sys.argv", ["train", *arguments(folder, tmp_path / "run", *more)])
        return main()

    assert run("--num-workers", "1", "--batch-size", "18") == 2
    said = capsys.readouterr().err
    assert f"train: error: the image {folder / 'train' / BROKEN} cannot be read: " in said
    assert "Traceback" not in said
    assert run("--skip-broken", "--max-steps", "1", "--epochs", "1") == 0
    written = "".join(capsys.readouterr())
    assert "2 images that cannot be read" in written and written.count("skipped: the image") == 2


def test_the_teachers_bank_leaves_out_the_same_images(folder: Path, tmp_path: Path) -> None:
    import timm

    weights = tmp_path / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=CLASSES).state_dict(), weights)
    teacher = ["--teacher", "resnet10t", "--teacher-weights", str(weights), "--teacher-size", "64", "--epochs", "1"]
    said = message(lambda: train(parse(arguments(folder, tmp_path / "stopped", *teacher))))
    assert f"{folder / 'train' / BROKEN} cannot be read: " in said
    train(parse(arguments(folder, tmp_path, *teacher, "--skip-broken", "--max-steps", "1")))
    (path,) = (tmp_path / "cache").glob("*.bank")
    bank = MapBank.open(path)
    assert bank.skipped.tolist() == [8] and int((bank.sizes[:, 0] == 40).sum()) == 17


def write_shard(path: Path, broken: int | None, deep: bool = False) -> dict[str, Any]:
    """12 flat images; number n has class n % CLASSES. One is truncated."""
    with tarfile.open(path, "w") as tar:
        for number in range(12):
            png = io.BytesIO()
            pixels = np.full((40, 48), 257 * 10 * number if deep else 10 * number, np.uint16 if deep else np.uint8)
            Image.fromarray(pixels).save(png, "png")
            content = png.getvalue()[:60] if number == broken else png.getvalue()
            for suffix, data in (("png", content), ("cls", str(number % CLASSES).encode())):
                info = tarfile.TarInfo(f"{number:04d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return {"name": path.stem, "num_samples": 12, "filenames": [path.name], "shard_lengths": [12]}


def make_shards(root: Path, broken: int | None, deep: bool = False) -> list[str]:
    """Arguments of a run on one shard for each split."""
    splits = {name: write_shard(root / f"{name}.tar", broken, deep) for name in ("train", "validation")}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return ["--data", "timm:wds/x", "--num-classes", str(CLASSES), "--num-workers", "1"]


def test_a_broken_image_of_a_stream_is_named_or_left_out(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    more = make_shards(tmp_path, broken=5)
    args = parse(arguments(tmp_path, tmp_path, *more))
    loader = EpochLoader(load_data(args), args, 0, 1)
    for batches in (lambda: loader.epoch(0), loader.validation):
        said = message(lambda batches=batches: list(batches()))
        assert said.startswith("the image 0005.png in ") and "cannot be read: " in said and "\n" not in said
    args = parse(arguments(tmp_path, tmp_path, *more, "--skip-broken"))
    loader = EpochLoader(load_data(args), args, 0, 1)
    batches = list(loader.epoch(0))
    pairs = [(int(i[0, 0, 0]), int(k)) for batch in batches for i, k in zip(batch.images, batch.labels, strict=True)]
    # Three batches of 4 as without a broken image: the reader begins again.
    assert len(pairs) == 12 and set(pairs) == {(10 * n, n % CLASSES) for n in range(12) if n != 5}
    seen = [int(image[0, 0, 0]) for images, _ in loader.validation() for image in images]
    assert seen == [10 * n for n in range(12) if n != 5]
    assert len(loader.skipped()) == 2  # of train.tar and of validation.tar


def test_a_cut_shard_and_a_missing_label_are_named(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    more = make_shards(tmp_path, broken=None)
    shard = tmp_path / "train.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:7000])
    args = parse(arguments(tmp_path, tmp_path, *more))
    said = message(lambda: list(EpochLoader(load_data(args), args, 0, 1).epoch(0)))
    assert said.startswith(f"the shard {shard} cannot be read: ")
    shard.write_bytes(whole.replace(b"0003.cls", b"0003.txt"))
    said = message(lambda: list(EpochLoader(load_data(args), args, 0, 1).epoch(0)))
    assert said.startswith(f"the label of the sample 0003 in {shard} cannot be read: ")


def test_a_broken_photograph_of_elpv_is_named_or_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    for number in range(20):
        path = tmp_path / f"cell{number:04d}.png"
        Image.fromarray(np.full((30, 30), number, np.uint8)).save(path)
        lines.append(f"{path.name}  {number % 2:.1f}  {'mono' if number < 10 else 'poly'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    truncate(tmp_path / "cell0003.png")
    monkeypatch.setattr("train.data.sources.elpv_folder", lambda: tmp_path)
    read_elpv.cache_clear()
    cells = ElpvCells("train")
    place = cells.names.index("cell0004.png")
    assert message(lambda: cells[place]).startswith(f"the image {tmp_path / 'cell0003.png'} cannot be read: ")
    flags = ["--data", "elpv", "--skip-broken", "--num-workers", "0", "--cache", str(tmp_path / "cache")]
    data = load_data(parse(flags))
    assert list(data.broken) == [place] and place not in data.readable()
    read_elpv.cache_clear()


@pytest.mark.parametrize("reader", READERS)
def test_16_bit_and_float_greyscale_keep_their_range(reader: str, tmp_path: Path) -> None:
    root = grey_folder(tmp_path / "images")
    folder = root / "train" / "class0"
    Image.fromarray(np.full((40, 48), 257 * 100, np.uint16)).save(folder / "0.png")
    Image.fromarray(np.full((40, 48), 0.6, np.float32)).save(folder / "1.png", "TIFF")
    data = load_data(parse(arguments(root, tmp_path, *READERS[reader](root))))
    assert [data.train[index][0].getpixel((0, 0)) for index in range(3)] == [(100,) * 3, (153,) * 3, (20,) * 3]


def test_16_bit_greyscale_of_a_stream_keeps_its_range(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    args = parse(arguments(tmp_path, tmp_path, *make_shards(tmp_path, broken=None, deep=True)))
    loader = EpochLoader(load_data(args), args, 0, 1)
    seen = sorted(int(image[0, 0, 0]) for batch in loader.epoch(0) for image in batch.images)
    assert seen == [10 * number for number in range(12)]


def test_timms_reader_never_gives_the_next_image(folder: Path) -> None:
    from timm.data import create_dataset

    theirs = create_dataset("folder", root=str(folder), split="train")
    assert theirs[8][0].getpixel((0, 0)) == (90, 90, 90), "timm gives image 9 for image 8"
    with pytest.raises(ValueError, match=r"class1/2\.png cannot be read"):
        TimmImages(theirs, "timm:folder")[8]


@pytest.mark.parametrize("reader", READERS)
def test_num_classes_in_conflict_with_the_data_is_refused(reader: str, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", classes=3, train=2, val=1)
    more = READERS[reader](root)
    said = message(lambda: load_data(parse(arguments(root, tmp_path, *more, "--num-classes", "10"))))
    assert "--num-classes must be 3, the number of classes" in said and "got 10" in said
    assert len(load_data(parse(arguments(root, tmp_path, *more, "--num-classes", "3"))).classes) == 3
