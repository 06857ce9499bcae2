"""The mixed images in PyTorch. Beside `kernels/pixels.py`.

A few images at a time, each beside its partner, so that what is read again and all temporaries lie in the cache.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..memory import empty_images
from ..settings import COPY, MASK_RULES, MIXUP, Settings
from ..tables import byte_shift
from .draw import CPU, Draw, counting
from .lines import AT_ONCE, Lines, is_large, parts
from .small import fits, mix_small

__all__ = ["blend", "finish", "mix_pixels", "mutual", "scales", "swap_pixels"]

RECTANGLES = tuple(rule.kind for rule in MASK_RULES.values() if not rule.whole_tokens)


def blend(
    own: Tensor, other: Tensor, lam: Tensor | int, out: Tensor | None = None, spare: Tensor | None = None
) -> Tensor:
    """lam * own + (1 - lam) * other in fp32 (float64 for such images), each step rounded once.

    `lam` is in units of 2**-16. Raw bytes are blended in integers, exactly. Into `out` where that is given, which may
    be one of both; `spare` is written, too.
    """
    if own.dtype == torch.uint8:
        mixed = (lam * own.int() + (65536 - lam) * other.int()).to(torch.float32)
        return torch.mul(mixed, 2.0**-16, out=mixed if out is None else out)
    dtype = torch.float64 if own.dtype == torch.float64 else torch.float32
    share = lam * 2.0**-16 if isinstance(lam, int) else lam.to(dtype) * 2.0**-16
    both = (own, share), (other, 1 - share)
    (first, its_share), (second, rest) = both[::-1] if other is out else both
    mixed = torch.mul(first.to(dtype), its_share, out=out)
    return mixed.add_(torch.mul(second.to(dtype), rest, out=spare))


def scales(settings: Settings, of_bytes: bool, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """What normalises pixels, shift and scale [C, 1, 1] fp32; None where there is no mean."""
    if not settings.mean:
        return None, None
    mean = torch.tensor(settings.mean, dtype=torch.float32, device=CPU)
    shift = byte_shift(settings.mean, settings.std) if of_bytes else mean
    scale = 1 / torch.tensor(settings.std, dtype=torch.float32, device=CPU)
    return shift.to(device).view(-1, 1, 1), scale.to(device).view(-1, 1, 1)


def finish(out: Tensor, mixed: Tensor, shift: Tensor | None, scale: Tensor | None, of_bytes: bool) -> None:
    """Normalise (where mean is given), round to the dtype of `out`, write. `mixed` may be `out`.

    Bytes become mixed * scale + shift, rounded once: float64 holds it exactly (see `tables.byte_shift`). Floats become
    (mixed - shift) * scale, each step rounded.
    """
    if shift is not None and scale is not None:
        if of_bytes:
            mixed = mixed.double().mul_(scale).add_(shift).float()
        else:
            dtype = torch.float64 if mixed.dtype == torch.float64 else torch.float32
            mixed = (mixed.to(dtype) - shift).mul_(scale)
    elif out.dtype == torch.uint8 and mixed.dtype != torch.uint8:
        mixed = torch.floor(mixed + 0.5)
    if mixed is not out:
        out.copy_(mixed)


def gather(images: Tensor, rows: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The images of these rows, into `out` where that is given; all of them as they lie where `rows` is None."""
    return images if rows is None else torch.index_select(images, 0, rows, out=out)


def pairs_and_kinds(partner: Tensor, drawn: Draw) -> tuple[list[int], list[int]]:
    """Each sample's partner and kind. A sample that is its own partner is left as it is, in every branch."""
    pairs = partner.tolist()
    return pairs, [COPY if i == j else kind for i, (j, kind) in enumerate(zip(pairs, drawn.kind, strict=True))]


class Mixer:
    """Mixes parts of a batch: samples of one kind, their partners and their results as they are given."""

    def __init__(
        self, images: Tensor, out: Tensor, pairs: list[int], kinds: list[int], drawn: Draw, settings: Settings
    ) -> None:
        self.drawn, self.device, self.of_bytes = drawn, images.device, images.dtype == torch.uint8
        self.shift, self.scale = scales(settings, self.of_bytes, self.device)
        self.wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        self.whole = images.dtype == out.dtype and self.scale is None
        self.pairs, self.kinds = pairs, kinds
        self.lines = Lines(settings.patch_size, *((images, out) if self.whole else (images,)))
        # One mask for all is made once.
        self.one_mask = settings.mode == "batch" and MASK_RULES[settings.mask_type].drawn
        self.taken: Tensor | None = None
        self.spare: Tensor | None = None

    def alike(self, images: Tensor) -> bool:
        """Whether all are large, take the same pixels and are written as they are, so that `Views` serve."""
        moves = self.drawn.kind[0] not in (COPY, MIXUP)
        return moves and self.whole and self.one_mask and is_large(images)

    def finish(self, out: Tensor, mixed: Tensor) -> None:
        finish(out, mixed, self.shift, self.scale, self.of_bytes)

    def mix(self, first: int, last: int, own: Tensor, images: Tensor, rows: Tensor | None, out: Tensor) -> None:
        """Mix samples from `first` up to `last` with the `rows` of images (None: with all); `out` may be `own`."""
        kind = self.kinds[first]
        if kind == COPY:
            self.finish(out, own)
        elif kind == MIXUP:
            lams = self.drawn.lam[first:last]
            lam: Tensor | int = lams[0]
            if len(set(lams)) > 1:
                lam = torch.tensor(lams, dtype=torch.int32, device=self.device).view(-1, 1, 1, 1)
            direct = out.dtype == own.dtype == self.wide
            if direct and (self.spare is None or self.spare.shape != own.shape):
                self.spare = empty_images(own, own.dtype)
            other = gather(images, rows, out if direct else None)
            spare = self.spare if direct else None
            self.finish(out, blend(own, other, lam, out if out.dtype == self.wide else None, spare))
        elif kind in RECTANGLES:
            self.rectangles(first, last, own, images, rows, out)
        else:
            if self.taken is None or not self.one_mask:
                self.taken = self.lines.taken(self.drawn.mask[first : first + 1 if self.one_mask else last])
            mixed = out if self.whole else torch.empty_like(own)
            other = gather(images, rows, mixed)
            self.lines.select(self.taken, own, other, mixed)
            self.finish(out, mixed)

    def rectangles(self, first: int, last: int, own: Tensor, images: Tensor, rows: Tensor | None, out: Tensor) -> None:
        """`mix` for samples that take a rectangle each."""
        boxes = self.drawn.rectangle[first:last]
        if rows is None and self.whole and own is not out:
            inside = self.lines.inside(boxes[0], own.shape[2], own.shape[3])
            if inside is not None:
                self.lines.select(inside.words, own, images, out)
                for place in self.lines.beside(inside, boxes[0]):
                    self.lines.values(out)[place] = self.lines.values(images)[place]
                return
        self.finish(out, own)
        for (top, bottom, left, right), same in groupby(range(last - first), boxes.__getitem__):
            members = list(same)
            some, box = slice(members[0], members[-1] + 1), (..., slice(top, bottom), slice(left, right))
            other = gather(images[box], rows if rows is None else rows[some])
            self.finish(out[some][box], other)


def mix_pixels(images: Tensor, out: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """out[i] = the own image, with tokens, a rectangle or a share of the partner's; normalised where mean is given."""
    pairs, kinds = pairs_and_kinds(partner, drawn)
    if fits(images, out, kinds, settings):
        mix_small(images, out, pairs, kinds, drawn, settings)
        return
    mixer = Mixer(images, out, pairs, kinds, drawn, settings)
    if mixer.alike(images):
        views = Views(mixer, images, out)
        for i, _ in parts(mixer.kinds, mixer.pairs, images.numel() // images.shape[0]):
            views.mix(i, views.own, mixer.pairs[i])
        return
    for first, last in parts(mixer.kinds, mixer.pairs, images.numel() // images.shape[0]):
        own, mixed = images[first:last], out[first:last]
        # One image is read where it lies; several are gathered, which are small.
        if last - first == 1:
            j = mixer.pairs[first]
            mixer.mix(first, last, own, images[j : j + 1], None, mixed)
        else:
            mixer.mix(first, last, own, images, partner[first:last].to(images.device), mixed)


class Views:
    """The views of large images that all have one draw, made at once: of words for tokens, of the rectangle."""

    def __init__(self, mixer: Mixer, images: Tensor, out: Tensor) -> None:
        self.pairs, lines, drawn = mixer.pairs, mixer.lines, mixer.drawn
        self.whole, self.whole_out = images, out
        self.mask: Tensor | None = None
        self.beside: list[tuple[Any, Any]] = []
        if drawn.kind[0] not in RECTANGLES:
            self.mask = lines.taken(drawn.mask[:1])
        else:
            top, bottom, left, right = drawn.rectangle[0]
            # In place, nothing but the rectangle is touched.
            inside = None if images is out else lines.inside(drawn.rectangle[0], images.shape[2], images.shape[3])
            if inside is None:
                box = (..., slice(top, bottom), slice(left, right))
                images, out = images[box], out[box]
            else:
                self.mask = inside.words
                for place in lines.beside(inside, drawn.rectangle[0]):
                    edge = lines.values(images)[place], lines.values(out)[place]
                    # A view of NumPy's is made in a tenth of the time.
                    self.beside.append((edge[0].numpy(), edge[1].numpy()) if images.is_cpu else edge)
        if self.mask is not None and lines.word:
            images, out = lines.words(images), lines.words(out)
        self.own, self.out = images.split(1), out.split(1)

    def mix(self, i: int, others: Sequence[Tensor], j: int) -> None:
        """Mix sample i with others[j] into `out`, which may be the images."""
        alone = self.pairs[i] == i
        if (alone or self.mask is None) and self.whole is not self.whole_out:
            self.whole_out[i].copy_(self.whole[i])
        if alone:
            return
        if self.mask is None:
            self.out[i].copy_(others[j])
        else:
            torch.where(self.mask, others[j], self.own[i], out=self.out[i])
        for own, out in self.beside:
            out[i][...] = own[j]


def mutual(partner: Tensor) -> Tensor:
    """The partners [B] of a mix in place; a sample whose partner's partner is another is its own."""
    return torch.where(partner[partner] == counting(len(partner)), partner, counting(len(partner)))


def swap_pixels(images: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """The same in place; partners are those of `mutual`."""
    if not is_large(images):
        swap_small(images, partner, drawn, settings)
        return
    mixer = Mixer(images, images, *pairs_and_kinds(partner, drawn), drawn, settings)
    if mixer.alike(images):
        views = Views(mixer, images, images)
        spare = torch.empty_like(views.own[0])
        for i, j in enumerate(mixer.pairs):
            if i < j:
                spare.copy_(views.own[i])
                views.mix(i, views.own, j)
                views.mix(j, (spare,), 0)
        return
    before = torch.empty_like(images[:1])
    for i, j in enumerate(mixer.pairs):
        if i < j:
            own, other = images[i : i + 1], images[j : j + 1]
            before.copy_(own)
            mixer.mix(i, i + 1, own, other, None, own)
            mixer.mix(j, j + 1, other, before, None, other)


def swap_small(images: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """`swap_pixels` for small images, several pairs at a time."""
    if images.numel() <= AT_ONCE:
        mix_pixels(images.clone(), images, partner, drawn, settings)
        return
    firsts = torch.nonzero(partner > counting(len(images))).flatten()
    if not len(firsts):
        return
    for some in firsts.split(max(1, AT_ONCE // (2 * images[0].numel()))):
        members = torch.cat([some, partner[some]])
        order = members.tolist()
        part = Draw(
            kind=[drawn.kind[i] for i in order],
            lam=[drawn.lam[i] for i in order],
            mask=drawn.mask[members],
            tokens=[drawn.tokens[i] for i in order],
            rectangle=[drawn.rectangle[i] for i in order],
        )
        before = images[members.to(images.device)]
        after = torch.empty_like(before)
        mix_pixels(before, after, counting(len(order)).roll(len(some)), part, settings)
        images[members.to(images.device)] = after
