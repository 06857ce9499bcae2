"""`python -m tokenmix_kernels.maps build`: what it builds, how it resumes, and what it says when it cannot."""

import os
import re
import subprocess
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

timm = pytest.importorskip("timm", reason="needs the extra 'maps'")
functional = pytest.importorskip("torchvision.transforms.functional", reason="needs the extra 'maps'")

from maps_helpers import ONE_THREAD, SIZE, build_arguments, expect_error, make_images  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision.datasets import ImageFolder  # noqa: E402

from tokenmix_kernels.maps import folder_digest  # noqa: E402
from tokenmix_kernels.maps.__main__ import main  # noqa: E402
from tokenmix_kernels.maps.bank import MapBank, dataset_digest  # noqa: E402
from tokenmix_kernels.maps.inspect import describe  # noqa: E402
from tokenmix_kernels.maps.teacher import ActivationTeacher, load_teacher  # noqa: E402


def test_build(data, weights, tmp_path, capsys):
    out = tmp_path / "train.bank"
    assert main(build_arguments(data, weights, out, workers=1)) == 0
    printed = capsys.readouterr()
    assert "23 maps of 3x4" in printed.out and "23 of them new" in printed.out
    assert "23/23" in printed.err  # the progress bar

    folder = ImageFolder(str(data))
    labels = [label for _, label in folder.samples]
    bank = MapBank.open(out)
    bank.check(count=23, labels=labels, digest=folder_digest(folder))
    names = [os.path.relpath(path, data) for path, _ in folder.samples]
    assert bank.digest == dataset_digest(names, labels)
    assert bank.teacher == "test_resnet (cam, 96x128 px, teacher.pth)"

    # Independently: one image at a time, the whole image resized.
    teacher = ActivationTeacher(load_teacher("test_resnet", weights))
    interpolation = functional.InterpolationMode(teacher.model.pretrained_cfg["interpolation"])
    assert (bank.scales > 0).sum() > 10
    for number, (path, label) in enumerate(folder.samples):
        image = Image.open(path).convert("RGB")
        assert bank.sizes[number].tolist() == [image.height, image.width]
        pixels = functional.pil_to_tensor(functional.resize(image, SIZE, interpolation))
        expected = teacher(pixels[None], torch.tensor([label]))[0]
        found = bank.maps(torch.tensor([number]))[0]
        tolerance = float(expected.max()) * 0.5 / 255 + 1e-5
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def wait_for_maps(partial, count, process):
    """Until `count` maps are recorded in the unfinished bank, as any reader sees it."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and process.is_alive():
        try:
            MapBank.open(partial)
        except FileNotFoundError:
            pass
        except ValueError as error:
            if int(re.search(r"(\d+) of \d+ maps are in", str(error))[1]) >= count:
                return
        time.sleep(0.002)
    pytest.fail(f"the build ended or hung before {count} maps were recorded")


def test_a_killed_build_is_finished_by_two_processes_with_nothing_lost_or_doubled(weights, tmp_path):
    """kill -9 of a build, then the same under torchrun; compared with a build in one go."""
    count = 200
    data = make_images(tmp_path / "images", ["a", "b"], count)
    out, partial = tmp_path / "train.bank", tmp_path / "train.bank.partial"
    arguments = build_arguments(data, weights, out, **{"batch-size": 2, "save-every": 0.0})
    process = get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    try:
        wait_for_maps(partial, 40, process)
    finally:
        process.kill()
        process.join()
    assert partial.exists() and not out.exists()
    with pytest.raises(FileNotFoundError, match=r"train\.bank is not finished"):
        MapBank.open(out)
    scales = np.fromfile(partial, "<f4", count, offset=4096 + 4096)  # 200 * 12 bytes of values before it
    done = int((~np.isnan(scales)).sum())
    assert 40 <= done < count

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tokenmix_kernels.maps", *arguments[:-2]]
    resumed = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{done} of {count} maps are there already" in resumed.stdout
    assert resumed.stdout.count(f"{count} maps of 3x4") == 1 and f"{count - done} of them new" in resumed.stdout
    assert "process 1 of 2: 100%|" in resumed.stderr and f" {(count - done + 1) // 2}/" in resumed.stderr
    assert main(build_arguments(data, weights, tmp_path / "once.bank")) == 0
    shared, once = MapBank.open(out), MapBank.open(tmp_path / "once.bank")
    shared.verify()
    assert torch.equal(shared.sizes, once.sizes) and torch.equal(shared.labels, once.labels)
    ids = torch.arange(count)
    # Batches fall differently after a resume, which may move the teacher's last bits.
    torch.testing.assert_close(shared.maps(ids), once.maps(ids), rtol=1e-2, atol=float(once.scales.max()))
    assert {p.name for p in tmp_path.iterdir()} >= {"images", "once.bank", "train.bank"} and not partial.exists()


def test_folders_of_imagenet_get_the_classes_of_imagenet(tmp_path, capsys):
    """Two of ImageNet's folders and a teacher of its 1000 classes: goldfish is 1, coffee mug 504."""
    data = make_images(tmp_path / "images", ["n01443537", "n03063599"], 4)
    torch.manual_seed(0)
    weights = tmp_path / "teacher.pth"
    model = timm.create_model("test_resnet", pretrained=False)
    torch.nn.init.normal_(model.fc.weight, std=0.3)
    torch.nn.init.constant_(model.fc.bias, 3.0)
    torch.save(model.state_dict(), weights)
    arguments = build_arguments(data, weights, tmp_path / "a.bank")
    assert main(arguments) == 0
    teacher = ActivationTeacher(load_teacher("test_resnet", weights))
    pixels = functional.pil_to_tensor(
        functional.resize(Image.open(data / "n03063599" / "image1.png").convert("RGB"), SIZE,
                          functional.InterpolationMode(teacher.model.pretrained_cfg["interpolation"]))
    )  # fmt: skip
    bank = MapBank.open(tmp_path / "a.bank")
    assert bank.labels.tolist() == [0, 0, 1, 1]

    def error(number, label):
        expected = teacher(pixels[None], torch.tensor([label]))[0]
        return float((bank.maps(torch.tensor([number]))[0] - expected).abs().max() / expected.max())

    assert error(2, 504) < 0.01 < error(2, 1)

    other = tmp_path / "map.txt"
    other.write_text("n01443537 3\n\nn03063599 1\n")
    assert main([*arguments[:-1], "4", "--class-map", str(other), "--out", str(tmp_path / "b.bank")]) == 0
    bank = MapBank.open(tmp_path / "b.bank")
    assert error(2, 1) < 0.01 < error(2, 504)
    for text, says in [
        ("n01443537 3\n", "no line for 1 folders, the first is n03063599"),
        ("n01443537 3\nn03063599 1000\n", "names class 1000, the teacher has 1000"),
        ("n01443537\n", "line 1 must be 'folder index'"),
    ]:
        other.write_text(text)
        expect_error(capsys, [*arguments, "--class-map", other, "--out", tmp_path / "c.bank"], says)
    (data / "n03063599").rename(data / "mugs")
    expect_error(capsys, [*arguments, "--out", tmp_path / "c.bank"], "2 classes but the teacher 1000.*--class-map")


def test_build_says_what_is_wrong(data, weights, tmp_path, capsys):
    out = tmp_path / "a.bank"
    good = build_arguments(data, weights, out)
    expect_error(capsys, build_arguments(tmp_path / "absent", weights, out), "there is no folder .*absent")
    expect_error(
        capsys, build_arguments(data, weights, tmp_path / "no" / "a.bank"), "there is no folder .*no for --out"
    )
    expect_error(capsys, build_arguments(tmp_path, weights, out), "must hold one folder of images per class")
    expect_error(capsys, [*good, "--model", "resnet_10"], "timm knows no model 'resnet_10'; did you mean")
    expect_error(capsys, [*good, "--weights", tmp_path / "no.pth"], "no weights file .*no.pth")
    expect_error(capsys, [*good, "--method", "attention"], "needs a vision transformer")
    expect_error(capsys, [*good, "--size", 64, 64, 64], "--size must be a side or height and width")
    expect_error(capsys, [*good, "--mean", 0.5, 0.5], "--mean must be one number or three, got 2")
    assert not list(tmp_path.iterdir())
    assert main(good) == 0
    expect_error(capsys, good, "a.bank exists already: delete it or give another --out")


def test_build_with_a_vision_transformer_at_another_size(data, tmp_path, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    arguments = build_arguments(data, tmp_path / "vit.pth", tmp_path / "a.bank")
    arguments[arguments.index("test_resnet")] = "test_vit"
    expect_error(capsys, [*arguments, "--size", 100], "multiples of the patch size 16x16 of test_vit, got 100x100")
    assert main([*arguments, "--size", "64", "96"]) == 0
    bank = MapBank.open(tmp_path / "a.bank")
    assert bank.grid == (4, 6) and bank.teacher.startswith("test_vit (attention, 64x96 px")
    shares = bank.maps(torch.arange(23)).sum((1, 2))
    assert ((shares > 0.5) & (shares < 1.0)).all()  # the class token keeps the rest of its attention


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_the_rest_is_kept(weights, tmp_path, capsys, workers):
    data = make_images(tmp_path / "images", ["a", "b"], 12)
    broken = data / "b" / "image7.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    arguments = build_arguments(data, weights, tmp_path / "a.bank", workers=workers)
    expect_error(capsys, arguments, rf"error: the image {broken} cannot be read: ")
    broken.write_bytes(content)
    assert main(arguments) == 0
    # b/image7 is the tenth of the sorted list: two batches of four before its own were kept.
    assert "8 of 12 maps are there already" in capsys.readouterr().out


def interrupted(data, weights, out, **options):
    """Arguments of a build that stopped at the last image, which is empty; and that image's path and content."""
    broken = sorted(data.glob("*/*.png"))[-1]
    content = broken.read_bytes()
    broken.write_bytes(b"")
    arguments = build_arguments(data, weights, out, **options)
    assert main(arguments) == 1
    return arguments, broken, content


def test_a_bank_is_not_continued_with_other_maps(weights, tmp_path, capsys):
    """Each thing that a map depends on, changed alone and under the same names, is noticed and named."""
    data = make_images(tmp_path / "images", ["a", "b"], 9)
    own = tmp_path / "own.pth"
    own.write_bytes(weights.read_bytes())
    arguments, broken, content = interrupted(data, own, tmp_path / "a.bank")
    partial = (tmp_path / "a.bank.partial").read_bytes()
    (tmp_path / "map.txt").write_text("a 1\nb 0\n")
    start = r"a\.bank\.partial is the beginning of another bank: "
    for more, says in (
        (
            ["--size", 96],
            r"grid was \[3, 4\], is \[3, 3\]; teacher was test_resnet .cam, 96x128 px.* is test_resnet .cam, 96x96 px",
        ),
        (["--mean", 0.3], r"mean was 0\.\d+, .*, is 0\.3\. Delete"),
        (["--std", 0.3, 0.3, 0.4], r"std was .*, is 0\.3, 0\.3, 0\.4\. Delete"),
        (["--class-map", tmp_path / "map.txt"], "classes was .*, is "),
    ):
        expect_error(capsys, [*arguments, *more], start + says)
    torch.manual_seed(1)
    torch.save(timm.create_model("test_resnet", pretrained=False, num_classes=2).state_dict(), own)
    expect_error(capsys, arguments, start + "weights was .{64}, is .{64}. Delete")
    own.write_bytes(weights.read_bytes())
    first = sorted(data.glob("*/*.png"))[0]
    kept, times = first.read_bytes(), os.stat(first)
    first.write_bytes(broken.with_name("image1.png").read_bytes())
    expect_error(capsys, arguments, rf"holds maps of 1 images that have changed since, the first is {first}: delete")
    first.write_bytes(kept)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (tmp_path / "a.bank.partial").read_bytes() == partial

    broken.write_bytes(content)  # repaired: the one image that may change
    assert main(arguments) == 0
    bank = MapBank.open(tmp_path / "a.bank")
    bank.verify()
    assert set(bank.metadata["inputs"]) == {"weights", "mean", "std", "interpolation", "classes", "code"}


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_are_skipped_where_asked(weights, tmp_path, capsys, workers):
    data = make_images(tmp_path / "images", ["a", "b"], 11)
    paths = [path for path, _ in ImageFolder(str(data)).samples]
    for number, size in ((2, 0), (7, 60)):
        Path(paths[number]).write_bytes(Path(paths[number]).read_bytes()[:size])
    Path(paths[9]).write_text("no image")
    arguments = [*build_arguments(data, weights, tmp_path / "a.bank", workers=workers), "--skip-broken"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    for number in (2, 7, 9):
        assert f"skipped: the image {paths[number]} cannot be read: " in printed.err
    assert printed.out.splitlines()[-1] == "3 of 11 images could not be read and have no map"
    bank = MapBank.open(tmp_path / "a.bank")
    bank.check(count=11, digest=folder_digest(ImageFolder(str(data))))  # ids are those of the folder
    assert bank.skipped.tolist() == [2, 7, 9] and bank.scales[[2, 7, 9]].eq(0).all()
    assert describe(bank)["skipped"] == "3 images that could not be read, the first is 2"

    for path in paths:
        Path(path).write_bytes(b"")
    arguments = [*build_arguments(data, weights, tmp_path / "b.bank", workers=workers), "--skip-broken"]
    expect_error(capsys, arguments, "none of the 11 images can be read")
    assert not (tmp_path / "b.bank").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_decompression_bomb_is_named_or_skipped(weights, tmp_path, capsys, monkeypatch, workers):
    data = make_images(tmp_path / "images", ["a", "b"], 4)
    Image.new("RGB", (200, 100)).save(data / "b" / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    arguments = build_arguments(data, weights, tmp_path / "a.bank", workers=workers)
    bomb = rf"the image {data / 'b' / 'bomb.png'} cannot be read: Image size \(20000 pixels\) exceeds limit"
    expect_error(capsys, arguments, f"(?m)^error: {bomb}")
    assert main([*arguments, "--skip-broken"]) == 0
    assert re.search(f"skipped: {bomb}", capsys.readouterr().err)


def test_16_bit_images_give_the_maps_of_their_8_bit_versions(weights, tmp_path):
    generator = np.random.default_rng(0)
    for number in range(3):
        narrow = generator.integers(0, 256, (40, 50)).astype(np.uint8)
        for folder, image in (
            ("narrow", Image.fromarray(narrow)),
            ("wide", Image.fromarray(narrow.astype(np.uint16) * 257)),
        ):
            (tmp_path / folder / "a").mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "b").mkdir(exist_ok=True)
            image.save(tmp_path / folder / "ab"[number % 2] / f"{number}.png")
    for folder in ("narrow", "wide"):
        assert main(build_arguments(tmp_path / folder, weights, tmp_path / f"{folder}.bank")) == 0
    narrow, wide = MapBank.open(tmp_path / "narrow.bank"), MapBank.open(tmp_path / "wide.bank")
    assert torch.equal(narrow.values, wide.values) and torch.equal(narrow.scales, wide.scales)
    assert narrow.scales.gt(0).any()


def test_the_averaged_weights_of_a_trainers_checkpoint_are_used(data, weights, tmp_path):
    torch.manual_seed(5)
    other = timm.create_model("test_resnet", pretrained=False, num_classes=2).state_dict()
    best = torch.load(weights, weights_only=True)
    torch.save({"model": other, "ema": best, "best_is": "ema", "epoch": 3}, tmp_path / "best.pt")
    assert main(build_arguments(data, weights, tmp_path / "a.bank")) == 0
    assert main(build_arguments(data, tmp_path / "best.pt", tmp_path / "b.bank")) == 0
    assert torch.equal(MapBank.open(tmp_path / "a.bank").values, MapBank.open(tmp_path / "b.bank").values)
