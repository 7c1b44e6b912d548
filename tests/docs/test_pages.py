"""The docs say what the code says: tables in sync, every flag there, every link alive."""

import re
import runpy
from types import SimpleNamespace

import pytest
import yaml

from helpers import ROOT, pages

generate = SimpleNamespace(**runpy.run_path(str(pages.DOCS / "generate.py")))


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_tables_are_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert generate.fill(text) == text, "run `python docs/generate.py`"


def test_every_flag_is_in_a_table():
    shown = {flag for page in pages.PAGES for flag in re.findall(r"^\| `(\w+)` \|", page.read_text(), re.MULTILINE)}
    known = {f.name for name in generate.argument_classes() for f in generate.flags_of(name)}
    assert len(known) > 60 and known <= shown, known - shown


def test_a_stale_table_is_noticed():
    stale = "<!-- flags: ire -->\n| `ire_kappa` | `1.0` | old |\n<!-- /flags -->\nthe rest"
    filled = generate.fill(stale)
    assert "| `ire_kappa` | `0.0` | kappa: " in filled and "old" not in filled and filled.endswith("\nthe rest")


def test_every_grid_and_its_scales_are_listed():
    listed = (pages.DOCS / "guides" / "comparing.md").read_text(encoding="utf-8")
    grids = [path for path in ROOT.glob("**/grids/*.yaml") if "build" not in path.parts]
    assert len(grids) > 10
    for path in grids:
        scales = ", ".join(f"`{scale}`" for scale in yaml.safe_load(path.read_text(encoding="utf-8"))["scales"])
        assert re.search(rf"\| `{path.stem}` \| .* \| {scales} \|", listed), (path.stem, scales)


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for target in pages.links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in pages.anchors(file)):
            dead.append(target)
    assert not dead


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = set(re.findall(r"[\w/]+\.md", navigation))
    assert listed == {page.relative_to(pages.DOCS).as_posix() for page in pages.DOCS.rglob("*.md")}
