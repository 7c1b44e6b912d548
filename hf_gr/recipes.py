"""Arguments of a script: from a recipe in YAML or JSON, and from flags that overrule it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_args(
    kinds: tuple[type, ...], argv: list[str], default_recipe: Path, without_it: tuple[str, ...] = ()
) -> tuple[Any, ...]:
    """One instance of each dataclass in `kinds`.

    Args:
        argv: the command line. A recipe may come first.
        default_recipe: used if none comes, unless one of the flags `without_it` is there.

    Raises:
        ValueError: the recipe has a name that none of the dataclasses has.
    """
    parser = HfArgumentParser(kinds)
    recipe = None
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        recipe, *argv = argv
    elif not {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in argv} & set(without_it):
        recipe = default_recipe
    if recipe is not None:
        defaults = yaml.safe_load(Path(recipe).read_text(encoding="utf-8")) or {}  # JSON is YAML, too
        known = {argument.name for kind in kinds for argument in fields(kind)}
        if unknown := sorted(set(defaults) - known):
            raise ValueError(f"{recipe}: unknown argument {', '.join(unknown)}; see --help for the known ones.")
        parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)
