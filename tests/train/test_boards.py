"""TensorBoard and Weights & Biases: they show the records, and a resumed run goes on where it was."""

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from train_helpers import make_folder, records, tiny

from train import checkpoint
from train.config import parse
from train.loop import train as train_run
from train.run import save_checkpoint

SHORT = ("--max-steps", "1", "--aa", "none")


class StubRun:
    """A run of a stub of W&B: what was logged, by step."""

    def __init__(self, options: dict[str, Any], logged: dict[int, dict[str, Any]]) -> None:
        self.id: str = options["id"] or f"made-for-{options['name']}"
        self.options, self.logged, self.ended = options, logged, None
        self.step = max(logged, default=-1) + 1

    def log(self, record: dict[str, Any], step: int) -> None:
        assert step not in self.logged, "W&B takes a step once"
        self.logged[step] = record

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code


class Stub(ModuleType):
    """In place of the package: keeps runs by id, as its server does."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.calls: list[StubRun] = []
        self.error: Exception | None = None

    def init(self, **options: Any) -> StubRun:
        if self.error:
            raise self.error
        run = StubRun(options, {})
        run = StubRun(options, self.runs.setdefault(run.id, {}))
        self.calls.append(run)
        return run


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    module = Stub()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("images"), classes=2, train=8, val=2)


def without_seconds(logged: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in logged[step].items() if key != "seconds"} for step in sorted(logged)]


def test_flags_of_timm_reach_wandb(stub: Stub, folder: Path, tmp_path: Path) -> None:
    flags = ["--log-wandb", "--wandb-project", "photos", "--wandb-tags", "a", "b"]
    train_run(parse(tiny(folder, tmp_path / "first", *SHORT, *flags)))
    (run,) = stub.calls
    assert {key: run.options[key] for key in ("project", "name", "tags", "id", "resume")} == {
        "project": "photos", "name": "first", "tags": ["a", "b"], "id": None, "resume": "allow",
    }  # fmt: skip
    assert run.options["config"]["batch_size"] == 8 and run.options["dir"] == str(tmp_path / "first")
    assert without_seconds(run.logged) == records(tmp_path / "first") and len(run.logged) == 2
    assert run.ended == 0
    assert checkpoint.load(tmp_path / "first" / "last.pt")["progress"]["wandb_id"] == "made-for-first"
    train_run(parse(tiny(folder, tmp_path / "second", *SHORT, *flags, "--wandb-name", "n", "--wandb-resume-id", "x")))
    assert {key: stub.calls[1].options[key] for key in ("name", "id", "resume")} == {
        "name": "n", "id": "x", "resume": "must",
    }  # fmt: skip


@pytest.mark.parametrize("shown", [False, True], ids=["killed-before-the-board", "killed-after-it"])
def test_a_resumed_run_goes_on_in_its_wandb_run(
    stub: Stub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: bool
) -> None:
    arguments = tiny(folder, tmp_path, *SHORT, "--epochs", "3", "--log-wandb")

    def save_and_stop(run: Any, progress: Any) -> None:
        save_checkpoint(run, progress)
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("train.loop.save_checkpoint", save_and_stop)
        train_run(parse(arguments))
    assert stub.calls[0].ended == 1, "a run that fails is shown as failed"
    assert list(stub.runs["made-for-" + tmp_path.name]) == [0]
    if shown:
        stub.runs["made-for-" + tmp_path.name][1] = checkpoint.load(tmp_path / "last.pt")["progress"]["history"][1]
    train_run(parse([*arguments, "--resume", "auto"]))
    assert len(stub.runs) == 1 and stub.calls[1].ended == 0
    assert without_seconds(stub.calls[1].logged) == records(tmp_path)


def test_a_board_that_is_asked_for_late_shows_the_whole_run(stub: Stub, folder: Path, tmp_path: Path) -> None:
    train_run(parse(tiny(folder, tmp_path, *SHORT)))
    train_run(parse([*tiny(folder, tmp_path, *SHORT, "--epochs", "3"), "--resume", "auto", "--log-wandb"]))
    assert without_seconds(stub.calls[0].logged) == records(tmp_path) and len(stub.calls[0].logged) == 3


def test_wandb_that_cannot_begin_says_what_to_do(stub: Stub, folder: Path, tmp_path: Path) -> None:
    stub.error = RuntimeError("api_key not configured")
    with pytest.raises(ValueError, match=r"--log-wandb: .*api_key not configured; log in .* WANDB_MODE=offline"):
        train_run(parse(tiny(folder, tmp_path, *SHORT, "--log-wandb")))


@pytest.mark.parametrize(("flag", "package"), [("--log-wandb", "wandb"), ("--tensorboard", "tensorboard")])
def test_a_missing_package_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, package: str
) -> None:
    module = "wandb" if package == "wandb" else "torch.utils.tensorboard"
    for found in (None, ModuleType(module)):  # not there; a folder of that name
        monkeypatch.setitem(sys.modules, module, found)
        with pytest.raises(ValueError, match=rf"{flag} needs the package {package}: pip install 'tokenmix_kernels"):
            train_run(parse(tiny(folder, tmp_path, *SHORT, flag)))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs the extra 'tensorboard'")
def test_tensorboard_has_every_epoch_once(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = tiny(folder, tmp_path, *SHORT, "--tensorboard")
    train_run(parse(arguments))
    train_run(parse([*arguments, "--epochs", "3", "--resume", "auto"]))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = [(event.step, pytest.approx(event.value)) for event in events.Scalars("train_loss")]
    assert [(line["epoch"], line["train_loss"]) for line in records(tmp_path)] == losses


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs the extra 'wandb'")
def test_wandb_itself_offline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    arguments = tiny(folder, tmp_path / "run", *SHORT, "--log-wandb", "--wandb-project", "p")
    train_run(parse(arguments))
    wandb_id = checkpoint.load(tmp_path / "run" / "last.pt")["progress"]["wandb_id"]
    train_run(parse([*arguments, "--epochs", "3", "--resume", "auto"]))
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {file.name for file in files} == {f"run-{wandb_id}.wandb"}
