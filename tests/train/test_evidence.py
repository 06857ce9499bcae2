"""Targets from the attention of the model that is trained: the step itself, and the trainer's flags for it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from mix_helpers import random_images
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchvision.datasets import ImageFolder
from train_helpers import make_bank, make_folder, tiny

from tokenmix_kernels import ClassAttention, TokenMix, attention_targets, progressive_ratio
from tokenmix_kernels.settings import COPY, MIXUP
from train import checkpoint
from train.config import parse
from train.data import Batch
from train.evidence import AttentionEvidence
from train.examples import as_evidence, pick_examples
from train.guard import NonFiniteLoss, replay, stop_at
from train.loop import train
from train.mixers import EVIDENCE, MIXERS, evidence_of
from train.picture import draw_figure, mix_picture
from train.run import Run, build
from train.step import forward
from train.teacher import cached_maps

CLASSES = 3
MASKED = [name for name, recipe in MIXERS.items() if recipe.masks]
TEACHER = {"tokenmix": ["--online"], "cutmix": [], "transmix": ["--online"], "mixpro": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=CLASSES, train=6, val=1)


@pytest.fixture(scope="module")
def files(folder: Path) -> Path:
    """A bank of the images' maps and a teacher's weights."""
    make_bank(folder / "maps.bank", ImageFolder(folder / "train"))
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t", num_classes=CLASSES).state_dict(), folder / "teacher.pth")
    return folder


def flags_of(evidence: str, mixer: str, files: Path) -> list[str]:
    """What a kind of evidence needs beside its name."""
    if evidence == "maps":
        return ["--maps", str(files / "maps.bank")]
    if evidence == "teacher":
        weights = ["--teacher", "resnet10t", "--teacher-weights", str(files / "teacher.pth"), "--teacher-size", "32"]
        return [*weights, "--cache", str(files / "cache"), *TEACHER[mixer]]
    return []


def make_run(folder: Path, output: Path, *more: str) -> Run:
    return build(parse(tiny(folder, output, "--aa", "none", "--no-amp", *more)))


def step(run: Run, seed: int = 3) -> tuple[Batch, Tensor, Tensor, Tensor, Tensor]:
    """(batch, loss, logits, targets, qkv [B, T, 3C] of the last block) of one training step."""
    seen: list[tuple[Tensor, ...]] = []
    model: Any = run.model
    handles = [
        run.criterion.register_forward_pre_hook(lambda module, inputs: seen.append(inputs)),
        model.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append((output,))),
    ]
    run.net.train()
    torch.manual_seed(0)
    batch = run.loader.preview(18)
    loss = forward(run, batch, seed)
    for handle in handles:
        handle.remove()
    (qkv,), (logits, targets) = seen[0], seen[-1]
    return batch, loss, logits.detach(), targets, qkv.detach()


def attention_by_hand(qkv: Tensor, heads: int) -> np.ndarray[Any, Any]:
    """Softmax over all tokens of the class token's logits, patches only, mean over heads: [B, N]."""
    batch, tokens, width = qkv.shape
    values = qkv.double().numpy().reshape(batch, tokens, 3, heads, width // (3 * heads))
    query, keys = values[:, 0, 0], values[:, :, 1]  # [B, heads, d], [B, T, heads, d]
    logits = np.einsum("bhd,bthd->bht", query, keys) / math.sqrt(values.shape[-1])
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return shares[:, :, 1:].mean(1)


@pytest.mark.parametrize(
    ("mixer", "more", "ratio", "smoothing"),
    [
        ("transmix", ["--mixup-switch-prob", "0.7"], 0.5, 0.1),
        ("mixpro", [], "progressive", 0.0),
        ("tokenmix", ["--evidence", "attention", "--attention-ratio", "1"], 1.0, 0.1),
        ("cutmix", ["--evidence", "attention", "--mixup-prob", "0.7"], 0.5, 0.1),
    ],
)
def test_targets_of_a_step_are_those_by_hand(
    mixer: str, more: list[str], ratio: float | str, smoothing: float, folder: Path, tmp_path: Path
) -> None:
    run = make_run(folder, tmp_path, "--mixer", mixer, *more)
    with torch.no_grad():
        run.model.blocks[-1].attn.qkv.weight.mul_(30)  # type: ignore[index,union-attr]  # a new model's is nearly even
    batch, _, logits, targets, qkv = step(run, seed=7)
    attention = attention_by_hand(qkv, run.model.blocks[-1].attn.num_heads)  # type: ignore[index,union-attr]
    _, _, mix = run.mix(batch.images, batch.labels, seed=7, sample_offset=0)
    labels = batch.labels.tolist()

    def target(own: float, label: int, other: int) -> np.ndarray[Any, Any]:
        row = np.full(CLASSES, smoothing / CLASSES)
        row[label] += (1 - smoothing) * own
        row[other] += (1 - smoothing) * (1 - own)
        return row

    kinds, differences = set(), [0.0]
    for i, label in enumerate(labels):
        other, taken, kind = labels[len(labels) - 1 - i], mix.mask[i].double().numpy().ravel(), int(mix.kind[i])
        own = float(mix.lam[i])
        if kind > MIXUP:
            area = 1 - taken.mean()
            by_attention = (attention[i] * (1 - taken)).sum() / attention[i].sum()
            share = ratio
            if share == "progressive":
                prediction = np.exp(logits[i].double().numpy())
                prediction, by_area = prediction / prediction.sum(), target(area, label, other)
                share = prediction @ by_area / np.linalg.norm(prediction) / np.linalg.norm(by_area)
            own = float(share) * by_attention + (1 - float(share)) * area
            differences.append(abs(own - area) * (label != other))
        np.testing.assert_allclose(targets[i].numpy(), target(own, label, other), atol=2e-6)
        kinds.add(kind)
    assert max(differences) > 0.02, "the attention is even, nothing was tested"
    assert max(kinds) > MIXUP and len(kinds) > 1, "a branch was not drawn"
    assert (COPY in kinds) == (mixer == "cutmix")


@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("mixer", MIXERS)
def test_mixer_and_evidence_train_two_steps(mixer: str, evidence: str, files: Path, tmp_path: Path) -> None:
    arguments = tiny(
        files, tmp_path, "--mixer", mixer, "--evidence", evidence, "--aa", "none", "--epochs", "1", "--max-steps", "2"
    )
    if mixer not in MASKED and evidence != "area":
        with pytest.raises(SystemExit):
            parse(arguments)
        return
    args = parse([*arguments, *flags_of(evidence, mixer, files)])
    run = build(args)
    names = {"attention": "the model's own attention", "teacher": "activation maps of resnet10t", "area": "area shares"}
    assert run.evidence_name().startswith(names.get(evidence, "activation maps of random"))
    (record,) = train(args)
    assert 0 < record["train_loss"] < 5 and record["updates"] == 2


def test_named_mixers_have_their_papers_numbers(folder: Path, tmp_path: Path) -> None:
    found = {}
    for mixer in ("transmix", "mixpro"):
        run = make_run(folder, tmp_path, "--mixer", mixer)
        settings = run.mix.settings
        assert run.attention is not None
        found[mixer] = (
            settings.mask_type, settings.lam, settings.mixup_alpha, settings.cutmix_alpha, settings.switch_prob,
            settings.label_smoothing, run.attention.smoothing, run.attention.ratio, type(run.criterion).__name__,
        )  # fmt: skip
    assert found == {
        "transmix": ("cutmix", -1, 0.8, 1.0, 0.8, 0.1, 0.1, 0.5, "SoftTargetCrossEntropy"),
        "mixpro": ("grid", -1, 0.8, 1.0, 0.5, 0.0, 0.0, "progressive", "SoftTargetCrossEntropy"),
    }


@pytest.mark.parametrize(("size", "more", "cell"), [("32", [], 2), ("96", [], 4), ("96", ["--grid-cell", "3"], 3)])
def test_cells_of_a_grid_mask(size: str, more: list[str], cell: int, folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, tmp_path, "--mixer", "mixpro", "--input-size", size, *more)
    assert run.mix.settings.grid_cell == cell and run.mix.settings.minimum_tokens < 0


def test_mixers_numbers_and_recipe_and_command_line(tmp_path: Path) -> None:
    def flags(*argv: str) -> tuple[Any, ...]:
        args = parse(list(argv))
        return args.evidence, args.bce_loss, args.smoothing, args.mixup_switch_prob, args.mixup_mode

    assert flags("--recipe", "demo") == (None, True, 0.1, 0.5, "elem")
    assert flags("--recipe", "deit_s", "--mixer", "transmix") == ("attention", False, 0.1, 0.8, "batch")
    assert flags("--recipe", "demo", "--mixer", "mixpro") == ("attention", False, 0.0, 0.5, "elem")
    command = ("--mixer", "mixpro", "--bce-loss", "--smoothing", "0.2", "--evidence", "area")
    assert flags("--recipe", "demo", *command) == ("area", True, 0.2, 0.5, "elem")
    recipe = tmp_path / "own.json"
    recipe.write_text('{"mixer": "transmix", "smoothing": 0.3}')
    assert flags("--recipe", str(recipe)) == ("attention", False, 0.3, 0.8, "batch"), "a recipe's own numbers win"
    assert flags("--recipe", str(recipe), "--mixer", "mixpro")[2] == 0.0, "another mixer, other numbers"


def test_a_recipe_with_an_unknown_mixer_or_evidence_gets_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.json"
    for content, sentence in (
        ('{"mixer": "mixmo"}', "--mixer must be one of tokenmix, cutmix, mixup, none, transmix, mixpro, got 'mixmo'"),
        ('{"evidence": "eyes"}', "--evidence must be one of attention, teacher, maps, area, got 'eyes'"),
    ):
        recipe.write_text(content)
        with pytest.raises(SystemExit):
            parse(["--recipe", str(recipe)])
        assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--evidence attention --mixer none", "attention needs masks to be pooled over, and --mixer none has none"),
        ("--evidence teacher --mixer mixup", "--evidence teacher needs masks"),
        ("--evidence maps", "--evidence maps needs a map bank, --maps FILE, got --maps None"),
        ("--evidence maps --maps area", "--evidence maps needs a map bank, --maps FILE, got --maps area"),
        ("--evidence area --maps a.bank", "--evidence area uses no maps: leave out --maps a.bank"),
        ("--evidence attention --maps area", "--evidence attention and --maps area exclude each other"),
        ("--mixer transmix --maps area", "--evidence attention and --maps area exclude each other"),
        ("--evidence teacher --maps a.bank", "--evidence teacher makes its own maps: leave out --maps a.bank"),
        ("--evidence teacher", "--evidence teacher needs a teacher: --teacher NAME"),
        ("--evidence attention --teacher resnet50", "--teacher is for --evidence teacher, the evidence here is att"),
        ("--evidence attention --online", "--online is for --evidence teacher"),
        ("--attention-ratio 0.5", "--attention-ratio is for --evidence attention; the evidence here is area"),
        ("--evidence attention --attention-ratio 2", "must be a share in [0, 1] or progressive, got '2'"),
        ("--mixer transmix --mask-type grid", "--mask-type is for --mixer tokenmix; --mixer transmix has masks"),
        ("--mixer none --mask-type grid", "--mixer none has no masks"),
        ("--mixer cutmix --grid-cell 2", "--grid-cell is for --mixer mixpro or --mask-type grid"),
        ("--mixer mixpro --grid-cell 0", "--grid-cell must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_flags_that_contradict_each_other_get_a_sentence(
    flags: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(flags.split())
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in last


def test_models_without_attention_to_read_get_a_sentence(folder: Path, tmp_path: Path) -> None:
    network = ["--model", "resnet10t", "--model-kwargs", "{}", "--evidence", "attention"]
    with pytest.raises(ValueError, match=r"--evidence attention: model must be a vision transformer .*got ResNet"):
        make_run(folder, tmp_path, *network)
    with pytest.raises(ValueError, match=r"--evidence attention reads one value for each token .*--patch-size 16"):
        make_run(folder, tmp_path, "--evidence", "attention", "--patch-size", "16")
    with pytest.raises(ValueError, match=r"--maps must be a map bank of --data .*no.bank"):
        make_run(folder, tmp_path, "--evidence", "attention", "--maps", str(tmp_path / "no.bank"))


def test_demo_with_attention_needs_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a teacher was asked for")

    pytest.importorskip("elpv_dataset")
    monkeypatch.setattr("train.teacher.load_teacher", refuse)
    recipe = ["--recipe", "demo", "--device", "cpu", "--num-workers", "0", "--cache", str(tmp_path / "cache")]
    run = build(parse([*recipe, "--evidence", "attention"]))
    assert run.evidence_name() == "the model's own attention (class query), by a ratio of 0.5"
    assert not (tmp_path / "cache").exists()
    assert evidence_of(parse(recipe)) == "teacher", "without the flag it would have been"


def gradients(run: Run) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", ["ddp", "activation checkpointing", "ema"])
def test_step_is_the_same_however_the_model_is_wrapped(way: str, folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, tmp_path, "--mixer", "mixpro", "--drop-path", "0")
    _, loss, _, targets, _ = step(run)
    loss.backward()
    expected = gradients(run)
    run.model.zero_grad()
    try:
        if way == "ddp":
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            run.net = DistributedDataParallel(run.model)
        elif way == "ema":
            assert run.ema is not None
            run.ema.module(torch.rand(5, 3, 32, 32))
            assert run.attention is not None and run.attention.attention.attention is None, "the average was read"
        else:
            run.model.set_grad_checkpointing(True)  # type: ignore[operator]
        _, again, _, same, _ = step(run)
        again.backward()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    assert torch.equal(same, targets)
    torch.testing.assert_close(gradients(run), expected)


def test_step_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    run = make_run(folder, tmp_path, "--mixer", "mixpro", "--amp")
    _, loss, _, targets, _ = step(run)
    loss.backward()
    assert run.mix.out_dtype == torch.bfloat16 and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(len(targets)))


def test_replay_repeats_the_step(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(folder, tmp_path, "--evidence", "attention")
    batch = next(run.loader.epoch(0))
    rng = checkpoint.rng_state(run.device)
    run.net.train()
    loss = forward(run, batch, 5).item()
    entry = {"update": 0, "seed": 5, "epoch": 0, "step": 0, "positions": batch.positions, "ids": batch.ids, "rng": rng}
    with pytest.raises(NonFiniteLoss):
        stop_at(run, [entry], 0)
    replay(parse(["--replay", str(tmp_path / "nonfinite-0-0.pt"), "--device", "cpu", "--no-amp"]))
    assert f"loss {loss}\n" in capsys.readouterr().out


@pytest.mark.parametrize("bank", ["given", "cached", "none"])
def test_picture_shows_the_attention_beside_the_teachers_maps(bank: str, files: Path, tmp_path: Path) -> None:
    more = {
        "given": ["--maps", str(files / "maps.bank"), "--cache", str(tmp_path)],
        "cached": ["--cache", str(tmp_path / "cache")],
        "none": ["--cache", str(tmp_path)],
    }
    if bank == "cached":
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / f"{files.name}-other.bank").write_bytes(b"not a bank")
        name = tmp_path / "cache" / f"{files.name}-teacher.bank"
        name.write_bytes((files / "maps.bank").read_bytes())
    run = make_run(files, tmp_path, "--mixer", "mixpro", "--mixup", "0", *more[bank])
    batch = run.loader.preview(8)
    examples = pick_examples(run, batch, as_evidence(run.evidence(batch)), 3)
    maps = cached_maps(run.args, run.data, run.device)
    assert (maps is None) == (bank == "none")
    shown = as_evidence(maps(batch) if maps else {})
    figure = draw_figure(run, batch, shown, examples)
    columns = len(figure.axes) // 3
    assert columns == (6 if maps is None else 7)
    for row, example in enumerate(examples):
        assert example.attention is not None
        partner = float((example.attention * example.taken).sum())
        assert float(example.attention.sum()) == pytest.approx(1, abs=1e-5)
        titles = [axis.get_title() for axis in figure.axes[columns * row : columns * (row + 1)]]
        assert titles[4] == f"{1 - partner:.0%} own, {partner:.0%} partner's"
        # The weights lie between area and attention, and the targets of mixpro are the weights.
        low, high = sorted((partner, example.areas()[1]))
        assert low - 1e-5 <= example.weights[1] <= high + 1e-5
        assert example.targets == pytest.approx(example.weights, abs=1e-5)
    assert mix_picture(run, tmp_path / "mix.png", rows=1).read_bytes().startswith(b"\x89PNG")


def parts(**options: Any) -> tuple[Any, TokenMix, Tensor, Tensor]:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=5)
    mixer = TokenMix(num_classes=5, patch_size=8, mode="elem", lam="beta", return_mix=True, **options)
    return model, mixer, random_images((8, 3, 32, 32)), torch.arange(8) % 5


@pytest.mark.parametrize(("mask_type", "ratio"), [("cutmix", 0.5), ("grid", "progressive")])
def test_a_step_is_the_formulas_in_a_row(mask_type: str, ratio: float | str) -> None:
    model, mixer, images, labels = parts(mask_type=mask_type, grid_cell=2)
    evidence = AttentionEvidence(model, mixer, ratio=ratio)
    logits, targets = evidence(model, images, labels, seed=4)
    with ClassAttention(model) as again:
        mixed, by_area, mix = mixer(images, labels, seed=4)
        expected = model(mixed)
        share = progressive_ratio(expected, by_area) if ratio == "progressive" else 0.5
        by_attention = attention_targets(again.take(), **mix._asdict(), num_classes=5, ratio=share, smoothing=0.1)
    assert torch.equal(logits, expected) and torch.equal(targets, by_attention)
    masked = mix.kind > 1
    assert masked.any() and not masked.all()
    torch.testing.assert_close(targets[~masked], by_area[~masked])
    assert (targets - by_area)[masked].abs().max() > 1e-3
    torch.nn.functional.cross_entropy(logits, targets).backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_in_bfloat16() -> None:
    model, mixer, images, labels = parts(mixup_alpha=0.0)
    evidence = AttentionEvidence(model, mixer, ratio="progressive", smoothing=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, targets = evidence(model, images, labels, seed=1)
    assert logits.dtype == torch.bfloat16 and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_what_does_not_fit_is_refused() -> None:
    model, mixer, *_ = parts()
    with pytest.raises(ValueError, match="mixer must be made with return_mix=True"):
        AttentionEvidence(model, TokenMix(num_classes=5))
    with pytest.raises(ValueError, match="ratio must be a share"):
        AttentionEvidence(model, mixer, ratio="half")
