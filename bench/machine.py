"""Describe the machine in result files, and write them."""

import csv
import dataclasses
import json
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .fingerprint import measured

__all__ = ["describe", "described_case", "write_csv", "write_json"]

PACKAGES = ("tokenmix_kernels", "torch", "triton", "torchvision", "timm", "numpy")


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe() -> dict[str, Any]:
    """Processor, card and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def described_case(case: Case) -> dict[str, Any]:
    """A case's fields, dtypes as text."""
    return {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in dataclasses.asdict(case).items()
        if value is not None
    }


def write_json(path: Path, record: dict[str, Any], anew: bool = True) -> None:
    """Write a record with the fingerprint of the code that it measured, whole or not at all.

    Args:
        path: of the file.
        record: what it will hold. Its `kind` says which code that is.
        anew: all figures are of this run. Otherwise the fingerprint that the file has stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    code = measured(record["kind"]) if anew else json.loads(path.read_text()).get("measured")
    record = {"kind": record["kind"], "measured": code, **record}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)
    print(f"written to {path}")


def write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows of a record as a table; columns in the order in which they first appear."""
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")
