"""Ranges of labels, partners, ids and boxes, and the errors for values that are not in them.

They are checked inside the operators and on a CPU only: to read a GPU's values would make the host wait for it. There
the kernels make bad values harmless: a label out of range adds nothing to the targets and counts as a label without
evidence, a partner out of range is the sample itself.
"""

import torch
from torch import Tensor

from .arguments import names
from .inputs import Evidence

__all__ = ["check_values"]

LARGEST_LABEL = 1.001  # rows that were divided by their sum may be rounded to just above 1


def check_range(name: str, values: Tensor, end: int) -> None:
    """Raise ValueError unless all values are in [0, end)."""
    listed = values.tolist()  # of a batch, less work than calls of PyTorch
    low, high = int(min(listed)), int(max(listed))
    if low < 0 or high >= end:
        raise ValueError(f"{name} must be in [0, {end}), got {low if low < 0 else high}")


def check_values(
    labels: Tensor, partner: Tensor | None, evidence: Evidence, num_classes: int | None, in_place: bool = False
) -> None:
    """Raise ValueError for the first value that is out of its range. Tensors must be on the CPU.

    Args:
        labels: [B]; their range is [0, num_classes), or free where num_classes is None. Or [B, K], values in [0, 1].
        partner: [B] in [0, B), its own inverse where the mix is in place.
        evidence: ids are rows of the maps, boxes (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1, affines invertible.
    """
    batch = labels.shape[0]
    if labels.dim() == 2:
        check_rows(labels)
    elif labels.is_floating_point() and not (labels == labels.round()).all():
        raise ValueError("labels must be whole class numbers, got fractions in the packed label maps")
    if num_classes is not None and labels.dim() == 1:
        check_range("labels", labels, num_classes)
    if partner is not None:
        check_range("partner", partner, batch)
        own = torch.arange(batch, dtype=partner.dtype, device=partner.device)
        if in_place and not torch.equal(partner[partner.long()], own):
            raise ValueError("partner must be its own inverse (partner[partner[i]] == i) where out is images")
    if evidence.ids is not None and evidence.maps is not None:
        check_range("ids", evidence.ids, evidence.maps.shape[0])
    if evidence.boxes is not None:
        check_boxes(evidence.boxes.cpu().double(), evidence.box_format)
    if evidence.affines is not None:
        check_affines(evidence.affines.cpu().double())


def check_rows(labels: Tensor) -> None:
    """Raise ValueError unless labels [B, K] are shares of classes or yes or no for each: in [0, 1]."""
    low, high = (float(value) for value in torch.aminmax(labels.byte() if labels.dtype == torch.bool else labels))
    if not (low >= 0 and high <= LARGEST_LABEL):
        raise ValueError(
            f"labels of {names(labels.dtype)} [B, num_classes] must be in [0, 1], got values from {low:g} to {high:g}"
        )


def check_boxes(boxes: Tensor, box_format: str) -> None:
    """Raise ValueError for crop boxes [B, 4] that are not inside the image."""
    low, high = boxes[:, :2], boxes[:, 2:] if box_format == "xyxy" else boxes[:, :2] + boxes[:, 2:]
    # A crop's far end, as near end plus length, may round to just above 1.
    bad = ~((low >= 0) & (high <= (1.0 if box_format == "xyxy" else 1.001)) & (low < high)).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"boxes must be (x0, y0, x1, y1) with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got "
            f"{[round(value, 4) for value in boxes[first].tolist()]} for image {first}"
        )


def check_affines(affines: Tensor) -> None:
    """Raise ValueError for affines [B, 2, 3] that are not finite and invertible."""
    if not affines.isfinite().all():
        raise ValueError("affines must be finite")
    singular = affines[:, 0, 0] * affines[:, 1, 1] == affines[:, 0, 1] * affines[:, 1, 0]
    if singular.any():
        first = int(singular.nonzero()[0])
        raise ValueError(f"affines must be invertible, got {affines[first].tolist()} for image {first}")
