"""timm's `create_loader` with TokenMix in it: one import in `train.py` changes, and no flag."""

import inspect
from collections.abc import Mapping
from typing import Any

from .arguments import shown
from .call import Maps
from .extras import require
from .mix import TokenMix
from .timm_loader import TokenMixCollate, TokenMixLoader, collate_places

__all__ = ["create_loader"]

timm_data = require("timm.data")


def create_loader(
    *arguments: Any, mix: Mapping[str, Any] | None = None, maps: Maps | None = None, **options: Any
) -> Any:
    """`timm.data.create_loader`, which mixes by a `TokenMix` on the device where timm's would mix while collating.

    timm's `train.py` gives a `FastCollateMixup` where its flags ask for mixing and it has a prefetcher. Its settings
    are those of the `TokenMix`, and workers do not mix. Without one the loader is timm's own.

    Args:
        *arguments, **options: as for timm's.
        mix: more settings of the TokenMix, such as {'patch_size': 14}.
        maps: activation maps of the whole data set, for a data set that is wrapped in `WithPlaces`.

    Returns:
        A `TokenMixLoader`, or what timm gives.

    Raises:
        ValueError: timm's own settings are given in `mix`, or something is given that has no use; as `TokenMixLoader`.
        TypeError: `collate_fn` is a `TokenMixCollate`, which mixes itself.
    """
    given = inspect.signature(timm_data.create_loader).bind(*arguments, **options)
    collate = given.arguments.get("collate_fn")
    if not isinstance(collate, timm_data.FastCollateMixup):
        for name, value in (("mix", mix), ("maps", maps)):
            if value is not None and given.arguments.get("is_training"):
                raise ValueError(
                    f"{name} must not be given where collate_fn is no FastCollateMixup, got {shown(collate)}: nothing "
                    "is mixed here; without a prefetcher train.py makes a Mixup, in whose place a TokenMix goes"
                )
        return timm_data.create_loader(*arguments, **options)
    if isinstance(collate, TokenMixCollate):
        raise TypeError(
            "collate_fn must be timm's FastCollateMixup, got a TokenMixCollate, which mixes in the workers: use timm's "
            "create_loader with it"
        )
    if not given.arguments.get("use_prefetcher", True):
        raise ValueError("use_prefetcher must be True, or the images are normalised before they are mixed")
    if given.arguments.get("num_aug_splits"):
        raise ValueError("num_aug_splits must be 0: views of one image would be mixed with those of others")
    settings: dict[str, Any] = {
        "mixup_alpha": collate.mixup_alpha, "cutmix_alpha": collate.cutmix_alpha,
        "cutmix_minmax": collate.cutmix_minmax, "prob": collate.mix_prob, "switch_prob": collate.switch_prob,
        "mode": collate.mode, "correct_lam": collate.correct_lam, "label_smoothing": collate.label_smoothing,
        "num_classes": collate.num_classes, "multi_label": getattr(collate, "multi_label", False),
    }  # fmt: skip
    if twice := sorted(settings.keys() & (mix or {}).keys()):
        raise ValueError(f"mix must not have {', '.join(twice)}, which collate_fn has")
    given.arguments["collate_fn"] = None if maps is None else collate_places
    made = TokenMix(**settings, **(mix or {}))
    made.mixup_enabled = collate.mixup_enabled
    return TokenMixLoader(timm_data.create_loader(*given.args, **given.kwargs), made, maps)
