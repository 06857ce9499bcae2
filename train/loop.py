"""The training loop: one step, one epoch, evaluation, and what is written at the end of each."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoint
from .data import Batch, to_device
from .guard import stop_at
from .meters import StepTimer, write_records
from .run import Progress, Run, build, resume, save_checkpoint, say


def mixing_seed(seed: int, epoch: int, step: int) -> int:
    """The seed of one step's masks, the same on all ranks: they differ by their sample offset."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def forward(run: Run, batch: Batch, seed: int, timer: StepTimer | None = None, rank: int | None = None) -> Tensor:
    """The loss of a batch that is on the device, mixed with the masks of (seed, rank)."""
    offset = (run.rank if rank is None else rank) * run.args.batch_size
    images, targets = run.mix(batch.images, batch.labels, **run.evidence(batch), seed=seed, sample_offset=offset)
    if timer:
        timer.mark("mixing")
    with run.autocast():
        logits = run.net(images)
    loss: Tensor = run.criterion(logits.float(), targets)
    if timer:
        timer.mark("forward")
    return loss


def train_epoch(run: Run, progress: Progress, bar: tqdm, timer: StepTimer) -> None:
    """Train from step progress.step to the end of the epoch."""
    args, device = run.args, run.device
    run.net.train()
    steps = run.steps_per_epoch()
    steps -= steps % args.accumulate
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    loss_sum = torch.tensor(progress.loss_sum, dtype=torch.float64, device=device)
    bad_update = torch.full((), -1, dtype=torch.int64, device=device)  # first update that was not finite
    trace: list[dict[str, Any]] = []  # what was done since the losses were last read
    batches = run.loader.epoch(progress.epoch, first_step=progress.step)
    timer.start()
    for step, host_batch in zip(range(progress.step, steps), batches, strict=False):
        last_of_update = (step + 1) % args.accumulate == 0
        seed = mixing_seed(args.seed, progress.epoch, step)
        trace.append(
            {
                "update": progress.updates,
                "seed": seed,
                "epoch": progress.epoch,
                "step": step,
                "positions": host_batch.positions,
                "ids": host_batch.ids,
                "rng": checkpoint.rng_state(device),
            }
        )
        batch = to_device(host_batch, device, args.channels_last)
        timer.mark("data")
        # Gradients are exchanged between processes once per update.
        net = run.net
        with net.no_sync() if isinstance(net, DistributedDataParallel) and not last_of_update else nullcontext():
            loss = forward(run, batch, seed, timer)
            (loss / args.accumulate).backward()
        loss_sum += loss.detach()
        timer.mark("backward")
        timer.count(len(host_batch.labels))
        if last_of_update:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            bad_update = torch.where((bad_update < 0) & ~torch.isfinite(norm), progress.updates, bad_update)
            if args.clip_grad:
                nn.utils.clip_grads_with_norm_(parameters, args.clip_grad, norm)
            if run.guarded:
                # Nothing moves any more once an update was bad: the weights stay what they were at that step.
                run.optimizer.found_inf = (bad_update >= 0).float()  # type: ignore[attr-defined]
            elif int(bad_update) >= 0:
                stop_at(run, trace, progress.updates)
            run.optimizer.step()
            run.optimizer.zero_grad()
            progress.updates += 1
            if run.ema:
                run.ema.update(run.model, progress.updates)
            run.scheduler.step_update(progress.updates)
        timer.mark("update")

        progress.step = step + 1
        saving = args.save_every and progress.step % args.save_every == 0 and last_of_update
        if progress.step % args.log_every == 0 or saving or progress.step == steps:
            total, first_bad = torch.stack([loss_sum, bad_update.double()]).tolist()
            if first_bad >= 0:
                stop_at(run, trace, int(first_bad))
            trace = [entry for entry in trace if entry["update"] >= progress.updates]
            progress.loss_sum = total
            bar.set_postfix(loss=f"{total / progress.step:.4f}", lr=f"{run.optimizer.param_groups[0]['lr']:.1e}")
        bar.update()
        if saving and progress.step < steps:
            save_checkpoint(run, progress)
            timer.start()


@torch.no_grad()
def evaluate(run: Run, model: nn.Module) -> dict[str, float]:
    """Top-1, top-5 (where there are more than 5 classes) in percent, and cross entropy, over all processes."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=run.device)  # top-1, top-5, loss, images
    many = len(run.data.classes) > 5
    for host_batch in run.loader.validation():
        images = run.data.normalise(host_batch[0].to(run.device, non_blocking=True))
        labels = host_batch[1].to(run.device, non_blocking=True)
        if run.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with run.autocast():
            logits = model(images)
        logits = logits.float()
        hits = logits.topk(5 if many else 1).indices == labels[:, None]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.full_like(loss, len(labels))])
    if run.world > 1:
        dist.all_reduce(sums)
    top1, top5, loss, images = sums.tolist()
    scores = {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images}
    return scores if many else {key: value for key, value in scores.items() if key != "top5"}


def evaluate_checkpoint(run: Run, path: Path) -> None:
    """Print the scores of the weights and of their average in a last.pt or best.pt."""
    state = checkpoint.load(path)
    for key, name in (("model", "raw weights"), ("ema", "averaged weights")):
        if state.get(key):
            run.model.load_state_dict(state[key])
            scores = evaluate(run, run.model)
            say(run, f"{name}: " + ", ".join(f"{score} {value:.4g}" for score, value in scores.items()))


def end_epoch(run: Run, progress: Progress, seconds: float, board: Any) -> None:
    """Evaluate, write the records, and save."""
    args = run.args
    record: dict[str, Any] = {
        "epoch": progress.epoch,
        "updates": progress.updates,
        "lr": run.optimizer.param_groups[0]["lr"],
        "train_loss": progress.loss_sum / max(1, progress.step),
    }
    if (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == args.epochs:
        models = {"val": run.model} | ({"ema": run.ema.module} if run.ema else {})
        for name, model in models.items():
            record |= {f"{name}_{key}": value for key, value in evaluate(run, model).items()}
    record["seconds"] = round(seconds, 2)
    progress.history.append(record)
    score = max(record.get("val_top1", -1.0), record.get("ema_top1", -1.0))
    improved, progress.best = score > progress.best, max(score, progress.best)
    progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
    run.scheduler.step(progress.epoch)
    save_checkpoint(run, progress)
    if run.rank:
        return
    write_records(progress.history, Path(args.output))
    if improved and args.keep_best:
        checkpoint.save(
            {
                "args": checkpoint.plain_args(args),
                "epoch": record["epoch"],
                "record": record,
                "model": run.model.state_dict(),
                "ema": run.ema.module.state_dict() if run.ema else None,
            },
            Path(args.output) / "best.pt",
        )
    if board:
        for key, value in record.items():
            board.add_scalar(key, value, record["epoch"])
    tqdm.write(
        "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()
        )
    )


def train(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A whole run; returns the records of its epochs (the lines of metrics.jsonl).

    Raises:
        ValueError: arguments that do not fit together.
        NonFiniteLoss: the loss was not finite; weights are saved as they were, for --replay.
    """
    run = build(args)
    if args.eval:
        evaluate_checkpoint(run, Path(args.output) / "last.pt" if args.resume == "auto" else Path(args.resume))
        return []
    output = Path(args.output)
    random_seed = mixing_seed(args.seed, -1, run.rank)  # of dropout and drop path: other ones on every rank
    torch.manual_seed(random_seed)
    random.seed(random_seed)
    np.random.seed(random_seed % 2**32)
    progress = Progress()
    last = output / "last.pt"
    if args.resume and (args.resume != "auto" or last.is_file()):
        progress = resume(run, last if args.resume == "auto" else Path(args.resume))
    elif last.is_file():
        raise ValueError(f"{last} exists: give another --output, or --resume auto to go on with it")
    board = None
    if run.rank == 0:
        checkpoint.write_lines([json.dumps(checkpoint.plain_args(args), indent=1)], output / "args.json")
        if args.tensorboard:
            if find_spec("tensorboard") is None:
                raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            board = SummaryWriter(str(output))
    say(run, describe(run))
    timer, steps = StepTimer(run.device), run.steps_per_epoch()
    begin = time.perf_counter()
    for epoch in range(progress.epoch, args.epochs):
        start = time.perf_counter()
        with tqdm(
            total=steps,
            initial=progress.step,
            desc=f"epoch {epoch + 1}/{args.epochs}",
            unit="step",
            disable=True if run.rank else None,
            leave=False,
            dynamic_ncols=True,
        ) as bar:
            train_epoch(run, progress, bar, timer)
        end_epoch(run, progress, time.perf_counter() - start, board)
    skipped = run.loader.skipped()
    if run.rank == 0:
        if board:
            board.close()
        finish(run, progress, timer, time.perf_counter() - begin)
        if skipped:
            print(f"skipped     {len(skipped)} images that cannot be read")
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return progress.history


def describe(run: Run) -> str:
    """What is trained on what, in two lines."""
    args, weights = run.args, sum(parameter.numel() for parameter in run.model.parameters())
    processes = f" on {run.world} processes" if run.world > 1 else ""
    return (
        f"{args.model}, {weights / 1e6:.2f} M weights, on {run.data.describe()}\n"
        f"{args.epochs} epochs of {run.steps_per_epoch()} steps of {args.batch_size} images{processes}, "
        f"device {run.device}\nmixer {args.mixer}, targets from {run.evidence.describe()}"
    )


def finish(run: Run, progress: Progress, timer: StepTimer, seconds: float) -> None:
    """Print accuracy, step times and the path of the picture."""
    record, output = progress.history[-1], Path(run.args.output)
    print(f"\n{seconds:.0f} s for the epochs of this call. Accuracy on the {len(run.data.val)} validation images:")
    for name, title in (("val", "raw weights"), ("ema", "averaged weights")):
        if f"{name}_top1" in record:
            top5 = f", top-5 {record[f'{name}_top5']:.1f} %" if f"{name}_top5" in record else ""
            print(f"  {title:<18} top-1 {record[f'{name}_top1']:.1f} %{top5}")
    if not math.isnan(majority := run.data.majority()):
        print(f"  {'largest class':<18} {100 * majority:.1f} % (what always guessing it would give)")
    print()
    print(timer.table())
    use_ema = run.ema is not None and record.get("ema_top1", -1.0) >= record.get("val_top1", -1.0)
    weights = run.ema.module.state_dict() if run.ema and use_ema else run.model.state_dict()
    tensors = {key: value.contiguous() for key, value in weights.items()}
    checkpoint.write_atomic(output / "model.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
    print(f"\nrecords     {output / 'metrics.jsonl'}, {output / 'summary.csv'}\ncheckpoint  {output / 'last.pt'}")
    print(f"weights     {output / 'model.safetensors'} ({'averaged' if use_ema else 'raw'}, as timm reads them)")
    if run.args.picture:
        from .picture import mix_picture

        picture = mix_picture(run, output / "mix.png")
        print(f"picture     {picture or 'none: this mixer has no token masks'}")
