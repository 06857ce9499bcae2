"""A run: everything that a step needs, how it is built from the arguments, saved and resumed."""

import argparse
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tokenmix_kernels import TokenMix

from . import checkpoint
from .data import Data, EpochLoader, load_data
from .device import mixing_device, start_processes
from .evidence import AttentionEvidence
from .model import make_attention, make_mixer, make_model
from .teacher import Evidence, make_evidence

# Optimisers of torch that leave weights and moments alone, on the device, where found_inf is set.
FUSED = ("adam", "adamw", "sgd", "nesterov", "momentum")


@dataclass
class Progress:
    """Where the run is; the whole of it goes into every checkpoint."""

    epoch: int = 0
    step: int = 0  # steps (batches) done in this epoch
    updates: int = 0  # optimiser updates done in the run
    loss_sum: float = 0.0  # of the losses of this epoch's steps
    best: float = -1.0  # top-1 of the best epoch, in percent
    best_epoch: int = -1
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of metrics.jsonl
    wandb_id: str | None = None  # of the run of Weights & Biases, where there is one


@dataclass
class Run:
    """Everything that a step needs."""

    args: argparse.Namespace
    rank: int
    world: int
    device: torch.device
    data: Data
    loader: EpochLoader
    evidence: Evidence  # that the mixer is given
    attention: AttentionEvidence | None  # in place of it, with --evidence attention
    mix: TokenMix
    model: nn.Module  # the weights
    net: nn.Module  # the same, compiled and wrapped as asked
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    criterion: nn.Module
    guarded: bool  # the optimiser obeys found_inf on the device
    keep_previous: bool = True  # the last.pt in the folder is one to keep as previous.pt

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.args.amp else nullcontext()

    @property
    def mix_device(self) -> torch.device:
        """Where batches are mixed."""
        return mixing_device(self.device)

    def evidence_name(self) -> str:
        """One phrase: what the targets follow."""
        return (self.attention or self.evidence).describe()

    def steps_per_epoch(self) -> int:
        steps = self.loader.steps
        return min(steps, self.args.max_steps) if self.args.max_steps else steps


def say(run: Run, text: str) -> None:
    """Print on the first process, above the progress bar."""
    if run.rank == 0:
        tqdm.write(text)


def build(args: argparse.Namespace) -> Run:
    """Processes, data, evidence, model and optimiser as the arguments say.

    Raises:
        ValueError: arguments that do not fit together.
    """
    rank, world, device = start_processes(args.device)
    if args.amp is None:
        args.amp = device.type == "cuda"
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    data = load_data(args)
    model = make_model(args, len(data.classes))
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device).to(memory_format=memory_format)

    mix = make_mixer(args, data, model)
    attention = make_attention(args, model, mix)
    evidence = make_evidence(args, data, device, rank)
    try:
        loader = EpochLoader(data, args, rank, world)
    except (AssertionError, AttributeError, IndexError, KeyError) as error:  # timm asserts that it knows the policy
        raise ValueError(
            f"--aa must be none or a policy as timm writes it, as rand-m9-mstd0.5-inc1, original or 3a, got {args.aa!r}"
        ) from error
    if loader.steps < args.accumulate:
        raise ValueError(
            f"an epoch has {loader.steps} steps of {args.batch_size} images on {world} process(es), "
            f"fewer than --accumulate {args.accumulate}: use a smaller --batch-size"
        )

    guarded = args.opt in FUSED and device.type in ("cpu", "cuda")
    options: dict[str, Any] = {"fused": True} if guarded else {}
    if "adam" in args.opt:
        options["eps"] = args.opt_eps
    if args.opt_betas:
        options["betas"] = tuple(args.opt_betas)
    scale = 1.0 if args.unscale_lr else args.batch_size * args.accumulate * world / 512
    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=args.lr * scale, weight_decay=args.weight_decay, momentum=args.momentum, **options
    )
    steps = min(loader.steps, args.max_steps) if args.max_steps else loader.steps
    scheduler, _ = create_scheduler_v2(
        optimizer,
        args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        cooldown_epochs=args.cooldown_epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=max(1, steps // args.accumulate),
    )
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    net: nn.Module = torch.compile(model) if args.compile else model  # type: ignore[assignment]
    if world > 1:
        net = DistributedDataParallel(net, device_ids=None if device.index is None else [device.index])
    return Run(
        args,
        rank,
        world,
        device,
        data,
        loader,
        evidence,
        attention,
        mix,
        model,
        net,
        ema,
        optimizer,
        scheduler,
        BinaryCrossEntropy() if args.bce_loss else SoftTargetCrossEntropy(),
        guarded,
    )


def averaged(run: Run) -> dict[str, Any] | None:
    """The averaged weights, where the run keeps them."""
    return run.ema.module.state_dict() if run.ema else None


def save_checkpoint(run: Run, progress: Progress) -> None:
    """Write last.pt: everything that the rest of the run depends on. The one before is kept as previous.pt."""
    states = checkpoint.gather(checkpoint.rng_state(run.device))
    if run.rank:
        return
    output = Path(run.args.output)
    scored = [record for record in progress.history if "val_top1" in record]
    checkpoint.save(
        {
            "args": checkpoint.plain_args(run.args),
            "world": run.world,
            "data": run.data.digest,
            "progress": vars(progress),
            "rng": list(states),
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "ema": averaged(run),
            "best_is": checkpoint.best_is(scored[-1] if scored else {}, run.ema is not None),
        },
        output / "last.pt",
        output / "previous.pt" if run.keep_previous else None,
    )
    run.keep_previous = True


def save_best(run: Run, progress: Progress) -> None:
    """Write best.pt: the weights as they are, after the best epoch so far."""
    record = progress.history[-1]
    checkpoint.save(
        {
            "args": checkpoint.plain_args(run.args),
            "epoch": record["epoch"],
            "record": record,
            "model": run.model.state_dict(),
            "ema": averaged(run),
            "best_is": checkpoint.best_is(record, run.ema is not None),
        },
        Path(run.args.output) / "best.pt",
    )
