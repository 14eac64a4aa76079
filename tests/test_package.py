"""What an installation promises: the entry point, the type marker, a light import; and what no file may hold."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import dsv4_fusion

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> str:
    """What a fresh interpreter prints, started away from the source tree."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.prefix))
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_entry_point_is_found_without_an_import():
    code = (
        "import sys, torch._dynamo\n"
        "print('dsv4_fusion' in torch._dynamo.list_backends(), any(m.startswith('dsv4_fusion') for m in sys.modules))"
    )
    assert run(code) == "True False"


def test_entry_point_loads():
    (entry,) = metadata.entry_points(group="torch_dynamo_backends", name="dsv4_fusion")
    assert callable(entry.load())


def test_version_is_one():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(\d.*?)\]", changelog, re.MULTILINE)[0] == project()["version"]
    assert metadata.version("dsv4_fusion") == dsv4_fusion.__version__ == project()["version"]


def test_types_are_announced():
    assert (Path(dsv4_fusion.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("module", ["dsv4_fusion", "dsv4_fusion.ops"])
def test_import_is_light(module):
    code = (
        f"import sys, torch\nbefore = set(sys.modules)\nimport {module}\n"
        "heavy = ('triton', 'tilelang', 'cutlass', 'transformers', 'torch._inductor')\n"
        "print(*[m for m in sys.modules if m not in before and m.startswith(heavy)])"
    )
    assert run(code) == ""


def test_no_path_of_one_machine_in_the_repository():
    found = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if found.returncode:
        pytest.skip("not a git checkout")
    foreign = re.compile(r"(?<![\w.~}])/(?:work|tmp|root|opt|home)/")
    hits = []
    for name in filter(None, found.stdout.split("\0")):
        path = ROOT / name
        if path.suffix != ".png" and path.is_file():
            hits += [
                f"{name}:{number}: {line.strip()}"
                for number, line in enumerate(path.read_text().splitlines(), 1)
                if foreign.search(line)
            ]
    assert not hits, "\n".join(hits)
