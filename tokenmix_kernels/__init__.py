"""TokenMix for vision transformers, in one call."""

from .attention import ClassAttention
from .erasing import RandomErasing
from .inputs import TopKMaps
from .mix import Mix, Mixed, TokenMix, tokenmix
from .parts import pool_targets, token_mask
from .transmix import attention_targets, progressive_ratio

__all__ = [
    "ClassAttention", "Mix", "Mixed", "RandomErasing", "TokenMix", "TopKMaps", "__version__", "attention_targets",
    "pool_targets", "progressive_ratio", "token_mask", "tokenmix",
]  # fmt: skip

__version__ = "0.2.0"
