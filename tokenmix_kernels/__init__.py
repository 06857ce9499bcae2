"""TokenMix for vision transformers, in one call."""

from .mix import Mixed, TokenMix, TopKMaps, pool_targets, token_mask, tokenmix

__all__ = ["Mixed", "TokenMix", "TopKMaps", "__version__", "pool_targets", "token_mask", "tokenmix"]

__version__ = "0.1.0"
