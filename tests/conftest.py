"""Set-up that all test files share."""

import os

import hypothesis
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The same examples in every run; a slow machine is not an error.
hypothesis.settings.register_profile(
    "tokenmix",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tokenmix")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and not INTERPRETED:
        return
    why = "under Triton's interpreter" if INTERPRETED else "no CUDA or ROCm device"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {why}"))
