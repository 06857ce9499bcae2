"""From the arguments of the public functions to an operator, or to the kernels at once."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.data import get_worker_info

from . import arguments, dispatch, inputs, reference
from .erasing import RandomErasing, erase_settings
from .inputs import Evidence, Result, TopKMaps
from .memory import empty_images
from .settings import MASK_RULES, Settings, as_text
from .sharded import Shards

__all__ = [
    "Maps", "as_offset", "as_seed", "crop_format", "make_settings", "named_backend", "result_dtype", "run",
    "unpack_label_maps",
]  # fmt: skip

Maps = Tensor | TopKMaps


def crop_format(crop_axes: str) -> str:
    """The box format of a packed label-map batch."""
    arguments.one_of("crop_axes", crop_axes, ("correct", "published"))
    return "crop" if crop_axes == "correct" else "crop_swapped"


def make_settings(
    *,
    num_classes: int,
    patch_size: int | tuple[int, int],
    mask_type: str,
    mode: str,
    lam: float | str,
    minimum_tokens: int | None,
    grid_cell: int = 4,
    given: bool = False,
    mixup_alpha: float = 0.0,
    cutmix_alpha: float = 1.0,
    prob: float = 1.0,
    switch_prob: float = 1.0,
    minmax: Sequence[float] | None = None,
    correct_lam: bool = True,
    label_smoothing: float = 0.1,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    multi_label: bool = False,
    clamp_targets: bool = False,
    erasing: RandomErasing | None = None,
) -> Settings:
    """Checked settings from a caller's arguments; `given` where the mask is an input, whatever mask_type says."""
    arguments.one_of("mask_type", mask_type, tuple(name for name, rule in MASK_RULES.items() if rule.drawn))
    share, alpha = "the share to keep, in [0, 1], or 'beta'", "in [0, 1000]; 0 switches the branch off"
    if isinstance(lam, str) and lam != "beta":
        raise ValueError(f"lam must be {share}, got {arguments.shown(lam)}")
    settings = Settings(
        num_classes=arguments.as_count("num_classes", num_classes, 1),
        patch_size=arguments.as_patch_size(patch_size),
        mask_type="given" if given else mask_type,
        mode=mode,
        lam=-1.0 if isinstance(lam, str) else arguments.as_number("lam", lam, 0, 1, share),
        minimum_tokens=-1 if minimum_tokens is None else arguments.as_count("minimum_tokens", minimum_tokens, 0),
        grid_cell=arguments.as_count("grid_cell", grid_cell, 1),
        mixup_alpha=arguments.as_number("mixup_alpha", mixup_alpha, 0, 1000, alpha),
        cutmix_alpha=arguments.as_number("cutmix_alpha", cutmix_alpha, 0, 1000, alpha),
        prob=arguments.as_number("prob", prob, 0, 1, "a probability in [0, 1]"),
        switch_prob=arguments.as_number("switch_prob", switch_prob, 0, 1, "a probability in [0, 1]"),
        minmax=arguments.as_numbers("cutmix_minmax", minmax),
        correct_lam=correct_lam,
        label_smoothing=arguments.as_number("label_smoothing", label_smoothing, 0, 1, "in [0, 1]"),
        mean=arguments.as_numbers("mean", mean),
        std=arguments.as_numbers("std", std),
        multi_label=multi_label,
        clamp_targets=clamp_targets,
        **erase_settings(erasing),
    )
    inputs.check_settings(settings)
    return settings


def result_dtype(dtype: torch.dtype, out_dtype: torch.dtype | None, settings: Settings) -> torch.dtype:
    """The dtype of the mixed images."""
    if out_dtype is None:
        return torch.float32 if settings.mean and dtype == torch.uint8 else dtype
    plain_bytes = dtype == torch.uint8 and not settings.mean
    if out_dtype not in inputs.IMAGE_DTYPES or (out_dtype == torch.uint8 and not plain_bytes):
        raise TypeError(
            "out_dtype must be float32, float16, bfloat16, float64 (or uint8 for plain bytes), got "
            f"{arguments.shown(out_dtype)}"
        )
    return out_dtype


def as_seed(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """A 0-d int64 tensor: the given seed, or one drawn on the CPU, in a graph on the device."""
    if isinstance(seed, Tensor):
        if seed.dim() or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an integer or a 0-d int64 tensor, got {seed.dtype} {list(seed.shape)}")
        if seed.device.type != "cpu" and seed.device != device:
            raise ValueError(f"seed must be on the CPU or on {device}, where the batch is, got {seed.device}")
        return seed
    if seed is not None:
        number = arguments.as_seed_number(seed)
        return torch.tensor(number, dtype=torch.int64, device="cpu")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, device=generator.device, generator=generator)
        worker = get_worker_info()
        return drawn if worker is None else drawn ^ (worker.seed & (2**62 - 1))
    # Without a driver, where CUDA tensors are fake, asking for the stream is an error.
    captured = device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    in_graph = torch.compiler.is_compiling() or captured
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device if in_graph else "cpu")


def as_offset(sample_offset: int | None, batch: int) -> int:
    """The given offset, or the batch's place among the ranks'."""
    if sample_offset is not None:
        return arguments.as_offset(sample_offset)
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() * batch
    return 0


def named_backend(backend: str, device: torch.device) -> ModuleType | None:
    """The module that is asked for by name, or None: the operator decides."""
    arguments.one_of("backend", backend, ("auto", "reference", "triton"))
    if backend == "auto":
        return None
    if backend == "reference":
        return reference
    try:
        module = dispatch.kernels()
    except ImportError as error:
        raise ValueError(f"backend must be 'auto' or 'reference' where {error.name} is not installed") from error
    if device.type != "cuda" and not module.interpreted():
        raise ValueError(
            f"backend must be 'auto' or 'reference' on {device.type}: there the kernels run under Triton's interpreter "
            "alone, which TRITON_INTERPRET=1 switches on before Triton is imported"
        )
    return module


def run(
    images: Tensor,
    labels: Tensor,
    maps: Maps | None,
    places: Evidence,
    mask: Tensor | None,
    partner: Tensor | None,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    sample_offset: int | None,
    out: Tensor | None,
    out_dtype: torch.dtype | None,
    backend: str,
    settings: Settings,
    whole: bool = True,
) -> tuple[Tensor, Result]:
    """Check, and call the operator that fits `out`, or the kernels at once.

    `places` is the evidence without its maps; `whole` False where images and targets are all that is wanted.
    """
    if inputs.is_dtensor(images):
        return run_in_shards(
            images, labels, maps, places, mask, partner, seed, generator, sample_offset, out, out_dtype, backend,
            settings,
        )  # fmt: skip
    given = images
    if is_tv_tensor(images):
        images = images.as_subclass(Tensor)
    values, indices = maps if isinstance(maps, TopKMaps) else (maps, None)
    packed = isinstance(labels, Tensor) and labels.dim() == 5
    if packed:
        values, indices, boxes, labels = unpack_label_maps(labels, values, places.boxes)
        evidence = places._replace(maps=values, indices=indices, boxes=boxes)
    else:
        evidence = Evidence(values, indices, *places[2:6], "xyxy")
    at_once = backend == "auto" and launches_at_once(images)
    form = None
    if at_once:
        key = form_of((images, labels, partner, *evidence[:6], mask, out), settings, out_dtype, whole)
        form = PASSED.get(key)
    if form is None:
        dtypes = (torch.float32,) if packed else inputs.LABEL_DTYPES
        inputs.check_form(images, labels, partner, evidence, mask, settings, dtypes)
        result_dtype(images.dtype, out_dtype, settings)
        if at_once and len(PASSED) < MOST_PASSED:
            form = PASSED[key] = inputs.Form()
    offset = as_offset(sample_offset, images.shape[0])
    dtype = result_dtype(images.dtype, out_dtype, settings)
    in_place = False
    if out is not None:
        target = out.as_subclass(Tensor) if is_tv_tensor(out) else out
        inputs.check_out(images, target, dtype)
        in_place = out is given or (in_memory(images) and inputs.shares_memory(images, target))
        if in_place and settings.mean:
            raise ValueError("out must not be images where mean and std are given: only what moves is touched in place")
    module = dispatch.kernels() if at_once else named_backend(backend, images.device)
    if module is None and runs_at_once(images):
        module = reference
    seed = as_seed(seed, generator, images.device)

    if module is not None:
        place = images if in_place else empty_images(images, dtype) if out is None else target
        options = {} if module is reference else {"whole": whole, "form": form}
        result = dispatch.mix_into(
            module, images, place, labels, partner, evidence, mask, seed, offset, settings, in_place,
            fresh=out is None, **options,
        )  # fmt: skip
        return as_given(place, given) if out is None else out, result
    rest = (labels, partner, *evidence, mask, seed, offset, as_text(settings))
    if out is None:
        mixed, *result = dispatch.mix(images, dtype, *rest)
        return as_given(mixed, given), Result(*result)
    result = dispatch.mix_inplace(images, *rest) if in_place else dispatch.mix_out(images, target, *rest)
    return out, Result(*result)


def run_in_shards(
    images: Tensor,
    labels: Tensor,
    maps: Maps | None,
    places: Evidence,
    mask: Tensor | None,
    partner: Tensor | None,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    sample_offset: int | None,
    out: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Result]:
    """`run` for images that are a DTensor: each rank mixes its shard, and counts its samples in the whole batch."""
    shards = Shards(images)
    if shards.replicated and seed is None and generator is None:
        raise ValueError(
            "seed must be given where images are replicated over a dimension of their mesh, and be the same on its "
            "ranks, which else mix the same images in different ways"
        )
    if isinstance(maps, Tensor) and places.ids is None:
        maps = shards.local("maps", maps)
    elif isinstance(maps, TopKMaps) and places.ids is None:
        maps = TopKMaps(shards.local("maps", maps.values), shards.local("maps", maps.indices))
    offset = shards.start + (0 if sample_offset is None else arguments.as_offset(sample_offset))
    mixed, result = run(
        shards.local("images", images), shards.local("labels", labels), maps, shards.local_evidence(places),
        shards.local("mask", mask), partner, seed, generator, offset, shards.local("out", out), *rest,
    )  # fmt: skip
    return shards.whole(mixed) if out is None else out, Result(*(shards.whole(part) for part in result))


def is_tv_tensor(tensor: Any) -> bool:
    """Whether a tensor is one of torchvision's, which come out as what they went in."""
    known = sys.modules.get("torchvision.tv_tensors")
    return known is not None and isinstance(tensor, known.TVTensor)


def as_given(mixed: Tensor, given: Tensor) -> Tensor:
    """The mixed images as the type of tensor that was given."""
    return mixed.as_subclass(type(given)) if is_tv_tensor(given) else mixed


def in_memory(tensor: Tensor) -> bool:
    """Whether a tensor has an address (not while tracing, nor on the meta device)."""
    return type(tensor) is Tensor and not tensor.is_meta and not torch.compiler.is_compiling()


# Forms of inputs that passed the checks, so that a step on a GPU, where values are not looked at, need not repeat them.
PASSED: dict[tuple[Any, ...], inputs.Form] = {}
MOST_PASSED = 1024


def launches_at_once(images: Tensor) -> bool:
    """Whether the kernels can be called without the operator."""
    return isinstance(images, Tensor) and images.is_cuda and nobody_watches(images)


def runs_at_once(images: Tensor) -> bool:
    """Whether the reference can be called without the operator."""
    return images.is_cpu and nobody_watches(images)


def nobody_watches(images: Tensor) -> bool:
    """Whether operators are only run: not traced, not seen by a mode or a subclass, not transformed (`torch.vmap`)."""
    return (
        type(images) is Tensor
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and _get_current_dispatch_mode() is None
        and peek_interpreter_stack() is None
    )


def form_of(tensors: tuple[Tensor | None, ...], *constant: Any) -> tuple[Any, ...]:
    """All that the checks look at on a GPU: shapes, strides, dtypes, devices, and what is constant."""
    form: list[Any] = [torch.is_grad_enabled(), *constant]
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            form += (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), tensor.requires_grad)
        else:
            form.append(tensor)
    return tuple(form)


def unpack_label_maps(
    packed: Tensor, maps: Tensor | None, boxes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, class numbers, crops and labels of a packed batch [B, 3, k, h, w], as views of it.

    Plane 0 holds the values, plane 1 the class numbers; the first row of plane 2 holds (top, left, height, width),
    relative to the image, and at position 5 the image's label.
    """
    if maps is not None or boxes is not None:
        raise ValueError("maps and boxes must not be given where labels is a packed label-map batch, which holds both")
    if packed.shape[1] != 3 or packed.shape[4] < 6:
        raise ValueError(f"labels must be [B] or a packed [B, 3, k, h, w] with w >= 6, got {list(packed.shape)}")
    if packed.dtype != torch.float32:
        raise TypeError(f"packed label maps must be float32: half floats round class numbers, got {packed.dtype}")
    return packed[:, 0], packed[:, 1], packed[:, 2, 0, 0, :4], packed[:, 2, 0, 0, 5]
