"""DTensors: a batch that is sharded over the ranks of a device mesh is mixed shard by shard, as DDP does it."""

import sys
from typing import Any

from torch import Tensor

from .inputs import Evidence, is_dtensor

__all__ = ["Shards"]


class Shards:
    """How a batch is spread over a mesh, read off its images.

    Args:
        images: DTensor [B, C, H, W], over each dimension of its mesh either sharded along the batch or replicated.

    Attributes:
        start: global index of this rank's first image.
        replicated: whether other ranks hold the same images.

    Raises:
        ValueError: images are placed in another way.
    """

    def __init__(self, images: Any) -> None:
        tensors = sys.modules["torch.distributed.tensor"]
        self.mesh, self.placements = images.device_mesh, images.placements
        self.batch = size = images.shape[0]
        self.start, self.replicated = 0, False
        for axis, placement in enumerate(self.placements):
            ranks = self.mesh.size(axis)
            if placement == tensors.Shard(0):
                share = -(-size // ranks)  # the last ranks have less, or nothing
                begin = min(self.mesh.get_local_rank(axis) * share, size)
                self.start, size = self.start + begin, min(share, size - begin)
            elif placement == tensors.Replicate():
                self.replicated = self.replicated or ranks > 1
            else:
                raise ValueError(
                    "images must be Shard(0), sharded along the batch, or Replicate() over each dimension of their "
                    f"mesh, got {placement}; use images.redistribute(placements=[Shard(0)])"
                )

    def local(self, name: str, tensor: Any) -> Any:
        """This rank's part of a DTensor with one entry for each image; what is no DTensor is this rank's already.

        Raises:
            ValueError: it is placed in another way than the images.
        """
        if not is_dtensor(tensor):
            return tensor
        if tensor.device_mesh != self.mesh or tensor.placements != self.placements:
            raise ValueError(
                f"{name} must be placed as images are, {self.placements} on their mesh, got {tensor.placements}"
            )
        return tensor.to_local()

    def local_evidence(self, evidence: Evidence) -> Evidence:
        """This rank's part of the evidence; with ids the maps are those of a data set, and the same on all ranks."""
        return evidence._replace(
            **{name: self.local(name, getattr(evidence, name)) for name in ("ids", "boxes", "flips", "affines")}
        )

    def whole(self, part: Tensor) -> Any:
        """The DTensor, placed as the images are, whose part on this rank is given."""
        shape = (self.batch, *part.shape[1:])
        dtensor = sys.modules["torch.distributed.tensor"].DTensor
        return dtensor.from_local(part, self.mesh, self.placements, shape=shape, stride=part.stride())
