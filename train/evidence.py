"""Evidence from the model that is being trained: targets by its class token's attention, after the forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmix_kernels import ClassAttention, Mix, TokenMix, attention_targets, progressive_ratio

from .mixers import PROGRESSIVE

__all__ = ["AttentionEvidence"]


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
        return logits, self.targets(logits, by_area, mix)

    def targets(self, logits: Tensor, by_area: Tensor, mix: Mix) -> Tensor:
        """The targets of a batch after its forward pass, for steps that mix and run the model themselves.

        Args:
            logits: [B, K] of the mixed images, from the pass whose attention is read.
            by_area: [B, K], the mixer's targets.
            mix: the mixer's third result.

        Returns:
            [B, K] float32, part of no graph.

        Raises:
            RuntimeError: no forward pass of the model since the last call.
        """
        return self.targets_of(self.attention.take(), logits, by_area, mix)

    def targets_of(self, attention: Tensor, logits: Tensor, by_area: Tensor, mix: Mix) -> Tensor:
        """`targets` for an attention [B, N] that was taken already; made where `by_area` is."""
        attention, logits = attention.to(by_area.device), logits.to(by_area.device)
        with torch.autocast(logits.device.type, enabled=False):
            return attention_targets(
                attention,
                **mix._asdict(),
                num_classes=by_area.shape[1],
                ratio=self.shares(logits, by_area),
                smoothing=self.smoothing,
            )

    def shares(self, logits: Tensor, by_area: Tensor) -> float | Tensor:
        """The attention's share in the weights: of all samples, or [B] of each."""
        return progressive_ratio(logits, by_area) if isinstance(self.ratio, str) else self.ratio

    def describe(self) -> str:
        """One phrase for the head of a run."""
        share = "MixPro's progressive factor" if isinstance(self.ratio, str) else f"a ratio of {self.ratio}"
        return f"the model's own attention ({self.attention.query} query), by {share}"
