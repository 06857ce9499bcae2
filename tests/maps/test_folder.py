"""Image folders: their digest, their classes, and fingerprints of their files."""

import os

import pytest

pytest.importorskip("torchvision", reason="needs the extra 'maps'")

from torchvision.datasets import ImageFolder

from tokenmix_kernels.maps.folder import folder_digest


def test_the_digest_does_not_depend_on_where_the_data_lies(data, tmp_path):
    moved = tmp_path / "elsewhere"
    os.symlink(data, moved)
    assert folder_digest(ImageFolder(str(moved))) == folder_digest(ImageFolder(str(data)))
