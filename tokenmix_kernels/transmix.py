"""Targets from the attention of the model that is being trained: no teacher, no maps, no second forward pass.

TransMix: Chen et al., "TransMix: Attend to Mix for Vision Transformers", CVPR 2022 (arXiv 2111.09833). MixPro: Zhao et
al., "MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision Transformer", ICLR 2023
(arXiv 2304.12043).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import arguments, dispatch
from .attention_inputs import AttentionMix, check_attention, check_attention_values
from .call import named_backend

__all__ = ["attention_targets", "progressive_ratio"]


def attention_targets(
    attention: Tensor,
    mask: Tensor,
    labels: Tensor,
    partner: Tensor | None = None,
    *,
    num_classes: int,
    kind: Tensor | None = None,
    lam: Tensor | None = None,
    ratio: float | Tensor = 0.5,
    smoothing: float = 0.0,
    multi_label: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Soft targets of a mixed batch by the attention that the model pays to the patches of either image.

    With a the class token's attention to the patches of the mixed image and M the share of each patch that is the
    partner's, the own label's weight is

        w_own = ratio * sum((1 - M) a) / sum(a) + (1 - ratio) * mean(1 - M)        w_partner = 1 - w_own

    TransMix has ratio = 0.5; MixPro has `progressive_ratio(logits, targets)`. An image whose attention has no positive
    sum has its share of the area. Targets are w * (1 - eps) at each label and eps / K more at every class. Labels
    [B, K] count times their weight.

    A training step by MixPro, with `mixer = TokenMix(..., return_mix=True)` and `evidence = ClassAttention(model)`::

        images, targets, mix = mixer(images, labels)
        logits = model(images)
        ratio = progressive_ratio(logits, targets)
        targets = attention_targets(evidence.take(), **mix._asdict(), num_classes=K, ratio=ratio)
        loss = criterion(logits, targets)

    Args:
        attention: [B, Gh * Gw] or [B, Gh, Gw] of any float dtype, as `ClassAttention.take` has it.
        mask: [B, Gh, Gw] bool, True = from the partner; or float32, the share of each patch that is the partner's.
        labels: [B] class numbers of any integer dtype or bool, or [B, K] in [0, 1] of these or any float dtype.
        partner: [B] int64 or int32 indices; the batch reversed if not given.
        num_classes: K.
        kind: [B] uint8, how each sample was mixed, as `Mix.kind` has it. Samples that are blended (Mixup) or unmixed
            have no use for the attention: their own label's weight is `lam`.
        lam: [B] float32, given together with kind.
        ratio: share of the attention in the weight, in [0, 1]: one number, or [B] float32, one for each sample.
        smoothing: epsilon.
        multi_label: labels are [B, K], yes or no for each class: eps / 2 more at every class, as for `TokenMix`.
        backend: as for `tokenmix`.

    Returns:
        [B, K] float32, part of no graph. Rows sum to 1, if those of the labels do.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or range, named in one sentence; ranges of tensors
            are checked on a CPU only.
    """
    classes = arguments.as_count("num_classes", num_classes, 1)
    epsilon = arguments.as_number("smoothing", smoothing, 0, 1, "in [0, 1]")
    ratios, number = (ratio, 0.0) if isinstance(ratio, Tensor) else (None, ratio)
    number = arguments.as_number("ratio", number, 0, 1, "a share in [0, 1] or a float32 tensor [B]")
    mix = AttentionMix(attention, mask, kind, lam, ratios, number)
    if not isinstance(multi_label, bool):
        raise ValueError(f"multi_label must be True or False, got {arguments.shown(multi_label)}")
    check_attention(mix, labels, partner, classes, multi_label)
    module = named_backend(backend, labels.device)
    if module is None:
        return dispatch.attention_targets(labels, partner, classes, epsilon, multi_label, *mix)
    if not labels.is_cuda:
        check_attention_values(mix, labels, partner, classes)
    return module.attention_targets(mix, labels, partner, classes, epsilon, multi_label)


def progressive_ratio(logits: Tensor, targets: Tensor) -> Tensor:
    """MixPro's progressive factor: how far the model agrees with the targets by area, which says how far to trust it.

    alpha = cosine similarity of softmax(logits) and the targets, of each sample.

    Args:
        logits: [B, K] of any float dtype; used without their gradient.
        targets: [B, K], the mixed targets by area.

    Returns:
        [B] float32 in [0, 1], part of no graph.

    Raises:
        ValueError: logits and targets of different shapes.
    """
    if logits.dim() != 2 or logits.shape != targets.shape:
        raise ValueError(f"logits and targets must both be [B, K], got {list(logits.shape)} and {list(targets.shape)}")
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        prediction = logits.detach().float().softmax(1)
        return F.cosine_similarity(prediction, targets.detach().float(), dim=1).clamp(0, 1)
