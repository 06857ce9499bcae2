"""Training data: data sets, readers, and loaders that can continue at any step."""

from .batch import Batch, seeded, to_device
from .broken import checked_batches, make_loader
from .dataset import Data
from .loader import EpochLoader, EpochOrder
from .sources import load_data

__all__ = [
    "Batch",
    "Data",
    "EpochLoader",
    "EpochOrder",
    "checked_batches",
    "load_data",
    "make_loader",
    "seeded",
    "to_device",
]
