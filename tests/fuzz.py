"""Random mixes: the kernels against the reference.

`python -m tests.fuzz --cases 100000` compares for as long as it is told; the tests run a bounded part of the same
cases. A difference is reported with the number that makes its case again: `--first NUMBER --cases 1`.
"""

import argparse
import importlib
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__" and not any(argument.startswith("--ptxsim") for argument in sys.argv):
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor

from tokenmix_kernels import dispatch, kernels, reference
from tokenmix_kernels.inputs import Evidence, Result
from tokenmix_kernels.kernels.groups import Results
from tokenmix_kernels.settings import ERASE_MODES, MASK_RULES, Settings

TOLERANCE = 1e-6  # of targets and weights
EDGES = (0, 1, 16, 2**31 - 1)
SEEDS = (0, 1, 16, 2**32, 2**32 + 1, 2**63 - 1, -1, -(2**63))
OFFSETS = (0, 1, 16, 2**32 - 3, 2**32, 2**40, 2**62 - 1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)


class Case(NamedTuple):
    """One mix, as the operators take it."""

    images: Tensor
    labels: Tensor
    partner: Tensor | None
    evidence: Evidence
    mask: Tensor | None
    seed: Tensor
    sample_offset: int
    settings: Settings
    out_dtype: torch.dtype
    in_place: bool

    def describe(self) -> str:
        parts = [f"images {list(self.images.shape)} {self.images.dtype} strides {self.images.stride()}"]
        parts += [f"storage offset {self.images.storage_offset()}, out {self.out_dtype}, in place {self.in_place}"]
        for name, value in (("partner", self.partner), *self.evidence._asdict().items(), ("mask", self.mask)):
            if isinstance(value, Tensor):
                parts.append(f"{name} {list(value.shape)} {value.dtype}")
        return "; ".join([*parts, f"seed {int(self.seed)}, offset {self.sample_offset}", str(self.settings)])


def some_images(pick: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Images in any layout, at any offset in their storage."""
    batch, channels, height, width = shape
    layout = pick.choice(("contiguous", "channels_last", "window", "batch_slice", "offset", "transposed"))
    source = torch.Generator().manual_seed(pick.randrange(2**31))

    def fresh(*size: int) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(0, 256, size, dtype=dtype, generator=source)
        images = torch.randn(size, generator=source) * 100
        if pick.random() < 0.1:
            images.view(-1)[:: pick.randint(3, 50)] = pick.choice((float("nan"), float("inf"), -0.0, 1e-40))
        return images.to(dtype)

    if layout == "channels_last":
        return fresh(*shape).to(memory_format=torch.channels_last)
    if layout == "window":
        top, left = pick.randint(0, 5), pick.randint(0, 5)
        return fresh(batch, channels, height + 8, width + 8)[:, :, top : top + height, left : left + width]
    if layout == "batch_slice":
        return fresh(2 * batch, channels, height, width)[::2]
    if layout == "offset":
        start = pick.randint(1, 9)
        return fresh(start + batch * channels * height * width)[start:].view(shape)
    if layout == "transposed":
        return fresh(batch, channels, width, height).transpose(2, 3)
    return fresh(*shape)


def some_evidence(pick: random.Random, batch: int, classes: int) -> Evidence:
    """Maps of any form and dtype, with what says which part of them is shown; None at times."""
    form = pick.choice(("none", "own", "all", "topk"))
    if form == "none":
        return Evidence()
    source = torch.Generator().manual_seed(pick.randrange(2**31))
    rows = pick.choice((batch, batch, batch + 5))
    cells = (pick.choice((1, 2, 7, 14, 33)), pick.choice((1, 3, 7, 16, 64)))
    depth = {"own": (), "all": (classes,), "topk": (pick.randint(1, 5),)}[form]
    maps = torch.rand(rows, *depth, *cells, generator=source)
    if pick.random() < 0.2:
        maps[pick.randrange(rows)] = pick.choice((0.0, float("nan"), float("inf"), -1.0))
    dtype = pick.choice(DTYPES)
    maps = (maps.nan_to_num(0, 0, 0) * 255).byte() if dtype == torch.uint8 else maps.to(dtype)
    indices = None
    if form == "topk":
        kind = pick.choice((torch.int64, torch.int32, torch.int16, torch.float32))
        indices = torch.randint(0, classes, maps.shape, generator=source).to(kind)
    boxes = flips = affines = None
    place = pick.choice(("whole", "boxes", "flips", "affines"))
    if place == "boxes":
        low = torch.rand(batch, 2, generator=source) * 0.8
        high = low + 0.01 + (0.99 - low) * torch.rand(batch, 2, generator=source)
        boxes = torch.cat([low, high], 1).to(pick.choice((torch.float32, torch.float64, torch.float16)))
    if place == "affines":
        affines = torch.eye(2, 3).repeat(batch, 1, 1) + 0.3 * torch.randn(batch, 2, 3, generator=source)
    elif pick.random() < 0.5:
        flips = torch.rand(batch, generator=source) < 0.5
    ids = None
    if rows != batch or pick.random() < 0.3:
        ids = torch.randint(0, rows, (batch,), generator=source).to(pick.choice((torch.int64, torch.int32)))
    return Evidence(maps, indices, ids, boxes, flips, affines)


def some_rows(pick: random.Random, batch: int, classes: int) -> Tensor:
    """Labels [B, K] of any dtype: shares of the classes, or yes or no for each; few of many, so that maps are few."""
    rows = torch.zeros(batch, classes)
    for row in rows:
        for c in pick.sample(range(classes), pick.randint(0, min(3, classes))):
            row[c] = 1
    dtype = pick.choice((*DTYPES, torch.float64, torch.int64, torch.bool))
    if dtype.is_floating_point and pick.random() < 0.5:
        rows = rows * torch.rand(batch, classes, generator=torch.Generator().manual_seed(pick.randrange(2**31)))
    wide = torch.zeros(2 * batch, classes, dtype=dtype)
    wide[::2] = rows.to(dtype)
    return wide[::2] if pick.random() < 0.3 else wide[::2].contiguous()


def some_erasing(
    number: int, dtype: torch.dtype, out_dtype: torch.dtype, normalise: bool, interpreted: bool
) -> dict[str, Any]:
    """How the images of a case are erased, from numbers of its own; at times not at all."""
    pick = random.Random(f"erasing {number}")
    if pick.random() < 0.6 or (dtype == torch.uint8 and not normalise):
        return {}
    most = pick.choice((1, 1, 2, 3))
    return {
        "erase_prob": pick.choice((0.25, 0.5, 1.0)),
        "erase_mode": "const" if interpreted and out_dtype == torch.bfloat16 else pick.choice(ERASE_MODES),
        "erase_area": pick.choice(((0.02, 1 / 3), (0.3, 0.9), (0.0, 1.0), (0.1, 0.1))),
        "erase_aspect": pick.choice(((0.3, 1 / 0.3), (0.1, 20.0), (1.0, 1.0))),
        "erase_count": (pick.choice((1, most)), most),
        "erase_evidence": pick.random() < 0.5,
        "erase_splits": pick.choice((0, 0, 0, 2)),
    }


def some_case(number: int, interpreted: bool = True) -> Case:
    """The case of a number: always the same."""
    pick = random.Random(number)
    batch, channels = pick.choice((1, 2, 3, 5)), pick.choice((1, 2, 3, 4))
    patch = pick.choice((1, 3, 4, 7, 8, 16))
    grid = pick.choice(((1, 1), (1, 5), (4, 1), (2, 3), (4, 4), (5, 7), (9, 2)))
    dtype = pick.choice(DTYPES)
    classes = pick.choice((1, 2, 5, 1000))
    mask_type = pick.choice([name for name in MASK_RULES if patch > 1 or name != "given"])
    images = some_images(pick, (batch, channels, grid[0] * patch, grid[1] * patch), dtype)
    normalise = pick.random() < 0.4
    scale = 255 if dtype == torch.uint8 else 1
    settings = Settings(
        num_classes=classes,
        patch_size=patch,
        mask_type=mask_type,
        mode=pick.choice(("batch", "pair", "elem")),
        lam=pick.choice((-1.0, 0.0, 0.3, 0.5, 1.0)),
        minimum_tokens=pick.choice((-1, *EDGES)),
        mixup_alpha=pick.choice((0.0, 0.1, 0.8, 1.0)),
        cutmix_alpha=pick.choice((0.3, 1.0)),
        prob=pick.choice((0.0, 0.5, 1.0, 1.0)),
        switch_prob=pick.choice((0.0, 0.5, 1.0)),
        minmax=pick.choice(((), (), (0.5, 0.5), (0.0, 1.0), (0.2, 0.7))) if mask_type == "cutmix" else (),
        correct_lam=pick.random() < 0.7,
        label_smoothing=pick.choice((0.0, 0.1, 1.0)),
        mean=tuple(scale * pick.choice((0.4, 0.9)) for _ in range(channels)) if normalise else (),
        std=tuple(scale * pick.choice((0.2, 1.0, 3.0)) for _ in range(channels)) if normalise else (),
    )
    if settings.mixup_alpha > 0 and pick.random() < 0.1:
        settings = settings._replace(cutmix_alpha=0.0)
    in_place = not normalise and pick.random() < 0.3
    partner = None
    if pick.random() < 0.4:
        if in_place:
            order = pick.sample(range(batch), batch)
            partner = torch.arange(batch)
            for one, other in zip(order[::2], order[1::2], strict=False):
                partner[one], partner[other] = other, one
        else:
            partner = torch.tensor([pick.randrange(batch) for _ in range(batch)])
        partner = partner.to(pick.choice((torch.int64, torch.int32)))
    floats = [kind for kind in DTYPES if kind != torch.uint8]
    out_dtype = dtype
    if not in_place:
        out_dtype = pick.choice(floats) if normalise or dtype != torch.uint8 else pick.choice(DTYPES)
    # Triton's interpreter cuts float32 off to bfloat16 where hardware and PyTorch round: only copies can be compared.
    if not interpreted:
        pass
    elif out_dtype == torch.bfloat16 and (dtype != torch.bfloat16 or normalise):
        out_dtype = torch.float16
    elif out_dtype == torch.bfloat16:
        settings = settings._replace(mixup_alpha=0.0, cutmix_alpha=1.0)
    labels = torch.tensor([pick.randrange(classes) for _ in range(batch)]).to(pick.choice((torch.int64, torch.int16)))
    later = random.Random(f"rows {number}")  # apart: what else a number gives stays as it was
    settings = settings._replace(clamp_targets=later.random() < 0.3)
    if later.random() < 0.3:
        labels = some_rows(later, batch, classes)
        settings = settings._replace(multi_label=later.random() < 0.5)
    settings = settings._replace(**some_erasing(number, dtype, out_dtype, bool(settings.mean), interpreted))
    return Case(
        images,
        labels,
        partner,
        some_evidence(pick, batch, classes),
        torch.rand(batch, *grid, generator=torch.Generator().manual_seed(number)) < 0.5
        if mask_type == "given"
        else None,
        torch.tensor(pick.choice((*SEEDS, pick.randrange(2**63)))),
        pick.choice((*OFFSETS, pick.randrange(2**40))),
        settings,
        out_dtype,
        in_place,
    )


def placed(value: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device, with the same strides at the same storage offset; what is between is NaN, 42 or True."""
    end = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    between = float("nan") if value.is_floating_point() else 42
    memory = torch.full((value.storage_offset() + end,), between, dtype=value.dtype, device=device)
    return memory.as_strided(value.shape, value.stride(), value.storage_offset()).copy_(value)


def mixed(module: Any, case: Case, device: str = "cpu") -> tuple[Tensor, Result]:
    """The images and the rest of a mix; what is not written is NaN, or 0xAA."""
    images = placed(case.images, device)
    out = images
    if not case.in_place:
        out = torch.full_like(images, float("nan") if case.out_dtype.is_floating_point else 0xAA, dtype=case.out_dtype)
    labels, partner, mask = (None if one is None else one.to(device) for one in (case.labels, case.partner, case.mask))
    evidence = Evidence(*(one.to(device) if isinstance(one, Tensor) else one for one in case.evidence))
    result = dispatch.mix_into(
        module, images, out, labels, partner, evidence, mask, case.seed, case.sample_offset, case.settings,
        case.in_place,
    )  # fmt: skip
    return out.cpu(), Result(*(one.cpu() for one in result))


class Simulated:
    """The compiled kernel, its PTX executed by a simulator that is no part of this project."""

    def __init__(self, folder: Path, arch: int) -> None:
        sys.path.insert(0, str(folder))
        self.ptxsim, self.arch = importlib.import_module("ptxsim"), arch

    def mix(
        self, images: Tensor, out: Tensor, labels: Tensor, partner: Tensor | None, evidence: Evidence,
        mask: Tensor | None, seed: Tensor, sample_offset: int, settings: Settings,
    ) -> Result:  # fmt: skip
        batch, _, height, width = images.shape
        grid = (height // settings.patch_size, width // settings.patch_size)
        result = Result(
            torch.full((batch, settings.num_classes), float("nan")), torch.ones(batch, *grid, dtype=torch.bool),
            torch.full((batch, 2), float("nan")), torch.full((batch,), 99, dtype=torch.uint8),
        )  # fmt: skip
        ready = kernels.prepare(
            images, out, labels, partner, evidence, mask, seed, sample_offset, settings,
            Results(result.targets, result.weights, result.mask, result.kind), tuple(images.shape), images.device,
            kernels.Card(132, 50 << 20, True),
        )  # fmt: skip
        compiled = self.ptxsim.compile_kernel(kernels.mix_kernel, ready.arguments, arch=self.arch, **ready.options)
        self.ptxsim.run(compiled, ready.grid, ready.arguments, races="raise")
        return result


def difference(case: Case, device: str = "cpu", module: Any = kernels) -> str | None:
    """What differs between the kernels on a device and the reference on the CPU, or None."""
    right_images, right = mixed(reference, case)
    images, got = mixed(module, case, device)
    if not torch.equal(got.mask, right.mask):
        return f"masks differ in {int((got.mask != right.mask).sum())} tokens"
    if not torch.equal(got.kind, right.kind):
        return f"kinds are {got.kind.tolist()}, expected {right.kind.tolist()}"
    if not torch.equal(bits_of(images), bits_of(right_images)):
        return f"{int((bits_of(images) != bits_of(right_images)).sum())} pixels differ"
    for name in ("weights", "targets"):
        error = (getattr(got, name) - getattr(right, name)).abs().max().item()
        if not error <= TOLERANCE:
            return f"{name} differ by {error}"
    return None


def bits_of(images: Tensor) -> Tensor:
    """Values as integers, so that signs of zero count; all NaNs as one."""
    if not images.is_floating_point():
        return images
    plain = torch.where(images.isnan(), torch.full_like(images, float("nan")), images).contiguous()
    return plain.view(torch.int16 if plain.element_size() == 2 else torch.int32)


def compare(
    first: int, count: int, simulated: Simulated | None = None, report: Callable[[str], None] = print,
    erasing: bool = False,
) -> int:  # fmt: skip
    """Compare cases first ... first + count - 1; the number of those that differ. With `erasing` those that erase."""
    bad = 0
    for number in range(first, first + count):
        case = some_case(number, simulated is None)
        if erasing and case.settings.erase_prob == 0:
            continue
        try:
            what = difference(case, module=simulated or kernels)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
        if what is not None:
            bad += 1
            report(f"case {number}: {what}\n  {case.describe()}")
        if (number - first + 1) % 100 == 0:
            report(f"{number - first + 1} of {count} cases, {bad} with a difference")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many (default: 1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first (default: 0)")
    parser.add_argument(
        "--ptxsim", type=Path, metavar="DIR", help="execute compiled PTX by this folder's module ptxsim"
    )
    parser.add_argument("--erasing", action="store_true", help="of these, only those in which images are erased")
    parser.add_argument("--arch", type=int, choices=(80, 90), default=90, help="to compile for (default: 90)")
    args = parser.parse_args()
    if kernels.interpreted():
        from tests.quick_interpreter import leave_out_idle_work

        leave_out_idle_work()
    simulated = Simulated(args.ptxsim, args.arch) if args.ptxsim else None
    bad = compare(args.first, args.cases, simulated, erasing=args.erasing)
    print(f"{args.cases} cases from {args.first}: {bad} with a difference")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
