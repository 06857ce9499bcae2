"""CPU time of our branches beside timm's counterparts: interleaved rounds on one thread."""

import gc
import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from tqdm import tqdm

from tokenmix_kernels import TokenMix

__all__ = ["SHAPES", "beside_timm", "large_results"]

# (images [B, C, H, W], calls a round): enough calls that both branches of a default occur in a round.
SHAPES = (((32, 3, 224, 224), 4), ((8, 3, 64, 64), 40))
LARGE = (128, 3, 224, 224)
TIMM: dict[str, dict[str, float]] = {
    "Mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 0.0},
    "CutMix": {"mixup_alpha": 0.0, "cutmix_alpha": 1.0},
    "default": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
}
# Our branches and timm's counterparts.
BRANCHES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("Mixup", "Mixup", {"cutmix_alpha": 0.0}),
    ("CutMix", "CutMix", {"mixup_alpha": 0.0, "mask_type": "cutmix", "lam": "beta"}),
    ("tokens", "CutMix", {"mixup_alpha": 0.0}),
    ("`TokenMix()`", "default", {}),
)


def spent(call: Callable[[], Any], calls: int) -> float:
    """CPU milliseconds of a call, the last result held as a training step holds it."""
    held = None
    begun = time.process_time()
    for _ in range(calls):
        held = call()
    taken = (time.process_time() - begun) * 1e3 / calls
    del held
    return taken


def calls_of(shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Everything that is timed for batches of a shape. What mixes in place has a batch of its own."""
    images, labels = torch.randn(shape), torch.randint(0, 1000, shape[:1])
    calls: dict[str, Callable[[], Any]] = {"clone": images.clone}
    for name, settings in TIMM.items():
        calls[f"timm {name}"] = partial(Mixup(**settings), images.clone(), labels)
    for name, _, options in BRANCHES:
        own = images.clone()
        calls[name] = partial(TokenMix(**options), images, labels)
        calls[f"{name}, in place"] = partial(TokenMix(**options), own, labels, out=own)
    return calls


def beside_timm(rounds: int, budget: float, show: bool = True) -> list[dict[str, Any]]:
    """Rows of CPU time for each shape and branch: medians over rounds, and of the ratios of each round.

    After three rounds of a shape, none starts later than `budget` seconds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = []
    for shape, number in SHAPES:
        calls = calls_of(shape)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in calls.values():
            spent(call, number)
        started = time.perf_counter()
        for done in tqdm(range(rounds), desc=f"beside timm, B = {shape[0]}", disable=not show):
            if done >= 3 and time.perf_counter() - started > budget:
                break
            for name, call in calls.items():
                times[name].append(spent(call, number))
        middle = {name: np.array(values) for name, values in times.items()}
        for name, counterpart, _ in BRANCHES:
            timm, new, inside = (middle[key] for key in (f"timm {counterpart}", name, f"{name}, in place"))
            row: dict[str, Any] = {"shape": list(shape), "branch": name, "counterpart": counterpart, "rounds": len(new)}
            row |= {"timm_ms": float(np.median(timm)), "clone_ms": float(np.median(middle["clone"]))}
            row |= {"new_ms": float(np.median(new)), "in_place_ms": float(np.median(inside))}
            row |= {"new_ratio": float(np.median(new / timm)), "in_place_ratio": float(np.median(inside / timm))}
            rows.append(row)
    torch.set_num_threads(threads)
    return rows


def fill_and_free(size: int) -> None:
    """What another process does to the memory that the next one gets."""
    torch.empty(size, dtype=torch.uint8).fill_(1)


def loop(rounds: int, answer: Any) -> None:
    """Ratios of a token mix with targets to `clone()` in a loop, and of its first call. For a process of its own."""
    torch.set_num_threads(1)
    images, labels = torch.randn(LARGE), torch.randint(0, 1000, LARGE[:1])
    mix = TokenMix(mixup_alpha=0.0)
    mix(images[:2, :, :32, :32].contiguous(), labels[:2])  # imports and tables
    first, plain = (spent(call, 1) for call in (lambda: mix(images, labels), images.clone))
    held, ratios = None, []
    for _ in range(rounds):
        begun = time.process_time()
        held = mix(images, labels)
        between = time.process_time()
        images.clone()
        ratios.append((between - begun) / (time.process_time() - between))
    del held
    gc.collect()
    answer.put((first / plain, ratios))


def large_results(rounds: int, repeats: int = 5) -> list[dict[str, Any]]:
    """Rows for a token mix of a large batch: after nothing, and after another process filled and freed memory."""
    rows = []
    context = multiprocessing.get_context("spawn")
    for before in ("quiet", "churned"):
        firsts, ratios = [], []
        for _ in range(repeats):
            if before == "churned":
                other = context.Process(target=fill_and_free, args=(free_bytes() // 2,))
                other.start()
                other.join()
            answer = context.SimpleQueue()
            process = context.Process(target=loop, args=(rounds, answer))
            process.start()
            first, several = answer.get()
            process.join()
            firsts.append(first)
            ratios += several
        rows.append(
            {
                "before": before, "shape": list(LARGE), "first_ratio": float(np.median(firsts)),
                "ratio_p50": float(np.percentile(ratios, 50)), "ratio_p80": float(np.percentile(ratios, 80)),
            }
        )  # fmt: skip
    return rows


def free_bytes() -> int:
    """Bytes that the system has left (Linux)."""
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
