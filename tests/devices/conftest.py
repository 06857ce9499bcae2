"""One matrix of cases over devices; `device` is each of those that this process has.

Triton decides at its import whether it interprets: `TRITON_INTERPRET=1 python -m pytest tests/devices` is the
interpreter's process, any other process has the reference and, where there is one, the GPU.
"""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from device_helpers import DEVICES, INTERPRETED, Device, missing

if INTERPRETED:
    from quick_interpreter import leave_out_idle_work

    leave_out_idle_work()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make no items for a device that is not there: `test_the_matrix_runs_on` says once why it is not."""
    if "device" not in metafunc.fixturenames:
        return
    mark = metafunc.definition.get_closest_marker("devices")
    wanted = mark.args if mark else tuple(DEVICES)
    marks = {name: [pytest.mark.gpu] if name == "gpu" else [] for name in wanted}
    here = [pytest.param(name, marks=marks[name]) for name in wanted if missing(name) is None]
    nowhere = pytest.mark.skip(reason=", or ".join(filter(None, map(missing, wanted))))
    metafunc.parametrize("device", here or [pytest.param(wanted[0], marks=nowhere)], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out cases that the interpreter does not take: seconds each, and random mixes cover their combinations."""
    if not INTERPRETED:
        return
    seen: Counter[str] = Counter()
    taken, left_out = [], []
    for item in items:
        mark = item.get_closest_marker("interpreter_takes")
        name = item.nodeid.partition("[")[0]
        (left_out if mark and seen[name] % mark.kwargs["every"] else taken).append(item)
        seen[name] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = taken


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Device:
    return DEVICES[request.param]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that is not written reads as NaN, as the largest integer, or as True."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
