"""The mix as Triton kernels. Files and functions have the names and the order of those in `reference/`."""

from .attention import attention_arguments, attention_kernel, attention_targets
from .fused import mix_kernel
from .launch import Card, interpreted, launch_shape, mix, pool_targets, prepare, token_mask

__all__ = [
    "Card", "attention_arguments", "attention_kernel", "attention_targets", "interpreted", "launch_shape", "mix",
    "mix_kernel", "pool_targets", "prepare", "token_mask",
]  # fmt: skip
