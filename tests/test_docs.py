"""The documents: the steps of "Add a fusion" run as they stand, every fusion has its page, links lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsv4_fusion import __main__ as cli
from dsv4_fusion.passes import fp8_linear
from dsv4_fusion.passes._manager import COMPUTATIONS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page for page in (DOCS / "fusions").glob("*.md") if not page.name.startswith("_"))
HEADINGS = ["Graph before", "Operator", "When it does not fire"]


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of its code blocks, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_steps_of_add_a_fusion(tmp_path):
    """In a copy of the package: a python block is the file that its first line names, or its end; sh blocks run."""
    shutil.copytree(ROOT / "dsv4_fusion", tmp_path / "dsv4_fusion", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    printed, written = "", []
    for language, code in blocks(DOCS / "add_a_fusion.md"):
        if language == "sh":
            done = subprocess.run(["bash", "-ec", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            printed += done.stdout
            continue
        name, added = re.match(r"# (\S+\.py)(: add)?\n", code).groups()
        file = tmp_path / name
        written.append(name)
        assert file.exists() == bool(added), name
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write("\n" * bool(added) + code.partition("\n")[2])
    assert len(written) == 6
    assert "nothing matched" in printed or "1 gated_silu" in printed
    assert "3 passed" in printed
    (before,) = (tmp_path / "dump").glob("graph_000_*.before.py")
    assert re.findall(r"torch\.ops\.aten\.(\w+)", before.read_text()) == [
        "clamp_max",
        "neg",
        "exp",
        "add",
        "div",
        "mul",
    ]


def test_every_fusion_has_a_page():
    names = {fusion.name for each in (*COMPUTATIONS, *fp8_linear.COMPUTATIONS) for fusion in each.fusions}
    assert {page.stem for page in PAGES} == names
    index = (DOCS / "README.md").read_text()
    assert all(f"(fusions/{name}.md)" in index for name in names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_is_complete_and_its_schema_is_the_operators(page):
    text = page.read_text()
    assert text.startswith(f"# {page.stem}\n")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    schema = str(getattr(torch.ops.dsv4, page.stem).default._schema)
    schema = re.sub(r"(?<==)[\d.]+e-\d+", lambda number: str(float(number[0])), schema)  # 1e-06, not 9.99…e-07
    assert schema in [code.strip() for language, code in blocks(page) if language == "text"]


def test_exit_codes_are_those_of_the_help():
    text = (DOCS / "command_line.md").read_text()
    for codes in (cli.DOCTOR_CODES, cli.EXPLAIN_CODES, cli.WARMUP_CODES):
        for code, meaning in re.findall(r"^ +(\d)  (.*)$", codes, re.MULTILINE):
            assert f"| {code} | {meaning} |" in text


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=str)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / link).exists(), link
