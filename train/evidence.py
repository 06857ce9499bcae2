"""Evidence from the model that is being trained: targets by its class token's attention, after the forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmix_kernels import ClassAttention, TokenMix, attention_targets, progressive_ratio

__all__ = ["PROGRESSIVE", "AttentionEvidence"]

PROGRESSIVE = "progressive"


class AttentionEvidence:
    """Mix, run the model, and make targets by its attention to the mixed images, in one call of a training step.

    Targets need the attention, so the forward pass comes first::

        evidence = AttentionEvidence(model, mixer)
        logits, targets = evidence(net, images, labels, seed=seed)
        loss = criterion(logits.float(), targets)

    Args:
        model: the timm model whose attention is read. What is called may be a wrapper of it.
        mixer: with return_mix=True.
        ratio: share of the attention in the weights, TransMix's 0.5, or 'progressive' for MixPro's factor.
        smoothing: epsilon of the targets; the mixer's if not given. MixPro's published code has none.

    Raises:
        TypeError, ValueError: the mixer has not return_mix=True; or as `ClassAttention`.
    """

    def __init__(
        self, model: nn.Module, mixer: TokenMix, ratio: float | str = 0.5, smoothing: float | None = None
    ) -> None:
        if not mixer.return_mix:
            raise ValueError("mixer must be made with return_mix=True, so that targets can be made after the model ran")
        if isinstance(ratio, str) and ratio != PROGRESSIVE:
            raise ValueError(f"ratio must be a share in [0, 1] or {PROGRESSIVE!r}, got {ratio!r}")
        self.attention = ClassAttention(model)
        self.mixer = mixer
        self.ratio = ratio
        self.smoothing = mixer.settings.label_smoothing if smoothing is None else smoothing

    def __call__(
        self, net: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, **mixing: Any
    ) -> tuple[Tensor, Tensor]:
        """The logits of the mixed images, and their targets.

        Args:
            net: the model or its wrapper; autocast is the caller's.
            images: [B, C, H, W].
            labels: [B].
            mixing: further arguments of the mixer, such as seed and sample_offset.

        Returns:
            (logits [B, K], targets [B, K] float32).
        """
        mixed, by_area, mix = self.mixer(images, labels, **mixing)
        logits = net(mixed)
        attention = self.attention.take()
        with torch.autocast(images.device.type, enabled=False):
            ratio = progressive_ratio(logits, by_area) if isinstance(self.ratio, str) else self.ratio
            targets = attention_targets(
                attention, **mix._asdict(), num_classes=by_area.shape[1], ratio=ratio, smoothing=self.smoothing
            )
        return logits, targets

    def describe(self) -> str:
        """One phrase for the head of a run."""
        share = "MixPro's progressive factor" if isinstance(self.ratio, str) else f"a ratio of {self.ratio}"
        return f"the model's own attention ({self.attention.query} query), by {share}"
