"""`pytest bench`: the registry under pytest-benchmark, on the CPU. `python -m bench cpu` has ratios and memory too."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .registry import CASES, IMPLEMENTATIONS, Implementation, Inputs, make_inputs, ready

SERVED = [one for one in IMPLEMENTATIONS if one.device in ("", "cpu")]
THREADS, ROUNDS = 2, 10


@lru_cache(maxsize=1)
def inputs_of(case: str) -> Inputs:
    return make_inputs(CASES[case])


@pytest.mark.parametrize("case", ["cpu"])
@pytest.mark.parametrize("implementation", SERVED, ids=[one.name for one in SERVED])
def test_implementation(implementation: Implementation, case: str, benchmark: BenchmarkFixture) -> None:
    """A result that is wrong fails here, before anything is timed."""
    torch.set_num_threads(THREADS)
    built, wrong = ready(CASES[case], inputs_of(case), implementation)
    assert built is not None, wrong
    benchmark.pedantic(built.call, rounds=ROUNDS, warmup_rounds=1)
