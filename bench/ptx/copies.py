"""The kernels that the mix is compared with: the fastest Triton copy and conversion of the same batch.

Which block and number of warps is fastest is found by simulating each: nominal parameters decide.
"""

import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..cases import MEAN, STD, Case
from .simulator import Simulator

__all__ = ["Baseline", "Baselines", "baseline_of", "record_baseline"]


@triton.jit
def copy_kernel(
    images,  # [n] 64-bit words
    out,  # [n]
    n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Copy BLOCK words."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(images + at, at < n), at < n)


@triton.jit
def convert_kernel(
    images,  # [B * C, H * W] uint8
    out,  # [B * C, H * W]
    mean,  # [C] fp32
    rstd,  # [C] fp32
    C: tl.constexpr,
    PLANE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise BLOCK values of one plane."""
    plane = tl.program_id(0) // tl.cdiv(PLANE, BLOCK)
    at = (tl.program_id(0) % tl.cdiv(PLANE, BLOCK)) * BLOCK + tl.arange(0, BLOCK)
    pixels = tl.load(images + plane * PLANE + at, at < PLANE).to(tl.float32)
    pixels = (pixels - tl.load(mean + plane % C)) * tl.load(rstd + plane % C)
    tl.store(out + plane * PLANE + at, pixels.to(out.dtype.element_ty), at < PLANE)


class Baseline(NamedTuple):
    """A batch to copy or to convert.

    Attributes:
        kind: 'copy' or 'convert'.
        images: how many images.
        values: of an image.
        in_bytes, out_bytes: of a value.
    """

    kind: str
    images: int
    values: int
    in_bytes: int
    out_bytes: int

    def shapes(self) -> list[tuple[int, int]]:
        """Values of a block, and warps, to try."""
        if self.kind == "convert":
            return [(1024, 2), (2048, 4), (4096, 8)]
        return [(size // self.in_bytes, warps) for size, warps in ((2048, 2), (4096, 4), (8192, 8))]


def baseline_of(case: Case) -> Baseline:
    """What a case is compared with: a conversion where the dtype changes, else a copy of the same bytes."""
    in_bytes, out_bytes = (torch.empty((), dtype=dtype).element_size() for dtype in (case.dtype, case.output))
    if case.dtype != case.output:
        return Baseline("convert", case.batch, case.channels * case.height * case.width, in_bytes, out_bytes)
    # Bytes are all that a copy knows: one of 256 images of halves is one of 128 images of floats.
    return Baseline("copy", 1, case.batch * case.channels * case.height * case.width * in_bytes // 8, 8, 8)


def record_baseline(simulator: Simulator, baseline: Baseline, arch: int, block: int, warps: int) -> Any:
    """Run the machine code of a baseline kernel and return its trace.

    Raises:
        RuntimeError: the result is not the copy or the normalised batch.
    """
    if baseline.kind == "copy":
        images = torch.arange(baseline.values)
        out, right = torch.zeros_like(images), images
        kernel: Any = copy_kernel
        args = {"images": images, "out": out, "n": baseline.values, "BLOCK": block}
        grid = -(-baseline.values // block)
    else:
        channels = len(MEAN)
        plane = baseline.values // channels
        source = torch.Generator().manual_seed(0)
        images = torch.randint(
            0, 256, (baseline.images * channels, plane), dtype=torch.uint8, generator=source
        )  # fmt: skip
        mean, rstd = torch.tensor(MEAN), 1 / torch.tensor(STD)
        numbers = torch.arange(len(images)) % channels
        right = ((images.float() - mean[numbers, None]) * rstd[numbers, None]).to(torch.float16)
        out = torch.zeros_like(right)
        kernel = convert_kernel
        args = {"images": images, "out": out, "mean": mean, "rstd": rstd, "C": channels, "PLANE": plane, "BLOCK": block}
        grid = len(images) * -(-plane // block)
    compiled = simulator.ptxsim.compile_kernel(kernel, args, arch=arch, num_warps=warps, enable_fp_fusion=False)
    trace = simulator.sass.record(compiled, (grid,), args)
    if not torch.equal(out, right):
        raise RuntimeError(f"the {baseline.kind} kernel with BLOCK {block} and {warps} warps writes wrong values")
    return trace


def source_of(module: Any) -> str:
    """The source text of a module."""
    return inspect.getsource(module)


class Baselines:
    """Cycles of baseline kernels, simulated once and kept in a file.

    Args:
        simulator: the simulator.
        path: of the file; entries of another simulator or of other kernels are not used.
    """

    def __init__(self, simulator: Simulator, path: Path) -> None:
        self.simulator, self.path = simulator, path
        sources = [source_of(module) for module in simulator] + [Path(__file__).read_text(), triton.__version__]
        self.digest = hashlib.sha256("".join(sources).encode()).hexdigest()[:16]

    def cycles(
        self, baseline: Baseline, card: str, arch: int, assumptions: dict[str, dict[str, float]]
    ) -> dict[str, float]:
        """Cycles of the fastest kernel under each of the named assumptions, which are parameters of the model.

        Each assumption gets the kernel that is fastest under it.
        """
        known = self.read()
        key = f"{card} {' '.join(map(str, baseline))}"
        found: dict[str, float] = known.get(key, {})
        missing = {name: change for name, change in assumptions.items() if name not in found}
        if missing:
            for block, warps in baseline.shapes():
                trace = record_baseline(self.simulator, baseline, arch, block, warps)
                for name, change in missing.items():
                    cycles = float(self.simulator.timing.simulate(trace, card, **change).cycles)
                    found[name] = min(cycles, found.get(name, cycles))
            # Read again: another process may have added its own meanwhile.
            known = self.read()
            known[key] = {**known.get(key, {}), **found}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
            part.write_text(json.dumps({"digest": self.digest, "cycles": known}, indent=1) + "\n")
            part.replace(self.path)
        return found

    def read(self) -> dict[str, dict[str, float]]:
        """The file's entries, if they are of this simulator and these kernels."""
        try:
            record = json.loads(self.path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return record["cycles"] if record.get("digest") == self.digest else {}
