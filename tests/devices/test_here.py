"""On which devices this process runs the matrix, and why not on the others."""

import pytest
import torch
from device_helpers import DEVICES, missing
from fuzz import placed
from mix_helpers import LAYOUTS, bits_equal, random_images

from tokenmix_kernels import dispatch, kernels, tokenmix


@pytest.mark.parametrize("name", DEVICES)
def test_the_matrix_runs_on(name):
    if why := missing(name):
        pytest.skip(why)
    device = DEVICES[name]
    images, labels = device.put(random_images((2, 3, 8, 8))), device.put(torch.arange(2))
    mixed = tokenmix(images, labels, num_classes=2, patch_size=4, backend=device.backend)
    assert mixed.images.device.type == device.home
    assert kernels.interpreted() == (name == "interpreter")
    assert name == "interpreter" or (dispatch.backend_of(images) is kernels) == (name == "gpu")


def test_memory_that_is_not_written_is_poison(device):
    assert torch.empty(100, device=device.home).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_copy_on_a_device_has_the_layout_and_the_offset(device, layout, dtype):
    images = random_images((2, 3, 8, 12), dtype, layout)
    there = placed(images, device.home)
    assert there.device.type == device.home and there.data_ptr() != images.data_ptr()
    assert (there.stride(), there.storage_offset()) == (images.stride(), images.storage_offset())
    assert bits_equal(there.cpu(), images)
