"""Sweep how a launch is cut up on a GPU: rows of tokens of a program, and warps."""

import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .cases import Case
from .launch import Cut, Launch, cut_of, launch_of, recut, run

__all__ = ["cases_swept", "sweep"]

SWEPT_ROWS, SWEPT_WARPS = (1, 2, 3, 4, 5, 7, 14), (2, 4, 8)


def cases_swept(batches: Iterable[int] = (32, 128, 512)) -> list[Case]:
    """The sweep, most wanted first, in case the time does not last."""
    half, full, byte = torch.float16, torch.float32, torch.uint8
    kinds = [
        (half, half, False, 16), (byte, half, False, 16), (full, full, False, 16), (half, half, True, 16),
        (byte, half, True, 16), (half, half, False, 32), (byte, half, False, 32), (half, half, False, 8),
        (full, full, True, 16), (half, half, False, 14), (byte, half, False, 8), (full, full, False, 32),
    ]  # fmt: skip
    return [
        Case(name_of(dtype, out_dtype, last, patch, batch), batch, dtype=dtype, out_dtype=out_dtype, patch_size=patch,
             channels_last=last)
        for dtype, out_dtype, last, patch in kinds
        for batch in batches
    ]  # fmt: skip


def name_of(dtype: torch.dtype, out_dtype: torch.dtype, channels_last: bool, patch: int, batch: int) -> str:
    """A case of the sweep in words."""
    dtypes = dict.fromkeys(str(one).removeprefix("torch.") for one in (dtype, out_dtype))
    layout = "channels_last" if channels_last else "contiguous"
    return f"{' to '.join(dtypes)}, {layout}, P = {patch}, B = {batch}"


def candidates(launch: Launch) -> list[Cut]:
    """Ways to cut the launch up, today's first, without those that come to the same."""
    today = cut_of(launch)
    wanted = [Cut(rows, warps) for rows in (today.rows, *SWEPT_ROWS) for warps in (today.warps, *SWEPT_WARPS)]
    return list(dict.fromkeys([today, *(cut_of(recut(launch, cut)) for cut in wanted)]))


def sweep(
    device: torch.device,
    timed: Callable[[Callable[[], Any]], list[float]],
    seconds: float,
    wanted: Iterable[Case] | None = None,
    launched: Callable[[Launch], None] = run,
) -> list[dict[str, Any]]:
    """Time every candidate for every case: one row each, `now` for what is launched today, `best` for the fastest.

    Args:
        device: where.
        timed: microseconds of a call at 20, 50 and 80 %.
        seconds: no case is begun after these.
        wanted: the cases; all if not given.
        launched: runs a launch.

    Results of candidates must equal those of today's launch.
    """
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case in tqdm(list(cases_swept() if wanted is None else wanted), desc="sweep", unit="case", disable=None):
        if time.perf_counter() - started > seconds:
            print(f"out of time before {case.name}", file=sys.stderr)
            break
        launch = launch_of(case, device)
        launched(launch)
        right = [tensor.clone() for tensor in launch.out]
        found = []
        for number, cut in enumerate(candidates(launch)):
            tried = recut(launch, cut)
            row: dict[str, Any] = {
                "case": case.name, "dtype": text(case.dtype), "out_dtype": text(case.output),
                "layout": "channels_last" if case.channels_last else "contiguous", "patch_size": case.patch_size,
                "batch": case.batch, **cut._asdict(), "now": number == 0,
            }  # fmt: skip
            rows.append(row)
            launch.out.images.zero_()
            launch.out.targets.fill_(float("nan"))
            try:
                launched(tried)
            except Exception as error:  # a cut that asks for more than the card has is a line of the table
                row["wrong"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if not all(equal(one, other) for one, other in zip(launch.out, right, strict=True)):
                row["wrong"] = "differs from today's launch"
                continue
            low, middle, high = timed(lambda tried=tried: launched(tried))  # type: ignore[misc]
            row |= {"us_p20": low, "us_p50": middle, "us_p80": high, "best": False}
            found.append(row)
        if not found:
            continue
        best = min(found, key=lambda row: row["us_p50"])
        best["best"] = True
        today = next((row for row in found if row["now"]), best)
        print(
            f"{case.name}: {best['rows']} rows, {best['warps']} warps, {best['us_p50']:.1f} us; now {today['rows']} "
            f"rows, {today['warps']} warps, {today['us_p50']:.1f} us ({today['us_p50'] / best['us_p50'] - 1:+.1%})"
        )
    return rows


def text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def equal(one: Tensor, other: Tensor) -> bool:
    """Equal but for the last bits of sums, which another number of warps adds in another order."""
    return torch.allclose(one, other, rtol=0, atol=1e-6) if one.dtype == torch.float32 else torch.equal(one, other)
