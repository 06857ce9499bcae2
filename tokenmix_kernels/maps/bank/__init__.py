"""Map banks: the activation maps of a whole data set in one memory-mapped file."""

from .layout import bank_size, dataset_digest
from .reader import MapBank
from .writer import MapBankWriter

__all__ = ["MapBank", "MapBankWriter", "bank_size", "dataset_digest"]
