"""A picture of what the run's mixer does: images, evidence, masks, mixes and targets."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from tokenmix_kernels.inputs import Evidence
from tokenmix_kernels.settings import COPY, MASK_RULES, MIXUP, Settings

from .data import Batch, to_device
from .examples import Example, as_evidence, pick_examples, token_evidence
from .teacher import cached_maps

if TYPE_CHECKING:
    from .run import Run

OWN, PARTNER, INK = "#2b6cb0", "#dd6b20", "#222222"
COLUMNS = ("image", "its evidence", "partner", "its evidence", "mask", "mixed image", "weights and target")
LIVE_COLUMNS = ("image", "partner", "mask", "mixed image", "the model's attention", "weights and target")
WEIGHTS = ("is the share of the evidence that the mix shows", "lies between area and attention")
TEACHER_COLUMN = "the teacher's maps"  # beside the attention, where there are any


def title_of(example: Example, settings: Settings) -> str:
    """What was done to a sample, in a few words."""
    if example.kind == COPY:
        return "not mixed"
    if example.kind == MIXUP:
        return f"Mixup, lam {example.weights[0]:.2f}"
    names = {rule.kind: name for name, rule in MASK_RULES.items()}
    return f"{names[example.kind]}: {example.areas()[1]:.0%} from the partner"


def mix_picture(run: "Run", path: Path, rows: int = 6) -> Path:
    """Draw some samples of a training batch as the run mixes them: images, evidence, mask, mix, weights and target.

    Args:
        run: data, evidence and mixer are taken from it.
        path: of the picture to write.
        rows: number of samples, each of another draw.

    Returns:
        The path.
    """
    batch = to_device(run.loader.preview(max(rows, run.args.batch_size)), run.mix_device)
    evidence = as_evidence(run.evidence(batch))
    examples = pick_examples(run, batch, evidence, rows)
    if run.attention and (maps := cached_maps(run.args, run.data, run.mix_device)):
        evidence = as_evidence(maps(batch))
    figure = draw_figure(run, batch, evidence, examples)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def draw_figure(run: "Run", batch: Batch, evidence: Evidence, examples: list[Example]) -> Figure:
    """A row of axes for each example.

    Args:
        run: names and settings are taken from it.
        batch: that the examples were picked from.
        evidence: of the batch; with --evidence attention the teacher's maps to compare with, if there are any.
        examples: of `pick_examples`.
    """
    data, settings = run.data, run.mix.settings
    columns: tuple[str, ...] = COLUMNS
    if run.attention:
        columns = LIVE_COLUMNS if evidence.maps is None else (*LIVE_COLUMNS[:-1], TEACHER_COLUMN, LIVE_COLUMNS[-1])
    grid = (examples[0].taken.shape[0], examples[0].taken.shape[1])
    maps = token_evidence(evidence, batch.labels, grid)
    images = to_pixels(batch.images.float() / 255)
    names = [data.classes[int(label)] for label in batch.labels]
    figure = Figure(figsize=(2 * len(columns) + 1.5, 2.05 * len(examples) + 1.75), facecolor="white")
    top, bottom = 1 - 1.3 / figure.get_figheight(), 0.45 / figure.get_figheight()
    axes = figure.subplots(
        len(examples),
        len(columns),
        squeeze=False,
        gridspec_kw={
            "width_ratios": [*[1] * (len(columns) - 1), 1.75],
            "left": 0.012,
            "right": 0.988,
            "top": top,
            "bottom": bottom,
            "wspace": 0.08,
            "hspace": 0.26,
        },
    )
    for column, title in enumerate(columns):
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
    rules = {rule.kind: rule for rule in MASK_RULES.values()}
    for line, example in zip(axes, examples, strict=True):
        i, j, taken = example.own, example.partner, example.taken.numpy()
        tokens = example.kind in rules and rules[example.kind].whole_tokens
        mixed = to_pixels(example.mixed[None])[0]
        draw_image(line[0], images[i], names[i], OWN)
        if run.attention:
            draw_image(line[1], images[j], names[j], PARTNER)
            shown = line[2:4]
        else:
            draw_evidence(line[1], images[i], maps[i].numpy(), 1 - taken, OWN, tokens)
            draw_image(line[2], images[j], names[j], PARTNER)
            draw_evidence(line[3], images[j], maps[j].numpy(), taken, PARTNER, tokens)
            shown = line[4:6]
        draw_mask(shown[0], taken, title_of(example, settings))
        draw_image(shown[1], mixed, "", INK)
        if tokens:
            draw_outline(shown[1], taken, settings.patch_size)
        bars = [("area", example.areas())]
        if example.attention is not None:
            bars.append(("attention", draw_shares(line[4], mixed, example.attention.numpy(), taken, tokens)))
            if evidence.maps is not None:
                both = (1 - taken) * maps[i].numpy() + taken * maps[j].numpy()
                bars.append(("teacher", draw_shares(line[5], mixed, both, taken, tokens)))
        draw_weights(line[-1], example, bars, names[i], names[j])
    figure.text(
        0.012,
        1 - 0.3 / figure.get_figheight(),
        headline(run),
        ha="left",
        va="center",
        fontsize=16,
        weight="bold",
        color=INK,
    )
    figure.text(
        0.012,
        1 - 0.57 / figure.get_figheight(),
        f"{data.name}, evidence from {run.evidence_name().split(' (')[0]}.  Blue: the image and its label.  "
        f"Orange: its partner.  A weight {WEIGHTS[run.attention is not None]}; where it blends, lam.",
        ha="left",
        va="center",
        fontsize=9.5,
        color="#555555",
    )
    figure.text(
        0.012,
        0.16 / figure.get_figheight(),
        f"{len(examples)} draws of the run's mixer (--mixer {run.args.mixer}, mode {settings.mode}, label smoothing "
        f"{settings.label_smoothing:g}), of each the sample whose weights differ most from area shares.",
        ha="left",
        va="center",
        fontsize=9,
        color="#555555",
    )
    return figure


def headline(run: "Run") -> str:
    """The head of the picture: what the run's targets follow."""
    if run.args.mixer == "none":
        return "Images are not mixed"
    if run.attention:
        return "Targets follow the attention of the model that is trained"
    return (
        "Targets follow the area"
        if run.evidence.describe() == "area shares"
        else "Targets follow the evidence, not the area"
    )


def to_pixels(images: Tensor) -> np.ndarray[Any, Any]:
    """[B, 3, H, W] in [0, 1] to [B, H, W, 3] for imshow."""
    return images.float().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def draw_frame(axis: Any, colour: str = "#bbbbbb", width: float = 0.8) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(edgecolor=colour, linewidth=width)


def draw_image(axis: Any, image: np.ndarray[Any, Any], title: str, colour: str) -> None:
    axis.imshow(image, interpolation="nearest")
    axis.set_title(title, fontsize=9, color=colour, pad=3)
    draw_frame(axis, colour, 1.8 if title else 0.8)


def draw_evidence(
    axis: Any,
    image: np.ndarray[Any, Any],
    evidence: np.ndarray[Any, Any],
    kept: np.ndarray[Any, Any],
    colour: str,
    outlined: bool,
) -> None:
    """The map over the grey image; what the mix does not show is veiled, what it shows adds up to the title."""
    height, width = image.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
    # Opacity follows the heat, so that the picture stays visible where there is no evidence.
    strength = evidence / max(float(evidence.max()), 1e-12)
    options: dict[str, Any] = {"extent": extent, "interpolation": "nearest", "vmin": 0, "vmax": 1}
    axis.imshow(strength, cmap="inferno", alpha=0.3 + 0.6 * strength, **options)
    axis.imshow(np.ones(kept.shape), cmap="gray", alpha=0.66 * (1 - kept), **options)
    if outlined:
        draw_outline(axis, kept, width // kept.shape[1], colour)
    axis.set_title(f"{float((evidence * kept).sum()):.0%} of it shown", fontsize=9, color=colour, pad=3)
    draw_frame(axis)


def draw_shares(
    axis: Any, image: np.ndarray[Any, Any], evidence: np.ndarray[Any, Any], taken: np.ndarray[Any, Any], outlined: bool
) -> tuple[float, float]:
    """Evidence over the mixed image; returns own and partner's share of it, which the title says too."""
    height, width = image.shape[:2]
    strength = evidence / max(float(evidence.max()), 1e-12)
    axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1)
    axis.imshow(
        strength,
        cmap="inferno",
        alpha=0.3 + 0.6 * strength,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    if outlined:
        draw_outline(axis, taken, width // taken.shape[1])
    partner = float((evidence * taken).sum() / max(float(evidence.sum()), 1e-12))
    axis.set_title(f"{1 - partner:.0%} own, {partner:.0%} partner's", fontsize=9, color=INK, pad=3)
    draw_frame(axis)
    return 1 - partner, partner


def draw_mask(axis: Any, taken: np.ndarray[Any, Any], title: str) -> None:
    colours = LinearSegmentedColormap.from_list("sides", [OWN, PARTNER])
    axis.imshow(taken, cmap=colours, vmin=0, vmax=1, alpha=0.85)
    grid_h, grid_w = taken.shape
    axis.set_xticks(np.arange(0.5, grid_w - 1), minor=True)
    axis.set_yticks(np.arange(0.5, grid_h - 1), minor=True)
    axis.grid(which="minor", color="white", linewidth=0.7)
    axis.tick_params(which="minor", length=0)
    axis.set_title(title, fontsize=9, color=INK, pad=3)
    draw_frame(axis)


def draw_outline(axis: Any, mask: np.ndarray[Any, Any], patch: int, colour: str = "white") -> None:
    """Lines where own and partner tokens meet."""
    down = np.argwhere(mask[1:] != mask[:-1])
    right = np.argwhere(mask[:, 1:] != mask[:, :-1])
    for y, x in down:
        axis.plot([x * patch - 0.5, (x + 1) * patch - 0.5], [(y + 1) * patch - 0.5] * 2, color=colour, lw=1.1)
    for y, x in right:
        axis.plot([(x + 1) * patch - 0.5] * 2, [y * patch - 0.5, (y + 1) * patch - 0.5], color=colour, lw=1.1)


def draw_weights(
    axis: Any, example: Example, shares: list[tuple[str, tuple[float, float]]], own: str, other: str
) -> None:
    """Bars of own and partner's share: by `shares`, and the weights; and the target that follows from the weights."""
    bars = [*shares, ("weights", example.weights)]
    for y, (name, (a, b)) in enumerate(bars):
        faded = 1.0 if name == "weights" else 0.35
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
    axis.set(xlim=(-0.42, max(1.35, sum(example.weights) + 0.05)), ylim=(len(bars) - 0.25, -0.75))
    axis.plot([1, 1], [-0.45, len(bars) - 0.55], color="#999999", lw=0.8, ls=":")
    axis.set_title(
        f"target  {example.targets[0]:.2f} {own}   {example.targets[1]:.2f} {other}", fontsize=9.5, color=INK, pad=3
    )
    axis.set_axis_off()
