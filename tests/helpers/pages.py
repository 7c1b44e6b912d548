"""The README and the docs: their code blocks, links and headings."""

import re
from pathlib import Path
from typing import NamedTuple

from helpers import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


class Block(NamedTuple):
    """A block of code. `comment` is the HTML comment in the line above it."""

    page: Path
    line: int
    language: str
    code: str
    comment: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"(?:^<!-- ([^\n]*) -->\n)?^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(page, text[: m.start(2)].count("\n"), language, m[2], m[1] or "") for m in found]


def links(page: Path) -> list[str]:
    """Targets of links and pictures, those on the web excluded."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", target)]


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
