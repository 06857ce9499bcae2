"""Activation maps: banks of them, teachers that compute them, and the command line.

python -m tokenmix_kernels.maps build | convert | inspect
"""

from .bank import MapBank, MapBankWriter, bank_size, dataset_digest
from .folder import folder_digest
from .teacher import ActivationTeacher, load_teacher, weights_of

__all__ = [
    "ActivationTeacher", "MapBank", "MapBankWriter", "bank_size", "dataset_digest", "folder_digest", "load_teacher",
    "weights_of",
]  # fmt: skip
