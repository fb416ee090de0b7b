"""The documents: links lead somewhere, every page is in the index, and messages that they quote are really said."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "examples/README.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@cache
def said() -> tuple[str, ...]:
    """Every text in the code of package and examples, with line ends for what is filled in."""
    texts: list[str] = []
    for path in [*(ROOT / "lightning_earlybird").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
                )
    return tuple(texts)


def is_said(quote: str) -> bool:
    parts = [re.escape(part.strip()) for part in quote.split("…") if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(text) for text in said())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem if page in DOCS else page.parent.name)
def test_every_link_to_a_file_or_heading_of_ours_leads_there(page: Path) -> None:
    for target in LINK.findall(without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert path.is_relative_to(ROOT), target
        assert not heading or heading in anchors(path), target


def test_the_index_lists_every_page() -> None:
    listed = set(LINK.findall((ROOT / "docs/README.md").read_text(encoding="utf-8")))
    assert {page.name for page in DOCS} - {"README.md"} <= listed


def test_messages_that_troubleshooting_quotes_are_said() -> None:
    rows = re.findall(r"^\| (.*?) \|", without_code(ROOT / "docs/troubleshooting.md"), re.MULTILINE)
    quotes = [quote for row in rows for quote in re.findall(r"`([^`]+)`", row) if "…" in quote]
    assert len(quotes) > 50
    assert [quote for quote in quotes if not is_said(quote)] == []
    assert not is_said("…there is no such sentence…")
