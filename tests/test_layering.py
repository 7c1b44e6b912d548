"""The wings and the one-way rules between them, by import in a fresh process and by the import graph."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter

import pytest

from helpers import EXTRAS, ROOT

PACKAGE = ROOT / "hf_gr"
WINGS = ("optim", "analysis", "trainer", "data", "models", "reporting", "cli", "scripts")
#: wing -> what its files may not import, directly or through others.
FORBIDDEN = {
    "optim": {"hf_gr.config", "hf_gr.trainer", "hf_gr.data", "hf_gr.models", "hf_gr.reporting"},
    "analysis": {"hf_gr.config", "hf_gr.trainer", "hf_gr.data", "hf_gr.models", "hf_gr.reporting"},
    "trainer": {"hf_gr.data", "hf_gr.models.presets"},
    "data": {"hf_gr.trainer"},
    "models": {"hf_gr.trainer"},
    "reporting": {"hf_gr.trainer", "hf_gr.data"},
}
for forbidden in FORBIDDEN.values():
    forbidden |= {"hf_gr.cli", "hf_gr.scripts"}  # only these two see all
#: Files that are saved beside the weights and must stand alone.
COPIED = {"hf_gr.models.cait", "hf_gr.models.cifar_resnet", "hf_gr.models.wide_resnet"}


def modules() -> dict[str, ast.Module]:
    """Name -> syntax tree of every file of the package."""
    files = {path: path.relative_to(ROOT).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts).removesuffix(".__init__"): ast.parse(path.read_text()) for path, parts in files.items()}


def inside(package: str, names: Iterable[str]) -> set[str]:
    """Those of `names` that are `hf_gr.PACKAGE` or within it."""
    return {name for name in names if f"{name}.".startswith(f"hf_gr.{package}.")}


def imports(name: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    """What a file imports of the package, `if TYPE_CHECKING:` and imports within functions included."""
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = name.split(".")[: len(name.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                if inner in known:
                    yield inner
                elif origin in known:
                    yield origin


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    trees = modules()
    # The package itself offers names of all wings, to be imported when they are asked for.
    return {
        name: set(imports(name, tree, set(trees))) - {name, "hf_gr"} for name, tree in trees.items() if name != "hf_gr"
    }


def test_the_import_graph_has_no_cycle(graph):
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the cycle
    assert len(order) == len(graph) > 40


@pytest.mark.parametrize("wing", FORBIDDEN)
def test_no_wing_reaches_where_it_may_not(wing, graph):
    reached, left = set(), inside(wing, graph)
    assert left
    while left:
        reached |= left
        left = {other for name in left for other in graph[name]} - reached
    bad = {name for name in reached for no in FORBIDDEN[wing] if name == no or name.startswith(f"{no}.")}
    assert not bad


def test_what_is_saved_beside_the_weights_stands_alone(graph):
    assert all(not graph[name] for name in COPIED)


def loaded_in_turn(*statements: str) -> list[set[str]]:
    """The modules that each statement loads, one after the other in a fresh process."""
    code = "import sys\nseen = set(sys.modules)\n"
    for statement in statements:
        code += f"{statement}\nnew = sys.modules.keys() - seen\nprint(*new)\nseen |= new\n"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def import_of(wing: str) -> str:
    return f"import {', '.join(sorted(inside(wing, modules())))}"


def may_not(wing: str, loaded: set[str]) -> set[str]:
    return {name for name in loaded for no in FORBIDDEN[wing] if name == no or name.startswith(f"{no}.")}


def test_wings_load_nothing_that_they_may_not():
    """In one process, the wings with fewer rights first: what is loaded stays loaded."""
    wings = ("optim", "analysis", "reporting", "models", "data")
    public, *loaded = loaded_in_turn("from hf_gr import IRE, LAMB, LARS, TVLARS, Muon", *map(import_of, wings))
    maths = public | loaded[0] | loaded[1]
    assert "torch" in maths
    assert not maths & {"transformers", "accelerate", "matplotlib", "datasets", "peft", "hf_gr.config"}
    assert not any(may_not(wing, new) for wing, new in zip(wings, loaded, strict=True))


def test_the_trainer_loads_no_more_packages_than_that_of_transformers():
    _, ours, wing = loaded_in_turn(
        "from transformers import Trainer", "from hf_gr import GRConfig, GRTrainer", import_of("trainer")
    )
    assert "hf_gr.trainer.trainer" in ours and not ours & EXTRAS
    assert not may_not("trainer", ours | wing)


def test_the_front_page():
    top = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py"}
    assert len(top) <= 6, top
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(WINGS)
