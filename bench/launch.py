"""The launch of the mix for a case: the one place in `bench` that knows how the package builds it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmix_kernels import kernels, reference
from tokenmix_kernels.inputs import Evidence
from tokenmix_kernels.kernels.groups import Results
from tokenmix_kernels.settings import Settings

from .cases import SEED, Case, Inputs, make_inputs, settings_of

__all__ = ["Cut", "Launch", "Outputs", "cut_of", "difference", "expected", "launch_of", "programs_of", "recut", "run"]


class Outputs(NamedTuple):
    """What a mix writes.

    Attributes:
        images: [B, C, H, W].
        targets: [B, K] float32.
        weights: [B, 2] float32.
        mask: [B, Gh, Gw] bool.
    """

    images: Tensor
    targets: Tensor
    weights: Tensor
    mask: Tensor


class Launch(NamedTuple):
    """A launch that is ready to run.

    Attributes:
        kernel: the Triton function.
        grid: number of programs.
        args: its arguments by name, compile-time ones included.
        options: of the launch, such as num_warps.
        inputs: what is mixed.
        before: the images before the launch.
        out: what it writes.
        offset: global number of the first image.
        settings: of the mix.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]
    inputs: Inputs
    before: Tensor
    out: Outputs
    offset: int
    settings: Settings


def launch_of(
    case: Case, device: torch.device | str = "cpu", offset: int = 0, card: kernels.Card | None = None
) -> Launch:
    """Build the launch of a case; outputs are poisoned with NaN and True.

    Args:
        case: the batch.
        device: where it is.
        offset: global number of the first image: another number, other masks.
        card: what the launch is shaped for, if not the device's.
    """
    inputs = make_inputs(case, device, offset)
    settings = settings_of(case)
    images = inputs.images
    before = images.clone(memory_format=torch.preserve_format) if case.in_place else images
    out = Outputs(
        images if case.in_place else torch.full_like(images, float("nan"), dtype=case.output),
        torch.full((case.batch, case.num_classes), float("nan"), device=device),
        torch.full((case.batch, 2), float("nan"), device=device),
        torch.ones(case.batch, *case.grid, dtype=torch.bool, device=device),
    )
    results = Results(out.targets, out.weights, out.mask, None)
    ready = kernels.prepare(
        images, out.images, inputs.labels, None, evidence_of(inputs), None, torch.tensor(SEED), offset, settings,
        results, tuple(images.shape), torch.device(device), card,
    )  # fmt: skip
    return Launch(kernels.mix_kernel, ready.grid, ready.arguments, ready.options, inputs, before, out, offset, settings)


def evidence_of(inputs: Inputs) -> Evidence:
    """The maps and boxes of a batch as one."""
    return Evidence(*inputs.maps, boxes=inputs.boxes)


class Cut(NamedTuple):
    """How a launch is cut up: grid rows of tokens that a program moves, and its warps."""

    rows: int
    warps: int


def cut_of(launch: Launch) -> Cut:
    """How a launch is cut up."""
    return Cut(launch.args["TILE"].ROWS, launch.options["num_warps"])


def recut(launch: Launch, cut: Cut) -> Launch:
    """The launch cut up in another way; rows are spread evenly over as many programs as `cut` needs."""
    token_rows, tile = launch.args["GRID"].GH, launch.args["TILE"]
    programs = -(-token_rows // min(cut.rows, token_rows))
    rows = -(-token_rows // programs)
    least = (token_rows - (programs - 1) * rows) * launch.args["GRID"].P  # lines of a sample's last program
    tile = tile._replace(ROWS=rows, PIXELS=programs, AHEAD=min(tile.AHEAD, least))
    return launch._replace(
        grid=(len(launch.inputs.images) * (programs + 2),),
        args={**launch.args, "TILE": tile},
        options={**launch.options, "num_warps": cut.warps},
    )


def run(launch: Launch) -> None:
    """Launch on the device."""
    launch.kernel[launch.grid](**launch.args, **launch.options)


def programs_of(launch: Launch) -> tuple[int, Callable[[int], tuple[int, bool]]]:
    """How a launch is cut up: programs of an image, and for a program its image and whether it moves pixels."""
    tile, batch = launch.args["TILE"], len(launch.inputs.images)
    pixels = tile.PIXELS
    of_pixels = range(2 * batch, (2 + pixels) * batch) if tile.TARGETS_FIRST else range(pixels * batch)

    def place(program: int) -> tuple[int, bool]:
        if program in of_pixels:
            return (program - of_pixels.start) // pixels, True
        return (program if tile.TARGETS_FIRST else program - of_pixels.stop) // 2, False

    return pixels + 2, place


def expected(launch: Launch) -> Outputs:
    """Compute what a launch must write, by the reference."""
    images = torch.empty_like(launch.out.images)
    result = reference.mix(
        launch.before, images, launch.inputs.labels, None, evidence_of(launch.inputs), None, torch.tensor(SEED),
        launch.offset, launch.settings,
    )  # fmt: skip
    return Outputs(images, result.targets, result.weights, result.mask)


def difference(launch: Launch) -> tuple[bool, float]:
    """Whether images and masks equal the reference's bit for bit, and the largest error of targets and weights."""
    right, got = expected(launch), launch.out
    error = max((right.targets - got.targets).abs().max().item(), (right.weights - got.weights).abs().max().item())
    equal = torch.equal(right.images, got.images) and torch.equal(right.mask, got.mask)
    return equal, error if error == error else float("inf")
