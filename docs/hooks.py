"""What the site does with plain Markdown: formulas become MathML, which needs no script, and pages of the repository
that the docs link to, such as results, become pages of the site."""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
#: Files outside of docs/ that become part of the site.
SHARED = (
    "benchmarks/results/*.*",
    "examples/*.*",
    "examples/space/*.*",
    "model_cards/*/*.*",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
)


def on_files(files, config):
    for path in (path for pattern in SHARED for path in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """In the site docs/ and the root of the repository are one folder."""
    depth = page.file.src_uri.count("/")
    if (ROOT / "docs" / page.file.src_uri).is_file():
        return re.sub(rf"\]\((?:\.\./){{{depth + 1}}}", "](" + "../" * depth, markdown)
    return markdown.replace("](" + "../" * depth + "docs/", "](" + "../" * depth)


def on_page_content(content, **_):
    def mathml(match):
        return convert(html.unescape(match[3]), display="block" if match[1] == "div" else "inline")

    return re.sub(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', mathml, content, flags=re.DOTALL)
