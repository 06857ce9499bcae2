"""The picture of a run shows what the run's own mixer does."""

from pathlib import Path

import pytest
import torch
from torchvision.datasets import ImageFolder
from train_helpers import make_bank, make_folder, tiny

from tokenmix_kernels.settings import COPY, MASK_RULES, MIXUP
from train.config import parse
from train.examples import as_evidence, mix_as_run, pick_examples, token_evidence
from train.picture import draw_figure, mix_picture
from train.run import Run, build

MIXERS = {
    "none": [],
    "mixup": ["--mixup", "0.4", "--mixup-mode", "batch"],
    "cutmix": ["--cutmix", "0.7"],
    "tokenmix": ["--mixup", "0.8", "--mask-type", "random", "--mixup-switch-prob", "0.6"],
}
KINDS = {
    "none": {COPY},
    "mixup": {MIXUP},
    "cutmix": {MASK_RULES["cutmix"].kind},
    "tokenmix": {MIXUP, MASK_RULES["random"].kind},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=3, train=4, val=1)


def make_run(folder: Path, output: Path, mixer: str) -> Run:
    more = ["--mixer", mixer, *MIXERS[mixer], "--smoothing", "0.2", "--seed", "5", "--aa", "none"]
    if mixer == "tokenmix":
        more += ["--maps", str(make_bank(output / "maps.bank", ImageFolder(folder / "train")))]
    return build(parse(tiny(folder, output, "--reprob", "0", *more)))


@pytest.mark.parametrize("mixer", MIXERS)
def test_picture_mixes_as_the_run_does(mixer: str, folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, tmp_path, mixer)
    batch = run.loader.preview(8)
    kinds = set()
    for seed in range(5):
        mixed, result = mix_as_run(run, batch, as_evidence(run.evidence(batch)), seed)
        expected, targets = run.mix(batch.images, batch.labels, **run.evidence(batch), seed=seed)
        assert torch.equal(result.targets, targets)
        torch.testing.assert_close(run.data.normalise(255 * mixed), expected, atol=2e-5, rtol=0)
        kinds |= set(result.kind.tolist())
    assert kinds == KINDS[mixer]


@pytest.mark.parametrize("mixer", MIXERS)
def test_picture_shows_lam_mask_and_targets(mixer: str, folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, tmp_path, mixer)
    batch = run.loader.preview(8)
    given = as_evidence(run.evidence(batch))
    examples = pick_examples(run, batch, given, 6)
    evidence = token_evidence(given, batch.labels, (4, 4))
    labels, images = batch.labels.tolist(), batch.images.float() / 255
    for example in examples:
        own, other = example.own, example.partner
        # The shares of the evidence that columns 2 and 4 name are the weights.
        shown = float((evidence[own] * (1 - example.taken)).sum()), float((evidence[other] * example.taken).sum())
        assert shown == pytest.approx(example.weights, abs=1e-5)
        assert own + other == 7 and labels[own] != labels[other]
        off = 0.2 / 3
        paper = example.kind == MASK_RULES["random"].kind
        expected = [w - 0.1 + off if paper else 0.8 * w + off for w in example.weights]
        assert example.targets == pytest.approx(expected, abs=1e-6)
        if example.kind == MIXUP:
            lam = example.weights[0]
            blend = lam * images[own] + (1 - lam) * images[other]
            torch.testing.assert_close(example.mixed, blend, atol=1e-4, rtol=0)
        # Of the pixels that differ between the two images the mix has as many of the partner's as the mask says.
        if example.kind in (COPY, MASK_RULES["cutmix"].kind, MASK_RULES["random"].kind):
            from_partner = (example.mixed != images[own]).any(0).float().mean()
            differing = (images[other] != images[own]).any(0).float().mean()
            assert float(from_partner) == pytest.approx(float(example.taken.mean()), abs=1.01 - float(differing))
    figure = draw_figure(run, batch, given, examples)
    for line, example in enumerate(examples):
        titles = [axis.get_title() for axis in figure.axes[7 * line : 7 * line + 7]]
        names = [run.data.classes[labels[i]] for i in (example.own, example.partner)]
        assert titles[6] == f"target  {example.targets[0]:.2f} {names[0]}   {example.targets[1]:.2f} {names[1]}"
        assert titles[1] == f"{example.weights[0]:.0%} of it shown"
        words = {"none": "not mixed", "mixup": f"Mixup, lam {example.weights[0]:.2f}", "cutmix": "cutmix: "}
        assert titles[4].startswith(words.get(mixer, ("random: ", "Mixup, lam ")))
    assert "label smoothing 0.2" in " ".join(text.get_text() for text in figure.texts)
    if mixer == "cutmix":
        assert len({round(example.weights[0], 3) for example in examples}) > 3, "lam is not drawn"


def test_picture_is_written_for_every_mixer(folder: Path, tmp_path: Path) -> None:
    for mixer in ("none", "mixup"):
        path = mix_picture(make_run(folder, tmp_path, mixer), tmp_path / mixer / "mix.png", rows=1)
        assert path.read_bytes().startswith(b"\x89PNG")
