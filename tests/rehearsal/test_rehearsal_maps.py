"""`maps build --device cuda`, banks on a GPU and the bench, on a pretended GPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from pretend_cuda import pretended_gpus
from pretend_tensor import held, no_host_reads, to_gpu
from train_helpers import make_folder

from bench.__main__ import main as bench
from bench.cases import CASES
from tokenmix_kernels import TokenMix
from tokenmix_kernels.maps import ActivationTeacher
from tokenmix_kernels.maps.__main__ import main as maps
from tokenmix_kernels.maps.bank import MapBank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=2, train=5, val=1) / "train"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), path)
    return path


def build(folder: Path, weights: Path, out: Path, *more: str) -> MapBank:
    given = ["build", str(folder), "--model", "test_resnet", "--weights", str(weights), "--out", str(out)]
    maps([*given, "--num-classes", "2", "--size", "64", "--workers", "0", "--batch-size", "4", *more])
    return MapBank.open(out)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", None])
def test_maps_build(folder: Path, weights: Path, tmp_path: Path, device: str | None) -> None:
    expected = build(folder, weights, tmp_path / "cpu.bank", "--device", "cpu")
    with pretended_gpus(2) as now:
        ours = build(folder, weights, tmp_path / "gpu.bank", *(["--device", device] if device else []))
    assert now.copies, "nothing was done on the GPU"
    assert torch.equal(ours.labels, expected.labels)
    # A teacher on a GPU computes in bfloat16.
    assert (ours.values.float() - expected.values.float()).abs().mean() < 1


def test_maps_build_names_a_gpu_that_is_absent(
    folder: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pretended_gpus(2), pytest.raises(FileNotFoundError):
        build(folder, weights, tmp_path / "gpu.bank", "--device", "cuda:2")
    assert "there are 2 GPUs, number 2 is absent" in capsys.readouterr().err


def test_a_bank_on_the_gpu_serves_a_step_without_a_wait(folder: Path, weights: Path, tmp_path: Path) -> None:
    on_cpu = build(folder, weights, tmp_path / "a.bank", "--device", "cpu")
    images, labels, ids = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]), torch.tensor([1, 7, 2, 0])
    mix = TokenMix(num_classes=2, patch_size=8)
    expected = mix(images, labels, on_cpu.values, ids=ids, seed=3)
    with pretended_gpus():
        bank = MapBank.open(tmp_path / "a.bank", device="cuda")
        assert bank.values.is_cuda and bank.scales.is_cuda
        there = to_gpu((images, labels, ids))
        mix(there[0], there[1], bank.values, ids=there[2], seed=3)
        with no_host_reads():
            got = mix(there[0], there[1], bank.values, ids=there[2], seed=3)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(held(one), other)


@pytest.mark.parametrize("method", ["cam", "tokens", "attention"])
def test_a_teacher_of_a_step_never_waits(method: str) -> None:
    torch.manual_seed(0)
    name = "test_resnet" if method == "cam" else "test_vit"
    options = {"global_pool": "avg"} if method == "tokens" else {}
    model = timm.create_model(name, num_classes=3, **options)
    size = model.pretrained_cfg["input_size"][-1]
    images, labels = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8), torch.tensor([0, 2])
    expected = ActivationTeacher(model, method=method).raw(images, labels)
    with pretended_gpus():
        teacher = ActivationTeacher(model, method=method).to("cuda")
        there = to_gpu((images, labels))
        with no_host_reads():
            got = teacher.raw(*there)
            outside = teacher.raw(there[0], to_gpu(torch.tensor([0, 3])))
    assert got.is_cuda
    torch.testing.assert_close(held(got), expected, rtol=0.1, atol=0.05 * float(expected.abs().max()))
    # A label that is no class has no evidence.
    assert held(outside).abs().amax((1, 2))[1] == 0 < held(outside).abs().amax((1, 2))[0]


def test_the_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(CASES["tiny"], name="small", batch=2, dtype=torch.float16)
    monkeypatch.setitem(CASES, "gpu-fp16", small)
    monkeypatch.setattr("bench.model.cases", lambda: [small])
    monkeypatch.setattr("bench.sweep.cases_swept", lambda: [small])
    with pretended_gpus() as now:
        bench([
            "gpu", "--out", str(tmp_path), "--case", "gpu-fp16", "--milliseconds", "1",
            "--model-seconds", "9", "--sweep-seconds", "9",
        ])  # fmt: skip
    (path,) = tmp_path.glob("*.json")
    assert path.stem == "nvidia-h100-80gb-hbm3"
    record = json.loads(path.read_text())
    wrong = {row["implementation"]: row["wrong"] for row in record["rows"] if "wrong" in row}
    assert not wrong
    ours = {row["implementation"]: row for row in record["rows"] if row["implementation"].startswith("ours")}
    assert len(ours) >= 4
    for row in ours.values():
        assert "no_graph" not in row
        assert row["kernel_us_p50"] > 0
        assert row["extra_bytes"] == 0
    assert record["model"] and record["launch_table"]
    assert not [row for row in record["model"] + record["launch_table"] if "wrong" in row]
    assert {path.name.removeprefix("nvidia-h100-80gb-hbm3") for path in tmp_path.iterdir()} == {
        ".json", ".csv", ".png", "-model.csv", "-launch.csv",
    }  # fmt: skip
    assert len(now.launches) > 50
