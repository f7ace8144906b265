"""Imports run in one direction only: manifests, generation, detectors, training, workflows."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["manifests", "generation", "detectors", "training", "workflows"]


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; name the package"
            names.add((node.module or "").partition(".")[0])
    return names & {*ORDER, "tests"}


@pytest.mark.parametrize("package", ORDER)
def test_a_package_imports_only_those_before_it(package):
    allowed = set(ORDER[: ORDER.index(package) + 1])
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): imported_packages(file) - allowed for file in files}
    assert not {name: packages for name, packages in wrong.items() if packages}


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from workflows.cli import app; "
        "print([m for m in ('torch', 'numpy', 'distributed', 'pyarrow', 'cv2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick_and_names_every_command():
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", "from workflows.cli import main; main()", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert time.perf_counter() - started < 5  # the target is 0.5 s; this only catches a heavy import
    for command in ("inspect", "run", "plan", "generate", "train", "evaluate", "feedback", "verify", "show"):
        assert command in done.stdout
