"""Weights from files: the right ones of a checkpoint, nothing that runs, and a sentence for every other file."""

import argparse
import os
import pickle
import socket

import pytest
import torch

from tokenmix_kernels.maps.weights import load_teacher, read_tensors, weights_of

timm = pytest.importorskip("timm", reason="needs the extra 'maps'")


def make(name, classes):
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=classes)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_file(tmp_path, suffix):
    model = make("test_resnet", 6)
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    else:
        pytest.importorskip("safetensors.torch", reason="needs the extra 'train'").save_model(
            model, tmp_path / "w.safetensors"
        )
    loaded = load_teacher("test_resnet", tmp_path / f"w{suffix}")
    assert not loaded.training and loaded.num_classes == 6  # as many as the checkpoint has
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    state = make("test_resnet", 6).state_dict()
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"does not fit test_resnet: 2 parameters of another shape .first fc.bias"):
        load_teacher("test_resnet", tmp_path / "w.pth", num_classes=7)
    with pytest.raises(ValueError, match=r"does not fit test_efficientnet: .* parameters missing"):
        load_teacher("test_efficientnet", tmp_path / "w.pth")
    torch.save({f"other.{k}": v for k, v in state.items() if "bn1" not in k}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="does not fit test_resnet"):
        load_teacher("test_resnet", tmp_path / "w.pth", num_classes=6)
    torch.save({f"other.{k}": v for k, v in state.items()}, tmp_path / "w.pth")
    renamed = load_teacher("test_resnet", tmp_path / "w.pth", num_classes=6)
    assert torch.equal(renamed.state_dict()["fc.weight"], state["fc.weight"])
    (tmp_path / "w.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"the weights file .*w\.pth cannot be read: it is not a file of torch\.save"):
        load_teacher("test_resnet", tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_teacher("test_resnet", tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"timm knows no model 'resnet5O'; did you mean .*resnet50"):
        load_teacher("resnet5O")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "it is a web page"),
        (b"no checkpoint", r"it is not a file of torch\.save"),
        (pickle.dumps(Bomb()), r"it is not a file of torch\.save|objects other than tensors"),
        ({"state_dict": {}, "args": argparse.Namespace(lr=1)}, r"objects other than tensors \(argparse\.Namespace\)"),
        ({"state_dict": {}, "hook": Bomb()}, r"objects other than tensors \(.*mkdir\)"),
        ("half", "it is truncated or damaged"),
        ([1, 2], "a checkpoint must be a dict of tensors, got list"),
        (torch.zeros(3), "a checkpoint must be a dict of tensors, got Tensor"),
        ({"state_dict": {}}, "holds no weights"),
        ({"state_dict": [1]}, "state_dict of the checkpoint must be a dict of tensors, got list"),
        ({"fc.weight": torch.zeros(2), "epoch": 3}, "weights must be tensors by name, got int as 'epoch'"),
        ({3: torch.zeros(2)}, "weights must be tensors by name"),
    ],
)
def test_files_that_hold_no_weights_are_named_and_nothing_runs(tmp_path, monkeypatch, content, why):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "half":
        torch.save({"state_dict": make("test_resnet", 6).state_dict()}, path)
        path.write_bytes(path.read_bytes()[:20000])
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"^the weights file {path} cannot be read: .*{why}") as caught:
        load_teacher("test_resnet", path)
    assert "http" not in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_broken_safetensors_are_named(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"the weights file .*w\.safetensors cannot be read: "):
        load_teacher("test_resnet", tmp_path / "w.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no label map .*absent"):
        read_tensors(tmp_path / "absent", "label map")


RAW, AVERAGED = {"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0])}


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ({"model": RAW, "ema": AVERAGED, "best_is": "ema"}, 2),  # best.pt of python -m train
        ({"model": RAW, "ema": AVERAGED, "best_is": "model"}, 1),
        ({"model": RAW, "ema": None, "best_is": "model"}, 1),
        ({"model": RAW, "ema": AVERAGED}, 1),  # its last.pt
        ({"model": RAW, "model_ema": AVERAGED, "epoch": 3}, 2),  # DeiT
        ({"state_dict": RAW, "state_dict_ema": AVERAGED}, 2),  # timm
        ({"state_dict": RAW}, 1),
        (RAW, 1),
        ({"model": {"module._orig_mod.w": torch.tensor([1.0])}}, 1),
        ({"model": {"_orig_mod.module.w": torch.tensor([1.0])}}, 1),
    ],
)
def test_the_best_weights_of_a_checkpoint_are_taken(checkpoint, expected):
    found = weights_of(checkpoint)
    assert list(found) == ["w"] and found["w"].item() == expected


@pytest.mark.parametrize("best", ["ema", "other", 3])
def test_a_checkpoint_that_names_weights_it_does_not_hold(best):
    with pytest.raises(ValueError, match="best_is of the checkpoint must name weights that it holds"):
        weights_of({"model": RAW, "ema": None, "best_is": best})


def test_averaged_weights_become_the_teacher(tmp_path):
    raw, averaged = make("test_resnet", 6), make("test_resnet", 6)
    torch.nn.init.ones_(averaged.fc.bias)
    checkpoint = {"model": raw.state_dict(), "ema": averaged.state_dict(), "best_is": "ema", "args": {"lr": 1.0}}
    torch.save(checkpoint, tmp_path / "best.pt")
    assert load_teacher("test_resnet", tmp_path / "best.pt").fc.bias.eq(1).all()


def test_state_of_the_process_has_no_influence(tmp_path):
    torch.save(make("test_resnet", 6).state_dict(), tmp_path / "w.pth")
    expected = load_teacher("test_resnet", tmp_path / "w.pth").state_dict()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = load_teacher("test_resnet", tmp_path / "w.pth").state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in expected.items():
        assert found[key].device.type == "cpu" and found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_weights_that_cannot_be_downloaded_are_a_sentence_at_once(monkeypatch):
    def offline(*_arguments, **_options):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def create(*_arguments, **_options):
        raise AssertionError("the hub's client would try for a minute")

    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(socket, "create_connection", offline)
    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr("tokenmix_kernels.maps.weights.getproxies", dict)
    with pytest.raises(ValueError, match=r"weights of resnet50 .*cannot be reached \(Name or service.* give a"):
        load_teacher("resnet50")
    with pytest.raises(ValueError, match="timm has no pretrained weights of resnet200"):
        load_teacher("resnet200")


def test_weights_in_the_cache_or_behind_a_proxy_are_left_to_the_hub(monkeypatch):
    def connect(*_arguments, **_options):
        raise AssertionError("there is no need to connect")

    model = make("test_resnet", 6)
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(timm, "create_model", lambda *_arguments, pretrained, **_options: model)
    monkeypatch.setattr(socket, "create_connection", connect)
    for cached, proxies in ((None, {"https": "http://proxy"}), ("/cache/model.safetensors", {})):
        monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, cached=cached: cached)
        monkeypatch.setattr("tokenmix_kernels.maps.weights.getproxies", lambda proxies=proxies: proxies)
        assert load_teacher("resnet50") is model
