"""The arrows between the rooms, the one seam to private torch, and the size of a file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRIVATE = ("torch._dynamo", "torch._functorch", "torch._inductor")


def sources(*rooms: str) -> list[Path]:
    found = {room: sorted((ROOT / room).rglob("*.py")) for room in rooms}
    assert all(found.values()), found
    return [path for paths in found.values() for path in paths]


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_passes_import_only_torch_and_themselves() -> None:
    allowed = {"torch", "passes", *sys.stdlib_module_names}
    for path in sources("passes"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_pass_files_do_not_know_the_order() -> None:
    order = {"velora", "fold", "lower"}
    for path in sources("passes"):
        known = {name.split(".")[-2] for name in imports(path) if name.startswith("passes.")}
        assert not known & order, path


@pytest.mark.parametrize("path", sources("memrewrite", "passes", "examples"), ids=lambda p: p.stem)
def test_private_torch_stands_behind_two_files(path: Path) -> None:
    used = [name for name in PRIVATE if name in path.read_text()]
    used += [name for name in imports(path) if name.startswith(PRIVATE)]  # from torch import _x
    assert bool(used) is (path.name in ("backend.py", "skipping.py")), (path, used)


def test_no_file_outgrows_one_idea() -> None:
    sizes = {
        path.name: len(path.read_text().splitlines()) for path in sources("memrewrite", "passes")
    }
    assert max(sizes.values()) <= 350, sizes


def test_importing_loads_no_code_generator_and_no_cuda() -> None:
    code = (
        "import sys, memrewrite, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert 'torch._inductor.compile_fx' not in sys.modules;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
