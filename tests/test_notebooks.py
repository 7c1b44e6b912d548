"""The notebooks of `examples/`: what is committed was executed and is clean, and their code runs, in a short form."""

import json
import re

import joblib
import matplotlib
import pytest
import torch
import transformers
from matplotlib import pyplot

from helpers import ROOT, pages

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
#: Of the root of a file system, not of a link.
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/])(/(home|root|tmp|usr|opt|mnt|var|Users)/|[A-Z]:\\)")


def cells(notebook, kind):
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def text(lines):
    return "".join(lines)


def run(notebook):
    """The names that its code cells define."""
    scope = {"__name__": "__main__"}
    for cell in cells(notebook, "code"):
        exec(compile(text(cell["source"]), notebook.name, "exec"), scope)
    return scope


@pytest.fixture
def _short(tmp_path, monkeypatch):
    """In a folder of its own: trainings of two steps, in this process, and no windows."""
    train = transformers.Trainer.train

    def train_two_steps(self, *args, **kwargs):
        self.args.max_steps = 2
        return train(self, *args, **kwargs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Trainer, "train", train_two_steps)
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    matplotlib.use("agg")
    with joblib.parallel_config(backend="sequential"):
        yield


def test_there_are_three():
    assert [notebook.stem for notebook in NOTEBOOKS] == ["choosing_r", "wrong_labels", "your_trainer"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
class TestNotebook:
    def test_was_executed_in_order_without_errors_and_warnings(self, notebook):
        code = cells(notebook, "code")
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        outputs = [output for cell in code for output in cell["outputs"]]
        assert {output["output_type"] for output in outputs} <= {"stream", "display_data"}
        assert all(output["name"] == "stdout" for output in outputs if output["output_type"] == "stream")
        assert {kind for output in outputs for kind in output.get("data", ())} <= {"image/png", "text/plain"}

    def test_is_short_and_says_nothing_of_where_it_ran(self, notebook):
        everything = json.loads(notebook.read_text(encoding="utf-8"))
        assert notebook.stat().st_size < 500_000 and len(everything["cells"]) <= 25
        assert everything["metadata"] == {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        for cell in everything["cells"]:
            outputs = [text(output.get("text", "")) for output in cell.get("outputs", ())]
            assert not cell["metadata"] and not ABSOLUTE_PATH.search(text(cell["source"]) + "".join(outputs))

    def test_links_lead_somewhere(self, notebook):
        links = re.findall(r"\]\(([^)]+)\)", "\n".join(text(cell["source"]) for cell in cells(notebook, "markdown")))
        local = [link for link in links if not re.match(r"\w+:", link)]
        assert local
        for target in local:
            path, _, anchor = target.partition("#")
            file = notebook.parent / path
            assert file.is_file() and (not anchor or anchor in pages.anchors(file)), target


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("name", ["choosing_r", "wrong_labels"])
def test_code_runs(name):
    run(ROOT / "examples" / f"{name}.ipynb")


@pytest.mark.usefixtures("_short")
def test_your_trainer_is_exact():
    scope = run(ROOT / "examples" / "your_trainer.ipynb")
    assert scope["distance"](scope["plain"].model, scope["off"].model) == 0
    assert scope["distance"](scope["whole"].model, scope["divided"].model) < 1e-14
    pairs = list(zip(scope["gradient"], scope["by_hand"], scope["plain_gradient"], strict=True))
    assert max((g - hand).abs().max() for g, hand, _ in pairs) < 1e-15
    assert all(not torch.equal(g, plain) for g, _, plain in pairs)
    assert [scope[name].seen for name in ("off", "trainer")] == [64, 32]
