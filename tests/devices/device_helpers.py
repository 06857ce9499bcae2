"""The devices of the matrix: the operators on a CPU, and the kernels under Triton's interpreter and on a GPU."""

import os
from typing import Any, NamedTuple

import torch
from fuzz import placed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Device(NamedTuple):
    """Where a case runs, and by which backend; what it should give is always the reference's on the CPU."""

    name: str
    home: str
    backend: str

    def put(self, value: Any) -> Any:
        """A copy there of a tensor, with its strides and offset, of a tuple of tensors, or of a dict's values."""
        if isinstance(value, torch.Tensor):
            return placed(value, self.home)
        if isinstance(value, dict):
            return {name: self.put(one) for name, one in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self.put, value))
        return value

    def seeds(self, count: int) -> range:
        """Seeds to sweep: one where the operator runs what it is compared with."""
        return range(1 if self.name == "reference" else count)

    @property
    def rounds(self) -> bool:
        """Whether casts to bfloat16 round: Triton's interpreter cuts."""
        return self.name != "interpreter"


DEVICES = {
    "reference": Device("reference", "cpu", "auto"),
    "interpreter": Device("interpreter", "cpu", "triton"),
    "gpu": Device("gpu", "cuda", "auto"),
}


def missing(name: str) -> str | None:
    """Why the matrix does not run on a device in this process, or None."""
    if name == "interpreter":
        return None if INTERPRETED else "needs TRITON_INTERPRET=1 from the start of the process"
    if INTERPRETED:
        return f"the {name} needs a process without TRITON_INTERPRET=1"
    return None if name == "reference" or torch.cuda.is_available() else "needs a GPU: no CUDA or ROCm device"
