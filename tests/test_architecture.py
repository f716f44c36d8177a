"""The arrows between the rooms, the seams to private torch, and the size of a room and a file."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles

import pytest
from places import ROOT

from memrewrite.methods.request import deciding_files

PRIVATE = ("torch._dynamo", "torch._functorch", "torch._inductor")
COMMON = {"errors", "version"}  # what any room may import

# Every arrow between rooms, from top to bottom: a room may import those named, and no other.
ARROWS = {
    "__main__": {"cli"},
    "cli": {"bench", "inspect", "memrewrite", "predict", "sites"},
    "bench": {"compiler", "gradients", "memrewrite", "predict", "session", "sites"},
    "memrewrite": {"api", "gradients", "inspect", "methods", "moments", "predict", "sites"},
    "api": {"compiler", "inspect", "methods", "moments", "optim", "parallel", "session", "sites"},
    "inspect": {
        *("compiler", "gradients", "methods", "moments", "optim", "parallel", "passes"),
        *("record", "session", "sites"),
    },
    "predict": {
        *("compiler", "gradients", "methods", "moments", "parallel", "record", "session"),
        "sites",
    },
    "optim": {"gradients", "loss", "methods", "moments", "session", "sites"},
    "moments": {"compiler", "gradients", "passes", "record", "session", "sites"},
    "session": {
        *("compiler", "gradients", "loss", "methods", "parallel", "passes", "record", "sites"),
    },
    "loss": {"passes"},
    "compiler": {"calibration", "gradients", "methods", "passes", "record", "sites"},
    "methods": {"calibration", "gradients", "passes", "sites"},
    "parallel": {"gradients", "sites"},
    "calibration": {"passes"},
    "gradients": {"passes"},
    "record": {"passes"},
    "sites": set(),
    "passes": set(),
    "errors": set(),
    "version": set(),
}
INSIDE = {  # the same for the rooms within rooms
    "passes.joint": {"passes", "passes.split"},
    "passes.split": {"passes", "passes.joint"},
    "passes.update": {"passes"},
    "passes": set(),
    "bench.run": {"bench", "bench.show", "bench.tasks"},
    "bench.show": {"bench"},
    "bench.tasks": set(),
    "bench": {"bench.run", "bench.show", "bench.tasks"},
}


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


def room_of(module: str) -> str:
    """Of a dotted name: "memrewrite" itself, a file or a folder in it, or "passes"."""
    first, *rest = module.split(".")
    if first == "passes" or not rest:
        return first
    inside = ROOT / "memrewrite" / rest[0]
    return rest[0] if inside.is_dir() or inside.with_suffix(".py").exists() else first


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def arrows() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in sources("memrewrite", "passes"):
        room = room_of(module_of(path))
        ours = (n for n in imports(path) if n.split(".")[0] in ("memrewrite", "passes"))
        found.setdefault(room, set()).update(room_of(name) for name in ours)
    return {room: others - {room} - COMMON for room, others in found.items()}


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    below: dict[str, set[str]] = {}

    def descend(room: str, above: tuple[str, ...]) -> set[str]:
        assert room not in above, (*above, room)
        if room not in below:
            reached = [descend(other, (*above, room)) for other in graph.get(room, ())]
            below[room] = graph.get(room, set()).union(*reached)
        return below[room]

    for room in graph:
        descend(room, ())


def test_every_arrow_between_rooms_is_one_of_the_layout() -> None:
    found = arrows()
    assert found == {room: ARROWS[room] for room in found}
    assert set(found) == set(ARROWS)
    assert_no_circle(ARROWS)


def test_a_circle_would_be_seen() -> None:
    with pytest.raises(AssertionError, match="not in"):
        assert_no_circle({**ARROWS, "passes": {"record"}})


def test_files_import_each_other_in_no_circle() -> None:
    files = {module_of(path): path for path in sources("memrewrite", "passes")}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        named = imports(path)
        found = {n if n in files else n.rpartition(".")[0] for n in named}
        graph[module] = {n for n in found if n in files and n not in ("memrewrite", module)}
    assert_no_circle(graph)


def test_the_passes_import_only_torch_and_themselves() -> None:
    allowed = {"torch", "passes", *sys.stdlib_module_names}
    for path in sources("passes"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


@pytest.mark.parametrize("room", INSIDE)
def test_arrows_between_rooms_within_a_room(room: str) -> None:
    outer = room.split(".")[0]
    root = "" if outer == "passes" else "memrewrite."
    folder = ROOT / (root + room).replace(".", "/")
    for path in folder.glob("*.py"):
        for name in imports(path):
            if name.startswith(f"{root}{outer}"):
                inner = ".".join(name.removeprefix(root).split(".")[:2])
                other = inner if inner in INSIDE else outer
                assert other in {room, *INSIDE[room]}, (path, name)


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
    sizes = {path: len(path.read_text().splitlines()) for path in sources("memrewrite", "passes")}
    assert max(sizes.values()) <= 350, sizes
    assert median(size for size in sizes.values() if size) <= 150


def test_functions_are_short() -> None:
    lengths = [
        node.end_lineno - node.lineno + 1
        for path in sources("memrewrite", "passes")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert quantiles(lengths, n=10)[-1] <= 20


def test_no_room_has_more_than_ten_files() -> None:
    folders = [ROOT / "passes", ROOT / "memrewrite"]
    folders += [p for f in list(folders) for p in f.rglob("*") if p.is_dir()]
    sizes = {folder: len(list(folder.glob("*.py"))) for folder in folders}
    assert max(sizes.values()) <= 10, sizes


def test_the_cache_key_knows_every_file_that_decides_a_graph() -> None:
    """All that `compiler.backend` and the methods import, however deep."""
    files = {module_of(path): path for path in sources("memrewrite", "passes")}
    known = set(deciding_files())
    left, seen = (
        ["memrewrite.compiler.backend", "memrewrite.methods", "memrewrite.session.graph"],
        set(),
    )
    while left:
        module = left.pop()
        if module in seen or module not in files or module == "memrewrite":
            continue
        seen.add(module)
        named = imports(files[module])
        left += [*named, *(name.rpartition(".")[0] for name in named)]
    undecided = {module for module in seen if module.startswith("memrewrite.parallel")}
    undecided |= {"memrewrite.errors"}  # a request says what these rooms ask for
    assert {files[module] for module in seen - undecided} <= known
    assert len(seen) > 40


@pytest.mark.slow
def test_importing_loads_no_code_generator_and_no_cuda() -> None:
    code = (
        "import sys, memrewrite, torch;"
        "assert not torch.cuda.is_initialized();"
        "assert 'torch._inductor.compile_fx' not in sys.modules;"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_room_has_its_tests() -> None:
    """A folder of tests for each room, and every test in one of them or of the whole."""
    tests = ROOT / "tests"
    rooms = {p.parent.relative_to(ROOT / "memrewrite") for p in sources("memrewrite")}
    rooms |= {p.parent.relative_to(ROOT) for p in sources("passes")}
    tested = {path.parent.relative_to(tests) for path in tests.rglob("test_*.py")}
    assert tested == rooms - {Path("passes")}, rooms ^ tested
