"""Tensors that say they are on a GPU, for a machine without one.

`PretendTensor` holds its values in a CPU tensor that only this module sees. To everything else it is on "cuda:N": an
operation with a CPU tensor of one or more dimensions is an error, and every look of the host at its values is written
into `State.reads` (`.item()`, `int`, `bool`, `.cpu()`, `.tolist()`, a copy to the CPU, an index by a bool mask), or is
an error within `no_host_reads`. Values are real, so whole loops run to their end and can be compared with the CPU's.

`FakeTensorMode` finds the same in single calls, but has no values, and its backward pass needs a CUDA context. Here the
autograd engine sees CPU tensors: `device` and `is_cuda` are told in Python alone.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from tokenmix_kernels import dispatch

__all__ = ["FunctionMode", "HostRead", "PretendTensor", "State", "held", "no_host_reads", "state", "to_gpu"]

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
# The host learns how many values there are.
SIZED_BY_VALUES = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
# Files that are not who read.
HIDDEN = ("pretend_tensor", "pretend_cuda", "pretend_kernels", "pretend_processes", "/torch/")
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class HostRead(AssertionError):
    """The host waited for a value that is on the GPU, where it must not."""


class State:
    """What happened since the GPU was pretended."""

    def __init__(self) -> None:
        self.current = 0  # device
        self.reads: list[str] = []  # who read values, one line for each time
        self.forbidden = False
        self.capturing: Any = None  # the graph that is being recorded
        self.copies = 0  # from the CPU
        self.launches: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []  # kernel, grid, arguments

    def read(self, what: str) -> None:
        """Note that the host waits for the device."""
        frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
        code = next((code for code in frames if not any(part in code.co_filename for part in HIDDEN)), None)
        self.reads.append(f"{what} in {Path(code.co_filename).name} {code.co_name}" if code else what)
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if self.forbidden:
            raise HostRead(self.reads[-1])


NOW = [State()]


def state() -> State:
    """The state of the GPU that is pretended now."""
    return NOW[0]


@contextmanager
def no_host_reads() -> Iterator[State]:
    """Within it, a host that waits for the device is an error."""
    now = state()
    before, now.forbidden = now.forbidden, True
    try:
        yield now
    finally:
        now.forbidden = before


class PretendTensor(Tensor):
    """A tensor on "cuda:N" whose values are in `.held`, on the CPU."""

    held: Tensor
    index: int
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type, values: Tensor, index: int = 0, requires_grad: bool = False) -> "PretendTensor":
        made = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            layout=values.layout, device="cpu", requires_grad=requires_grad,
        )  # fmt: skip
        made.held, made.index = values, index
        return made

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return self.index

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        state().read("tolist")
        return self.held.tolist()

    def pin_memory(self, *_: Any) -> Any:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def new_tensor(self, values: Any, **options: Any) -> Tensor:
        copied_in("new_tensor")
        return PretendTensor(self.held.new_tensor(values, **options), self.index)

    def cpu(self, *_: Any, **__: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, device: Any = None, *_: Any, **__: Any) -> Tensor:
        return self.to(torch.device("cuda", device if isinstance(device, int) else state().current))

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        device, dtype, _, layout = parse_to(*args, **kwargs)
        dtype = dtype or self.dtype
        options = {"memory_format": layout} if layout else {}
        if device is None or device.type == "cuda":
            if device is not None and index_of(device) != self.index:
                return PretendTensor(self.held.detach().to(dtype, copy=True, **options), index_of(device))
            changed: Tensor = Tensor.to(self, dtype, copy=copy, **options)
            return changed
        state().read("copy to the CPU")
        return self.held.detach().to(dtype, copy=True, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = PretendTensor(self.held.detach().clone(), self.index, self.requires_grad)
        if getattr(self, "_is_param", False):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        state().read("pickle")
        return self.held.detach().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({list(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "tokenmix_kernels":
            # As on a GPU, the operator's body itself. The mode is off within the call that it let through.
            with FunctionMode():
                return dispatch.BODIES[func._schema.name.split("::")[1]](*args, **kwargs)
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        mine = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
        # Index tensors may be on the CPU: torch copies them.
        indices = [id(one) for one in args[1] if one is not None] if func in INDEXED else []
        check_devices(func, [one for one in tensors if id(one) not in indices], mine)
        if func is aten._local_scalar_dense.default:
            state().read("item")
        elif func is aten.equal.default or func in SIZED_BY_VALUES:
            state().read(func.__name__)
        elif func in INDEXED and any(index is not None and index.dtype == torch.bool for index in args[1]):
            state().read("index by a bool mask")
        elif func is aten.copy_.default and not isinstance(args[0], PretendTensor):
            state().read("copy to the CPU")
        if any(not isinstance(t, PretendTensor) and t.dim() for t in tensors):
            copied_in(func.__name__, waits=not (func is aten.copy_.default and args[2:] and args[2]))
        given = tree_map_only(PretendTensor, lambda one: one.held, (args, kwargs))
        result = func(*given[0], **given[1])
        if func is aten.copy_.default and not isinstance(args[0], PretendTensor):
            return args[0]
        known = {id(one.held): one for one in mine} | {id(one): one for one in tensors}
        index = mine[0].index

        def told(one: Tensor) -> Tensor:
            # In place: the tensor that was given.
            return known[id(one)] if id(one) in known else PretendTensor(one, index)

        return tree_map_only(Tensor, told, result)


def check_devices(func: Any, tensors: list[Tensor], mine: list[Any]) -> None:
    """Raise as torch does where an operation's tensors are on several devices."""
    if func in COPIES:
        return
    devices = {one.device for one in mine}
    # A formula of autograd makes its zeros where the engine believes the tensors to be.
    in_backward = torch._C._current_graph_task_id() != -1
    devices |= {one.device for one in tensors if not isinstance(one, PretendTensor) and one.dim() and not in_backward}
    if len(devices) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{sorted(map(str, devices))} ({func})"
        )


def copied_in(what: str, waits: bool = True) -> None:
    """Note a copy from the CPU's memory, for which the host waits unless it is told not to."""
    now = state()
    now.copies += 1
    if now.capturing is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: copy of pageable memory ({what})")
    if waits and now.forbidden:
        raise HostRead(f"{what} copies from the CPU and waits for it")


def index_of(device: torch.device) -> int:
    return state().current if device.index is None else device.index


def parse_to(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    if args and isinstance(args[0], Tensor):
        return args[0].device, args[0].dtype, False, None
    return torch._C._nn._parse_to(*args, **kwargs)


def to_gpu(values: Any, index: int = 0) -> Any:
    """Tensors in any nesting, with their strides and alignment, on the pretended GPU."""
    return tree_map(lambda one: PretendTensor(one, index) if type(one) is Tensor else one, values)


def held(values: Any) -> Any:
    """The values behind pretended tensors in any nesting: what a test may look at."""
    return tree_map_only(PretendTensor, lambda one: one.held, values)


class FunctionMode(TorchFunctionMode):
    """Takes calls that name a CUDA device: factories, `.to` and `.cuda` of CPU tensors."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda) and not isinstance(args[0], PretendTensor):
            return moved(func, args, kwargs)
        if func is torch.nn.functional.one_hot and isinstance(args[0], PretendTensor):
            if len(args) == 1 and "num_classes" not in kwargs:
                state().read("one_hot without num_classes")
            return PretendTensor(func(args[0].held, *args[1:], **kwargs), args[0].index)
        named = kwargs.get("device")
        if named is None or func is torch._C._nn._parse_to:
            return func(*args, **kwargs)
        device = torch.device("cuda", named) if isinstance(named, int) else torch.device(named)
        if device.type != "cuda":
            if any(isinstance(leaf, PretendTensor) for leaf in tree_flatten(args)[0]):
                args = tree_map_only(PretendTensor, lambda one: one.held.detach(), args)
            return func(*args, **kwargs)
        index = index_of(device)
        kwargs["device"] = "cpu"
        if kwargs.pop("pin_memory", False):
            raise RuntimeError("Only dense CPU tensors can be pinned")

        def make() -> Any:
            return func(*args, **kwargs)

        if func is torch.tensor:
            copied_in("torch.tensor")
        result = to_gpu(make(), index)
        graph = state().capturing
        if graph is not None and func in (torch.randint, torch.rand, torch.randn):
            graph.work.append(lambda: result.held.copy_(make()))
        return result


def moved(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`.to` or `.cuda` of a CPU tensor."""
    one = args[0]
    if func is Tensor.cuda:
        args, kwargs = (one, torch.device("cuda")), {}
    if len(args) > 1 and isinstance(args[1], Tensor):
        args = (one, args[1].device, args[1].dtype, *args[2:])
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args[1:], **kwargs)
    options = {"memory_format": layout} if layout else {}
    if device is None or device.type != "cuda":
        return Tensor.to(one, device or one.device, dtype or one.dtype, copy=copy, **options)
    # From pageable memory a copy is staged, and `non_blocking` is but a wish.
    copied_in("to", waits=not (non_blocking and (one.is_pinned() or not one.dim())))
    return PretendTensor(one.detach().to(dtype or one.dtype, copy=True, **options), index_of(device), False)
