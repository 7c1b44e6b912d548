"""The command `hf-gr`."""

import re
import shutil
import subprocess
import sys

import pytest

from helpers import ROOT
from hf_gr.cli import command

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


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_the_commands(argv, capsys):
    command.main(argv)
    printed = capsys.readouterr().out
    assert all(f"hf-gr {name} " in printed for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0 and f"usage: hf-gr {name} " in capsys.readouterr().out
