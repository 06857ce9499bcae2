"""Set-up of the benches' tests."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    """The command sets a handler of SIGTERM: put the old one back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
