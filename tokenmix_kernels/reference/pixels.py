"""The mixed images in PyTorch. Beside `kernels/pixels.py`."""

from itertools import groupby

import torch
from torch import Tensor

from ..settings import MASK_RULES, MIXUP, Settings
from ..tables import byte_shift
from .draw import Draw, counting

__all__ = ["blend", "finish", "mix_pixels", "mutual", "scales", "swap_pixels"]

TOKENS = -1  # all kinds that take whole tokens, or none
RECTANGLES = tuple(rule.kind for rule in MASK_RULES.values() if not rule.whole_tokens)


def blend(own: Tensor, other: Tensor, lam: Tensor) -> Tensor:
    """lam * own + (1 - lam) * other in fp32 (float64 for such images), each step rounded once.

    `lam` is in units of 2**-16. Raw bytes are blended in integers, exactly.
    """
    if own.dtype == torch.uint8:
        return (lam * own.int() + (65536 - lam) * other.int()).to(torch.float32) * 2.0**-16
    dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
    share = lam.to(dtype) * 2.0**-16
    return share * own.to(dtype) + (1 - share) * other.to(dtype)


def scales(settings: Settings, of_bytes: bool, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """What normalises pixels, shift and scale [C, 1, 1] fp32; None where there is no mean."""
    if not settings.mean:
        return None, None
    mean = torch.tensor(settings.mean, dtype=torch.float32)
    shift = byte_shift(settings.mean, settings.std) if of_bytes else mean
    scale = 1 / torch.tensor(settings.std, dtype=torch.float32)
    return shift.to(device).view(-1, 1, 1), scale.to(device).view(-1, 1, 1)


def finish(out: Tensor, mixed: Tensor, shift: Tensor | None, scale: Tensor | None, of_bytes: bool) -> None:
    """Normalise (where mean is given), round to the dtype of `out`, write.

    Bytes become mixed * scale + shift, rounded once: float64 holds it exactly (see `tables.byte_shift`). Floats become
    (mixed - shift) * scale, each step rounded.
    """
    if shift is not None and scale is not None:
        if of_bytes:
            mixed = mixed.double().mul_(scale).add_(shift).float()
        else:
            dtype = torch.float64 if mixed.dtype == torch.float64 else torch.float32
            mixed = (mixed.to(dtype) - shift) * scale
    elif out.dtype == torch.uint8 and mixed.dtype != torch.uint8:
        mixed = torch.floor(mixed + 0.5)
    out.copy_(mixed)


def token_rows(images: Tensor, patch: int) -> Tensor | None:
    """The pixels as a table with one row for each run of a token's pixels that is contiguous in memory, or None.

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
    own = torch.arange(start, start + len(mask), dtype=torch.int64, device=images.device)
    table = torch.where(mask, partner[:, None, None], own[:, None, None]).to(small) * size  # [b, Gh, Gw]
    inside = torch.arange(size, dtype=small, device=images.device).view(planes, grid_h, patch, grid_w)
    return (table[:, None, :, None, :] + inside).flatten()


def take_rectangles(
    images: Tensor, chunk: slice, partner: Tensor, rectangles: list[tuple[int, int, int, int]]
) -> Tensor:
    """The images of a chunk, each with a rectangle of pixels from its partner."""
    mixed = images[chunk].clone()
    for i, (j, (top, bottom, left, right)) in enumerate(zip(partner.tolist(), rectangles, strict=True)):
        mixed[i, :, top:bottom, left:right] = images[j, :, top:bottom, left:right]
    return mixed


def mix_pixels(images: Tensor, out: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """out[i] = the own image, with tokens, a rectangle or a share of the partner's; normalised where mean is given."""
    batch, patch, device = len(images), settings.patch_size, images.device
    of_bytes = images.dtype == torch.uint8
    shift, scale = scales(settings, of_bytes, device)
    rows = token_rows(images, patch)
    # Rows of `out` are rows of `images` only where both have one layout.
    same = images.dtype == out.dtype and scale is None and images.is_contiguous() == out.is_contiguous()
    direct = token_rows(out, patch) if same else None
    step = max(1, batch // 4) if direct is not None else max(1, batch // 32)
    # A sample that is its own partner is left as it is, in every branch.
    alone = (partner == counting(batch)).tolist()
    kinds = [
        kind if kind in (MIXUP, *RECTANGLES) and not own else TOKENS
        for kind, own in zip(drawn.kind, alone, strict=True)
    ]
    for kind, run in groupby(range(batch), key=lambda i: kinds[i]):
        members = list(run)
        for start in range(members[0], members[-1] + 1, step):
            chunk = slice(start, min(start + step, members[-1] + 1))
            others = partner[chunk].to(device)
            if kind == MIXUP:
                lam = torch.tensor(drawn.lam[chunk], dtype=torch.int32, device=device).view(-1, 1, 1, 1)
                mixed = blend(images[chunk], images[others], lam)
            elif kind in RECTANGLES:
                mixed = take_rectangles(images, chunk, others, drawn.rectangle[chunk])
            elif rows is None:
                pixels = drawn.mask[chunk].to(device).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
                mixed = torch.where(pixels[:, None], images[others], images[chunk])
            else:
                source = source_rows(images, partner[chunk], drawn.mask[chunk], start, patch)
                if direct is not None:
                    size = len(direct) // batch
                    torch.index_select(rows, 0, source, out=direct[start * size : chunk.stop * size])
                    continue
                mixed = torch.empty_like(images[chunk])
                torch.index_select(rows, 0, source, out=token_rows(mixed, patch))
            finish(out[chunk], mixed, shift, scale, of_bytes)


def mutual(partner: Tensor) -> Tensor:
    """The partners [B] of a mix in place; a sample whose partner's partner is another is its own."""
    return torch.where(partner[partner] == counting(len(partner)), partner, counting(len(partner)))


def swap_pixels(images: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """The same in place, a few pairs at a time; partners are those of `mutual`."""
    batch = len(images)
    firsts = torch.nonzero(partner > counting(batch)).flatten()
    if not len(firsts):
        return
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
