"""The plan of a study: which runs there are, and in which order."""

import hashlib
import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

from train.config import parse
from train.flags import FIXED, GROWING, PER_PROCESS
from train.parser import build_parser

__all__ = ["DEFAULT", "Plan", "Spec", "load_plan"]

DEFAULT = Path(__file__).parent / "plan.json"


class Spec(NamedTuple):
    """One run of a study.

    Attributes:
        mixer: name of the mixer in the plan.
        task: name of the data set and its model in the plan.
        label_fraction: share of the training images that is trained on, in (0, 1].
        epochs: of the run.
        seed: of weights, order, augmentation, mixing, and of which images the fraction has.
        flags: all flags of `python -m train` that decide its numbers.
        digest: SHA-256 of what these flags and their recipe set, and `train/flags.py` says decides the numbers.
    """

    mixer: str
    task: str
    label_fraction: float
    epochs: int
    seed: int
    flags: tuple[str, ...]
    digest: str = ""

    @property
    def name(self) -> str:
        """Name of the run's files."""
        mixer = self.mixer.lower().replace(", ", "-").replace(" ", "-")
        return f"{self.task}-{100 * self.label_fraction:g}pct-{self.epochs}ep-{mixer}-s{self.seed}"

    @property
    def setting(self) -> tuple[str, float, int]:
        """What runs must share to be compared."""
        return self.task, self.label_fraction, self.epochs


class Plan(NamedTuple):
    """The runs of a study in their order, and the names of its mixers in theirs."""

    path: Path
    mixers: tuple[str, ...]
    specs: tuple[Spec, ...]


def load_plan(path: Path) -> Plan:
    """Read a plan file.

    The file is JSON: `flags` (of every run), `mixers` and `tasks` (name to flags), `holdout`, and `runs`, a list of
    blocks with `label_fraction`, `epochs`, `seeds`, and optionally `task` (default: the first) and `mixers` (default:
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
    whole = [spec._replace(digest=settings_digest(spec.flags)) for spec in specs]
    return Plan(path, tuple(content["mixers"]), tuple(whole))


def settings_digest(flags: tuple[str, ...]) -> str:
    """SHA-256 of the settings that decide a run's numbers, as far as they are not the trainer's defaults.

    So a flag that the trainer gets later, whose default changes nothing, leaves the digest as it is.
    """
    args, defaults = vars(parse(list(flags))), vars(build_parser().parse_args([]))
    chosen = {name: args[name] for name in sorted(FIXED + PER_PROCESS + GROWING) if args[name] != defaults[name]}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


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
        task = block.get("task", next(iter(content["tasks"])))
        for seed in block["seeds"]:
            for mixer in block.get("mixers", content.get("default_mixers", content["mixers"])):
                flags = [
                    *content["flags"],
                    *content["tasks"][task],
                    *content["mixers"][mixer],
                    *("--holdout", content["holdout"], "--label-fraction", block["label_fraction"]),
                    *("--epochs", block["epochs"], "--seed", seed),
                ]
                fraction, epochs = float(block["label_fraction"]), int(block["epochs"])
                specs.append(Spec(mixer, task, fraction, epochs, int(seed), tuple(map(str, flags))))
    return specs
