"""Image files as RGB images, the same for every reader of the library."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from .extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageError", "image_size", "naming", "open_image", "read_image", "to_rgb"]

# Largest value of 16 bits over that of 8 bits: 65535 / 255.
WIDE = 257


class ImageError(ValueError):
    """An image file that cannot be decoded: empty, truncated, no image, or too large to be true."""


def to_rgb(image: "Image") -> "Image":
    """Convert an image of any mode to RGB.

    Greyscale of 16 bits (modes ``I;16``, ``I;16B``, ``I;16L``, ``I;16N`` and ``I``) is scaled by the range of 16 bits,
    round(v / 257), where Pillow clips it at 255. Data of fewer bits in 16 (12-bit sensors) comes out dark: rescale
    it first. Floating point (mode ``F``) with values in [0, 1] is scaled by 255, and with values in [0, 255] taken as
    it is. Every other mode is converted as Pillow does it: palettes are looked up, transparency is dropped.

    The orientation of EXIF data is ignored, as torchvision's ImageFolder ignores it: pixels stay as they are stored,
    and so do activation maps of them.

    Args:
        image: PIL image.

    Returns:
        RGB image of the same size; `image` itself where it is RGB already.

    Raises:
        ValueError: mode ``I`` with values outside [0, 65535], mode ``F`` with NaN or values outside [0, 255], or a
            mode that Pillow cannot convert.
        OSError: the file behind the image cannot be decoded; `open_image` names it.
        ImportError: Pillow is missing; the message says how to install it.
    """
    if image.mode == "RGB":
        return image
    wide = image.mode == "I" or image.mode.startswith("I;16")
    if not wide and image.mode != "F":
        return image.convert("RGB")
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if values.size else (0, 0)  # NaN wherever a value is NaN
    if wide:
        if low < 0 or high > 65535:
            raise ValueError(f"values of an image of mode {image.mode} must be in [0, 65535], got {low} to {high}")
        grey = (values.astype(np.uint32) + WIDE // 2) // WIDE
    else:
        if not (low >= 0 and high <= 255):
            raise ValueError(f"values of an image of mode F must be in [0, 1] or [0, 255], got {low:g} to {high:g}")
        grey = np.rint(values * 255 if high <= 1 else values)
    images = require("PIL.Image")
    result: Image = images.fromarray(grey.astype(np.uint8)).convert("RGB")
    return result


def open_image(path: str | os.PathLike[str]) -> "Image":
    """Read an image file as RGB, decoded, with the file closed.

    Args:
        path: image in a format that Pillow reads; of several frames the first is taken.

    Returns:
        RGB image, converted by `to_rgb`; EXIF orientation is ignored.

    Raises:
        ImageError: the file is empty, truncated, not an image, has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``
            admits, or values that `to_rgb` refuses: "the image PATH cannot be read: WHY".
        OSError: the system cannot read the file (it is missing, not permitted, on a failing disk), in the same words.
        ImportError: Pillow is missing; the message says how to install it.
    """
    with opened(path) as image:
        image.load()
        return to_rgb(image)


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read (height, width) of an image file in pixels without decoding it. Errors as in `open_image`."""
    with opened(path) as image:
        return image.height, image.width


@contextmanager
def opened(path: str | os.PathLike[str]) -> "Iterator[Image]":
    """The image in a file, not decoded yet; what goes wrong with it becomes an error that names the file."""
    images = require("PIL.Image")
    with naming(os.fspath(path)), open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("it is empty")
        yield images.open(file)


def read_image(file: BinaryIO, name: str) -> "Image":
    """Read an open image file as RGB and close it, as `open_image` does for one with a path.

    Args:
        file: in binary mode, at its start: of a folder, an archive or a memory.
        name: of the image, for errors.

    Raises:
        ImageError, OSError, ImportError: as `open_image`.
    """
    images = require("PIL.Image")
    with naming(name), file:
        start = file.read(1)
        if not start:
            raise ValueError("it is empty")
        file.seek(0)
        image = images.open(file)
        image.load()
        return to_rgb(image)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn what goes wrong with an image into an error that names it."""
    try:
        yield
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # decoders raise nearly everything on broken files
        start = f"the image {name} cannot be read"
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, f"{start}: {error.strerror}") from error
        if isinstance(error, require("PIL").UnidentifiedImageError):
            raise ImageError(f"{start}: it is not an image in a format that Pillow reads") from error
        raise ImageError(f"{start}: {str(error) or type(error).__name__}") from error
