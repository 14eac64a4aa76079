"""The tool that compares two checkouts, on the CPU's references."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "compare.py"


def compare(checkout: Path, *operators: str) -> subprocess.CompletedProcess:
    command = [sys.executable, TOOL, checkout, *operators, "--small"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def change(folder: Path, file: str, old: str, new: str) -> None:
    """A copy of the package in ``folder``, with a change."""
    shutil.copytree(ROOT / "dsv4_fusion", folder / "dsv4_fusion", ignore=shutil.ignore_patterns("__pycache__"))
    source = folder / "dsv4_fusion" / file
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))


def test_a_checkout_equals_itself():
    done = compare(ROOT, "pages", "compressor")
    assert done.returncode == 0, done.stderr
    *rows, last = done.stdout.splitlines()
    assert last == f"{len(rows)} cases, 0 not the same"
    assert {row.split()[0] for row in rows} == {"pages", "compressor"}


def test_other_numbers_are_seen(tmp_path):
    """A checkout whose codes reach up to another number differs, and its layers alone."""
    change(tmp_path, "ops/fp8_linear.py", ".clamp(-FP8_MAX, FP8_MAX)", ".clamp(-300.0, 300.0)")
    done = compare(tmp_path, "linear", "streams")
    assert done.returncode == 1, done.stderr
    says = {row.split()[0]: row.split()[-1] for row in done.stdout.splitlines()[:-1]}
    assert says == {"linear": "DIFFERENT", "streams": "same"}


def test_what_fails_is_not_the_same(tmp_path):
    change(tmp_path, "ops/__init__.py", "__all__ = [", "raise RuntimeError\n__all__ = [")
    done = compare(tmp_path, "linear")
    assert done.returncode == 1 and f"{tmp_path}: ended with 1 after 0 cases" in done.stderr
    assert "MISSING there" in done.stdout


def test_what_is_no_checkout_is_refused(tmp_path):
    done = compare(tmp_path)
    assert done.returncode == 2 and "is no checkout of this project: it has no dsv4_fusion/__init__.py" in done.stderr
