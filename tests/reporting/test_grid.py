"""Grids of runs: what is run, what is not run again, and what the tables say."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from helpers import SCRIPTS, TESTS
from helpers.scripts import load_script
from hf_gr.cli.shipped import GRIDS, RECIPES, find
from hf_gr.data.text import train_tokenizer
from hf_gr.errors import Failure
from hf_gr.models.presets import create_llama
from hf_gr.reporting.comparison import (
    _key_of_row,
    _published,
    _published_key,
    _read_published,
    at_every_point,
    check_published,
    explanation,
    markdown_table,
    require_metric,
    table_like_the_papers,
    tuned_table,
    write_results,
)
from hf_gr.reporting.comparison_plots import _plot_metric, plot_arms
from hf_gr.reporting.grid import Run, expand, run_grid
from hf_gr.reporting.grid_file import Grid, load_grid
from hf_gr.reporting.grid_pictures import plot_heat_map, plot_sensitivity

ARMS = {"off": {"gr_lambda": 0}, "on": {"gr_lambda": 0.1}}

#: Stands for a training: writes down that it ran, takes its time, and leaves the files of one.
TRAINING = """
import json, os, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = pathlib.Path(flags["--output_dir"])
with open(folder.parent / "started.txt", "a") as log:
    log.write(folder.name + "\\n")
told = folder.parent / "told.json"
told = json.loads(told.read_text()) if told.exists() else {}
waits = told.get("waits") in (folder.name, "all")
while waits and not (folder.parent / "go").exists():
    time.sleep(0.02)
if flags["--gr_lambda"] == told.get("fails_at"):
    sys.exit("no luck")
degree = float(flags["--gr_lambda"])
if (folder.parent / "environment").is_dir():
    (folder.parent / "environment" / folder.name).write_text(json.dumps([sys.argv, os.environ.get("HF_TOKEN")]))
loss = degree * (1 + int(flags["--seed"]) / 10) + int(flags["--seed"]) * 0.01
if [flags["--gr_lambda"], flags["--seed"]] in told.get("diverges", []):
    loss = float("nan")
passes = 2 if degree else 1
history = [{"step": s, "eval_loss": loss + 1 - s / 10, "grad_norm": 1.0, "train_seconds": s * (1 + degree),
            "train_passes": passes * s} for s in range(1, 11)]
results = {"eval_loss": loss, "train_seconds": history[-1]["train_seconds"], "train_passes": 10 * passes}
for name, content in (("all_results", results), ("eval_results", results), ("trainer_state", {"log_history": history})):
    (folder / f"{name}.json").write_text(json.dumps(content))
"""


@pytest.fixture
def training(tmp_path) -> Path:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    return script


def started(folder: Path) -> list[str]:
    log = folder / "started.txt"
    return log.read_text().split() if log.exists() else []


def kill_when_started(worker: subprocess.Popen, folder: Path, run: str, kill=os.kill) -> None:
    while worker.poll() is None and run not in started(folder):
        time.sleep(0.02)
    kill(worker.pid, signal.SIGKILL)
    worker.wait()


def test_every_combination_is_expanded_once(tmp_path):
    grid = Grid("x.py", ARMS, "off", recipe="r.yaml", flags={"a": 1}, axes={"model": ["m/s", "l"]}, seeds=[0, 1])
    runs = expand(grid, tmp_path, Path("recipes"), ["--b", "2"])
    assert [run.name for run in runs[:4]] == ["s_off_0", "s_on_0", "l_off_0", "l_on_0"] and len(runs) == 8
    assert runs[1].arguments == ["recipes/r.yaml", "--a", "1", "--b", "2", "--model", "m/s", "--gr_lambda", "0.1",
                                 "--seed", "0", "--output_dir", str(tmp_path / "s_on_0")]  # fmt: skip
    assert runs[1].point == {"model": "m/s", "arm": "on", "seed": 0}


def test_an_arm_that_ignores_an_axis_is_run_once(training, tmp_path):
    """Its run stands beside those of the other arms at each value, in the order of the grid."""
    arms = {"on": {"gr_lambda": 0.1}, "off": {"gr_lambda": 0}}
    grid = Grid(training.name, arms, "off", axes={"a": [1, 2], "gr_r": [3, 4]}, ignores={"off": ["gr_r"]}, seeds=[0, 1])
    runs = expand(grid, tmp_path, tmp_path)
    assert [run.name for run in runs[:6]] == ["1_3_on_0", "1_off_0", "1_4_on_0", "2_3_on_0", "2_off_0", "2_4_on_0"]
    assert len(runs) == 12 and runs[1].point == {"a": 1, "gr_r": None, "arm": "off", "seed": 0}
    assert "--gr_r" not in runs[1].arguments and runs[0].arguments[:4] == ["--a", "1", "--gr_r", "3"]
    run_grid(training, runs, 2)
    assert sorted(started(tmp_path)) == sorted(run.name for run in runs)
    lines = markdown_table(grid, at_every_point(grid, runs)).splitlines()[2:]
    starts = [f"| {a} | {r} | {arm} |" for a in (1, 2) for r in (3, 4) for arm in arms]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert all("| +0.105 |" in line for line in lines[::2])
    own = Grid(training.name, {**arms, "own": {"gr_r": 5}}, "off", axes={"gr_r": [3, 4]}, ignores={"off": ["gr_r"]})
    assert [run.name for run in expand(own, tmp_path, tmp_path)] == ["3_on_0", "off_0", "own_0", "4_on_0"]
    write_results(runs, tmp_path / "results.csv")
    assert "\n1,,off,0," in (tmp_path / "results.csv").read_text().replace("\r", "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "none"}, "baseline='none': choose one of the arms, off, on"),
        ({"seeds": [0, 0]}, r"seeds=\[0, 0\]: list each value once"),
        ({"axes": {"gr_r": []}}, r"gr_r=\[\]: list each value once, and at least one"),
        ({"arm": {}}, "grid.yaml: unknown key arm"),
        ({"tuned": {"axes": ["gr_r"], "by": "eval_loss"}}, "tuned.axes: gr_r is none of the axes, none"),
    ],
)
def test_mistakes_in_a_grid_are_named(changes, message, tmp_path):
    content = {"script": "x.py", "arms": ARMS, "baseline": "off", **changes}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        load_grid(tmp_path / "grid.yaml")


@pytest.mark.parametrize(
    ("axes", "extra", "message"),
    [
        ({"gr_lambda": [0.1, 0.2]}, [], "gr_lambda: an axis has no effect on a flag that the arms set"),
        ({}, ["--gr_lambda", "0.3"], "--gr_lambda: no effect, the grid sets it for each run"),
        ({"gr_r": [0.1]}, ["--gr_r=0.2", "--seed", "1"], "--gr_r, --seed: no effect"),
    ],
)
def test_flags_without_effect_are_refused(axes, extra, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        expand(Grid("x.py", ARMS, "off", axes=axes), tmp_path, tmp_path, extra)


def test_a_grid_that_is_not_there_and_a_scale_that_is_not_there():
    with pytest.raises(ValueError, match=r"preset=none: .* or one of these: cost-frontier.yaml, .*"):
        find("preset", "none", GRIDS)
    with pytest.raises(ValueError, match=r"gr-table2\.yaml: scale='huge': choose one of smoke, cpu, paper"):
        load_grid(find("preset", "gr-table2", GRIDS), "huge")


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_make_command_lines_that_their_scripts_take(path, tmp_path):
    for scale in yaml.safe_load(path.read_text())["scales"]:
        grid = load_grid(path, scale)
        script = load_script(Path(grid.script).stem)
        base = ["--model_name_or_path", "base"] if grid.script == "finetune_llama_lora.py" else []  # the user's
        runs = expand(grid, tmp_path, RECIPES, ["--use_cpu", "True", "--bf16", "False", *base])
        load_script("compare").check_command_lines(grid, runs)
        if grid.published:
            check_published(grid, path.parent / grid.published["file"])
        seen: set[tuple[str, str]] = set()
        for run in runs:
            point = {(name, str(value)) for name, value in run.point.items()}
            if point <= seen:  # each arm, value and seed once
                continue
            seen |= point
            *_, args = script.parse_args(run.arguments)
            assert args.output_dir == str(run.folder) and args.seed == run.point["seed"]


def test_what_is_finished_is_not_run_again(training, tmp_path):
    grid = Grid(training.name, ARMS, "off", seeds=[0, 1])
    ended = []
    for _ in range(2):
        runs = expand(grid, tmp_path, tmp_path)
        run_grid(training, runs, 2, lambda run, well: ended.append((run.name, well)))
        assert all(run.is_finished for run in runs)
    assert sorted(started(tmp_path)) == sorted(run.name for run in runs) and len(ended) == 4
    grid.seeds = [0, 1, 2]  # more of them later
    run_grid(training, expand(grid, tmp_path, tmp_path))
    assert sorted(started(tmp_path)[4:]) == ["off_2", "on_2"]


def test_what_fails_is_said_and_run_again_the_next_time(training, tmp_path):
    grid = Grid(training.name, ARMS, "off")
    ended = []
    (tmp_path / "told.json").write_text(json.dumps({"fails_at": "0.1"}))
    failing = expand(grid, tmp_path, tmp_path)
    run_grid(training, failing, on_end=lambda run, well: ended.append((run.name, well)))
    assert ended == [("off_0", True), ("on_0", False)]
    assert "no luck" in (tmp_path / "on_0" / "log.txt").read_text()
    (tmp_path / "told.json").unlink()
    run_grid(training, expand(grid, tmp_path, tmp_path))
    assert started(tmp_path) == ["off_0", "on_0", "on_0"]


def test_why_a_run_failed_is_printed(training, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "told.json").write_text(json.dumps({"fails_at": "0.1"}))
    with pytest.raises(Failure, match="1 of 2 runs failed"):
        compare_here("--preset", grid_file(tmp_path, training), "--output_dir", tmp_path / "out")
    assert "on_0 failed: no luck" in capsys.readouterr().out


def test_what_is_finished_is_not_passed_off_as_what_another_command_would_have_run(training, tmp_path):
    grid = Grid(training.name, ARMS, "off")
    run_grid(training, expand(grid, tmp_path, tmp_path, ["--image_size", "16"]))
    for other, differing in (([], "--image_size 16"), (["--image_size", "8"], "16 8")):
        with pytest.raises(ValueError, match=rf"off_0 was run with other arguments \(differing: {differing}\)"):
            run_grid(training, expand(grid, tmp_path, tmp_path, other))
    (tmp_path / "x").mkdir()
    elsewhere = tmp_path / "x" / ".."  # the same folder, by another name
    run_grid(training, expand(grid, elsewhere, elsewhere, ["--image_size", "16"]))
    assert len(started(tmp_path)) == 2


def test_killed_in_the_middle_only_the_unfinished_are_run(training, tmp_path):
    """What the killed worker had taken is run again."""
    code = (
        "import sys; from pathlib import Path\n"
        "import hf_gr.reporting.grid as g; from hf_gr.reporting.grid_file import Grid\n"
        f"folder = Path({str(tmp_path)!r}); grid = Grid('x', {ARMS!r}, 'off', seeds=[0, 1])\n"
        "runs = g.expand(grid, folder, folder)\n"
        f"g.run_grid(Path({str(training)!r}), runs)"
    )
    (tmp_path / "told.json").write_text(json.dumps({"waits": "on_0"}))
    worker = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    kill_when_started(worker, tmp_path, "on_0", os.killpg)
    runs = expand(Grid("x", ARMS, "off", seeds=[0, 1]), tmp_path, tmp_path)
    assert [run.is_finished for run in runs] == [True, False, False, False]
    (tmp_path / "go").touch()
    run_grid(training, runs)
    assert all(run.is_finished for run in runs)
    assert [started(tmp_path).count(run.name) for run in runs] == [1, 2, 1, 1]


def test_a_run_whose_worker_was_killed_is_waited_for_not_started_again(training, tmp_path, monkeypatch):
    """The child goes on without its worker, and has the lock."""
    grid = Grid("x", ARMS, "off")
    code = (
        "from pathlib import Path; from hf_gr.reporting.grid_file import Grid\n"
        "from hf_gr.reporting.grid import expand, run_grid\n"
        f"folder = Path({str(tmp_path)!r})\n"
        f"run_grid(Path({str(training)!r}), expand(Grid('x', {ARMS!r}, 'off'), folder, folder))"
    )
    (tmp_path / "told.json").write_text(json.dumps({"waits": "all"}))
    worker = subprocess.Popen([sys.executable, "-c", code])
    kill_when_started(worker, tmp_path, "off_0")
    runs = expand(grid, tmp_path, tmp_path)
    assert started(tmp_path) == ["off_0"] and [run.is_locked() for run in runs] == [True, False]
    waiting = []

    def end(message):
        waiting.append(message)
        (tmp_path / "go").touch()

    (tmp_path / "told.json").unlink()  # for the second run; the first has read it
    monkeypatch.setattr(logging.getLogger("hf_gr.reporting.grid"), "warning", end)
    run_grid(training, runs)
    assert waiting == ["Waiting for other workers, which are running off_0."]
    assert all(run.is_finished for run in runs) and started(tmp_path) == ["off_0", "on_0"]


def test_other_arguments_are_refused_while_a_run_is_under_way(training, tmp_path):
    (run, _) = expand(Grid("x", ARMS, "off"), tmp_path, tmp_path, ["--image_size", "16"])
    run.folder.mkdir()
    (run.folder / "settings.json").write_text(json.dumps(run.settings))
    with (
        run.lock(),
        pytest.raises(ValueError, match=r"off_0 was run with other arguments \(differing: --image_size 16"),
    ):
        run_grid(training, expand(Grid("x", ARMS, "off"), tmp_path, tmp_path))
    assert not (tmp_path / "started.txt").exists()


def test_values_with_the_same_name_get_folders_of_their_own(tmp_path):
    """Those whose name is unambiguous keep it, so that their finished runs are found."""
    grid = Grid(
        "x", {"a b": {}, "a-b": {}, "c": {}}, "c", axes={"data": ["/one/cifar", "/two/cifar", "Mnist", "mnist"]}
    )
    runs = expand(grid, tmp_path, tmp_path)
    assert len({run.name.casefold() for run in runs}) == len(runs) == 12
    assert [run.name for run in expand(Grid("x", {"a b": {}, "c": {}}, "c", axes={"data": ["/one/cifar"]}), tmp_path,
                                       tmp_path)] == ["cifar_a-b_0", "cifar_c_0"]  # fmt: skip
    swapped = Grid(
        "x", {"c": {}, "a-b": {}, "a b": {}}, "c", axes={"data": ["mnist", "/two/cifar", "Mnist", "/one/cifar"]}
    )
    assert {run.name: run.point for run in expand(swapped, tmp_path, tmp_path)} == {run.name: run.point for run in runs}


SECRETS = ["hf_the_first_secret", "hf_the_second_secret", "hf_in_the_environment"]


def grid_file(folder: Path, training: Path, **changes) -> Path:
    content = {"script": str(training), "arms": ARMS, "baseline": "off", **changes}
    (folder / "grid.yaml").write_text(yaml.safe_dump(content))
    return folder / "grid.yaml"


def compare_here(*argv) -> None:
    load_script("compare").main([str(word) for word in argv])


@pytest.mark.parametrize("flags", [["--hub_token"] * 2, ["--hub-token"] * 2, ["--hub_tok"] * 2], ids=lambda f: f[0])
def test_no_token_gets_into_files_or_command_lines(flags, training, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRETS[2])
    out = tmp_path / "out"
    (out / "environment").mkdir(parents=True)
    argv = [word for pair in zip(flags, SECRETS[:2], strict=True) for word in pair]
    path = grid_file(tmp_path, training, flags={"hub_model_id": f"me/hf_{'1a' * 17}"})
    compare_here("--preset", path, "--output_dir", out, *argv, "--run_name", SECRETS[0], "--tag", f"x/{SECRETS[2]}")
    arguments, token = json.loads((out / "environment" / "on_0").read_text())
    assert token == SECRETS[1] and not any("hub_tok" in word.replace("-", "_") for word in arguments)
    for file in out.rglob("*"):
        if file.is_file() and file.parent.name != "environment":
            content = file.read_bytes().decode(errors="replace")
            assert not any(secret in content for secret in (*SECRETS, "1a" * 17)), file
    assert "--run_name ... --tag x/..." in (out / "table.md").read_text()


def test_folders_that_were_begun_with_a_token_are_found(training, tmp_path):
    runs = expand(Grid("x", ARMS, "off"), tmp_path, tmp_path, ["--hub_token", SECRETS[0], "--image-size", "8"])
    run_grid(training, runs)
    for run in runs:  # as it was written once
        (run.folder / "settings.json").write_text(json.dumps(["--hub_token", SECRETS[0], *run.settings]))
    run_grid(training, expand(Grid("x", ARMS, "off"), tmp_path, tmp_path, ["--image_size", "8"]))
    assert len(started(tmp_path)) == 2


def test_a_metric_that_is_not_reported_stops_after_the_first_run(training, tmp_path):
    path = grid_file(tmp_path, training, metric="eval_eror", seeds=[0, 1, 2])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"metric='eval_eror': \S+off_0 does not have it.* one of eval_loss"):
            compare_here("--preset", path, "--output_dir", tmp_path / "out")
        assert started(tmp_path / "out") == ["off_0"]


def test_published_numbers_that_are_not_there_are_named_before_the_first_run(training, tmp_path):
    published = {"file": "p.csv", "arms": {"on": "gr"}, "names": {"vit": "ViT"}}
    path = grid_file(tmp_path, training, published=published)
    with pytest.raises(ValueError, match=r"published.file=\S+p.csv: it cannot be read"):
        compare_here("--preset", path, "--output_dir", tmp_path / "out")
    header = "table,model,dataset,optimizer,method,mean,std\n"
    for content, message in (
        ("a,b\n", "it has no column dataset, mean, method, model, optimizer, std"),
        (f"{header}T,ViT,c,o,other,1,\n", "published.arms: gr is not in the column method"),
        (f"{header}T,x,c,o,gr,1,\n", "published.names: ViT is not in the column model or dataset or optimizer"),
        (f"{header}T,ViT,c\n", "a row has fewer values"),
    ):
        (tmp_path / "p.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            compare_here("--preset", path, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["all_results.json", "trainer_state.json", "settings.json"])
def test_a_truncated_file_is_named(name, training, tmp_path):
    path = grid_file(tmp_path, training)
    compare_here("--preset", path, "--output_dir", tmp_path / "out")
    file = tmp_path / "out" / "on_0" / name
    file.write_text(file.read_text()[:9])
    with pytest.raises(ValueError, match=rf"on_0/{name} is not valid JSON .* delete its folder and run again"):
        compare_here("--preset", path, "--output_dir", tmp_path / "out")


# ---- Reports ----


@pytest.mark.parametrize(
    ("axis", "changes", "picture"),
    [
        (["--axis", "a=1,2"], {}, "sensitivity.png"),
        (["--axis", "a=1", "--axis", "b=1"], {}, "heat_map.png"),
        ([], {"picture": "frontier"}, "frontier.png"),
        (["--axis", "a=1,2"], {"picture": "harmful"}, "harmful.png"),
    ],
)
def test_runs_that_have_diverged_are_shown_as_such(axis, changes, picture, training, tmp_path):
    (tmp_path / "out").mkdir()
    diverging = [["0.1", "0"], ["0.1", "1"], ["0", "1"]]
    (tmp_path / "out" / "told.json").write_text(json.dumps({"diverges": diverging}))
    path = grid_file(tmp_path, training, seeds=[0, 1], percent=True, **changes)
    compare_here("--preset", path, "--output_dir", tmp_path / "out", "--workers", 2, *axis)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| off | 0 (1 of 2 seeds) |  |  | 0 (1 of 2 seeds) | 0 (1 of 2 seeds) |" in table
    assert "| on | nan (0 of 2 seeds) |  |  | nan (0 of 2 seeds) | nan (0 of 2 seeds) |" in table
    drawn = {picture} if picture == "heat_map.png" else {"curves.png", picture}
    assert drawn == {file.name for file in (tmp_path / "out").glob("*.png")}


def test_a_mean_over_some_of_the_seeds_says_so(training, tmp_path):
    """At equal seconds: seed 1 of `on` has its first evaluation when `off` is long done."""
    grid = Grid(training.name, ARMS, "off", seeds=[0, 1])
    runs = expand(grid, tmp_path, tmp_path)
    run_grid(training, runs)
    path = tmp_path / "on_1" / "trainer_state.json"
    history = json.loads(path.read_text())["log_history"]
    path.write_text(json.dumps({"log_history": [{**e, "train_seconds": 99} for e in history]}))
    line = markdown_table(grid, runs).splitlines()[3]
    assert line == "| on | 0.11 ± 0.014 | +0.105 | 0.03 | 0.11 | 0.61 | 0.2 (1 of 2 seeds) | 20 | 11 |"


def test_names_do_not_break_the_table(training, tmp_path):
    grid = Grid(training.name, {"a|b": {"gr_lambda": 0}}, "a|b")
    runs = expand(grid, tmp_path, tmp_path)
    run_grid(training, runs)
    assert markdown_table(grid, runs).splitlines()[2].startswith(r"| a\|b | 0 |")


@pytest.fixture
def finished(training, tmp_path) -> tuple[Grid, list[Run]]:
    grid = Grid(training.name, ARMS, "off", axes={"gr_r": [0.1, 0.2]}, seeds=[0, 1, 2])
    runs = expand(grid, tmp_path, tmp_path)
    run_grid(training, runs, 2)
    return grid, runs


def test_the_tables_say_what_the_runs_have(finished, tmp_path):
    grid, runs = finished
    write_results(runs, tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and rows[0] == {
        "gr_r": "0.1", "arm": "off", "seed": "0", "eval_loss": "0.0", "train_seconds": "10.0", "train_passes": "10",
    }  # fmt: skip
    lines = markdown_table(grid, runs).splitlines()
    assert lines[0].startswith("| gr_r |  | loss, mean ± std | against off | p | best epoch | at equal passes |")
    # `off` takes 10 s; of `on`, which takes 11, that leaves step 9, at a loss of 0.12 + 0.1 on average. It takes 20
    # passes, of which 10 leave step 5, at 0.12 + 0.5.
    assert lines[2] == "| 0.1 | off | 0.01 ± 0.01 |  |  | 0.01 | 0.01 | 0.01 | 10 | 10 |"
    assert lines[3] == "| 0.1 | on | 0.12 ± 0.02 | +0.11 | 0.0027 | 0.12 | 0.62 | 0.22 | 20 | 11 |"
    grid.percent = True
    assert markdown_table(grid, runs).splitlines()[2].startswith("| 0.1 | off | 1 ± 1 |  |  | 1 |")


def test_the_best_epoch_is_the_lowest_value_of_each_run(finished):
    """0.5, 0.3 and 0.4, each at another step; a run that was evaluated at its end alone has none."""
    grid, runs = finished
    losses = {0.1: ([2, 0.5, 1], [0.3, None, 1], [3, 2, 0.4]), 0.2: ([2], [2], [2])}
    for run in runs:
        of_run = losses[run.point["gr_r"]][run.point["seed"]]
        log = [{"step": step, "eval_loss": loss} for step, loss in enumerate(of_run)]
        (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": [*log, log[-1]]}))
    head, _, *lines = (line.split(" | ") for line in markdown_table(grid, runs).splitlines())
    assert [line[head.index("best epoch")] for line in lines] == ["0.4", "0.4", "", ""]
    assert "an oracle" in explanation(grid)


def test_further_metrics_are_beside_the_first(finished):
    """As they are, also in a grid in percent; empty where a run does not report one."""
    grid, runs = finished
    grid.also, grid.percent = ["eval_ece", "train_accuracy_wrong_labels"], True
    with pytest.raises(ValueError, match=r"also='eval_ece': \S+off_0 does not have it.* one of eval_loss, and rerun"):
        require_metric(grid, runs[0])
    for run in runs:
        results = {**run.results(), "eval_ece": 0.1 * (1 + run.point["seed"])}
        if run.point["arm"] == "on":
            results["train_accuracy_wrong_labels"] = 0.5
        (run.folder / "all_results.json").write_text(json.dumps(results))
        require_metric(grid, run)
    lines = markdown_table(grid, runs).splitlines()
    assert lines[0].startswith("| gr_r |  | loss (%), mean ± std | ece | train accuracy wrong labels | against off |")
    assert lines[2].startswith("| 0.1 | off | 1 ± 1 | 0.2 ± 0.1 |  |  |")
    assert lines[3].startswith("| 0.1 | on | 12 ± 2 | 0.2 ± 0.1 | 0.5 ± 0 | +11 |")


def test_what_is_known_at_the_end_is_in_the_results(finished, tmp_path):
    """Metrics of the test set, wrong labels, and the last share of them that is only logged."""
    grid, (run, *_) = finished
    log = [{"step": step, "train_accuracy_wrong_labels": step / 10, "loss": 1.0} for step in (5, 7)]
    (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": [*log, *run.history()]}))
    results = {**run.results(), "test_error": 0.25, "train_wrong_labels": 3, "train_loss": 1.0}
    (run.folder / "all_results.json").write_text(json.dumps(results))
    write_results([run], tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["test_error"], row["train_wrong_labels"], row["train_accuracy_wrong_labels"]) == ("0.25", "3", "0.7")
    assert "train_loss" not in row and row["eval_loss"] == "0.0"
    grid.metric = "test_error"
    require_metric(grid, run)
    grid.metric = "test_loss"
    with pytest.raises(ValueError, match=r"metric='test_loss': .* to one of eval_loss, test_error, and rerun"):
        require_metric(grid, run)


def test_the_curves_of_a_test_metric_are_those_of_the_validation_part(finished):
    grid, runs = finished
    grid.metric, grid.percent, axis = "test_loss", True, Figure().subplots()
    arms = {run.point["arm"]: [run.history()] for run in runs}
    _plot_metric(axis, grid, arms, {"off": "blue", "on": "red"}, "step", "step")
    assert axis.get_ylabel() == "validation loss (%)" and len(axis.get_lines()[0].get_xdata()) == 10


def test_published_numbers_are_beside_ours_and_marked(finished, tmp_path):
    grid, runs = finished
    (tmp_path / "p.csv").write_text(
        "table,model,dataset,optimizer,method,mean,std\n"
        "Table 2,ViT,cifar,Adam,gr,13.61,0.2\nTable 2,ViT,cifar,Adam,no,1,2\n"
    )
    grid.published = {"arms": {"on": "gr"}, "names": {"vit": "ViT", "c": "cifar", "adam": "Adam"}}
    lines = markdown_table(grid, runs, tmp_path / "p.csv").splitlines()
    assert lines[0].endswith("| published, **not ours** |") and lines[3].endswith("|  |")
    grid.published_like = {"model": "vit", "dataset_name": "c", "optim": "adam"}
    lines = markdown_table(grid, runs, tmp_path / "p.csv").splitlines()
    assert lines[2].endswith("|  |") and lines[3].endswith("| 13.61 ± 0.2 (ViT, cifar, Adam) |")


def test_settings_are_chosen_by_the_metric_that_the_grid_names(training, tmp_path):
    """Each arm at the value with the lowest mean of `tuned.by` over the seeds, whatever its metric there. One without
    all seeds is not chosen, and what an arm ignores is no choice."""
    axes = {"a": [1, 2], "gr_r": [3, 4, 5]}
    tuned = {"axes": ["gr_r"], "by": "eval_loss"}
    grid = Grid(training.name, ARMS, "off", metric="test_loss", axes=axes, ignores={"off": ["gr_r"]}, seeds=[0, 1],
                tuned=tuned)  # fmt: skip
    runs = expand(grid, tmp_path, tmp_path)
    run_grid(training, runs, 2)
    chosen_by = {("on", 1): [3, 1, 2], ("on", 2): [2, 3, 1], ("off", 1): [7] * 3, ("off", 2): [8] * 3}
    for run in runs:
        index = axes["gr_r"].index(run.point["gr_r"] or 3)
        value = chosen_by[run.point["arm"], run.point["a"]][index]
        results = {"eval_loss": value + run.point["seed"], "test_loss": 10 * value + 2 * run.point["seed"]}
        (run.folder / "all_results.json").write_text(json.dumps(results))
    lines = tuned_table(grid, at_every_point(grid, runs)).splitlines()
    assert lines[0] == "| a |  | best gr_r | of | validation loss | test loss, mean ± std |"
    assert lines[2:] == [
        "| 1 | off | any | 1 | 7.5 | 71 ± 1.4 |", "| 1 | on | 4 | 3 | 1.5 | 11 ± 1.4 |",
        "| 2 | off | any | 1 | 8.5 | 81 ± 1.4 |", "| 2 | on | 5 | 3 | 1.5 | 11 ± 1.4 |",
    ]  # fmt: skip
    runs = [run for run in runs if run.name != "2_5_on_1"]
    assert tuned_table(grid, at_every_point(grid, runs)).splitlines()[-1] == "| 2 | on | 3 | 2 | 2.5 | 21 ± 1.4 |"


def test_a_table_in_the_shape_of_the_papers(training, tmp_path):
    axes = {"model": ["vit", "vit2"], "dataset_name": ["c", "d"]}
    grid = Grid(training.name, ARMS, "off", axes=axes, seeds=[0, 1])
    grid.published_like = {"optim": "adam"}
    grid.published = {"arms": {"on": "gr"}, "names": {"vit": "ViT", "c": "cifar", "adam": "Adam"}}
    (tmp_path / "p.csv").write_text(
        "table,model,dataset,optimizer,method,mean,std\nTable 2,ViT,cifar,Adam,gr,13.61,0.2\n"
    )
    runs = expand(grid, tmp_path, tmp_path)
    run_grid(training, runs, 2)
    lines = table_like_the_papers(grid, runs[:-1], tmp_path / "p.csv").splitlines()
    assert lines[0] == "| model |  | c | d |" and len(lines) == 6
    assert lines[2] == "| vit | off | 0.005 ± 0.0071 | 0.005 ± 0.0071 |"
    assert lines[3] == ("| vit | on | 0.11 ± 0.014<br>published: 13.61 ± 0.2 (ViT, cifar, Adam) | 0.11 ± 0.014 |")
    assert lines[5] == "| vit2 | on | 0.11 ± 0.014 | 0.1 (1 of 2 seeds) |"  # one run is missing
    grid.published = None
    assert "published" not in table_like_the_papers(grid, runs) + markdown_table(grid, runs)


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_the_paper_scales_are_the_published_tables(number, tmp_path):
    """Each point of the grid has a published number beside it, and each number of the table a point."""
    path = GRIDS / f"gr-table{number}.yaml"
    rows = {_key_of_row(row): row for row in _read_published(path.parent / "published-gr.csv")}
    found = set()
    for scale in ["paper", "paper_imagenet"] if number == 5 else ["paper"]:
        grid = load_grid(path, scale)
        assert grid.seeds == [0, 1, 2, 3, 4]
        grid.seeds = [0]
        found |= {_published_key(grid, run.point, run.point["arm"]) for run in expand(grid, tmp_path, tmp_path)}
    assert found <= set(rows)
    assert {key for key, row in rows.items() if row["table"] == f"Table {number}"} <= found


def test_published_numbers_are_those_of_the_same_label_noise(tmp_path):
    path = GRIDS / "label-noise.yaml"
    grid = load_grid(path, "paper")
    published_number = _published(grid, path.parent / grid.published["file"])
    found = {published_number(run.point, run.point["arm"]) for run in expand(grid, tmp_path, tmp_path)}
    names = "(ResNet-32, cifar10, SGD, label noise"
    accuracies = {0.2: (84.8, 95.1), 0.4: (68.8, 93.4), 0.6: (48.2, 90.5), 0.8: (26.2, 77.9)}
    published = {f"{100 - value:.1f} {names} {noise})" for noise, row in accuracies.items() for value in row}
    assert found == {*published, ""}
    assert published_number({"label_noise": "0.40"}, "vanilla GR") == f"6.6 {names} 0.4)"
    assert published_number({"label_noise": 0}, "vanilla GR") == published_number({}, "no GR") == ""


def test_an_unfinished_grid_has_a_table_too(finished):
    grid, runs = finished
    table = markdown_table(grid, [runs[0], *runs[6:]])
    assert "| 0.1 | off |" in table and "| 0.1 | on |" in table
    alone = markdown_table(grid, [run for run in runs if run.point["arm"] == "on"])
    assert "against off" in alone and "nan" not in alone


def test_a_single_point_is_a_dot_and_the_end_of_the_baseline_a_line(training, tmp_path):
    """As after a run of one epoch, which a line would not show."""
    grid = Grid(training.name, ARMS, "off")
    for epochs, marker in ((1, "o"), (2, "")):
        axis = Figure().subplots()
        history = [{"step": s, "eval_loss": 5.0 - s} for s in range(1, epochs + 1)]
        _plot_metric(axis, grid, {"off": [history], "on": [history]}, {"off": "blue", "on": "red"}, "step", "step")
        *arms, end = axis.get_lines()
        assert [line.get_marker() for line in arms] == [marker] * 2
        assert set(end.get_ydata()) == {5.0 - epochs}


def test_the_curves_show_what_was_memorized(finished, tmp_path, monkeypatch):
    """A further panel, with the mean over the seeds of the arm that logged it."""
    grid, runs = finished
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.append(figure))
    plot_arms(grid, runs, tmp_path / "curves.png")
    for run in runs:
        if run.point["arm"] == "on":
            log = [{"step": 1, "train_accuracy_wrong_labels": 0.1 * (1 + run.point["seed"])}]
            (run.folder / "trainer_state.json").write_text(json.dumps({"log_history": [*run.history(), *log]}))
    plot_arms(grid, runs, tmp_path / "curves.png")
    assert [len(figure.axes) for figure in figures] == [6, 8]
    for panel in figures[1].axes[3::4]:
        (line,) = panel.get_lines()
        assert line.get_xydata().tolist() == [[1, pytest.approx(20)]] and "wrong labels" in panel.get_ylabel()


def test_pictures(finished, tmp_path):
    grid, runs = finished
    plot_arms(grid, runs, tmp_path / "curves.png")
    plot_sensitivity(grid, runs, tmp_path / "sensitivity.png")
    with Image.open(tmp_path / "sensitivity.png") as picture:
        assert picture.size[0] > 600
    grid.axes["seed"] = [0, 1, 2]
    plot_heat_map(grid, runs, tmp_path / "map.png")
    for name in ("curves.png", "map.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 900


def compare(*arguments) -> str:
    command = [sys.executable, str(SCRIPTS / "compare.py"), *map(str, arguments), "--workers", "2", "--use_cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def local(grid: str, folder: Path) -> list:
    """What stands in for data and models on the Hub."""
    if grid == "forgetting":
        text = "\n\n".join(f"{i} brown foxes jump over {i % 9} lazy dogs." for i in range(800))
        (folder / "text.txt").write_text(text)
        return ["--dataset_name", folder / "text.txt"]
    if grid == "lora-radius":
        data, base = TESTS / "fixtures" / "instructions.jsonl", folder / "base"
        create_llama("llama-tiny", 300).save_pretrained(base)
        train_tokenizer([data.read_text()], 300, 256).save_pretrained(base)
        return ["--dataset_name", data, "--model_name_or_path", base, "--eval_examples", 4]
    return []


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_run(path, tmp_path):
    compare(
        "--preset", path.stem, "--scale", "smoke", "--seeds", 0, "--output_dir", tmp_path, *local(path.stem, tmp_path)
    )
    assert (tmp_path / "table.md").is_file() and any(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_the_script_runs_real_trainings(tmp_path):
    content = {"script": "train_vit.py", "metric": "eval_error", "percent": True, "arms": ARMS, "baseline": "off"}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    printed = compare("--preset", tmp_path / "grid.yaml", "--output_dir", tmp_path / "out", "--max_steps", 2,
                      "--max_eval_samples", 50, "--report_to", "none", "--seeds", 3,
                      "--launcher", f"{sys.executable} -W ignore")  # fmt: skip
    results = json.loads((tmp_path / "out" / "on_3" / "all_results.json").read_text())
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| on | {100 * results['eval_error']:.4g} |" in table and "--max_steps 2" in table
    assert "paired t-test against off." in table and "Published" not in table
    assert (tmp_path / "out" / "curves.png").exists() and "2 runs, 0 of them finished" in printed


@pytest.mark.parametrize("extra", [[], ["--resume_from_checkpoint", "last"], ["--resume-from-checkpoint=last"]])
def test_a_run_that_was_not_finished_is_started_in_its_folder_again(extra, training, tmp_path, monkeypatch):
    """What it has left is removed by the script, which would refuse it otherwise, or continued."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: commands.append(words) or Failed())
    runs = expand(Grid("training.py", ARMS, "off"), tmp_path, tmp_path, extra)
    run_grid(training, runs)
    assert len(commands) == 2
    assert all(("--overwrite_output_dir" in words) == (not extra) for words in commands)


class Failed:
    returncode = 1
