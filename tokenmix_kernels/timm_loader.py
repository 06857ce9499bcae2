"""TokenMix in timm's loaders: `TokenMixLoader` mixes on the device, `TokenMixCollate` in the workers.

Maps come to an image by its place in the data set: `WithPlaces` hands that on beside image and label, `collate_places`
makes batches of it.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from .arguments import as_device, as_numbers, shown
from .call import Maps, result_dtype, run
from .erasing import erase_settings
from .extras import require
from .inputs import Evidence, check_settings
from .mix import TokenMix
from .settings import Settings
from .transforms import Geometry

if TYPE_CHECKING:
    from timm.data.mixup import FastCollateMixup
else:
    FastCollateMixup = require("timm.data.mixup").FastCollateMixup

__all__ = ["TokenMixCollate", "TokenMixLoader", "WithPlaces", "collate_places"]

# What a sample may say about the part of its map that it shows, beside image and label.
PLACES = ("ids", "boxes", "flips", "affines")


class WithPlaces(Dataset[Any]):
    """A data set whose samples say which map is theirs, and which part of it they show.

    Args:
        dataset: gives (image, label), where `image` is (image, `Geometry`) as `TrackedTransform` and `EvalTransform`
            have it. Its `transform` can be read and set here, as timm's `create_loader` does.
        tracked: False if images show all of their map, whatever the transform.

    A sample is (image, label, places); `places` has 'ids', the sample's index in `dataset`, and 'affines' [2, 3] where
    it is tracked.

    Raises:
        TypeError: when a sample is read whose geometry is not known.
    """

    def __init__(self, dataset: Any, tracked: bool = True) -> None:
        self.dataset = dataset
        self.tracked = tracked

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, dict[str, Any]]:
        image, label = self.dataset[index]
        places: dict[str, Any] = {"ids": index}
        if isinstance(image, tuple) and len(image) == 2 and isinstance(image[1], Geometry):
            image, geometry = image
            if self.tracked:
                places["affines"] = geometry.affine
        elif self.tracked:
            raise TypeError(
                "the data set's transform must be a TrackedTransform, which says what part of its map an image shows, "
                f"got {shown(self.transform)}; create_loader sets one of its own, so set it after that"
            )
        return image, label, places


def collate_places(samples: Sequence[Any]) -> tuple[Any, ...]:
    """Make a uint8 batch of samples, as timm's `fast_collate` does, with their places.

    Args:
        samples: (image, label) or (image, label, places); images are uint8 [C, H, W], of NumPy or PyTorch; places have
            any of 'ids', 'boxes', 'flips' and 'affines', one image's arguments of `tokenmix`.

    Returns:
        (images [B, C, H, W] uint8, labels [B] int64), and a dict of batched places where samples have them.

    Raises:
        TypeError: images are not uint8, or several for each sample (timm's augmentation splits).
    """
    if isinstance(samples[0][0], tuple):
        raise TypeError(
            f"images must be arrays or tensors, got a tuple of {len(samples[0][0])}: wrap a data set with a "
            "TrackedTransform in WithPlaces; augmentation splits cannot be mixed"
        )
    images = torch.stack([torch.as_tensor(sample[0]) for sample in samples])
    if images.dtype != torch.uint8:
        raise TypeError(
            f"images must be uint8 where the collate function mixes or hands them on, got {shown(images)}; "
            "make the loader with use_prefetcher=True, which leaves the normalisation to the device"
        )
    labels = default_collate([sample[1] for sample in samples])
    labels = labels.long() if labels.dim() == 1 else labels
    if len(samples[0]) == 2:
        return images, labels
    return images, labels, default_collate([sample[2] for sample in samples])


def as_places(batch: Sequence[Any], wanted: bool) -> dict[str, Tensor]:
    """The places of a batch; {} where no maps are there to look up.

    Raises:
        TypeError: what comes third is not a dict of places.
        ValueError: there are maps, and nobody says which is whose.
    """
    if len(batch) == 2:
        if wanted:
            raise ValueError(
                "maps must come with samples that say which is theirs: wrap the data set in WithPlaces, and make the "
                "loader with collate_fn=collate_places"
            )
        return {}
    if len(batch) == 3 and isinstance(batch[2], dict) and "ids" in batch[2] and batch[2].keys() <= set(PLACES):
        return batch[2] if wanted else {}
    raise TypeError(
        "a batch must be (images, labels) or (images, labels, a dict of 'ids' and any of 'boxes', 'flips', 'affines'), "
        f"got {len(batch)} parts" + (f", the third {shown(batch[2])}" if len(batch) > 2 else "")
    )


class TokenMixCollate(FastCollateMixup):  # type: ignore[misc, unused-ignore]
    """Mix while collating, in place of `timm.data.FastCollateMixup`.

    Images stay uint8 and are normalised by timm's `PrefetchLoader`, so tokens move and nothing is rounded, but in the
    Mixup branch. Each worker draws from its own random state. `TokenMixLoader` mixes on the device instead, with less
    work for workers.

    Args:
        *arguments, **options: as for `TokenMix`; the first ten are also timm's. Images cannot be normalised here: no
            mean, std, out_dtype, return_mix or erasing (timm's `PrefetchLoader` erases after the mix then).
        maps: activation maps of the whole data set (`MapBank.values`), for samples with places (`WithPlaces`).

    Attributes:
        mixup_enabled: as for `TokenMix`. Workers that are already running follow it from their next batch on, also
            persistent ones, which timm's own do not.

    Raises:
        ValueError: a setting out of range, or one that has no place in a collate function.
    """

    def __init__(self, *arguments: Any, maps: Maps | None = None, **options: Any) -> None:
        for name in ("mean", "std", "out_dtype", "return_mix", "erasing"):
            if options.get(name):
                raise ValueError(
                    f"{name} must not be given to a collate function, which gives uint8 images and targets; use "
                    "TokenMixLoader"
                )
        # One byte that running workers see.
        self.switch = torch.ones(1, dtype=torch.uint8, device="cpu").share_memory_()
        self.mix = TokenMix(*arguments, **options)
        self.maps = maps
        settings = self.mix.settings
        super().__init__(
            mixup_alpha=settings.mixup_alpha, cutmix_alpha=settings.cutmix_alpha,
            cutmix_minmax=settings.minmax or None, prob=settings.prob, switch_prob=settings.switch_prob,
            mode=settings.mode, correct_lam=settings.correct_lam, label_smoothing=settings.label_smoothing,
            num_classes=settings.num_classes,
        )  # fmt: skip
        self.multi_label = settings.multi_label  # the tenth, which older versions of timm do not take

    @property
    def mixup_enabled(self) -> bool:
        return bool(self.switch[0])

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.switch[0] = bool(enabled)

    def __call__(self, samples: Sequence[Any], _: Any = None) -> tuple[Tensor, Tensor]:
        """Mix samples (image, label) or (image, label, places) into (uint8 [B, C, H, W], targets [B, num_classes])."""
        batch = collate_places(samples)
        self.mix.mixup_enabled = self.mixup_enabled
        places = as_places(batch, self.maps is not None)
        return cast(tuple[Tensor, Tensor], self.mix(batch[0], batch[1], self.maps, **places))


class TokenMixLoader:
    """Move uint8 batches to the device, normalise and mix them there, in one launch, while the last step computes.

    In place of timm's `PrefetchLoader`, which it is made from: same attributes, same batches, but mixed.

    Args:
        loader: what `create_loader(..., use_prefetcher=True)` gives, with its device, statistics, dtype and random
            erasing; or a DataLoader of uint8 batches (images, labels) or (images, labels, places). Its collate function
            must not mix.
        mix: the settings; without mean and std, which are the loader's.
        maps: activation maps of the whole data set (`MapBank.values`), moved to the device once; batches then say whose
            they are: see `WithPlaces` and `collate_places`.
        device, mean, std, img_dtype: in place of a PrefetchLoader's; mean and std as timm has them, for images in
            [0, 1]. Needed for a plain DataLoader, but for img_dtype, which is float32.
        generator: where seeds come from, as for `tokenmix`.

    It gives (images [B, C, H, W] of img_dtype, targets [B, num_classes] float32). Images are erased before they are
    mixed, in the same launch, with the PrefetchLoader's `re_prob`, `re_mode` and `re_count`. On a GPU batches are made
    on a side stream, and must be used on the stream that is current when the next one is asked for. Elsewhere there
    are no streams.

    Attributes:
        mixup_enabled: that of `mix`.
        random_erasing: the PrefetchLoader's, or None; may be set.

    Raises:
        TypeError, ValueError: an argument or a batch that does not fit, in one sentence.
    """

    def __init__(
        self,
        loader: Any,
        mix: TokenMix,
        maps: Maps | None = None,
        *,
        device: torch.device | str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        img_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(mix, TokenMix):
            raise TypeError(f"mix must be a TokenMix, got {shown(mix)}")
        if mix.settings.mean or mix.out_dtype is not None or mix.return_mix:
            raise ValueError(
                "mix must be made without mean, std, out_dtype and return_mix: the loader normalises, and gives images "
                "and targets"
            )
        prefetcher = require("timm.data.loader").PrefetchLoader
        self.loader: DataLoader[Any] = loader.loader if isinstance(loader, prefetcher) else loader
        if isinstance(getattr(self.loader, "collate_fn", None), FastCollateMixup):
            raise ValueError(
                "loader must not mix in its collate function, or images are mixed twice: leave out "
                f"collate_fn={type(self.loader.collate_fn).__name__}(...)"
            )
        if getattr(getattr(self.loader, "dataset", None), "num_splits", 0) > 1:
            raise ValueError("loader must not have augmentation splits: views of one image would be mixed with others")
        if isinstance(loader, prefetcher):
            given = {"device": device, "mean": mean, "std": std, "img_dtype": img_dtype}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(f"{name} must not be given beside a PrefetchLoader, which has its own")
            self.device, self.img_dtype = loader.device, loader.img_dtype
            means, deviations = loader.mean.flatten().tolist(), loader.std.flatten().tolist()
            self.random_erasing = loader.random_erasing
        else:
            if device is None or mean is None or std is None:
                raise ValueError("device, mean and std must be given where loader is not a PrefetchLoader")
            self.device, self.img_dtype = as_device(device), img_dtype or torch.float32
            means, deviations = (
                [255 * value for value in as_numbers(name, values)] for name, values in (("mean", mean), ("std", std))
            )
            self.random_erasing = None
        if mix.settings.erase_prob > 0 and self.random_erasing is not None:
            raise ValueError("mix must be made without erasing where the loader erases, or images are erased twice")
        self.mix = mix
        self.mean, self.std = tuple(means), tuple(deviations)
        check_settings(self.normalised(mix.settings))
        result_dtype(torch.uint8, self.img_dtype, self.normalised(mix.settings))
        self.maps = on_device(maps, self.device)
        self.generator = generator
        self.stream: torch.cuda.Stream | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.device.type != "cuda":
            yield from map(self.prepare, self.loader)
            return
        if self.stream is None:
            # One for the life of the loader: the caching allocator keeps the blocks of each stream for that stream.
            self.stream = torch.cuda.Stream(device=self.device)
        ready: tuple[Tensor, Tensor] | None = None
        for batch in self.loader:
            # Memory that the consumer has released may be given out below: its work on it must be done by then.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                following = self.prepare(batch)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            ready = following
        if ready is not None:
            yield ready

    def prepare(self, batch: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Move a batch of the loader to the device, normalise and mix it."""
        places = as_places(batch, self.maps is not None)
        places = {name: value.to(self.device, non_blocking=True) for name, value in places.items()}
        images, labels = (part.to(self.device, non_blocking=True) for part in batch[:2])
        if images.dtype != torch.uint8:
            raise TypeError(
                f"the loader's images must be uint8, not normalised yet, got {shown(images)}; make it with "
                "use_prefetcher=True"
            )
        evidence = Evidence(
            ids=places.get("ids"), boxes=places.get("boxes"), flips=places.get("flips"), affines=places.get("affines")
        )  # fmt: skip
        mixed, result = run(
            images, labels, self.maps if places else None, evidence, None, None, None, self.generator, None, None,
            self.img_dtype, "auto", self.normalised(self.mix.current()), whole=False,
        )  # fmt: skip
        return mixed, result.targets

    def normalised(self, settings: Settings) -> Settings:
        """The settings with the loader's statistics and random erasing."""
        return settings._replace(mean=self.mean, std=self.std, **self.erase_settings)

    @property
    def random_erasing(self) -> Any:
        return self._random_erasing

    @random_erasing.setter
    def random_erasing(self, erasing: Any) -> None:
        self.erase_settings = erase_settings(erasing)
        self._random_erasing = erasing

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def sampler(self) -> Any:
        return self.loader.sampler

    @property
    def batch_sampler(self) -> Any:
        return self.loader.batch_sampler

    @property
    def dataset(self) -> Any:
        return self.loader.dataset

    @property
    def mixup_enabled(self) -> bool:
        return self.mix.mixup_enabled

    @mixup_enabled.setter
    def mixup_enabled(self, enabled: bool) -> None:
        self.mix.mixup_enabled = enabled


def on_device(maps: Any, device: torch.device) -> Any:
    """Maps, or the two parts of top-k maps, on a device."""
    if maps is None or isinstance(maps, Tensor):
        return maps if maps is None else maps.to(device)
    return type(maps)(*(part.to(device) for part in maps))
