"""Which lines only a GPU reaches, and which of them the rehearsal does not run.

    coverage run --source=tokenmix_kernels,train,bench -m pytest tests/rehearsal
    coverage json -o coverage.json
    python tests/rehearsal/gpu_lines.py coverage.json

A line counts where it is in a branch that a test for CUDA opens, or in a function that is called for a GPU alone
(`FUNCTIONS`). The language of Triton, which the host never runs, does not count.
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("tokenmix_kernels", "train", "bench")
FUNCTIONS = {
    "tokenmix_kernels/kernels/launch.py": {"run", "card_of", "device_table", "prepare", "mix", "token_mask",
                                           "pool_targets", "fixed_part", "normalisation", "address_alignment"},
    "tokenmix_kernels/kernels/attention.py": {"attention_targets", "attention_arguments"},
    "tokenmix_kernels/tables.py": {"device_table"},
    "tokenmix_kernels/call.py": {"form_of"},
    "bench/gpu.py": {"real_clock", "peak", "main", "cold", "kernel", "host", "name_of"},
    "bench/model.py": {"warm_clock", "compare", "variants", "warm"},
    "bench/sweep.py": {"sweep", "candidates"},
}  # fmt: skip
ABSENT = (
    "not images.is_cuda", "not maps.is_cuda", "not labels.is_cuda", "not self.cuda", "!= 'cuda'",
    "not torch.cuda.is_available()", "not in ('cpu', 'cuda",
)  # fmt: skip
WORDS = ("cuda", "is_cuda", "at_once")


def names_gpu(test: ast.expr) -> bool:
    """Whether a condition asks for a GPU."""
    text = ast.unparse(test)
    return any(word in text for word in WORDS)


def holds_on_gpu(test: ast.expr) -> bool:
    """Whether a condition that asks for a GPU holds where there is one."""
    text = ast.unparse(test)
    return not any(sign in text for sign in ABSENT)


def lines_of(nodes: list[ast.stmt]) -> Iterator[int]:
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.stmt):
                yield inner.lineno


def gpu_lines(path: Path) -> set[int]:
    """First lines of the statements that only a GPU reaches."""
    name = path.relative_to(ROOT).as_posix()
    found: set[int] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS.get(name, ()):
            found.update(lines_of(node.body))
        if isinstance(node, ast.If) and names_gpu(node.test):
            found.update(lines_of(node.body if holds_on_gpu(node.test) else node.orelse))
        # A value that is another one on a GPU.
        if isinstance(node, ast.stmt) and not isinstance(node, (ast.If, ast.FunctionDef, ast.ClassDef)):
            parts = [part for part in ast.walk(node) if isinstance(part, ast.IfExp) and names_gpu(part.test)]
            if parts and not any(isinstance(part, ast.stmt) for part in ast.iter_child_nodes(node)):
                found.add(node.lineno)
    return found


def main(report: Path) -> None:
    files = json.loads(report.read_text())["files"]
    total = covered = 0
    missing: list[str] = []
    for path in sorted(one for folder in FOLDERS for one in (ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name not in files:
            continue
        run, absent = set(files[name]["executed_lines"]), set(files[name]["missing_lines"])
        lines = gpu_lines(path) & (run | absent)
        total, covered = total + len(lines), covered + len(lines & run)
        text = path.read_text().splitlines()
        missing += [f"{name}:{line}: {text[line - 1].strip()}" for line in sorted(lines - run)]
    print(f"{covered} of {total} lines that only a GPU reaches were run ({covered / total:.1%}); not run:")
    print("\n".join(missing))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
