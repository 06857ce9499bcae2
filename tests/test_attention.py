"""The captured attention of the class token against timm's own unfused attention."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tokenmix_kernels.attention import ClassAttention

timm = pytest.importorskip("timm", reason="needs the extra 'maps'")

SMALL = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 7}

# Name, arguments, tokens before the patches.
WITH_CLASS_TOKEN = [
    ("vit_tiny_patch16_224", {}, 1),
    ("vit_tiny_patch16_224", {"qkv_bias": False, "class_token": True}, 1),
    ("vit_tiny_patch16_224", {"qk_norm": True}, 1),
    ("deit_tiny_patch16_224", {"patch_size": 8}, 1),
    ("deit_tiny_distilled_patch16_224", {}, 2),
    ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}, 5),
    ("beit_base_patch16_224", {}, 1),
    ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}, 1),
    ("eva02_tiny_patch14_224", {"patch_size": 16}, 1),  # rotary, separate projections
    ("eva_giant_patch14_224", {"patch_size": 16, "mlp_ratio": 2}, 1),  # q_bias and v_bias in one projection
    ("vit_small_patch16_dinov3", {"qk_norm": True}, 5),  # rotary in halves, registers
    ("vit_small_patch16_rope_mixed_224", {}, 1),  # a rotation for each head
    ("vit_relpos_base_patch16_cls_224", {}, 1),
]
POOLED = [
    ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 0),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "qk_norm": True}, 1),
    ("vit_medium_patch16_reg4_gap_256", {}, 4),
    ("beit_base_patch16_224", {}, 1),
    ("eva02_tiny_patch14_224", {"patch_size": 16}, 1),
    ("vit_relpos_small_patch16_224", {}, 0),
]


def make(name, arguments=None, **kwargs):
    """A model whose gains, shifts and position biases all differ from their plain initial values."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **{**SMALL, **(arguments or {}), **kwargs})
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in key or "rope" in key:
                parameter.normal_(0.5, 0.5)
            elif "q" in key or "k_proj" in key:
                parameter.mul_(8)  # attention far from uniform
    return model


def unfused_logits(model, images):
    """Softmax of the last block [B, heads, T, T] as timm computes it without its fused attention, in float64."""
    model = copy.deepcopy(model).double()
    attention = model.blocks[-1].attn
    attention.fused_attn = False
    found = []
    attention.attn_drop.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].detach()))
    model(images.double())
    return found[0].log()


def expected_attention(model, images, prefix, over="all", query="class"):
    logits = unfused_logits(model, images)  # up to a constant per row
    if query == "pooled":
        logits = logits[:, :, prefix:].mean(2)  # the logits are linear in the query
    else:
        logits = logits[:, :, 0]
    if over == "patches":
        return logits[..., prefix:].softmax(-1).mean(1)
    return logits.softmax(-1)[..., prefix:].mean(1)


@pytest.mark.parametrize(("name", "arguments", "prefix"), WITH_CLASS_TOKEN)
def test_class_query_is_the_row_of_the_full_attention(name, arguments, prefix):
    model = make(name, arguments).eval()
    assert all(block.attn.fused_attn for block in model.blocks)
    images = torch.randn(3, 3, 64, 64)
    for over in ("all", "patches"):
        with ClassAttention(model, over=over, query="class") as evidence:
            model(images)
            attention = evidence.take()
        expected = expected_attention(model, images, prefix, over)
        assert attention.dtype == torch.float32 and not attention.requires_grad
        assert attention.shape == (3, (64 // model.patch_embed.patch_size[0]) ** 2)
        assert expected.std(1).min() > 0.2 * expected.mean()  # a uniform attention would prove nothing
        torch.testing.assert_close(attention.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "arguments", "prefix"), POOLED)
def test_pooled_query_is_the_mean_of_the_patches_queries(name, arguments, prefix):
    model = make(name, arguments).eval()
    images = torch.randn(3, 3, 64, 64)
    evidence = ClassAttention(model)
    assert evidence.query == "pooled"
    model(images)
    attention = evidence.take()
    evidence.remove()
    expected = expected_attention(model, images, prefix, query="pooled")
    assert expected.std(1).min() > 0.05 * expected.mean()
    torch.testing.assert_close(attention.double(), expected, rtol=2e-4, atol=1e-6)
