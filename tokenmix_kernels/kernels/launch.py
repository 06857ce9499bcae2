"""Launches of the fused kernel: their shape, their arguments, and the functions that the operators call.

The launchers are plain functions of tensors. They do not ask what device these are on, so the interpreter can run them.
"""

from functools import lru_cache
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..inputs import BOX_FORMATS, Evidence, Form, Result
from ..settings import (
    BATCH,
    ERASE_MODES,
    MASK_RULES,
    MODES,
    PAIR,
    Plan,
    Settings,
    area_bits,
    has_drawn_lam,
    make_plan,
)
from ..tables import byte_shift, device_table
from . import draw
from .erasing import erasing_of
from .fused import mix_kernel
from .groups import EvidencePointers, Grid, Layout, MapForm, Normalisation, Pairs, Results, Rule, Strides, Tables, Tile
from .ready import Launch, Relaunch, halves

__all__ = ["Card", "Launch", "interpreted", "launch_shape", "mix", "pool_targets", "prepare", "token_mask"]

NO_STRIDES: tuple[int, ...] = (1, 1, 1, 1)


def interpreted() -> bool:
    """Whether Triton interprets the kernels, which it decides when it is imported."""
    return not isinstance(mix_kernel, triton.JITFunction)


class Fixed(NamedTuple):
    """What a launch has in common with all others of its form."""

    programs: int
    plan: Plan
    tables: Tables
    normalisation: Normalisation
    erasing: Any
    constants: dict[str, Any]
    options: dict[str, Any]


class Card(NamedTuple):
    """What a launch depends on: multiprocessors, bytes of L2 cache, and whether it understands PTX."""

    multiprocessors: int
    l2_bytes: int
    ptx: bool


# Where there is no GPU. Compiled ahead of time: no instructions of one vendor. Interpreted: few programs, which run one
# after the other, each with a draw of its own.
NO_CARD = Card(108, 0, False)
INTERPRETER = Card(4, 0, False)


@lru_cache(maxsize=64)
def card_of(device: torch.device) -> Card:
    """The properties of a device, looked up once."""
    if device.type != "cuda":
        return INTERPRETER if interpreted() else NO_CARD
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.multi_processor_count, properties.L2_cache_size, not torch.version.hip)


@lru_cache(maxsize=256)
def launch_shape(
    batch: int, channels: int, height: int, width: int, patch: int, nhwc: bool, in_bytes: int, out_bytes: int,
    alignment: int, dense: bool, converts: bool, mixup: bool, rectangles: bool,
    erases: bool, in_place: bool, card: Card,
) -> tuple[Tile, int, int, int]:  # fmt: skip
    """How a launch is divided.

    Args:
        batch, channels, height, width, patch: of the images.
        nhwc: whether channels are innermost in memory.
        in_bytes, out_bytes: size of one value.
        alignment: a divisor of all strides but the innermost and of the first addresses, in values.
        dense: whether lines of pixels follow each other in memory without gaps.
        converts: whether pixels are normalised or change their dtype.
        mixup, rectangles: whether a sample may be mixed so, which takes pixels of both images.
        erases: whether parts of some images are erased, whose programs take longer than the others.
        in_place: whether a pair's tokens change places.
        card: the device.

    Returns:
        (Tile, WORD_ROWS, WORDS, warps). VEC: neighbours in memory that a thread moves at once: 16 bytes of the wider
        dtype, less where tokens are narrower. COLS by LINES: the tile; few lines where much is held for each. TOGETHER:
        tiles that are loaded before the first of them is stored. ROWS:
        token rows of a program. PIXELS: programs of a sample that move pixels. PACK: values that are moved as one
        64-bit word. AHEAD: lines of pixels that a program prefetches. TARGETS_FIRST: order of the programs. WORD_ROWS
        grid rows are in one word of the mask, which has WORDS words.
    """
    warps = 4
    grid_h, grid_w = height // patch, width // patch
    span = patch * (channels if nhwc else 1)
    line = width * (channels if nhwc else 1)
    vec = gcd(16 // max(in_bytes, out_bytes), span, alignment)
    cols = min(32 * vec, triton.next_power_of_2(line))
    tall = triton.next_power_of_2(patch)
    blends = mixup or rectangles
    lines = tall if converts and not (nhwc or blends) else min(tall, 4 if rectangles or (mixup and in_place) else 8)
    word_rows = max(1, 32 // grid_w) if grid_w <= 32 else 1
    word_rows = min(word_rows, -(-grid_h // 8))
    words = triton.next_power_of_2(-(-grid_h // word_rows))
    # Loads of each thread: enough to be worth the draw of the mask, few enough that warps stay short.
    loads = tall * (1 if nhwc else channels) * -(-line // cols) * cols // (vec * 32 * warps)
    if in_place:
        loads += loads // 3  # each with a condition of its own
    most = 36 if converts or blends else 84
    rows = (min(most, 12) if erases else most) // max(1, loads)
    # A small batch is spread over all multiprocessors, two programs on each.
    rows = max(1, min(rows, grid_h, round(batch * grid_h / (2 * card.multiprocessors))))
    rows = -(-grid_h // -(-grid_h // rows))
    programs = -(-grid_h // rows)
    pack = 8 // in_bytes if not converts and vec * in_bytes >= 8 else 1
    # Triton cannot compile hints on a tile of one word, nor `to_float` on one of fewer than four bytes.
    cols = max(cols, 2 * pack, 4 if converts and in_bytes == 1 else 1)
    together = 1 if nhwc and out_bytes == 4 else 3  # what 64 registers hold
    # All programs that run at once ask for a fifth of the L2 cache: with more, it throws lines out before their use.
    ahead = 0
    places = card.multiprocessors * (1024 // (32 * warps))
    if dense and card.ptx and not in_place:
        at_once = min(batch * programs, places)
        ahead = card.l2_bytes // (5 * max(1, at_once) * channels * width * in_bytes)
        ahead = min(ahead, (grid_h - (programs - 1) * rows) * patch)
    # The last to come issue first, which counts from 3 a multiprocessor on. Without room for all, targets can wait.
    targets_first = 3 * card.multiprocessors <= batch * (programs + 2) <= places
    tile = Tile(vec, cols, lines, rows, programs, pack, together, ahead, targets_first)
    return tile, word_rows, max(8, words), warps


@lru_cache(maxsize=64)
def normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], of_bytes: bool, device: torch.device
) -> Normalisation:  # fmt: skip
    """What normalises pixels, on a device, made once."""
    if not mean:
        return Normalisation(None, None)
    shift = byte_shift(mean, std) if of_bytes else torch.tensor(mean, dtype=torch.float32)
    return Normalisation(shift.to(device), (1 / torch.tensor(std, dtype=torch.float32)).to(device))


@lru_cache(maxsize=1024)
def fixed_part(
    shape: tuple[int, ...], strides: tuple[int, ...], out_strides: tuple[int, ...], in_bytes: int, out_bytes: int,
    alignment: int, moves: bool, plain: bool, in_place: bool, map_shape: tuple[int, ...], map_vec: int, box_step: int,
    box_format: str, label_rows: bool, settings: Settings, device: torch.device, card: Card,
) -> Fixed:  # fmt: skip
    """What is the same for all launches of this form."""
    batch, channels, height, width = shape
    sc, sh, sw = strides[1:]
    oc, oh, ow = out_strides[1:]
    patch = settings.patch_size
    rule = MASK_RULES[settings.mask_type]
    plan = make_plan(settings, height, width)
    nhwc = sc == 1 and sw == channels and oc == 1 and ow == channels and channels > 1
    inner: tuple[int, ...] = (sh, oh) if nhwc else (sc, sh, oc, oh)
    alignment = gcd(alignment, strides[0], out_strides[0], *inner) if nhwc or sw == ow == 1 else 1
    has_mixup = plan.switches < 1 << 24
    dense = sh == width * channels if nhwc else sw == 1 and sh == width
    tile, word_rows, words, warps = launch_shape(
        batch, channels, height, width, patch, nhwc, in_bytes, out_bytes, alignment, dense, not plain,
        has_mixup, not rule.whole_tokens, settings.erase_prob > 0, in_place, card,
    )  # fmt: skip
    if not moves:
        tile = tile._replace(PIXELS=0, AHEAD=0)
    grid_h, grid_w = height // patch, width // patch
    mode = MODES[settings.mode]
    drawn_lam = has_drawn_lam(settings)
    rule_group = Rule(
        K=settings.num_classes,
        MODE=mode,
        KIND=rule.kind,
        WHOLE_TOKENS=rule.whole_tokens,
        AS_IN_PAPER=rule.as_in_paper,
        HAS_HEADER=plan.mixes < 1 << 24 or has_mixup or drawn_lam,
        HAS_MIXUP=has_mixup,
        HAS_MINMAX=bool(settings.minmax),
        LAM_WEIGHTS=not (rule.whole_tokens or map_shape or settings.correct_lam or settings.minmax),
        DRAW_EACH=not rule.drawn or mode not in (BATCH, PAIR),
        LABEL_ROWS=label_rows,
        MULTI_LABEL=settings.multi_label,
        CLAMP=settings.clamp_targets,
        ERASE=1 + ERASE_MODES.index(settings.erase_mode) if settings.erase_prob > 0 else 0,
        ERASE_COUNT=triton.next_power_of_2(settings.erase_count[1]) if settings.erase_prob > 0 else 1,
        ERASE_EVIDENCE=settings.erase_prob > 0 and settings.erase_evidence,
        ERASE_SPLITS=settings.erase_splits if settings.erase_prob > 0 else 0,
    )
    maps_group = MapForm(
        MH=map_shape[-2] if map_shape else 1,
        MW=map_shape[-1] if map_shape else 1,
        CLASSES=map_shape[0] if len(map_shape) == 3 else 0,
        VEC=map_vec,
        BOX_STEP=box_step,
        BOX_FORMAT=BOX_FORMATS.index(box_format),
    )
    tables = Tables(
        mixup=device_table(settings.mixup_alpha, device) if has_mixup else None,
        cutmix=device_table(settings.cutmix_alpha, device) if drawn_lam else None,
    )
    options: dict[str, Any] = {
        "num_warps": warps,
        # A contracted multiply-add would round Mixup and the sampling positions differently from the reference.
        "enable_fp_fusion": False,
    }
    if not torch.version.hip:
        # 1,024 threads fit a multiprocessor, and the assembler keeps what it has to keep in registers, not in memory.
        # Masks of many rows beside lines that are not a power of two need more, and so do weights of each class.
        options["maxnreg"] = 64 if words <= 16 or not patch & (patch - 1) else 128
        if label_rows and maps_group.CLASSES:
            options["maxnreg"] = max(80, options["maxnreg"])
    constants = {
        "MASK_RULE": getattr(draw, f"{settings.mask_type}_mask") if rule.whole_tokens else None,
        "GRID": Grid(
            height, width, patch, grid_h, grid_w, word_rows, words, area_bits(grid_h * grid_w), settings.grid_cell
        ),
        "LAYOUT": Layout(channels, sc, sh, sw, oc, oh, ow, nhwc, in_place, card.ptx, interpreted()),
        "TILE": tile,
        "RULE": rule_group,
        "MAPS": maps_group,
    }
    return Fixed(
        tile.PIXELS + 2,
        plan,
        tables,
        normalisation(settings.mean, settings.std, in_bytes == 1, device),
        erasing_of(settings, height, width, device),
        constants,
        options,
    )


def address_alignment(*tensors: Tensor) -> int:
    """A divisor of the first addresses in values, at most 16. Tensors without memory are aligned."""
    alignment = 16
    for tensor in tensors:
        if not tensor.is_meta:
            alignment = gcd(alignment, (tensor.data_ptr() & 255) // tensor.element_size())
    return alignment


def prepare(
    images: Tensor | None,
    out: Tensor | None,
    labels: Tensor | None,
    partner: Tensor | None,
    evidence: Evidence,
    mask: Tensor | None,
    seed: Tensor,
    sample_offset: int,
    settings: Settings,
    results: Results,
    shape: tuple[int, ...],
    device: torch.device,
    card: Card | None = None,
) -> Launch:
    """A launch of `mix_kernel`. Nothing here waits for a device.

    Args:
        images, out: the batch and where the mix goes, `images` itself for in place; None: targets or masks alone.
        labels, partner, evidence, mask: as `tokenmix` takes them.
        seed: 0-d int64, on the CPU or on the device.
        sample_offset: of the batch's first sample.
        results: memory for what is wanted.
        shape: [B, C, H, W] of the images.
        device: of the launch.
        card: what the launch is shaped for, if not the device's.
    """
    maps, boxes = evidence.maps, evidence.boxes
    map_shape: tuple[int, ...] = ()
    map_vec = 1
    if maps is not None:
        map_shape = tuple(maps.shape[1:])
        map_vec = gcd(
            4,
            maps.stride(0),
            0 if evidence.indices is None else evidence.indices.stride(0),
            map_shape[-2] * map_shape[-1],
        )
    strides = out_strides = NO_STRIDES
    in_bytes = out_bytes = alignment = 1
    plain = False
    if images is not None and out is not None:
        strides, out_strides = images.stride(), out.stride()
        in_bytes, out_bytes = images.element_size(), out.element_size()
        plain = images.dtype == out.dtype and not settings.mean
        alignment = address_alignment(images, out)
    fixed = fixed_part(
        shape, strides, out_strides, in_bytes, out_bytes, alignment, images is not None, plain,
        images is not None and images is out, map_shape, map_vec, 0 if boxes is None else boxes.stride(1),
        evidence.box_format, labels is not None and labels.dim() == 2, settings, device,
        card_of(device) if card is None else card,
    )  # fmt: skip
    seed_low, seed_high = halves(seed)
    pointers = EvidencePointers(
        maps,
        evidence.indices,
        evidence.ids,
        boxes,
        evidence.flips,
        evidence.affines,
        0 if maps is None else maps.stride(0),
        0 if evidence.indices is None else evidence.indices.stride(0),
        0 if boxes is None else boxes.stride(0),
        0 if maps is None or evidence.ids is None else maps.shape[0],
        0 if evidence.indices is None else map_shape[0],
    )
    arguments = {
        "images": images,
        "out": out,
        "strides": Strides(strides[0], out_strides[0]),
        "normalisation": fixed.normalisation,
        "pairs": Pairs(labels, 1 if labels is None else labels.stride(0), partner),
        "evidence": pointers,
        "mask": mask,
        "results": results,
        "tables": fixed.tables,
        "plan": fixed.plan,
        "erasing": fixed.erasing,
        "seed": seed_low,
        "seed_high": seed_high,
        "sample_offset": sample_offset,
        "batch": shape[0],
        "smoothing": settings.label_smoothing,
        **fixed.constants,
    }
    return Launch((shape[0] * fixed.programs,), arguments, fixed.options, device)


def mix(
    images: Tensor,
    out: Tensor,
    labels: Tensor,
    partner: Tensor | None,
    evidence: Evidence,
    mask: Tensor | None,
    seed: Tensor,
    sample_offset: int,
    settings: Settings,
    whole: bool = True,
    form: Form | None = None,
) -> Result:
    """Mix a batch into `out`, in place where that is `images`, in one launch.

    `whole` False writes targets alone. `form` is of these arguments, but for `out` on the memory of `images`.
    """
    batch, _, height, width = images.shape
    device = images.device
    targets = torch.empty(batch, settings.num_classes, dtype=torch.float32, device=device)
    weights = mask_out = kind = None
    if whole:
        grid = (height // settings.patch_size, width // settings.patch_size)
        weights = torch.empty(batch, 2, dtype=torch.float32, device=device)
        mask_out = torch.empty(batch, *grid, dtype=torch.float32 if settings.shares else torch.bool, device=device)
        kind = torch.empty(batch, dtype=torch.uint8, device=device)
    results = Results(targets, weights, mask_out, kind)
    given = (images, out, labels, partner, evidence, mask, seed, sample_offset)
    if form is None or form.relaunch is None or not form.relaunch.run(*given, results):
        launch = prepare(*given, settings, results, tuple(images.shape), device)
        compiled = launch.run()
        if form is not None:
            form.relaunch = Relaunch.of(launch, compiled)
    return Result(targets, mask_out, weights, kind)  # type: ignore[arg-type]


def token_mask(batch: int, grid: tuple[int, int], seed: Tensor, sample_offset: int, settings: Settings) -> Tensor:
    """Masks alone, [B, Gh, Gw] bool, on the seed's device."""
    shape = (batch, 1, grid[0] * settings.patch_size, grid[1] * settings.patch_size)
    mask_out = torch.empty(batch, *grid, dtype=torch.bool, device=seed.device)
    results = Results(None, None, mask_out, None)
    prepare(
        None, None, None, None, Evidence(), None, seed, sample_offset, settings, results, shape, seed.device
    ).run()  # fmt: skip
    return mask_out


def pool_targets(evidence: Evidence, labels: Tensor, mask: Tensor, partner: Tensor | None) -> Tensor:
    """Weights alone, [B, 2] fp32 (own, partner), for masks that are already there."""
    classes = labels.shape[1] if labels.dim() == 2 else 1
    settings = Settings(num_classes=classes, patch_size=1, mask_type="given")
    weights = torch.empty(len(mask), 2, dtype=torch.float32, device=mask.device)
    results = Results(None, weights, None, None)
    seed = torch.zeros((), dtype=torch.int64, device="cpu")
    prepare(
        None, None, labels, partner, evidence, mask, seed, 0, settings, results, (len(mask), 1, *mask.shape[1:]),
        mask.device,
    ).run()  # fmt: skip
    return weights
