"""WebDataset without silent losses: timm's reader leaves out, without a word, whatever it cannot decode."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image

from tokenmix_kernels.photos import ImageError, read_image

__all__ = ["prepare_webdataset"]


class ShardError(ValueError):
    """A shard or a sample that cannot be read."""


class Decode:
    """timm's decoding of a sample, with an image that is ours or the ImageError that says why there is none.

    Args:
        decode: timm's, called with a blank image in the place of the sample's.
        endings: of image files.
    """

    def __init__(self, decode: Any, endings: str) -> None:
        self.decode, self.endings = decode, endings.split(";")
        blank = io.BytesIO()
        Image.new("RGB", (1, 1)).save(blank, "png")
        self.blank = blank.getvalue()

    def __call__(self, sample: Mapping[str, Any]) -> Any:
        name = f"{sample['__key__']} in {sample['__url__']}"
        ending = next((ending for ending in self.endings if ending in sample), None)
        if ending is None:
            raise ShardError(f"the sample {name} has no file that ends in {' or '.join(self.endings)}")
        try:
            result = self.decode({**sample, ending: self.blank})
        except Exception as error:  # of the label: a file that is missing, or holds no number
            raise ShardError(f"the label of the sample {name} cannot be read: {error}") from error
        if result is not None:
            try:
                result["jpg"] = read_image(
                    io.BytesIO(sample[ending]), f"{sample['__key__']}.{ending} in {sample['__url__']}"
                )
            except ImageError as error:
                result["jpg"] = error
        return result


def stop(error: Exception) -> bool:
    """Raise a sentence that names the shard; webdataset adds its address to the arguments of what it caught."""
    if isinstance(error, ShardError):
        raise ShardError(error.args[0])
    address = next((value for value in reversed(error.args) if isinstance(value, str)), "")
    raise ShardError(f"the shard {address} cannot be read: {error.args[0] if error.args else type(error).__name__}")


def prepare_webdataset(reader: Any) -> None:
    """Replace decoding and error handling in the pipeline of timm's reader."""
    for stage in reader.ds.pipeline:
        if "handler" in getattr(stage, "kw", {}):
            stage.kw["handler"] = stop
            if stage.args and not isinstance(stage.args[0], Decode):
                stage.args = (Decode(stage.args[0], reader.input_key), *stage.args[1:])
