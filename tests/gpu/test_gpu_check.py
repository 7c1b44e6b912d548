"""`benchmarks/gpu_check.sh`, with a stand-in for Python: what it runs, and what it makes of how that ends."""

import os
import shutil
import subprocess
from datetime import date

import pytest

from helpers import ROOT

#: Ends as the third argument says, after a line; writes a table where one is asked for.
STAND_IN = """#!/usr/bin/env bash
echo "$@" >> commands
case "$*" in
    *parity*) echo "3 passed" ;;
    *training*) echo "1 failed"; exit 1 ;;
    *test_device_costs*) exec sleep 5 ;;
    *env) echo "torch: 2" ;;
    *"--only step"*) table=${@: -1}
        printf '# Title\\n\\n## Steps\\n\\n| a |\\n' > "$table"
        printf 'a,b\\n1,2\\n' > "${table%.table}.csv" ;;
    *) echo "error: no"; exit 2 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "benchmarks")
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(checkout, *arguments) -> int:
    environment = {**os.environ, "PYTHON": "./python", "LIMIT": "1"}
    command = [checkout / "benchmarks" / "gpu_check.sh", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True).returncode


def test_every_part_has_its_section(checkout):
    assert run(checkout) == 1
    text = (checkout / "benchmarks" / "results" / f"{date.today()}-gpu.md").read_text()
    assert "- torch: 2" in text
    assert "## tests-parity: done" in text
    assert "3 passed" in text
    assert "## tests-training: **failed**" in text
    assert "## tests-costs: **stopped after 1 s**" in text
    assert "### Steps\n\n| a |" in text  # of the table, without its title
    assert "# Title" not in text
    assert "## costs-ire: **failed**" in text
    assert (checkout / "benchmarks" / "results" / f"{date.today()}-gpu.csv").read_text() == "a,b\n1,2\n"
    commands = (checkout / "commands").read_text().splitlines()
    assert "-m pytest -n 0 -q -m gpu -p no:cacheprovider tests/gpu/test_device_parity.py" in commands
    assert sum("benchmarks/costs.py --device cuda" in command for command in commands) == 7


def test_parts_one_by_one_make_the_same_result(checkout):
    assert run(checkout, "cuda", "tests-parity") == 0
    assert run(checkout, "cuda", "costs-step") == 0
    text = (checkout / "benchmarks" / "results" / f"{date.today()}-gpu.md").read_text()
    assert text.index("## tests-parity: done") < text.index("## costs-step: done")
    assert len((checkout / "commands").read_text().splitlines()) == 4


def test_a_rehearsal_is_no_result(checkout):
    assert run(checkout, "cpu", "costs-step") == 0
    assert not (checkout / "benchmarks" / "results").exists()
    assert "### Steps" in (checkout / "build" / "gpu_check" / "cpu" / "result.md").read_text()
    assert run(checkout, "tpu") == 2
    assert run(checkout, "cpu", "nothing") == 2
