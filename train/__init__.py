"""The trainer: `python -m train --recipe demo`, or `torchrun -m train` for several processes."""
