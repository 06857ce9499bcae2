"""The mixed images in PyTorch. Beside `kernels/pixels.py`.

A few images at a time, each beside its partner, so that what is read again and all temporaries lie in the cache.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from math import gcd

import torch
from torch import Tensor

from ..memory import empty_images
from ..settings import COPY, MASK_RULES, MIXUP, Settings
from ..tables import byte_shift
from .draw import CPU, Draw, counting

__all__ = ["blend", "finish", "mix_pixels", "mutual", "scales", "swap_pixels"]

RECTANGLES = tuple(rule.kind for rule in MASK_RULES.values() if not rule.whole_tokens)
AT_ONCE = 1 << 17  # values of the images that are mixed at a time, unless one image has more
# Types by the bytes of a word, to copy whole words whatever they hold.
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


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


def is_large(images: Tensor) -> bool:
    """Whether the images are mixed one at a time."""
    return 2 * images.numel() > AT_ONCE * images.shape[0]


def gather(images: Tensor, rows: Tensor | None, out: Tensor | None = None) -> Tensor:
    """The images of these rows, into `out` where that is given; all of them as they lie where `rows` is None."""
    return images if rows is None else torch.index_select(images, 0, rows, out=out)


class Tokens:
    """How the tokens of images lie in memory, so that whole words of them are copied.

    Attributes:
        planes: channels are apart, so that lines [H, W] are a view of each; False: a line holds all channels.
        word: bytes of a word, which lies within one token; 0 where the images have other strides.
    """

    def __init__(self, patch: int, *tensors: Tensor) -> None:
        first = tensors[0]
        self.patch, self.item, self.device = patch, first.element_size(), first.device
        self.planes = all(one.is_contiguous() for one in tensors)
        self.word, self.run = 0, patch * self.item * (1 if self.planes else first.shape[1])
        if self.planes or all(one.is_contiguous(memory_format=torch.channels_last) for one in tensors):
            places = [place for one in tensors for place in (one.data_ptr(), one.storage_offset() * self.item)]
            self.word = gcd(self.run, 16 if first.device.type == "cpu" else 8, *places)

    def words(self, images: Tensor) -> Tensor:
        """The images [n, C, H, W] as words [n, C, H, *], or [n, 1, H, *] where channels are innermost."""
        # In one line first: axes of one element may have any strides.
        channels, height = (images.shape[1] if self.planes else 1), images.shape[2]
        line = (images if self.planes else images.permute(0, 2, 3, 1)).reshape(-1)
        return line.view(WORDS[self.word]).view(images.shape[0], channels, height, -1)

    def pixels(self, mask: Tensor) -> Tensor:
        """A mask of tokens [n, Gh, Gw] on the CPU as one of words [n, 1, H, *] (of pixels, for other strides)."""
        run = self.run // self.word if self.word else self.patch
        each = mask.numpy().repeat(run, 2).repeat(self.patch, 1)
        return torch.from_numpy(each[:, None]).to(self.device)

    def select(self, mask: Tensor, own: Tensor, other: Tensor, out: Tensor) -> None:
        """out = mask ? other : own, for a mask of `pixels`."""
        if self.word:
            same, own, out = other is out, self.words(own), self.words(out)
            other = out if same else self.words(other)
        torch.where(mask, other, own, out=out)


class Mixer:
    """Mixes parts of a batch: samples of one kind, their partners and their results as they are given."""

    def __init__(self, images: Tensor, out: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
        self.drawn, self.device, self.of_bytes = drawn, images.device, images.dtype == torch.uint8
        self.shift, self.scale = scales(settings, self.of_bytes, self.device)
        self.wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        self.whole = images.dtype == out.dtype and self.scale is None
        self.pairs = partner.tolist()
        # A sample that is its own partner is left as it is, in every branch.
        self.kinds = [COPY if i == j else kind for i, (j, kind) in enumerate(zip(self.pairs, drawn.kind, strict=True))]
        self.tokens = Tokens(settings.patch_size, *((images, out) if self.whole else (images,)))
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
            self.finish(out, own)
            for (top, bottom, left, right), same in groupby(
                range(last - first), self.drawn.rectangle[first:last].__getitem__
            ):
                members = list(same)
                some, inside = slice(members[0], members[-1] + 1), (..., slice(top, bottom), slice(left, right))
                other = gather(images[inside], rows if rows is None else rows[some])
                self.finish(out[some][inside], other)
        else:
            if self.taken is None or not self.one_mask:
                self.taken = self.tokens.pixels(self.drawn.mask[first : first + 1 if self.one_mask else last])
            mixed = out if self.whole else torch.empty_like(own)
            other = gather(images, rows, mixed)
            self.tokens.select(self.taken, own, other, mixed)
            self.finish(out, mixed)


def mix_pixels(images: Tensor, out: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """out[i] = the own image, with tokens, a rectangle or a share of the partner's; normalised where mean is given."""
    mixer = Mixer(images, out, partner, drawn, settings)
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
        self.rectangle = mixer.drawn.kind[0] in RECTANGLES
        self.pairs = mixer.pairs
        self.whole, self.whole_out = images.split(1), out.split(1)
        if self.rectangle:
            top, bottom, left, right = mixer.drawn.rectangle[0]
            inside = (..., slice(top, bottom), slice(left, right))
            images, out = images[inside], out[inside]
        else:
            self.mask = mixer.tokens.pixels(mixer.drawn.mask[:1])
            if mixer.tokens.word:
                images, out = mixer.tokens.words(images), mixer.tokens.words(out)
        self.own, self.out = images.split(1), out.split(1)

    def mix(self, i: int, others: Sequence[Tensor], j: int) -> None:
        """Mix sample i with others[j] into `out`, which may be the images."""
        alone = self.pairs[i] == i
        if (alone or self.rectangle) and self.whole_out[i].data_ptr() != self.whole[i].data_ptr():
            self.whole_out[i].copy_(self.whole[i])
        if alone:
            return
        if self.rectangle:
            self.out[i].copy_(others[j])
        else:
            torch.where(self.mask, others[j], self.own[i], out=self.out[i])


def parts(kinds: list[int], pairs: list[int], size: int) -> Iterator[tuple[int, int]]:
    """Samples (first, last + 1) of one kind that are mixed at a time, for images of `size` values.

    Small images are taken several at a time. A large one is followed by its partner, which is in the cache by then.
    """
    if 2 * size > AT_ONCE:
        todo = dict.fromkeys(j for pair in enumerate(pairs) for j in pair)
        yield from ((i, i + 1) for i in todo)
        return
    step = AT_ONCE // size
    for _, run in groupby(range(len(kinds)), key=kinds.__getitem__):
        members = list(run)
        for first in range(members[0], members[-1] + 1, step):
            yield first, min(first + step, members[-1] + 1)


def mutual(partner: Tensor) -> Tensor:
    """The partners [B] of a mix in place; a sample whose partner's partner is another is its own."""
    return torch.where(partner[partner] == counting(len(partner)), partner, counting(len(partner)))


def swap_pixels(images: Tensor, partner: Tensor, drawn: Draw, settings: Settings) -> None:
    """The same in place; partners are those of `mutual`."""
    if not is_large(images):
        swap_small(images, partner, drawn, settings)
        return
    mixer = Mixer(images, images, partner, drawn, settings)
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
            rectangle=[drawn.rectangle[i] for i in order],
        )
        before = images[members.to(images.device)]
        after = torch.empty_like(before)
        mix_pixels(before, after, counting(len(order)).roll(len(some)), part, settings)
        images[members.to(images.device)] = after
