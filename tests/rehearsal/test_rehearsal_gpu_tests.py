"""The tests that need a GPU, on a pretended one: no line of them is run for the first time where there is one."""

import pytest
import test_gpu
from pretend_cuda import pretended_gpus
from test_gpu import no_waiting  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def gpu():
    with pretended_gpus(2) as now:
        yield now
    assert now.launches


# Of the module's marks ("needs a GPU") none comes along, of the functions' own all. What kernels write for values that
# are out of range no stand-in knows: the interpreter shows that.
LEFT_OUT = ("test_values_out_of_range_are_harmless",)
globals().update({
    name: value for name, value in vars(test_gpu).items() if name.startswith("test_") and name not in LEFT_OUT
})  # fmt: skip
