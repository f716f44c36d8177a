"""Every Python block of the documentation runs, page by page, and links lead somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from memrewrite.bench import sets
from memrewrite.cli import main
from memrewrite.predict import models

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)#\s]+)?(?:#([^)\s]+))?\)")
MEASURED = re.compile(r"\[([^\]]*\d[^\]]*)\]\([^)\s]*results/README\.md#([^)\s]+)\)")
NUMBER = re.compile(r"\d[\d.]*")
ROW = re.compile(r'\| <a id="([^"]+)"></a>')
# At the start of a line of a shell block, or in backticks within a sentence.
TYPED = re.compile(
    r"(?:^python -m |`python -m |`)memrewrite ([a-z][^`\n]*?)(?:\s+#.*)?(?:`|$)", re.M
)


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.inductor
@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_snippets_run(page: Path) -> None:
    names: dict[str, object] = {}
    for block in BLOCK.findall(page.read_text()):
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


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_numbers_that_lead_to_a_row_of_the_results_are_in_it(page: Path) -> None:
    results = (ROOT / "docs/results/README.md").read_text().splitlines()
    rows = {found[1]: line for line in results if (found := ROW.match(line))}
    for text, place in MEASURED.findall(page.read_text()):
        if place in rows:
            known = {"1", *NUMBER.findall(rows[place])}
            assert set(NUMBER.findall(text)) <= known, (text, place)


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_files_of_tests_that_are_named_exist(page: Path) -> None:
    known = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"\btest_\w+\.py", page.read_text())) <= known


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_every_block_and_link_of_a_page_is_found(page: Path) -> None:
    """So that the tests above cannot pass by looking past some."""
    text = page.read_text()
    assert len(BLOCK.findall(text)) == text.count("```python")
    prose = re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.M | re.S)
    assert len(LINK.findall(prose)) == prose.count("](")


class Parsed(Exception):
    """A request that its own parser has accepted; nothing is done about it."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given)
        self.given = given


COMMANDS = [(shown(page), line) for page in PAGES for line in TYPED.findall(page.read_text())]


def test_commands_are_found() -> None:
    words = [line.split()[0] for _, line in COMMANDS]
    assert set(words) >= {"estimate", "report", "bench", "dump"}
    typed = sum(page.read_text().count("python -m memrewrite") for page in PAGES)
    assert len(COMMANDS) >= typed >= 10


@pytest.mark.parametrize("line", sorted({line for _, line in COMMANDS}))
def test_a_command_is_accepted_with_every_flag(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parse: Any = argparse.ArgumentParser.parse_args

    def parsed(self: Any, *args: Any) -> None:
        raise Parsed(parse(self, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed) as done:  # an unknown flag is a SystemExit
        main(shlex.split(line))
    given = vars(done.value.given)
    model = given.get("model") or ""
    assert model in ("", *models.NAMES) or re.fullmatch(r"\w+:\w+|\w+\.py", model)
    assert sets.chosen(given.get("configurations", "quick"))
    assert models.parse_bytes(given.get("fit") or "1GB") > 0
