"""The trainer with --device cuda on a pretended GPU: the run that the CPU has, with no wait of the host in a step."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pretend_cuda import pretended_gpus
from pretend_tensor import PretendTensor, State
from pretend_workers import train_on_pretended_gpus
from torchvision.datasets import ImageFolder
from train_helpers import assert_same_run, finish_all, launch, make_bank, make_folder, records, tiny
from train_workers import train_quietly

from tokenmix_kernels.maps.bank import MapBank
from train import checkpoint
from train.config import parse
from train.guard import NonFiniteLoss, replay
from train.loop import train
from train.profile_mixers import profile_mixers
from train.run import save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=4, train=12, val=3)


@pytest.fixture(scope="module")
def bank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(tmp_path_factory.mktemp("bank") / "maps.bank", ImageFolder(folder / "train"))


def on(device: str, folder: Path, output: Path, *more: str) -> list[str]:
    return [*tiny(folder, output, "--batch-size", "4", *more), "--device", device]


PLAIN = ["--no-amp", "--log-every", "100", "--max-steps", "2"]
# Where the host is to wait: what is written, scored and timed after the steps.
BETWEEN = (
    "checkpoint.py", "evaluate.py", "meters.py read", "torch.py", "picture.py", "examples.py", "evidence.py",
    "profile_mixers.py between",
)  # fmt: skip
ONCE_AN_EPOCH = "tolist in loop.py train_epoch"


def run_on_gpu(folder: Path, output: Path, *more: str, device: str = "cuda") -> State:
    with pretended_gpus(2) as now:
        train(parse(on(device, folder, output, *more)))
    return now


def in_steps(now: State) -> list[str]:
    """Reads of values that belong to steps."""
    return [read for read in now.reads if not any(place in read for place in BETWEEN)]


@pytest.mark.parametrize("more", [
    ["--channels-last", "--device", "cuda:1"], ["--accumulate", "2", "--clip-grad", "1", "--mixer", "cutmix"],
    ["--mixup-off-epoch", "1", "--opt", "sgd", "--bce-loss"], ["--maps", "BANK", "--reprob", "0.5", "--picture"],
], ids=lambda more: " ".join(more))  # fmt: skip
def test_a_run_is_that_of_the_cpu(folder: Path, bank: Path, tmp_path: Path, more: list[str]) -> None:
    device = "cuda:1" if "cuda:1" in more else "cuda"
    settings = [*PLAIN, *(str(bank) if word == "BANK" else word for word in more if word not in ("--device", "cuda:1"))]
    now = run_on_gpu(folder, tmp_path / "gpu", *settings, device=device)
    train(parse(on("cpu", folder, tmp_path / "cpu", *settings)))
    assert_same_run(tmp_path / "gpu", tmp_path / "cpu")
    assert {name for name, *_ in now.launches} == {"mix_kernel"}
    # The losses are read once an epoch.
    assert in_steps(now) == [ONCE_AN_EPOCH] * 2
    state = torch.load(tmp_path / "gpu" / "last.pt", weights_only=True)
    assert "cuda" in state["rng"][0]
    if "--picture" in more:
        assert (tmp_path / "gpu" / "mix.png").read_bytes() == (tmp_path / "cpu" / "mix.png").read_bytes()


def test_mixed_precision_is_on_by_default(folder: Path, tmp_path: Path) -> None:
    with pretended_gpus() as now, pytest.MonkeyPatch.context() as patch:
        dtypes = set()
        ordinary = torch.nn.functional.linear

        def linear(*given: Any) -> Any:
            result = ordinary(*given)
            dtypes.add(result.dtype)
            return result

        patch.setattr(torch.nn.functional, "linear", linear)
        (record,) = train(parse(on("cuda", folder, tmp_path, "--max-steps", "2", "--epochs", "1")))
    assert dtypes == {torch.bfloat16}
    assert 0.4 < record["train_loss"] < 2
    assert in_steps(now) == [ONCE_AN_EPOCH]


def test_a_resumed_run_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = [*PLAIN, "--save-every", "1", "--drop-path", "0.1"]
    run_on_gpu(folder, whole, *settings)

    def stop_amid(run: Any, progress: Any) -> None:
        save_checkpoint(run, progress)
        if progress.step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.loop.save_checkpoint", stop_amid)
        run_on_gpu(folder, broken, *settings)
    assert checkpoint.load(broken / "last.pt")["progress"]["step"] == 1
    run_on_gpu(folder, broken, *settings, "--resume", "auto")
    assert_same_run(whole, broken)


def test_a_run_moves_between_gpu_and_cpu(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [*PLAIN, "--max-steps", "2"]
    run_on_gpu(folder, tmp_path, *settings, "--epochs", "1")
    capsys.readouterr()
    scores = []
    for device in ("cpu", "cuda"):
        with pretended_gpus():
            train(parse([*on(device, folder, tmp_path, *settings, "--resume", "auto"), "--eval"]))
        scores.append([line for line in capsys.readouterr().out.splitlines() if "weights: top1" in line])
    assert scores[0] == scores[1]
    assert len(scores[0]) == 2
    train(parse(on("cpu", folder, tmp_path, *settings, "--epochs", "2", "--resume", "auto")))
    run_on_gpu(folder, tmp_path, *settings, "--epochs", "3", "--resume", "auto")
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1, 2]


def test_loss_that_is_not_finite_stops_and_replays(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--no-amp", "--lr", "1e37", "--warmup-epochs", "0", "--log-every", "2"]
    with pytest.raises(NonFiniteLoss, match="--replay"):
        run_on_gpu(folder, tmp_path, *settings)
    (path,) = tmp_path.glob("nonfinite-*.pt")
    capsys.readouterr()
    with pretended_gpus():
        replay(parse(["--replay", str(path), "--device", "cuda"]))
    assert "first module whose output is not finite" in capsys.readouterr().out


def test_the_profile_of_mixers(tmp_path: Path) -> None:
    with pretended_gpus() as now:
        settings = ["--max-steps", "2", "--batch-size", "4"]
        profile = profile_mixers(parse(on("cuda", Path("unused"), tmp_path, *settings)))
    assert json.loads((tmp_path / "mixers.json").read_text()) == profile
    assert "H100" in profile["device"]
    for row in profile["mixers"].values():
        assert 0 < row["mixing_ms"] < row["step_ms"]
        assert row["peak_memory_mb"] == 2**20 / 1e6
    assert now.launches


@pytest.mark.parametrize("more", [[], ["--online"], ["--probe"]], ids=str)
def test_a_teacher_makes_the_maps_that_it_makes_on_the_cpu(folder: Path, tmp_path: Path, more: list[str]) -> None:
    weights = tmp_path / "teacher.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), weights)
    settings = [
        *PLAIN, "--max-steps", "1", "--epochs", "1", "--teacher", "test_resnet", "--teacher-weights", str(weights),
        "--teacher-size", "64", *more,
    ]  # fmt: skip
    now = run_on_gpu(folder, tmp_path / "gpu", *settings, "--cache", str(tmp_path / "gpu-cache"))
    train(parse(on("cpu", folder, tmp_path / "cpu", *settings, "--cache", str(tmp_path / "cpu-cache"))))
    assert records(tmp_path / "gpu")[0]["train_loss"] == pytest.approx(records(tmp_path / "cpu")[0]["train_loss"], 1e-4)
    banks = [list((tmp_path / cache).glob("*.bank")) for cache in ("gpu-cache", "cpu-cache")]
    assert [len(found) for found in banks] == [0, 0] if "--online" in more else [1, 1]
    for ours, theirs in zip(*banks, strict=True):
        ours, theirs = MapBank.open(ours), MapBank.open(theirs)
        # A teacher on a GPU computes in bfloat16.
        assert (ours.values.float() - theirs.values.float()).abs().mean() < 1
    assert [name for name, *_ in now.launches] == ["mix_kernel"]


@pytest.mark.parametrize("more", [
    ["--evidence", "attention", "--accumulate", "2", "--picture"],
    ["--teacher", "test_resnet", "--teacher-weights", "WEIGHTS", "--teacher-size", "64", "--online"],
    ["--mixup-prob", "0.5", "--channels-last", "--opt", "lamb"],
], ids=lambda more: " ".join(more[:2]))  # fmt: skip
def test_a_device_without_kernels_and_float64_trains_what_the_cpu_mixes(
    folder: Path, tmp_path: Path, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What --device mps and xpu do, on a pretended GPU that has as little as they."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=4).state_dict(), tmp_path / "teacher.pth")
    weights = str(tmp_path / "teacher.pth")
    settings = [*PLAIN, "--epochs", "1", *(weights if word == "WEIGHTS" else word for word in more)]
    train(parse(on("cpu", folder, tmp_path / "cpu", *settings)))
    made = PretendTensor.__new__

    def without_float64(kind: type, values: torch.Tensor, *rest: Any) -> PretendTensor:
        if values.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64: the device does not have it")
        return made(kind, values, *rest)

    monkeypatch.setattr(PretendTensor, "__new__", without_float64)
    monkeypatch.setattr("train.run.mixing_device", lambda _: torch.device("cpu"))
    for module in ("loop", "evaluate"):
        monkeypatch.setattr(f"train.{module}.sum_dtype", lambda _: torch.float32)
    now = run_on_gpu(folder, tmp_path / "gpu", *settings)
    assert not now.launches
    ours, theirs = (checkpoint.load(tmp_path / name / "last.pt") for name in ("gpu", "cpu"))
    # A teacher on a GPU computes in bfloat16.
    atol = 1e-4 if "--online" in more else 0
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, rtol=0, atol=atol)
    losses = [state["progress"]["history"][0] for state in (ours, theirs)]
    for name in ("train_loss", "val_loss", "val_top1"):
        assert losses[0][name] == pytest.approx(losses[1][name], rel=1e-3 if atol else 1e-5)
    if "--picture" in more:
        assert (tmp_path / "gpu" / "mix.png").read_bytes() == (tmp_path / "cpu" / "mix.png").read_bytes()


def test_devices_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--device cuda:2 must be one of this machine's 2 GPUs"):
        run_on_gpu(folder, tmp_path, device="cuda:2")
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        train(parse(on("cuda", folder, tmp_path)))
    with pytest.raises(ValueError, match="--device cuda needs a GPU"):
        profile_mixers(parse(on("cuda", folder, tmp_path)))


def test_two_processes_train_as_two_of_the_cpu(folder: Path, bank: Path, tmp_path: Path) -> None:
    settings = [
        *PLAIN, "--maps", str(bank), "--max-steps", "4", "--accumulate", "2", "--clip-grad", "1", "--epochs", "1",
    ]  # fmt: skip
    finish_all(launch(train_on_pretended_gpus, on("cuda", folder, tmp_path / "gpu", *settings), 2))
    finish_all(launch(train_quietly, on("cpu", folder, tmp_path / "cpu", *settings), 2))
    ours, theirs = (checkpoint.load(tmp_path / name / "last.pt") for name in ("gpu", "cpu"))
    assert ours["world"] == 2 and len(ours["rng"]) == 2
    for key, value in theirs["model"].items():
        torch.testing.assert_close(ours["model"][key], value, rtol=0, atol=1e-5)
    assert ours["progress"]["history"][0]["val_loss"] == pytest.approx(
        theirs["progress"]["history"][0]["val_loss"], 1e-4
    )
