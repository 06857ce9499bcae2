"""What happens when a loss is not finite: stop, keep what is needed to repeat the step, and repeat it."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import checkpoint
from .data import to_device
from .parser import build_parser
from .run import Run, build
from .step import forward, set_mixing
from .values import OWN, typed


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient was not finite; the message names the file with which to replay the step."""


def stop_at(run: Run, trace: list[dict[str, Any]], update: int) -> NoReturn:
    """Save what is needed to repeat an update that was not finite, and stop all processes."""
    steps = checkpoint.gather([entry for entry in trace if entry["update"] == update])
    first = steps[0][0]
    path = Path(run.args.output) / f"nonfinite-{first['epoch']}-{first['step']}.pt"
    if run.rank == 0:
        state = {"args": checkpoint.plain_args(run.args), "model": run.model.state_dict(), "steps": list(steps)}
        checkpoint.save(state, path)
    raise NonFiniteLoss(
        f"loss or gradient not finite in epoch {first['epoch']}, step {first['step']} (mixing seed {first['seed']}).\n"
        f"Weights, seed and image ids are in {path}; to look into it: python -m train --replay {path}"
    )


def replay_args(args: argparse.Namespace, saved: dict[str, Any]) -> argparse.Namespace:
    """Arguments of the run that a nonfinite-*.pt file holds, checked like a command line.

    Where it writes and on what it runs is for this call to say; nothing is downloaded because the file says so.

    Raises:
        ValueError: the file holds values that the flags do not take.
    """
    parser = build_parser()
    found = typed(parser, saved, OWN)
    if found.get("data_kwargs") or any(key.startswith("pretrained") for key in found.get("model_kwargs") or {}):
        raise ValueError(
            "--replay: the file asks for --data-kwargs or pretrained weights in --model-kwargs, which could load "
            "anything: repeat the run itself with --log-every 1 instead"
        )
    if args.data_path is not None:
        found["data_path"] = args.data_path
    amp = saved.get("amp")
    return argparse.Namespace(
        **{**vars(args), **found, "amp": amp if isinstance(amp, bool) else None, "compile": False}
    )


def replay(args: argparse.Namespace) -> None:
    """Repeat the steps of a nonfinite-*.pt file and print where the first value that is not finite appears."""
    state = checkpoint.load(args.replay)
    if not isinstance(state.get("steps"), list) or not isinstance(state.get("args"), dict):
        raise ValueError(f"--replay must be a nonfinite-*.pt file, got {args.replay}: it holds no steps")
    saved = replay_args(args, state["args"])
    run = build(saved)
    run.model.load_state_dict(state["model"])
    run.net.train()
    first: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                first.append(name)

        return hook

    for name, module in run.model.named_modules():
        module.register_forward_hook(watch(name or type(run.model).__name__))
    world = len(state["steps"])
    for rank, steps in enumerate(state["steps"]):
        for entry in steps:
            batch = run.loader.batch(entry["epoch"], entry["positions"], entry["ids"], world)
            batch = to_device(batch, run.mix_device, saved.channels_last)
            checkpoint.set_rng_state(entry["rng"], run.device)
            first.clear()
            set_mixing(run, entry["epoch"])
            loss = forward(run, batch, entry["seed"], rank=rank)
            loss.backward()
            gradients = [
                name
                for name, p in run.model.named_parameters()
                if p.grad is not None and not bool(torch.isfinite(p.grad).all())
            ]
            weights = [name for name, p in run.model.named_parameters() if not bool(torch.isfinite(p).all())]
            print(
                f"epoch {entry['epoch']}, step {entry['step']}, rank {rank}, mixing seed {entry['seed']}\n"
                f"  image ids {entry['ids'].tolist()}\n  loss {loss.item()}\n"
                f"  first module whose output is not finite: {first[0] if first else 'none'}\n"
                f"  weights that are not finite: {', '.join(weights) or 'none'}\n"
                f"  gradients that are not finite: {len(gradients)} of {len(list(run.model.parameters()))}"
            )
