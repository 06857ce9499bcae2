"""The sdist and the wheel, as a user gets them, and the README that the package index shows."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from tokenmix_kernels import __version__

ROOT = Path(__file__).parents[1]
INSTALLED = """
import importlib.util, torch, tokenmix_kernels
assert importlib.util.find_spec("train") is None and importlib.util.find_spec("bench") is None
images, targets = tokenmix_kernels.TokenMix(num_classes=5)(torch.rand(4, 3, 32, 32), torch.arange(4))
assert targets.shape == (4, 5)
print(tokenmix_kernels.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(unpacked sdist, wheel made from it); the sdist is made from a copy of the files that git knows."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(lambda name: name and (ROOT / name).is_file(), names):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    backend = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
    run(sys.executable, "-c", backend, "build_sdist", folder, cwd=copy)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        # Python before 3.10.12 and 3.11.4 has no filters.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    unpacked = folder / f"tokenmix_kernels-{__version__}"
    run(sys.executable, "-c", backend, "build_wheel", folder, cwd=unpacked)
    return unpacked, next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        name = next(name for name in names if name.endswith("/METADATA"))
        metadata = Parser().parsestr(wheel.read(name).decode())
    assert {name.split("/")[0] for name in names} == {
        "tokenmix_kernels",
        f"tokenmix_kernels-{__version__}.dist-info",
    }
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "tokenmix_kernels").rglob("*.py")}
    assert sources | {"tokenmix_kernels/py.typed"} <= set(names)
    assert any(url.startswith("Homepage, https://") for url in metadata.get_all("Project-URL", []))
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata["Keywords"]


def test_the_sdist_holds_tests_that_run(built: tuple[Path, Path]) -> None:
    unpacked = built[0]
    for name in ("tests/conftest.py", "tests/data/official_targets.npz", "bench/results/cpu.json", "Makefile"):
        assert (unpacked / name).is_file(), name
    said = run(sys.executable, "-m", "pytest", "tests/test_naive.py", "-q", "-p", "no:cacheprovider", cwd=unpacked)
    assert re.search(r"\d+ passed", said)


def test_the_wheel_works_in_a_clean_environment(built: tuple[Path, Path], tmp_path: Path) -> None:
    """Only what it needs is there, through a path file, which does not load an installation for development."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "clean", cwd=tmp_path)
    python = tmp_path / "clean" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[1], cwd=tmp_path)
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    said = run(python, "-c", INSTALLED, cwd=tmp_path)
    assert Path(said.strip()).is_relative_to(site)


def test_the_readme_is_short_and_its_pictures_show_on_the_package_index() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(re.findall(r"\S*\w\S*", text)) <= 900
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures
    for link in pictures:
        prefix = "https://raw.githubusercontent.com/tokenmix-kernels/tokenmix_kernels/main/"
        assert link.startswith(prefix)
        assert (ROOT / link.removeprefix(prefix)).is_file(), link
    for link in re.findall(r"(?<!!)\[[^]]*\]\(([^)]+)\)", text):
        prefix = "https://github.com/tokenmix-kernels/tokenmix_kernels/blob/main/"
        assert link.startswith("https://")
        if link.startswith(prefix):
            assert (ROOT / link.removeprefix(prefix)).is_file(), link


def test_versions_agree() -> None:
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"version: {__version__}" in (ROOT / "CITATION.cff").read_text()
