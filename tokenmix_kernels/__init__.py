"""TokenMix for vision transformers, in one call."""
