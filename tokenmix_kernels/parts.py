"""The parts of `tokenmix` for a mix of one's own: masks alone, and weights for masks that are already there."""

import torch
from torch import Tensor

from . import arguments, dispatch, inputs
from .call import Maps, as_offset, as_seed, make_settings, named_backend
from .inputs import Evidence, TopKMaps
from .settings import as_text
from .values import check_values

__all__ = ["pool_targets", "token_mask"]


def token_mask(
    batch: int,
    grid: tuple[int, int],
    *,
    lam: float | str = 0.5,
    minimum_tokens: int | None = None,
    grid_cell: int = 4,
    mask_type: str = "block",
    mode: str = "elem",
    cutmix_alpha: float = 1.0,
    patch_size: int | tuple[int, int] = 16,
    seed: int | Tensor | None = None,
    sample_offset: int | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Draw masks alone: those that `tokenmix` draws with the same seed and settings.

    Args:
        batch: B.
        grid: (Gh, Gw), up to 64x64 tokens.
        lam, minimum_tokens, grid_cell, mask_type, mode, cutmix_alpha, seed, sample_offset, backend: as for `tokenmix`.
            Of a CutMix rectangle, the tokens that it covers by more than half.
        patch_size: side of a token in pixels, which CutMix rectangles depend on.
        device: where the masks are wanted; the seed's if not given.

    Returns:
        [B, Gh, Gw] bool, True where the token is to be taken from the partner.
    """
    batch = arguments.as_count("batch", batch, 1)
    grid_h, grid_w = arguments.as_grid(grid)
    inputs.check_grid(grid_h, grid_w)
    settings = make_settings(
        num_classes=1, patch_size=patch_size, mask_type=mask_type, mode=mode, lam=lam, minimum_tokens=minimum_tokens,
        grid_cell=grid_cell, cutmix_alpha=cutmix_alpha,
    )  # fmt: skip
    inputs.check_grid_cell(settings, grid_h, grid_w)
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    home = arguments.as_device(device)
    key = as_seed(seed, None, home)
    if key.device != home:
        key = key.to(home, non_blocking=True)
    offset = as_offset(sample_offset, batch)
    module = named_backend(backend, home)
    if module is not None:
        return module.token_mask(batch, (grid_h, grid_w), key, offset, settings).to(home)
    return dispatch.token_mask(key, offset, batch, grid_h, grid_w, as_text(settings))


def pool_targets(
    maps: Maps,
    labels: Tensor,
    mask: Tensor,
    *,
    boxes: Tensor | None = None,
    ids: Tensor | None = None,
    flips: Tensor | None = None,
    affines: Tensor | None = None,
    partner: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The weights of a mix whose masks are already there: shares of evidence, by the rule of `tokenmix`.

    Args:
        maps: [B, h, w], [B, K, h, w] or `TopKMaps`, as for `tokenmix`.
        labels: [B] class numbers of any integer dtype or bool; or [B, K], as for `tokenmix`: with maps of several
            classes each is weighed by its own map, and the mean by the labels is returned.
        mask: [B, Gh, Gw] bool, True = from the partner.
        boxes, ids, flips, affines, partner, backend: as for `tokenmix`.

    Returns:
        [B, 2] float32: what is left of the own image and of the partner.

    Raises:
        TypeError, ValueError: as `tokenmix`.
    """
    values, indices = maps if isinstance(maps, TopKMaps) else (maps, None)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 3:
        raise ValueError(f"mask must be [B, Gh, Gw], got {list(mask.shape)}")
    batch, device = mask.shape[0], mask.device
    inputs.check_grid(*mask.shape[1:])
    inputs.check_mask(mask, batch, (mask.shape[1], mask.shape[2]), device)
    if values is None:
        raise TypeError("maps must be a torch.Tensor or TopKMaps, got None")
    evidence = Evidence(values, indices, ids, boxes, flips, affines)
    inputs.check_evidence(evidence, batch, device)
    all_classes = values.shape[1] if values.dim() == 4 and indices is None else None
    inputs.check_labels(labels, batch, device, inputs.LABEL_DTYPES, all_classes)
    if partner is not None:
        inputs.check_partner(partner, batch, device)
    module = named_backend(backend, device)
    if module is not None:
        if device.type != "cuda":
            check_values(labels, partner, evidence, None)
        return module.pool_targets(evidence, labels, mask, partner)
    return dispatch.pool_targets(labels, mask, partner, *evidence)
