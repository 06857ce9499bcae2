"""Stand-ins for `torch.cuda`: within `pretended_gpus`, code believes that there are GPUs.

A graph repeats its launches and random numbers. Launches of kernels are those of `pretend_kernels`, processes those of
`pretend_processes`. Memory is not counted, times are the host's, `torch.compile` hands its function on, and pinned
memory only says that it is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pretend_kernels import Compiled, Driver, Launches
from pretend_processes import all_reduce, initialised
from pretend_tensor import NOW, FunctionMode, PretendTensor, State, state
from torch import Tensor

from tokenmix_kernels import call, kernels
from tokenmix_kernels.kernels import attention, launch, ready

__all__ = ["pretended_gpus"]

NAME = "NVIDIA H100 80GB HBM3"
PROPERTIES = SimpleNamespace(
    name=NAME, multi_processor_count=132, L2_cache_size=50 << 20, total_memory=80 << 30, major=9, minor=0,
    warp_size=32,
)  # fmt: skip


class Event:
    """A mark of the host's clock."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.timed, self.at = enable_timing, None

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        if self.at is None:
            raise RuntimeError("the event was not recorded")
        state().read("event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        if self.at is None or end.at is None or not (self.timed and end.timed):
            raise RuntimeError("Both events must be recorded, with enable_timing=True, before calculating elapsed time")
        return max(1e3 * (end.at - self.at), 1e-6)

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True


class AnyGenerator(type(torch._C.Generator)):  # type: ignore[misc]
    def __instancecheck__(cls, one: Any) -> bool:
        return type.__instancecheck__(torch._C.Generator, one)


class Generator(torch._C.Generator, metaclass=AnyGenerator):
    """A generator, of the CPU wherever it is asked for."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu" if torch.device(device).type == "cuda" else device)


class Stream:
    """A stream: all of them are the host's order."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Stream)

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, Event)

    def synchronize(self) -> None:
        synchronize()

    def is_capturing(self) -> bool:
        return state().capturing is not None

    def record_event(self, event: Any = None) -> Event:
        event = event or Event()
        event.record()
        return event


class Graph:
    """Repeats what was launched and drawn while it was recorded."""

    def __init__(self, **_: Any) -> None:
        self.work: list[Callable[[], Any]] = []
        self.recorded = False

    def replay(self) -> None:
        if not self.recorded:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        for one in self.work:
            one()


@contextmanager
def on_device(device: Any) -> Iterator[None]:
    """torch.cuda.device."""
    now = state()
    before, now.current = now.current, index_of(device)
    try:
        yield
    finally:
        now.current = before


@contextmanager
def recorded(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """torch.cuda.graph."""
    now = state()
    if now.capturing is not None:
        raise RuntimeError("a graph is being captured already")
    now.capturing = graph
    try:
        yield
    finally:
        now.capturing = None
    graph.recorded = True


def synchronize(device: Any = None) -> None:
    state().read("synchronize")


def index_of(device: Any = None) -> int:
    """As torch.cuda.set_device and the like read a device."""
    if device is None:
        return state().current
    if isinstance(device, int):
        return device
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    return state().current if device.index is None else device.index


def set_device(device: Any) -> None:
    if not isinstance(device, int) and torch.device(device).index is None:
        raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
    if not 0 <= index_of(device) < torch.cuda.device_count():
        raise RuntimeError("CUDA error: invalid device ordinal")
    state().current = index_of(device)


def set_sync_debug_mode(mode: str) -> None:
    state().forbidden = mode == "error"


def cuda_functions(devices: int) -> dict[str, Any]:
    """The functions and classes of torch.cuda by name."""
    memory = {"memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"}
    generators = {number: torch.Generator().manual_seed(number) for number in range(devices)}
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: state().current,
        "set_device": set_device,
        "device": on_device,
        "get_device_name": lambda device=None: f"{NAME}" if index_of(device) < devices else None,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_: True,
        "is_current_stream_capturing": lambda: state().capturing is not None,
        "synchronize": synchronize,
        "set_sync_debug_mode": set_sync_debug_mode,
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "default_stream": lambda device=None: Stream(),
        "CUDAGraph": Graph,
        "graph": recorded,
        "reset_peak_memory_stats": lambda device=None: index_of(device),
        "empty_cache": lambda: None,
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: generators[index_of(device)].get_state(),
        "set_rng_state": lambda new, device=None: generators[index_of(device)].set_state(new),
        **{name: (lambda device=None: index_of(device) * 0 + (1 << 20)) for name in memory},
    }


def autocast_of(autocast: Any) -> Callable[..., Any]:
    """torch.autocast: the engine believes that tensors are on the CPU, so the CPU's is switched."""

    def on_cpu(device_type: str, *arguments: Any, **options: Any) -> Any:
        return autocast("cpu" if device_type == "cuda" else device_type, *arguments, **options)

    return on_cpu


def pinned(values: Tensor, device: Any = None) -> Tensor:
    """Tensor.pin_memory: a copy that says so."""
    copied = values.clone()
    copied.is_in_pinned_memory = True  # type: ignore[attr-defined]
    return copied


def is_pinned(values: Tensor, device: Any = None) -> bool:
    return getattr(values, "is_in_pinned_memory", False)


GROUP = torch._C._group_tensors_by_device_and_dtype


def grouped(lists: Any, with_indices: bool = False) -> dict[Any, Any]:
    """Tensors by device and dtype, as optimisers and norms work on them."""
    return {
        (found[0][0].device, dtype): (found, places)
        for (_, dtype), (found, places) in GROUP(lists, with_indices).items()
    }


def type_of(value: Any) -> type:
    """`type`, where a pretended tensor is one without subclass."""
    return Tensor if isinstance(value, PretendTensor) else type(value)


@contextmanager
def pretended_gpus(devices: int = 1) -> Iterator[State]:
    """Within it there are that many GPUs."""
    from triton.runtime.driver import driver

    NOW[0] = State()
    launches = Launches()
    launch.card_of.cache_clear()
    launch.fixed_part.cache_clear()
    call.PASSED.clear()
    patches: list[Any] = [mock.patch.object(torch.cuda, name, value) for name, value in cuda_functions(devices).items()]
    patches += [
        mock.patch.object(launch, "prepare", launches.prepare),
        mock.patch.object(kernels, "prepare", launches.prepare),
        mock.patch.object(ready, "CompiledKernel", Compiled),
        mock.patch.object(kernels.mix_kernel, "run", launches.run("mix_kernel", launches.write_mix)),
        mock.patch.object(
            attention.attention_kernel, "run", launches.run("attention_kernel", launches.write_attention)
        ),
        mock.patch.object(call, "type", type_of, create=True),
        mock.patch.object(torch.accelerator, "current_stream", lambda device=None: Stream()),
        mock.patch.object(torch.accelerator, "current_device_index", lambda: state().current),
        mock.patch.object(torch.accelerator, "set_device_index", set_device),
        mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped),
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(Tensor, "pin_memory", pinned),
        mock.patch.object(Tensor, "is_pinned", is_pinned),
        mock.patch.object(torch, "autocast", autocast_of(torch.autocast)),
        mock.patch.object(torch, "compile", lambda model=None, **_: model if model else lambda found: found),
        mock.patch.object(driver, "_active", Driver()),
        mock.patch.object(dist, "init_process_group", initialised),
        mock.patch.object(dist, "all_reduce", all_reduce),
    ]
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(FunctionMode())
            yield state()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        launch.card_of.cache_clear()
        launch.fixed_part.cache_clear()
        call.PASSED.clear()
        NOW[0] = State()
