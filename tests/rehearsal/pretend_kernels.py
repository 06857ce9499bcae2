"""Stand-ins for Triton's driver and for compiled kernels.

A launch is noted, the devices of its arguments are looked at, and the reference writes its result.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from pretend_tensor import PretendTensor, held, state
from torch import Tensor
from torch.utils._pytree import tree_flatten

from tokenmix_kernels import kernels, reference
from tokenmix_kernels.kernels import launch

__all__ = ["Compiled", "Driver", "Launches"]


class Driver:
    """Triton's driver, as its benchmarks ask for it."""

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_empty_cache_for_benchmark(self) -> Tensor:
        return torch.empty(1 << 10, dtype=torch.int8, device="cuda")

    def clear_cache(self, cache: Tensor) -> None:
        cache.zero_()

    def get_current_device(self) -> int:
        return state().current


class Compiled:
    """What Triton compiled for a launch: it takes arguments of the same form, in the order of the parameters."""

    def __init__(self, launches: "Launches", run: Callable[..., Any], grid: tuple[int], first: dict[str, Any]) -> None:
        self.launches, self.run, self.grid, self.first = launches, run, grid, first
        self.settings_of = launches.asked.get(id(first.get("results")))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert grid == (*self.grid, 1, 1)

        def runner(*arguments: Any) -> None:
            named = dict(zip(inspect.signature(kernels.mix_kernel.fn).parameters, arguments, strict=True))
            options = {name: value for name, value in self.first.items() if name not in named}
            for name, before in self.first.items():
                assert name in options or form_of(named[name]) == form_of(before), f"{name} is of another form"
            self.launches.asked[id(named["results"])] = self.again(named)
            self.run(grid=self.grid, **named, **options)

        return runner

    def again(self, named: dict[str, Any]) -> tuple[Any, ...]:
        """What `prepare` would have been told for these arguments."""
        assert self.settings_of is not None
        first, settings = self.settings_of[4], self.settings_of[8]
        evidence = first._replace(**{name: getattr(named["evidence"], name) for name in first._fields[:-1]})
        seed, high, pairs = named["seed"], named["seed_high"], named["pairs"]
        if high is not None:
            seed = torch.tensor((high << 32) + (seed & 0xFFFFFFFF))
        return (
            named["images"], named["out"], pairs.labels, pairs.partner, evidence, named["mask"], seed,
            named["sample_offset"], settings, named["results"],
        )  # fmt: skip


def form_of(argument: Any) -> Any:
    """What Triton compiles for: of a tensor its dtype and alignment, of a number its width."""
    if isinstance(argument, tuple):
        return tuple(form_of(part) for part in argument)
    if isinstance(argument, Tensor):
        return argument.dtype, tuple(argument.stride()), held(argument).data_ptr() % 16
    return argument.bit_length() > 31 if isinstance(argument, int) else argument


class Launches:
    """What stands where the compiled kernels are."""

    def __init__(self) -> None:
        self.asked: dict[int, tuple[Any, ...]] = {}  # by the identity of a launch's results: what `prepare` was told
        self.ready: Callable[..., Any] = launch.prepare

    def prepare(self, *arguments: Any) -> Any:
        self.asked[id(arguments[9])] = arguments
        return self.ready(*arguments)

    def run(self, name: str, write: Callable[[dict[str, Any]], None]) -> Callable[..., Any]:
        """The `run` of a kernel: note the launch, write what it would, and return what was compiled."""

        def run(*, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> Compiled:
            now = state()
            for place, tensor in enumerate(one for one in tree_flatten(arguments)[0] if isinstance(one, Tensor)):
                if not isinstance(tensor, PretendTensor):
                    raise ValueError(f"Pointer argument (at {place}) cannot be accessed from Triton (cpu tensor?)")
                if tensor.index != now.current:
                    raise ValueError(f"an argument of {name} is on {tensor.device}, the launch on cuda:{now.current}")
            assert all(isinstance(size, int) and size > 0 for size in grid), grid
            now.launches.append((name, grid, arguments))
            if now.capturing is not None:
                now.capturing.work.append(lambda: write(arguments))
            write(arguments)
            return Compiled(self, functools.partial(run, warmup=warmup), grid, arguments)

        return run

    def write_mix(self, arguments: dict[str, Any]) -> None:
        """What mix_kernel writes, by the reference."""
        results = arguments["results"]
        asked = held(self.asked[id(results)][:9])
        images, out, labels, partner, evidence, mask, seed, offset, settings = asked
        targets, weights, mask_out, kind = held(tuple(results))
        if images is None and labels is None:
            mask_out.copy_(reference.token_mask(*mask_out.shape[:1], tuple(mask_out.shape[1:]), seed, offset, settings))
        elif images is None:
            weights.copy_(reference.pool_targets(evidence, labels, mask, partner))
        else:
            if labels.dim() == 1:
                labels = labels.where((labels >= 0) & (labels < settings.num_classes), 0)
            found = reference.mix(
                images, out, labels, partner, evidence, mask, seed, offset, settings
            )  # fmt: skip
            for place, value in zip((targets, mask_out, weights, kind), found, strict=True):
                if place is not None:
                    place.copy_(value)

    def write_attention(self, arguments: dict[str, Any]) -> None:
        """What attention_kernel writes, by the reference."""
        targets, mix_, pairs = (held(arguments[name]) for name in ("targets", "mix", "pairs"))
        targets.copy_(
            reference.attention_targets(
                mix_, pairs.labels, pairs.partner, targets.shape[1], arguments["smoothing"], arguments["MULTI_LABEL"]
            )
        )
