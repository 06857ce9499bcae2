"""Time on a GPU what the simulator predicts, so that its model can be corrected.

The launch of today, without its look-ahead of pixels, and in another cut, each with a cold and with a warm L2 cache,
beside the simulated figure where there is one for the card and the launch.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from tqdm import tqdm

from .cases import Case
from .launch import Cut, Launch, launch_of, recut, run
from .sweep import equal

__all__ = ["compare", "simulated_microseconds", "variants", "warm_clock"]

TODAY = "as launched"
Timer = Callable[[Callable[[], Any]], list[float]]


def warm_clock(milliseconds: float, quantiles: list[float]) -> Timer:
    """Microseconds of calls that follow each other in a CUDA graph: nothing clears the L2 cache between them."""
    from triton.testing import do_bench_cudagraph

    def warm(call: Callable[[], Any]) -> list[float]:
        return [value * 1e3 for value in do_bench_cudagraph(call, rep=milliseconds, quantiles=quantiles)]

    return warm


def cases(batches: Iterable[int] = (128, 32, 64, 256, 512)) -> list[Case]:
    """The cases that are simulated, most wanted first, named as in the table of simulated times."""
    half, byte = torch.float16, torch.uint8
    wanted = [Case(f"fp16 B {batch}", batch, dtype=half) for batch in batches]
    return [*wanted, Case("fp32"), Case("uint8 to fp16", dtype=byte, out_dtype=half)]


def variants(launch: Launch) -> Iterator[tuple[str, Launch]]:
    """The launch in all ways that are timed."""
    yield TODAY, launch
    tile = launch.args["TILE"]._replace(AHEAD=0)
    yield "without look-ahead of pixels", launch._replace(args={**launch.args, "TILE": tile})
    yield "two warps, 4 rows", recut(launch, Cut(rows=4, warps=2))


def simulated_microseconds(record: dict[str, Any], card: str) -> dict[str, float]:
    """Simulated time by case, of the model whose name is part of the card's."""
    return {row["case"]: row["microseconds"] for row in record["rows"] if row["card"] in card}


def compare(
    device: torch.device, cold: Timer, warm: Timer, simulated: dict[str, float], seconds: float,
    wanted: Iterable[Case] | None = None, launched: Callable[[Launch], None] = run,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time all variants of all cases: one row each.

    Args:
        device: where.
        cold, warm: microseconds of a call at 20, 50 and 80 %, with a cold and with a warm L2 cache.
        simulated: of `simulated_microseconds`.
        seconds: no case is begun after these.
        wanted: the cases; all if not given.
        launched: runs a launch.

    Results of variants must equal those of today's launch.
    """
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case in tqdm(cases() if wanted is None else list(wanted), desc="model", unit="case", disable=None):
        if time.perf_counter() - started > seconds:
            tqdm.write(f"out of time before {case.name}")
            break
        right: list[torch.Tensor] = []
        for name, launch in variants(launch_of(case, device)):
            launched(launch)
            row = {"case": case.name, "batch": case.batch, "launch": name}
            rows.append(row)
            right = right or [tensor.clone() for tensor in launch.out]
            if not all(equal(one, other) for one, other in zip(launch.out, right, strict=True)):
                row["wrong"] = "differs from today's launch"
                continue
            for kind, clock in (("cold", cold), ("warm", warm)):
                times = clock(lambda launch=launch: launched(launch))  # type: ignore[misc]
                row |= {f"{kind}_us_p{share}": value for share, value in zip((20, 50, 80), times, strict=True)}
            if name == TODAY and case.name in simulated:
                row["simulated_us"] = simulated[case.name]
                row["cold_to_simulated"] = row["cold_us_p50"] / row["simulated_us"]
            model = f", simulated {row['simulated_us']:.1f}" if "simulated_us" in row else ""
            tqdm.write(f"{case.name}, {name}: {row['cold_us_p50']:.1f} us cold, {row['warm_us_p50']:.1f} warm{model}")
    return rows
