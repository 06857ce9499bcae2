"""Time what one eager call costs the host: the launch stubbed out, against a bare Triton launch stubbed alike.

No GPU is needed. Triton gets a driver that names a target and a stream but no device, and a launcher that does nothing,
so what is left of a bare launch is Triton's own work in Python: binding the arguments, their specialisation, the cache.
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm import tqdm

from tokenmix_kernels import TokenMix, TopKMaps, dispatch, kernels
from tokenmix_kernels.inputs import Evidence
from tokenmix_kernels.kernels.groups import Results

from .machine import describe, write_json

__all__ = ["add_arguments", "main", "measure", "stubbed"]

BAR = 1.3


class StubDriver:
    """A Triton driver of a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties, unload_module=lambda module: None)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def nothing(*_: Any) -> None:
    """What is not checked."""


def launched(*_: Any) -> None:
    """The driver, which gets all arguments of a launch."""


@contextlib.contextmanager
def stubbed(arch: int = 90) -> Iterator[None]:
    """Within it, Triton compiles for sm_<arch>, and a launch ends where the driver would be called."""
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver

    def init_handles(kernel: Any) -> None:
        kernel._run = launched
        kernel.function = 0

    before = driver._active
    driver._active = StubDriver(arch)
    # Values cannot be read on the host where images are on a GPU; here they could be, and would be paid for.
    values = mock.patch.object(dispatch, "check_values", nothing)
    try:
        with mock.patch.object(CompiledKernel, "_init_handles", init_handles), values:
            yield
    finally:
        driver._active = before


def in_turn(calls: dict[str, Callable[[], Any]], rounds: int, each: int) -> dict[str, list[float]]:
    """Microseconds of each call in every round, the calls taking turns."""
    for call in calls.values():
        for _ in range(each):
            call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), desc="timing"):
        for name, call in calls.items():
            begun = time.perf_counter()
            for _ in range(each):
                call()
            found[name].append((time.perf_counter() - begun) / each * 1e6)
    return found


def measure(rounds: int = 60, each: int = 100, batch: int = 1) -> tuple[int, list[dict[str, Any]]]:
    """(arguments of the launch, rows) of the main case: fp16, per-element masks, top-5 maps and boxes.

    The batch is small: the host does not care, and a GPU takes memory from torch's cache, where on a CPU large results
    go through the pool of `tokenmix_kernels.memory`.
    """
    images = torch.empty(batch, 3, 224, 224, dtype=torch.float16)
    labels = torch.arange(batch)
    maps = TopKMaps(torch.rand(batch, 5, 18, 18).half(), torch.randint(0, 1000, (batch, 5, 18, 18)))
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(batch, 1)
    mixing = TokenMix(mode="elem", mixup_alpha=0.0)
    out, seed = torch.empty_like(images), torch.tensor(5)
    targets, weights = torch.empty(batch, 1000), torch.empty(batch, 2)
    mask = torch.empty(batch, 14, 14, dtype=torch.bool)
    evidence, results = Evidence(maps.values, maps.indices, boxes=boxes), Results(targets, weights, mask, None)
    ready = kernels.prepare(
        images, out, labels, None, evidence, None, seed, 0, mixing.settings, results, tuple(images.shape), images.device
    )
    leaves = sum(len(value) if isinstance(value, tuple) else 1 for value in ready.arguments.values())
    calls: dict[str, Callable[[], Any]] = {
        "bare launch, same arguments": ready.run,
        "a launch of a new form: arguments, outputs": lambda: kernels.mix(
            images, out, labels, None, evidence, None, seed, 0, mixing.settings
        ),
        "with every check made again": lambda: mixing(images, labels, maps, boxes, backend="triton"),
        "TokenMix(images, labels, maps, boxes)": lambda: mixing(images, labels, maps, boxes),
        "TokenMix(images, labels, maps, boxes, seed=seed)": lambda: mixing(images, labels, maps, boxes, seed=seed),
    }
    # What a GPU tensor would be told is told these: go to the kernels at once.
    at_once = mock.patch("tokenmix_kernels.call.launches_at_once", lambda images: True)
    # On a CPU the kernels are refused but under the interpreter.
    allowed = mock.patch("tokenmix_kernels.call.named_backend", lambda *_: kernels)
    with stubbed(), at_once, allowed:
        found = in_turn(calls, rounds, each)
    bare = np.array(found["bare launch, same arguments"])
    rows = []
    for name, times in found.items():
        low, middle, high = np.percentile(times, [20, 50, 80])
        row = {"path": name, "us_p20": low, "us_p50": middle, "us_p80": high}
        row["ratio"] = float(np.median(np.array(times) / bare))
        if name.startswith("TokenMix"):
            row["bar"] = BAR
        rows.append(row)
    return leaves, rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bench/results/host.json"))
    parser.add_argument("--rounds", type=int, default=60)


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    arguments, rows = measure(asked.rounds)
    record = {
        "kind": "host", "command": "python -m bench host", "machine": describe(), "arguments": arguments,
        "rounds": asked.rounds, "rows": rows,
    }  # fmt: skip
    write_json(asked.out, record)
