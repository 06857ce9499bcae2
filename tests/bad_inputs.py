"""Inputs of `tokenmix`, and what is wrong with bad ones: each with the error and a part of its sentence."""

import math

import torch
from mix_helpers import random_images

from tokenmix_kernels import TopKMaps

BATCH, CLASSES, PATCH = 4, 5, 8
WHOLE = [0.0, 0.0, 1.0, 1.0]


def images(*shape, dtype=torch.float32):
    return random_images(shape or (BATCH, 3, 32, 48), dtype)


def maps(*shape, dtype=torch.float32):
    return torch.ones(shape or (BATCH, 6, 7), dtype=dtype)


def boxes(*bad, count=BATCH):
    """Good boxes, with the second one replaced where it is given."""
    return torch.tensor([WHOLE, list(bad) or WHOLE] + [WHOLE] * (count - 2))


def affines(*bad):
    given = torch.eye(2, 3).repeat(BATCH, 1, 1)
    if bad:
        given[1] = torch.tensor(bad).view(2, 3)
    return given


def packed(crop=(0.1, 0.2, 0.5, 0.5), label=3.0, shape=(BATCH, 3, 5, 6, 7), dtype=torch.float32):
    given = torch.ones(shape, dtype=dtype)
    given[:, -1, 0, 0, :4] = torch.tensor(crop, dtype=dtype)[: given.shape[-1]]
    given[:, -1, 0, 0, -2] = label
    return given


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


def within(start, **options):
    """images and an out in the same storage."""
    storage = random_images((1, 1, 1, 2 * BATCH * 3 * 32 * 48)).flatten()
    size = BATCH * 3 * 32 * 48
    return {
        "images": storage[:size].view(BATCH, 3, 32, 48),
        "out": storage[start : start + size].view(BATCH, 3, 32, 48),
        **options,
    }


def in_place(given, **options):
    return {"images": given, "out": given, **options}


HALF, BYTES, INT = torch.float16, torch.uint8, torch.int32
NAN, INF = math.nan, math.inf
NORM = {"mean": (120.0,) * 3, "std": (60.0,) * 3}

# What is given beside good images and labels, the error, and what it says.
BAD = {
    # Images.
    "images-list": ({"images": [1]}, TypeError, r"images must be a torch\.Tensor, got list"),
    "images-3d": ({"images": images(BATCH, 3, 32, 32)[0]}, ValueError, r"images must be \[B, C, H, W\]"),
    "images-none": ({"images": images(0, 3, 32, 32)}, ValueError, r"images .* at least one image, got \[0, 3"),
    "images-no-channel": ({"images": images(BATCH, 0, 32, 32)}, ValueError, r"images must be \[B, C, H, W\]"),
    "images-int": ({"images": images().int()}, TypeError, "images must be one of float32, .*uint8, float64, got int32"),
    "height": ({"images": images(BATCH, 3, 36, 48)}, ValueError, "images .* multiples of patch_size 8, got 36x48"),
    "width": ({"images": images(BATCH, 3, 32, 44)}, ValueError, "images .* multiples of patch_size 8, got 32x44"),
    "height-0": ({"images": images(BATCH, 3, 0, 48)}, ValueError, "images .* multiples of patch_size 8, got 0x48"),
    "tall": ({"images": images(BATCH, 1, 520, 8)}, ValueError, "grid .* 1x1 and 64x64, got 65x1; .*larger patch_size"),
    "wide": ({"images": images(BATCH, 1, 8, 520)}, ValueError, "grid .* 1x1 and 64x64, got 1x65"),
    "images-grad": ({"images": images().requires_grad_()}, ValueError, "images must not require grad"),
    # Labels.
    "labels-list": ({"labels": [0, 1, 2, 3]}, TypeError, r"labels must be a torch\.Tensor, got list"),
    "labels-float": (
        {"labels": torch.zeros(BATCH)},
        TypeError,
        "labels must be one of int64, .*one class number for each image, got fl",
    ),
    "labels-many": (
        {"labels": ints(0, 1, 2, 3, 4)},
        ValueError,
        r"labels must be \[4\], one class number for each image, got \[5\]",
    ),
    "labels-wide": ({"labels": torch.eye(BATCH, CLASSES + 1)}, ValueError, r"labels must be \[4\].*got \[4, 6\]"),
    "labels-high": ({"labels": ints(0, 1, 5, 2)}, ValueError, r"labels must be in \[0, 5\), got 5"),
    "labels-low": ({"labels": ints(0, -1, 4, 2, dtype=INT)}, ValueError, r"labels must be in \[0, 5\), got -1"),
    "labels-meta": ({"labels": torch.zeros(4, dtype=torch.long, device="meta")}, ValueError, "labels must be on cpu"),
    # Maps.
    "maps-array": ({"maps": maps().numpy()}, TypeError, r"maps must be a torch\.Tensor, got ndarray"),
    "maps-pair": ({"maps": (maps(), maps())}, TypeError, r"maps must be a torch\.Tensor, got tuple"),
    "maps-batch": ({"maps": maps(3, 6, 7)}, ValueError, "maps must be of the same 4 images, got maps of 3"),
    "maps-int": ({"maps": maps(dtype=INT)}, TypeError, "maps must be one of float32, .*uint8, got int32"),
    "maps-2d": ({"maps": maps(6, 7)}, ValueError, r"maps must be \[B, h, w\], \[B, K, h, w\], TopKMaps.*got \[6, 7\]"),
    "maps-5d": ({"maps": maps(BATCH, 3, 5, 6, 7)}, ValueError, r"maps must be .*got \[4, 3, 5, 6, 7\]"),
    "maps-tall": ({"maps": maps(BATCH, 65, 7)}, ValueError, "maps must be between 1x1 and 64x64 cells"),
    "maps-wide": ({"maps": maps(BATCH, 6, 65)}, ValueError, "maps must be between 1x1 and 64x64 cells"),
    "maps-empty": ({"maps": maps(BATCH, 0, 7)}, ValueError, "maps must be between 1x1 and 64x64 cells"),
    "maps-strided": ({"maps": maps(BATCH, 7, 6).mT}, ValueError, r"maps must be contiguous within.*maps\.contiguous\("),
    "maps-grad": ({"maps": maps().requires_grad_()}, ValueError, "maps must not require grad"),
    "maps-classes": (
        {"maps": maps(BATCH, 3, 6, 7)},
        ValueError,
        r"maps of all classes must be \[B, 5, h, w\], got \[4, 3",
    ),
    "maps-meta": ({"maps": maps().to("meta")}, ValueError, "maps must be on cpu, where the batch is, got meta"),
    "top-0": ({"maps": TopKMaps(maps(BATCH, 0, 6, 7), maps(BATCH, 0, 6, 7))}, ValueError, "maps must be between"),
    "top-3d": ({"maps": TopKMaps(maps(), maps())}, ValueError, r"maps must be .*TopKMaps.*got \[4, 6, 7\]"),
    "indices-list": ({"maps": TopKMaps(maps(BATCH, 2, 6, 7), [1])}, TypeError, "indices must be a torch"),
    "indices-half": (
        {"maps": TopKMaps(maps(BATCH, 2, 6, 7), maps(BATCH, 2, 6, 7, dtype=HALF))},
        TypeError,
        "indices must be one of int64, .*float32, .*got float16",
    ),
    "indices-shape": (
        {"maps": TopKMaps(maps(BATCH, 2, 6, 7), maps(BATCH, 3, 6, 7))},
        ValueError,
        r"indices must be \[4, 2, 6, 7\], the shape of the values, got \[4, 3, 6, 7\]",
    ),
    "indices-strided": (
        {"maps": TopKMaps(maps(BATCH, 2, 6, 7), maps(BATCH, 2, 7, 6).mT)},
        ValueError,
        "indices must be contiguous within an image",
    ),
    # Boxes, ids, flips and affines.
    "boxes-alone": ({"boxes": boxes()}, ValueError, "boxes must come with maps"),
    "ids-alone": ({"ids": ints(0, 1, 2, 3)}, ValueError, "ids must come with maps"),
    "flips-alone": ({"flips": torch.zeros(BATCH, dtype=torch.bool)}, ValueError, "flips must come with maps"),
    "affines-alone": ({"affines": affines()}, ValueError, "affines must come with maps"),
    "boxes-list": ({"maps": maps(), "boxes": [WHOLE] * 4}, TypeError, r"boxes must be a torch\.Tensor"),
    "boxes-pixels": (
        {"maps": maps(), "boxes": boxes().long()},
        TypeError,
        r"boxes must be one of float32, .*in \[0, 1\] for each image, got int64",
    ),
    "boxes-batch": ({"maps": maps(), "boxes": boxes(count=3)}, ValueError, r"boxes must be \[4, 4\].*got \[3, 4\]"),
    "boxes-low": ({"maps": maps(), "boxes": boxes(-0.1, 0, 1, 1)}, ValueError, r"boxes .*got \[-0\.1, .*for image 1"),
    "boxes-high": ({"maps": maps(), "boxes": boxes(0, 0, 1, 1.0005)}, ValueError, "boxes .* for image 1"),
    "boxes-empty-x": ({"maps": maps(), "boxes": boxes(0.5, 0, 0.5, 1)}, ValueError, "boxes .* 0 <= x0 < x1 <= 1"),
    "boxes-empty-y": ({"maps": maps(), "boxes": boxes(0, 0.7, 1, 0.6)}, ValueError, "boxes .* 0 <= y0 < y1 <= 1"),
    "boxes-nan": ({"maps": maps(), "boxes": boxes(NAN, 0, 1, 1)}, ValueError, r"boxes .*got \[nan"),
    "boxes-nan-end": ({"maps": maps(), "boxes": boxes(0, 0, 1, NAN)}, ValueError, r"boxes .*nan\] for image 1"),
    "boxes-grad": ({"maps": maps(), "boxes": boxes().requires_grad_()}, ValueError, "boxes must not require grad"),
    "ids-float": (
        {"maps": maps(9, 6, 7), "ids": torch.zeros(4)},
        TypeError,
        "ids must be one of int64, int32, one row of maps for each image, got float32",
    ),
    "ids-shape": (
        {"maps": maps(9, 6, 7), "ids": ints(1, 2)},
        ValueError,
        r"ids must be \[4\], one row of maps for each image, got \[2\]",
    ),
    "ids-strided": (
        {"maps": maps(9, 6, 7), "ids": torch.arange(8)[::2]},
        ValueError,
        r"ids must be contiguous; call ids\.contiguous\(",
    ),
    "ids-high": ({"maps": maps(9, 6, 7), "ids": ints(0, 9, 1, 2)}, ValueError, r"ids must be in \[0, 9\), got 9"),
    "ids-low": ({"maps": maps(9, 6, 7), "ids": ints(0, -2, 1, 2)}, ValueError, r"ids must be in \[0, 9\), got -2"),
    "flips-int": (
        {"maps": maps(), "flips": ints(0, 1, 0, 1)},
        TypeError,
        "flips must be bool, got int64",
    ),
    "flips-shape": (
        {"maps": maps(), "flips": torch.zeros(3).bool()},
        ValueError,
        r"flips must be .*\[4\], got .*\[3\]",
    ),
    "flips-list": ({"maps": maps(), "flips": [True] * 4}, TypeError, r"flips must be a torch\.Tensor, got list"),
    "affines-double": ({"maps": maps(), "affines": affines().double()}, TypeError, "affines must be float32, got fl"),
    "affines-shape": (
        {"maps": maps(), "affines": affines()[:3]},
        ValueError,
        r"affines must be \[4, 2, 3\], got \[3, 2, 3\]",
    ),
    "affines-nan": ({"maps": maps(), "affines": affines(1, 0, NAN, 0, 1, 0)}, ValueError, "affines must be finite"),
    "affines-inf": ({"maps": maps(), "affines": affines(1, INF, 0, 0, 1, 0)}, ValueError, "affines must be finite"),
    "affines-flat": (
        {"maps": maps(), "affines": affines(1, 2, 0, 2, 4, 0)},
        ValueError,
        r"affines must be invertible, got \[\[1\.0, 2\.0, 0\.0\].*for image 1",
    ),
    "affines-boxes": ({"maps": maps(), "affines": affines(), "boxes": boxes()}, ValueError, "affines .* together with"),
    "affines-flips": (
        {"maps": maps(), "affines": affines(), "flips": torch.zeros(BATCH, dtype=torch.bool)},
        ValueError,
        "affines must not be given together with boxes or flips",
    ),
    # Packed label maps.
    "packed-half": ({"labels": packed(dtype=HALF)}, TypeError, "packed label maps must be float32: half floats round"),
    "packed-planes": ({"labels": packed(shape=(BATCH, 2, 5, 6, 7))}, ValueError, r"labels must be \[B\] or a packed"),
    "packed-narrow": (
        {"labels": packed(shape=(BATCH, 3, 5, 6, 5))},
        ValueError,
        r"packed \[B, 3, k, h, w\] with w >= 6",
    ),
    "packed-maps": ({"labels": packed(), "maps": maps()}, ValueError, "maps and boxes must not be given where labels"),
    "packed-boxes": (
        {"labels": packed(), "boxes": boxes()},
        ValueError,
        "maps and boxes must not be given where labels",
    ),
    "packed-label": ({"labels": packed(label=5.0)}, ValueError, r"labels must be in \[0, 5\), got 5"),
    "packed-batch": ({"labels": packed(shape=(3, 3, 5, 6, 7))}, ValueError, r"labels must be \[4\].*got \[3\]"),
    "packed-crop": ({"labels": packed(crop=(0.6, 0, 0.5, 1))}, ValueError, "boxes must be"),
    "packed-crop-empty": ({"labels": packed(crop=(0.6, 0, 0, 1))}, ValueError, "boxes must be"),
    # Masks and partners.
    "mask-int": ({"mask": torch.zeros(4, 4, 6, dtype=BYTES)}, TypeError, "mask must be bool.*, got uint8"),
    "mask-grid": (
        {"mask": torch.zeros(4, 6, 4).bool()},
        ValueError,
        r"mask must be \[4, 4, 6\], the token grid, got \[4",
    ),
    "mask-batch": ({"mask": torch.zeros(1, 4, 6).bool()}, ValueError, r"mask must be \[4, 4, 6\].*got \[1, 4, 6\]"),
    "mask-strided": ({"mask": torch.zeros(4, 6, 4).bool().mT}, ValueError, r"mask must be contiguous; call mask\.cont"),
    "mask-list": ({"mask": [[True]]}, TypeError, r"mask must be a torch\.Tensor, got list"),
    "partner-list": ({"partner": [3, 2, 1, 0]}, TypeError, r"partner must be a torch\.Tensor, got list"),
    "partner-float": (
        {"partner": torch.zeros(4)},
        TypeError,
        "partner must be one of int64, int32, one for each image, got float32",
    ),
    "partner-shape": ({"partner": ints(1, 0)}, ValueError, r"partner must be \[4\], one for each image, got \[2\]"),
    "partner-strided": (
        {"partner": torch.zeros(8).long()[::2]},
        ValueError,
        r"partner must be contiguous; call partner\.contiguous\(",
    ),
    "partner-high": ({"partner": ints(1, 0, 4, 2)}, ValueError, r"partner must be in \[0, 4\), got 4"),
    "partner-low": ({"partner": ints(1, 0, -1, 2, dtype=INT)}, ValueError, r"partner must be in \[0, 4\), got -1"),
    "partner-cycle": (in_place(images(), partner=ints(1, 2, 3, 0)), ValueError, "partner must be its own inverse"),
    "partner-shared": (in_place(images(), partner=ints(1, 0, 0, 3)), ValueError, "partner must be its own inverse"),
    # Out.
    "out-list": ({"out": [1]}, TypeError, r"out must be a torch\.Tensor, got list"),
    "out-dtype": ({"out": images(dtype=HALF)}, TypeError, "out must be float32, the dtype of the result, got float16"),
    "out-not-cast": ({"out": images(), "out_dtype": HALF}, TypeError, "out must be float16, .*got float32"),
    "out-bytes": (
        {"images": images(dtype=BYTES), "out": images(dtype=BYTES), **NORM},
        TypeError,
        "out must be float32",
    ),
    "out-shape": (
        {"out": images(4, 3, 48, 32)},
        ValueError,
        r"out must be \[4, 3, 32, 48\], the shape of images, got \[4, 3, 48",
    ),
    "out-meta": ({"out": images().to("meta")}, ValueError, "out must be on cpu, where the batch is, got meta"),
    "out-expanded": ({"out": torch.zeros(3, 32, 48).expand(4, 3, 32, 48)}, ValueError, "out must not be an expanded"),
    "out-sliding": (
        {"out": torch.zeros(9000).as_strided((4, 3, 32, 48), (1000, 8, 32, 1))},
        ValueError,
        "out .*expanded",
    ),
    "in-place-expanded": (in_place(torch.zeros(3, 32, 48).expand(4, 3, 32, 48)), ValueError, "out .*expanded"),
    "out-shifted": (within(16), ValueError, "out must be images itself or not overlap with it in memory"),
    "out-last-image": (within(3 * 3 * 32 * 48), ValueError, "out must be images itself or not overlap"),
    "out-grad": ({"out": images().requires_grad_()}, ValueError, "out must not require grad"),
    "in-place-norm": (in_place(images(), **NORM), ValueError, "out must not be images where mean and std are given"),
    # Settings.
    "classes": (
        {"num_classes": 0},
        ValueError,
        r"num_classes must be a whole number of at least 1, below 2\*\*31, got 0",
    ),
    "classes-float": ({"num_classes": 5.0}, ValueError, "num_classes must be a whole number of at least 1, .*got 5.0"),
    "patch": ({"patch_size": 0}, ValueError, "patch_size must be a whole number of at least 1, .*got 0"),
    "patch-bool": ({"patch_size": True}, ValueError, "patch_size must be a whole number of at least 1, .*got True"),
    "tokens": ({"minimum_tokens": -1}, ValueError, "minimum_tokens must be a whole number of at least 0, .*got -1"),
    "mask-type": (
        {"mask_type": "blocks"},
        ValueError,
        "mask_type must be one of 'block', 'random', 'cutmix', 'grid', got 'blo",
    ),
    "mask-type-given": ({"mask_type": "given"}, ValueError, "mask_type must be one of 'block', 'random', 'cutmix'"),
    "mask-type-with-mask": ({"mask": torch.zeros(4, 4, 6).bool(), "mask_type": "?"}, ValueError, "mask_type must be"),
    "mode": ({"mode": "half"}, ValueError, "mode must be one of 'batch', 'pair', 'elem', got 'half'"),
    "lam": ({"lam": 1.5}, ValueError, r"lam must be the share to keep, in \[0, 1\], or 'beta', got 1\.5"),
    "lam-name": ({"lam": "alpha"}, ValueError, "lam must be .* or 'beta', got 'alpha'"),
    "lam-minus-1": ({"lam": -1.0}, ValueError, r"lam must be the share to keep, .*got -1\.0"),
    "lam-nan": ({"lam": NAN}, ValueError, "lam must be the share to keep, .*got nan"),
    "smoothing": ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\], got -0\.1"),
    "alpha": ({"cutmix_alpha": -1}, ValueError, r"cutmix_alpha must be in \[0, 1000\].*got -1"),
    "alpha-0": ({"cutmix_alpha": 0}, ValueError, "one of mixup_alpha and cutmix_alpha must be above 0"),
    "minmax-order": ({"cutmix_minmax": (0.8, 0.2)}, ValueError, "cutmix_minmax must be two shares in .*smaller first"),
    "minmax-range": ({"cutmix_minmax": (0.2, 1.2)}, ValueError, "cutmix_minmax must be two shares in"),
    "minmax-one": ({"cutmix_minmax": (0.2,)}, ValueError, "cutmix_minmax must be two shares in"),
    "minmax-number": ({"cutmix_minmax": 0.2}, ValueError, r"cutmix_minmax must be a sequence of numbers, got 0\.2"),
    "mean-alone": ({"mean": (0.5,) * 3}, ValueError, "mean and std must be given together"),
    "std-alone": ({"std": (0.5,) * 3}, ValueError, "mean and std must be given together"),
    "mean-channels": ({"mean": [0.5], "std": [0.5]}, ValueError, "mean and std .* each of the 3 channels, got"),
    "mean-inf": ({"mean": (INF, 0, 0), "std": (1, 1, 1)}, ValueError, r"mean must be finite, got \(inf"),
    "mean-number": ({"mean": 0.5, "std": 0.5}, ValueError, r"mean must be a sequence of numbers, got 0\.5"),
    "std-0": ({"mean": (0, 0, 0), "std": (1, 0, 1)}, ValueError, r"std must be above 0 and finite, got \(1\.0, 0\.0"),
    "mean-bytes": (
        {"images": images(dtype=BYTES), "mean": (300.0,) * 3, "std": (60.0,) * 3},
        ValueError,
        "mean must be between -256 and 256 for uint8 images",
    ),
    "mean-unit": (
        {"images": images(dtype=BYTES), "mean": (0.5,) * 3, "std": (0.2,) * 3},
        ValueError,
        "mean and std must be in the units of uint8 images, 0 to 255",
    ),
    "out-dtype-int": ({"out_dtype": INT}, TypeError, r"out_dtype must be float32, .*got torch\.int32"),
    "out-dtype-bytes": ({"out_dtype": BYTES}, TypeError, "out_dtype must be float32, .*uint8 for plain bytes"),
    "crop-axes": ({"crop_axes": "left"}, ValueError, "crop_axes must be one of 'correct', 'published', got 'left'"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be one of 'auto', 'reference', 'triton', got 'cuda'"),
    "triton": ({"backend": "triton"}, ValueError, "backend must be 'auto' or 'reference' on cpu: .*TRITON_INTERPRET=1"),
    # Seeds and offsets.
    "seed-int32": (
        {"seed": torch.tensor(1, dtype=INT)},
        ValueError,
        r"seed must be .* 0-d int64 tensor, got torch\.int32",
    ),
    "seed-1d": ({"seed": torch.tensor([1])}, ValueError, r"seed must be .* 0-d int64 tensor, got torch\.int64 \[1\]"),
    "seed-float": ({"seed": 1.0}, ValueError, r"seed must be a 64-bit integer .*got 1\.0"),
    "seed-bool": ({"seed": True}, ValueError, "seed must be a 64-bit integer .*got True"),
    "seed-large": ({"seed": 2**63}, ValueError, "seed must be a 64-bit integer"),
    "offset": ({"sample_offset": 0.5}, TypeError, r"sample_offset must be a whole number in \[0, 2\*\*62\), got 0\.5"),
}
