"""Targets by attention against the formulas of TransMix and MixPro in plain loops."""

import numpy as np
import pytest
import torch
from mix_helpers import DATA

from tokenmix_kernels.attention_inputs import AttentionMix
from tokenmix_kernels.settings import COPY, MASK_RULES, MIXUP
from tokenmix_kernels.transmix import attention_targets, progressive_ratio

OP = torch.ops.tokenmix_kernels.attention_targets
BLOCK = MASK_RULES["block"].kind


def golden(case):
    with np.load(DATA / "attention_targets.npz") as stored:
        return {
            name.split("/")[1]: torch.from_numpy(stored[name]) for name in stored.files if name.startswith(f"{case}/")
        }


@pytest.mark.parametrize("case", ["transmix", "transmix_cut_patches"])
def test_targets_are_those_of_transmix(case):
    g = golden(case)
    given = (g["attention"], g["mask"], g["labels"])
    targets = attention_targets(*given, num_classes=11, smoothing=0.1)
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.double(), g["targets"], rtol=0, atol=1e-6)
    assert torch.equal(targets, attention_targets(*given, g["partner"], num_classes=11, smoothing=0.1))
    if case == "transmix":  # whole patches: a bool mask says the same
        mask = g["mask"] == 1
        assert torch.equal(targets, attention_targets(g["attention"], mask, g["labels"], num_classes=11, smoothing=0.1))


def test_targets_and_ratio_are_those_of_mixpro():
    g = golden("mixpro")
    logits = g["logits"].requires_grad_()
    ratio = progressive_ratio(logits, g["area_targets"].float())
    assert not ratio.requires_grad and ratio.dtype == torch.float32
    torch.testing.assert_close(ratio.double(), g["ratio"], rtol=0, atol=1e-6)
    targets = attention_targets(g["attention"], g["mask"], g["labels"], g["partner"], num_classes=11, ratio=ratio)
    torch.testing.assert_close(targets.double(), g["targets"], rtol=0, atol=1e-6)


def test_ratio_weighs_attention_against_area():
    attention = torch.tensor([[3.0, 1.0, 0.0, 0.0]] * 2)
    mask = torch.tensor([[[True, False], [False, True]], [[False, False], [True, True]]])
    labels = torch.tensor([0, 1])
    for ratio, own in ((1.0, [0.25, 1.0]), (0.0, [0.5, 0.5]), (torch.tensor([0.5, 1.0]), [0.375, 1.0])):
        targets = attention_targets(attention, mask, labels, num_classes=2, ratio=ratio)
        assert targets[[0, 1], labels].tolist() == own
        assert targets.sum(1).tolist() == [1, 1]


def test_blended_and_unmixed_samples_keep_their_lam():
    source = torch.Generator().manual_seed(0)
    attention, mask = torch.rand(4, 6, generator=source), torch.rand(4, 2, 3, generator=source) < 0.5
    labels, partner = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 3, 0])
    kind = torch.tensor([COPY, MIXUP, BLOCK, BLOCK], dtype=torch.uint8)
    lam = torch.tensor([1.0, 0.3, 0.9, 0.9])
    options = {"num_classes": 4, "ratio": 0.5}
    targets = attention_targets(attention, mask, labels, partner, kind=kind, lam=lam, **options)
    torch.testing.assert_close(targets[:2], torch.tensor([[1.0, 0, 0, 0], [0, 0.3, 0.7, 0]]))
    masked = attention_targets(attention, mask, labels, partner, **options)
    assert torch.equal(targets[2:], masked[2:]) and not torch.equal(targets[:2], masked[:2])


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_without_attention_the_area_counts(bad):
    attention = torch.rand(2, 4)
    attention[0] = bad
    mask = torch.tensor([[[True, False], [False, False]]] * 2)
    targets = attention_targets(attention, mask, torch.tensor([0, 1]), num_classes=2, ratio=1.0)
    assert targets[0].tolist() == [0.75, 0.25]
    assert targets.isfinite().all()


def test_equal_labels_add_up():
    targets = attention_targets(
        torch.rand(2, 4), torch.rand(2, 2, 2) < 0.5, torch.tensor([1, 1]), num_classes=3, smoothing=0.3
    )
    torch.testing.assert_close(targets, torch.tensor([[0.1, 0.8, 0.1]] * 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_attention_dtypes_and_shapes(dtype):
    attention, mask, labels = torch.rand(3, 6).to(dtype), torch.rand(3, 2, 3), torch.tensor([2, 0, 1])
    targets = attention_targets(attention, mask, labels.to(torch.int16), num_classes=3)
    assert torch.equal(targets, attention_targets(attention.view(3, 2, 3), mask, labels, num_classes=3))
    expected = attention_targets(attention.float(), mask, labels, num_classes=3)
    torch.testing.assert_close(targets, expected)


def arguments(variant):
    source = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 2, 2])
    mix = AttentionMix(torch.rand(4, 6, generator=source), torch.rand(4, 2, 3, generator=source) < 0.5)
    if variant == "all":
        mix = AttentionMix(
            mix.attention.half(), torch.rand(4, 2, 3, generator=source), torch.tensor([0, 1, 2, 4], dtype=torch.uint8),
            torch.rand(4, generator=source), torch.rand(4, generator=source),
        )  # fmt: skip
        return labels, torch.tensor([1, 0, 3, 2]), 5, 0.1, False, *mix
    if variant == "rows":
        return torch.rand(4, 5, generator=source).half(), None, 5, 0.1, True, *mix
    return labels, None, 5, 0.0, False, *mix


@pytest.mark.parametrize("variant", ["plain", "all", "rows"])
def test_opcheck(variant):
    torch.library.opcheck(OP, arguments(variant))


def test_compiled_whole():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(logits, targets, attention, mask, labels):
        ratio = progressive_ratio(logits, targets)
        return attention_targets(attention, mask, labels, num_classes=3, ratio=ratio)

    for batch in (2, 4):
        logits, targets = torch.randn(batch, 3), torch.rand(batch, 3)
        given = (torch.rand(batch, 4), torch.rand(batch, 2, 2) < 0.5, torch.arange(batch) % 3)
        expected = attention_targets(*given, num_classes=3, ratio=progressive_ratio(logits, targets))
        torch.testing.assert_close(step(logits, targets, *given), expected)
    torch._dynamo.reset()


BAD = {
    "attention must be": {"attention": torch.rand(2, 5)},
    "attention must be one of": {"attention": torch.ones(2, 4, dtype=torch.int64)},
    "attention must not require grad": {"attention": torch.rand(2, 4, requires_grad=True)},
    "attention must be contiguous": {"attention": torch.rand(4, 2).T},
    "mask must be .B, Gh, Gw.": {"mask": torch.zeros(2, 4, dtype=torch.bool)},
    "mask must be in .0, 1.": {"mask": torch.full((2, 2, 2), 1.5)},
    "labels must be in .0, 3., got 3": {"labels": torch.tensor([0, 3])},
    "partner must be in": {"partner": torch.tensor([0, 2])},
    "kind and lam must be given together": {"kind": torch.zeros(2, dtype=torch.uint8)},
    "lam must be in": {"kind": torch.zeros(2, dtype=torch.uint8), "lam": torch.tensor([0.5, float("nan")])},
    "ratio must be a share": {"ratio": 1.5},
    "ratio must be in": {"ratio": torch.tensor([0.5, -0.1])},
    "ratio must be .2., one for each": {"ratio": torch.tensor([0.5])},
    "smoothing must be": {"smoothing": 2},
    "num_classes must be": {"num_classes": 0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    good = {
        "attention": torch.rand(2, 4), "mask": torch.zeros(2, 2, 2, dtype=torch.bool), "labels": torch.tensor([0, 1]),
        "num_classes": 3,
    }  # fmt: skip
    for backend in ("auto", "reference"):
        with pytest.raises((TypeError, ValueError), match=message):
            attention_targets(**(good | BAD[message]), backend=backend)


def test_logits_and_targets_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"both be \[B, K\], got \[2, 3\] and \[2\]"):
        progressive_ratio(torch.rand(2, 3), torch.tensor([0, 1]))
