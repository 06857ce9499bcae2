"""What --evidence attention costs of a training step of the demo, in CPU time: its parts, and whole steps.

    python -m bench.evidence_cost --rounds 30 --json bench/results/evidence_cost.json

One thread, random images (reading and augmenting them is the same for both), CPU time of the process, so that other
work on the machine counts as little as possible. A round makes one step with the attention, one without and one more
without, in turn first; a share is formed within a round, and the median taken over rounds. The second step without
shows how far two equal steps are apart. The parts are also timed on their own, within the steps with attention: what
the hook computes, and the targets; mixing too, which gives shares of tokens for its mask where there is attention.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from tokenmix_kernels import ClassAttention, TokenMix
from train.config import parse
from train.evidence import AttentionEvidence

from .machine import write_json

CLASSES = 4
WARM_UP = 2


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, whose calls append their CPU time."""

    def call(*args: Any, **options: Any) -> Any:
        begin = time.process_time()
        result = function(*args, **options)
        seconds.append(time.process_time() - begin)
        return result

    return call


class TimedAttention(ClassAttention):
    """Keeps the CPU time of every capture."""

    seconds: list[float]

    def capture(self, module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        begin = time.process_time()
        super().capture(module, inputs, options)
        self.seconds.append(time.process_time() - begin)


def measure(rounds: int, batch_size: int) -> dict[str, Any]:
    """Medians over rounds, in milliseconds and as shares of a step without attention."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args = parse(["--recipe", "demo"])
    model: Any = timm.create_model(
        args.model, num_classes=CLASSES, img_size=args.input_size, drop_path_rate=args.drop_path, **args.model_kwargs
    )
    options: dict[str, Any] = {
        "num_classes": CLASSES, "patch_size": 8, "mode": args.mixup_mode, "mean": [120.0] * 3, "std": [60.0] * 3,
    }  # fmt: skip
    plain, with_mix = TokenMix(**options), TokenMix(**options, return_mix=True)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=1e-4, weight_decay=args.weight_decay, fused=True)
    criterion = BinaryCrossEntropy()
    images = torch.randint(0, 256, (batch_size, 3, args.input_size, args.input_size), dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (batch_size,))
    captures: list[float] = []
    targets_of: list[float] = []
    mixing: dict[bool, list[float]] = {True: [], False: []}

    def step(attention: bool, seed: int) -> float:
        evidence: AttentionEvidence | None = None
        if attention:  # the hooks are there in these steps only
            evidence = AttentionEvidence(model, with_mix)
            evidence.attention.remove()
            evidence.attention = TimedAttention(model)
            evidence.attention.seconds = captures
            evidence.mixer = timed(with_mix, mixing[True])  # type: ignore[assignment]
            evidence.targets = timed(evidence.targets, targets_of)  # type: ignore[method-assign]
        begin = time.process_time()
        if evidence is None:
            mixed, targets = timed(plain, mixing[False])(images, labels, seed=seed)
            logits = model(mixed)
        else:
            logits, targets = evidence(model, images, labels, seed=seed)
        criterion(logits, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.process_time() - begin
        if evidence is not None:
            evidence.attention.remove()
        return seconds

    names = ("attention", "without", "without again")
    steps: dict[str, list[float]] = {name: [] for name in names}
    model.train()
    for turn in range(WARM_UP + rounds):
        for name in names[turn % 3 :] + names[: turn % 3]:
            seconds = step(name == "attention", seed=turn)
            if turn >= WARM_UP:
                steps[name].append(seconds)
    parts = [a + b for a, b in zip(captures[WARM_UP:], targets_of[WARM_UP:], strict=True)]

    def share(values: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(values, steps["without"], strict=True))

    return {
        "kind": "evidence-cost",
        "command": f"python -m bench.evidence_cost --rounds {rounds} --batch-size {batch_size}",
        "device": f"CPU, 1 thread, {platform.machine()}",
        "torch": torch.__version__,
        "batch_size": batch_size,
        "rounds": rounds,
        "step_ms": 1000 * statistics.median(steps["without"]),
        "capture_ms": 1000 * statistics.median(captures[WARM_UP:]),
        "targets_ms": 1000 * statistics.median(targets_of[WARM_UP:]),
        "mixing_ms": 1000 * statistics.median(mixing[False][2 * WARM_UP :]),
        "mixing_with_attention_ms": 1000 * statistics.median(mixing[True][WARM_UP:]),
        "share_of_parts": share(parts),
        "whole_steps": share(steps["attention"]) - 1,
        "equal_steps": share(steps["without again"]) - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step (the demo's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures go")
    args = parser.parse_args()
    result = measure(args.rounds, args.batch_size)
    for name, value in result.items():
        print(f"{name:<26}{value:.4g}" if isinstance(value, float) else f"{name:<26}{value}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
