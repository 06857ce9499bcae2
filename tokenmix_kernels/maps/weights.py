"""Weights from files, without running what is in them."""

import difflib
import errno
import os
import pickle
import re
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from ..arguments import as_count
from ..extras import require

__all__ = ["load_teacher", "read_tensors", "weights_of"]

# Where checkpoints hold weights, in timm's order: averaged ones first.
KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What DistributedDataParallel and torch.compile put before a parameter's name.
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
LFS_POINTER = b"version https://git-lfs"


def read_tensors(path: str | os.PathLike[str], what: str = "weights file") -> Any:
    """Load a file of `torch.save` or safetensors onto the CPU: tensors, numbers, text and containers of them only.

    Args:
        path: ``.safetensors``, or anything else for `torch.load`.
        what: name of such a file in messages.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, a damaged one, or one that holds other objects: "the WHAT PATH cannot be
            read: WHY".
        ImportError: safetensors is needed and missing; the message says how to install it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {what} {path}")
    with open(path, "rb") as file:
        start = file.read(64)
    why = ""
    if not start:
        why = "it is empty"
    elif start.startswith(LFS_POINTER):
        why = "it is a Git LFS pointer, not the file itself: run 'git lfs pull'"
    elif start.lstrip().startswith(b"<"):
        why = "it is a web page"
    if why:
        raise ValueError(f"the {what} {path} cannot be read: {why}")
    try:
        if path.suffix == ".safetensors":
            return require("safetensors.torch", extra="train").load_file(path, device="cpu")
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:  # the formats' readers raise nearly everything on broken files
        raise ValueError(f"the {what} {path} cannot be read: {explain(error)}") from error


def explain(error: Exception) -> str:
    """Why a file could not be loaded, in a few words."""
    foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
    if foreign:
        return f"it holds objects other than tensors ({foreign[1]}), which could run code: save its state_dict() alone"
    if isinstance(error, (pickle.UnpicklingError, EOFError, LookupError, UnicodeDecodeError, struct.error)):
        return "it is not a file of torch.save, or a damaged one"
    if "PytorchStreamReader" in str(error) or (isinstance(error, OSError) and error.errno == errno.EINVAL):
        return "it is truncated or damaged"
    return str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__


def weights_of(checkpoint: Any) -> dict[str, Tensor]:
    """Find the model's weights in a checkpoint.

    Args:
        checkpoint: a state dict, or a dict that holds one. The checkpoints of `python -m train` say in ``best_is``
            which of their weights had the best score: ``"ema"`` or ``"model"``. Others are read as timm does:
            ``state_dict_ema``, ``model_ema``, ``state_dict`` or ``model``, whichever comes first.

    Returns:
        Name to tensor, without the prefixes of DistributedDataParallel and torch.compile.

    Raises:
        ValueError: not a dict, no weights, or something among them that is no tensor.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint must be a dict of tensors, got {type(checkpoint).__name__}")
    found: Any = checkpoint
    key = ""
    best = checkpoint.get("best_is")
    for candidate in KEYS if best is None else (best,):
        if checkpoint.get(candidate) is not None:
            key, found = candidate, checkpoint[candidate]
            break
    if best is not None and not key:
        raise ValueError(f"best_is of the checkpoint must name weights that it holds, got {best!r}")
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} of the checkpoint must be a dict of tensors, got {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"weights must be tensors by name, got {type(value).__name__} as {name!r}")
    if not found:
        raise ValueError("the checkpoint holds no weights")
    return {WRAPPERS.sub("", name): value for name, value in found.items()}


def check_reachable(name: str) -> None:
    """Raise ValueError where pretrained weights would have to come from a host that cannot be reached.

    The hub's client finds out by itself, after a minute of trials.
    """
    config = require("timm").get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(f"timm has no pretrained weights of {name}; give a checkpoint file as weights")
    if not config.hf_hub_id or getproxies():
        return
    repository = config.hf_hub_id + (f"{config.architecture}.{config.tag}" if config.hf_hub_id.endswith("/") else "")
    hub = require("huggingface_hub")
    if any(hub.try_to_load_from_cache(repository, file) for file in ("model.safetensors", "pytorch_model.bin")):
        return
    host = urlsplit(hub.constants.ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"the pretrained weights of {name} could not be loaded: {host.hostname} cannot be reached "
            f"({error.strerror or error}); give a checkpoint file as weights"
        ) from error


def load_teacher(
    name: str, weights: str | os.PathLike[str] | None = None, *, num_classes: int | None = None
) -> nn.Module:
    """Make a timm classifier with its weights.

    Args:
        name: timm's name of the architecture.
        weights: a checkpoint, ``.pth`` or ``.safetensors``, of this architecture, read by `read_tensors` and
            `weights_of`: the best weights of `python -m train`, averaged ones where there are any. One whose
            parameters are all named differently but equal the model's in order and shape (another implementation of
            the same architecture) is taken in that order. None: timm's own pretrained weights, which it downloads.
        num_classes: K. Default: what the checkpoint's classifier has, else timm's.

    Returns:
        The model in float32 on the CPU, in eval mode.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: unknown architecture, or a checkpoint that does not fit it; the message says how.
        ImportError: timm is missing; the message says how to install it.
    """
    timm = require("timm")
    if not isinstance(name, str) or not timm.is_model(name):
        close = difflib.get_close_matches(str(name), timm.list_models(), 3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(f"timm knows no model {name!r}{hint}")
    options = {} if num_classes is None else {"num_classes": as_count("num_classes", num_classes, 1)}

    def make(pretrained: bool = False) -> Any:
        # Neither the default device nor the default dtype of the process may decide.
        with torch.device("cpu"):
            return timm.create_model(name, pretrained=pretrained, **options).to(torch.float32).eval()

    if weights is None:
        check_reachable(name)
        try:
            return make(pretrained=True)
        except Exception as error:  # the hub client raises many kinds, none of which says what to do
            raise ValueError(
                f"the pretrained weights of {name} could not be loaded ({error}); give a checkpoint file as weights"
            ) from error
    checkpoint = read_tensors(weights)
    try:
        state = weights_of(checkpoint)
    except ValueError as error:
        raise ValueError(f"the weights file {weights} cannot be read: {error}") from error

    model = make()
    classifier = model.pretrained_cfg["classifier"]
    key = f"{classifier if isinstance(classifier, str) else classifier[0]}.weight"
    if num_classes is None and key in state and len(state[key]) != model.num_classes:
        options["num_classes"] = len(state[key])
        model = make()
    own = model.state_dict()
    if not own.keys() & state.keys() and [v.shape for v in own.values()] == [v.shape for v in state.values()]:
        state = dict(zip(own, state.values(), strict=True))
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or unexpected or reshaped:
        parts = [
            f"{len(keys)} {what} (first {min(keys)})"
            for keys, what in (
                (missing, "parameters missing"),
                (unexpected, "unknown parameters"),
                (reshaped, "parameters of another shape"),
            )
            if keys
        ]
        raise ValueError(f"{weights} does not fit {name}: {', '.join(parts)}")
    model.load_state_dict(state)
    return model
