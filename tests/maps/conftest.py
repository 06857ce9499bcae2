"""Fixtures of the tests of activation maps."""

import pytest
import torch
from bank_helpers import COUNT, create, random_maps

from tokenmix_kernels.maps.bank import MapBank


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    from maps_helpers import make_images

    return make_images(tmp_path_factory.mktemp("images"), ["a cat", "dog"], 23)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=2)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def bank(tmp_path):
    with create(tmp_path / "a.bank") as writer:
        writer.write(torch.arange(COUNT), random_maps())
        writer.finish()
    return MapBank.open(tmp_path / "a.bank")
