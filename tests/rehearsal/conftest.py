"""The pretended GPU as a fixture."""

import pytest
from pretend_cuda import pretended_gpus


@pytest.fixture
def gpu():
    with pretended_gpus() as now:
        yield now
