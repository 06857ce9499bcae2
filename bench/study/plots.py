"""Plots of a study's figures."""

from pathlib import Path
from typing import Any

from tokenmix_kernels.extras import require

__all__ = ["accuracy_plot", "occlusion_plot"]

# Okabe and Ito's colours, which stay apart for colour-blind eyes; the baseline is black.
COLOURS = ("#000000", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DODGE = 1.075  # factor between neighbouring mixers' places on the axis of epochs, so that ranges do not overlap
SHIFT = 0.9  # of neighbouring mixers on the axis of blanked tokens, in percent


def style(summary: dict[str, Any], mixer: str) -> dict[str, Any]:
    """Colour, marker and line of a mixer, the same in all plots."""
    place = summary["mixers"].index(mixer)
    line = "--" if mixer == summary["baseline"] else "-"
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "linestyle": line}


def canvas(rows: int, columns: int, height: float) -> tuple[Any, Any, Any]:
    """Pyplot, a figure and its axes [rows, columns], which share their y axis."""
    pyplot = require("matplotlib.pyplot", extra="maps")
    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(1.2 + 3.0 * max(columns, 2), height),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat:
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return pyplot, figure, axes


def legend(summary: dict[str, Any], pyplot: Any, figure: Any) -> None:
    """Name every mixer once, above all panels."""
    seen = [name for name in summary["mixers"] if any(name in setting["mixers"] for setting in summary["settings"])]
    handles = [pyplot.Line2D([], [], label=name, markersize=5, **style(summary, name)) for name in seen]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(seen), frameon=False, fontsize=9)


def panels(summary: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The settings of each panel, by its title."""
    found: dict[str, list[dict[str, Any]]] = {}
    several = len({setting["model"] for setting in summary["settings"]}) > 1
    for setting in summary["settings"]:
        title = f"{100 * setting['label_fraction']:g} % of the labels\n{setting['train_images']:,} training images"
        found.setdefault(f"{setting['model']} model, {title}" if several else title, []).append(setting)
    return found


def accuracy_plot(summary: dict[str, Any], path: Path) -> None:
    """Test accuracy against epochs: a panel for each share of labels, mean and range over seeds of each mixer."""
    groups = panels(summary)
    pyplot, figure, axes = canvas(1, len(groups), 3.9)
    ticks = sorted({setting["epochs"] for setting in summary["settings"]})
    for ax, (title, settings) in zip(axes[0], groups.items(), strict=True):
        for place, mixer in enumerate(summary["mixers"]):
            shift = DODGE ** (place - (len(summary["mixers"]) - 1) / 2)
            points = [(s["epochs"] * shift, s["mixers"][mixer]["top1"]) for s in settings if mixer in s["mixers"]]
            if not points:
                continue
            look = style(summary, mixer)
            xs, means = [x for x, _ in points], [top1["mean"] for _, top1 in points]
            ax.plot(xs, means, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
            for x, top1 in points:
                one = len(top1["values"]) == 1
                ax.vlines(x, min(top1["values"]), max(top1["values"]), color=look["color"], linewidth=1.2)
                face = "white" if one else look["color"]
                ax.plot(x, top1["mean"], look["marker"], color=look["color"], markerfacecolor=face, markersize=5.5)
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.set_xlim(ticks[0] / 1.4, ticks[-1] * 1.4)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("epochs of training")
    axes[0, 0].set_ylabel("test top-1, %")
    legend(summary, pyplot, figure)
    figure.supxlabel(
        "filled: mean of the seeds, with a line from the lowest to the highest; open: one seed",
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def occlusion_plot(summary: dict[str, Any], path: Path) -> None:
    """Top-1 against the share of blanked tokens, for each share of labels at its longest training."""
    groups = panels(summary)
    pyplot, figure, axes = canvas(2, len(groups), 6.2)
    for column, (title, settings) in enumerate(groups.items()):
        longest = max(settings, key=lambda setting: setting["epochs"])
        axes[0, column].set_title(f"{title.splitlines()[0]}, {longest['epochs']} epochs", fontsize=10)
        axes[1, column].set_xlabel("blanked tokens, %")
        for row, order in enumerate(("random", "evidence")):
            ax = axes[row, column]
            ax.axhline(summary["largest_class"], color="#888888", linestyle=":", linewidth=1.2, zorder=1)
            for mixer, figures in longest["mixers"].items():
                shift = SHIFT * (summary["mixers"].index(mixer) - (len(summary["mixers"]) - 1) / 2)
                shares = [100 * share + shift for share in figures["occlusion"]["shares"]]
                tops = list(zip(*figures["occlusion"][order], strict=True))  # [shares][seeds]
                look = style(summary, mixer)
                ax.plot(shares, [sum(top) / len(top) for top in tops], markersize=4, linewidth=1.2, **look)
                ax.vlines(shares, [*map(min, tops)], [*map(max, tops)], color=look["color"], linewidth=1)
            ax.set_xticks(range(0, 101, 20))
    axes[0, 0].set_ylabel("random tokens\ntest top-1, %")
    axes[1, 0].set_ylabel("most evidence first\ntest top-1, %")
    legend(summary, pyplot, figure)
    note = "mean of the seeds, with a line from the lowest to the highest; dotted: always guessing the largest class"
    figure.supxlabel(note, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)
