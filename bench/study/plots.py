"""Plots of a study's figures."""

from pathlib import Path
from typing import Any

from tokenmix_kernels.extras import require

__all__ = ["accuracy_plot", "curves_plot", "occlusion_plot"]

# Okabe and Ito's colours, which stay apart for colour-blind eyes; the baseline is black.
COLOURS = ("#000000", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DODGE = 1.02  # factor between neighbouring mixers' places on the axis of epochs, so that ranges do not overlap
ORDERS = {"random": "random tokens", "evidence": "most evidence first"}
SHIFT = 0.5  # of neighbouring mixers on the axis of blanked tokens, in percent


def style(summary: dict[str, Any], mixer: str) -> dict[str, Any]:
    """Colour, marker and line of a mixer, the same in all plots."""
    place = summary["mixers"].index(mixer)
    line = "--" if mixer == summary["baseline"] else "-"
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "linestyle": line}


def canvas(rows: int, widths: list[float], height: float) -> tuple[Any, Any, Any]:
    """Pyplot, a figure and its axes [rows, columns], columns of these widths in inches."""
    pyplot = require("matplotlib.pyplot", extra="maps")
    pyplot.switch_backend("Agg")
    figure, axes = pyplot.subplots(
        rows, len(widths), figsize=(1.2 + max(sum(widths), 5.8), height), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": widths},
    )  # fmt: skip
    for ax in axes.flat:
        ax.grid(True, color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return pyplot, figure, axes


def legend(summary: dict[str, Any], pyplot: Any, figure: Any) -> None:
    """Name every mixer once, above all panels."""
    seen = [name for name in summary["mixers"] if any(name in setting["mixers"] for setting in summary["settings"])]
    handles = [pyplot.Line2D([], [], label=name, markersize=5, **style(summary, name)) for name in seen]
    figure.legend(
        handles=handles,
        loc="outside upper center",
        ncols=(len(seen) + 1) // 2 if len(seen) > 5 else len(seen),
        frameon=False,
        fontsize=9,
    )


def panels(summary: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The settings of each panel, by its title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for setting in summary["settings"]:
        share = f"{setting['task']}\n{100 * setting['label_fraction']:g} % of the labels"
        found.setdefault(f"{share}\n{setting['train_images']:,} training images", []).append(setting)
    return found


def share_scale(axes: Any, groups: dict[str, list[dict[str, Any]]]) -> None:
    """One vertical scale for all panels of a task; before anything is drawn, as the scale is then that of all."""
    first: dict[str, Any] = {}
    for ax, settings in zip(axes, groups.values(), strict=True):
        task = settings[0]["task"]
        if task in first:
            ax.sharey(first[task])
        first.setdefault(task, ax)


def accuracy_plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy against epochs: a column for each task and share of labels, mean and range over seeds of each mixer.

    Above the test top-1 of the chosen weights, below the training top-1 of the last ones, which tells whether there is
    anything to regularise.
    """
    groups = panels(summary)
    pyplot, figure, axes = canvas(2, [1.1 + 0.6 * len(settings) for settings in groups.values()], 6.4)
    for row, measure in enumerate(("top1", "last_train_top1")):
        share_scale(axes[row], groups)
        for ax, settings in zip(axes[row], groups.values(), strict=True):
            draw_accuracy(ax, summary, settings, measure)
    for column, title in enumerate(groups):
        axes[0, column].set_title(title, fontsize=10)
        axes[1, column].set_xlabel("epochs of training")
    axes[0, 0].set_ylabel("test top-1, %")
    axes[1, 0].set_ylabel("training top-1 at the end, %")
    legend(summary, pyplot, figure)
    figure.supxlabel(
        "filled: mean of the seeds, with a line from the lowest to the highest; open: one seed",
        fontsize=8,
        color="#555555",
    )
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def draw_accuracy(ax: Any, summary: dict[str, Any], settings: list[dict[str, Any]], measure: str) -> None:
    """One panel of `accuracy_plot`."""
    ticks = sorted({setting["epochs"] for setting in settings})
    for place, mixer in enumerate(summary["mixers"]):
        shift = DODGE ** (place - (len(summary["mixers"]) - 1) / 2)
        points = [(s["epochs"] * shift, s["mixers"][mixer][measure]) for s in settings if mixer in s["mixers"]]
        if not points:
            continue
        look = style(summary, mixer)
        xs, means = [x for x, _ in points], [figures["mean"] for _, figures in points]
        ax.plot(xs, means, color=look["color"], linestyle=look["linestyle"], linewidth=1.4)
        for x, figures in points:
            values = figures["values"]
            ax.vlines(x, min(values), max(values), color=look["color"], linewidth=1.2)
            face = "white" if len(values) == 1 else look["color"]
            ax.plot(x, figures["mean"], look["marker"], color=look["color"], markerfacecolor=face, markersize=5.5)
    ax.set_xscale("log")
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_xticks([], minor=True)
    ax.set_xlim(ticks[0] / 1.6, ticks[-1] * 1.6)


def curves_plot(summary: dict[str, Any], path: Path) -> None:
    """Accuracy on the held-out images in the course of the longest training of each task and share of labels."""
    groups = panels(summary)
    pyplot, figure, axes = canvas(1, [2.9] * len(groups), 3.9)
    share_scale(axes[0], groups)
    for ax, (title, settings) in zip(axes[0], groups.items(), strict=True):
        longest = longest_of(settings)
        for mixer, figures in longest["mixers"].items():
            runs = figures["history"]
            tops = list(zip(*(run["held_out_top1"] for run in runs), strict=True))  # [evaluations][seeds]
            look = style(summary, mixer)
            ax.plot(runs[0]["epochs"], [sum(top) / len(top) for top in tops], markersize=4, linewidth=1.2, **look)
        ax.set_title(f"{', '.join(title.splitlines()[:2])}\n{longest['epochs']} epochs", fontsize=10)
        ax.set_xlabel("epoch")
    axes[0, 0].set_ylabel("held-out top-1, %")
    legend(summary, pyplot, figure)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def longest_of(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The longest training among those with the most mixers."""
    return max(settings, key=lambda setting: (len(setting["mixers"]), setting["epochs"]))


def occlusion_plot(summary: dict[str, Any], path: Path) -> None:
    """Top-1 against the share of blanked tokens, for each share of labels at its longest training."""
    groups = panels(summary)
    shown = [longest_of(settings) for settings in groups.values()]
    drawn = {order for setting in shown for figures in setting["mixers"].values() for order in figures["occlusion"]}
    orders = [(order, title) for order, title in ORDERS.items() if order in drawn]
    pyplot, figure, axes = canvas(len(orders), [2.9] * len(groups), 1.2 + 2.6 * len(orders))
    for row in axes:
        share_scale(row, groups)
    for column, (title, longest) in enumerate(zip(groups, shown, strict=True)):
        axes[0, column].set_title(f"{', '.join(title.splitlines()[:2])}\n{longest['epochs']} epochs", fontsize=10)
        for ax, (order, _) in zip(axes[:, column], orders, strict=True):
            draw_occlusion(ax, summary, longest, order)
        [*filter(has_axes, axes[:, column])][-1].set_xlabel("blanked tokens, %")
    for row, (_, title) in zip(axes, orders, strict=True):
        next(filter(has_axes, row)).set_ylabel(f"{title}\ntest top-1, %")
    legend(summary, pyplot, figure)
    note = "mean of the seeds, with a line from the lowest to the highest; dotted: always guessing the largest class"
    figure.supxlabel(note, fontsize=8, color="#555555")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    pyplot.close(figure)


def has_axes(ax: Any) -> bool:
    """Whether a panel was drawn."""
    return bool(ax.axison)


def draw_occlusion(ax: Any, summary: dict[str, Any], setting: dict[str, Any], order: str) -> None:
    """One panel of `occlusion_plot`, or nothing where the setting has no tokens blanked in this order."""
    if not any(order in figures["occlusion"] for figures in setting["mixers"].values()):
        ax.set_axis_off()
        return
    guessed = summary["tasks"][setting["task"]]["largest_class"]
    ax.axhline(guessed, color="#888888", linestyle=":", linewidth=1.2, zorder=1)
    for mixer, figures in setting["mixers"].items():
        shift = SHIFT * (summary["mixers"].index(mixer) - (len(summary["mixers"]) - 1) / 2)
        shares = [100 * share + shift for share in figures["occlusion"]["shares"]]
        tops = list(zip(*figures["occlusion"][order], strict=True))  # [shares][seeds]
        look = style(summary, mixer)
        ax.plot(shares, [sum(top) / len(top) for top in tops], markersize=4, linewidth=1.2, **look)
        ax.vlines(shares, [*map(min, tops)], [*map(max, tops)], color=look["color"], linewidth=1)
    ax.set_xticks(range(0, 101, 20))
