"""Wrong arguments of every kind to every public function."""

from collections.abc import Callable
from typing import Any

import torch

from tokenmix_kernels import RandomErasing, TokenMix, TopKMaps, pool_targets, token_mask, tokenmix


class Odd:
    """An object of no use to anybody."""


HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, 0.5, -0.5, 1.5, float("nan"), float("inf"), 1j, "", "block", "nan",
    b"beta", (), [], (1,), (0.5, 0.5), (16, 8), {}, {1: 2}, Odd, Odd(), torch.float32, torch.int32, torch.device("cpu"),
    torch.tensor(1), torch.tensor(0.5), torch.tensor([]), torch.zeros(3), torch.zeros(4, 4), torch.zeros(4).long(),
    torch.full((4,), 99), torch.full((4,), -1), torch.zeros(4, 3, 32, 48, dtype=torch.complex64),
    torch.zeros(4, 4, 6).bool(), torch.zeros(4, 3, 0, 0), torch.zeros(4, 3, 32, 48).to_sparse(),
    torch.zeros(4, device="meta"), torch.full((4, 4), float("nan")), torch.zeros(4, 2, 3),
)  # fmt: skip


def hostile_calls() -> list[tuple[str, Callable[[], Any]]]:
    """Every public function with every argument replaced by every hostile value in turn."""
    batch = {"images": torch.rand(4, 3, 32, 48), "labels": torch.arange(4)}
    maps = {"maps": torch.rand(4, 6, 7)}
    options: dict[str, Any] = {
        "num_classes": 5, "patch_size": 8, "boxes": None, "ids": None, "flips": None, "affines": None, "mask": None,
        "partner": None, "lam": 0.5, "minimum_tokens": 1, "mask_type": "block", "mode": "elem", "label_smoothing": 0.1,
        "seed": 1, "generator": None, "sample_offset": 0, "cutmix_alpha": 1.0, "cutmix_minmax": None,
        "correct_lam": True, "mean": None, "std": None, "out": None, "out_dtype": None, "crop_axes": "correct",
        "backend": "auto", "multi_label": False, "clamp_targets": False, "erasing": None,
    }  # fmt: skip
    erasing = RandomErasing()._asdict()
    made = {"mixup_alpha": 0.8, "prob": 1.0, "switch_prob": 0.5, "num_classes": 5, "patch_size": 8}
    made |= {"multi_label": False, "clamp_targets": False, "erasing": None}
    masks = {"batch": 2, "grid": (4, 6), "patch_size": 8, "seed": 1, "lam": 0.5, "mode": "elem", "device": None}
    pool = {**maps, "labels": torch.arange(4), "mask": torch.zeros(4, 4, 6).bool(), "partner": None, "boxes": None}
    functions: tuple[tuple[str, Callable[..., Any], dict[str, Any]], ...] = (
        ("tokenmix", tokenmix, {**batch, **maps, **options}),
        ("TokenMix", TokenMix, made),
        ("RandomErasing", lambda **options: TokenMix(erasing=RandomErasing(**options)), erasing),
        ("token_mask", token_mask, masks),
        ("pool_targets", pool_targets, pool),
        ("tokenmix of rows", tokenmix, {**batch, "labels": torch.zeros(4, 5), **maps, **options, "multi_label": True}),
        ("TopKMaps", lambda values, indices: tokenmix(**batch, maps=TopKMaps(values, indices), **options),
         {"values": torch.rand(4, 2, 6, 7), "indices": torch.zeros(4, 2, 6, 7).long()}),
    )  # fmt: skip
    calls = []
    for name, function, arguments in functions:
        for argument in arguments:
            for value in HOSTILE:
                given = {**arguments, argument: value}
                shown = f"{name}({argument}={type(value).__name__} {str(value)[:40]!r})".replace("\n", " ")
                calls.append((shown, lambda function=function, given=given: function(**given)))
    return calls


def foreign(call: Callable[[], Any]) -> str | None:
    """What is wrong with the answer to a hostile call: another exception than the promised, or one of many lines."""
    try:
        call()
    except (TypeError, ValueError) as error:
        # One of ours names what must be; those of torch and Python do not.
        text = str(error)
        if "\n" in text or len(text) > 400 or not ("must" in text or "no " in text):
            return f"{type(error).__name__}: {text[:200]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


def test_no_wrong_argument_ends_in_a_foreign_exception():
    bad = [f"{name}: {what}" for name, call in hostile_calls() if (what := foreign(call)) is not None]
    assert not bad, "\n".join(bad[:20])
