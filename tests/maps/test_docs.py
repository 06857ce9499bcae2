"""docs/maps.md: its code runs, its commands parse, and its sizes are those of the format."""

import re
import shlex
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="needs the extra 'maps'")

from tokenmix_kernels.maps import MapBank, __main__, bank_size

TEXT = (Path(__file__).parents[2] / "docs" / "maps.md").read_text()


def test_the_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(code, names)
    assert names["found"].shape == (2, 4, 4) and names["maps"].shape == (2, 2, 2)
    assert len(MapBank.open(tmp_path / "small.bank")) == 3


def test_the_commands_parse(monkeypatch):
    seen = []
    for module in (__main__.build, __main__.convert, __main__.inspect):
        monkeypatch.setattr(module, "run", seen.append)
    lines = re.findall(r"tokenmix_kernels\.maps (.+)", "".join(re.findall(r"```sh\n(.*?)```", TEXT, re.S)))
    for line in lines:
        assert __main__.main(shlex.split(line)) == 0
    assert [args.command for args in seen] == ["build", "build", "convert", "inspect"]


def test_the_sizes_are_those_of_the_format():
    rows = re.findall(r"^\| ([\d,]+) .*\| (\d+)x(\d+) \| ([\d,]+) \|$", TEXT, re.M)
    assert len(rows) == 3
    for count, h, w, size in rows:
        assert bank_size(int(count.replace(",", "")), (int(h), int(w))) == int(size.replace(",", ""))
