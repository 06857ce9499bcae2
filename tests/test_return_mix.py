"""`TokenMix(..., return_mix=True)`: what is needed to make targets after the forward pass."""

import pytest
import timm
import torch
from mix_helpers import random_images

from tokenmix_kernels import ClassAttention, Mix, TokenMix, attention_targets, progressive_ratio, transmix
from tokenmix_kernels.settings import COPY, MASK_RULES, MIXUP

SHAPE = (12, 3, 32, 48)
RULES = [name for name, rule in MASK_RULES.items() if rule.drawn]


def labels_of(batch):
    return torch.randint(0, 7, (batch,), generator=torch.Generator().manual_seed(1))


def mixed(mask_type="block", shape=SHAPE, partner=None, backend="auto", **options):
    options = {"num_classes": 7, "patch_size": 8, "mode": "elem", "mask_type": mask_type} | options
    mixer = TokenMix(**options, return_mix=True)
    images, labels = random_images(shape), labels_of(shape[0])
    return mixer(images, labels, seed=3, partner=partner, backend=backend), (images, labels, TokenMix(**options))


@pytest.mark.parametrize("mask_type", RULES)
def test_images_and_targets_are_those_without_it(mask_type):
    partner = torch.arange(12).roll(1)
    (images, targets, mix), (source, labels, plain) = mixed(mask_type, partner=partner, prob=0.8)
    expected_images, expected_targets = plain(source, labels, seed=3, partner=partner)
    assert torch.equal(images, expected_images) and torch.equal(targets, expected_targets)
    assert isinstance(mix, Mix) and mix.labels is labels and mix.partner is partner
    assert set(mix.kind.tolist()) == {COPY, MIXUP, MASK_RULES[mask_type].kind}


@pytest.mark.parametrize("mask_type", RULES)
def test_the_mask_says_what_share_of_each_patch_is_the_partners(mask_type):
    """Images of one value each: the mean of a patch is its share."""
    values = torch.arange(12.0)[:, None, None, None].expand(SHAPE).contiguous()
    mixer = TokenMix(
        num_classes=7, patch_size=8, mode="elem", mask_type=mask_type, lam="beta", prob=0.8, return_mix=True
    )
    images, _, mix = mixer(values, labels_of(12), seed=5)
    own, other = torch.arange(12.0)[:, None, None], torch.arange(12.0).flip(0)[:, None, None]
    seen = torch.nn.functional.avg_pool2d(images[:, 0], 8)
    masked = mix.kind > MIXUP
    assert masked.any() and not masked.all() and mix.mask.dtype == torch.float32
    torch.testing.assert_close((own + mix.mask * (other - own))[masked], seen[masked])
    assert (mix.mask[~masked] == 0).all()
    blended = mix.kind == MIXUP
    share = (mix.lam[:, None, None] * own + (1 - mix.lam[:, None, None]) * other)[blended].expand(-1, 4, 6)
    torch.testing.assert_close(share, seen[blended])
    if mask_type == "cutmix":
        assert ((mix.mask > 0) & (mix.mask < 1)).any()  # rectangles cut patches


def test_targets_with_the_ratio_0_are_those_by_area():
    (_, targets, mix), _ = mixed("cutmix", label_smoothing=0.1, lam="beta", prob=0.8)
    again = attention_targets(torch.rand(12, 24), **mix._asdict(), num_classes=7, ratio=0.0, smoothing=0.1)
    torch.testing.assert_close(again, targets, rtol=0, atol=1e-6)


def test_eval_mode_gives_a_mix_of_unmixed_samples():
    mixer = TokenMix(num_classes=7, patch_size=8, return_mix=True).eval()
    images = random_images(SHAPE)
    same, targets, mix = mixer(images, labels_of(12))
    assert torch.equal(same, images)
    assert (mix.kind == COPY).all() and (mix.lam == 1).all() and (mix.mask == 0).all()
    again = attention_targets(torch.rand(12, 24), **mix._asdict(), num_classes=7, smoothing=0.1)
    torch.testing.assert_close(again, targets)


def test_packed_label_maps_give_whole_class_numbers():
    packed = torch.rand(4, 3, 2, 8, 8)
    packed[:, 1] = torch.randint(0, 7, (4, 2, 8, 8)).float()
    packed[:, 2, 0, 0, :6] = torch.tensor([0.1, 0.2, 0.5, 0.6, 0.0, 3.0])
    mixer = TokenMix(num_classes=7, patch_size=8, return_mix=True)
    mix = mixer(random_images((4, 3, 32, 48)), packed, seed=1)[2]
    assert mix.labels.tolist() == [3] * 4 and mix.labels.dtype == torch.int64


def test_compiled_whole():
    mixer = TokenMix(num_classes=7, patch_size=8, mode="elem", mask_type="cutmix", return_mix=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(images, labels, attention, seed):
        _, _, mix = mixer(images, labels, seed=seed)
        return attention_targets(attention, **mix._asdict(), num_classes=7)

    images, labels, attention, seed = random_images(SHAPE), labels_of(12), torch.rand(12, 24), torch.tensor(2)
    mix = mixer(images, labels, seed=seed)[2]
    expected = attention_targets(attention, **mix._asdict(), num_classes=7)
    assert torch.equal(step(images, labels, attention, seed), expected)
    torch._dynamo.reset()


def test_the_loop_in_the_docstring_trains():
    text = transmix.attention_targets.__doc__
    block = text.split("::\n\n")[1].split("\n\n")[0]
    lines = "\n".join(line.strip() for line in block.splitlines())
    assert lines.count("\n") == 4
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=7)
    names = {
        "images": random_images((4, 3, 32, 32)), "labels": labels_of(4), "model": model, "K": 7,
        "mixer": TokenMix(num_classes=7, patch_size=8, mixup_alpha=0.0, return_mix=True),
        "evidence": ClassAttention(model), "criterion": torch.nn.CrossEntropyLoss(),
        "progressive_ratio": progressive_ratio, "attention_targets": attention_targets,
    }  # fmt: skip
    exec(lines, names)
    names["loss"].backward()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    torch.testing.assert_close(names["targets"].sum(1), torch.ones(4))
