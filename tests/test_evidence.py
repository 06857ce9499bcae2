"""A training step whose targets come from the attention of the model that is trained."""

import pytest
import timm
import torch
from mix_helpers import random_images

from tokenmix_kernels import ClassAttention, TokenMix, attention_targets, progressive_ratio
from train.evidence import AttentionEvidence


def parts(**options):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=5)
    mixer = TokenMix(num_classes=5, patch_size=8, mode="elem", lam="beta", return_mix=True, **options)
    return model, mixer, random_images((8, 3, 32, 32)), torch.arange(8) % 5


@pytest.mark.parametrize("mask_type, ratio", [("cutmix", 0.5), ("grid", "progressive")])
def test_a_step_is_the_formulas_in_a_row(mask_type, ratio):
    model, mixer, images, labels = parts(mask_type=mask_type, grid_cell=2)
    evidence = AttentionEvidence(model, mixer, ratio=ratio)
    logits, targets = evidence(model, images, labels, seed=4)
    with ClassAttention(model) as again:
        mixed, by_area, mix = mixer(images, labels, seed=4)
        expected = model(mixed)
        share = progressive_ratio(expected, by_area) if ratio == "progressive" else 0.5
        by_attention = attention_targets(again.take(), **mix._asdict(), num_classes=5, ratio=share, smoothing=0.1)
    assert torch.equal(logits, expected) and torch.equal(targets, by_attention)
    masked = mix.kind > 1
    assert masked.any() and not masked.all()
    torch.testing.assert_close(targets[~masked], by_area[~masked])
    assert (targets - by_area)[masked].abs().max() > 1e-3
    torch.nn.functional.cross_entropy(logits, targets).backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_in_bfloat16():
    model, mixer, images, labels = parts(mixup_alpha=0.0)
    evidence = AttentionEvidence(model, mixer, ratio="progressive", smoothing=0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, targets = evidence(model, images, labels, seed=1)
    assert logits.dtype == torch.bfloat16 and targets.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(8))


def test_what_does_not_fit_is_refused():
    model, mixer, *_ = parts()
    with pytest.raises(ValueError, match="mixer must be made with return_mix=True"):
        AttentionEvidence(model, TokenMix(num_classes=5))
    with pytest.raises(ValueError, match="ratio must be a share"):
        AttentionEvidence(model, mixer, ratio="half")
