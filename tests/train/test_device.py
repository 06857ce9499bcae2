"""--device mps and xpu: what can be tried without one. `tests/rehearsal` has whole runs on a pretended device."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tokenmix_kernels import dispatch, reference
from tokenmix_kernels.settings import Settings, as_text
from train import checkpoint
from train.config import parse
from train.device import choose_device, mixing_device, start_processes, sum_dtype
from train.meters import PARTS, StepTimer
from train.profile_mixers import profile_mixers


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A machine with an MPS device and two XPU devices; gives what they were told."""
    told: list[Any] = []
    for module, count in ((torch.mps, 1), (torch.xpu, 2)):
        monkeypatch.setattr(module, "is_available", lambda: True)
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
        monkeypatch.setattr(module, "get_rng_state", lambda device: torch.tensor([len(device.type)]))
        monkeypatch.setattr(module, "set_rng_state", lambda state, device: told.append((int(state), str(device))))
    monkeypatch.setattr(torch.xpu, "set_device", lambda device: told.append(str(device)))
    return told


def test_they_are_chosen_by_name_and_mix_on_the_cpu(others: list[Any]) -> None:
    assert choose_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert [str(choose_device(name)) for name in ("mps", "xpu", "xpu:1")] == ["mps", "xpu:0", "xpu:1"]
    assert choose_device("xpu", local_rank=1) == torch.device("xpu", 1)
    for name in ("mps", "xpu:1"):
        assert mixing_device(torch.device(name)) == torch.device("cpu") and sum_dtype(torch.device(name)).itemsize == 4
    for name in ("cpu", "cuda:0"):
        assert mixing_device(torch.device(name)) == torch.device(name) and sum_dtype(torch.device(name)).itemsize == 8
    assert [str(start_processes(name)[2]) for name in ("mps", "xpu:1")] == ["mps", "xpu:1"]
    assert others == ["xpu:1"]
    with pytest.raises(ValueError, match="--device xpu:2 must be one of this machine's 2 GPUs"):
        choose_device("xpu:2")
    with pytest.raises(ValueError, match="--device mps has one process"):
        choose_device("mps", local_rank=0)
    with pytest.raises(ValueError, match=r"--profile-mixers .*: not on mps"):
        profile_mixers(parse(["--device", "mps"]))


def test_the_mix_itself_says_what_mps_cannot_do() -> None:
    """(the trainer never asks for it)"""
    bodies = dispatch.implementations(lambda _: reference)
    text = as_text(Settings(num_classes=4, patch_size=8, mean=(1.0,) * 3, std=(1.0,) * 3))
    with FakeTensorMode():
        images = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="mps")
        labels = torch.empty(4, dtype=torch.int64, device="mps")
        given = (labels, *[None] * 7, "xyxy", None, torch.tensor(1), 0, text)
        with pytest.raises(ValueError, match="images in bytes that are normalised must be on the CPU, since mps"):
            bodies["mix"](images, torch.float32, *given)
        attention, mask = torch.empty(4, 16, device="mps"), torch.empty(4, 4, 4, dtype=torch.bool, device="mps")
        with pytest.raises(ValueError, match="attention must be on the CPU, since mps"):
            bodies["attention_targets"](labels, None, 4, 0.1, attention, mask, None, None, None, 0.5)


@pytest.mark.parametrize("name", ["mps", "xpu"])
def test_where_there_is_none_it_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--device {name} needs a GPU.*torch\.{name}\.is_available\(\) is False"):
        choose_device(name)


@pytest.mark.parametrize("name", ["mps", "xpu:1"])
def test_their_random_state_is_kept(others: list[Any], name: str) -> None:
    device = torch.device(name)
    state = checkpoint.rng_state(device)
    assert device.type in state and "cuda" not in state
    checkpoint.set_rng_state(state, device)
    assert others == [(len("mps"), name)]
    checkpoint.set_rng_state(state, torch.device("cpu"))  # a run goes on elsewhere
    assert len(others) == 1


def test_steps_are_timed_by_events_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Event(SimpleNamespace):
        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            super().__init__(device=device, timed=enable_timing, waited=False)
            made.append(self)

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Any) -> float:
            return float(1e3 * (end.at - self.at))

    monkeypatch.setattr(torch, "Event", Event)
    timer = StepTimer(torch.device("mps"))
    timer.start()
    for part in PARTS:
        timer.mark(part)
    seconds = timer.read()
    assert all(event.device.type == "mps" and event.timed for event in made)
    assert [event.waited for event in made] == [False] * len(PARTS) + [True]
    assert sum(seconds.values()) == pytest.approx(made[-1].at - made[0].at)
