"""Write the tables of docs/performance.md and README.md from result files, check them, or print single ones."""

import argparse
import json
from pathlib import Path
from typing import Any

from .tables import markdown, table

__all__ = ["PAGE", "README", "SOURCES", "add_arguments", "main", "rebuilt", "table"]

PAGE, README = Path("docs/performance.md"), Path("README.md")
# Where the page's tables come from, by the marks they stand between.
SOURCES = {
    "cpu": Path("bench/results/cpu.json"),
    "simulated": Path("bench/results/simulated.json"),
    "counts": Path("bench/results/counts.json"),
    "host": Path("bench/results/host.json"),
    "mixers": Path("train/results/mixers.json"),
    "loader": Path("bench/results/loader.json"),
    "pipeline": Path("bench/results/pipeline.json"),
    "growth": Path("bench/results/growth.json"),
    "growth_counts": Path("bench/results/growth_counts.json"),
    "fidelity": Path("bench/results/fidelity.json"),
}


def insert(page: str, kind: str, text: str) -> str:
    """The page with a table between its marks <!-- kind --> and <!-- /kind -->.

    Raises:
        SystemExit: the page has no such marks.
    """
    first, last = f"<!-- {kind} -->", f"<!-- /{kind} -->"
    if first not in page or last not in page:
        raise SystemExit(f"the page has no marks {first} and {last}")
    return page[: page.index(first) + len(first)] + "\n\n" + text + "\n\n" + page[page.index(last) :]


def summary(cpu: dict[str, Any], simulated: dict[str, Any]) -> str:
    """The README's table: what a call takes as a multiple of a copy, on a CPU and in the model of each card."""
    timed = {row["implementation"]: row.get("ratio_p50") for row in cpu["rows"]}
    models = {(row["case"], row["card"]): row["ratio"] for row in simulated["rows"]}
    cards = list(dict.fromkeys(row["card"] for row in simulated["rows"]))
    rows = []
    for text, implementation, case in (
        ("`mix(images, labels, maps)`", "ours, eager", "fp16 B 128"),
        ("in place, `out=images`", "ours, in place", "in place, one mask"),
        ("uint8, normalised", "ours, uint8 normalised", "uint8 to fp16"),
        ("timm Mixup (CutMix)", "timm Mixup", ""),
        ("torchvision CutMix", "torchvision CutMix", ""),
        ("published code's steps", "published approach", ""),
    ):
        ratios = [timed.get(implementation), *(models.get((case, card)) for card in cards)]
        rows.append([text, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    text = markdown(["", f"CPU, {cpu['machine']['threads']} threads, float32", *(f"{c}, float16" for c in cards)], rows)
    default = next(row for row in cpu["beside_timm"] if row["counterpart"] == "default")
    return f"{text}\n\n`TokenMix()` takes {default['new_ratio']:.2f} of the CPU time of timm's default Mixup."


def rebuilt(folder: Path) -> dict[Path, str]:
    """Make the texts of both pages again from the result files; `folder` is the root of the project."""
    records = {kind: json.loads((folder / path).read_text()) for kind, path in SOURCES.items()}
    page = (folder / PAGE).read_text()
    for kind, record in records.items():
        page = insert(page, kind, table(record))
    readme = insert((folder / README).read_text(), "summary", summary(records["cpu"], records["simulated"]))
    return {PAGE: page, README: readme}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="*", help="print the tables of these result files, write nothing")
    parser.add_argument("--check", action="store_true", help="exit 1 if a page does not match them")


def main(asked: argparse.Namespace) -> None:
    if asked.files:
        for path in asked.files:
            print(table(json.loads(path.read_text())), end="\n\n")
        return
    root = Path(__file__).parents[1]
    pages = rebuilt(root)
    stale = [str(path) for path, text in pages.items() if (root / path).read_text() != text]
    if asked.check and stale:
        raise SystemExit(f"{' and '.join(stale)}: does not match the result files, run `python -m bench report`")
    for path, text in pages.items():
        if not asked.check:
            (root / path).write_text(text)
        print(f"{path} {'matches its result files' if asked.check else 'written'}")
