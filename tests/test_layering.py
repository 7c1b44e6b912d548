"""The maths knows torch alone; the trainer knows no data. Read from the source: importing the package loads it all."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_gr"


def imported(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(f".{node.module}" if node.level else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", ["gradient_regularization", "gr_warmup", "ire", "selection", "fisher", "optimizers"])
def test_maths_is_pure_torch(module):
    known = {"torch", "numpy", "math", "collections", "contextlib", "logging", "typing"}
    assert imported(module) <= known | ({".selection"} if module == "ire" else set())


@pytest.mark.parametrize(
    "module",
    [
        "trainer",
        "ire_training",
        "optimizer_training",
        "optimizer_factory",
        "layer_statistics",
        "language_modeling",
        "config",
        "replay",
        "checkpoints",
        "compatibility",
        "costs",
        "recording",
        "nonfinite",
        "process_groups",
        "uploads",
    ],
)
def test_training_does_not_depend_on_the_data(module):
    assert not imported(module) & {".data", ".metrics", ".models", "datasets", "sklearn"}
