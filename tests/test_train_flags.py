"""Flags: each has an effect or is refused, on resume too, and what is wrong gets a sentence."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from train_helpers import MODEL, ROOT, make_folder, tiny

from train import checkpoint, teacher
from train.config import parse
from train.device import choose_device, start_processes
from train.evaluate import evaluate_checkpoint
from train.flags import FIXED, changed_flags, unclassified
from train.guard import replay_args
from train.loop import train
from train.model import load_weights, make_model
from train.parser import build_parser
from train.run import build
from train.step import set_mixing

SHORT = ("--epochs", "2", "--max-steps", "2", "--aa", "none")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=4, train=8, val=2)


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    train(parse(tiny(images, output, *SHORT)))
    return output


def test_every_flag_is_in_the_table_of_resume() -> None:
    assert unclassified(build_parser()) == set()


def test_resume_refuses_what_the_state_fixes_by_name(finished: Path) -> None:
    saved = checkpoint.load(finished / "last.pt")["args"]
    assert changed_flags(saved, saved, False) == []
    for name in FIXED:
        assert name in saved
        (text,) = changed_flags(saved, {**saved, name: "other"}, False)
        assert text == f"--{name.replace('_', '-')} {saved[name]} (now other)"
    assert changed_flags(saved, {**saved, "num_workers": 5}, True) == ["--num-workers 0 (now 5)"], "a stream's order"
    assert changed_flags(saved, {**saved, "num_workers": 5, "log_every": 7}, False) == []


def test_resume_refuses_weight_decay(images: Path, finished: Path) -> None:
    with pytest.raises(ValueError, match=r"--weight-decay 0\.05 \(now 0\.3\)"):
        train(parse(tiny(images, finished, *SHORT, "--resume", "auto", "--weight-decay", "0.3")))
    assert json.loads((finished / "args.json").read_text())["weight_decay"] == 0.05


def test_more_epochs_extend_a_run_and_say_what_the_schedule_does(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny(images, tmp_path, *SHORT, "--warmup-epochs", "0")
    train(parse(arguments))
    capsys.readouterr()
    with pytest.raises(ValueError, match="--epochs must be at least the run's 2, got 1"):
        train(parse([*arguments, "--epochs", "1", "--resume", "auto"]))
    history = train(parse([*arguments, "--epochs", "4", "--resume", "auto"]))
    assert "--epochs 2 -> 4: the cosine schedule is stretched over 4 epochs" in capsys.readouterr().out
    fresh = build(parse([*arguments, "--epochs", "4"]))
    for epoch in (2, 3):
        fresh.scheduler.step(epoch)
        assert history[epoch]["lr"] == pytest.approx(fresh.optimizer.param_groups[0]["lr"])
    assert json.loads((tmp_path / "args.json").read_text())["epochs"] == 4


def test_other_data_is_refused_on_resume(finished: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", classes=4, train=9, val=2)
    with pytest.raises(ValueError, match="was written on other data than --data-path"):
        train(parse(tiny(other, finished, *SHORT, "--resume", "auto")))


def test_num_classes_must_be_the_data_s(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--num-classes must be 4, .* got 10"):
        build(parse(tiny(images, tmp_path, "--num-classes", "10")))


def test_mixing_ends_at_its_epoch(images: Path, tmp_path: Path) -> None:
    run = build(parse(tiny(images, tmp_path, "--mixup-off-epoch", "2")))
    enabled = []
    for epoch in range(4):
        set_mixing(run, epoch)
        enabled.append(run.mix.mixup_enabled)
    assert enabled == [True, True, False, False]
    batch = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.arange(8) % 4
    assert torch.equal(run.mix(*batch)[1].argmax(1), batch[1]), "labels are smoothed only"


def test_evaluation_takes_model_and_data_from_the_checkpoint(
    images: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = {}
    for name in ("last.pt", "model.safetensors"):
        more = [] if name == "last.pt" else tiny(images, finished, *SHORT)
        for size in ("32", "48"):
            train(parse([*more, "--eval", "--resume", str(finished / name), "--device", "cpu", "--input-size", size]))
            printed[name, size] = capsys.readouterr().out
    record = json.loads((finished / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"averaged weights: top1 {record['ema_top1']:.4g}, loss {record['ema_loss']:.4g}" in printed["last.pt", "32"]
    assert f"raw weights: top1 {record['val_top1']:.4g}, loss {record['val_loss']:.4g}" in printed["last.pt", "32"]
    assert "weights: top1" in printed["model.safetensors", "32"]
    assert "top1" in printed["last.pt", "48"] and "top1" in printed["model.safetensors", "48"]


def test_weights_that_do_not_fit_are_not_evaluated(images: Path, finished: Path) -> None:
    run = build(parse(tiny(images, finished, "--model-kwargs", json.dumps(MODEL | {"depth": 3}))))
    with pytest.raises(ValueError, match=r"--resume .*does not fit the model: .*blocks\.2"):
        evaluate_checkpoint(run, finished / "model.safetensors")


def test_init_from_resamples_the_position_embedding_as_timm(
    images: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = finished / "model.safetensors"
    args = parse(tiny(images, finished, "--input-size", "48", "--init-from", str(path)))
    model: Any = make_model(args, 4)
    assert "resampled: pos_embed" in capsys.readouterr().out
    small = timm.create_model(args.model, img_size=32, num_classes=4, **MODEL)
    small.load_state_dict(timm.models.load_state_dict(str(path)))
    small.set_input_size((48, 48))
    torch.testing.assert_close(model.pos_embed, small.pos_embed)
    other: Any = make_model(parse(tiny(images, finished)), 7)
    text = load_weights(other, timm.models.load_state_dict(str(path)), "FILE")
    assert "initialised anew: head.bias, head.weight" in text


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"", "it is empty"), (b"<html></html>", "a web page"), (b"version https://git-lfs.github.com", "Git LFS pointer"),
     (b"PK\x03\x04 cut", "damaged"), (b"junk of some length", "not a file of torch.save")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_weights_file_that_is_none_gets_a_sentence(
    images: Path, tmp_path: Path, content: bytes, why: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"--init-from: .*{name} cannot be read: ") as error:
        make_model(parse(tiny(images, tmp_path, "--init-from", str(path))), 4)
    assert "\n" not in str(error.value) and (why in str(error.value) or name.endswith("safetensors"))


def test_a_gpu_by_default_has_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(torch.device(device).index))
    for name in ("auto", "cuda", "cuda:1"):
        start_processes(name)
    assert chosen == [0, 0, 1]
    assert choose_device("cuda", local_rank=1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="one of this machine's 2 GPUs"):
        choose_device("cuda:5")


@pytest.mark.parametrize("name", ["gpu", "mtia", "cuda:x", "", "meta"])
def test_a_device_that_is_none_gets_a_sentence(name: str) -> None:
    with pytest.raises(ValueError, match="--device must be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N, got"):
        choose_device(name)


def test_cuda_without_a_gpu_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda needs a GPU.*use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--aa", "foo"], "--aa must be none or a policy"),
        (["--aa", "rand-x9"], "--aa must be none or a policy"),
        (["--model-kwargs", '{"dept": 2}'], "--model-kwargs: .* refuses .*dept"),
        (["--model", "deit_tinny_patch16_224"], "did you mean deit_tiny_patch16_224"),
        (["--maps", "missing.bank"], "--maps must be .* got missing.bank"),
        (["--init-from", "missing.pth"], "--init-from: .* missing.pth"),
        (["--resume", "missing.pt"], "--resume: there is no checkpoint missing.pt"),
    ],
)
def test_wrong_flags_get_a_sentence(images: Path, tmp_path: Path, flags: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, OSError), match=sentence):
        train(parse(tiny(images, tmp_path, *flags)))


def test_a_teacher_that_cannot_be_downloaded_is_refused_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, timeout: float) -> None:
        assert timeout <= 5
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    with pytest.raises(ValueError, match=r"--teacher resnet18: .*huggingface.co cannot be reached.*--teacher-weights"):
        teacher.check_hub("resnet18")


def test_missing_extras_are_named() -> None:
    code = "import sys; sys.modules['timm'] = None; from train.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and 'pip install "tokenmix_kernels[train]"' in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [({"data": "/etc"}, "none of"), ({"batch_size": "8"}, "--batch-size"), ({"mixer": "x"}, "--mixer"),
     ({"data_kwargs": {"download": True}}, "--data-kwargs"), ({"model_kwargs": {"pretrained_cfg": {}}}, "pretrained")],
)  # fmt: skip
def test_replay_takes_no_hostile_arguments(saved: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, argparse.ArgumentTypeError), match=sentence):
        replay_args(parse([]), saved)


def test_replay_writes_where_this_call_says() -> None:
    args = parse(["--cache", "here", "--output", "out"])
    found = replay_args(args, {"cache": "/etc", "output": "/etc", "init_from": "/etc/x", "seed": 3, "unknown": 1})
    assert (found.cache, found.output, found.init_from, found.seed) == ("here", "out", None, 3)
    assert not hasattr(found, "unknown")
