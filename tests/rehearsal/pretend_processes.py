"""Stand-ins for NCCL and DistributedDataParallel: processes on pretended GPUs average over gloo."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pretend_tensor import PretendTensor, held, state
from torch import Tensor, nn

__all__ = ["all_reduce", "data_parallel", "initialised"]

INIT = dist.init_process_group
ALL_REDUCE = dist.all_reduce


def initialised(backend: str, *, device_id: torch.device | None = None, **options: Any) -> None:
    """dist.init_process_group: gloo where NCCL is asked for."""
    if backend != "nccl" or device_id is None or device_id.index != state().current:
        raise ValueError(f"a process on a GPU needs NCCL and its own device, got {backend} and {device_id}")
    INIT("gloo", **options)


@contextmanager
def data_parallel() -> Iterator[None]:
    """DistributedDataParallel under the names that the trainer has for it."""
    import train.loop
    import train.run

    with (
        mock.patch.object(train.run, "DistributedDataParallel", DataParallel),
        mock.patch.object(train.loop, "DistributedDataParallel", DataParallel),
    ):
        yield


def all_reduce(tensor: Tensor, **options: Any) -> Any:
    """NCCL: GPU tensors only."""
    if not isinstance(tensor, PretendTensor):
        raise RuntimeError("No backend type associated with device type cpu")
    return ALL_REDUCE(tensor.held, **options)


class DataParallel(nn.Module):
    """DistributedDataParallel: averages gradients after the backward pass of the last part of an update."""

    def __init__(self, module: nn.Module, device_ids: list[int] | None = None) -> None:
        super().__init__()
        places = {parameter.device for parameter in module.parameters()}
        if device_ids is None or places != {torch.device("cuda", device_ids[0])}:
            raise ValueError(f"DistributedDataParallel device_ids {device_ids} do not fit the model's {places}")
        self.module, self.exchanging = module, True
        for parameter in module.parameters():
            dist.broadcast(held(parameter).detach(), 0)
            parameter.register_post_accumulate_grad_hook(self.exchange)

    def exchange(self, parameter: Tensor) -> None:
        if self.exchanging:
            assert parameter.grad is not None
            ALL_REDUCE(held(parameter.grad))
            held(parameter.grad).div_(dist.get_world_size())

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self.exchanging = False
        try:
            yield
        finally:
            self.exchanging = True

    def forward(self, *given: Any) -> Any:
        return self.module(*given)
