"""What every flag may do on a resumed run: one table."""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["FIXED", "FREE", "PER_PROCESS", "changed_flags"]

# Fixed by the state of a run: weights, moments, schedule, order and draws depend on them.
FIXED = (
    "model", "model_kwargs", "init_from", "input_size", "patch_size", "drop", "drop_path", "model_ema",
    "model_ema_decay", "model_ema_warmup", "amp",
    "batch_size", "accumulate", "max_steps", "seed", "opt", "opt_eps", "opt_betas", "momentum", "weight_decay",
    "clip_grad", "lr", "unscale_lr", "sched", "sched_on_updates", "warmup_epochs", "warmup_lr", "min_lr",
    "cooldown_epochs", "bce_loss",
    "mixer", "mask_type", "grid_cell", "minimum_tokens", "mixup", "cutmix", "cutmix_minmax", "mixup_prob",
    "mixup_switch_prob", "mixup_mode", "mixup_off_epoch", "smoothing",
    "evidence", "attention_ratio", "maps", "teacher", "teacher_weights", "probe", "online", "teacher_size",
    "data", "train_split", "val_split", "num_classes", "train_num_samples", "val_num_samples", "data_kwargs",
    "holdout", "label_fraction", "skip_broken", "repeated_aug", "color_jitter", "aa", "scale", "hflip",
    "train_interpolation", "reprob", "remode", "recount", "eval_crop_ratio", "in_memory", "shift_crops",
)  # fmt: skip
# Obeyed from the resumed step on; the rest of the run is the same up to rounding of another device.
FREE = (
    "recipe", "output", "resume", "save_every", "save_epochs", "keep_best", "eval", "replay", "profile_mixers",
    "device", "threads", "log_every", "eval_every", "picture", "tensorboard", "log_wandb", "wandb_project",
    "wandb_name", "wandb_tags", "wandb_resume_id", "traceback", "compile", "channels_last",
    "data_path", "cache", "num_workers",
)  # fmt: skip
# Say how the images of an update are shared out, which may change with the number of processes: `resume.share_out`.
PER_PROCESS = ("batch_size", "accumulate", "max_steps")
# May grow: see `resume.extend`.
GROWING = ("epochs",)


def changed_flags(
    saved: Mapping[str, Any], now: Mapping[str, Any], stream: bool, free: Sequence[str] = ()
) -> list[str]:
    """The flags that a checkpoint's run had with other values although its state fixes them, as "--NAME OLD (now NEW)".

    Args:
        saved: arguments in the checkpoint.
        now: arguments of this call.
        stream: the data is a stream, whose batches depend on its workers.
        free: flags that may change all the same.
    """
    names = FIXED + (("num_workers",) if stream else ())
    return [
        f"--{name.replace('_', '-')} {saved.get(name)} (now {now[name]})"
        for name in names
        if name in now and name not in free and saved.get(name) != now[name]
    ]


def unclassified(parser: argparse.ArgumentParser) -> set[str]:
    """Flags of a parser that the table does not have, and entries of the table that are no flags."""
    flags = {action.dest for action in parser._actions} - {"help"}
    return flags ^ {*FIXED, *FREE, *GROWING}
