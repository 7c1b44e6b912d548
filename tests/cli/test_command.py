"""The command `hf-gr`."""

import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure

from helpers import ROOT
from helpers.scripts import load_script
from hf_gr import list_optimizers
from hf_gr.cli import command, script, shipped
from hf_gr.reporting.record import read_history

RUN = ROOT / "tests" / "fixtures" / "runs" / "vit-gr"


def test_a_card_and_a_picture_from_the_command_line(tmp_path):
    """As a process of its own: by the module that the installed command calls."""
    assert re.search(r'^hf-gr = "hf_gr\.cli\.command:entry"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    folder = shutil.copytree(RUN, tmp_path / "run")
    (folder / "README.md").unlink()

    def run(*argv: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", command.__name__, *argv], capture_output=True, text=True)

    assert run("card", str(folder)).returncode == 0
    assert "with gradient regularization" in (folder / "README.md").read_text() and (folder / "curves.png").is_file()
    mistake = run("card", str(tmp_path))
    assert mistake.returncode == 2 and mistake.stderr.startswith("error: ") and mistake.stderr.count("\n") == 1


def test_the_layers_of_several_runs_side_by_side(tmp_path, monkeypatch):
    """A row for each run, with equal axes and the evaluation loss beside; the rates only where there are any."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: drawn.append((figure, path)))
    first, second = (shutil.copytree(RUN.parent / "resnet-tvlars", tmp_path / name) for name in ("a", "b"))
    command.main(["plots", str(first), "--layers"])
    table = pq.read_table(second / "layer_statistics.parquet").to_pydict()
    norms = [i for i, kind in enumerate(table["kind"]) if kind == "weight_norm"]
    for key, column in table.items():
        column += [{"kind": "rate"}.get(key, column[i]) for i in norms]
    pq.write_table(pa.table(table), second / "layer_statistics.parquet")
    command.main(["plots", str(first), str(second), "--layers", "--picture", str(tmp_path / "x.png")])
    assert [path for _, path in drawn] == [first / "layer_statistics.png", tmp_path / "x.png"]
    alone, both = ([axis for axis in figure.axes if axis.get_yscale() == "log"] for figure, _ in drawn)
    assert len(alone) == 3 and len(both) == 8
    assert [bool(axis.get_lines()) for axis in both] == [True, True, True, False] + [True] * 4
    assert both[0].get_ylim() == both[4].get_ylim() and both[3].get_title().startswith("Rate")
    losses = [axis for axis in drawn[1][0].axes if axis.get_lines() and axis.get_lines()[0].get_linestyle() == "--"]
    assert len(losses) == 8 and len({axis.get_ylim() for axis in losses}) == 1
    logged = [e["eval_loss"] for e in read_history(first) if "eval_loss" in e]
    assert list(losses[0].get_lines()[0].get_ydata()) == logged


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(argv, capsys):
    command.main(argv)
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0 and f"usage: hf-gr {name} " in capsys.readouterr().out


def test_help_is_one_screen_and_loads_no_torch():
    code = "import sys; from hf_gr.cli.command import entry; entry(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 120
    for name, file in command.FILES.items():
        assert f"  {name:12}{load_script(file).__doc__.splitlines()[0][:40]}" in done.stdout


@pytest.mark.parametrize(
    ("started", "processes", "expected"),
    [
        ("hf-gr vit", 1, "hf-gr vit"),
        ("hf-gr vit", 2, "accelerate launch --num_processes 2 -m hf_gr.scripts.train_vit"),
        ("scripts/train_vit.py", 1, "python scripts/train_vit.py"),
        ("scripts/train_vit.py", 2, "accelerate launch --num_processes 2 scripts/train_vit.py"),
        (str(shipped.SCRIPTS / "train_vit.py"), 1, "python -m hf_gr.scripts.train_vit"),
        ("ipykernel_launcher.py", 1, "python -m hf_gr.scripts.train_vit"),
    ],
)
def test_a_command_is_shown_as_it_was_started(started, processes, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    assert script.program(load_script("train_vit").__file__, processes) == expected.split()


def test_env_and_optimizers(capsys):
    command.main(["env"])
    printed = capsys.readouterr().out
    for name in ("hf_gr", "Python", "torch", "transformers", "accelerate", "platform", "devices", "torch.distributed"):
        assert f"{name}: " in printed
    command.main(["optimizers"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_optimizers())
    assert any("Adam with a trust ratio" in line for line in lines)


def test_recipes_and_grids_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = shipped.find("recipe", "vit_digits.yaml", shipped.RECIPES)
    assert found == shipped.RECIPES / "vit_digits.yaml" and shipped.find("preset", "gr-table2", shipped.GRIDS).is_file()
    (tmp_path / "vit_digits.yaml").write_text("")
    assert shipped.find("recipe", "vit_digits.yaml", shipped.RECIPES).samefile(tmp_path / "vit_digits.yaml")
    with pytest.raises(ValueError, match=r"^recipe=none\.yaml: there is no such file\. .*vit_ti_cifar10\.yaml"):
        shipped.find("recipe", "none.yaml", shipped.RECIPES)
