"""The mix as Triton kernels. Files and functions have the names and the order of those in `reference/`."""

from .fused import mix_kernel
from .launch import Card, launch_shape, mix, pool_targets, prepare, token_mask

__all__ = ["Card", "launch_shape", "mix", "mix_kernel", "pool_targets", "prepare", "token_mask"]
