"""What a process does that a test starts: train on a pretended GPU of its own."""

from pretend_cuda import pretended_gpus
from pretend_processes import data_parallel

from train.config import parse
from train.loop import train


def train_on_pretended_gpus(arguments: list[str]) -> None:
    with pretended_gpus(2), data_parallel():
        train(parse(arguments))
