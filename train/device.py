"""Which device a process trains on, and the group of processes it belongs to.

Kernels run on CUDA devices (those of AMD are such, too), the reference on CPUs. On other accelerators the model trains
on the device, and batches are mixed on the CPU and moved there: the reference needs float64, which MPS has not.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["choose_device", "device_module", "mixing_device", "start_processes", "sum_dtype"]

NAMES = "auto, cpu, cuda, cuda:N, mps, xpu or xpu:N"
OTHERS = ("mps", "xpu")


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that --device names, one of several always with its index.

    Args:
        name: auto, cpu, cuda, cuda:N, mps, xpu or xpu:N; auto is a CUDA device or the CPU.
        local_rank: place of this process among those of this machine, where there are several.

    Raises:
        ValueError: no such device, or none that this machine has.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be {NAMES}, got {name!r}") from None
    if device.type not in ("cpu", "cuda", *OTHERS):
        raise ValueError(f"--device must be {NAMES}, got {name!r}: it trains on no other devices")
    if device.type == "cpu":
        return torch.device("cpu")
    if not device_module(device).is_available():
        raise ValueError(
            f"--device {name} needs a GPU, and torch {torch.__version__} finds none (torch.{device.type}.is_available()"
            " is False): use --device cpu, or install the driver and a build of torch for this GPU"
        )
    if device.type == "mps":
        if local_rank is not None:
            raise ValueError("--device mps has one process: torch.distributed has no backend for it")
        return torch.device("mps")
    index = device.index or 0 if local_rank is None else local_rank
    if index >= (count := device_module(device).device_count()):
        raise ValueError(f"--device {device.type}:{index} must be one of this machine's {count} GPUs")
    return torch.device(device.type, index)


def device_module(device: torch.device) -> Any:
    """`torch.cuda` of a CUDA device, `torch.mps`, `torch.xpu`."""
    return torch.get_device_module(device.type)


def mixing_device(device: torch.device) -> torch.device:
    """Where the batches are mixed for a model on a device."""
    return torch.device("cpu") if device.type in OTHERS else device


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums over many batches: float64 where the device has it."""
    return torch.float32 if device.type in OTHERS else torch.float64


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device, joined as torchrun says.

    Raises:
        ValueError: --device names none that there is.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(name, int(os.environ["LOCAL_RANK"]) if world > 1 else None)
    if device.index is not None:
        device_module(device).set_device(device)
    if world > 1 and not dist.is_initialized():
        backend = {"cuda": "nccl", "xpu": "xccl"}.get(device.type, "gloo")
        dist.init_process_group(backend, device_id=device if device.index is not None else None)
    return rank, world, device
