"""`python -m tokenmix_kernels.maps inspect`: what it prints and draws of a bank."""

import numpy as np
import pytest

pytest.importorskip("timm", reason="needs the extra 'maps'")
pytest.importorskip("matplotlib", reason="needs the extra 'maps'")

from maps_helpers import build_arguments, expect_error, make_images
from PIL import Image

from tokenmix_kernels.maps.__main__ import main
from tokenmix_kernels.maps.bank import MapBank


def test_inspect(data, weights, tmp_path, capsys):
    out = tmp_path / "train.bank"
    assert main(build_arguments(data, weights, out)) == 0
    capsys.readouterr()
    assert main(["inspect", str(out), "--data", str(data), "--verify", "--count", "5"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "23 of 3x4",
        "test_resnet (cam",
        MapBank.open(out).digest,
        "correct",
        "is the data set of the bank",
    ):
        assert part in printed
    picture = np.asarray(Image.open(tmp_path / "train.bank.png").convert("RGB"))
    # Five images and five overlays: coloured, not a white page.
    assert picture.shape[1] > 2 * picture.shape[0] and (picture != 255).any(2).mean() > 0.2

    assert main(["inspect", str(out), "--ids", "22", "0", "--out", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 1000
    expect_error(capsys, ["inspect", out, "--ids", 23], r"ids must be in \[0, 23\)")
    other = make_images(tmp_path / "other", ["a cat", "dog"], 22)
    expect_error(capsys, ["inspect", out, "--data", other], "holds 23 maps, the data set has 22 images")
    expect_error(capsys, ["inspect", tmp_path / "absent.bank"], "absent.bank")
    (tmp_path / "foreign.bank").write_bytes(b"x" * 10000)
    expect_error(capsys, ["inspect", tmp_path / "foreign.bank"], "foreign.bank is not a map bank")
    content = bytearray(out.read_bytes())
    content[4100] ^= 255
    out.write_bytes(content)
    expect_error(capsys, ["inspect", out, "--verify"], "is damaged: checksum")
