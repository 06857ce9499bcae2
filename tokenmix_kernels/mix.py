"""The public face: `TokenMix` for a training loop, `tokenmix` to mix once.

The method is that of Liu et al., "TokenMix: Rethinking Image Mixing for Data Augmentation in Vision Transformers", ECCV
2022 (arXiv 2207.08409), with the Mixup branch (Zhang et al. 2018) and the CutMix rectangles (Yun et al. 2019) of
`timm.data.Mixup`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .call import Maps, crop_format, make_settings, result_dtype, run, unpack_label_maps
from .erasing import RandomErasing
from .inputs import Evidence
from .settings import Settings

__all__ = ["Mix", "Mixed", "TokenMix", "tokenmix"]


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        images: [B, C, H, W].
        targets: [B, num_classes] float32.
        mask: [B, Gh, Gw] bool, True where the token was taken from the partner.
        weights: [B, 2] float32, what is left of the own image and of the partner: shares of evidence or of area.
    """

    images: Tensor
    targets: Tensor
    mask: Tensor
    weights: Tensor


class Mix(NamedTuple):
    """How a batch was mixed: what `attention_targets` takes beside the attention, on the images' device.

    Attributes:
        mask: [B, Gh, Gw] float32, the share of each token that was taken from the partner; 0 where a sample was blended
            or left as it is.
        labels: [B] class numbers of the images themselves, or [B, K] as given.
        partner: [B] indices of the partners, whose labels are labels[partner]; None: the batch reversed.
        kind: [B] uint8, 0: left as it is, 1: blended (Mixup), above: mixed by the mask.
        lam: [B] float32, weight of the own label in the targets, before smoothing.
    """

    mask: Tensor
    labels: Tensor
    partner: Tensor | None
    kind: Tensor
    lam: Tensor


class TokenMix(nn.Module):
    """Mix a batch of images and its labels; in place of `timm.data.Mixup` in a training loop.

    The first ten arguments are those of `timm.data.Mixup`, with DeiT's values as defaults. What timm's CutMix branch is
    there is TokenMix here, or whatever `mask_type` says.

    Args:
        mixup_alpha: lam of the Mixup branch comes from Beta(mixup_alpha, mixup_alpha); 0 switches the branch off.
        cutmix_alpha: above 0, the second branch is on; the Beta of its lam where `lam` is 'beta'.
        cutmix_minmax: (low, high) share of the image's sides for CutMix rectangles, in place of lam (mask_type
            'cutmix').
        prob: probability that a draw mixes at all.
        switch_prob: probability of the second branch where both are on.
        mode: who shares a draw: 'batch' (all), 'pair' (an image and its partner) or 'elem' (nobody).
        correct_lam: CutMix weights follow the area that the image's border leaves of the rectangle, not the drawn lam.
            Token masks always follow what was masked.
        label_smoothing: epsilon of the targets: the paper's for 'block' and 'random', else timm's.
        num_classes: K, classes of the targets.
        multi_label: labels are [B, K], yes or no for each class, smoothed as timm does: y (1 - eps) + eps / 2. Labels
            [B, K] without it are shares of the classes, smoothed towards 1 / K as class numbers are.
        mask_type: the second branch: 'block' (several rectangles of tokens, the paper's), 'random' (single tokens),
            'grid' (square cells of tokens, MixPro's MaskMix with lam='beta') or 'cutmix' (one rectangle of pixels, as
            timm draws it).
        minimum_tokens: tokens that are masked beside the (1 - lam) * G. Not given: G / 14, which is the published
            code's 14 where the grid has 14x14 tokens; none of mask_type 'grid'.
        grid_cell: side of a cell in tokens (mask_type 'grid'). MixPro's DeiT-T and DeiT-S have 4.
        lam: share kept from the own image in the second branch, or 'beta' for Beta(cutmix_alpha, cutmix_alpha).
            timm's CutMix is mask_type='cutmix', lam='beta'.
        patch_size: P, side of a token in pixels; a pair of equal sides, as timm's models have it, is taken too.
        mean, std: normalise (x - mean) / std in the same pass; one value for each channel, in the images' units (for
            uint8, 0 to 255).
        out_dtype: dtype of the mixed images; the images' own if not given, float32 for uint8 with mean and std.
        crop_axes: how the crop in a packed label-map batch is read: 'correct', or 'published' for the published code's,
            which takes top for left.
        clamp_targets: targets are at most 1. Without, a class that both images have may get more: weights by evidence
            need not add up to 1.
        return_mix: give a `Mix` as third result, from which `attention_targets` makes targets after the forward pass.
        erasing: erase rectangles of each image before it is mixed, in the same pass: a `RandomErasing`, or timm's.

    Attributes:
        mixup_enabled: False returns the images unmixed (normalised where mean is given) with smoothed labels, as a
            module in eval mode does, which does not erase either. Settings cannot be changed after they are made: make
            a new TokenMix.

    Raises:
        ValueError: a setting out of range, in one sentence.
        AttributeError: an attribute is set that would change nothing.
    """

    mixup_enabled: bool

    def __init__(
        self,
        mixup_alpha: float = 0.8,
        cutmix_alpha: float = 1.0,
        cutmix_minmax: Sequence[float] | None = None,
        prob: float = 1.0,
        switch_prob: float = 0.5,
        mode: str = "batch",
        correct_lam: bool = True,
        label_smoothing: float = 0.1,
        num_classes: int = 1000,
        multi_label: bool = False,
        *,
        mask_type: str = "block",
        minimum_tokens: int | None = None,
        grid_cell: int = 4,
        lam: float | str = 0.5,
        patch_size: int | tuple[int, int] = 16,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        out_dtype: torch.dtype | None = None,
        crop_axes: str = "correct",
        clamp_targets: bool = False,
        return_mix: bool = False,
        erasing: RandomErasing | None = None,
    ) -> None:
        super().__init__()
        self.settings = make_settings(
            num_classes=num_classes, patch_size=patch_size, mask_type=mask_type, mode=mode, lam=lam,
            minimum_tokens=minimum_tokens, grid_cell=grid_cell, mixup_alpha=mixup_alpha,
            # timm: with minmax the rectangle's size is not a matter of lam, and the branch is always on.
            cutmix_alpha=1.0 if cutmix_minmax is not None else cutmix_alpha, prob=prob, switch_prob=switch_prob,
            minmax=cutmix_minmax, correct_lam=correct_lam, label_smoothing=label_smoothing, mean=mean, std=std,
            multi_label=multi_label, clamp_targets=clamp_targets, erasing=erasing,
        )  # fmt: skip
        self.return_mix = bool(return_mix)
        self.settings = self.settings._replace(shares=self.return_mix)
        self.unmixed = self.settings._replace(prob=0.0)
        self.plain = self.unmixed._replace(erase_prob=0.0)
        self.out_dtype = out_dtype
        self.crop_format = crop_format(crop_axes)
        self.mixup_enabled = True
        result_dtype(torch.uint8, out_dtype, self.settings)
        self._made = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_made" in self.__dict__ and name not in ("mixup_enabled", "training") and not name.startswith("_"):
            fixed = (
                *Settings._fields, "settings", "unmixed", "out_dtype", "crop_format", "mix_prob", "cutmix_minmax",
                "return_mix", "plain", "erasing",
            )  # fmt: skip
            if type(self) is TokenMix or name in fixed:
                raise AttributeError(
                    f"{name} must not be set: it would change nothing. Make a new TokenMix with the setting, or switch "
                    "mixing off by mixup_enabled"
                )
        super().__setattr__(name, value)

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        maps: Maps | None = None,
        boxes: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        flips: Tensor | None = None,
        affines: Tensor | None = None,
        partner: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        sample_offset: int | None = None,
        out: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Mix]:
        """Mix a batch; in eval mode, or where mixup_enabled is False, only normalise it and smooth its labels.

        Arguments, forms of `maps` and errors are those of `tokenmix`.

        Returns:
            (images [B, C, H, W], targets [B, num_classes] float32), and a `Mix` where return_mix is True.
        """
        mixed, result = run(
            images, labels, maps, Evidence(None, None, ids, boxes, flips, affines, self.crop_format), None, partner,
            seed, generator, sample_offset, out, self.out_dtype, backend, self.current(), whole=self.return_mix,
        )  # fmt: skip
        if not self.return_mix:
            return mixed, result.targets
        numbers = unpack_label_maps(labels, None, None)[3].long() if labels.dim() == 5 else labels
        return mixed, result.targets, Mix(result.mask, numbers, partner, result.kind, result.weights[:, 0])

    def current(self) -> Settings:
        """The settings of the next call."""
        if not self.training:
            return self.plain
        return self.settings if self.mixup_enabled else self.unmixed

    def extra_repr(self) -> str:
        hidden = "erase_" if self.settings.erase_prob == 0 else "()"
        shown = {
            name: value for name, value in self.settings._asdict().items() if value != () and hidden not in name
        }  # fmt: skip
        shown["lam"] = "beta" if self.settings.lam < 0 else self.settings.lam
        shown["minimum_tokens"] = None if self.settings.minimum_tokens < 0 else self.settings.minimum_tokens
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def tokenmix(
    images: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    maps: Maps | None = None,
    boxes: Tensor | None = None,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
    mask: Tensor | None = None,
    partner: Tensor | None = None,
    patch_size: int | tuple[int, int] = 16,
    lam: float | str = 0.5,
    minimum_tokens: int | None = None,
    grid_cell: int = 4,
    mask_type: str = "block",
    mode: str = "batch",
    label_smoothing: float = 0.1,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int | None = None,
    cutmix_alpha: float = 1.0,
    cutmix_minmax: Sequence[float] | None = None,
    correct_lam: bool = True,
    multi_label: bool = False,
    clamp_targets: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    crop_axes: str = "correct",
    erasing: RandomErasing | None = None,
    backend: str = "auto",
) -> Mixed:
    """Mix a batch of images token by token, with targets that follow the evidence (TokenMix, eq. 3 to 7).

    out = M ? images[partner] : images. With A_n the activation map of an image's own label, resampled to the token
    grid by the rule of torchvision's `roi_align` (aligned=False, adaptive sampling) and divided by its sum, the weights
    are w_own = sum (1 - M) A_n[own] and w_partner = sum M A_n[partner]. Own label and partner's label get
    w - eps / 2 + eps / K, every other class eps / K; equal labels add up. The weights need not add up to 1: the method
    trains with binary cross-entropy. With mask_type 'cutmix' or
    'grid' targets are timm's, w * (1 - eps) + eps / K.

    Args:
        images: [B, C, H, W] float32, float16, bfloat16, float64 or uint8; H and W multiples of patch_size; contiguous,
            channels_last, or any strides. Never changed unless `out` is `images`. Of a DTensor that is sharded along
            the batch each rank mixes its own shard, and the results are DTensors of the same placements; labels, maps,
            boxes and the like are then placed as images are, or are plain tensors of the rank's shard, and partner
            indices count within it.
        labels: [B] class numbers of any integer dtype or bool, the fast way; or [B, K] of any float or integer dtype or
            bool, in [0, 1]: one-hot, soft, or with multi_label yes or no for each class. Targets are then
            w_own y_own + w_partner y_partner, smoothed. Or a packed label-map batch [B, 3, k, h, w] float32 of
            TokenLabeling and the published TokenMix, which holds values, class numbers, crop and label.
        num_classes: K.
        maps: activation maps: of the own label [B, h, w], of all classes [B, K, h, w], or `TopKMaps`; up to 64x64
            cells. Without maps, or for an image whose map has no positive sum, weights are shares of the area. Beside
            labels [B, K], maps of several classes weigh each class by its own map (a class whose label is 0 costs
            nothing), and the weights that are returned are means by the labels.
        boxes: [B, 4] (x0, y0, x1, y1) in [0, 1]: the part of its map that an image shows. Without, all of it.
        ids: [B] int64 or int32 rows of `maps`, which then holds the maps of more images than the batch's: a whole
            data set's (`MapBank.values`, which may be bytes: a map's scale does not matter).
        flips: [B] bool, images that show their box mirrored from left to right.
        affines: [B, 2, 3] float32, in place of boxes and flips: output (u, v) in [0, 1]^2 shows affine (u, v, 1) of the
            source, as `transforms.Geometry.affine` has it.
        mask: [B, Gh, Gw] bool, True = from the partner; drawn if not given.
        partner: [B] int64 or int32 indices; the batch reversed if not given.
        patch_size, lam, minimum_tokens, grid_cell, mask_type, mode, label_smoothing, cutmix_alpha, cutmix_minmax,
            correct_lam, multi_label, clamp_targets, mean, std, out_dtype, crop_axes, erasing: as for `TokenMix`.
        seed: key of all draws, an integer or a 0-d int64 tensor on the CPU or on the images' device. Drawn from
            torch's CPU generator, or `generator`, if not given. The same seed gives the same masks on every device.
        generator: where a seed that is not given comes from. In a worker of a DataLoader, where all workers have a copy
            of it, the worker's own seed is added.
        sample_offset: global index of the batch's first sample; part of the random counters, so that the parts of a
            batch that is spread over processes draw (mode 'elem') what the whole batch would. Not given: B times the
            rank where torch.distributed is initialised, so that every rank has masks of its own, else 0. A spawned
            worker of a DataLoader does not know its rank: seed by rank there.
        out: where the mixed images go. `images` itself mixes in place; partners must then be mutual.
        backend: 'auto' (kernels on a GPU, else the reference), 'reference', or 'triton' (the kernels, on CPU tensors
            under Triton's interpreter).

    Returns:
        Mixed(images, targets, mask, weights).

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or range, named in one sentence. Ranges of labels,
            partners, ids and boxes are checked on a CPU only, compiled or not. On a GPU, where that would make the host
            wait, a label out of range adds nothing to the targets, and a partner out of range is the image itself.
    """
    settings = make_settings(
        num_classes=num_classes, patch_size=patch_size, mask_type=mask_type, given=mask is not None, mode=mode, lam=lam,
        minimum_tokens=minimum_tokens, grid_cell=grid_cell, mixup_alpha=0.0, cutmix_alpha=cutmix_alpha, prob=1.0,
        switch_prob=1.0, minmax=cutmix_minmax, correct_lam=correct_lam, label_smoothing=label_smoothing, mean=mean,
        std=std, multi_label=multi_label, clamp_targets=clamp_targets, erasing=erasing,
    )  # fmt: skip
    mixed, result = run(
        images, labels, maps, Evidence(None, None, ids, boxes, flips, affines, crop_format(crop_axes)), mask, partner,
        seed, generator, sample_offset, out, out_dtype, backend, settings,
    )  # fmt: skip
    return Mixed(mixed, *result[:3])
