"""docs/integrate.md: its code runs, section by section, with the frameworks that are installed."""

import importlib.util
import re
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mix_helpers import generator
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

pytest.importorskip("timm", reason="needs the extra 'maps'")

from timm.data import FastCollateMixup
from timm.data.loader import PrefetchLoader

from tokenmix_kernels import TokenMix

TEXT = (Path(__file__).parents[1] / "docs" / "integrate.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.S | re.M))
COUNT, CLASSES = 8, 1000


class Pictures(Dataset):
    """(PIL image, label), with a transform that can be set, as timm's ImageDataset has it."""

    transform = None

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        image = Image.fromarray(np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8))
        return (image if self.transform is None else self.transform(image)), 100 * index


@contextmanager
def page():
    """A function that executes the blocks of a section, with what the page says is the reader's, and gives all names.

    What comes out of the mix is counted in `TokenMix` itself, by a hook of PyTorch.
    """
    torch.manual_seed(0)
    mixed = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, given, result: mixed.append((given, result)) if isinstance(module, TokenMix) else None
    )

    def execute(section, **more):
        model = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
        images = torch.rand(COUNT, 3, 224, 224, generator=generator())
        names = {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), 0.1),
            "loader": DataLoader(TensorDataset(images, 100 * torch.arange(COUNT)), 4),
            "mixed_batches": mixed,
            **more,
        }
        blocks = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.S)
        assert blocks
        for block in blocks:
            names["dataset"] = Pictures()  # timm sets transforms in it
            exec(compile(block, f"docs/integrate.md, {section}", "exec"), names)
        return names

    yield execute
    hook.remove()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with page() as execute:
        yield execute


def needs(package):
    """(the other sections need what the tests need anyway)"""
    absent = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(absent, reason=f"needs {package}, of the extra 'integrations'")


def test_every_section_is_tried_and_named_in_the_table():
    tested = [name.removeprefix("test_") for name in globals() if name.startswith("test_")][1:]
    assert [re.sub(r"\W", "_", name.lower()) for name in SECTIONS] == tested
    table = re.findall(r"^\| \[(.+?)\]\(#(.+?)\)", TEXT, re.M)
    assert [name for name, _ in table] == list(SECTIONS)
    for name, anchor in table:
        assert anchor == re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-")


def test_timm(run):
    names = run("timm", maps=torch.rand(COUNT, 7, 7, generator=generator(1)))
    assert type(names["one_line"]) is type(names["loader_train"])
    batches = list(names["loader_train"])
    assert [(images.shape, targets.shape) for images, targets in batches] == [((4, 3, 224, 224), (4, CLASSES))] * 2
    assert ((torch.cat([targets for _, targets in batches]) > 2e-4).sum(1) == 2).all(), "nothing was mixed"
    assert isinstance(names["collate_fn"], FastCollateMixup) and type(names["in_workers"]) is PrefetchLoader
    targets = torch.cat([targets for _, targets in names["in_workers"]])
    assert ((targets > 2e-4).sum(1) == 1).all(), "mixed although switched off"
    assert names["targets"].shape == (4, CLASSES)


def hunks_of(diff):
    """(first line before, first line after, lines more, what is added) of each hunk; its header counts its lines."""
    for head, body in re.findall(r"^@@ (.+?) @@\n(.*?)(?=^@@|\Z)", diff, re.S | re.M):
        old, old_count, new, new_count = (int(number) for number in re.findall(r"\d+", head))
        lines = body.splitlines()
        assert (old_count, new_count) == tuple(sum(line[:1] != sign for line in lines) for sign in "+-")
        yield old, new, new_count - old_count, "\n".join(line[1:] for line in lines if line[:1] == "+")


def check_diff_of_train_py(diff, name):
    """What `git apply` reads in it fits together, and the added lines obey the script's flags."""
    starts, ends, more, added = zip(*hunks_of(diff), strict=True)
    assert [end - start for start, end in zip(starts, ends, strict=True)] == [0, *accumulate(more)][:-1]
    (made,) = (lines for lines in added if "TokenMix(" in lines)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 64, 64)
    for mixup, cutmix in ((0.2, 1.0), (0.0, 1.0), (0.2, 0.0), (0.0, 0.0)):
        names = {"args": SimpleNamespace(mixup_alpha=mixup, cutmix_alpha=cutmix), "num_classes": 5}
        exec(re.search(r"^from tokenmix.+", added[0], re.M)[0] + "\n" + dedent(made), names)
        assert names["mixup_cutmix"] is None or name == "mixup_cutmix", "mixed in the workers and on the device"
        seen = set()
        for seed in range(20 if names[name] is not None else 0):
            mixed, targets = names[name](images, torch.arange(4), seed=seed)
            assert ((targets > 0).sum(1) <= 2).all(), "smoothed, which the script's loss does again"
            seen.add("mixup" if (mixed == mixed[..., :1, :1]).all() else "tokens")
        assert seen == {kind for kind, alpha in (("mixup", mixup), ("tokens", cutmix)) if alpha}


def test_torchvision(run):
    in_workers, on_device = re.findall(r"```diff\n(---.*?)```", SECTIONS["torchvision"], re.S)
    check_diff_of_train_py(in_workers, "mixup_cutmix")
    check_diff_of_train_py(on_device, "mix")
    names = run("torchvision")
    pictures = names["data_loader"].dataset
    image, target = names["collate_fn"]([pictures[n] for n in range(4)])
    assert image.shape == (4, 3, 224, 224) and ((target > 0).sum(1) == 2).all()
    assert image.min() < 0, "not normalised"
    assert names["hits"].shape == (4,) and names["loss"].isfinite()
    torch.testing.assert_close(names["twice"], names["as_if"])
    assert abs(names["twice"] - names["once"]) > 1e-4
    assert type(names["images"]) is names["tv_tensors"].Image and names["targets"].shape == (4, CLASSES)


def test_deit(run):
    names = run("DeiT")
    assert (names["positive"] == CLASSES).all()
    assert (names["both_labels"] <= 2).all()
    assert names["loss"].isfinite() and names["bce_loss"].isfinite()
    assert len(names["mixed_batches"]) == 4


@needs("transformers")
def test_hugging_face_trainer(run, tmp_path):
    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

    names = run("Hugging Face Trainer")
    config = ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        image_size=32,
        num_labels=CLASSES,
    )
    images = torch.rand(COUNT, 3, 32, 32, generator=generator())
    rows = [{"pixel_values": image, "labels": 100 * n} for n, image in enumerate(images)]
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        per_device_eval_batch_size=4, remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = names["MixTrainer"](
        ViTForImageClassification(config), args, train_dataset=rows, eval_dataset=rows,
        mix=TokenMix(num_classes=CLASSES, mixup_alpha=0.0),
    )  # fmt: skip
    loss = trainer.train().training_loss
    # Untrained, each class has a loss of about log 2, if accumulated steps are averaged.
    assert abs(loss - 0.693) < 0.1
    seen = [not torch.equal(given[0], result[0]) for given, result in names["mixed_batches"]]
    assert seen == [True] * 4
    metrics = trainer.evaluate()
    seen = [not torch.equal(given[0], result[0]) for given, result in names["mixed_batches"]]
    assert seen == [True] * 4 + [False] * 2 and metrics["eval_loss"] > 0


@needs("lightning")
def test_lightning(run):
    names = run("Lightning")
    results = [result for _, result in names["mixed_batches"]]
    assert len(results) == 2
    for images, targets in results:
        assert images.dtype == torch.float64 and targets.dtype == torch.float32


@needs("accelerate")
def test_accelerate(run):
    assert len(run("accelerate")["mixed_batches"]) == 2


def rank_of_ddp_and_fsdp2(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with page() as run:
            names = run("DDP and FSDP2")
        assert len(names["mixed_batches"]) == 5 and names["loss"].isfinite()
        gradients = [parameter.grad.full_tensor() for parameter in names["parallel"].parameters()]
        # What all ranks made is what each has, and ranks draw masks of their own.
        targets = names["mixed_batches"][0][1][1]
        for values, equal in ((gradients[-1], True), (targets, False)):
            all_ranks = [torch.empty_like(values) for _ in range(2)]
            dist.all_gather(all_ranks, values)
            assert torch.equal(*all_ranks) == equal
        assert names["targets"].full_tensor().shape == (4, CLASSES) and names["targets"].placements[0].is_shard(0)
    finally:
        dist.destroy_process_group()


def test_ddp_and_fsdp2(tmp_path):
    # Spawned: autograd refuses to run in a fork of a process whose own autograd has started threads.
    mp.spawn(rank_of_ddp_and_fsdp2, (tmp_path,), nprocs=2)


def test_torch_compile(run, monkeypatch):
    # The graph as it is: Inductor, which tests/test_operators.py has, takes a minute for the model around the mix.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    names = run("torch.compile")
    images, labels = next(iter(names["loader"]))
    losses = {float(names["step"](images, labels).detach()) for _ in range(3)}
    assert len(losses) == 3, "every call mixes in the same way"


def test_traps_of_label_smoothing(run):
    names = run("Traps of label smoothing")
    assert (names["rows"].sum(1) == 2).all()
    assert names["targets"].max() <= 1 and names["loss"].isfinite()
