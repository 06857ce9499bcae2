"""The command line: a wrong value, a missing device or library is one sentence that says what to do."""

import subprocess
import sys

import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'maps'")
functional = pytest.importorskip("torchvision.transforms.functional", reason="needs the extra 'maps'")

from maps_helpers import ONE_THREAD, build_arguments, expect_error  # noqa: E402

from tokenmix_kernels.maps.__main__ import main, one_line  # noqa: E402
from tokenmix_kernels.maps.build import pick_device  # noqa: E402


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", r"--device must be cpu, cuda, cuda:N, mps or xpu, got 'gpu' \(a GPU of NVIDIA or AMD is cuda\)"),
        ("cdua", "--device must be cpu, cuda, cuda:N, mps or xpu, got 'cdua'"),
        ("meta", "--device must be cpu, .* got 'meta'"),
        ("cuda:x", "--device must be cpu, .* got 'cuda:x'"),
        ("cuda", "--device cuda: there is none on this machine that this torch can use; try --device cpu"),
        ("cuda:1", "--device cuda:1: there is none"),
        ("mps", "--device mps: there is none"),
        ("xpu", "--device xpu: there is none"),
    ],
)
def test_a_device_that_is_not_there_is_named_first(data, weights, tmp_path, capsys, monkeypatch, device, says):
    for backend in (torch.cuda, torch.backends.mps, torch.xpu):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    arguments = build_arguments(data, weights, tmp_path / "a.bank")
    expect_error(capsys, [*arguments, "--weights", tmp_path / "absent", "--device", device], says)


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None, 1) == pick_device("cuda", 1) == torch.device("cuda", 1)
    assert pick_device("cuda:0", 1) == torch.device("cuda", 0)
    assert pick_device("cpu", 1) == torch.device("cpu")
    for name, local in (("cuda:2", 0), ("cuda", 2)):
        with pytest.raises(ValueError, match=f"--device {name}: there are 2 GPUs, number 2 is absent"):
            pick_device(name, local)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--batch-size", "0"], "--batch-size: must be a whole number of at least 1, got '0'"),
        (["--workers", "-1"], "--workers: must be a whole number of at least 0, got '-1'"),
        (["--workers", "two"], "--workers: must be a whole number"),
        (["--size", "0"], "--size: must be a whole number of at least 1"),
        (["--num-classes", "0"], "--num-classes: must be a whole number of at least 1"),
        (["--save-every", "nan"], "--save-every: must be a number of seconds, at least 0, got 'nan'"),
    ],
)
def test_numbers_out_of_range_name_the_flag(data, weights, tmp_path, capsys, more, says):
    with pytest.raises(SystemExit) as caught:
        main([*build_arguments(data, weights, tmp_path / "a.bank"), *more])
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_errors_are_one_line():
    lines = ("Caught ImageError in DataLoader worker process 0.", "Original Traceback (most recent call last):",
             "tokenmix_kernels.photos.ImageError: the image a cannot be read: why", "")  # fmt: skip
    caught = ValueError("\n".join(lines))
    assert one_line(caught) == "the image a cannot be read: why"
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize("library", ["timm", "torchvision", "tqdm"])
def test_a_missing_library_is_named_with_its_extra(data, weights, tmp_path, capsys, monkeypatch, library):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    expect_error(
        capsys,
        build_arguments(data, weights, tmp_path / "a.bank"),
        rf"error: {library} is needed for this and is not installed: pip install 'tokenmix_kernels\[maps\]'",
    )


def test_base_install_needs_none_of_the_extras():
    script = (
        "import sys\n"
        "for name in ('timm', 'torchvision', 'tqdm', 'matplotlib', 'PIL', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "import tokenmix_kernels\n"
        "from tokenmix_kernels import maps, photos, transforms\n"
        "try:\n"
        "    transforms.tracked_transform(32)\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script], env=ONE_THREAD, capture_output=True, text=True, timeout=100
    )
    assert process.returncode == 0, process.stderr
    assert "pip install 'tokenmix_kernels[maps]'" in process.stdout
