"""Does it help? The same small DeiT trained with different targets on the demo data, compared in three ways.

    python -m train.study

trains TokenMix with targets by evidence, TokenMix with targets by area, CutMix, and no mixing at all: the recipe
`demo` without its Mixup branch, three seeds each, equal budgets. Of the averaged weights at the end of each run it
then measures, on the validation images,

- accuracy;
- occlusion: accuracy when a share of the tokens, drawn at random, is blanked (Naseer et al., arXiv 2105.10497,
  the robustness test of the TokenMix paper);
- defects pasted away: of the defective cells that the model finds, how many it still calls defective once a cell of
  the same type without defects is pasted over the tokens with the most evidence, or, as the control, over the same
  number of tokens with the least. A model that looks at the evidence changes its mind in the first case only.

A study that was stopped goes on where it was. Everything is written to study.json, and drawn in study.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.ops import roi_align

from tokenmix_kernels import token_mask

from . import checkpoint
from .config import parse
from .data import load_data
from .loop import train
from .run import Run, build
from .teacher import make_teacher, whole_maps

VARIANTS: dict[str, list[str]] = {
    "TokenMix, evidence": ["--mixer", "tokenmix", "--mixup", "0"],
    "TokenMix, area": ["--mixer", "tokenmix", "--mixup", "0", "--maps", "area"],
    "CutMix": ["--mixer", "cutmix"],
    "none": ["--mixer", "none"],
}
COLOURS = ("#2b6cb0", "#63b3ed", "#dd6b20", "#718096")
DROPPED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
PASTED = 0.5  # share of the tokens that are pasted over


def predictions(run: Run, images: Tensor) -> Tensor:
    """Classes [N] of normalised images [N, 3, S, S]."""
    with torch.no_grad(), run.autocast():
        return torch.cat([run.model(part.to(run.device)).float().argmax(1).cpu() for part in images.split(128)])


def replace_tokens(images: Tensor, others: Tensor, mask: Tensor) -> Tensor:
    """images where mask [N, Gh, Gw] is False, others where it is True, token by token."""
    patch = images.shape[-1] // mask.shape[-1]
    pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return torch.where(pixels, others, images)


def extreme_tokens(evidence: Tensor, count: int, largest: bool) -> Tensor:
    """[N, Gh, Gw] bool, the `count` tokens with the most or the least evidence [N, Gh, Gw]."""
    chosen = evidence.flatten(1).topk(count, largest=largest).indices
    return torch.zeros(evidence.flatten(1).shape, dtype=torch.bool).scatter_(1, chosen, True).view(evidence.shape)


def measure(run: Run, images: Tensor, labels: Tensor, evidence: Tensor) -> dict[str, Any]:
    """The three measurements for the weights in run.model.

    Args:
        images: [N, 3, S, S] normalised validation images. labels: [N].
        evidence: [N, Gh, Gw], the teacher's map of the own label on the token grid.
    """
    run.model.eval()
    grid = (evidence.shape[1], evidence.shape[2])
    count = grid[0] * grid[1]
    found = predictions(run, images)
    classes = len(run.data.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    confusion.index_put_((labels, found), torch.tensor(1), accumulate=True)

    occlusion = []
    for share in DROPPED:
        mask = token_mask(len(images), grid, lam=1 - share, minimum_tokens=0, mask_type="random", seed=1)
        blanked = replace_tokens(images, torch.zeros_like(images), mask) if share else images
        occlusion.append(100 * (predictions(run, blanked) == labels).float().mean().item())

    # Odd classes are the defective ones, the class before each is the same type of cell without defects.
    chosen = ((labels % 2 == 1) & (found % 2 == 1)).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(1)
    sound = {label: (labels == label).nonzero()[:, 0] for label in range(0, classes, 2)}
    donors = [sound[int(label) - 1] for label in labels[chosen]]
    patches = torch.tensor(
        [int(donor[torch.randint(len(donor), (), generator=generator)]) for donor in donors], dtype=torch.int64
    )
    pasted = {}
    for name, largest in (("most", True), ("least", False)):
        mask = extreme_tokens(evidence[chosen], int(PASTED * count), largest)
        still = predictions(run, replace_tokens(images[chosen], images[patches], mask)) % 2 == 1
        pasted[name] = 100 * still.float().mean().item()
    return {
        "top1": occlusion[0],
        "confusion": confusion.tolist(),
        "occlusion": occlusion,
        "still_defective": pasted,
        "defects_found": len(chosen),
    }


def study(options: argparse.Namespace) -> dict[str, Any]:
    """Train what is not trained yet, measure, and write study.json and study.png."""
    output = Path(options.output)
    common = [
        "--recipe",
        options.recipe,
        "--no-picture",
        "--no-keep-best",
        "--resume",
        "auto",
        "--eval-every",
        "1000",
        "--save-every",
        "50",
        *(["--epochs", str(options.epochs)] if options.epochs else []),
        *(["--threads", str(options.threads)] if options.threads else []),
    ]
    base = parse([*common, "--output", str(output)])
    data = load_data(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = build(parse([*common, "--mixer", "none", "--output", str(output / "unused")]))
    patch = run.mix.settings.patch_size
    batches = list(run.loader.validation())
    images = torch.cat([data.normalise(batch[0]) for batch in batches])
    labels = torch.cat([batch[1] for batch in batches])
    evidence = validation_evidence(base, device, base.input_size // patch, output / "validation-maps.pt")

    results: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for seed in options.seeds:  # seed by seed, so that a study that is cut short compares equals
        for name, flags in VARIANTS.items():
            folder = output / f"{name.lower().replace(', ', '-')}-{seed}"
            print(f"\n{name}, seed {seed}", flush=True)
            args = parse([*common, *flags, "--seed", str(seed), "--output", str(folder)])
            history = train(args)
            run.model.load_state_dict(checkpoint.load(folder / "last.pt")["ema"])
            scores = measure(run, images, labels, evidence)
            results[name].append({"seed": seed, "raw_top1": history[-1]["val_top1"], **scores})
            write(options, base, results, output)
    return results


def validation_evidence(args: argparse.Namespace, device: torch.device, grid: int, path: Path) -> Tensor:
    """[N, grid, grid], the teacher's maps of the validation images' own labels, kept in `path`."""
    data = load_data(args)
    if path.is_file():
        maps: Tensor = checkpoint.load(path)["maps"]
    else:
        teacher = make_teacher(args, data, device)
        parts = whole_maps(teacher, data.val, data.val.targets, range(len(data.val)), device, args.num_workers)
        maps = torch.cat([part.cpu() for _, part, _ in parts])
        checkpoint.save({"maps": maps}, path)
    side = maps.shape[-1]
    corners = torch.tensor([0.0, 0.0, side, side]).expand(len(maps), 4) - 0.5
    number = torch.arange(len(maps))[:, None].float()
    return roi_align(maps[:, None], torch.cat([number, corners], 1), (grid, grid))[:, 0]


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"


def write(options: argparse.Namespace, args: argparse.Namespace, results: dict[str, Any], output: Path) -> None:
    """study.json, study.png and the table."""
    done = {name: runs for name, runs in results.items() if runs}
    recipe = checkpoint.plain_args(args)
    for key in ("output", "cache", "resume", "device", "threads"):
        del recipe[key]
    content = {
        "kind": "study",
        "command": f"python -m train.study --recipe {options.recipe} --epochs {args.epochs} --seeds "
        f"{' '.join(map(str, options.seeds))}",
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "recipe": recipe,
        "dropped": DROPPED,
        "pasted": PASTED,
        "runs": done,
    }
    checkpoint.write_lines([json.dumps(content, indent=1)], output / "study.json")
    draw(done, output / "study.png", args)
    print(f"\n{'targets':<20}{'top-1':>13}{'half dropped':>14}{'pasted: most':>14}{'pasted: least':>15}   seeds")
    for name, runs in done.items():
        print(
            f"{name:<20}{spread([r['top1'] for r in runs]):>13}"
            f"{spread([r['occlusion'][DROPPED.index(0.5)] for r in runs]):>14}"
            f"{spread([r['still_defective']['most'] for r in runs]):>14}"
            f"{spread([r['still_defective']['least'] for r in runs]):>15}   {len(runs)}",
            flush=True,
        )
    print(f"records  {output / 'study.json'}\npicture  {output / 'study.png'}", flush=True)


def draw(results: dict[str, list[dict[str, Any]]], path: Path, args: argparse.Namespace) -> None:
    """Accuracy, occlusion curves, and defects pasted away; every seed is a dot."""
    figure = Figure(figsize=(13, 3.9), layout="constrained", facecolor="white")
    accuracy, curves, pasted = figure.subplots(1, 3, width_ratios=[1, 1.25, 1.1])
    for place, ((name, runs), colour) in enumerate(zip(results.items(), COLOURS, strict=False)):
        tops = [run["top1"] for run in runs]
        accuracy.plot([place] * len(tops), tops, "o", color=colour, alpha=0.55, markersize=7)
        accuracy.plot([place - 0.25, place + 0.25], [statistics.mean(tops)] * 2, color=colour, lw=2.5)
        columns = list(zip(*(run["occlusion"] for run in runs), strict=True))
        shares = [100 * share for share in DROPPED]
        curves.plot(shares, [statistics.mean(column) for column in columns], color=colour, lw=2, label=name)
        low, high = [min(column) for column in columns], [max(column) for column in columns]
        curves.fill_between(shares, low, high, color=colour, alpha=0.15, lw=0)
        for y, key in ((0, "most"), (1, "least")):
            values = [run["still_defective"][key] for run in runs]
            height = y + (place - 1.5) * 0.19
            pasted.barh(height, statistics.mean(values), height=0.17, color=colour)
            pasted.plot(values, [height] * len(values), "o", color="#222222", markersize=2.5, alpha=0.6)
    accuracy.set_xticks(range(len(results)), [name.replace(", ", ",\n") for name in results], fontsize=9)
    accuracy.set(title="accuracy, %", xlim=(-0.6, len(results) - 0.4))
    curves.set(title="accuracy with tokens dropped, %", xlabel="% of the tokens blanked")
    curves.legend(frameon=False, fontsize=9)
    pasted.set_yticks([0, 1], ["over the most\nevident tokens", "over the least\nevident tokens"], fontsize=9)
    pasted.invert_yaxis()
    pasted.set(title="still called defective after pasting, %", xlim=(0, 100))
    for axis in (accuracy, curves, pasted):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(11)
    seeds = max(len(runs) for runs in results.values())
    figure.suptitle(
        f"{args.data}, {args.epochs} epochs, {seeds} seed(s) each; dots and bands are the single seeds",
        fontsize=10,
        color="#555555",
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--epochs", type=int, default=0, help="0: the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", default="runs/study")
    study(parser.parse_args())


if __name__ == "__main__":
    main()
