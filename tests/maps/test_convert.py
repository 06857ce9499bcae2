"""`python -m tokenmix_kernels.maps convert`: label maps of TokenLabeling and ReLabel."""

import os
import re
from argparse import Namespace

import pytest
import torch

pytest.importorskip("torchvision", reason="needs the extra 'maps'")

from maps_helpers import expect_error, make_images
from PIL import Image
from torchvision.datasets import ImageFolder

from tokenmix_kernels.maps import folder_digest
from tokenmix_kernels.maps.__main__ import main
from tokenmix_kernels.maps.bank import MapBank


def label_map(own, label, k=3, seed=0):
    """[2, k, h, w] as TokenLabeling stores it: the own label's values in changing places among the top k."""
    generator = torch.Generator().manual_seed(seed)
    h, w = own.shape
    values = torch.randn(k, h, w, generator=generator)
    others = [c for c in range(10) if c != label]
    indices = torch.tensor(others)[torch.rand(k, h, w, len(others), generator=generator).argmax(-1)]
    place = torch.randint(k, (h, w), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    there = own != 0  # a zero stands for a position where the label is not among the top k
    values[place[there], rows[there], columns[there]] = own[there]
    indices[place[there], rows[there], columns[there]] = label
    return torch.stack([values.half(), indices.half()])


@pytest.fixture
def label_maps(tmp_path):
    """A data set, its label maps and the own-label maps that are in them."""
    data = make_images(tmp_path / "images", ["a", "b", "c"], 9)
    (data / "c" / "image2.png").rename(data / "c" / "image2.with.dots.png")
    root = tmp_path / "labels"
    expected = []
    for number, (path, label) in enumerate(ImageFolder(str(data)).samples):
        own = torch.randn(6, 5, generator=torch.Generator().manual_seed(100 + number)).half().float()
        own[0, :3] = 0
        if number == 4:
            own.zero_()
        target = root / os.path.basename(os.path.dirname(path)) / (os.path.basename(path).split(".")[0] + ".pt")
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save(label_map(own, label, seed=number), target)
        expected.append(own.clamp(min=0))
    return data, root, torch.stack(expected)


def test_convert(label_maps, tmp_path, capsys):
    data, root, expected = label_maps
    out = tmp_path / "c.bank"
    arguments = ["convert", str(root), "--data", str(data), "--out", str(out), "--workers", "0"]
    assert main([*arguments, "--batch-size", "4", "--teacher", "nfnet"]) == 0
    assert "9 maps of 6x5" in capsys.readouterr().out
    bank = MapBank.open(out)
    bank.check(digest=folder_digest(ImageFolder(str(data))))
    assert bank.teacher == "nfnet (label maps, whole)"
    found = bank.maps(torch.arange(9))
    tolerance = expected.amax((1, 2), keepdim=True) * 0.5 / 255 + 1e-6
    assert ((found - expected).abs() <= tolerance).all()
    assert found[4].eq(0).all() and (expected.amax((1, 2)) > 0).sum() == 8


def test_convert_of_maps_of_the_centre_square(tmp_path):
    """A wide image: its outer columns are not covered, the inner ones show the map at half the width."""
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.new("RGB", (80, 40)).save(tmp_path / "images" / "a" / "x.png")
    (tmp_path / "labels" / "a").mkdir(parents=True)
    own = torch.ones(8, 8) * torch.tensor([1.0, 1, 1, 1, 3, 3, 3, 3])
    torch.save(torch.stack([own, torch.zeros(8, 8)])[:, None], tmp_path / "labels" / "a" / "x.pt")
    arguments = ["convert", tmp_path / "labels", "--data", tmp_path / "images", "--region", "centre"]
    arguments += ["--out", tmp_path / "d.bank", "--workers", "0"]
    assert main([str(argument) for argument in arguments]) == 0
    found = MapBank.open(tmp_path / "d.bank").maps(torch.tensor([0]))[0]
    # The square covers columns 2 to 5; bilinear between its columns 0|1, 2|3, 4|5, 6|7.
    expected = torch.tensor([0.0, 0, 1, 1, 3, 3, 0, 0]).expand(8, 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (None, "there is no label map .*image3.pt for the image .*image3.png"),
        (b"rubbish", "label map .*image3.pt cannot be read: it is not a file of torch.save, or a damaged one$"),
        (b"", "label map .*image3.pt cannot be read: it is empty$"),
        ({"args": Namespace()}, r"image3.pt cannot be read: it holds objects other than tensors .argparse.Namespace."),
        (torch.zeros(3, 4, 6, 5), r"image3.pt must be \[2, k, h, w\].* got \[3, 4, 6, 5\]"),
        ({"values": torch.zeros(2, 3, 6, 5)}, "image3.pt must be .* got dict"),
        (torch.full((2, 3, 6, 5), float("nan")), "image3.pt has NaN"),
        (torch.zeros(2, 3, 7, 5), "image3.pt is of 7x5, that of the first image of 6x5"),
    ],
    ids=["missing", "rubbish", "empty", "objects", "shape", "dict", "nan", "grid"],
)
def test_convert_names_the_file(label_maps, tmp_path, capsys, entry, says):
    data, root, _ = label_maps
    path = root / "a" / "image3.pt"
    path.unlink()
    if isinstance(entry, bytes):
        path.write_bytes(entry)
    elif entry is not None:
        torch.save(entry, path)
    arguments = ["convert", root, "--data", data, "--out", tmp_path / "e.bank", "--workers", 0]
    expect_error(capsys, arguments, says)
    assert not (tmp_path / "e.bank").exists()


def test_convert_refuses_class_ids_that_half_precision_cannot_tell_apart(label_maps, tmp_path, capsys):
    data, root, _ = label_maps
    other = tmp_path / "map.txt"
    other.write_text("a 0\nb 1\nc 2049\n")
    arguments = ["convert", root, "--data", data, "--out", tmp_path / "f.bank", "--workers", 0]
    expect_error(capsys, [*arguments, "--class-map", other], "class ids as torch.float16, too coarse for 2049")


def make_pair(root, images, files):
    """A data set of small images, and label maps with a constant value each, 1, 2, ... in order."""
    for name in images:
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / "images" / name)
    labels = ImageFolder(str(root / "images")).class_to_idx
    for value, name in enumerate(files, 1):
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        label = labels.get(name.split("/")[0], 0)
        torch.save(torch.stack([torch.full((1, 2, 2), float(value)), torch.full((1, 2, 2), float(label))]),
                   root / "labels" / name)  # fmt: skip
    return ["convert", str(root / "labels"), "--data", str(root / "images"), "--out", str(root / "a.bank"),
            "--workers", "0"]  # fmt: skip


@pytest.mark.parametrize(
    ("images", "files"),
    [
        (["cat/photo.1.png", "cat/photo.2.png"], ["cat/photo.1.pt", "cat/photo.2.pt"]),  # names up to the last dot
        (["cat/photo.1.png", "cat/photo.2.png"], ["cat/photo.1.pt", "cat/photo.pt"]),
        (["cat/s1/a.png", "dog/s1/a.png"], ["cat/s1/a.pt", "dog/s1/a.pt"]),  # below the folder of the class
    ],
)
def test_each_image_gets_its_own_label_map(tmp_path, images, files):
    assert main(make_pair(tmp_path, images, files)) == 0
    found = MapBank.open(tmp_path / "a.bank").maps(torch.arange(2)).amax((1, 2))
    assert found.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("images", "files", "shared"),
    [
        (["cat/a.jpg", "cat/a.png"], ["cat/a.pt"], "cat/a.pt"),
        (["cat/photo.1.jpg", "cat/photo.2.jpg"], ["cat/photo.pt"], "cat/photo.pt"),
        (["cat/s1/a.png", "dog/s1/a.png"], ["s1/a.pt"], "s1/a.pt"),
    ],
)
def test_one_label_map_for_two_images_is_an_error_that_names_both(tmp_path, capsys, images, files, shared):
    arguments = make_pair(tmp_path, images, files)
    both = " and ".join(re.escape(str(tmp_path / "images" / name)) for name in images)
    expect_error(
        capsys, arguments, rf"the label map {tmp_path / 'labels' / shared} would belong to two images, {both}:"
    )
    assert not (tmp_path / "a.bank").exists() and not (tmp_path / "a.bank.partial").exists()


def test_broken_images_are_named_or_skipped(label_maps, tmp_path, capsys):
    data, root, _ = label_maps
    broken = data / "b" / "image4.png"
    broken.write_bytes(b"")
    arguments = ["convert", str(root), "--data", str(data), "--out", str(tmp_path / "e.bank"), "--workers", "0"]
    expect_error(capsys, arguments, f"error: the image {broken} cannot be read: it is empty")
    assert main([*arguments, "--skip-broken"]) == 0
    skipped = MapBank.open(tmp_path / "e.bank").skipped.tolist()
    assert [ImageFolder(str(data)).samples[number][0] for number in skipped] == [str(broken)]


def test_changed_label_maps_are_not_mixed(label_maps, tmp_path, capsys):
    data, root, _ = label_maps
    last = root / "c" / "image8.pt"
    content = last.read_bytes()
    last.write_bytes(b"")
    arguments = ["convert", root, "--data", data, "--out", tmp_path / "e.bank", "--workers", 0, "--batch-size", 2]
    expect_error(capsys, arguments, "image8.pt cannot be read")
    last.write_bytes(content)
    os.utime(root / "a" / "image0.pt", (1, 1))
    expect_error(capsys, arguments, "holds maps of 1 images that have changed since, the first is .*image0.png")
