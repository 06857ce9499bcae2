"""All implementations under pytest-benchmark: `pytest bench --benchmark-enable`; results are checked in any case."""

import dataclasses
from typing import Any

import pytest
import torch

from .baselines import IMPLEMENTATIONS, Implementation, ready
from .cases import CASES, make_inputs

CASE = dataclasses.replace(CASES["cpu"], batch=32)


@pytest.fixture(scope="module")
def inputs() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    yield make_inputs(CASE)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "implementation", [one for one in IMPLEMENTATIONS if one.device in ("", "cpu")], ids=lambda one: one.name
)
def test_time(benchmark: Any, inputs: Any, implementation: Implementation) -> None:
    built, wrong = ready(CASE, inputs, implementation)
    assert built is not None, wrong
    benchmark(built.call)
