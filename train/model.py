"""The model that is trained, and the mixer that feeds it."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from tokenmix_kernels import TokenMix

from .data import Data


def make_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """The timm model, for images of --input-size where it has to know."""
    kwargs = {"num_classes": num_classes, "drop_rate": args.drop, "drop_path_rate": args.drop_path, **args.model_kwargs}
    if not timm.is_model(args.model):
        close = " or ".join(difflib.get_close_matches(args.model, timm.list_models(), 3))
        raise ValueError(f"--model: timm knows no {args.model}" + (f"; did you mean {close}?" if close else ""))
    try:
        model = timm.create_model(args.model, img_size=args.input_size, **kwargs)
    except TypeError:  # a convolutional network takes images of any size
        model = timm.create_model(args.model, **kwargs)
    if args.init_from:
        if not Path(args.init_from).is_file():
            raise ValueError(f"--init-from: no file {args.init_from}")
        weights = timm.models.load_state_dict(args.init_from, weights_only=True)
        own = model.state_dict()
        fitting = {key: value for key, value in weights.items() if key in own and value.shape == own[key].shape}
        if not fitting:
            raise ValueError(f"--init-from: nothing in {args.init_from} fits {args.model}")
        model.load_state_dict(fitting, strict=False)
        missing = sorted(own.keys() - fitting.keys())
        print(
            f"{len(fitting)} of {len(own)} tensors from {args.init_from}"
            + (f"; initialised anew: {', '.join(missing)}" if missing else "")
        )
    return model


def make_mixer(args: argparse.Namespace, data: Data, model: nn.Module) -> TokenMix:
    """TokenMix as --mixer and DeiT's flags say, on the model's tokens; it also normalises the uint8 images."""
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    patch_size = args.patch_size or (patch[0] if patch else 16)
    alphas: dict[str, Any] = {"mixup_alpha": args.mixup, "cutmix_alpha": args.cutmix}
    masks: dict[str, Any] = {"mask_type": args.mask_type, "minimum_tokens": args.minimum_tokens}
    if args.mixer == "cutmix":
        alphas = {"mixup_alpha": 0.0, "cutmix_alpha": args.cutmix, "cutmix_minmax": args.cutmix_minmax}
        masks = {"mask_type": "cutmix", "lam": "beta"}
    elif args.mixer == "mixup":
        alphas = {"mixup_alpha": args.mixup, "cutmix_alpha": 0.0}
    mix = TokenMix(
        **alphas,
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
    )
    mix.mixup_enabled = args.mixer != "none"
    return mix
