"""The costs table: a rehearsal with tiny models writes every row, and the docs show it in short."""

import csv
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest

from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"


def costs(*flags):
    command = [sys.executable, BENCHMARKS / "costs.py", *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def modules():
    """Modules of benchmarks/, which are no package; they are forgotten afterwards, as their names are common ones."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(**{name: __import__(name) for name in ("costs", "rows", "timing")})
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.slow
def test_a_rehearsal_writes_every_row(tmp_path, modules, monkeypatch):
    done = costs("--tiny", "--rounds", "1", "--threads", "1", "--output", tmp_path / "2000-01-01-costs.md")
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "2000-01-01-costs.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    written = {(line["group"], line["what"], line["against"]) for line in lines if line["against"]}
    expected = {
        (name, row.what, row.against or row.peers[0])
        for name, group in modules.rows.GROUPS.items()
        for comparison in group.comparisons(True)
        for row in comparison.rows
    }
    assert written == expected and len(expected) > 30
    held = {line["what"]: line["value"] for line in lines if line["bar"] == "yes"}
    assert len(held) == 3 and set(held.values()) == {"yes"}

    page = (tmp_path / "2000-01-01-costs.md").read_text(encoding="utf-8")
    assert "A rehearsal" in page and "torch " in page and "load before: " in page
    assert page.count("\n| ") == len(lines) + page.count("\n| where |")

    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    monkeypatch.setitem(generate["costs_table"].__globals__, "RESULTS", tmp_path)
    short = generate["costs_table"]("CPU")
    assert "[2000-01-01-costs](../benchmarks/results/2000-01-01-costs.md)" in short
    assert "| zero-warmup gradient equals that of Trainer, bitwise |  | yes | yes | met |" in short
    assert "| GR, λ = r | plain step of Trainer |" in short
    assert "Nothing has been measured" in generate["costs_table"]("GPU")


@pytest.mark.parametrize(
    ("values", "bar", "expected"),
    [
        ((0.7, 0.6, 0.8), 0.8, "met"),
        ((0.7, 0.6, 0.8), 0.79, "spread hides it"),
        ((0.7, 0.6, 0.8), 0.6, "spread hides it"),
        ((0.7, 0.6, 0.8), 0.59, "not met"),
        ((0.7, 0.6, 0.8), None, ""),
        ((True, True, True), True, "met"),
        ((False, False, False), True, "not met"),
    ],
)
def test_a_bar_is_met_by_the_whole_middle_half(values, bar, expected, modules):
    assert modules.costs.verdict(*values, bar) == expected


def test_ratios_are_those_within_a_round(modules):
    """The second thing takes twice as long as the first, while the machine gets ten times as slow."""
    drift = [1.0, 2.0, 3.0, 5.0, 7.0, 10.0, 10.0]
    found = modules.timing.ratio({"a": drift, "b": [2 * second for second in drift]}, "b", "a")
    assert found == (2.0, 2.0, 2.0)
    assert modules.timing.ratio({"a": [1.0] * 8, "b": [8, 1, 7, 2, 6, 3, 5, 4]}, "b", "a") == (4.5, 3, 6)


def test_each_kind_runs_once_per_round_and_once_before(modules):
    runs = []
    kinds = {name: lambda name=name: runs.append(name) for name in "abc"}
    seconds = modules.timing.interleave(kinds, 5, before=lambda: runs.append("before"))
    assert {len(times) for times in seconds.values()} == {5}
    assert runs[::2] == ["before"] * 18
    turns = [tuple(runs[i + 1 : i + 6 : 2]) for i in range(0, 36, 6)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns) and len(set(turns)) > 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--tiny",), "error: --tiny: a rehearsal is no result. Say where to write it: --output outputs/costs.md\n"),
        (("--rounds", "0"), "error: --rounds 0: give at least 1.\n"),
    ],
)
def test_mistakes(flags, message, modules, capsys):
    with pytest.raises(SystemExit, match="2"):
        modules.costs.run(modules.costs.main, flags)
    assert capsys.readouterr().err == message
