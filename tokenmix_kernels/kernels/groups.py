"""What the kernel's functions take together: named tuples of runtime values, and of constants of one compilation.

Functions take a group whole and read its fields by name. Groups of constants have fields in capitals.
"""

from typing import Any, NamedTuple

import triton.language as tl

from ..settings import BATCH, COPY, ERASE_MODES, MIXUP, PAIR
from ..tables import BETA_BITS, RATIO_BITS, SEGMENT_BITS

__all__ = [
    "CONST", "Draw", "Erased", "Erasing", "EvidencePointers", "Grid", "Layout", "MapForm", "Normalisation", "Pairs",
    "Pixels", "Results", "Rule", "Strides", "Tables", "Tile",
]  # fmt: skip


class Constants(NamedTuple):
    """Global constants. One group, since Triton compares every global that a kernel reads at every launch."""

    # Streams of the random counters.
    HEADER: int = 0
    RECTANGLE: int = 1
    TRIES: int = 2
    KEYS: int = 3
    ERASE: int = 4
    NOISE: int = 5
    COLOUR: int = 6
    COPY: int = COPY
    MIXUP: int = MIXUP
    BATCH: int = BATCH
    PAIR: int = PAIR
    RATIO_BITS: int = RATIO_BITS
    RATIO_MASK: int = (1 << RATIO_BITS) - 1
    BETA_BITS: int = BETA_BITS
    SEGMENT_BITS: int = SEGMENT_BITS
    SHIFTED: int = 1 << 16
    MOST_SAMPLES: float = 64.0  # of a map along one axis of a token
    NONE: int = 0x7FFF0000
    AWAY: int = -64
    UNIT: float = 2.0**-16
    ERASE_TRIES: int = 10
    # 1 + the place in `settings.ERASE_MODES`.
    ERASE_CONST: int = 1 + ERASE_MODES.index("const")
    ERASE_PIXEL: int = 1 + ERASE_MODES.index("pixel")


CONST = tl.constexpr(Constants())


class Pixels(NamedTuple):
    """images and out, their batch strides, shift and scale of `Normalisation`."""

    images: Any
    out: Any
    images_stride: Any
    out_stride: Any
    shift: Any
    scale: Any


class Strides(NamedTuple):
    """Batch strides of images and out."""

    images: Any
    out: Any


class Normalisation(NamedTuple):
    """[C] fp32, or None: floats become (x - shift) * scale with the mean, bytes x * scale + shift with -mean / std."""

    shift: Any
    scale: Any


class Pairs(NamedTuple):
    """labels [B] or [B, K] with their batch stride, partner [B] (or None: the batch reversed)."""

    labels: Any
    labels_stride: Any
    partner: Any


class EvidencePointers(NamedTuple):
    """The tensors of `inputs.Evidence`, their batch strides, rows of the maps, and the k of top-k maps."""

    maps: Any
    indices: Any
    ids: Any
    boxes: Any
    flips: Any
    affines: Any
    maps_stride: Any
    indices_stride: Any
    boxes_stride: Any
    rows: Any
    # A runtime value: the loop over it must not be unrolled into registers.
    top_k: Any


class Tables(NamedTuple):
    """Device tables of `tables.py`: quantiles of lam for Mixup and for the second branch (or None)."""

    mixup: Any
    cutmix: Any


class Results(NamedTuple):
    """targets [B, K], weights [B, 2] fp32; mask [B, GH, GW] bytes or fp32 shares; kind [B] bytes. Each may be None."""

    targets: Any
    weights: Any
    mask: Any
    kind: Any


class Draw(NamedTuple):
    """What was drawn for a sample.

    kind, lam in 2**-16; the mask as words [4, WORDS], each of WORD_ROWS grid rows, the same in all four rows; the
    number of masked tokens; a rectangle in pixels.
    """

    kind: Any
    lam: Any
    mask: Any
    tokens: Any
    top: Any
    bottom: Any
    left: Any
    right: Any


class Erasing(NamedTuple):
    """The tables of `tables.erasing_tables` and the numbers of `settings.ErasePlan`."""

    aspects: Any
    segments: Any
    erases: Any
    low: Any
    span: Any
    low_count: Any
    span_count: Any


class Erased(NamedTuple):
    """What is erased of an image: key and sample of its random numbers, their table, rectangles [ERASE_COUNT]."""

    key: Any
    sample: Any
    segments: Any
    top: Any
    bottom: Any
    left: Any
    right: Any


class Grid(NamedTuple):
    """Image size H x W, patch size P, token grid GH x GW, WORD_ROWS grid rows in each of WORDS words of a mask.

    A grid mask has cells of CELL x CELL tokens.
    """

    H: int
    W: int
    P: int
    GH: int
    GW: int
    WORD_ROWS: int
    WORDS: int
    AREA_BITS: int
    CELL: int


class Layout(NamedTuple):
    """Channels C and the strides of images (S) and out (O) but that of the batch; NHWC: channels are innermost.

    PTX: compiled for an NVIDIA card. INTERPRETED: not compiled at all.
    """

    C: int
    SC: int
    SH: int
    SW: int
    OC: int
    OH: int
    OW: int
    NHWC: bool
    IN_PLACE: bool
    PTX: bool
    INTERPRETED: bool


class Tile(NamedTuple):
    """How a launch is divided. See `launch.launch_shape`."""

    VEC: int
    COLS: int
    LINES: int
    ROWS: int
    PIXELS: int
    PACK: int
    TOGETHER: int
    AHEAD: int
    TARGETS_FIRST: bool


class Rule(NamedTuple):
    """The constants of `Settings`: see `launch.fixed_part`.

    LABEL_ROWS: labels are [B, K]. ERASE: 0, or 1 + the place in `settings.ERASE_MODES`. ERASE_COUNT: a power of 2.
    """

    K: int
    MODE: int
    KIND: int
    WHOLE_TOKENS: bool
    AS_IN_PAPER: bool
    HAS_HEADER: bool
    HAS_MIXUP: bool
    HAS_MINMAX: bool
    LAM_WEIGHTS: bool
    DRAW_EACH: bool
    LABEL_ROWS: bool
    MULTI_LABEL: bool
    CLAMP: bool
    ERASE: int
    ERASE_COUNT: int
    ERASE_EVIDENCE: bool
    ERASE_SPLITS: int


class MapForm(NamedTuple):
    """Maps of MH x MW cells, CLASSES of them (0: of the own label), aligned to VEC values; form of the boxes."""

    MH: int
    MW: int
    CLASSES: int
    VEC: int
    BOX_STEP: int
    BOX_FORMAT: int
