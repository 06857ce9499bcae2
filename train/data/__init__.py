"""Training data: data sets, readers, and loaders that can continue at any step."""

from .batch import Batch, seeded, to_device
from .dataset import Data
from .loader import EpochLoader, EpochOrder
from .sources import load_data

__all__ = ["Batch", "Data", "EpochLoader", "EpochOrder", "load_data", "seeded", "to_device"]
