"""The mix in pure PyTorch: what the operators compute on a CPU, and what every kernel is compared with.

Functions stand in the order in which the kernels of `kernels.py` take the same steps, under the same names. Random
numbers come from Philox4x32-10 with the seed as key and (sample, sample >> 32, draw, stream) as counter, and every
decision on them is made on integers, so that masks are equal bit for bit on every device.
"""

from functools import lru_cache
from itertools import groupby
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .settings import BATCH, BLOCK, COPY, CUTMIX, GIVEN, MASK_TYPES, MIXUP, MODES, PAIR, RANDOM, Plan, Settings, plan
from .tables import BETA_BITS, RATIO_BITS, beta_table, ratio_table

__all__ = ["Draw", "draw", "mix", "mix_inplace", "pool_targets", "pool_tokens", "targets", "token_mask"]

HEADER, RECTANGLE, TRIES, KEYS = 0, 1, 2, 3  # streams of the random counters
LOW32 = 0xFFFFFFFF
MOST_SAMPLES = 64.0  # of a map along one axis of a token


class Draw(NamedTuple):
    """What was drawn for each sample.

    Attributes:
        kind: [B] of COPY, MIXUP, BLOCK, RANDOM, CUTMIX, GIVEN.
        lam: [B] share kept from the own image in units of 2**-16 (Mixup and CutMix).
        mask: [B, Gh, Gw] bool, the tokens taken from the partner (more than half of a token, for CutMix).
        rectangle: [B] of (top, bottom, left, right) in pixels; (0, 0, 0, 0) for all but CutMix.
    """

    kind: list[int]
    lam: list[int]
    mask: Tensor
    rectangle: list[tuple[int, int, int, int]]


def philox(seed: int, samples: Tensor, draws: Tensor, stream: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words, as int64 [*, 4], for each counter."""
    samples, draws = torch.broadcast_tensors(samples, draws)
    c0, c1, c2 = samples & LOW32, (samples >> 32) & LOW32, draws
    c3 = torch.full_like(c0, stream)
    key0, key1 = seed & LOW32, (seed >> 32) & LOW32
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c2 = (high >> 32 & LOW32) ^ c1 ^ key0, (low >> 32 & LOW32) ^ c3 ^ key1
        c1, c3 = high & LOW32, low & LOW32
        key0, key1 = (key0 + 0x9E3779B9) & LOW32, (key1 + 0xBB67AE85) & LOW32
    return torch.stack([c0, c1, c2, c3], -1)


def partner_of(partner: Tensor | None, batch: int) -> Tensor:
    """The partner of each sample, [B] int64: the batch reversed unless given."""
    if partner is None:
        return torch.arange(batch - 1, -1, -1)
    return partner.to("cpu", torch.int64)


def header(words: list[int], settings: Settings, planned: Plan) -> tuple[int, int, int]:
    """Whether and how a sample is mixed: (kind, lam in 2**-16, tokens to mask)."""
    mixes = words[0] >> 8 < planned.mixes
    switches = words[1] >> 8 < planned.switches
    if not mixes:
        return COPY, 65536, 0
    if not switches:
        return MIXUP, beta(words[2], settings.mixup_alpha), 0
    kind = MASK_TYPES[settings.mask_type]
    lam = planned.lam if planned.lam >= 0 else beta(words[2], settings.cutmix_alpha)
    return kind, lam, planned.tokens


def beta(word: int, alpha: float) -> int:
    """lam ~ Beta(alpha, alpha) in units of 2**-16: the quantile table, read between two entries."""
    table = beta_table(alpha)
    entry, between = word >> (32 - BETA_BITS), word >> (18 - BETA_BITS) & 0x3FFF
    return table[entry] + ((table[entry + 1] - table[entry]) * between >> 14)


def block_mask(
    words: list[list[int]], sample: int, seed: int, tokens: int, grid: tuple[int, int], area_bits: int
) -> int:
    """Rectangles of random area and aspect ratio until `tokens` are masked, as an integer of G bits.

    Tries go in windows of four, all against the tokens that are still to be masked; the first that fits is taken.
    Ten in a row that do not fit end it. `words` holds the Philox words of the first 32 draws.
    """
    grid_h, grid_w = grid
    ratios = ratio_table()
    half, shift = 1 << (13 + area_bits // 2), 14 + area_bits // 2
    smallest, unused = 1 << area_bits, 32 - area_bits
    mask = covered = failed = window = 0
    while covered < tokens and failed < 3:
        remaining = tokens - covered
        first, half_row = 4 * (window // 2), 2 * (window % 2)
        if first == len(words):
            more = torch.arange(len(words), len(words) + 32)
            words = words + philox(seed, torch.tensor(sample), more, TRIES).tolist()
        failed += 1
        for j in range(4 if failed < 3 else 2):
            row = words[first + j]
            size_word, place_word = row[half_row], row[half_row + 1]
            area = smallest + (remaining - 1) * (size_word >> unused)
            factors = ratios[size_word & ((1 << RATIO_BITS) - 1)]
            side = isqrt(area)
            h = (side * (factors & 0xFFFF) + half) >> shift
            w = (side * (factors >> 16) + half) >> shift
            if h < grid_h and w < grid_w:
                top = place_word * (grid_h - h + 1) >> 32
                left = (place_word << 16 & LOW32) * (grid_w - w + 1) >> 32
                rectangle = row_pattern(h, w, grid_w) << (top * grid_w + left)
                new = (mask | rectangle).bit_count() - covered
                if 0 < new <= remaining:
                    mask, covered, failed = mask | rectangle, covered + new, 0
                    break
        window += 1
    return mask


@lru_cache(maxsize=4096)
def row_pattern(h: int, w: int, grid_w: int) -> int:
    """A rectangle of h x w tokens in the grid's first corner, as an integer of bits."""
    return ((1 << h * grid_w) - 1) // ((1 << grid_w) - 1) * ((1 << w) - 1)


def random_mask(words: Tensor, tokens: Tensor, count: int) -> Tensor:
    """The `tokens` [B] tokens with the smallest keys out of `count`, [B, G] bool. `words` [B, >= G] are 32-bit.

    The low bits of a key are the token's index, so that no two are equal.
    """
    low = (1 << (count - 1).bit_length()) - 1
    keys = words[:, :count] & ~low | torch.arange(count)
    return keys.argsort(1).argsort(1) < tokens[:, None]


def cutmix_rectangle(
    words: list[int], lam: int, cuts: tuple[int, int, int, int], height: int, width: int
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) in pixels, as `timm.data.mixup.rand_bbox` and `rand_bbox_minmax` place it."""
    if cuts != (0, 0, 0, 0):
        cut_h = cuts[0] + (words[0] * max(cuts[1] - cuts[0], 1) >> 32)
        cut_w = cuts[2] + (words[1] * max(cuts[3] - cuts[2], 1) >> 32)
        top = words[2] * (height - cut_h + 1) >> 32
        left = words[3] * (width - cut_w + 1) >> 32
        return top, top + cut_h, left, left + cut_w
    cut_h = isqrt((65536 - lam) * height * height) >> 8
    cut_w = isqrt((65536 - lam) * width * width) >> 8
    center_y, center_x = words[0] * height >> 32, words[1] * width >> 32
    top, bottom = max(center_y - cut_h // 2, 0), min(center_y + (cut_h + 1) // 2, height)
    left, right = max(center_x - cut_w // 2, 0), min(center_x + (cut_w + 1) // 2, width)
    return top, bottom, left, right


def draw(
    seed: int, sample_offset: int, partner: Tensor, mask: Tensor | None, height: int, width: int, settings: Settings
) -> Draw:
    """What each sample of the batch gets: kind, lam, mask and rectangle."""
    batch = len(partner)
    patch = settings.patch_size
    grid = (height // patch, width // patch)
    count = grid[0] * grid[1]
    planned = plan(settings, height, width)
    samples = torch.arange(batch)
    if MODES[settings.mode] == BATCH:
        samples.zero_()
    elif MODES[settings.mode] == PAIR:
        samples = torch.minimum(samples, partner)
    units, unit_of = torch.unique(samples, return_inverse=True)
    ids = units + sample_offset

    headers = philox(seed, ids, torch.tensor(0), HEADER).tolist()
    drawn = [header(words, settings, planned) for words in headers]
    if planned.tokens < 0:
        least = settings.minimum_tokens
        drawn = [
            (kind, lam, min(count, ((65536 - lam) * count >> 16) + least))
            if kind in (BLOCK, RANDOM)
            else (kind, lam, 0)
            for kind, lam, _ in drawn
        ]
    kinds = {kind for kind, _, _ in drawn}
    masks = torch.zeros(len(units), count, dtype=torch.bool)
    rectangles = [(0, 0, 0, 0)] * len(units)
    if BLOCK in kinds:
        tries = philox(seed, ids[:, None], torch.arange(32), TRIES).tolist()
        bits = [
            block_mask(tries[u], ids[u].item(), seed, tokens, grid, planned.area_bits) if kind == BLOCK else 0
            for u, (kind, _, tokens) in enumerate(drawn)
        ]
        masks = unpack(bits, count)
    if RANDOM in kinds:
        keys = philox(seed, ids[:, None], torch.arange((count + 3) // 4), KEYS).flatten(1)
        masks = random_mask(keys, torch.tensor([tokens for _, _, tokens in drawn]), count)
    if CUTMIX in kinds:
        corners = philox(seed, ids, torch.tensor(0), RECTANGLE).tolist()
        for u, (kind, lam, _) in enumerate(drawn):
            if kind == CUTMIX:
                rectangles[u] = cutmix_rectangle(corners[u], lam, planned.cuts, height, width)
        masks = torch.stack([2 * coverage(r, grid, patch) > patch * patch for r in rectangles]).flatten(1)
    if GIVEN in kinds:
        assert mask is not None
        # A mask is of a sample, not of a draw.
        mixed = torch.tensor([kind == GIVEN for kind, _, _ in drawn])[unit_of]
        masks, mask_of = mask.cpu().flatten(1) & mixed[:, None], torch.arange(batch)
    else:
        mask_of = unit_of
    order = unit_of.tolist()
    return Draw(
        kind=[drawn[u][0] for u in order],
        lam=[drawn[u][1] for u in order],
        mask=masks[mask_of].view(batch, *grid),
        rectangle=[rectangles[u] for u in order],
    )


def unpack(bits: list[int], count: int) -> Tensor:
    """Integers of `count` bits as bool [len(bits), count]."""
    size = (count + 7) // 8
    raw = bytearray().join(number.to_bytes(size, "little") for number in bits)
    octets = torch.frombuffer(raw, dtype=torch.uint8).view(len(bits), size, 1)
    return (octets >> torch.arange(8, dtype=torch.uint8) & 1).bool().flatten(1)[:, :count]


def coverage(rectangle: tuple[int, int, int, int], grid: tuple[int, int], patch: int) -> Tensor:
    """Pixels of each token inside a rectangle, [Gh, Gw] int64."""
    top, bottom, left, right = rectangle
    rows = torch.arange(grid[0]) * patch
    columns = torch.arange(grid[1]) * patch
    rows = (torch.clamp(rows + patch, max=bottom) - torch.clamp(rows, min=top)).clamp(min=0)
    columns = (torch.clamp(columns + patch, max=right) - torch.clamp(columns, min=left)).clamp(min=0)
    return rows[:, None] * columns


def mix_pixels(images: Tensor, out: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """out[i] = the own image, with tokens, a rectangle or a share of the partner's; normalised where mean is given."""
    batch = len(images)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (settings.mean, settings.std))
    rows = token_rows(images, settings.patch_size)
    # Rows of `out` are rows of `images` only where both lie in memory alike.
    same = images.dtype == out.dtype and not settings.mean and images.is_contiguous() == out.is_contiguous()
    direct = token_rows(out, settings.patch_size) if same else None
    step = max(1, batch // 4) if direct is not None else max(1, batch // 32)
    simple = [RANDOM if kind in (COPY, BLOCK, GIVEN) else kind for kind in drawn.kind]
    for kind, run in groupby(range(batch), key=lambda i: simple[i]):
        run_of = list(run)
        for start in range(run_of[0], run_of[-1] + 1, step):
            chunk = slice(start, min(start + step, run_of[-1] + 1))
            if kind == MIXUP:
                lam = torch.tensor(drawn.lam[chunk]).view(-1, 1, 1, 1)
                mixed = blend(images[chunk], images[partner[chunk].to(images.device)], lam.to(images.device))
            elif kind == CUTMIX:
                mixed = images[chunk].clone()
                for i, j, (top, bottom, left, right) in zip(
                    range(chunk.stop - start), partner[chunk].tolist(), drawn.rectangle[chunk], strict=True
                ):
                    mixed[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
            elif rows is None:
                own, other = images[chunk], images[partner[chunk].to(images.device)]
                pixels = drawn.mask[chunk].to(images.device)
                pixels = pixels.repeat_interleave(settings.patch_size, 1).repeat_interleave(settings.patch_size, 2)
                mixed = torch.where(pixels[:, None], other, own)
            else:
                source = source_rows(images, partner[chunk], drawn.mask[chunk], start, settings.patch_size)
                if direct is not None:
                    size = len(direct) // batch
                    torch.index_select(rows, 0, source, out=direct[start * size : chunk.stop * size])
                    continue
                mixed = torch.empty_like(images[chunk])
                torch.index_select(rows, 0, source, out=token_rows(mixed, settings.patch_size))
            store(out[chunk], mixed, mean.to(out.device), std.to(out.device))


def swap_pixels(images: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """The same in place, a few pairs at a time; the partner's partner must be the own image."""
    firsts = torch.nonzero(partner >= torch.arange(len(partner))).flatten()
    for some in firsts.split(max(1, len(firsts) // 32)):
        members = torch.unique(torch.cat([some, partner[some]]))
        part = Draw(
            kind=[drawn.kind[i] for i in members.tolist()],
            lam=[drawn.lam[i] for i in members.tolist()],
            mask=drawn.mask[members],
            rectangle=[drawn.rectangle[i] for i in members.tolist()],
        )
        before = images[members.to(images.device)]
        after = torch.empty_like(before)
        mix_pixels(before, after, torch.searchsorted(members, partner[members]), part, settings)
        images[members.to(images.device)] = after


def token_rows(images: Tensor, patch: int) -> Tensor | None:
    """The pixels as a table with one row for each run of a token's pixels that lies together in memory, or None.

    [B * C * H * Gw, P] for contiguous images, [B * H * Gw, P * C] for channels_last.
    """
    if images.is_contiguous():
        return images.view(-1, patch)
    if images.is_contiguous(memory_format=torch.channels_last):
        return images.permute(0, 2, 3, 1).view(-1, patch * images.shape[1])
    return None


def source_rows(images: Tensor, partner: Tensor, mask: Tensor, start: int, patch: int) -> Tensor:
    """For each row of `token_rows` of the samples from `start` on, the row of the whole table that it is taken from."""
    grid_h, grid_w = mask.shape[1:]
    planes = images.shape[1] if images.is_contiguous() else 1
    size = planes * grid_h * patch * grid_w
    small = torch.int32 if len(images) * size < 2**31 else torch.int64
    mask, partner = mask.to(images.device), partner.to(images.device)
    own = torch.arange(start, start + len(mask), device=images.device)
    table = torch.where(mask, partner[:, None, None], own[:, None, None]).to(small) * size  # [b, Gh, Gw]
    inside = torch.arange(size, dtype=small, device=images.device).view(planes, grid_h, patch, grid_w)
    return (table[:, None, :, None, :] + inside).flatten()


def blend(own: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """lam * own + (1 - lam) * other in fp32, each step rounded once; raw bytes are blended in integers, exactly."""
    if own.dtype == torch.uint8:
        return (lam * own.int() + (65536 - lam) * other.int()).float() * 2.0**-16
    share = lam.float() * 2.0**-16
    return share * own.float() + (1 - share) * other.float()


def store(out: Tensor, mixed: Tensor, mean: Tensor, std: Tensor) -> None:
    """Normalise (where mean is given), round to the dtype of `out`, write."""
    if len(mean):
        mixed = (mixed.float() - mean) * (1 / std)
    elif out.dtype == torch.uint8 and mixed.dtype != torch.uint8:
        mixed = torch.floor(mixed + 0.5)
    out.copy_(mixed)


def own_maps(maps: Tensor, indices: Tensor | None, labels: Tensor) -> Tensor:
    """The activation map of each image's own label, [B, h, w] fp32; zeros where the label is absent.

    `maps` is [B, h, w] (own label), [B, K, h, w] (all classes), or [B, k, h, w] with class `indices` (top-k; of equal
    indices the last counts).
    """
    if maps.dim() == 3:
        return maps.float()
    if indices is None:
        known = (labels >= 0) & (labels < maps.shape[1])
        chosen = maps[torch.arange(len(maps), device=maps.device), labels.clamp(0, maps.shape[1] - 1)]
        return torch.where(known[:, None, None], chosen.float(), 0.0)
    chosen = torch.zeros(len(maps), *maps.shape[2:])
    for values, classes in zip(maps.unbind(1), indices.unbind(1), strict=True):
        chosen = torch.where(classes == labels[:, None, None], values.float(), chosen)
    return chosen


def resample(low: Tensor, high: Tensor, size: int, grid: int) -> Tensor:
    """Weights [B, grid, size] with which `roi_align` averages a map's axis over the grid's cells.

    `low` and `high` [B] are the box's relative ends on that axis. torchvision's rule with aligned=False and an adaptive
    sampling ratio: box * size - 0.5, at least one map cell long, ceil(extent / grid) samples in each cell.
    """
    extent = torch.clamp((high - low) * size, min=1.0)
    first = low * size - 0.5
    cell = extent / grid
    samples = torch.ceil(cell).nan_to_num(1.0).clamp(max=MOST_SAMPLES)  # [B]
    weights = torch.zeros(len(low), grid, size)
    cells = torch.arange(grid, dtype=torch.float32)
    places = torch.arange(size, dtype=torch.float32)
    for s in range(int(samples.max())):
        at = first[:, None] + (cells + ((s + 0.5) / samples)[:, None]) * cell[:, None]  # [B, grid]
        used = (at >= -1.0) & (at <= size) & (s < samples)[:, None]
        at = torch.clamp(at, 0.0, size - 1.0)
        distance = (at[:, :, None] - places).abs()
        weights += torch.where(used[:, :, None], torch.clamp(1 - distance, min=0.0), 0.0)
    return weights / samples[:, None, None]


def resample_affine(maps: Tensor, affines: Tensor, grid_h: int, grid_w: int) -> Tensor:
    """Maps [B, h, w] averaged over the tokens that affines [B, 2, 3] take into them, by the rule of `resample`.

    Output (u, v) in [0, 1]^2 shows (x, y) = affine (u, v, 1) of the map; a token's side is sampled as often as it is
    map cells long.
    """
    height, width = maps.shape[1:]
    flat = maps.flatten(1)
    (a, b, c), (d, e, f) = (row.unbind(1) for row in affines.unbind(1))
    across = torch.clamp(torch.maximum(a.abs() * width, d.abs() * height), min=1.0) / grid_w
    down = torch.clamp(torch.maximum(b.abs() * width, e.abs() * height), min=1.0) / grid_h
    across, down = (torch.ceil(n).nan_to_num(1.0).clamp(max=MOST_SAMPLES)[:, None, None] for n in (across, down))
    a, b, c, d, e, f = (value[:, None, None] for value in (a, b, c, d, e, f))
    columns = torch.arange(grid_w, dtype=torch.float32)
    rows = torch.arange(grid_h, dtype=torch.float32)[:, None]
    total = torch.zeros(len(maps), grid_h, grid_w)
    for t in range(int(down.max())):
        v = (rows + (t + 0.5) / down) / grid_h
        for s in range(int(across.max())):
            u = (columns + (s + 0.5) / across) / grid_w
            x = (a * u + b * v + c) * width - 0.5  # [B, Gh, Gw]
            y = (d * u + e * v + f) * height - 0.5
            used = (x >= -1.0) & (x <= width) & (y >= -1.0) & (y <= height) & (s < across) & (t < down)
            x, y = x.nan_to_num().clamp(0.0, width - 1.0), y.nan_to_num().clamp(0.0, height - 1.0)
            left, top = x.long(), y.long()
            right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
            x, y = x - left, y - top
            corner = [
                flat.gather(1, (q * width + p).flatten(1)).view_as(total) for q in (top, bottom) for p in (left, right)
            ]
            upper, lower = corner[0] + x * (corner[1] - corner[0]), corner[2] + x * (corner[3] - corner[2])
            total += torch.where(used, upper + y * (lower - upper), 0.0)
    return total / (across * down)


def pool_tokens(
    maps: Tensor,
    indices: Tensor | None,
    labels: Tensor,
    boxes: Tensor | None,
    grid: tuple[int, int],
    box_format: str = "xyxy",
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
) -> Tensor:
    """The activation map of each image's own label on its token grid, [B, Gh, Gw] fp32 on the CPU, not normalised."""
    if ids is not None:
        ids = ids.to(maps.device).long()
        listed = (ids >= 0) & (ids < len(maps))
        ids = torch.where(listed, ids, 0)
        maps, indices = maps[ids], None if indices is None else indices[ids]
    own = own_maps(maps.cpu(), None if indices is None else indices.cpu(), labels)
    if ids is not None:
        own = own * listed.cpu()[:, None, None]
    if affines is not None:
        return resample_affine(own, affines.cpu().float(), *grid)
    low_x, low_y, high_x, high_y = corners(boxes, len(own), box_format)
    rows = resample(low_y, high_y, own.shape[1], grid[0])
    columns = resample(low_x, high_x, own.shape[2], grid[1])
    pooled = rows @ own @ columns.transpose(1, 2)  # [B, Gh, Gw]
    return pooled if flips is None else torch.where(flips.cpu()[:, None, None], pooled.flip(2), pooled)


def pool(
    maps: Tensor,
    indices: Tensor | None,
    labels: Tensor,
    boxes: Tensor | None,
    partner: Tensor,
    taken: Tensor,
    box_format: str,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
) -> Tensor:
    """The share of its evidence that each image of a pair keeps, [B, 2] fp32 (own, partner).

    `taken` [B, Gh, Gw] fp32 is the share of each token that comes from the partner. An image without evidence (its sum
    is not a positive number) gets its share of the area.
    """
    grid = (taken.shape[1], taken.shape[2])
    pooled = pool_tokens(maps, indices, labels, boxes, grid, box_format, ids, flips, affines)
    total = pooled.sum((1, 2))
    kept = torch.stack([pooled * (1 - taken), pooled[partner] * taken], 1).sum((2, 3))  # [B, 2]
    total = torch.stack([total, total[partner]], 1)
    return torch.where((total > 0) & (total < torch.inf), kept / (total + 1e-8), areas(taken))


def areas(taken: Tensor) -> Tensor:
    """The share of the area that each image of a pair has, [B, 2] fp32."""
    count = taken.shape[1] * taken.shape[2]
    moved = taken.sum((1, 2))
    return torch.stack([count - moved, moved], 1) / count


def corners(boxes: Tensor | None, batch: int, box_format: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x0, y0, x1, y1), each [B] fp32, from boxes [B, 4] in one of the formats of `Settings.box_format`."""
    if boxes is None:
        return torch.zeros(batch), torch.zeros(batch), torch.ones(batch), torch.ones(batch)
    a, b, c, d = boxes.cpu().float().unbind(1)
    if box_format == "xyxy":
        return a, b, c, d
    if box_format == "crop":
        return b, a, b + d, a + c
    return a, b, a + c, b + d


def mix_weights(
    maps: Tensor | None,
    indices: Tensor | None,
    labels: Tensor,
    boxes: Tensor | None,
    partner: Tensor,
    drawn: Draw,
    settings: Settings,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
) -> Tensor:
    """Weights [B, 2] (own, partner): lam for Mixup, evidence or area for what was taken token by token."""
    patch = settings.patch_size
    taken = drawn.mask.float()
    for i, kind in enumerate(drawn.kind):
        if kind == CUTMIX:
            taken[i] = coverage(drawn.rectangle[i], (taken.shape[1], taken.shape[2]), patch) / (patch * patch)
    if maps is not None:
        weights = pool(maps, indices, labels, boxes, partner, taken, settings.box_format, ids, flips, affines)
    else:
        weights = areas(taken)
    lam = torch.tensor(drawn.lam) * 2.0**-16
    use_lam = [
        kind in (COPY, MIXUP) or (kind == CUTMIX and maps is None and not settings.correct_lam and not settings.minmax)
        for kind in drawn.kind
    ]
    return torch.where(torch.tensor(use_lam)[:, None], torch.stack([lam, 1 - lam], 1), weights)


def targets(weights: Tensor, labels: Tensor, partner: Tensor, kinds: list[int], settings: Settings) -> Tensor:
    """Dense soft targets [B, K] fp32.

    Token masks: the paper's, w - eps/2 + eps/(2K) for each side, added up. Else timm's, w * (1 - eps) + eps/K.
    """
    classes, smoothing = settings.num_classes, settings.label_smoothing
    tokens = torch.tensor([kind in (BLOCK, RANDOM, GIVEN) for kind in kinds])[:, None]
    raised = torch.where(tokens, weights - smoothing / 2, weights * (1 - smoothing))  # [B, 2]
    pair = torch.stack([labels, labels[partner]], 1)
    known = (pair >= 0) & (pair < classes)
    dense = torch.full((len(labels), classes), smoothing / classes)
    return dense.scatter_add_(1, pair.clamp(0, classes - 1), torch.where(known, raised, 0.0))


def mix(
    images: Tensor,
    labels: Tensor,
    out: Tensor,
    partner: Tensor | None,
    maps: Tensor | None,
    indices: Tensor | None,
    boxes: Tensor | None,
    mask: Tensor | None,
    seed: Tensor,
    sample_offset: int,
    settings: Settings,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix a batch into `out`, which may be `images`, and return (targets [B, K], mask [B, Gh, Gw], weights [B, 2])."""
    device = images.device
    labels = labels.cpu().long()
    pairs = partner_of(partner, len(images))
    drawn = draw(int(seed), sample_offset, pairs, mask, images.shape[2], images.shape[3], settings)
    if out is images:
        swap_pixels(images, pairs, drawn, settings)
    else:
        mix_pixels(images, out, pairs, drawn, settings)
    weights = mix_weights(maps, indices, labels, boxes, pairs, drawn, settings, ids, flips, affines)
    dense = targets(weights, labels, pairs, drawn.kind, settings)
    return dense.to(device), drawn.mask.to(device), weights.to(device)


def mix_inplace(
    images: Tensor,
    labels: Tensor,
    partner: Tensor | None,
    maps: Tensor | None,
    indices: Tensor | None,
    boxes: Tensor | None,
    mask: Tensor | None,
    seed: Tensor,
    sample_offset: int,
    settings: Settings,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mix a batch into itself; the partner's partner must be the own image."""
    return mix(
        images, labels, images, partner, maps, indices, boxes, mask, seed, sample_offset, settings, ids, flips, affines
    )


def token_mask(batch: int, grid: tuple[int, int], seed: Tensor, sample_offset: int, settings: Settings) -> Tensor:
    """Masks alone, [B, Gh, Gw] bool."""
    height, width = (side * settings.patch_size for side in grid)
    return draw(int(seed), sample_offset, partner_of(None, batch), None, height, width, settings).mask


def pool_targets(
    maps: Tensor,
    indices: Tensor | None,
    labels: Tensor,
    mask: Tensor,
    boxes: Tensor | None,
    partner: Tensor | None,
    box_format: str,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
) -> Tensor:
    """Weights alone, [B, 2] fp32 (own, partner), for masks that are already there."""
    pairs = partner_of(partner, len(mask))
    return pool(maps, indices, labels.cpu().long(), boxes, pairs, mask.cpu().float(), box_format, ids, flips, affines)
