"""Samples as a run's mixer mixes them, with what their targets follow: what the picture shows."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenmix_kernels import Mix, TopKMaps, attention_targets, dispatch
from tokenmix_kernels.inputs import Evidence, Result
from tokenmix_kernels.reference import pool_tokens
from tokenmix_kernels.settings import MIXUP

from .data import Batch

if TYPE_CHECKING:
    from .run import Run

__all__ = ["Example", "as_evidence", "live_attention", "mix_as_run", "pick_examples", "token_evidence"]


class Example(NamedTuple):
    """One sample as the run's mixer mixes it.

    Attributes:
        own, partner: places of the two images in the batch.
        mixed: [3, H, W] float32 in [0, 1].
        kind: COPY, MIXUP or the kind of a mask rule.
        taken: [Gh, Gw] float32, share of each token that comes from the partner.
        weights: of the own label and the partner's.
        targets: what the target holds for the two labels.
        attention: [Gh, Gw] float32 that sums to 1, the model's attention to the mixed image, where targets follow it.
    """

    own: int
    partner: int
    mixed: Tensor
    kind: int
    taken: Tensor
    weights: tuple[float, float]
    targets: tuple[float, float]
    attention: Tensor | None = None

    def areas(self) -> tuple[float, float]:
        """What the weights would be by area."""
        taken = float(self.taken.mean())
        return 1 - taken, taken


def mix_as_run(run: "Run", batch: Batch, evidence: Evidence, seed: int) -> tuple[Tensor, Result]:
    """Mix a batch with the settings of the run's mixer, without normalising it.

    Args:
        run: its mixer is used.
        batch: on the run's mixing device.
        evidence: of the batch.
        seed: key of the draws.

    Returns:
        (images [B, 3, S, S] float32 in [0, 1]; targets, mask as shares of tokens, weights and kinds).
    """
    mix = run.mix
    settings = mix.settings if mix.mixup_enabled else mix.unmixed
    images = batch.images.float() / 255
    mixed = torch.empty_like(images)
    result = dispatch.mix_into(
        dispatch.backend_of(images), images, mixed, batch.labels, None, evidence, None,
        torch.tensor(seed), 0, settings._replace(mean=(), std=(), shares=True),
    )  # fmt: skip
    return mixed, result


def live_attention(run: "Run", batch: Batch, mixed: Tensor, result: Result) -> tuple[Result, Tensor]:
    """What the run's model makes of a mixed batch, with --evidence attention: one forward pass in eval mode.

    Args:
        run: its model and its evidence are used.
        batch: on the run's mixing device.
        mixed: [B, 3, S, S] in [0, 1], of `mix_as_run`.
        result: of `mix_as_run`, by area.

    Returns:
        (the result with targets and weights by the attention, attention [B, Gh, Gw] whose images sum to 1).
    """
    assert run.attention is not None
    was_training = run.model.training
    run.model.eval()
    with torch.no_grad(), run.autocast():
        logits = run.model(run.data.normalise(255 * mixed.to(run.device))).to(mixed.device)
    run.model.train(was_training)
    attention = run.attention.attention.take().to(mixed.device)
    mix = Mix(result.mask, batch.labels, None, result.kind, result.weights[:, 0])
    targets = run.attention.targets_of(attention, logits, result.targets, mix)
    # With a class of its own for each image the targets are the weights.
    count = len(mixed)
    own = torch.arange(count, device=mixed.device)
    alone = attention_targets(
        attention,
        **mix._replace(labels=own)._asdict(),
        num_classes=count,
        ratio=run.attention.shares(logits, result.targets),
    )
    weights = torch.stack([alone[own, own], alone[own, own.flip(0)]], 1)
    grid = result.mask.shape[1:]
    return result._replace(targets=targets, weights=weights), attention.unflatten(1, grid) / attention.sum(1)[
        :, None, None
    ]


def pick_examples(run: "Run", batch: Batch, evidence: Evidence, rows: int) -> list[Example]:
    """Of each of `rows` draws the sample whose weights differ most from the shares of the area."""
    examples: list[Example] = []
    labels = batch.labels.tolist()
    for seed in range(run.args.seed, run.args.seed + rows):
        mixed, result = mix_as_run(run, batch, evidence, seed)
        attention = None
        if run.attention:
            result, attention = live_attention(run, batch, mixed, result)
        targets, taken, weights = result.targets.cpu(), result.mask.cpu().clone(), result.weights.cpu()
        kinds = result.kind.tolist()
        blended = torch.tensor([kind == MIXUP for kind in kinds])
        taken[blended] = weights[blended, 1][:, None, None]  # all of it, by as much as lam says
        area = taken.mean((1, 2))
        difference = (weights - torch.stack([1 - area, area], 1)).abs().sum(1)
        count = len(labels)
        seen = {example.own for example in examples}
        # Pairs of two classes before pairs of one, images that were not shown yet before others.
        best = max(
            range(count), key=lambda i: (labels[i] != labels[count - 1 - i], i not in seen, float(difference[i]))
        )
        other = count - 1 - best
        pair = (float(targets[best, labels[best]]), float(targets[best, labels[other]]))
        own, partner = weights[best].tolist()
        seen_by_model = None if attention is None else attention[best].cpu()
        examples.append(
            Example(best, other, mixed[best].cpu(), kinds[best], taken[best], (own, partner), pair, seen_by_model)
        )
    return examples


def as_evidence(places: dict[str, Any]) -> Evidence:
    """What the run's evidence gives a TokenMix, as the core has it."""
    maps = places.get("maps")
    values, indices = maps if isinstance(maps, TopKMaps) else (maps, None)
    return Evidence(**{**places, "maps": values, "indices": indices})


def token_evidence(evidence: Evidence, labels: Tensor, grid: tuple[int, int]) -> Tensor:
    """The maps on the token grid as the targets see them, each summing to 1, [B, Gh, Gw] on the CPU.

    An image without evidence counts by its area.
    """
    even = torch.full((len(labels), *grid), 1 / (grid[0] * grid[1]))
    if evidence.maps is None:
        return even
    pooled = pool_tokens(evidence, labels.cpu(), grid)
    total = pooled.sum((1, 2), keepdim=True)
    return torch.where(total > 0, pooled / (total + 1e-8), even).float()
