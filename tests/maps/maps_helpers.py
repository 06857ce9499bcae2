"""Small data sets and teachers for the tests of the command line."""

import os
import re

import numpy as np
from PIL import Image

from tokenmix_kernels.maps.__main__ import main

SIZE = (96, 128)  # gives maps of 3x4
# Threads that wait for each other spin, and tests often run on a machine that has other work.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def make_images(root, classes, count, seed=0):
    generator = np.random.default_rng(seed)
    for number in range(count):
        folder = root / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        height, width = generator.integers(20, 60, 2)
        coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        image = coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC)
        image = image.convert("L") if number % 5 == 0 else image
        image.save(folder / f"image{number}.png")
    return root


def build_arguments(data, weights, out, **options):
    arguments = ["build", str(data), "--model", "test_resnet", "--weights", str(weights), "--out", str(out)]
    arguments += ["--size", str(SIZE[0]), str(SIZE[1])]
    options = {"workers": 0, "batch-size": 4, **options}
    for name, value in options.items():
        arguments += [f"--{name}", str(value)]
    return arguments


def expect_error(capsys, arguments, says):
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert re.search(says, error), error
    assert error.splitlines()[-1].startswith("error: ")
