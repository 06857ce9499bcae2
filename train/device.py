"""Which device a process trains on, and the group of processes it belongs to."""

import os

import torch
import torch.distributed as dist

__all__ = ["choose_device", "start_processes"]


def choose_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device that --device names, a CUDA device always with its index.

    Args:
        name: auto, cpu, cuda or cuda:N.
        local_rank: place of this process among those of this machine, where there are several.

    Raises:
        ValueError: no such device, or none that this machine has.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}: it trains on no other devices")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device {name} needs a GPU, and torch {torch.__version__} finds none (torch.cuda.is_available() is "
            "False): use --device cpu, or install the driver and a build of torch for this GPU"
        )
    index = device.index or 0 if local_rank is None else local_rank
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device cuda:{index} must be one of this machine's {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device, joined as torchrun says.

    Raises:
        ValueError: --device names none that there is.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(name, int(os.environ["LOCAL_RANK"]) if world > 1 else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return rank, world, device
