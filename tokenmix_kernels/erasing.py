"""Random erasing as `TokenMix` takes it: settings like those of `timm.data.random_erasing.RandomErasing`."""

from math import exp
from typing import Any, NamedTuple

from .arguments import as_count, as_number, one_of, shown
from .settings import ERASE_MODES

__all__ = ["MOST_RECTANGLES", "RandomErasing", "erase_settings"]

MOST_RECTANGLES = 16
WIDEST = 1000.0  # aspect ratio


class RandomErasing(NamedTuple):
    """Erase rectangles of each image before it is mixed (Zhong et al., arXiv 1708.04896), as timm does it.

    Names and defaults are those of `timm.data.random_erasing.RandomErasing`.

    Attributes:
        probability: that an image is erased at all (DeiT: 0.25).
        min_area, max_area: share of the image's area that its rectangles have, each of n rectangles 1 / n of it.
        min_aspect, max_aspect: height over width, log-uniform; max_aspect is 1 / min_aspect if not given.
        mode: what erased pixels become: 'const' 0, 'rand' one normal number for each channel of a rectangle, 'pixel'
            one for each value (DeiT). Of the normalised image: mean 0 and variance 1.
        min_count, max_count: number of rectangles, at most 16; max_count is min_count if not given.
        num_splits: above 1, the first of so many equal parts of a batch is not erased.
        evidence: True: erased pixels carry no evidence. The evidence of a token, or its area where there are no maps,
            counts by the share of the token that is left. timm and DeiT leave targets as they are.
    """

    probability: float = 0.5
    min_area: float = 0.02
    max_area: float = 1 / 3
    min_aspect: float = 0.3
    max_aspect: float | None = None
    mode: str = "const"
    min_count: int = 1
    max_count: int | None = None
    num_splits: int = 0
    evidence: bool = False


def of_timm(erasing: Any) -> RandomErasing:
    """The settings of timm's own object.

    Raises:
        TypeError: it is another object.
    """
    try:
        low, high = (exp(end) for end in erasing.log_aspect_ratio)
        return RandomErasing(
            erasing.probability, erasing.min_area, erasing.max_area, low, high, erasing.mode or "const",
            erasing.min_count, erasing.max_count, erasing.num_splits,
        )  # fmt: skip
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"erasing must be a RandomErasing, ours or timm's, got {shown(erasing)}") from None


def erase_settings(erasing: Any) -> dict[str, Any]:
    """The fields of `Settings` of a RandomErasing, ours or timm's; none for None.

    Raises:
        TypeError, ValueError: another object, or a value out of its range, in one sentence.
    """
    if erasing is None:
        return {}
    if not isinstance(erasing, RandomErasing):
        erasing = of_timm(erasing)
    one_of("mode of erasing", erasing.mode, ERASE_MODES)
    probability = as_number("probability of erasing", erasing.probability, 0, 1, "in [0, 1]")
    area = [as_number(name, getattr(erasing, name), 0, 1, "a share in [0, 1]") for name in ("min_area", "max_area")]
    narrowest, what = 1 / WIDEST, f"a ratio in [{1 / WIDEST}, {WIDEST}]"
    low = as_number("min_aspect", erasing.min_aspect, narrowest, WIDEST, what)
    high = 1 / low
    if erasing.max_aspect is not None:
        high = as_number("max_aspect", erasing.max_aspect, narrowest, WIDEST, what)
    least = as_count("min_count", erasing.min_count, 1)
    most = least if erasing.max_count is None else as_count("max_count", erasing.max_count, 1)
    ranges: dict[str, tuple[float, float]] = {"area": (area[0], area[1]), "aspect": (low, high), "count": (least, most)}
    for name, (smaller, larger) in ranges.items():
        if smaller > larger:
            raise ValueError(f"max_{name} must be at least min_{name}, {smaller}, got {larger}")
    if most > MOST_RECTANGLES:
        raise ValueError(f"max_count must be at most {MOST_RECTANGLES}, got {most}")
    if not isinstance(erasing.evidence, bool):
        raise ValueError(f"evidence of erasing must be True or False, got {shown(erasing.evidence)}")
    return {
        "erase_prob": probability, "erase_mode": erasing.mode, "erase_area": tuple(area), "erase_aspect": (low, high),
        "erase_count": (least, most), "erase_evidence": erasing.evidence,
        "erase_splits": as_count("num_splits", erasing.num_splits, 0),
    }  # fmt: skip
