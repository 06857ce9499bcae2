"""The model that is trained, and the mixer that feeds it."""

import argparse
import difflib
import sys
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tokenmix_kernels import RandomErasing, TokenMix
from tokenmix_kernels.maps.weights import read_tensors, weights_of

from .data import Data
from .evidence import AttentionEvidence
from .mixers import MIXERS, cell_of, ratio_of


def make_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The timm model, for images of --input-size where it has to know, with the weights of --init-from.

    Raises:
        ValueError: timm does not know the model or its arguments, or the weights do not fit.
    """
    kwargs = {"num_classes": num_classes, "drop_rate": args.drop, "drop_path_rate": args.drop_path, **args.model_kwargs}
    if not timm.is_model(args.model):
        close = " or ".join(difflib.get_close_matches(args.model, timm.list_models(), 3))
        raise ValueError(f"--model: timm knows no {args.model}" + (f"; did you mean {close}?" if close else ""))
    try:
        model = timm.create_model(args.model, img_size=args.input_size, **kwargs)
    except TypeError:  # a convolutional network takes images of any size
        try:
            model = timm.create_model(args.model, **kwargs)
        except TypeError as error:
            raise ValueError(f"--model-kwargs: {args.model} refuses {args.model_kwargs}: {error}") from error
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"--model {args.model} cannot be made for --input-size {args.input_size} and --model-kwargs "
            f"{args.model_kwargs}: {error}"
        ) from error
    if args.init_from:
        try:
            weights = weights_of(read_tensors(args.init_from))
        except (ValueError, OSError) as error:
            raise ValueError(f"--init-from: {error}") from error
        print(load_weights(model, weights, f"--init-from {args.init_from}"))
    return model


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str, partly: bool = True) -> str:
    """Load weights, with position embeddings resampled to the model's grid as timm's own checkpoint filter does.

    Args:
        model: what they are loaded into.
        weights: tensors by name.
        source: of the weights, for messages.
        partly: leave what is missing or of another shape (the classifier of other classes) as it is.

    Returns:
        A sentence about what was loaded.

    Raises:
        ValueError: nothing fits, or not all of it although `partly` is False.
    """
    own = model.state_dict()
    changed = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    # Every family of timm's models has its filter in the file of its class.
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if adapt and changed:
        try:
            adapted = adapt(dict(weights), model)
        except Exception as error:  # the filters raise nearly everything on weights of another architecture
            raise ValueError(f"{source} does not fit the model: {error}") from error
        weights = {**weights, **adapted}
    fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
    missing = sorted(own.keys() - fitting.keys())
    if not fitting or (missing and not partly):
        raise ValueError(
            f"{source} does not fit the model: {len(fitting)} of {len(own)} tensors do"
            + (f", the first that is missing or of another shape is {missing[0]}" if missing else "")
        )
    model.load_state_dict(fitting, strict=False)
    resampled = sorted(key for key in changed if key in fitting)
    return (
        f"{len(fitting)} of {len(own)} tensors from {source}"
        + (f"; resampled: {', '.join(resampled)}" if resampled else "")
        + (f"; initialised anew: {', '.join(missing)}" if missing else "")
    )


def make_mixer(args: argparse.Namespace, data: Data, model: nn.Module) -> TokenMix:
    """TokenMix as --mixer and DeiT's flags say, on the model's tokens; it also normalises the uint8 images."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch_size = args.patch_size or (patch[0] if patch else 16)
    recipe = MIXERS[args.mixer]
    masks: dict[str, Any] = {"mask_type": recipe.mask_type or args.mask_type, "lam": recipe.lam}
    if recipe.mask_type is None:
        masks["minimum_tokens"] = args.minimum_tokens
    if masks["mask_type"] == "cutmix":
        masks["cutmix_minmax"] = args.cutmix_minmax
    if masks["mask_type"] == "grid":
        masks["grid_cell"] = cell_of(args, args.input_size // patch_size)
    alphas = (args.mixup if recipe.mixup else 0.0, args.cutmix if recipe.masks else 0.0)
    if args.mixer == "none":
        alphas = (0.0, 1.0)  # nothing is drawn from it
    mix = TokenMix(
        *alphas,
        **masks,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=len(data.classes),
        patch_size=patch_size,
        mean=[255 * value for value in data.mean],
        std=[255 * value for value in data.std],
        out_dtype=torch.bfloat16 if args.amp else torch.float32,
        return_mix=args.evidence == "attention",
        erasing=RandomErasing(args.reprob, mode=args.remode, max_count=args.recount) if args.reprob else None,
    )
    mix.mixup_enabled = args.mixer != "none"
    return mix


def make_attention(args: argparse.Namespace, model: nn.Module, mix: TokenMix) -> AttentionEvidence | None:
    """The attention that --evidence attention reads from the model; None for other evidence.

    Raises:
        ValueError: the model has no attention that can be read, or not on the mixer's tokens.
    """
    if args.evidence != "attention":
        return None
    try:
        attention = AttentionEvidence(model, mix, ratio_of(args))
    except (TypeError, ValueError) as error:
        raise ValueError(f"--evidence attention: {error}") from error
    own = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if own and args.patch_size not in (0, own[0]):
        raise ValueError(
            f"--evidence attention reads one value for each token of the model, of {own[0]} pixels: leave out "
            f"--patch-size {args.patch_size}"
        )
    return attention
