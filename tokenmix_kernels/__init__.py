"""TokenMix for vision transformers, in one call."""

from .attention import ClassAttention
from .mix import Mix, Mixed, TokenMix, TopKMaps, pool_targets, token_mask, tokenmix
from .transmix import attention_targets, progressive_ratio

__all__ = [
    "ClassAttention", "Mix", "Mixed", "TokenMix", "TopKMaps", "__version__", "attention_targets", "pool_targets",
    "progressive_ratio", "token_mask", "tokenmix",
]  # fmt: skip

__version__ = "0.2.0"
