"""The captured attention of the class token against timm's own unfused attention."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

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
            if "q_norm.weight" in key or "k_norm.weight" in key:
                parameter.normal_(2.0, 0.5)
            elif parameter.ndim == 1 or "bias" in key or "rope" in key:
                parameter.normal_(0.5, 0.5)
            elif "q" in key or "k_proj" in key:
                parameter.mul_(8)  # attention far from uniform
    return model


def unfused_logits(model, images, block=-1):
    """Log of the softmax of a block [B, heads, T, T] as timm computes it without its fused attention, in float64."""
    model = copy.deepcopy(model).double()
    attention = model.blocks[block].attn
    attention.fused_attn = False
    found = []
    attention.attn_drop.register_forward_pre_hook(lambda _module, inputs: found.append(inputs[0].detach()))
    model(images.double())
    return found[0].log()


def expected_attention(model, images, prefix, over="all", query="class", block=-1):
    logits = unfused_logits(model, images, block)  # up to a constant per row
    # The logits are linear in the query.
    logits = logits[:, :, prefix:].mean(2) if query == "pooled" else logits[:, :, 0]
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
        assert expected.std(1).min() > 0.1 * expected.mean()  # a uniform attention would prove nothing
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


def test_any_block_can_be_read():
    model, images = make("vit_tiny_patch16_224").eval(), torch.randn(2, 3, 64, 64)
    with ClassAttention(model, block=0) as first, ClassAttention(model) as last:
        model(images)
        for evidence, block in ((first, 0), (last, 1)):
            expected = expected_attention(model, images, 1, block=block)
            torch.testing.assert_close(evidence.take().double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_autocast(name):
    model = make(name, {"patch_size": 16}).eval()
    images = torch.randn(2, 3, 64, 64)
    evidence = ClassAttention(model, query="class")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(images).float().square().mean()
    attention = evidence.take()
    assert attention.dtype == torch.float32
    expected = expected_attention(model, images, 1)
    assert (attention.double() - expected).abs().max() < 0.1 * expected.max()  # logits of bfloat16 products
    # The cast of a weight for the capture must not stand in for the one that the block trains through.
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.blocks[-1].attn.parameters())


def gradients(model, images):
    model.zero_grad()
    loss = model(images).square().mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_with_and_without_capture(checkpointing):
    model, images = make("vit_tiny_patch16_224").train(), torch.randn(2, 3, 64, 64)
    model.set_grad_checkpointing(checkpointing)
    expected = gradients(model, images)
    evidence = ClassAttention(model)
    got = gradients(model, images)
    assert len(got) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))
    loss = model(images).sum()
    attention = evidence.take()
    loss.backward()
    with pytest.raises(RuntimeError, match=r"take\(\) needs a forward pass"):
        evidence.take()  # the recomputation of checkpointed blocks is none
    model.set_grad_checkpointing(False)
    torch.testing.assert_close(attention.double(), expected_attention(model, images, 1), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_compiled_whole(name):
    torch._dynamo.reset()
    model = make(name, {"patch_size": 16}).train()
    evidence = ClassAttention(model, query="class")
    step = torch.compile(model, fullgraph=True, backend="eager")
    for seed in (0, 1):
        images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        step(images).sum().backward()
        expected = expected_attention(model, images, 1)
        torch.testing.assert_close(evidence.take().double(), expected, rtol=2e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"), reason="a setting of torch"
)
def test_compiled_whole_with_checkpointing():
    torch._dynamo.reset()
    model, images = make("vit_tiny_patch16_224").train(), torch.randn(2, 3, 64, 64)
    expected = expected_attention(model, images, 1)
    model.set_grad_checkpointing()
    evidence = ClassAttention(model)
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        torch.compile(model, fullgraph=True, backend="aot_eager")(images).sum().backward()
    torch.testing.assert_close(evidence.take().double(), expected, rtol=2e-4, atol=1e-6)
    torch._dynamo.reset()


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("wrapped", ["before", "after"])
def test_capture_of_a_wrapped_model(wrapper, wrapped, process_group):
    model, images = make("vit_tiny_patch16_224"), torch.randn(2, 3, 64, 64)
    expected = expected_attention(model, images, 1)
    evidence = ClassAttention(model) if wrapped == "after" else None
    if wrapper == "DDP":
        model = DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    evidence = evidence or ClassAttention(model)
    model(images).sum().backward()
    torch.testing.assert_close(evidence.take().double(), expected, rtol=2e-4, atol=1e-6)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_deep_copy_captures_nothing_and_remove_undoes_all():
    model, images = make("vit_tiny_patch16_224"), torch.randn(2, 3, 64, 64)
    evidence = ClassAttention(model)
    average = copy.deepcopy(model)
    average(images)
    with pytest.raises(RuntimeError, match="needs a forward pass"):
        evidence.take()
    evidence.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Other(nn.Module):
    pass


@pytest.mark.parametrize(
    ("name", "arguments", "options", "error", "message"),
    [
        ("vit_tiny_patch16_224", {}, {"over": "heads"}, ValueError, "over must be 'all' or 'patches'"),
        ("vit_tiny_patch16_224", {}, {"query": "x"}, ValueError, "query must be 'auto', 'class' or 'pooled'"),
        ("vit_tiny_patch16_224", {}, {"block": 2}, ValueError, r"block must be in \[-2, 2\).*got 2"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5}, {}, ValueError, "patch_drop_rate=0.5"),
        (
            "vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, {"query": "class"}, ValueError,
            "needs a class token",
        ),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}, {}, ValueError, "pools by 'map'"),
        ("cait_xxs24_224", {}, {}, TypeError, "model must have timm's Attention.*TalkingHeadAttn in Cait"),
        (None, {}, {}, TypeError, "model must be a vision transformer.*got Other; use ActivationTeacher"),
    ],
)  # fmt: skip
def test_models_and_options_that_cannot_be_captured_are_refused(name, arguments, options, error, message):
    model = Other() if name is None else make(name, arguments)
    with pytest.raises(error, match=message):
        ClassAttention(model, **options)
