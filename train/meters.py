"""Where the time of a step goes, measured without waiting for the device."""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .files import write_lines

PARTS = ("data", "mixing", "forward", "backward", "update")


class StepTimer:
    """Seconds per part of a training step.

    On a GPU the marks are events in the stream, read only in `read()`, after the losses have been read anyway; on a CPU
    they are the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps = 0
        self.images = 0
        self._last: torch.Event | float = 0.0
        self._pending: list[tuple[str, torch.Event, torch.Event]] = []

    def _now(self) -> torch.Event | float:
        if self.device.type == "cpu":
            return time.perf_counter()
        cuda = self.device.type == "cuda"
        event = torch.cuda.Event(enable_timing=True) if cuda else torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        """Begin to time: what follows belongs to the next mark."""
        self._last = self._now()

    def mark(self, part: str) -> None:
        """The time since the last mark was spent on `part`."""
        now = self._now()
        if isinstance(now, float):
            assert isinstance(self._last, float)
            self.seconds[part] += now - self._last
        else:
            assert not isinstance(self._last, float)
            self._pending.append((part, self._last, now))
        self._last = now

    def count(self, images: int) -> None:
        """One step of so many images has ended."""
        self.steps += 1
        self.images += images

    def read(self) -> dict[str, float]:
        """Seconds per part so far; waits for the last mark on a GPU."""
        if self._pending:
            self._pending[-1][2].synchronize()
            for part, begin, end in self._pending:
                self.seconds[part] += begin.elapsed_time(end) / 1000
            self._pending.clear()
        return dict(self.seconds)

    def add(self, other: StepTimer) -> None:
        """Take over the times of another timer."""
        for part, seconds in other.read().items():
            self.seconds[part] += seconds
        self.steps += other.steps
        self.images += other.images

    def table(self) -> str:
        """A few lines for people: milliseconds per step and share of each part."""
        seconds = self.read()
        total = sum(seconds.values())
        if not self.steps or not total:
            return "no steps were timed"
        lines = [f"{'part of a step':<16}{'ms':>9}{'share':>9}"]
        for part, value in seconds.items():
            lines.append(f"{part:<16}{1000 * value / self.steps:>9.2f}{100 * value / total:>7.1f} %")
        lines.append(f"{'all':<16}{1000 * total / self.steps:>9.2f}{self.images / total:>7.0f} images/s")
        return "\n".join(lines)


def write_records(records: Sequence[Mapping[str, Any]], output: Path) -> None:
    """metrics.jsonl and summary.csv, whole at every moment, without lines of epochs that a kill undid."""
    write_lines(map(json.dumps, records), output / "metrics.jsonl")
    text = io.StringIO()
    columns = list(dict.fromkeys(key for record in records for key in record))
    writer = csv.DictWriter(text, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_lines(text.getvalue().splitlines(), output / "summary.csv")
