"""Random erasing in PyTorch and Python integers. Beside `kernels/erasing.py`.

An image's rectangles and noise depend on the seed and on its own place among all samples: both images of a pair are
erased in the same way wherever they appear.
"""

from math import isqrt

import numpy as np
import torch
from torch import Tensor

from ..settings import COPY, MASK_RULES, MIXUP, Settings, erase_bits, make_erase_plan
from ..tables import RATIO_BITS, aspect_table, normal_table
from .draw import CPU, Draw, Rectangle, counting, philox
from .pixels import blend, finish, scales

__all__ = ["draw_rectangles", "erase_pixels"]

ERASE, NOISE, COLOUR = 4, 5, 6  # streams of the random counters
TRIES = 10


def draw_rectangles(
    seed: int, sample_offset: int, batch: int, height: int, width: int, settings: Settings
) -> list[list[Rectangle]]:
    """What is erased of each image, [B] lists of (top, bottom, left, right) in pixels.

    As in `timm.data.random_erasing`: ten tries for each rectangle, the first that is smaller than the image is taken.
    """
    plan = make_erase_plan(settings, height, width)
    bits = erase_bits(height * width)
    half, shift = 1 << (13 + bits // 2), 14 + bits // 2
    aspects = aspect_table(*settings.erase_aspect)
    most = settings.erase_count[1]
    words = philox(seed, (counting(batch) + sample_offset)[:, None], counting(1 + most * TRIES), ERASE).tolist()
    drawn: list[list[Rectangle]] = []
    untouched = batch // settings.erase_splits if settings.erase_splits > 1 else 0
    for i, (first, *tries) in enumerate(words):
        erases = i >= untouched and first[0] >> 8 < plan.erases
        count = plan.low_count + (first[1] * plan.span_count >> 32) if erases else 0
        rectangles = []
        for n in range(count):
            for w0, w1, w2, w3 in tries[n * TRIES : (n + 1) * TRIES]:
                side = isqrt((plan.low + (w0 * plan.span >> 32)) // count)
                factors = aspects[w1 >> (32 - RATIO_BITS)]
                h = (side * (factors & 0xFFFFFFFF) + half) >> shift
                w = (side * (factors >> 32) + half) >> shift
                if h < height and w < width:
                    top, left = w2 * (height + 1 - h) >> 32, w3 * (width + 1 - w) >> 32
                    rectangles.append((top, top + h, left, left + w))
                    break
        drawn.append(rectangles)
    return drawn


def normal(words: Tensor) -> Tensor:
    """Numbers of the standard normal distribution, fp32, for random words of 16 bits. See `tables.normal_table`."""
    return torch.from_numpy(normal_table()).index_select(0, words.flatten()).view(words.shape)


def side_by_side(words: Tensor) -> Tensor:
    """The halves of four words [..., N, 4] as [..., 8 * N], lower halves first."""
    return torch.from_numpy(words.numpy().astype("<u4").view("<u2").astype(np.int64)).flatten(-2)


def noise(
    seed: int, sample: int, rectangles: list[Rectangle], channels: int, width: int, settings: Settings
) -> list[Tensor]:
    """What each rectangle of an image becomes, fp32 [C, h, w].

    A draw has numbers for eight pixels of a line, whose first column is a multiple of eight, or for eight channels.
    """
    home = torch.tensor(sample, dtype=torch.int64, device=CPU)
    filled = []
    for n, (top, bottom, left, right) in enumerate(rectangles):
        h, w = bottom - top, right - left
        if settings.erase_mode == "pixel":
            eights = counting((right + 7) // 8 - left // 8) + left // 8
            pixels = (counting(h) + top)[:, None] * ((width + 7) // 8) + eights  # [h, N]
            places = pixels * channels + counting(channels)[:, None, None]  # [C, h, N]
            words = side_by_side(philox(seed, home, places, NOISE))
            filled.append(normal(words)[..., left % 8 : left % 8 + w])
        elif settings.erase_mode == "const":
            filled.append(torch.zeros(channels, h, w, dtype=torch.float32, device=CPU))
        else:
            groups = (channels + 7) // 8
            colour = normal(side_by_side(philox(seed, home, n * groups + counting(groups), COLOUR))[:channels])
            filled.append(colour[:, None, None].expand(channels, h, w))
    return filled


def from_partner(drawn: Draw, i: int, box: Rectangle, patch: int, settings: Settings) -> Tensor:
    """Which pixels [h, w] of a box sample i takes from its partner."""
    rows, columns = counting(box[1] - box[0]) + box[0], counting(box[3] - box[2]) + box[2]
    if MASK_RULES[settings.mask_type].whole_tokens:
        return drawn.mask[i][(rows // patch)[:, None], columns // patch]
    top, bottom, left, right = drawn.rectangle[i]
    return ((rows >= top) & (rows < bottom))[:, None] & (columns >= left) & (columns < right)


def erase_pixels(
    images: Tensor, out: Tensor, partner: Tensor, drawn: Draw, rectangles: list[list[Rectangle]], seed: int,
    sample_offset: int, settings: Settings,
) -> None:  # fmt: skip
    """Put what erased pixels become into the mixed images `out`, whose pixels are all of `images` so far.

    Pixels that show one image become its noise. Blended ones are blended anew, of noise and of normalised pixels.
    """
    channels, width = images.shape[1], images.shape[3]
    filled = [
        [values.to(out.device, out.dtype) for values in noise(seed, sample_offset + i, own, channels, width, settings)]
        for i, own in enumerate(rectangles)
    ]
    for i, j in enumerate(partner.tolist()):
        if drawn.kind[i] == MIXUP and i != j:
            blend_erased(images, out, i, j, drawn.lam[i], rectangles, filled, settings)
            continue
        alone = drawn.kind[i] == COPY or i == j
        for n in (i,) if alone else (i, j):
            for box, values in zip(rectangles[n], filled[n], strict=True):
                place = out[i, :, box[0] : box[1], box[2] : box[3]]
                if not alone:
                    shown = from_partner(drawn, i, box, settings.patch_size, settings) == (n == j)
                    values = torch.where(shown.to(out.device), values, place)
                place.copy_(values)


def blend_erased(
    images: Tensor, out: Tensor, i: int, j: int, lam: int, rectangles: list[list[Rectangle]],
    filled: list[list[Tensor]], settings: Settings,
) -> None:  # fmt: skip
    """Blend images i and j anew into out[i] where one of them is erased."""
    both = rectangles[i] + rectangles[j]
    if not both:
        return
    tops, bottoms, lefts, rights = zip(*both, strict=True)
    first_row, first_column = min(tops), min(lefts)
    part = (slice(None), slice(first_row, max(bottoms)), slice(first_column, max(rights)))
    of_bytes = images.dtype == torch.uint8
    shift, scale = scales(settings, of_bytes, images.device)
    place = out[i][part]
    gone = torch.zeros(place.shape[1:], dtype=torch.bool, device=out.device)
    wide = torch.float64 if images.dtype == torch.float64 else torch.float32
    pair = []
    for n in (i, j):
        values = torch.empty(place.shape, dtype=wide, device=out.device)
        finish(values, images[n][part], shift, scale, of_bytes)
        for (top, bottom, left, right), fill in zip(rectangles[n], filled[n], strict=True):
            rows, columns = slice(top - first_row, bottom - first_row), slice(left - first_column, right - first_column)
            values[:, rows, columns] = fill.to(wide)
            gone[rows, columns] = True
        pair.append(values)
    mixed = blend(pair[0], pair[1], torch.tensor(lam, dtype=torch.int32, device=out.device))
    place.copy_(torch.where(gone, mixed.to(out.dtype), place))
