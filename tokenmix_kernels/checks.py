"""What an input must look like, asked before anything is computed, and said in one sentence that names the argument.

Values are looked at on a CPU only; to look at a GPU's would make the host wait for it. There the kernels make bad
values harmless: a label out of range adds nothing to the targets and counts as a label without evidence, and a partner
out of range is the sample itself.
"""

from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .settings import MASK_TYPES, MODES, Settings

__all__ = ["check_boxes", "check_grid", "check_images", "check_maps", "check_out", "check_partner", "check_settings"]

LONGEST_GRID = 64
LARGEST_MAP = 64
IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
MAP_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32)
LABEL_DTYPES = (torch.int64, torch.int32)


def shape_of(tensor: Tensor) -> str:
    return f"{list(tensor.shape)}"


def names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def without_grad(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require grad: mixing is not differentiable; use {name}.detach() or no_grad()"
        )


def is_number(name: str, value: Any, low: float, high: float, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} must be {what}, got {value!r}")


def is_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be a whole number of at least {low}, got {value!r}")


def as_numbers(name: str, values: Any) -> tuple[float, ...]:
    """A sequence, array or tensor of numbers as a tuple; nothing where it is None."""
    if values is None:
        return ()
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be a sequence of numbers, got {values!r}") from error


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def check_settings(settings: Settings) -> None:
    """Raise ValueError for a setting out of its range."""
    is_count("num_classes", settings.num_classes, 1)
    is_count("patch_size", settings.patch_size, 1)
    is_count("minimum_tokens", settings.minimum_tokens, 0)
    one_of("mask_type", settings.mask_type, tuple(MASK_TYPES))
    one_of("mode", settings.mode, tuple(MODES))
    if settings.lam != -1.0:
        is_number("lam", settings.lam, 0, 1, "the share to keep, in [0, 1], or 'beta'")
    for name in ("prob", "switch_prob"):
        is_number(name, getattr(settings, name), 0, 1, "a probability in [0, 1]")
    is_number("label_smoothing", settings.label_smoothing, 0, 1, "in [0, 1]")
    for name in ("mixup_alpha", "cutmix_alpha"):
        is_number(name, getattr(settings, name), 0, 1000, "in [0, 1000]; 0 switches the branch off")
    if settings.mixup_alpha == 0 and settings.cutmix_alpha == 0:
        raise ValueError("one of mixup_alpha and cutmix_alpha must be above 0, else there is nothing to mix")
    if settings.minmax and not (len(settings.minmax) == 2 and 0 <= settings.minmax[0] <= settings.minmax[1] <= 1):
        raise ValueError(f"cutmix_minmax must be two shares in [0, 1], the smaller first, got {settings.minmax}")
    if len(settings.mean) != len(settings.std):
        raise ValueError("mean and std must be given together and have one value for each channel")
    if not all(isfinite(value) for value in settings.mean):
        raise ValueError(f"mean must be finite, got {settings.mean}")
    if not all(isfinite(value) and value > 0 for value in settings.std):
        raise ValueError(f"std must be above 0, got {settings.std}")


def check_grid(grid_h: int, grid_w: int) -> None:
    """Raise ValueError for a token grid that the kernels' masks do not hold."""
    if not (1 <= grid_h <= LONGEST_GRID and 1 <= grid_w <= LONGEST_GRID):
        raise ValueError(
            f"the token grid must be between 1x1 and {LONGEST_GRID}x{LONGEST_GRID}, got {grid_h}x{grid_w}; "
            "use a larger patch_size"
        )


def check_images(images: Tensor, settings: Settings) -> None:
    """Raise TypeError or ValueError for a batch of images that cannot be mixed."""
    is_tensor("images", images)
    if images.dim() != 4 or images.shape[0] == 0 or images.shape[1] == 0:
        raise ValueError(f"images must be [B, C, H, W] with at least one image, got {shape_of(images)}")
    if images.dtype not in IMAGE_DTYPES:
        raise TypeError(f"images must be one of {names(IMAGE_DTYPES)}, got {names((images.dtype,))}")
    channels, height, width = images.shape[1:]
    patch = settings.patch_size
    if height % patch or width % patch or not height or not width:
        raise ValueError(f"images must have sides that are multiples of patch_size {patch}, got {height}x{width}")
    check_grid(height // patch, width // patch)
    if settings.mean and len(settings.mean) != channels:
        raise ValueError(f"mean and std must have one value for each of the {channels} channels, got {settings.mean}")
    without_grad("images", images)
    if channels * height * width >= 2**31:
        raise ValueError(f"images must have fewer than 2**31 values each, got {channels * height * width}")


def check_labels(
    labels: Tensor, images_or_maps: Tensor, classes: int | None, dtypes: tuple[torch.dtype, ...] = LABEL_DTYPES
) -> None:
    """Raise TypeError or ValueError for labels that do not fit; `classes` None leaves their range alone."""
    is_tensor("labels", labels)
    batch = images_or_maps.shape[0]
    if labels.dtype not in dtypes:
        raise TypeError(f"labels must be class numbers of {names(dtypes)}, got {names((labels.dtype,))}")
    if labels.shape != (batch,):
        raise ValueError(f"labels must be [{batch}], one for each image, got {shape_of(labels)}")
    same_device("labels", labels, images_or_maps)
    if classes is not None and readable(labels):
        low, high = (int(end) for end in torch.aminmax(labels))
        if low < 0 or high >= classes:
            raise ValueError(f"labels must be in [0, {classes}), got {low if low < 0 else high}")


def check_maps(maps: Tensor, indices: Tensor | None, batch: int, device_of: Tensor, ids: Tensor | None = None) -> None:
    """Raise TypeError or ValueError for activation maps of an unknown form, or ids that are not rows of them."""
    is_tensor("maps", maps)
    if maps.dtype not in MAP_DTYPES:
        raise TypeError(f"maps must be one of {names(MAP_DTYPES)}, got {names((maps.dtype,))}")
    if maps.dim() not in (3, 4) or (indices is not None and maps.dim() != 4):
        raise ValueError(
            f"maps must be [B, h, w], [B, K, h, w], TopKMaps([B, k, h, w], [B, k, h, w]) or a packed "
            f"[B, 3, k, h, w] in place of labels, got {shape_of(maps)}"
        )
    if ids is not None:
        check_ids(ids, batch, maps)
    elif maps.shape[0] != batch:
        raise ValueError(f"maps must be of the same {batch} images, got maps of {maps.shape[0]}")
    if not all(1 <= side <= LARGEST_MAP for side in maps.shape[-2:]) or maps.shape[1] == 0:
        raise ValueError(f"maps must be between 1x1 and {LARGEST_MAP}x{LARGEST_MAP} cells, got {shape_of(maps)}")
    inner_contiguous("maps", maps)
    without_grad("maps", maps)
    same_device("maps", maps, device_of)
    if indices is not None:
        is_tensor("indices", indices)
        if indices.dtype not in INDEX_DTYPES:
            raise TypeError(f"indices must be class numbers of {names(INDEX_DTYPES)}, got {names((indices.dtype,))}")
        if indices.shape != maps.shape:
            raise ValueError(f"indices must have the shape of the values {shape_of(maps)}, got {shape_of(indices)}")
        inner_contiguous("indices", indices)
        same_device("indices", indices, device_of)


def check_ids(ids: Tensor, batch: int, maps: Tensor) -> None:
    """Raise TypeError or ValueError for ids that are not rows of the maps."""
    is_tensor("ids", ids)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32 rows of maps, got {names((ids.dtype,))}")
    if ids.shape != (batch,) or not ids.is_contiguous():
        raise ValueError(f"ids must be a contiguous [{batch}], one row of maps for each image, got {shape_of(ids)}")
    same_device("ids", ids, maps)
    if readable(ids):
        low, high = (int(end) for end in torch.aminmax(ids))
        if low < 0 or high >= maps.shape[0]:
            raise ValueError(f"ids must be in [0, {maps.shape[0]}), got {low if low < 0 else high}")


def check_places(
    boxes: Tensor | None,
    flips: Tensor | None,
    affines: Tensor | None,
    batch: int,
    device_of: Tensor,
    box_format: str = "xyxy",
) -> None:
    """Raise TypeError or ValueError for boxes, flips or affines that do not say where in its map an image lies."""
    if affines is not None:
        if boxes is not None or flips is not None:
            raise ValueError("affines must not be given together with boxes or flips, which they hold")
        check_affines(affines, batch, device_of)
    if boxes is not None:
        check_boxes(boxes, batch, device_of, box_format)
    if flips is not None:
        is_tensor("flips", flips)
        if flips.dtype != torch.bool or flips.shape != (batch,) or not flips.is_contiguous():
            raise ValueError(f"flips must be a contiguous bool [{batch}], got {flips.dtype} {shape_of(flips)}")
        same_device("flips", flips, device_of)


def check_affines(affines: Tensor, batch: int, device_of: Tensor) -> None:
    """Raise TypeError or ValueError for affines that are not float32 [B, 2, 3], finite and invertible."""
    is_tensor("affines", affines)
    if affines.dtype != torch.float32:
        raise TypeError(f"affines must be float32, got {names((affines.dtype,))}")
    if affines.shape != (batch, 2, 3) or not affines.is_contiguous():
        raise ValueError(f"affines must be a contiguous [{batch}, 2, 3], got {shape_of(affines)}")
    same_device("affines", affines, device_of)
    without_grad("affines", affines)
    if readable(affines):
        if not affines.isfinite().all():
            raise ValueError("affines must be finite")
        singular = affines[:, :, :2].det() == 0
        if singular.any():
            first = int(singular.nonzero()[0])
            raise ValueError(f"affines must be invertible, got {affines[first].tolist()} for image {first}")


def check_boxes(boxes: Tensor, batch: int, device_of: Tensor, box_format: str = "xyxy") -> None:
    """Raise TypeError or ValueError for crop boxes that are not (x0, y0, x1, y1) in [0, 1]."""
    is_tensor("boxes", boxes)
    if boxes.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"boxes must be floating point, relative to the image, got {names((boxes.dtype,))}")
    if boxes.shape != (batch, 4):
        raise ValueError(f"boxes must be [{batch}, 4], one (x0, y0, x1, y1) for each image, got {shape_of(boxes)}")
    same_device("boxes", boxes, device_of)
    without_grad("boxes", boxes)
    if readable(boxes):
        low, high = boxes[:, :2], boxes[:, 2:] if box_format == "xyxy" else boxes[:, :2] + boxes[:, 2:]
        # A crop's far end, as near end plus length, may round to just above 1.
        bad = ~((low >= 0) & (high <= 1 + 1e-3) & (low < high)).all(1)
        if box_format == "xyxy":
            bad |= (high > 1).any(1)
        if bad.any():
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"boxes must be (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got "
                f"{[round(value, 4) for value in boxes[first].tolist()]} for image {first}"
            )


def check_mask(mask: Tensor, batch: int, grid: tuple[int, int], device_of: Tensor) -> None:
    """Raise TypeError or ValueError for a token mask that is not bool [B, Gh, Gw]."""
    is_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, True where the token comes from the partner, got {names((mask.dtype,))}")
    if mask.shape != (batch, *grid):
        raise ValueError(f"mask must be [{batch}, {grid[0]}, {grid[1]}], the token grid, got {shape_of(mask)}")
    if not mask.is_contiguous():
        raise ValueError("mask must be contiguous; call mask.contiguous()")
    same_device("mask", mask, device_of)


def check_partner(partner: Tensor, batch: int, device_of: Tensor, in_place: bool = False) -> None:
    """Raise TypeError or ValueError for partners that are not indices into the batch."""
    is_tensor("partner", partner)
    if partner.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"partner must be int64 or int32 indices into the batch, got {names((partner.dtype,))}")
    if partner.shape != (batch,) or not partner.is_contiguous():
        raise ValueError(f"partner must be a contiguous [{batch}], one for each image, got {shape_of(partner)}")
    same_device("partner", partner, device_of)
    if readable(partner):
        low, high = (int(end) for end in torch.aminmax(partner))
        if low < 0 or high >= batch:
            raise ValueError(f"partner must be in [0, {batch}), got {low if low < 0 else high}")
        if in_place and not torch.equal(partner[partner.long()].long(), torch.arange(batch)):
            raise ValueError("partner must be its own inverse (partner[partner[i]] == i) where out is images")


def check_out(images: Tensor, out: Tensor, dtype: torch.dtype, settings: Settings) -> None:
    """Raise TypeError or ValueError for an `out` that the result does not fit, or that overlaps with `images`."""
    is_tensor("out", out)
    if out.dtype != dtype:
        raise TypeError(f"out must be {names((dtype,))}, the dtype of the result, got {names((out.dtype,))}")
    if out.shape != images.shape:
        raise ValueError(f"out must have the shape of images {shape_of(images)}, got {shape_of(out)}")
    same_device("out", out, images)
    without_grad("out", out)
    if has_overlap(out):
        raise ValueError("out must not be an expanded tensor: its elements overlap in memory")
    if is_same(out, images):
        if settings.mean:
            raise ValueError("out must not be images where mean and std are given: only what moves is touched in place")
        return
    if in_memory(images) and out.untyped_storage().data_ptr() == images.untyped_storage().data_ptr():
        first, last = span(images)
        out_first, out_last = span(out)
        if out_first < last and first < out_last:
            raise ValueError("out must be images itself or not overlap with it in memory")


def is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements; while tracing, whether they are one tensor."""
    return one is other or (in_memory(one) and one.data_ptr() == other.data_ptr() and one.stride() == other.stride())


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


def inner_contiguous(name: str, tensor: Tensor) -> None:
    stride = 1
    for size, step in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size > 1 and step != stride:
            raise ValueError(f"{name} must be contiguous within an image; call {name}.contiguous()")
        stride *= size


def same_device(name: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device}, where the batch is, got {tensor.device}")


def readable(tensor: Tensor) -> bool:
    """Whether values can be looked at without waiting for a device, and are there at all (not while tracing)."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def in_memory(tensor: Tensor) -> bool:
    """Whether a tensor has an address (not while tracing, nor on the meta device)."""
    return type(tensor) is Tensor and not tensor.is_meta and not torch.compiler.is_compiling()
