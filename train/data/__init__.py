"""Training data: data sets, readers, and loaders that can continue at any step."""

from .batch import Batch, seeded, to_device
from .broken import checked_batches, make_loader
from .dataset import Data, Kept, restrict
from .loader import EpochLoader, EpochOrder
from .sources import load_data

__all__ = [
    "Batch",
    "Data",
    "EpochLoader",
    "EpochOrder",
    "Kept",
    "checked_batches",
    "load_data",
    "make_loader",
    "restrict",
    "seeded",
    "to_device",
]
