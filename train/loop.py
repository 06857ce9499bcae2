"""The training loop: one step, one epoch, evaluation, and what is written at the end of each."""

import argparse
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import checkpoint
from .boards import Boards, check_boards
from .data import to_device
from .device import sum_dtype
from .evaluate import evaluate, evaluate_checkpoint
from .files import lock_folder, write_atomic, write_lines
from .guard import stop_at
from .meters import StepTimer, write_records
from .picture import mix_picture
from .resume import resume, resume_path
from .run import Progress, Run, build, save_best, save_checkpoint, say
from .step import forward, mixing_seed, seed_all, set_mixing


def train_epoch(run: Run, progress: Progress, bar: tqdm, timer: StepTimer) -> None:
    """Train from step progress.step to the end of the epoch."""
    args, device = run.args, run.device
    run.net.train()
    set_mixing(run, progress.epoch)
    steps = run.steps_per_epoch()
    steps -= steps % args.accumulate
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    loss_sum = torch.tensor(progress.loss_sum, dtype=sum_dtype(device), device=device)
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
        batch = to_device(host_batch, run.mix_device, args.channels_last)
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
            total, first_bad = torch.stack([loss_sum, bad_update.to(loss_sum.dtype)]).tolist()
            if first_bad >= 0:
                stop_at(run, trace, int(first_bad))
            trace = [entry for entry in trace if entry["update"] >= progress.updates]
            progress.loss_sum = total
            bar.set_postfix(loss=f"{total / progress.step:.4f}", lr=f"{run.optimizer.param_groups[0]['lr']:.1e}")
        bar.update()
        if saving and progress.step < steps:
            save_checkpoint(run, progress)
            timer.start()


def end_epoch(run: Run, progress: Progress, seconds: float, boards: Boards | None) -> None:
    """Evaluate, write the records, and save."""
    args = run.args
    record: dict[str, Any] = {
        "epoch": progress.epoch,
        "updates": progress.updates,
        "lr": run.optimizer.param_groups[0]["lr"],
        "train_loss": progress.loss_sum / max(1, progress.step),
    }
    evaluated = (progress.epoch + 1) % args.eval_every == 0 or progress.epoch + 1 == args.epochs
    if evaluated:
        models = {"val": run.model} | ({"ema": run.ema.module} if run.ema else {})
        for name, model in models.items():
            record |= {f"{name}_{key}": value for key, value in evaluate(run, model).items()}
    record["seconds"] = round(seconds, 2)
    progress.history.append(record)
    score = max(record.get("val_top1", -1.0), record.get("ema_top1", -1.0))
    if score > progress.best:
        progress.best, progress.best_epoch = score, record["epoch"]
    progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
    run.scheduler.step(progress.epoch)
    saved = evaluated or progress.epoch % args.save_epochs == 0
    if saved:
        save_checkpoint(run, progress)
    if run.rank:
        return
    # A kill from here on loses nothing: `train` writes both again from last.pt.
    if saved:
        write_derived(run, progress)
    if boards:
        boards.write(record)
    tqdm.write(
        "  ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in record.items()
        )
    )


def write_derived(run: Run, progress: Progress) -> None:
    """What follows from a checkpoint: the records, and best.pt where the last epoch is the best one."""
    write_records(progress.history, Path(run.args.output))
    if run.args.keep_best and progress.step == 0 and progress.best_epoch == progress.epoch - 1 >= 0:
        save_best(run, progress)


def train(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A whole run; returns the records of its epochs (the lines of metrics.jsonl).

    Raises:
        ValueError: arguments that do not fit together.
        NonFiniteLoss: the loss was not finite; weights are saved as they were, for --replay.
    """
    run = build(args)
    output = Path(args.output)
    if args.eval:
        evaluate_checkpoint(run, resume_path(args) or output / "last.pt")
        return []
    check_boards(args)
    lock = lock_folder(output) if run.rank == 0 else None
    try:
        return train_run(run, output)
    finally:
        if lock:
            lock.release()


def train_run(run: Run, output: Path) -> list[dict[str, Any]]:
    """Train in a folder that is locked."""
    args = run.args
    seed_all(mixing_seed(args.seed, -1, run.rank))  # of dropout and drop path: other ones on every rank
    progress = Progress()
    path = resume_path(args)
    if path:
        progress = resume(run, path)
    elif (output / "last.pt").exists():
        raise ValueError(f"{output / 'last.pt'} exists: give another --output, or --resume auto to go on with it")
    if run.rank:
        train_epochs(run, progress, None)
        return progress.history
    write_lines([json.dumps(checkpoint.plain_args(args), indent=1)], output / "args.json")
    if path:
        write_derived(run, progress)
    with Boards(args, progress.history, progress.wandb_id) as boards:
        progress.wandb_id = boards.wandb_id
        train_epochs(run, progress, boards)
    return progress.history


def train_epochs(run: Run, progress: Progress, boards: Boards | None) -> None:
    """Train from where the run is to its end, and say what became of it."""
    args = run.args
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
        end_epoch(run, progress, time.perf_counter() - start, boards)
    skipped = run.loader.skipped()
    if run.rank == 0:
        finish(run, progress, timer, time.perf_counter() - begin)
        if skipped:
            print(f"skipped     {len(skipped)} images that cannot be read")
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def describe(run: Run) -> str:
    """What is trained on what, in two lines."""
    args, weights = run.args, sum(parameter.numel() for parameter in run.model.parameters())
    processes = f" on {run.world} processes" if run.world > 1 else ""
    return (
        f"{args.model}, {weights / 1e6:.2f} M weights, on {run.data.describe()}\n"
        f"{args.epochs} epochs of {run.steps_per_epoch()} steps of {args.batch_size} images{processes}, "
        f"device {run.device}\nmixer {args.mixer}, targets from {run.evidence_name()}"
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
    use_ema = checkpoint.best_is(record, run.ema is not None) == "ema"
    weights = run.ema.module.state_dict() if run.ema and use_ema else run.model.state_dict()
    tensors = {key: value.contiguous() for key, value in weights.items()}
    write_atomic(output / "model.safetensors", lambda file: file.write(safetensors.torch.save(tensors)))
    print(f"\nrecords     {output / 'metrics.jsonl'}, {output / 'summary.csv'}\ncheckpoint  {output / 'last.pt'}")
    print(f"weights     {output / 'model.safetensors'} ({'averaged' if use_ema else 'raw'}, as timm reads them)")
    if run.args.picture:
        picture = mix_picture(run, output / "mix.png")
        print(f"picture     {picture}")
