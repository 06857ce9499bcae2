"""What the arguments of a mix must look like, and the errors where they do not.

Forms (types, shapes, dtypes, devices) are checked before an operator is called, so also while it is traced. Shared
memory and values (`values.py`) are checked inside the operators, where they are known.
"""

import sys
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import names, one_of, shown
from .settings import MASK_RULES, MODES, Settings

__all__ = ["Evidence", "Result", "TopKMaps", "check_form", "check_out", "check_settings", "is_dtensor"]

LONGEST_GRID = 64
LARGEST_MAP = 64
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float64)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAP_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
ROW_DTYPES = (torch.int64, torch.int32)
BOX_FORMATS = ("xyxy", "crop", "crop_swapped")


class TopKMaps(NamedTuple):
    """Activation maps of each position's k strongest classes.

    Attributes:
        values: [B, k, h, w] float32, float16, bfloat16 or uint8.
        indices: [B, k, h, w] class numbers: int64, int32, int16, uint8, or float32.
    """

    values: Tensor
    indices: Tensor


class Evidence(NamedTuple):
    """The activation maps of a batch, and the part of its map that each image shows.

    Attributes:
        maps: own-label maps [B, h, w], maps of all classes [B, K, h, w], or top-k maps [B, k, h, w]; with `ids` maps of
            any number of images. None: no evidence, weights are shares of the area.
        indices: class numbers of top-k maps, of their shape.
        ids: [B] rows of `maps`.
        boxes: [B, 4] the shown part, in `box_format`.
        flips: [B] bool, shown mirrored from left to right.
        affines: [B, 2, 3] in place of boxes and flips.
        box_format: 'xyxy', or a packed label-map batch's 'crop' (top, left, height, width) or 'crop_swapped', the
            published code's reading of it.
    """

    maps: Tensor | None = None
    indices: Tensor | None = None
    ids: Tensor | None = None
    boxes: Tensor | None = None
    flips: Tensor | None = None
    affines: Tensor | None = None
    box_format: str = "xyxy"


class Result(NamedTuple):
    """What a mix gives beside the images. On a GPU a field is None where it was not asked for.

    Attributes:
        targets: [B, K] float32.
        mask: [B, Gh, Gw] bool, True where the token is taken from the partner (of a rectangle, by more than half); or
            float32, the share of each token, where the settings say shares.
        weights: [B, 2] float32, what is left of the own image and of the partner.
        kind: [B] uint8, `COPY`, `MIXUP` or the kind of a mask rule.
    """

    targets: Tensor
    mask: Tensor
    weights: Tensor
    kind: Tensor


class Form:
    """A form of inputs that passed the checks: shapes, strides, dtypes, devices and settings.

    Attributes:
        relaunch: what the kernels remember of its last launch, or None.
    """

    relaunch: Any = None


def show(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}"


def check_settings(settings: Settings) -> None:
    """Raise ValueError for a setting out of its range."""
    one_of("mask_type", settings.mask_type, tuple(MASK_RULES))
    one_of("mode", settings.mode, tuple(MODES))
    for name in ("correct_lam", "multi_label", "clamp_targets"):
        if not isinstance(getattr(settings, name), bool):
            raise ValueError(f"{name} must be True or False, got {shown(getattr(settings, name))}")
    if settings.mixup_alpha == 0 and settings.cutmix_alpha == 0:
        raise ValueError("one of mixup_alpha and cutmix_alpha must be above 0, else there is nothing to mix")
    if settings.minmax and not (len(settings.minmax) == 2 and 0 <= settings.minmax[0] <= settings.minmax[1] <= 1):
        raise ValueError(f"cutmix_minmax must be two shares in [0, 1], the smaller first, got {settings.minmax}")
    if len(settings.mean) != len(settings.std):
        raise ValueError("mean and std must be given together and have one value for each channel")
    if not all(isfinite(value) for value in settings.mean):
        raise ValueError(f"mean must be finite, got {settings.mean}")
    if not all(isfinite(value) and value > 0 for value in settings.std):
        raise ValueError(f"std must be above 0 and finite, got {settings.std}")


def check_grid(grid_h: int, grid_w: int) -> None:
    """Raise ValueError for a token grid that the kernels' masks do not hold."""
    if not (1 <= grid_h <= LONGEST_GRID and 1 <= grid_w <= LONGEST_GRID):
        raise ValueError(
            f"the token grid must be between 1x1 and {LONGEST_GRID}x{LONGEST_GRID}, got {grid_h}x{grid_w}; "
            "use a larger patch_size"
        )


def check_grid_cell(settings: Settings, grid_h: int, grid_w: int) -> None:
    """Raise ValueError for a grid mask of one cell, which would take all of the image or nothing."""
    if settings.mask_type == "grid" and settings.grid_cell >= max(grid_h, grid_w):
        raise ValueError(
            f"grid_cell must be below the longer side of the token grid, {grid_h}x{grid_w}, got {settings.grid_cell}"
        )


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is spread over a device mesh."""
    known = None if type(tensor) is Tensor else sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(tensor, known.DTensor)


def check_tensor(
    name: str,
    tensor: Any,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    shape: tuple[int, ...] | None = None,
    what: str = "",
    contiguous: bool = False,
) -> None:
    """Raise TypeError or ValueError for what is not a tensor of one of the dtypes, of the shape, on the device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if is_dtensor(tensor):
        raise TypeError(f"{name} must be a plain tensor here, got a DTensor; use {name}.to_local()")
    if tensor.dtype not in dtypes:
        known = f"{'one of ' * (len(dtypes) > 1)}{names(*dtypes)}"
        raise TypeError(f"{name} must be {known}{what}, got {names(tensor.dtype)}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}{what}, got {show(tensor)}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call {name}.contiguous()")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, where the batch is, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad: mixing is not differentiable; use {name}.detach() or no_grad()"
        )


def check_inner(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless all but the first axis are contiguous."""
    stride = 1
    for size, step in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size > 1 and step != stride:
            raise ValueError(f"{name} must be contiguous within an image; call {name}.contiguous()")
        stride *= size


def check_images(images: Tensor, settings: Settings) -> None:
    """Raise TypeError or ValueError for a batch of images that cannot be mixed."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
    check_tensor("images", images, IMAGE_DTYPES, images.device)
    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] == 0:
        raise ValueError(f"images must be [B, C, H, W] with at least one image, got {show(images)}")
    channels, height, width = images.shape[1:]
    patch = settings.patch_size
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"images must have sides that are multiples of patch_size {patch}, got {height}x{width}")
    check_grid(height // patch, width // patch)
    check_grid_cell(settings, height // patch, width // patch)
    if settings.mean:
        if len(settings.mean) != channels:
            raise ValueError(
                f"mean and std must have one value for each of the {channels} channels, got {settings.mean}"
            )
        if images.dtype == torch.uint8 and max(settings.mean) <= 1 and max(settings.std) < 1:
            raise ValueError(
                f"mean and std must be in the units of uint8 images, 0 to 255, got {settings.mean} and {settings.std}; "
                "multiply statistics of the range 0 to 1 by 255"
            )
        if images.dtype == torch.uint8 and max(map(abs, settings.mean)) > 256:
            raise ValueError(f"mean must be between -256 and 256 for uint8 images, got {settings.mean}")
    if settings.erase_prob > 0 and images.dtype == torch.uint8 and not settings.mean:
        raise ValueError("mean and std must be given where uint8 images are erased: erased pixels are normalised ones")
    if channels * height * width >= 2**31:
        raise ValueError(f"images must have fewer than 2**31 values each, got {channels * height * width}")


def check_labels(
    labels: Tensor,
    batch: int,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    num_classes: int | None = None,
    multi_label: bool = False,
) -> None:
    """Raise TypeError or ValueError for labels that are neither class numbers [B] nor rows [B, K].

    Args:
        dtypes: of class numbers. Rows may also be of any float dtype.
        num_classes: K; None: any.
        multi_label: rows are wanted, of yes or no for each class.
    """
    if isinstance(labels, Tensor) and labels.dim() == 2:
        classes = labels.shape[1] if num_classes is None else num_classes
        what = ", one class number for each image, or [B, num_classes], one value for each class"
        if labels.shape != (batch, classes) or classes == 0:
            raise ValueError(f"labels must be [{batch}]{what}, here [{batch}, {max(classes, 1)}], got {show(labels)}")
        check_tensor("labels", labels, FLOATS + LABEL_DTYPES, device)
        if classes > 1 and labels.stride(1) != 1:
            raise ValueError("labels must be contiguous within a row; call labels.contiguous()")
        return
    check_tensor("labels", labels, dtypes, device, (batch,), ", one class number for each image")
    if multi_label:
        raise ValueError(
            f"labels must be [B, num_classes] where multi_label is True, one value for each class, got {show(labels)}; "
            "leave it out for class numbers"
        )


def check_partner(partner: Tensor, batch: int, device: torch.device) -> None:
    """Raise TypeError or ValueError for partners that are not indices [B]."""
    check_tensor("partner", partner, ROW_DTYPES, device, (batch,), ", one for each image", contiguous=True)


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int], device: torch.device) -> None:
    """Raise TypeError or ValueError for a token mask that is not bool [B, Gh, Gw]."""
    check_tensor("mask", mask, (torch.bool,), device, (batch, *grid), ", the token grid", contiguous=True)


def check_evidence(evidence: Evidence, batch: int, device: torch.device) -> None:
    """Raise TypeError or ValueError for maps of an unknown form, or for boxes and the like without maps."""
    maps, indices = evidence.maps, evidence.indices
    if maps is None:
        for name in ("boxes", "ids", "flips", "affines"):
            if getattr(evidence, name) is not None:
                raise ValueError(f"{name} must come with maps, which say what part of its evidence an image shows")
        return
    check_tensor("maps", maps, MAP_DTYPES, device)
    if maps.dim() not in (3, 4) or (indices is not None and maps.dim() != 4):
        raise ValueError(
            f"maps must be [B, h, w], [B, K, h, w], TopKMaps([B, k, h, w], [B, k, h, w]) or a packed "
            f"[B, 3, k, h, w] in place of labels, got {show(maps)}"
        )
    if not all(1 <= side <= LARGEST_MAP for side in maps.shape[-2:]) or maps.shape[1] == 0:
        raise ValueError(f"maps must be between 1x1 and {LARGEST_MAP}x{LARGEST_MAP} cells, got {show(maps)}")
    check_inner("maps", maps)
    if indices is not None:
        check_tensor("indices", indices, INDEX_DTYPES, device, tuple(maps.shape), ", the shape of the values")
        check_inner("indices", indices)
    if evidence.ids is not None:
        check_tensor("ids", evidence.ids, ROW_DTYPES, device, (batch,), ", one row of maps for each image", True)
    elif maps.shape[0] != batch:
        raise ValueError(f"maps must be of the same {batch} images, got maps of {maps.shape[0]}")
    if evidence.affines is not None:
        if evidence.boxes is not None or evidence.flips is not None:
            raise ValueError("affines must not be given together with boxes or flips, which they hold")
        check_tensor("affines", evidence.affines, (torch.float32,), device, (batch, 2, 3), contiguous=True)
    if evidence.boxes is not None:
        what = ", one (x0, y0, x1, y1) in [0, 1] for each image"
        check_tensor("boxes", evidence.boxes, FLOATS, device, (batch, 4), what)
    if evidence.flips is not None:
        check_tensor("flips", evidence.flips, (torch.bool,), device, (batch,), contiguous=True)


def check_form(
    images: Tensor,
    labels: Tensor,
    partner: Tensor | None,
    evidence: Evidence,
    mask: Tensor | None,
    settings: Settings,
    label_dtypes: tuple[torch.dtype, ...] = LABEL_DTYPES,
) -> None:
    """Raise TypeError or ValueError for the first argument of a mix whose type, shape or device is wrong."""
    check_images(images, settings)
    batch, device = images.shape[0], images.device
    check_labels(labels, batch, device, label_dtypes, settings.num_classes, settings.multi_label)
    check_evidence(evidence, batch, device)
    maps = evidence.maps
    if maps is not None and maps.dim() == 4 and evidence.indices is None and maps.shape[1] != settings.num_classes:
        raise ValueError(
            f"maps of all classes must be [B, {settings.num_classes}, h, w], got {show(maps)}; "
            "maps of the strongest classes come with their numbers, as TopKMaps"
        )
    if mask is not None:
        patch = settings.patch_size
        check_mask(mask, batch, (images.shape[2] // patch, images.shape[3] // patch), device)
    if partner is not None:
        check_partner(partner, batch, device)


def check_out(images: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    """Raise TypeError or ValueError for an `out` that the result does not fit."""
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a torch.Tensor, got {type(out).__name__}")
    if out.dtype != dtype:
        raise TypeError(f"out must be {names(dtype)}, the dtype of the result, got {names(out.dtype)}")
    check_tensor("out", out, (dtype,), images.device, tuple(images.shape), ", the shape of images")
    if has_overlap(out):
        raise ValueError("out must not be an expanded tensor: its elements overlap in memory")


def shares_memory(images: Tensor, out: Tensor) -> bool:
    """Whether `out` is `images` in memory.

    Raises:
        ValueError: they overlap in another way.
    """
    if images.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return False
    if images.data_ptr() == out.data_ptr() and images.stride() == out.stride() and images.dtype == out.dtype:
        return True
    first, last = span(images)
    out_first, out_last = span(out)
    if out_first < last and first < out_last:
        raise ValueError("out must be images itself or not overlap with it in memory")
    return False


def has_overlap(tensor: Tensor) -> bool:
    """Whether two elements of a tensor may share memory (a stride of 0, or one shorter than what lies inside it)."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def span(tensor: Tensor) -> tuple[int, int]:
    """First byte and the one after the last that a tensor's elements lie in."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
