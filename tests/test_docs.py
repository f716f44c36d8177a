"""Every Python block of the documentation runs, page by page, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from memrewrite.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)?(?:#([^)\s]+))?\)")
TYPED = re.compile(r"^python -m memrewrite (.*?)(?:\s+#.*)?$", re.M)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.inductor
@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_snippets_run(page: Path) -> None:
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
        if "memrewrite.compile(model, velora=True, galore_rank=128)  # the same" in block:
            continue  # the line at the top of the README: there is no model yet
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "docs/results").glob("*.md")], ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    for target, place in LINK.findall(page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), target
        if place and path.suffix == ".md":
            assert f'<a id="{place}"></a>' in path.read_text(), (target, place)


def test_commands_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    words = {line.split()[0] for page in PAGES for line in TYPED.findall(page.read_text())}
    assert words >= {"estimate", "bench", "dump"}
    for word in words:
        with pytest.raises(SystemExit) as done:
            main([word, "--help"])
        assert done.value.code == 0
