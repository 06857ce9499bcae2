"""Class activation maps of the given labels only, from timm classifiers.

TokenMix (Liu et al., ECCV 2022, arXiv 2207.08409) weighs the two labels of a mixed image by the activation that a
teacher finds in the tokens each image contributes. Only the map of an image's own label is ever used, so only that one
is computed: one dot product per position, [B, h, w], and never the maps of all K classes.

With an average-pooled linear head the class activation map (Zhou et al., CVPR 2016, arXiv 1512.04150) is exact: with
features F [C, h, w], pooled vector p = mean F and logit_l = W_l . p + b_l, the map
``raw(y, x) = W_l . F[:, y, x] + b_l`` has the mean logit_l. A LayerNorm between pooling and classifier (ConvNeXt,
average-pooled ViTs) keeps this property when every position is normalised with the statistics of the pooled vector:
with gain g, shift s and u = W_l * g, ``raw(y, x) = (u - mean(u)) . F[:, y, x] / sqrt(var(p) + eps) + W_l . s + b_l``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..arguments import as_numbers
from .weights import load_teacher, weights_of

__all__ = ["ActivationTeacher", "load_teacher", "weights_of"]

METHODS = ("auto", "cam", "tokens", "attention")


@contextmanager
def plain_arithmetic(device: torch.device, bf16: bool = False) -> Iterator[None]:
    """Compute in the dtype of the operands, or in bf16, whatever autocast and matmul precision the caller has set."""
    known: Any = torch.backends
    backends = {
        "cpu": (known.mkldnn.matmul, known.mkldnn.conv),
        "cuda": (known.cuda.matmul, known.cudnn.conv),
    }.get(device.type, ())
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class ActivationTeacher(nn.Module):
    """A frozen classifier that gives the activation map of each image's own label.

    The model is put in eval mode and stays in it, its parameters stop requiring gradients, and nothing is recorded for
    autograd. On a GPU the model runs under bf16 autocast, on a CPU in the dtype of its parameters; maps are float32.
    Autocast, default dtype, default device and float32 matmul precision of the caller have no influence.

    Args:
        model: a timm classifier (``forward_features``, ``forward_head``, ``get_classifier``) whose head is
            average pooling, at most one LayerNorm and one linear layer (ResNet, RegNet, EfficientNet,
            ConvNeXt, Swin, average-pooled ViT), or a ViT with a class token.
        method: ``'cam'`` the exact class activation map described above; ``'tokens'`` the patch tokens
            through the ViT's head, the same thing as ``'cam'`` where the ViT pools by averaging;
            ``'attention'`` the last block's attention of the class token to the patch tokens, mean over
            heads (as TransMix, arXiv 2111.09833, does; it does not depend on the label); ``'auto'``
            takes ``'cam'``, for a ViT that averages ``'tokens'``, for one with a class token
            ``'attention'``, because a class-token ViT is not trained to classify its patch tokens.
        mean, std: one number or one per channel, in units of [0, 1]; only used for uint8 images. Default: the
            model's ``pretrained_cfg``, else 0.5 and 0.5.

    Attributes:
        method: the method in use, never ``'auto'``.
        num_classes: K, the number of classes of the head.

    Raises:
        TypeError: the model has not the three methods named above.
        ValueError: unknown method, a method that does not fit the model's head (the message says why), or mean and
            std that are not finite, std not above 0.
    """

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        method: str = "auto",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        name = type(model).__name__
        missing = [
            part
            for part in ("forward_features", "forward_head", "get_classifier")
            if not callable(getattr(model, part, None))
        ]
        if missing:
            raise TypeError(f"model must be a timm classifier; {name} has no {', '.join(missing)}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")

        self.model = model.eval().requires_grad_(False)
        self.num_classes = self.classifiers[0].weight.shape[0]

        # A ViT is known by its sequence of blocks on a grid of patches.
        is_vit = hasattr(model, "blocks") and hasattr(model, "patch_embed") and hasattr(model, "cls_token")
        class_token = is_vit and getattr(model, "global_pool", None) == "token"
        if method == "auto":
            method = "attention" if class_token else "tokens" if is_vit else "cam"
        if method == "cam" and class_token:
            raise ValueError(
                f"{name} classifies its class token, there is no exact class activation map: "
                "use method='attention' or 'tokens'"
            )
        if method in ("tokens", "attention") and not is_vit:
            raise ValueError(f"method={method!r} needs a vision transformer; use method='cam' for {name}")

        self.method = method
        self.is_vit = is_vit
        self.pooled = method != "attention" and not class_token
        if self.pooled:
            self.check_pooled_head()
        elif method == "attention":
            attention = getattr(self.model.blocks[-1], "attn", None)
            if getattr(model, "cls_token", None) is None:
                raise ValueError(f"{name} has no class token: use method='tokens'")
            if type(attention).__name__ != "Attention" or not hasattr(attention, "q_norm"):
                raise ValueError(
                    f"method='attention' knows timm's plain Attention block, not the "
                    f"{type(attention).__name__} of {name}; use method='tokens'"
                )

        config = getattr(model, "pretrained_cfg", None) or {}
        self.statistics = (
            as_numbers("mean", mean if mean is not None else config.get("mean", (0.5,))),
            as_numbers("std", std if std is not None else config.get("std", (0.5,))),
        )
        for key, values in zip(("mean", "std"), self.statistics, strict=True):
            if not values or not all(isfinite(value) and (key == "mean" or value > 0) for value in values):
                raise ValueError(f"{key} must be finite{' and above 0' if key == 'std' else ''}, got {values}")
            self.register_buffer(key, None, persistent=False)
        self.place_statistics()

    def place_statistics(self) -> None:
        device = self.classifiers[0].weight.device
        for key, values in zip(("mean", "std"), self.statistics, strict=True):
            setattr(self, key, torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActivationTeacher":
        """What `to`, `half` and the like do; mean and std stay float32."""
        super()._apply(fn, recurse)
        self.place_statistics()
        return self

    def train(self, mode: bool = True) -> "ActivationTeacher":
        """Stay in eval mode, also when a module that holds the teacher goes to train mode."""
        return super().train(False)

    @torch.no_grad()
    def raw(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the signed maps of the given labels.

        Args:
            images: [B, C, H, W], floating point and normalised as the teacher wants it, or uint8, which is normalised
                here with ``mean`` and ``std``. Converted to the dtype of the model.
            labels: [B] integers, classes in [0, K). On a CPU a label outside raises; on a GPU, where asking would wait
                for the device, such an image gets an all-zero map, for which the operator falls back to the area share.

        Returns:
            [B, h, w] float32. For ``'cam'``, and for ``'tokens'`` of a ViT that averages, the mean over (h, w) is the
            logit of the label.

        Raises:
            ValueError: wrong shapes or dtypes, or (on a CPU) a label outside [0, K).
        """
        labels = self.check(images, labels)
        if images.dtype == torch.uint8:
            images = (images.to(torch.float32) / 255 - self.mean) / self.std
        images = images.to(self.dtype)
        valid = (labels >= 0) & (labels < self.num_classes)
        # On a GPU in bf16: maps need no more, and the teacher costs half.
        with plain_arithmetic(images.device, bf16=images.is_cuda):
            if self.method == "attention":
                return self.attention(images) * valid[:, None, None]
            features = self.features(images)  # [B, C, h, w]
        with plain_arithmetic(images.device):
            return self.label_maps(features.float(), labels.clamp(0, self.num_classes - 1)) * valid[:, None, None]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Compute the non-negative maps of the given labels, [B, h, w] float32: ``raw`` clamped at zero.

        Arguments and errors as in `raw`.
        """
        return self.raw(images, labels).clamp_(min=0)

    @property
    def dtype(self) -> torch.dtype:
        """That of the model's parameters."""
        dtype: torch.dtype = next(self.model.parameters()).dtype
        return dtype

    def check(self, images: Tensor, labels: Tensor) -> Tensor:
        """The labels as int64 on the device of the images, after the checks of `raw`."""
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")
        if images.ndim != 4:
            raise ValueError(f"images must be [B, C, H, W], got {list(images.shape)}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
        integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
        if labels.shape != images.shape[:1] or not integers:
            raise ValueError(
                f"labels must be integers of shape [{images.shape[0]}], got {labels.dtype} {list(labels.shape)}"
            )
        if not labels.is_cuda and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels must be in [0, {self.num_classes}), the classes of the teacher, got {low} to {high}"
                )
        return labels.to(images.device, torch.int64, non_blocking=True)

    @property
    def classifiers(self) -> list[Any]:
        """The model's linear classifiers: one, or two for a distilled DeiT."""
        found = self.model.get_classifier()
        layers = list(found) if isinstance(found, (tuple, list)) else [found]
        for layer in layers:
            pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
            if not isinstance(layer, nn.Linear) and not pointwise:
                raise ValueError(
                    f"{type(self.model).__name__} must end in a linear classifier, not "
                    f"{type(layer).__name__}: was it made with num_classes=0?"
                )
        return layers

    @property
    def norm(self) -> nn.LayerNorm | None:
        """The LayerNorm between pooling and classifier, if there is one."""
        head = getattr(self.model, "head", None)
        for norm in (getattr(head, "norm", None), getattr(self.model, "fc_norm", None)):
            if isinstance(norm, nn.LayerNorm):
                return norm
        return None

    def features(self, images: Tensor) -> Tensor:
        """Last features before pooling, as [B, C, h, w] whatever layout the model works in."""
        features = self.model.forward_features(images)
        if features.ndim == 4:
            channels_last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
            return features.permute(0, 3, 1, 2) if channels_last else features
        prefix = getattr(self.model, "num_prefix_tokens", 0)
        h, w = self.token_grid(images)
        if features.shape[1] != prefix + h * w:
            raise ValueError(
                f"{type(self.model).__name__} gives {features.shape[1] - prefix} patch tokens for images of "
                f"{images.shape[2]}x{images.shape[3]}, not a grid of {h}x{w}"
            )
        return features[:, prefix:].transpose(1, 2).unflatten(2, (h, w))

    def token_grid(self, images: Tensor) -> tuple[int, int]:
        patch_h, patch_w = self.model.patch_embed.patch_size
        return images.shape[2] // patch_h, images.shape[3] // patch_w

    def label_maps(self, features: Tensor, labels: Tensor) -> Tensor:
        """The head, position by position, for one class per image.

        Args:
            features: [B, C, h, w] float32.
            labels: [B] int64 in [0, K).
        """
        weight = torch.stack([layer.weight.flatten(1)[labels].float() for layer in self.classifiers])
        weight = weight.mean(0)  # [B, C]; the two heads of a distilled DeiT are averaged, as it does itself
        biases = [layer.bias[labels].float() for layer in self.classifiers if layer.bias is not None]
        bias = torch.stack(biases).mean(0) if biases else weight.new_zeros(len(labels))  # [B]

        norm = self.norm
        if norm is not None and not self.pooled:
            # A class-token ViT with a norm in its head: every token goes through the head on its own.
            gain, shift = (part if part is None else part.float() for part in (norm.weight, norm.bias))
            features = F.layer_norm(features.movedim(1, -1), norm.normalized_shape, gain, shift, norm.eps)
            features = features.movedim(-1, 1)
        elif norm is not None:
            if norm.bias is not None:
                bias = bias + (weight * norm.bias.float()).sum(1)
            if norm.weight is not None:
                weight = weight * norm.weight.float()
            pooled = features.mean((2, 3))  # [B, C]
            spread = (pooled.var(1, correction=0) + norm.eps).rsqrt()  # [B]
            weight = (weight - weight.mean(1, keepdim=True)) * spread[:, None]
        maps = (features * weight[:, :, None, None]).sum(1)
        return maps + bias[:, None, None]  # [B, h, w]

    def attention(self, images: Tensor) -> Tensor:
        """Softmax attention of the prefix tokens that are classified to the patch tokens, mean over heads."""
        attention = self.model.blocks[-1].attn
        queries_keys: dict[str, Tensor] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                queries_keys[name] = output

            return hook

        # The outputs of q_norm and k_norm are the very queries and keys of the (fused) attention.
        handles: list[RemovableHandle] = [
            attention.q_norm.register_forward_hook(keep("q")),
            attention.k_norm.register_forward_hook(keep("k")),
        ]
        try:
            self.model.forward_features(images)
        finally:
            for handle in handles:
                handle.remove()
        with plain_arithmetic(images.device):
            queries = queries_keys["q"][:, :, : len(self.classifiers)].float()  # [B, heads, 1 or 2, d]
            keys = queries_keys["k"].float()  # [B, heads, T, d]
            weights = (queries * attention.scale @ keys.mT).softmax(-1).mean((1, 2))  # [B, T]
        prefix = self.model.num_prefix_tokens
        return weights[:, prefix:].unflatten(1, self.token_grid(images))

    def check_pooled_head(self) -> None:
        """Compare the formula with the model's own head on random features: no backbone run is needed."""
        layer = self.classifiers[0]
        generator = torch.Generator("cpu").manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(layer.weight)

        # The mean differs from zero so that a norm or an activation that is overlooked shows.
        features = normal(2, layer.weight.shape[1], 3, 5) + 0.5
        labels = torch.tensor([0, self.num_classes - 1], device=features.device)
        if self.is_vit:
            prefix = normal(2, getattr(self.model, "num_prefix_tokens", 0), features.shape[1])
            own_layout = torch.cat([prefix, features.flatten(2).transpose(1, 2)], 1)
        elif str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC"):
            own_layout = features.permute(0, 2, 3, 1)
        else:
            own_layout = features
        name = type(self.model).__name__
        reason = (
            f"the head of {name} is not average pooling, at most one LayerNorm and one linear layer, "
            "so its class activation map is not exact"
        )
        with torch.no_grad(), plain_arithmetic(features.device):
            try:
                logits = self.model.forward_head(own_layout)
            except RuntimeError as error:
                raise ValueError(reason) from error
            expected = logits.float()[torch.arange(2, device=logits.device), labels]
            found = self.label_maps(features.float(), labels).mean((1, 2))
        tolerance = 3e-2 if layer.weight.dtype in (torch.float16, torch.bfloat16) else 1e-4
        if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
            raise ValueError(reason)
