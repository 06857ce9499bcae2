"""What a run leaves in its folder: nothing is lost at a kill, damage is seen, and no other trainer interferes."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from train_helpers import make_folder, start, tiny

from tokenmix_kernels.maps.weights import read_tensors, weights_of
from train import checkpoint, files
from train.config import parse
from train.loop import train
from train.run import Run

MODEL = '{"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}'
SMALL = ("--batch-size", "4", "--epochs", "3", "--max-steps", "3", "--save-every", "1", "--threads", "0", "--aa",
         "none", "--model-kwargs", MODEL)  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=4, train=4, val=1)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A finished run, and copies of its folder as a kill before or after each of its writes would have left it."""
    root = tmp_path_factory.mktemp("whole")
    output, copies = root / "run", []
    replace = os.replace

    def watched(source: Any, target: Any) -> None:
        for act in (lambda: None, lambda: replace(source, target)):
            act()
            copies.append(root / f"copy{len(copies)}")
            shutil.copytree(output, copies[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", watched)
        train(parse(tiny(images, output, *SMALL)))
    return output, copies


def test_nothing_is_lost_in_fifty_kills_at_write_boundaries(
    images: Path, whole: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    output, copies = whole
    assert len(copies) >= 50
    every = len(copies) / 50
    lost = []
    for copy in [copies[int(index * every)] for index in range(50)]:
        train(parse(tiny(images, copy, *SMALL, "--resume", "auto")))
        lost += [f"{copy.name}: {why}" for why in differences(output, copy)]
        shutil.rmtree(copy)
    capsys.readouterr()
    assert lost == []


def differences(one: Path, other: Path) -> list[str]:
    """What two folders of the same run do not have in common, up to times and names of folders."""
    found = [f"{name.name} is left" for name in other.iterdir() if not (one / name.name).exists()]
    for name in ("last.pt", "previous.pt", "best.pt"):
        a, b = checkpoint.load(one / name), checkpoint.load(other / name)
        for state in (a, b):
            state.pop("args")
            for record in [*state.get("progress", {}).get("history", []), state.get("record", {})]:
                record.pop("seconds", None)
        if checkpoint.digest(a) != checkpoint.digest(b):
            found.append(name)
    for name in ("metrics.jsonl", "summary.csv"):
        a, b = (cut_times(folder / name) for folder in (one, other))
        if a != b:
            found.append(name)
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        found.append("model.safetensors")
    return found


def cut_times(path: Path) -> list[Any]:
    lines = path.read_text().splitlines()
    if path.suffix == ".csv":
        return [line.rpartition(",")[0] for line in lines]
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def test_flipped_bits_in_last_pt_are_refused_and_the_one_before_is_offered(
    images: Path, whole: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    path = tmp_path / "run" / "last.pt"
    good = path.read_bytes()
    before = checkpoint.digest(checkpoint.load(path))
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(len(good), (60,), generator=generator).tolist():
        damaged = bytearray(good)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            assert checkpoint.digest(checkpoint.load(path)) == before, "other content was accepted"
        except ValueError as error:
            assert "last.pt" in str(error)
            refused += 1
    assert refused > 20
    middle = bytearray(good)
    state = checkpoint.load(whole[0] / "last.pt")["model"]["pos_embed"].numpy().tobytes()
    middle[good.index(state) + 5] ^= 64
    path.write_bytes(middle)
    with pytest.raises(
        ValueError, match=r"last.pt is damaged.*is good: --resume .*previous.pt goes on from epoch 2, ste"
    ):
        train(parse(tiny(images, tmp_path / "run", *SMALL, "--resume", "auto")))
    previous = str(path.with_name("previous.pt"))
    train(parse(tiny(images, tmp_path / "run", *SMALL, "--resume", previous)))
    assert differences(whole[0], tmp_path / "run") == []


@pytest.mark.parametrize(
    "content",
    [b"", b"rubbish", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\n", {}, [1], 3, {"model": 1},
     {"optimizer": {}}, {"args": {}, "digest": "0"}, torch.zeros(3), torch.nn.Linear(1, 1), "truncated", "a folder"],
    ids=str,
)  # fmt: skip
def test_a_foreign_last_pt_gets_a_sentence(
    images: Path, whole: tuple[Path, list[Path]], tmp_path: Path, content: Any
) -> None:
    path = tmp_path / "last.pt"
    if content == "a folder" if isinstance(content, str) else False:
        path.mkdir()
    elif isinstance(content, str):
        path.write_bytes((whole[0] / "last.pt").read_bytes()[:5000])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises((ValueError, OSError), match=r"last\.pt") as error:
        train(parse(tiny(images, tmp_path, *SMALL, "--resume", "auto")))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_full_disk_names_the_file_and_leaves_nothing(
    whole: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = checkpoint.load(whole[0] / "last.pt")
    written = 0

    def full(self: files.Recorded, content: Any) -> int:
        nonlocal written
        written += len(content)
        if written > 3000:
            self.error = OSError(28, "No space left on device")
            raise self.error
        return int(self.file.write(content))

    monkeypatch.setattr(files.Recorded, "write", full)
    with pytest.raises(OSError, match=r"last\.pt cannot be written: No space left on device"):
        checkpoint.save(state, tmp_path / "last.pt")
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_follow_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "0" * 2 * size)
    (tmp_path / f".metrics.jsonl.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written"):
        files.write_lines(["x"], tmp_path / "metrics.jsonl")
    assert victim.read_text() == "mine"


def test_a_second_trainer_is_told_who_holds_the_folder(images: Path, tmp_path: Path) -> None:
    lock = files.lock_folder(tmp_path)
    arguments = tiny(images, tmp_path, *SMALL)
    with pytest.raises(OSError, match=rf"--output .* is in use: .* process {os.getpid()} on "):
        train(parse(arguments))
    process = start(arguments)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2 and f"process {os.getpid()} on" in output and "since 20" in output, output
    lock.release()
    leftover = tmp_path / f".last.pt.{'a' * 16}.tmp"
    leftover.write_bytes(b"half")
    files.lock_folder(tmp_path).release()
    assert not leftover.exists(), "what a killed trainer left is removed"


def scores(val: float, ema: float) -> Callable[[Run, Any], dict[str, float]]:
    def evaluate(run: Run, model: Any) -> dict[str, float]:
        return {"top1": val if model is run.model else ema, "loss": 1.0}

    return evaluate


@pytest.mark.parametrize("best", ["ema", "model"])
def test_the_weights_with_the_best_score_are_those_that_others_load(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, best: str
) -> None:
    monkeypatch.setattr("train.loop.evaluate", scores(*((10.0, 20.0) if best == "ema" else (20.0, 10.0))))
    train(parse(tiny(images, tmp_path, *SMALL, "--epochs", "1")))
    for name in ("best.pt", "last.pt"):
        state = checkpoint.load(tmp_path / name)
        assert state["best_is"] == best
        assert not torch.equal(state["model"]["head.weight"], state["ema"]["head.weight"])
        loaded = weights_of(read_tensors(tmp_path / name))
        assert torch.equal(loaded["head.weight"], state[best]["head.weight"])
    assert torch.equal(read_tensors(tmp_path / "model.safetensors")["head.weight"], state[best]["head.weight"])


def test_what_follows_from_last_pt_is_written_again(
    images: Path, whole: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    for name in ("best.pt", "metrics.jsonl", "summary.csv", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    history = checkpoint.load(tmp_path / "run" / "last.pt")["progress"]
    train(parse(tiny(images, tmp_path / "run", *SMALL, "--resume", "auto")))
    left = {
        name for name in ("metrics.jsonl", "summary.csv", "model.safetensors") if (tmp_path / "run" / name).exists()
    }
    assert len(left) == 3
    assert (tmp_path / "run" / "best.pt").exists() == (history["best_epoch"] == 2)
