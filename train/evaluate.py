"""Scores on the validation set."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tokenmix_kernels.maps.weights import read_tensors, weights_of

from .device import sum_dtype
from .model import load_weights
from .run import Run, say

__all__ = ["evaluate", "evaluate_checkpoint"]


@torch.no_grad()
def evaluate(run: Run, model: nn.Module) -> dict[str, float]:
    """Top-1, top-5 (where there are more than 5 classes) in percent, and cross entropy, over all processes."""
    model.eval()
    sums = torch.zeros(4, dtype=sum_dtype(run.device), device=run.device)  # top-1, top-5, loss, images
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


def evaluate_checkpoint(run: Run, path: Path) -> dict[str, dict[str, float]]:
    """Print the scores of the weights in a file, raw and averaged ones where it holds both, and return them.

    Raises:
        ValueError: it holds no weights of this model.
    """
    state = read_tensors(path, "checkpoint of --resume")
    titles = {"model": "raw weights", "ema": "averaged weights"}
    if "digest" in state:
        found = {title: weights_of(state | {"best_is": key}) for key, title in titles.items() if state.get(key)}
    else:
        found = {"weights": weights_of(state)}
    scores = {}
    for title, weights in found.items():
        load_weights(run.model, weights, f"--resume {path}", partly=False)
        scores[title] = evaluate(run, run.model)
        say(run, f"{title}: " + ", ".join(f"{score} {value:.4g}" for score, value in scores[title].items()))
    return scores
