"""A launch with all its arguments, and the same launch again with other tensors."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from triton.compiler import CompiledKernel

from ..inputs import Evidence
from .fused import mix_kernel
from .groups import EvidencePointers, Pairs, Results

__all__ = ["Launch", "Relaunch", "current", "halves"]

CHANGING = ("images", "out", "pairs", "evidence", "mask", "results", "seed", "seed_high", "sample_offset")


def is_current(device: torch.device) -> bool:
    """Whether launches go to `device`. Without a GPU they all go to one place."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within it launches go to `device`: Triton launches on the current device, wherever the tensors are."""
    return nullcontext() if is_current(device) else torch.cuda.device(device)


def halves(seed: Tensor) -> tuple[Any, Any]:
    """(seed, seed_high) as the kernel takes them: two signed 32-bit numbers, or (a pointer, None) on a device."""
    if not seed.is_cpu:
        return seed, None
    number = int(seed)
    low = number & 0xFFFFFFFF
    return low - (low >> 31 << 32), number >> 32


class Launch(NamedTuple):
    """A launch that is ready: `mix_kernel[grid](**arguments, **options)` on a device."""

    grid: tuple[int]
    arguments: dict[str, Any]
    options: dict[str, Any]
    device: torch.device

    def run(self) -> Any:
        """Launch on the current stream of the device. Returns what Triton compiled, or None where it interprets."""
        with current(self.device):
            return mix_kernel[self.grid](**self.arguments, **self.options)


def is_usual(tensors: Sequence[Tensor | None], sample_offset: int) -> bool:
    """Whether all addresses are multiples of 16 bytes and the offset takes 31 bits: Triton compiles for that apart."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses & 15 and not sample_offset >> 31


class Relaunch:
    """The kernel that Triton compiled for a launch, called at once for later launches of the same form.

    At every launch Triton binds, specialises and looks up all arguments, which costs the host more than the launch
    itself. What it finds depends on shapes, strides, dtypes, devices and settings, on whether addresses are multiples
    of 16 bytes, and on how wide integers are. The caller knows that the first are as before; the rest is looked at.
    """

    def __init__(self, launch: Launch, compiled: CompiledKernel) -> None:
        arguments = launch.arguments
        self.device = launch.device
        self.in_place = arguments["images"] is arguments["out"]
        self.seed_on_device = arguments["seed_high"] is None
        self.labels_stride = arguments["pairs"].labels_stride
        self.numbers = arguments["evidence"][len(Evidence._fields) - 1 :]  # strides and sizes, behind the tensors
        # In the order of the kernel's parameters. What changes from launch to launch is replaced, not kept.
        self.values = list((arguments | dict.fromkeys(CHANGING)).values())
        self.places = [list(arguments).index(name) for name in CHANGING]
        self.runner: Callable[..., None] = compiled[(*launch.grid, 1, 1)]

    @classmethod
    def of(cls, launch: Launch, compiled: Any) -> "Relaunch | None":
        """None where nothing was compiled (an interpreter, a stand-in), or for tensors that are not aligned."""
        if not isinstance(compiled, CompiledKernel):
            return None
        leaves, _ = tree_flatten(list(launch.arguments.values()))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return cls(launch, compiled) if is_usual(tensors, launch.arguments["sample_offset"]) else None

    def run(
        self,
        images: Tensor,
        out: Tensor,
        labels: Tensor,
        partner: Tensor | None,
        evidence: Evidence,
        mask: Tensor | None,
        seed: Tensor,
        sample_offset: int,
        results: Results,
    ) -> bool:
        """Launch, and return True; or False where what this one needs may be compiled otherwise."""
        seed_low, seed_high = halves(seed)
        on_device = seed_high is None
        tensors = [images, out, labels, partner, *evidence[:-1], mask, *results, seed if on_device else None]
        if (
            on_device != self.seed_on_device
            or (images is out) != self.in_place
            or not is_usual(tensors, sample_offset)
            or not is_current(self.device)
        ):
            return False
        changing = (
            images, out, Pairs(labels, self.labels_stride, partner), EvidencePointers(*evidence[:-1], *self.numbers),
            mask, results, seed_low, seed_high, sample_offset,
        )  # fmt: skip
        values = self.values.copy()
        for place, value in zip(self.places, changing, strict=True):
            values[place] = value
        self.runner(*values)
        return True
