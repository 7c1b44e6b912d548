"""Markdown tables of the methods for the docs, generated from the registries."""

import re
from collections.abc import Mapping
from typing import Any

from ..optim import IRE, OPTIMIZERS
from ..optim.ascents import ASCENTS
from ..optim.gr_warmup import GR_WARMUPS
from ..optim.radius_rules import RADIUS_RULES
from ..optim.second_passes import SECOND_PASSES


def methods_tables() -> dict[str, str]:
    """Heading -> table, for GR warmups, ascents, radius rules, optimizers, and optimizer wrappers."""
    tables: dict[str, Mapping[str, Any]] = {
        "GR warmups": GR_WARMUPS,
        "Ascents": ASCENTS,
        "Radius rules": RADIUS_RULES,
        "Second passes": SECOND_PASSES,
        "Optimizers": OPTIMIZERS,
        "Around an optimizer": {"ire": IRE},
    }
    return {heading: table(entries) for heading, entries in tables.items()}


def table(entries: Mapping[str, Any]) -> str:
    """A row per entry: name, description, equation and sources. A column without content is left out."""
    rows = [[f"`{name}`", entry.help, _equation(entry), _sources(entry)] for name, entry in entries.items()]
    columns = zip(("name", "what it is", "equation", "source"), *rows, strict=True)
    shown = [column for column in columns if any(column[1:])]
    header, *body = [f"| {' | '.join(row)} |" for row in zip(*shown, strict=True)]
    return "\n".join([header, "|---" * len(shown) + "|", *body])


def _equation(entry: Any) -> str:
    latex = getattr(entry, "latex", "")
    return f"${latex}$".replace(r"\|", r"\Vert ").replace("|", r"\vert ") if latex else ""  # a bar would end the cell


def _sources(entry: Any) -> str:
    bibtex = getattr(entry, "citation", "")
    titles, addresses = (re.findall(rf"^ *{key} *= {{(.*)}}", bibtex, re.MULTILINE) for key in ("title", "url"))
    return ", ".join(f"[{title}]({address})" for title, address in zip(titles, addresses, strict=True))
