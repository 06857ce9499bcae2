"""DTensors: a batch that is sharded over the ranks of a device mesh is mixed shard by shard, as by DDP."""

import sys
from typing import Any

import torch
from torch import Tensor

from .inputs import Evidence, TopKMaps, is_dtensor

__all__ = ["Shards", "as_shards"]


class Shards:
    """How a batch lies on a mesh, read off its images.

    Args:
        images: DTensor [B, C, H, W], sharded along its first axis or replicated over each dimension of its mesh.

    Attributes:
        start: global index of this rank's first image.
        replicated: other ranks hold the same images.

    Raises:
        ValueError: images are placed in another way.
    """

    def __init__(self, images: Any) -> None:
        tensors = sys.modules["torch.distributed.tensor"]
        self.mesh, self.placements, self.batch = images.device_mesh, images.placements, images.shape[0]
        for placement in self.placements:
            if not (placement.is_shard(0) or placement.is_replicate()):
                raise ValueError(
                    "images must be sharded along the batch, Shard(0), or replicated over each dimension of their "
                    f"mesh, got {list(self.placements)}; call images.redistribute(placements=[Shard(0)])"
                )
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offsets = compute_local_shape_and_global_offset(images.shape, self.mesh, self.placements)
        self.start = int(offsets[0])
        self.type = tensors.DTensor
        self.replicated = any(
            placement.is_replicate() and self.mesh.size(axis) > 1 for axis, placement in enumerate(self.placements)
        )

    def local(self, name: str, tensor: Any) -> Any:
        """This rank's part of a tensor with one entry for each image; others as they are.

        Raises:
            ValueError: it is placed in another way than the images.
        """
        if not is_dtensor(tensor):
            return tensor
        if tensor.device_mesh != self.mesh or tensor.placements != self.placements:
            raise ValueError(
                f"{name} must be placed as images are, {list(self.placements)} on the same mesh, got "
                f"{list(tensor.placements)}"
            )
        return tensor.to_local()

    def whole(self, part: Tensor) -> Any:
        """The DTensor whose part on this rank is given, placed as the images are."""
        shape = torch.Size((self.batch, *part.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return self.type.from_local(part, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)
