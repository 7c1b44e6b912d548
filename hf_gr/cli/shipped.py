"""Where the scripts, recipes and grids of the package are, and how they are called."""

import re
from itertools import takewhile
from pathlib import Path

#: The console command; `hf-gr vit` is also the name of the process, its `sys.argv[0]`.
COMMAND = "hf-gr"
SCRIPTS_PACKAGE = "hf_gr.scripts"
SCRIPTS = Path(__file__).parents[1] / "scripts"
RECIPES, GRIDS = SCRIPTS / "recipes", SCRIPTS / "grids"
SUFFIXES = (".yaml", ".yml", ".json")


def about(path: Path) -> str:
    """The first sentence of the comment at the head of a recipe or grid."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return re.split(r"(?<=[.?])\s", " ".join(line.lstrip("# ") for line in lines))[0]


def find(flag: str, name: str | Path, folder: Path) -> Path:
    """The file at the path `name`, or the one of this name in `folder`, with or without `.yaml`.

    Raises:
        ValueError: there is no such file; the message lists those that ship.
    """
    for path in (Path(name), folder / name, folder / f"{name}.yaml"):
        if path.suffix in SUFFIXES and path.is_file():
            return path
    shipped = ", ".join(sorted(path.name for path in folder.glob("*.yaml")))
    raise ValueError(f"{flag}={name}: there is no such file. Give the path of one, or one of these: {shipped}.")
