"""A result file is stale where the code that it measured has changed, and not where a comment has."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import host, machine, stale
from bench.__main__ import main as bench
from bench.baselines import IMPLEMENTATIONS
from bench.cases import CASES, SIMULATED, make_inputs
from bench.fingerprint import MEASURED, ROOT, fingerprint, sources_in
from bench.ptx import simulate

SOURCES = sources_in(ROOT)
DRAW, REFERENCE = "tokenmix_kernels/kernels/draw.py", "tokenmix_kernels/reference/draw.py"
COUNTED = {"counts", "growth_counts", "simulated", "gpu"}


def stale_kinds(path: str, source: str) -> set[str]:
    """Kinds whose fingerprint is another with another text of a file; that file must be all that differs."""
    after = {**SOURCES, path: source}
    changed = {kind: stale.changes(fingerprint(kind, SOURCES), fingerprint(kind, after)) for kind in MEASURED}
    assert all(paths in ([], [path]) for paths in changed.values())
    return {kind for kind, paths in changed.items() if paths}


def test_a_changed_number_of_a_kernel_is_noticed_by_what_compiles_it() -> None:
    assert "sample >> 32" in SOURCES[DRAW]
    assert stale_kinds(DRAW, SOURCES[DRAW].replace("sample >> 32", "sample >> 31")) == COUNTED


def test_a_changed_step_of_the_reference_is_noticed_by_what_a_cpu_runs() -> None:
    changed = stale_kinds(REFERENCE, SOURCES[REFERENCE] + "\nmore = 1\n")
    assert changed == {"cpu", "growth", "pipeline", "fidelity", "evidence-cost", "mixers"}


def test_comments_docstrings_and_layout_are_no_change() -> None:
    source = re.sub(r'"""(\w)', r'"""Other words. \1', SOURCES[DRAW]).replace("\n\n\n", "\n\n\n\n# a comment\n\n")
    assert source != SOURCES[DRAW]
    assert stale_kinds(DRAW, source) == set()


def test_what_a_kernel_imports_anew_belongs_to_it() -> None:
    new = "tokenmix_kernels/kernels/new.py"
    after = {**SOURCES, DRAW: SOURCES[DRAW] + "\nfrom .new import one\n", new: "one = 1\n"}
    assert stale.changes(fingerprint("counts", SOURCES), fingerprint("counts", after)) == [DRAW, new]
    assert new not in fingerprint("counts", {**SOURCES, new: "one = 1\n"})  # nothing imports it


def files_run(call: Callable[[], Any]) -> set[str]:
    """Files of the package with a function that runs during a call."""
    found = set()

    def note(frame: Any, event: str, _: Any) -> None:
        if frame.f_code.co_name != "<module>":
            found.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    package = ROOT / "tokenmix_kernels"
    return {Path(name).relative_to(ROOT).as_posix() for name in found if name.startswith(str(package))}


def test_all_that_runs_is_in_the_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = [one for one in IMPLEMENTATIONS if one.name.startswith("ours") and "compiled" not in one.name]
    calls = [one.build(CASES["tiny"], make_inputs(CASES["tiny"])).call for one in eager]
    on_cpu = files_run(lambda: [call() for call in calls])
    assert REFERENCE in on_cpu
    assert on_cpu <= fingerprint("cpu", SOURCES).keys()
    on_host = set()

    def note(calls: dict[str, Callable[[], Any]], *_: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()  # compiles
            on_host.update(files_run(call))
        return {name: [1.0] for name in calls}

    monkeypatch.setattr(host, "in_turn", note)
    host.measure()
    assert "tokenmix_kernels/kernels/ready.py" in on_host
    assert on_host <= fingerprint("host", SOURCES).keys()


def test_a_written_file_has_the_fingerprint_of_its_kind(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    machine.write_json(path, {"kind": "host", "rows": []})
    first = json.loads(path.read_text())
    assert first["measured"]["sources"] == fingerprint("host", SOURCES)
    first["measured"]["day"] = "2001-02-03"
    path.write_text(json.dumps(first))
    machine.write_json(path, {"kind": "host", "rows": [1]}, anew=False)
    assert json.loads(path.read_text()) == {**first, "rows": [1]}, "rows of an earlier run keep its fingerprint"


def test_rows_that_a_run_did_not_look_at_keep_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(case: Any, card: str, names: list[str]) -> list[dict[str, Any]]:
        return [{"case": name, "card": card} for name in names]

    monkeypatch.setattr(simulate, "load_simulator", lambda folder: None)
    monkeypatch.setattr(simulate, "Baselines", lambda *_: None)
    monkeypatch.setattr(simulate, "simulate_case", lambda _, __, case, card, names, *more: row(case, card, names))
    monkeypatch.setattr(simulate, "line", lambda *_: "")
    path = tmp_path / "simulated.json"
    given = ["simulate", "--ptxsim", "none", "--out", str(path)]
    bench(given)
    whole = json.loads(path.read_text())
    assert whole["measured"]["sources"] == fingerprint("simulated", SOURCES)
    for before, after in (({**whole["measured"], "day": "2001-02-03"},) * 2, (None, None)):
        path.write_text(json.dumps({**whole, "measured": before}))
        bench([*given, "--cases", "fp32"])
        assert json.loads(path.read_text())["measured"] == after
    bench(given)
    assert json.loads(path.read_text())["measured"] == whole["measured"]


def test_simulated_rows_are_told_apart_by_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "simulated.json"
    rows = [
        {"case": name, "card": card, "code": f"{case.name} {card}"}
        for case in SIMULATED.values() for card in simulate.CARDS for name in simulate.rows_of(case)
    ]  # fmt: skip
    rows[3]["code"] = "other"
    path.write_text(json.dumps({"kind": "simulated", "rows": rows[:-1]}))
    monkeypatch.setattr(simulate, "load_simulator", lambda folder: SimpleNamespace())
    monkeypatch.setattr(simulate, "Baselines", lambda *_: None)
    monkeypatch.setattr(simulate, "compiled_case", lambda _, case, card: (case, card))
    monkeypatch.setattr(simulate, "code_of", lambda _, card, case, __: f"{case.name} {card}")
    named = [f"{rows[n]['case']} on {rows[n]['card']}" for n in (3, -1)]
    assert sorted(simulate.changed_rows(Path("none"), path)) == sorted(named)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project's sources with two result files without a fingerprint, committed."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for path, source in SOURCES.items():
        if path.endswith(".py"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
    for kind in ("counts", "study"):
        file = tmp_path / "bench" / "results" / f"{kind}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"kind": kind, "command": f"python -m bench {kind}"}))
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "Results"]):
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(stale, "ROOT", tmp_path)
    return tmp_path


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What the command says of each file, and the line below it."""
    code = 0
    try:
        bench(["stale"])
    except SystemExit as error:
        code = bool(error.code)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {Path(words[0]).stem: words[1] for words in lines if words[0] != "changed:"}
    assert code == ("stale" in found.values())
    return found | {"changed": " ".join(word for words in lines if words[0] == "changed:" for word in words[1:])}


def test_a_file_without_a_fingerprint_is_as_old_as_its_commit(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert states(capsys) == {"counts": "current", "study": "unknown", "changed": ""}
    (project / DRAW).write_text(SOURCES[DRAW] + "# a comment\n")
    assert states(capsys)["counts"] == "current"
    (project / DRAW).write_text(SOURCES[DRAW] + "more = 1\n")
    assert states(capsys) == {"counts": "stale", "study": "unknown", "changed": "tokenmix_kernels/kernels/ draw.py"}
    counts = project / "bench" / "results" / "counts.json"
    before = counts.read_text()
    counts.write_text(before + "\n")
    assert states(capsys)["counts"] == "unknown", "it is not what was committed"
    counts.write_text(before)
    (project / ".git" / "shallow").write_bytes((project / ".git" / "refs" / "heads" / branch(project)).read_bytes())
    assert states(capsys)["counts"] == "unknown", "a shallow clone has no history"
    shutil.rmtree(project / ".git")
    assert states(capsys)["counts"] == "unknown", "no git"


def branch(project: Path) -> str:
    return (project / ".git" / "HEAD").read_text().split("refs/heads/")[1].strip()


def test_a_recorded_fingerprint_needs_no_git(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / ".git")
    file = project / "bench" / "results" / "counts.json"
    machine.write_json(file, json.loads(file.read_text()))
    capsys.readouterr()
    assert states(capsys)["counts"] == "current"
    (project / "tokenmix_kernels" / "tables.py").unlink()
    assert states(capsys) == {"counts": "stale", "study": "unknown", "changed": "tokenmix_kernels/ tables.py"}
    machine.write_json(file, json.loads(file.read_text()) | {"measured": None})
    capsys.readouterr()
    assert states(capsys)["counts"] == "unknown", "rows of several runs"


def test_every_committed_result_file_is_of_a_known_kind() -> None:
    kinds = {json.loads(path.read_text())["kind"] for path in ROOT.glob("*/results/*.json")}
    assert kinds - {"study"} <= MEASURED.keys()
    for kind, (entry, without, _) in MEASURED.items():
        assert entry in fingerprint(kind, SOURCES)
        for name in without:
            assert any(path.startswith(name) for path in SOURCES), f"{name} of {kind} is no longer there"
