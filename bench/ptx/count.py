"""Count in the compiled kernel: registers, widths of accesses, sectors of memory, instructions of each warp.

The PTX that Triton compiles is executed on the CPU by a simulator that is not part of this project: `--ptxsim DIR`
names a folder with a module `ptxsim` that offers `compile_kernel` and `run`. Every result is compared with the
reference.
"""

import argparse
import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tokenmix_kernels import kernels, reference
from tokenmix_kernels.attention_inputs import AttentionMix

from ..cases import Case
from ..launch import Launch, difference, launch_of, programs_of
from ..machine import describe, write_json
from .simulator import load_counter

__all__ = ["CASES", "Counted", "add_arguments", "count", "main"]

CHUNK = 40  # images of one launch; their number in the whole run goes into the draws as sample_offset
SECTOR = 32  # bytes
CLASS_COUNTS = (100, 1000, 10000, 21841)


class Counted(NamedTuple):
    """A case that is counted.

    Attributes:
        case: the batch.
        samples: how many masks.
        access: least bytes per thread of image loads and stores.
        traffic: what the unique sectors are divided by, 'copy', 'moved' (bytes of the tokens that move, read and
            written once) or 'converted' (bytes of one read and one write of the two dtypes).
        limit: bar of that ratio.
        timed: whether the bars of warps and instructions are stated for this case.
    """

    case: Case
    samples: int
    access: int = 16
    traffic: str = "copy"
    limit: float = 1.0
    timed: bool = False


def case_of(name: str, dtype: torch.dtype = torch.float16, **fields: Any) -> Case:
    """A chunk of a case."""
    return Case(name, CHUNK, dtype=dtype, **fields)


HALF, FULL, BRAIN, BYTE = torch.float16, torch.float32, torch.bfloat16, torch.uint8
CASES = (
    Counted(case_of("fp16"), 1000, timed=True),
    Counted(case_of("fp32", FULL), 200),
    Counted(case_of("bf16", BRAIN), 200),
    Counted(case_of("uint8 to fp16", BYTE, out_dtype=HALF), 200, access=8, traffic="converted", limit=1.02),
    Counted(case_of("uint8 to bf16", BYTE, out_dtype=BRAIN), 80, access=8, traffic="converted", limit=1.02),
    Counted(case_of("fp16 channels_last", channels_last=True), 400, timed=True),
    Counted(
        case_of("fp16 in place, one mask", in_place=True, settings={"mode": "batch"}), 400, traffic="moved", limit=1.05
    ),
    Counted(case_of("fp16 in place, mask per element", in_place=True), 80),
    Counted(case_of("fp16 Mixup and blocks", settings={"mixup_alpha": 0.8, "switch_prob": 0.5}), 80),
    Counted(case_of("fp16 CutMix", settings={"mask_type": "cutmix", "lam": -1.0}), 80),
    Counted(case_of("fp16 random tokens", settings={"mask_type": "random"}), 80),
)


def least_traffic(counted: Counted, launch: Launch) -> float:
    """Bytes that the pixels of a chunk must move, as `Counted.traffic` says."""
    values = launch.before.numel()
    in_bytes, out_bytes = launch.before.element_size(), launch.out.images.element_size()
    if counted.traffic == "moved":
        return 2.0 * float(launch.out.mask.float().mean()) * values * in_bytes
    return float(values * (in_bytes + out_bytes))


def count(ptxsim: Any, counted: Counted, arch: int, samples: int, bar: Any) -> dict[str, Any]:
    """Run a case and count."""
    case = counted.case
    first = launch_of(case)
    compiled = ptxsim.compile_kernel(first.kernel, first.args, arch=arch, **first.options)
    programs, pixel_of = programs_of(first)
    longest: list[int] = []
    instructions = pixel_instructions = 0
    widths: Counter[tuple[str, int]] = Counter()
    moved = needed = 0.0
    exact, error, races = True, 0.0, 0
    for offset in range(0, samples, CHUNK):
        launch = first if offset == 0 else launch_of(case, offset=offset)
        # One launch for each sample's longest warp, on copies in place, where a second launch would mix back.
        for n in range(CHUNK):
            mine = [c for c in range(launch.grid[0]) if pixel_of(c)[0] == n]
            stats = ptxsim.run(compiled, launch.grid, launch.args, ctas=mine, races="off", copy=case.in_place)
            longest.append(stats.max_warp_insts)
            instructions += stats.total_warp_insts
            bar.update()
        if case.in_place:
            ptxsim.run(compiled, launch.grid, launch.args, races="off")
        pixel_programs = [c for c in range(launch.grid[0]) if pixel_of(c)[1]]
        pixels = ptxsim.run(compiled, launch.grid, launch.args, ctas=pixel_programs, races="off", copy=True)
        widths.update(pixels.widths)
        pixel_instructions += pixels.total_warp_insts
        for name, sectors in pixels.buffers.items():
            if {"images", "out"} & set(name.split("/")):
                moved += SECTOR * (sectors["read_sectors"] + sectors["written_sectors"])
        needed += least_traffic(counted, launch)
        same, off = difference(launch)
        exact, error = exact and same, max(error, off)
        if offset == 0:
            few = launch_of(dataclasses.replace(case, batch=4))  # which is cut up in another way
            code = ptxsim.compile_kernel(few.kernel, few.args, arch=arch, **few.options)
            races = len(ptxsim.run(code, few.grid, few.args, races="record").races)
    count_of = len(longest)
    # What the pixel programs load beside pixels are 4-byte entries of the draw's tables.
    accesses = sorted({width for (kind, width), n in widths.items() if kind == "ld.global" and width != 4})
    stores = sorted({width for (kind, width), n in widths.items() if kind == "st.global"})
    return {
        "case": case.name,
        "sm": arch,
        "classes": case.num_classes,
        "samples": count_of,
        "registers": compiled.n_regs,
        "spills": compiled.n_spills,
        "shared_bytes": compiled.shared,
        "programs": programs,
        "num_warps": compiled.num_warps,
        "load_bytes_per_thread": accesses,
        "store_bytes_per_thread": stores,
        "traffic": counted.traffic,
        "traffic_ratio": moved / needed,
        "longest_warp_mean": float(np.mean(longest)),
        "longest_warp_p95": float(np.percentile(longest, 95)),
        "longest_warp_max": int(max(longest)),
        "warp_instructions_per_image": instructions / count_of,
        "of_pixels": pixel_instructions / count_of,
        "of_targets": (instructions - pixel_instructions) / count_of,
        "images_and_masks_equal": exact,
        "target_error": error,
        "races": races,
        "bars": bars(counted),
    }


def bars(counted: Counted) -> dict[str, float]:
    """The bars that are stated for a case. Instructions and warps explain; the simulated time decides."""
    stated: dict[str, float] = {"registers": 64, "spills": 0, "access": counted.access}
    return stated | {"traffic_ratio": counted.limit}


def count_attention(ptxsim: Any, arch: int) -> dict[str, Any]:
    """Count in the one launch of `attention_targets`, for DeiT-S: 196 patches of 128 images in fp16, 1,000 classes."""
    batch, classes, patches = 128, 1000, 196
    source = torch.Generator().manual_seed(0)
    mix = AttentionMix(
        torch.rand(batch, patches, generator=source).half(), torch.rand(batch, 14, 14, generator=source) < 0.5
    )
    labels = torch.randint(0, classes, (batch,), generator=source)
    targets = torch.full((batch, classes), float("nan"))
    grid, arguments = kernels.attention_arguments(targets, mix, labels, None, 0.1)
    compiled = ptxsim.compile_kernel(kernels.attention_kernel, arguments, arch=arch)
    stats = ptxsim.run(compiled, grid, arguments, races="off")
    right = reference.attention_targets(mix, labels, None, classes, 0.1)
    # The simulator counts tensors of one group as one buffer, so what is read is the size of the tensors.
    read = sum(tensor.numel() * tensor.element_size() for tensor in (mix.attention, mix.mask, labels))
    written = SECTOR * stats.buffers["targets"]["written_sectors"]
    return {
        "sm": arch, "batch": batch, "patches": patches, "classes": classes, "launches": 1, "programs": grid[0],
        "registers": compiled.n_regs, "spills": compiled.n_spills, "read_bytes": read, "written_bytes": written,
        "warp_instructions_per_image": stats.total_warp_insts / batch,
        "target_error": (right - targets).abs().max().item(),
    }  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [counted.case.name for counted in CASES]
    parser.add_argument("--ptxsim", type=Path, required=True, help="folder of the PTX simulator")
    parser.add_argument("--out", type=Path, default=Path("bench/results/counts.json"))
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities, as 80 90")
    parser.add_argument("--samples", type=int, help="at most so many masks for each case")
    parser.add_argument("--cases", nargs="+", choices=names, metavar="CASE", help=f"these alone: {', '.join(names)}")


def main(asked: argparse.Namespace) -> None:
    ptxsim = load_counter(asked.ptxsim)
    started = time.perf_counter()
    by_classes = [
        CASES[0]._replace(case=dataclasses.replace(CASES[0].case, num_classes=k), samples=CHUNK) for k in CLASS_COUNTS
    ]
    chosen = [counted for counted in CASES if not asked.cases or counted.case.name in asked.cases]
    jobs = [("rows", counted, arch) for counted in chosen for arch in asked.arch]
    jobs += [("by_classes", counted, arch) for arch in asked.arch for counted in by_classes]
    samples = [-(-min(job[1].samples, asked.samples or job[1].samples) // CHUNK) * CHUNK for job in jobs]
    found: dict[str, list[dict[str, Any]]] = {"rows": [], "by_classes": []}
    with tqdm(total=sum(samples), unit="mask", disable=None) as bar:
        for (table, counted, arch), masks in zip(jobs, samples, strict=True):
            bar.set_description(f"{counted.case.name}, sm_{arch}, K = {counted.case.num_classes}")
            found[table].append(count(ptxsim, counted, arch, masks, bar))
    record = {
        "kind": "counts",
        "command": "python -m bench count --ptxsim DIR" + (f" --samples {asked.samples}" if asked.samples else ""),
        "machine": describe(),
        "seconds": round(time.perf_counter() - started),
        "shape": [3, 224, 224],
        "patch_size": 16,
        "maps": "top-5 18x18 float16, int64 class numbers, boxes",
        **found,
        "attention": [count_attention(ptxsim, arch) for arch in asked.arch],
    }
    write_json(asked.out, record)
