"""The house itself: floors, package list, presets in the wheel, and words that may not appear."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import miram

ROOT = Path(miram.__file__).parent
FLOORS = {"engine": 0, "data": 1, "pretrain": 2, "finetune": 3, "demo": 4, "paper": 4, "__main__": 5}
SOURCES = [
    p
    for name in ("", "engine", "data", "pretrain", "finetune", "paper")
    for p in (ROOT / name).glob("*.py" if not name else "**/*.py")
]


def imported(path: Path) -> Iterator[str]:
    """First part below `miram` of every relative import in a file."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            parts = (*base, *(node.module or "").split("."))
            yield next(part for part in (*parts, *(alias.name for alias in node.names)) if part)


def test_imports_only_point_down() -> None:
    for path in SOURCES:
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        floor = FLOORS.get(here)
        for target in imported(path):
            if floor is not None and target in FLOORS and target != here and here != "__init__":
                assert FLOORS[target] < floor, f"{path.relative_to(ROOT)} imports {target}"


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"miram"} | {
        "miram." + ".".join(p.parent.relative_to(ROOT).parts)
        for p in SOURCES
        if p.name == "__init__.py" and p.parent != ROOT
    }
    assert listed == found


def test_nothing_that_runs_code_from_a_file() -> None:
    forbidden = re.compile(
        r"\bpickle\b|torch\.load\((?!.*weights_only=True\))|(?<!\.)\beval\(|(?<!\.)\bexec\(|extractall\(|shell=True|os\.system\("
    )
    for path in SOURCES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("#")[0]
            if not code.lstrip().startswith(('"""', "Not used", "`save_state`")):
                assert not forbidden.search(code) or "and writes pickles" in code, f"{path.name}:{number}: {line}"


def test_one_place_reads_tensors_of_others() -> None:
    assert [p.name for p in SOURCES for line in p.read_text().splitlines() if "torch.load(" in line] == ["foreign.py"]


def test_functions_and_files_stay_readable() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 350, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path.name}: {node.name}"


@pytest.mark.parametrize("package", ["engine", "data", "pretrain", "finetune"])
def test_a_package_imported_under_a_second_name_says_how_to_start(package: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True, cwd=ROOT)
    assert f"import `miram.{package}`" in done.stderr.splitlines()[-1]


def test_help_needs_no_torch() -> None:
    code = "import sys, miram.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_the_wheel_holds_presets_and_template(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True)
    shutil.rmtree(ROOT / "build")  # pip leaves it, and mypy would read it
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for preset in (ROOT / "configs").glob("*/*.yaml"):
        assert f"miram/{preset.relative_to(ROOT)}" in names
    assert {"miram/engine/report.html", "miram/py.typed", "miram/data/sources/mias.py"} <= names
