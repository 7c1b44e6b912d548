"""Where the scripts, recipes and grids of the package are, and how they are called."""

from pathlib import Path

#: The console command; `hf-gr vit` is also the name of the process, its `sys.argv[0]`.
COMMAND = "hf-gr"
SCRIPTS_PACKAGE = "hf_gr.scripts"
SCRIPTS = Path(__file__).parents[1] / "scripts"
RECIPES, GRIDS = SCRIPTS / "recipes", SCRIPTS / "grids"
SUFFIXES = (".yaml", ".yml", ".json")


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
