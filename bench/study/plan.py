"""The plan of a study: which runs there are, and in which order."""

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from train.config import parse

__all__ = ["DEFAULT", "Plan", "Spec", "load_plan"]

DEFAULT = Path(__file__).parent / "plan.json"


class Spec(NamedTuple):
    """One run of a study.

    Attributes:
        mixer: name of the mixer in the plan.
        model: name of the model in the plan.
        label_fraction: share of the training images that is trained on, in (0, 1].
        epochs: of the run.
        seed: of weights, order, augmentation, mixing, and of which images the fraction has.
        flags: all flags of `python -m train` that decide its numbers.
    """

    mixer: str
    model: str
    label_fraction: float
    epochs: int
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run's files."""
        mixer = self.mixer.lower().replace(", ", "-").replace(" ", "-")
        return f"{self.model}-{100 * self.label_fraction:g}pct-{self.epochs}ep-{mixer}-s{self.seed}"

    @property
    def setting(self) -> tuple[str, float, int]:
        """What runs must share to be compared."""
        return self.model, self.label_fraction, self.epochs


class Plan(NamedTuple):
    """The runs of a study in their order, and the names of its mixers in theirs."""

    path: Path
    mixers: tuple[str, ...]
    specs: tuple[Spec, ...]


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    The file is JSON: `flags` (of every run), `mixers` and `models` (name to flags), `holdout`, and `runs`, a list of
    blocks with `label_fraction`, `epochs`, `seeds`, and optionally `model` (default: the first) and `mixers` (default:
    the plan's `default_mixers`, or all). Blocks run in order, in a block seed by seed, and for each seed all mixers.
    Keys that begin with "_" are comments.

    Raises:
        ValueError: the file is missing, is not such a plan, has no runs, lists a run twice, or has flags that
            `python -m train` refuses.
    """
    if not path.is_file():
        raise ValueError(f"--plan: no file {path}")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        specs = list(expand(content))
    except KeyError as error:
        raise ValueError(f"--plan {path} has no {error}, which its runs need") from error
    except (TypeError, AttributeError, StopIteration, ValueError) as error:
        raise ValueError(f"--plan {path} is not a plan of a study: {error}") from error
    if not specs:
        raise ValueError(f"--plan {path} must list at least one run")
    names = [spec.name for spec in specs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--plan {path} lists {twice[0]} twice")
    for spec in specs:
        if refused := refusal(spec.flags):
            raise ValueError(f"--plan {path}: {spec.name} cannot be trained: {refused}")
    return Plan(path, tuple(content["mixers"]), tuple(specs))


def refusal(flags: tuple[str, ...]) -> str:
    """What `python -m train` has against these flags; empty if nothing."""
    message = io.StringIO()
    try:
        with redirect_stderr(message):
            parse(list(flags))
    except SystemExit:
        return message.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    return ""


def expand(content: dict[str, Any]) -> list[Spec]:
    """The runs of a plan's content in their order."""
    specs = []
    for block in content["runs"]:
        model = block.get("model", next(iter(content["models"])))
        for seed in block["seeds"]:
            for mixer in block.get("mixers", content.get("default_mixers", content["mixers"])):
                flags = [
                    *content["flags"],
                    *content["models"][model],
                    *content["mixers"][mixer],
                    *("--holdout", content["holdout"], "--label-fraction", block["label_fraction"]),
                    *("--epochs", block["epochs"], "--seed", seed),
                ]
                fraction, epochs = float(block["label_fraction"]), int(block["epochs"])
                specs.append(Spec(mixer, model, fraction, epochs, int(seed), tuple(map(str, flags))))
    return specs
