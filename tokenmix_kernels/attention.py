"""The class token's attention over the patches, read from the model that is being trained.

TransMix (Chen et al., CVPR 2022, arXiv 2111.09833) weighs the labels of a mixed image by the attention that
the class token of the last block pays to the patches of each image:
``A = softmax(q_cls k^T / sqrt(d))``, mean over heads, entries of the patches. A fused attention never forms
this matrix. Only one of its rows is needed, so that row is computed beside the fused attention from the
input of the block's attention, with the block's own projections:

``q_cls k_n = q_cls (W_k x_n + b_k) = (q_cls W_k) x_n + const``

The constant is the same for all n and drops out of the softmax. Two products of [B, heads, C] and [B, T, C] replace
the keys. Where the keys are normalised or rotated they are computed as the block does.
"""

from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClassAttention"]

KNOWN = {
    ("timm.layers.attention", "Attention"),
    ("timm.layers.attention", "AttentionRope"),
    ("timm.models.vision_transformer", "Attention"),  # its place before timm 1.0.17
    ("timm.models.beit", "Attention"),
    ("timm.models.eva", "EvaAttention"),
    ("timm.models.vision_transformer_relpos", "RelPosAttention"),
}
INSTEAD = "use ActivationTeacher on the EMA weights of the model as evidence instead"


class ClassAttention:
    """Capture the class token's attention to the patches in the last block of a timm ViT.

    Every forward pass of the model leaves one tensor [B, N], which `take` hands out::

        evidence = ClassAttention(model)
        logits = model(images)
        attention = evidence.take()  # [B, N] float32

    The model keeps its fused attention. The capture is part of no graph: it has no gradient, and gradients
    of the model are the same with and without it. It works in train and eval mode, under autocast, with
    activation checkpointing (the recomputation in the backward pass captures nothing), in a model that is
    wrapped by DDP or sharded by FSDP2, and under ``torch.compile(model, fullgraph=True)`` when it is made
    before the first call. ``torch.compile`` and activation checkpointing together need either
    ``fullgraph=False`` (the checkpointed blocks then run as they do without the compiler) or
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``. A deep copy of the model,
    such as an EMA, captures nothing.

    Args:
        model: a timm ViT, DeiT (distilled or not), BEiT, EVA or relative-position ViT, or a DDP or compiled
            wrapper of one.
        over: the tokens of the softmax. ``'all'``: all tokens, as TransMix has it, so that a row sums to
            less than one; ``'patches'``: the patch tokens only, each row sums to one.
        block: index of the block that is read; -1 is the last one.
        query: ``'class'``: the class token's query, also in a distilled DeiT (not the distillation token's);
            ``'pooled'``: the mean of the queries of all patch tokens, for models that average them (this
            is no part of TransMix); ``'auto'``: what the head reads, ``'class'`` where it takes the class
            token and ``'pooled'`` where it averages the patch tokens: a class token that the head does not
            read has a query in the last block that no gradient trains.

    Attributes:
        query: the query in use, ``'class'`` or ``'pooled'``.

    Raises:
        TypeError: the block has no attention that is known here; the message says what to do.
        ValueError: unknown argument, no such block, no class token for ``query='class'``, a head with an attention
            pool, or dropped patches; the message says what to do.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        over: Literal["all", "patches"] = "all",
        query: Literal["auto", "class", "pooled"] = "auto",
        block: int = -1,
    ) -> None:
        if over not in ("all", "patches"):
            raise ValueError(f"over must be 'all' or 'patches', got {over!r}")
        if query not in ("auto", "class", "pooled"):
            raise ValueError(f"query must be 'auto', 'class' or 'pooled', got {query!r}")
        while isinstance(inner := getattr(model, "module", getattr(model, "_orig_mod", None)), nn.Module):
            model = inner
        self.attn: Any = attention_of(model, block)
        self.prefix = int(getattr(model, "num_prefix_tokens", 0))
        self.over = over
        self.query = resolve_query(model, query)
        self.running = False
        self.attention: Tensor | None = None
        # Only between the model's own hooks is a call of the block a forward pass. Recomputation of a
        # checkpointed block happens in the backward pass, outside of them.
        self.handles = [
            model.register_forward_pre_hook(self.start),
            self.attn.register_forward_pre_hook(self.capture, with_kwargs=True),
            model.register_forward_hook(self.stop),
        ]
        self.model = model

    def take(self) -> Tensor:
        """Hand out the attention of the last forward pass and forget it.

        Returns:
            [B, N] float32 on the model's device, N patches in row-major order, no gradient. It is the
            attention before dropout. Rows sum to at most one (``over='all'``) or to one (``'patches'``).

        Raises:
            RuntimeError: no forward pass of the model since the last call.
        """
        if self.attention is None:
            raise RuntimeError("take() needs a forward pass since the last take(); call model(images) first")
        attention, self.attention = self.attention, None
        return attention

    def remove(self) -> None:
        """Remove the hooks and forget what was captured; the model is as it was before."""
        for handle in self.handles:
            handle.remove()
        self.attention = None

    def __enter__(self) -> "ClassAttention":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ClassAttention":
        # A deep copy of the model copies its hooks. They stay bound to this object, which knows its own model.
        return self

    def start(self, module: nn.Module, _inputs: Any) -> None:
        if module is self.model:
            self.running = True
            self.attention = None

    def stop(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        if module is self.model:
            self.running = False

    def capture(self, module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        if module is not self.attn or not self.running:
            return
        with torch.no_grad():
            tokens = (inputs[0] if inputs else options["x"]).detach()  # [B, T, C]
            logits = query_logits(self.attn, tokens, options, self.prefix, self.query == "pooled")  # [B, heads, T]
            if self.over == "patches":
                self.attention = logits[..., self.prefix :].softmax(-1).mean(1).float()
            else:
                self.attention = logits.softmax(-1)[..., self.prefix :].mean(1).float()


class Projections(NamedTuple):
    """Weights [heads * d, C] and biases [heads * d] of queries and keys, detached."""

    query_weight: Tensor
    query_bias: Tensor | None
    key_weight: Tensor
    key_bias: Tensor | None


def attention_of(model: nn.Module, block: int) -> nn.Module:
    """The attention module of one of the model's blocks.

    Raises:
        TypeError: there is none that is known here.
        ValueError: there is no such block, or patches are dropped in training.
    """
    name = type(model).__name__
    blocks: Any = getattr(model, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and not -len(blocks) <= block < len(blocks):
        raise ValueError(f"block must be in [{-len(blocks)}, {len(blocks)}), the blocks of {name}, got {block}")
    try:
        attn = blocks[block].attn
    except (AttributeError, TypeError, IndexError, NotImplementedError):
        raise TypeError(
            f"model must be a vision transformer with an attention over all tokens in each block, got {name}; {INSTEAD}"
        ) from None
    if not any((base.__module__, base.__name__) in KNOWN for base in type(attn).__mro__):
        raise TypeError(
            f"model must have timm's Attention, AttentionRope, EvaAttention, RelPosAttention or BEiT's Attention "
            f"in the block, got {type(attn).__module__}.{type(attn).__name__} in {name}; {INSTEAD}"
        )
    fused = getattr(attn, "qkv", None)
    for layer in [fused] if fused is not None else [attn.q_proj, attn.k_proj]:
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"model must project queries and keys by nn.Linear in the block, got {type(layer).__name__}; "
                "make ClassAttention before adapters are added and train that block without them"
            )
    patch_drop: Any = getattr(model, "patch_drop", None)
    if getattr(patch_drop, "prob", 0.0) > 0:
        raise ValueError(
            f"model must keep all patches, got patch_drop_rate={patch_drop.prob}; "
            "set it to 0 so that the attention fits the mask"
        )
    return attn


def resolve_query(model: nn.Module, query: str) -> str:
    """``'class'`` or ``'pooled'``, as `ClassAttention` describes.

    Raises:
        ValueError: the model has no such query.
    """
    name, pool = type(model).__name__, getattr(model, "global_pool", None)
    has_class_token = getattr(model, "cls_token", None) is not None
    if query == "class" and not has_class_token:
        raise ValueError(f"query='class' needs a class token, {name} has none; use query='pooled', or {INSTEAD}")
    if query != "auto":
        return query
    if pool == "token" and has_class_token:
        return "class"
    if pool == "avg":
        return "pooled"
    raise ValueError(
        f"query must be 'class' or 'pooled' for {name}, whose head pools by {pool!r} and reads neither a class token "
        f"nor the mean of the patches; or {INSTEAD}"
    )


def query_logits(attn: Any, tokens: Tensor, options: dict[str, Any], prefix: int, pooled: bool) -> Tensor:
    """One row of the attention's logits per image and head, up to a constant per row.

    Args:
        attn: the attention module.
        tokens: [B, T, C], its input.
        options: its keyword arguments.
        prefix: the number of tokens before the patches.
        pooled: the mean of the patches' queries, not the class token's.

    Returns:
        [B, heads, T], float32, or float64 if the tokens are.

    Raises:
        ValueError: a causal mask, or any mask with the pooled query.
    """
    mask, rope = options.get("attn_mask"), options.get("rope")
    if options.get("is_causal"):
        raise ValueError("is_causal must be False: under a causal mask the class token attends to no patch")
    if pooled and mask is not None:
        raise ValueError("attn_mask must be None for query='pooled'; use query='class'")
    weights = projections(attn)
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    plain = rope is None and all(norm is None or isinstance(norm, nn.Identity) for norm in (q_norm, k_norm))
    heads = attn.num_heads
    work = torch.promote_types(tokens.dtype, torch.float32)

    def split(rows: Tensor) -> Tensor:  # [B, T, heads * d] -> [B, heads, T, d]
        return rows.unflatten(-1, (-1, weights.query_weight.shape[0] // heads)).transpose(1, 2)

    if not pooled:
        source = tokens[:, :1]
    elif plain:
        source = tokens[:, prefix:].mean(1, keepdim=True)
    else:
        source = tokens[:, prefix:]
    queries = split(F.linear(source, weights.query_weight, weights.query_bias))  # [B, heads, 1 or N, d]
    if plain:
        queries = queries.to(work).squeeze(2)  # [B, heads, d]
        key_weight = weights.key_weight.to(work).unflatten(0, (-1, queries.shape[-1]))  # [heads or fewer, d, C]
        key_weight = key_weight.repeat_interleave(heads // key_weight.shape[0], 0)
        with torch.autocast(tokens.device.type, enabled=False):
            folded = torch.bmm(queries.transpose(0, 1), key_weight).transpose(0, 1)  # [B, heads, C]
            logits = attn.scale * folded @ tokens.to(work).mT  # [B, heads, T]
    else:
        keys = split(F.linear(tokens, weights.key_weight, weights.key_bias))  # [B, heads or fewer, T, d]
        if q_norm is not None and k_norm is not None:
            queries, keys = q_norm(queries), k_norm(keys)
        if rope is not None:
            rope = rope.detach()
            if pooled:
                queries = rotate(attn, queries, rope)
            keys = torch.cat([keys[:, :, :prefix], rotate(attn, keys[:, :, prefix:], rope).to(keys.dtype)], 2)
        query = queries.to(work).mean(2, keepdim=True)
        keys = keys.to(work).repeat_interleave(heads // keys.shape[1], 1)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = (attn.scale * query @ keys.mT).squeeze(2)  # [B, heads, T]

    for bias in position_biases(attn, options, prefix, pooled):
        logits = logits + bias.detach()
    if mask is not None:
        row = mask[..., 0, :]
        logits = logits.masked_fill(~row, float("-inf")) if row.dtype == torch.bool else logits + row
    return logits


def projections(attn: Any) -> Projections:
    """The attention's weights for queries and keys.

    They are detached: under autocast the cast of a weight is cached with or without its gradient, whichever
    comes first, and the block that follows needs the one with it.
    """
    if getattr(attn, "qkv", None) is None:
        q, k = attn.q_proj, attn.k_proj
        pairs = [q.weight, q.bias, k.weight, k.bias]
    else:
        query_weight, key_weight, _ = attn.qkv.weight.detach().chunk(3)
        if attn.qkv.bias is not None:
            query_bias, key_bias, _ = attn.qkv.bias.detach().chunk(3)
        else:  # BEiT and EVA keep q_bias and v_bias apart, the keys have none
            query_bias, key_bias = getattr(attn, "q_bias", None), getattr(attn, "k_bias", None)
        pairs = [query_weight, query_bias, key_weight, key_bias]
    return Projections(*(None if tensor is None else tensor.detach() for tensor in pairs))  # type: ignore[arg-type]


def rotate(attn: Any, vectors: Tensor, rope: Tensor) -> Tensor:
    """Patch queries or keys [B, heads, N, d] turned by timm's rotary embedding."""
    from timm.layers import apply_rot_embed_cat  # installed, or there would be no such model

    halves = {"half": True} if getattr(attn, "rotate_half", False) else {}
    return apply_rot_embed_cat(vectors, rope, **halves)


def position_biases(attn: Any, options: dict[str, Any], prefix: int, pooled: bool) -> list[Tensor]:
    """The query's rows of the additive position biases of this call.

    Returns:
        Each [heads, T] or [1, heads, T]: the attention's own bias and the one that the model's blocks share.
    """

    def row(bias: Tensor) -> Tensor:  # [..., T, T] -> [..., T]
        return bias[..., prefix:, :].mean(-2) if pooled else bias[..., 0, :]

    if getattr(attn, "rel_pos", None) is not None:
        return [row(attn.rel_pos.get_bias())]  # such an attention does not read a shared one
    found = [row(options[name]) for name in ("shared_rel_pos_bias", "shared_rel_pos") if options.get(name) is not None]
    table = getattr(attn, "relative_position_bias_table", None)  # [positions, heads]
    if table is not None:
        index = attn.relative_position_index  # [T, T]
        found.append(table[index[prefix:]].mean(0).T if pooled else table[index[0]].T)
    return found
