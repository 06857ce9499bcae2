"""The trainer: resumed runs are the same run, processes share one stream of masks, recipes run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torchvision.datasets import ImageFolder
from train_helpers import assert_same_run, finish_all, launch, make_bank, make_folder, tiny
from train_workers import train_and_record, train_quietly

from tokenmix_kernels import TopKMaps, tokenmix
from train import checkpoint
from train.config import load_recipe, parse
from train.data import EpochOrder, load_data
from train.examples import as_evidence, token_evidence
from train.files import write_atomic
from train.guard import NonFiniteLoss, replay
from train.loop import train
from train.profile_mixers import PublishedMix, profile_mixers
from train.run import build
from train.step import mixing_seed
from train.teacher import make_evidence, probe


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=4, train=32, val=3)


@pytest.fixture(scope="module")
def bank(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(tmp_path_factory.mktemp("bank") / "maps.bank", ImageFolder(folder / "train"))


def kill_after_save(processes: Sequence[BaseProcess], last: Path) -> None:
    """Kill -9 all of a run's processes as soon as it has written a checkpoint."""
    limit = time.monotonic() + 60
    while not last.is_file():
        assert all(process.is_alive() for process in processes), "the run ended before it was killed"
        assert time.monotonic() < limit, "no checkpoint in a minute"
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()


def test_killed_and_resumed_run_of_two_processes_is_the_same_run(folder: Path, bank: Path, tmp_path: Path) -> None:
    settings = ["--save-every", "2", "--maps", str(bank), "--accumulate", "2", "--clip-grad", "1", "--batch-size", "4"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish_all(launch(train_quietly, tiny(folder, whole, *settings), 2))
    # Other workers, other progress of the data loader: samples must not depend on them.
    arguments = tiny(folder, broken, *settings, "--resume", "auto")
    kill_after_save(launch(train_quietly, [*arguments, "--num-workers", "1"], 2), broken / "last.pt")
    state = checkpoint.load(broken / "last.pt")["progress"]
    assert state["epoch"] < 2, "the run was over before it was killed"
    finish_all(launch(train_quietly, arguments, 2))
    assert_same_run(whole, broken)


def test_two_processes_draw_the_masks_of_one(folder: Path, tmp_path: Path) -> None:
    settings = ["--max-steps", "3", "--epochs", "1", "--mixup", "0", "--aa", "none", "--reprob", "0"]
    masks: dict[int, list[torch.Tensor]] = {}
    for processes in (1, 2):
        output = tmp_path / str(processes)
        arguments = tiny(folder, output, *settings, "--batch-size", str(16 // processes))
        finish_all(launch(train_and_record, arguments, processes))
        calls = [torch.load(output / f"calls-{rank}.pt") for rank in range(processes)]
        masks[processes] = [torch.cat([taken(calls[rank][step]) for rank in range(processes)]) for step in range(3)]
    for step in range(3):
        assert torch.equal(masks[1][step], masks[2][step])
    assert not torch.equal(masks[1][0], masks[1][1]), "another step, other masks"
    assert not torch.equal(masks[1][0][:8], masks[1][0][8:]), "another process, other masks"


def taken(call: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of 8x8 pixels came from the partner, [B, 4, 4], seen in the pixels."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (call["mixed"].permute(0, 2, 3, 1) * std + mean) * 255
    own = (pixels - call["images"].permute(0, 2, 3, 1)).abs().amax(-1) < 0.5
    other = (pixels - call["images"].flip(0).permute(0, 2, 3, 1)).abs().amax(-1) < 0.5
    assert bool((own | other).all())
    return ~own.unflatten(1, (4, 8)).unflatten(3, (4, 8)).all(4).all(2)


def test_the_parts_of_an_epoch_make_up_the_epoch(folder: Path) -> None:
    for flag in ("--repeated-aug", "--no-repeated-aug"):
        args = parse(tiny(folder, Path("unused"), flag, "--seed", "3"))
        data = load_data(args)
        orders = [EpochOrder(data, args, rank, 2) for rank in range(2)]
        whole = EpochOrder(data, args, 0, 1)
        for order in (*orders, whole):
            order.epoch = 5
        parts = [list(order) for order in orders]
        assert [item for pair in zip(*parts, strict=True) for item in pair] == list(whole)
        orders[0].first = 4
        assert list(orders[0]) == parts[0][4:]
        whole.epoch = 6
        assert [item[2] for item in whole] != [item[2] for pair in zip(*parts, strict=True) for item in pair]


def test_nonfinite_loss_stops_and_replays(
    folder: Path, bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {}
    for log_every in (1, 100):
        output = tmp_path / str(log_every)
        arguments = tiny(
            folder, output, "--lr", "1e37", "--warmup-epochs", "0", "--log-every", str(log_every), "--maps", str(bank)
        )
        with pytest.raises(NonFiniteLoss, match="--replay"):
            train(parse(arguments))
        (path,) = output.glob("nonfinite-*.pt")
        saved[log_every] = checkpoint.load(path)
    early, late = saved[1], saved[100]
    # Seen at once or at the end of the epoch: the weights are those that the bad step met.
    assert early["steps"][0][0]["step"] == late["steps"][0][0]["step"] < 5
    assert all(torch.equal(early["model"][key], late["model"][key]) for key in early["model"])
    assert all(bool(torch.isfinite(value).all()) for value in late["model"].values())
    capsys.readouterr()
    replay(parse(["--replay", str(path), "--device", "cpu"]))
    printed = capsys.readouterr().out
    step = late["steps"][0][0]
    assert re.search(r"loss (nan|inf)", printed) or "gradients that are not finite: 0 " not in printed
    assert str(step["ids"].tolist()) in printed
    assert f"mixing seed {mixing_seed(0, step['epoch'], step['step'])}" in printed


def test_accumulated_steps_are_one_large_step(folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, settings in (("one", ["--batch-size", "16"]), ("two", ["--batch-size", "8", "--accumulate", "2"])):
        train(
            parse(
                tiny(
                    folder,
                    tmp_path / name,
                    *settings,
                    "--mixer",
                    "none",
                    "--epochs",
                    "1",
                    "--drop-path",
                    "0",
                    "--reprob",
                    "0",
                    "--opt",
                    "sgd",
                    "--lr",
                    "0.05",
                    "--warmup-epochs",
                    "0",
                )
            )
        )
        weights.append(checkpoint.load(tmp_path / name / "last.pt")["model"])
    torch.manual_seed(0)
    before = build(parse(tiny(folder, tmp_path / "unused"))).model.state_dict()
    assert (weights[0]["head.weight"] - before["head.weight"]).abs().max() > 1e-2, "nothing was learned"
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["cutmix", "mixup", "none"])
def test_other_mixers_train(folder: Path, tmp_path: Path, mixer: str) -> None:
    history = train(parse(tiny(folder, tmp_path, "--mixer", mixer, "--max-steps", "2", "--epochs", "1")))
    assert 0 < history[0]["train_loss"] < 2


def test_deit_s_recipe_on_two_images_per_class(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", classes=6, train=2, val=1)
    teacher = timm.create_model("resnet10t", num_classes=6)
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    arguments = ["--recipe", "deit_s", "--data-path", str(folder), "--teacher", "resnet10t", "--teacher-weights",
                 str(tmp_path / "teacher.pth"), "--teacher-size", "64", "--cache", str(tmp_path / "cache"),
                 "--input-size", "64", "--model-kwargs", '{"depth": 2}', "--batch-size", "4", "--epochs", "2",
                 "--num-workers", "1", "--device", "cpu"]  # fmt: skip
    args = parse([*arguments, "--output", str(tmp_path / "run")])
    history = train(args)
    assert [line["epoch"] for line in history] == [0, 1]
    assert all(0 < line["train_loss"] < 2 and 0 <= line["ema_top5"] <= 100 for line in history)
    assert (tmp_path / "run" / "mix.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "cache").glob("*.bank"))) == 1
    with pytest.raises(ValueError, match="--resume auto"):
        train(args)
    history = train(parse([*arguments, "--online", "--output", str(tmp_path / "online"), "--epochs", "1"]))
    assert history[0]["train_loss"] > 0


def test_recipes_hold_deits_numbers() -> None:
    for name, model in (("deit_t", "tiny"), ("deit_s", "small"), ("deit_b", "base")):
        args = parse(["--recipe", name])
        assert args.model == f"deit_{model}_patch16_224"
        # DeiT, table 9: 1024 images, 300 epochs, AdamW 0.0005 * batch / 512, decay 0.05, warmup 5, smoothing 0.1, ...
        assert args.lr * args.batch_size * 8 / 512 == 1e-3
        # In the file itself: the flags' defaults are DeiT's too, so an empty recipe would pass all the rest.
        stated = {"model", "epochs", "opt", "lr", "weight_decay", "batch_size",
                  "warmup_epochs", "smoothing", "drop_path",
                  "aa", "reprob", "mixup", "cutmix", "repeated_aug", "model_ema_decay", "mixer", "mask_type",
                  "bce_loss", "mixup_prob", "mixup_switch_prob", "input_size", "scale", "min_lr",
                  "warmup_lr"}  # fmt: skip
        assert stated <= load_recipe(name).keys(), stated - load_recipe(name).keys()
        assert (args.epochs, args.opt, args.weight_decay, args.warmup_epochs) == (300, "adamw", 0.05, 5)
        assert (args.smoothing, args.drop_path, args.aa, args.reprob) == (0.1, 0.1, "rand-m9-mstd0.5-inc1", 0.25)
        assert (args.mixup, args.cutmix, args.repeated_aug, args.model_ema_decay) == (0.8, 1.0, True, 0.99996)
        # TokenMix: block masks, 14 tokens (the default of 14x14) beside half of them, binary cross entropy.
        assert (args.mixer, args.mask_type, args.minimum_tokens, args.bce_loss) == ("tokenmix", "block", None, True)
    assert parse(["--recipe", "deit_s", "--epochs", "7"]).epochs == 7
    with pytest.raises(ValueError, match="--recipe must be one of"):
        load_recipe("deit_xxl")


def test_bad_arguments_get_a_sentence(folder: Path, bank: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs --data-path"):
        train(parse(["--data", "imagefolder", "--output", str(tmp_path / "a")]))
    with pytest.raises(ValueError, match="is missing"):
        train(parse(tiny(tmp_path, tmp_path / "b")))
    with pytest.raises(ValueError, match="--batch-size 800"):
        train(parse(tiny(folder, tmp_path / "c", "--batch-size", "800")))
    other = make_folder(tmp_path / "other", classes=4, train=31, val=1)
    with pytest.raises(ValueError, match="bank of another data set"):
        train(parse(tiny(other, tmp_path / "d", "--maps", str(bank))))
    train(parse(tiny(folder, tmp_path / "e", "--epochs", "1", "--max-steps", "1")))
    with pytest.raises(ValueError, match=r"--seed 0 \(now 1\)"):
        train(
            parse(tiny(folder, tmp_path / "e", "--epochs", "1", "--max-steps", "1", "--seed", "1", "--resume", "auto"))
        )


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match=r"last\.pt cannot be written: no space"):
        write_atomic(path, fail)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"], "half a file was left"
    assert checkpoint.load(path) == {"step": 1}
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"not a file of torch\.save"):
        checkpoint.load(path)


def test_probe_separates_and_folds_the_standardisation() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (300,), generator=generator)
    centres = 100 + 5 * torch.randn(3, 8, generator=generator)
    features = centres[labels] + torch.randn(300, 8, generator=generator)
    layer = probe(features, labels, 3)
    logits = features @ layer["weight"].T + layer["bias"]
    assert (logits.argmax(1) == labels).float().mean() > 0.97


def test_picture_weights_are_the_evidence_it_shows(folder: Path, bank: Path, tmp_path: Path) -> None:
    run = build(parse(tiny(folder, tmp_path, "--maps", str(bank), "--aa", "none")))
    batch = next(run.loader.epoch(0))
    places = run.evidence(batch)
    mixed = tokenmix(
        batch.images,
        batch.labels,
        num_classes=4,
        **places,
        patch_size=8,
        seed=1,
        minimum_tokens=2,
        mode="elem",
    )
    evidence = token_evidence(as_evidence(places), batch.labels, (mixed.mask.shape[1], mixed.mask.shape[2]))
    torch.testing.assert_close((evidence * ~mixed.mask).sum((1, 2)), mixed.weights[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close((evidence.flip(0) * mixed.mask).sum((1, 2)), mixed.weights[:, 1], rtol=0, atol=1e-5)


def test_published_mix_of_the_profile_and_ours_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(6, 3, 56, 56, generator=generator)
    labels = torch.randint(20, (6,), generator=generator)
    values = torch.rand(6, 3, 18, 18, generator=generator)
    indices = ((labels[:, None] + torch.arange(3)) % 20)[:, :, None, None].expand(values.shape).contiguous()
    mixed, targets = PublishedMix(values, indices, 20, 8, 3)(images.clone(), labels)
    mask = (mixed != images).any(1).unflatten(1, (7, 8)).unflatten(3, (7, 8)).any(4).any(2)  # [B, 7, 7]
    assert bool((mask == mask[0]).all()) and 24 + 3 - 2 <= int(mask[0].sum()) <= 24 + 3
    ours = tokenmix(images, labels, num_classes=20, maps=TopKMaps(values, indices), mask=mask, patch_size=8)
    torch.testing.assert_close(ours.images, mixed)
    torch.testing.assert_close(ours.targets, targets, rtol=0, atol=1e-5)


def test_profile_writes_all_mixers(tmp_path: Path) -> None:
    profile = profile_mixers(parse(tiny(Path("unused"), tmp_path, "--max-steps", "2", "--batch-size", "4")))
    assert json.loads((tmp_path / "mixers.json").read_text()) == profile
    for row in profile["mixers"].values():
        assert 0 < row["mixing_ms"] < row["step_ms"]
    assert (tmp_path / "mixers.png").is_file()


@pytest.mark.skipif(find_spec("elpv_dataset") is None, reason="elpv-dataset is not installed (extra demo)")
def test_elpv_split_is_fixed_and_stratified() -> None:
    data = load_data(parse(["--recipe", "demo"]))
    assert (len(data.train), len(data.val)) == (2098, 526)
    assert not set(data.train.names) & set(data.val.names)
    # Counts of the published labels, probability at least one half: 705, 369, 1098, 452.
    assert [data.labels.count(label) for label in range(4)] == [564, 295, 878, 361]
    assert data.digest == load_data(parse(["--recipe", "demo"])).digest
    assert round(data.majority(), 3) == round(220 / 526, 3)
    assert data.train[0][0].size == (300, 300)
    cutmix = make_evidence(parse(["--recipe", "demo", "--mixer", "cutmix"]), data, torch.device("cpu"), 0)
    assert cutmix.describe() == "area shares", "CutMix is by area unless a teacher is asked for"
