"""A picture in which one sees that targets follow the evidence and not the area."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from tokenmix_kernels import TopKMaps, tokenmix
from tokenmix_kernels.inputs import Evidence
from tokenmix_kernels.reference import pool_tokens

from .data import to_device

if TYPE_CHECKING:
    from .run import Run

OWN, PARTNER, INK = "#2b6cb0", "#dd6b20", "#222222"
COLUMNS = ("image", "its evidence", "partner", "its evidence", "mask", "mixed image", "weights of the target")


def mix_picture(run: Run, path: Path, rows: int = 6) -> Path | None:
    """Draw some pairs of the first training batch: images, evidence, mask, mix, and what the target makes of it.

    Shown are the pairs whose target by evidence differs most from the one by area.

    Args:
        run: data, evidence and mixer are taken from it.
        path: of the picture to write.
        rows: number of pairs.

    Returns:
        The path, or None if the run's mixer has no token masks.
    """
    args, data = run.args, run.data
    if args.mixer not in ("tokenmix", "cutmix"):
        return None
    batch = to_device(run.loader.preview(max(rows, args.batch_size)), run.device)
    places = run.evidence(batch)
    patch = run.mix.settings.patch_size
    mixed = tokenmix(
        batch.images.float() / 255,
        batch.labels,
        num_classes=len(data.classes),
        **places,
        patch_size=patch,
        minimum_tokens=args.minimum_tokens,
        mode="elem",
        seed=args.seed,
        mask_type="cutmix" if args.mixer == "cutmix" else args.mask_type,
    )
    masks = mixed.mask.cpu()  # [B, Gh, Gw]
    weights = mixed.weights.cpu()  # [B, 2]
    partner = torch.arange(len(batch.labels)).flip(0)
    area = masks.float().mean((1, 2))
    areas = torch.stack([1 - area, area], 1)
    evidence = token_evidence(places, batch.labels, (masks.shape[1], masks.shape[2]))
    chosen = (weights - areas).abs().sum(1).argsort(descending=True, stable=True)
    first_of_pair = [int(i) for i in chosen if int(batch.labels[i]) != int(batch.labels[partner[i]])]
    shown = (first_of_pair + [int(i) for i in chosen if int(i) not in first_of_pair])[:rows]

    images, outputs = to_pixels(batch.images.float() / 255), to_pixels(mixed.images)
    names = [data.classes[int(label)] for label in batch.labels]
    figure = Figure(figsize=(15.5, 2.05 * len(shown) + 1.75), facecolor="white")
    top, bottom = 1 - 1.3 / figure.get_figheight(), 0.45 / figure.get_figheight()
    axes = figure.subplots(
        len(shown),
        len(COLUMNS),
        squeeze=False,
        gridspec_kw={
            "width_ratios": [1, 1, 1, 1, 1, 1, 1.75],
            "left": 0.012,
            "right": 0.988,
            "top": top,
            "bottom": bottom,
            "wspace": 0.08,
            "hspace": 0.26,
        },
    )
    for column, title in enumerate(COLUMNS):
        box = axes[0, column].get_position()
        figure.text(
            (box.x0 + box.x1) / 2,
            top + 0.36 / figure.get_figheight(),
            title,
            ha="center",
            va="bottom",
            fontsize=11,
            color=INK,
            weight="bold",
        )
    for line, i in zip(axes, shown, strict=True):
        j = int(partner[i])
        _image(line[0], images[i], names[i], OWN)
        _evidence(line[1], images[i], evidence[i], ~masks[i], OWN)
        _image(line[2], images[j], names[j], PARTNER)
        _evidence(line[3], images[j], evidence[j], masks[i], PARTNER)
        _mask(line[4], masks[i].numpy(), float(area[i]))
        _image(line[5], outputs[i], "", INK)
        _outline(line[5], masks[i].numpy(), patch)
        _weights(line[6], areas[i].tolist(), weights[i].tolist(), names[i], names[j])
    figure.text(
        0.012,
        1 - 0.3 / figure.get_figheight(),
        "Targets follow the evidence, not the area",
        ha="left",
        va="center",
        fontsize=16,
        weight="bold",
        color=INK,
    )
    figure.text(
        0.012,
        1 - 0.57 / figure.get_figheight(),
        f"{data.name}, evidence from {run.evidence.describe().split(' (')[0]}.  Blue: tokens and label of the "
        f"image.  Orange: of its partner.  A label weighs as much as the "
        f"mix still shows of its evidence.",
        ha="left",
        va="center",
        fontsize=9.5,
        color="#555555",
    )
    figure.text(
        0.012,
        0.16 / figure.get_figheight(),
        f"The {len(shown)} pairs of the first training batch whose weights differ most from area shares. "
        "The two weights need not sum to 1: the evidence of both may survive the mix, or of neither.",
        ha="left",
        va="center",
        fontsize=9,
        color="#555555",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def token_evidence(places: dict[str, Any], labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The maps on the token grid as the targets see them, each summing to 1, [B, Gh, Gw] on the CPU."""
    if not places:
        return torch.full((len(labels), *grid), 1 / (grid[0] * grid[1]))
    maps = places["maps"]
    values, indices = maps if isinstance(maps, TopKMaps) else (maps, None)
    pooled = pool_tokens(Evidence(**{**places, "maps": values, "indices": indices}), labels.cpu(), grid)
    return (pooled / (pooled.sum((1, 2), keepdim=True) + 1e-8)).float()


def to_pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """[B, 3, H, W] in [0, 1] to [B, H, W, 3] for imshow."""
    return images.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _bare(axis: Any, colour: str = "#bbbbbb", width: float = 0.8) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=width)


def _image(axis: Any, image: np.ndarray[Any, Any], title: str, colour: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=9, color=colour, pad=3)
    _bare(axis, colour, 1.8 if title else 0.8)


def _evidence(axis: Any, image: np.ndarray[Any, Any], evidence: Tensor, kept: Tensor, colour: str) -> None:
    """The map over the grey image; what the mix does not show is veiled, what it shows adds up to the title."""
    height, width = image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
    # Opacity follows the heat, so that the picture stays visible where there is no evidence.
    strength = evidence.numpy() / max(float(evidence.max()), 1e-12)
    axis.imshow(
        strength, cmap="inferno", alpha=0.3 + 0.6 * strength, extent=extent, interpolation="nearest", vmin=0, vmax=1
    )
    axis.imshow(
        np.ones(kept.shape),
        cmap="gray",
        vmin=0,
        vmax=1,
        alpha=0.66 * (~kept).numpy(),
        extent=extent,
        interpolation="nearest",
    )
    _outline(axis, kept.numpy(), width // kept.shape[1], colour)
    axis.set_title(f"{float((evidence * kept).sum()):.0%} of it shown", fontsize=9, color=colour, pad=3)
    _bare(axis)


def _mask(axis: Any, mask: np.ndarray[Any, Any], area: float) -> None:
    axis.imshow(mask, cmap=ListedColormap([OWN, PARTNER]), vmin=0, vmax=1, alpha=0.85)
    grid_h, grid_w = mask.shape
    axis.set_xticks(np.arange(0.5, grid_w - 1), minor=True)
    axis.set_yticks(np.arange(0.5, grid_h - 1), minor=True)
    axis.grid(which="minor", color="white", linewidth=0.7)
    axis.tick_params(which="minor", length=0)
    axis.set_title(f"{area:.0%} from the partner", fontsize=9, color=INK, pad=3)
    _bare(axis)


def _outline(axis: Any, mask: np.ndarray[Any, Any], patch: int, colour: str = "white") -> None:
    """Lines where own and partner tokens meet."""
    down = np.argwhere(mask[1:] != mask[:-1])
    right = np.argwhere(mask[:, 1:] != mask[:, :-1])
    for y, x in down:
        axis.plot([x * patch - 0.5, (x + 1) * patch - 0.5], [(y + 1) * patch - 0.5] * 2, color=colour, lw=1.1)
    for y, x in right:
        axis.plot([(x + 1) * patch - 0.5] * 2, [y * patch - 0.5, (y + 1) * patch - 0.5], color=colour, lw=1.1)


def _weights(axis: Any, areas: list[float], weights: list[float], own: str, other: str) -> None:
    """Two bars, own and partner's share: by area, and by evidence."""
    for y, (name, (a, b)) in enumerate([("area", areas), ("evidence", weights)]):
        faded = 0.35 if name == "area" else 1.0
        axis.barh(y, a, color=OWN, alpha=faded, height=0.62)
        axis.barh(y, b, left=a, color=PARTNER, alpha=faded, height=0.62)
        for start, share in ((0.0, a), (a, b)):
            if share > 0.09:
                axis.text(
                    start + share / 2,
                    y,
                    f"{share:.2f}",
                    ha="center",
                    va="center",
                    fontsize=9.5,
                    color="white" if faded == 1 else INK,
                    weight="bold" if faded == 1 else "normal",
                )
        axis.text(-0.03, y, name, ha="right", va="center", fontsize=9, color=INK)
    axis.set(xlim=(-0.42, max(1.35, sum(weights) + 0.05)), ylim=(1.75, -0.75))
    axis.plot([1, 1], [-0.45, 1.45], color="#999999", lw=0.8, ls=":")
    axis.set_title(f"{weights[0]:.2f} {own}  +  {weights[1]:.2f} {other}", fontsize=9.5, color=INK, pad=3)
    axis.set_axis_off()
