"""`python -m tokenmix_kernels.maps convert`: label maps of TokenLabeling and ReLabel."""

import os

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
        (b"rubbish", "label map .*image3.pt cannot be read"),
        (torch.zeros(3, 4, 6, 5), r"image3.pt must be \[2, k, h, w\].* got \[3, 4, 6, 5\]"),
        ({"values": torch.zeros(2, 3, 6, 5)}, "image3.pt must be .* got dict"),
        (torch.full((2, 3, 6, 5), float("nan")), "image3.pt has NaN"),
        (torch.zeros(2, 3, 7, 5), "image3.pt is of 7x5, that of the first image of 6x5"),
    ],
    ids=["missing", "rubbish", "shape", "dict", "nan", "grid"],
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
