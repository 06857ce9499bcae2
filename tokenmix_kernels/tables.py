"""Tables made once on the host, so that no result depends on a libm: aspect ratios, Beta quantiles, shifts of bytes.

The first two are integers in fixed point. The reference reads them as lists, the kernels as small device tensors, but
for the ratios, which they compute (`kernels.window.ratio_factors`).
"""

from decimal import Decimal, localcontext
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "BETA_BITS", "RATIO_BITS", "SEGMENT_BITS", "aspect_table", "beta_table", "byte_shift", "device_table",
    "erasing_tables", "normal_segments", "normal_table", "ratio_table",
]  # fmt: skip

RATIO_BITS = 10
BETA_BITS = 12
SEGMENT_BITS = 3


@lru_cache(maxsize=1)
def ratio_table() -> tuple[int, ...]:
    """Square roots of 2**10 aspect ratios, log-uniform in [0.3, 1 / 0.3] (the midpoints of equal slices).

    Each entry packs two 16-bit numbers: ``round(2**14 * sqrt(ratio))`` (height factor) in the low half and
    ``round(2**14 / sqrt(ratio))`` (width factor) in the high half.
    """
    size = 1 << RATIO_BITS
    with localcontext() as context:
        context.prec = 40
        step = (Decimal("0.3").ln() / size).exp()
        root = (Decimal("0.3").ln() * (size - 1) / (2 * size)).exp()
        roots = []
        for _ in range(size):
            roots.append(int((root * (1 << 14)).to_integral_value()))
            root /= step
    return tuple(height | width << 16 for height, width in zip(roots, reversed(roots), strict=True))


@lru_cache(maxsize=32)
def beta_table(alpha: float) -> tuple[int, ...]:
    """Quantiles of Beta(alpha, alpha) at u = i / 2**12, i = 0 ... 2**12, in units of 2**-16.

    The distribution function is integrated on one half of [0, 1] (it is symmetric) and inverted. Below alpha = 1
    the density has a pole at 0, which the substitution s = v**(1 / alpha) removes.
    """
    half = 1 << (BETA_BITS - 1)
    if alpha < 1:
        v = np.linspace(0.0, 0.5**alpha, 2**16 + 1)
        position = v ** (1 / alpha)
        density = (1 - position) ** (alpha - 1)
    else:
        v = np.linspace(0.0, 0.5, 2**16 + 1)
        position = v
        density = (v * (1 - v) * 4) ** (alpha - 1)
    # Simpson's rule on pairs of intervals.
    area = density[:-2:2] + 4 * density[1:-1:2] + density[2::2]
    share = np.concatenate([[0.0], np.cumsum(area)])
    share *= 0.5 / share[-1]
    lower = np.rint(np.interp(np.arange(half + 1) / (2 * half), share, position[::2]) * 65536).astype(np.int64)
    return tuple(np.concatenate([lower, 65536 - lower[-2::-1]]).tolist())


@lru_cache(maxsize=32)
def aspect_table(low: float, high: float) -> tuple[int, ...]:
    """Square roots of 2**10 aspect ratios, log-uniform in [low, high], in units of 2**-14.

    As in `ratio_table`, but each entry packs two 32-bit numbers: no range is too wide.
    """
    size = 1 << RATIO_BITS
    with localcontext() as context:
        context.prec = 40
        first, last = Decimal(low).ln(), Decimal(high).ln()
        step = ((last - first) / (2 * size)).exp()
        root = ((first + (last - first) / (2 * size)) / 2).exp()
        entries = []
        for _ in range(size):
            height, width = (int((side * (1 << 14)).to_integral_value()) for side in (root, 1 / root))
            entries.append(height | width << 32)
            root *= step
    return tuple(entries)


@lru_cache(maxsize=1)
def normal_segments() -> tuple[int, ...]:
    """Upper quantiles z of the standard normal distribution at 2**-17 n, in segments of n in [1, 2**16].

    Each octave of n has 2**SEGMENT_BITS of them. An entry packs z where its segment starts, in the low 19 bits, and
    what it falls up to the next one, in units of 2**-16. No z is so near the middle of two units that a mathematical
    library could turn it.
    """
    normal, each = NormalDist(), 1 << SEGMENT_BITS
    starts = [(1 << octave) * (1 + n / each) for octave in range(16) for n in range(each)]
    heights = [round(-normal.inv_cdf(start * 2.0**-17) * (1 << 16)) for start in starts]
    return tuple(high | (high - low) << 19 for high, low in zip(heights, [*heights[1:], 0], strict=True))


@lru_cache(maxsize=1)
def normal_table() -> NDArray[np.float32]:
    """The normal number of each 16-bit random word, [2**16] fp32: what `kernels.erasing.normal` computes.

    The lowest bit is the sign. The word with that bit set is n, an odd number: its number is read from the segment it
    is on. Mean 0, variance 1.0004, kurtosis 2.998, none above 4.33.
    """
    word = np.arange(1 << 16, dtype=np.int64)
    bits = (word | 1).astype(np.float32).view(np.int32)
    segment = np.array(normal_segments(), np.int64)[(bits >> (23 - SEGMENT_BITS)) - (127 << SEGMENT_BITS)]
    number = (segment & 0x7FFFF) - ((segment >> 19) * ((bits >> 8) & 0xFFF) >> 12)
    return (np.where(word & 1, -number, number) * 2.0**-16).astype(np.float32)


@lru_cache(maxsize=64)
def erasing_tables(aspect: tuple[float, float], device: torch.device) -> tuple[Tensor, Tensor]:
    """`aspect_table`, int64, and `normal_segments`, int32, on a device, made once."""
    segments = torch.tensor(normal_segments(), dtype=torch.int64).to(torch.int32)
    return torch.tensor(aspect_table(*aspect), dtype=torch.int64, device=device), segments.to(device)


@lru_cache(maxsize=64)
def device_table(alpha: float, device: torch.device) -> Tensor:
    """`beta_table` as an int32 tensor on a device, made once per device."""
    return torch.tensor(beta_table(alpha), dtype=torch.int32, device=device)


def byte_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """What is added to bytes after the multiplication by 1 / std: -mean / std, [C] fp32.

    Both are fp32, and byte * (1 / std) + shift is rounded once: a fused multiply-add. The sum in float64 is exact, and
    rounding it to fp32 gives the same number. A byte, or a mixture of two in units of 2**-16, is an integer below 2**24
    times 2**-16; with 1 / std in [2**e, 2**(e + 1)) all products are multiples of 2**(e - 39) below 2**(e + 9). The
    shift is made a multiple of 2**(e - 43), so that up to |mean| = 2**8 the sum has at most 53 bits.
    """
    scale = (1 / torch.tensor(std, dtype=torch.float32, device="cpu")).double()
    unit = torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 44)
    return (torch.round(-torch.tensor(mean, dtype=torch.float32, device="cpu").double() * scale / unit) * unit).float()
