"""Compare training methods: run a grid of one of the training scripts, and report the results.

    python scripts/compare.py --preset gr-table2 --scale cpu --workers 2
    python scripts/compare.py --preset gr-table2 --scale cpu --dataset_name FOLDER --axis gr_r=0.02,0.05

Where hf_gr is installed, `hf-gr compare` is the same command.

A grid (a preset, or a file of your own) contains arms, which are compared with each other, axes, seeds and scales.
Other flags are passed to the script; `--axis FLAG=VALUE,VALUE` makes one an axis. Rerun the same command to continue
after an interruption: finished runs are not repeated. On another machine that shares the folder, the same command adds
workers.

The output folder gets results.csv (a row per run), table.md and curves.png; also sensitivity.png for one axis,
heat_map.png for two, or the picture that the grid names.
"""

import argparse
import functools
import importlib
import shlex
import shutil
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..cli import script, shipped
from ..cli.output_folder import require_writable
from ..errors import Failure
from ..reporting.comparison import (
    at_every_point,
    check_published,
    explanation,
    markdown_table,
    require_metric,
    table_like_the_papers,
    tuned_table,
    write_results,
)
from ..reporting.comparison_plots import plot_arms
from ..reporting.grid import Run, expand, run_grid, with_underscores
from ..reporting.grid_file import Grid, load_grid
from ..reporting.grid_pictures import PICTURES, picture_of
from ..reporting.redaction import redact

#: Metrics of our scripts for which lower is better. Those of other scripts are known after the first run.
METRICS = {
    "train_vit.py": (
        "eval_error",
        "eval_loss",
        "eval_nll",
        "eval_ece",
        "test_error",
        "test_loss",
        "test_nll",
        "test_ece",
    ),
    "pretrain_barlow_twins.py": ["eval_knn_error"],
    "pretrain_llama.py": ["eval_loss", "eval_perplexity", "forgetting"],
    "finetune_llama_lora.py": ["eval_loss", "eval_perplexity"],
}


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    presets = "\n".join(f"  {path.stem:17}{shipped.about(path)}" for path in sorted(shipped.GRIDS.glob("*.yaml")))
    parser = script.ArgumentParser(
        description=__doc__,
        epilog=f"presets:\n{presets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", required=True, help="a YAML file of your own, or one of those below")
    parser.add_argument("--scale", help="one of the grid's scales, e.g. smoke, cpu, paper")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/GRID-SCALE")
    parser.add_argument("--seeds", type=int, nargs="+", action="extend", help="instead of the grid's")
    parser.add_argument("--axis", action="append", default=[], metavar="FLAG=VALUE,VALUE")
    parser.add_argument("--workers", type=int, default=1, help="number of parallel runs, with one CPU thread each")
    parser.add_argument("--launcher", default=sys.executable, help="e.g. 'accelerate launch --num_processes 8'")
    return parser.parse_known_args(with_underscores(argv))


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options, extra = parse_args(argv)
    path = shipped.find("preset", options.preset, shipped.GRIDS)
    grid = load_grid(path, options.scale)
    recipe = grid.recipe and str(shipped.find("recipe", grid.recipe, shipped.RECIPES).resolve())
    grid = replace(grid, recipe=recipe, seeds=options.seeds or grid.seeds, axes=grid.axes | _axes(options.axis))
    launcher, program = _launcher(options.launcher), shipped.SCRIPTS / grid.script
    if options.workers < 1:
        raise ValueError(f"workers={options.workers}: at least one run at a time is needed. Give 1 or more.")
    folder = options.output_dir or Path("outputs") / "-".join(filter(None, (path.stem, options.scale)))
    picture_of(grid)  # refuses an unknown one before the first run
    runs = expand(grid, folder, shipped.RECIPES, extra)
    check_command_lines(grid, runs)
    published = path.parent / grid.published["file"] if grid.published else None
    if published:
        check_published(grid, published)
    require_writable(str(folder))

    unfinished = [run for run in runs if not run.is_finished]
    for run in runs:
        if run not in unfinished:
            require_metric(grid, run)
            run.history()
    print(f"{len(runs)} runs, {len(runs) - len(unfinished)} of them finished.")
    with tqdm(total=len(unfinished), unit="run") as progress:

        def on_end(run: Run, went_well: bool) -> None:
            progress.update()
            if went_well:
                require_metric(grid, run)
            else:
                progress.write(f"{run.name} failed: {last_line(log := run.folder / 'log.txt')}\n  Full log: {log}")

        if is_ours(grid):
            run_grid(f"{shipped.SCRIPTS_PACKAGE}.{program.stem}", runs, options.workers, on_end, [*launcher, "-m"])
        else:
            run_grid(program, runs, options.workers, on_end, launcher)

    finished = [run for run in runs if run.is_finished]
    if not finished:
        raise Failure(f"No run has finished; their output is in {folder}/*/log.txt.")
    command = shlex.join(redact([*script.program(__file__), *argv]))
    table = report(grid, finished, folder, published, command)
    print(f"\n{table}")
    if len(finished) < len(runs):
        raise Failure(f"{len(runs) - len(finished)} of {len(runs)} runs failed, see log.txt in their folders.")


def last_line(log: Path) -> str:
    """The last line of a failed script's output: the error."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def _axes(given: list[str]) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for axis in given:
        flag, _, text = axis.partition("=")
        flag, values = flag.removeprefix("--").replace("-", "_"), text.split(",")
        if not flag or not all(values):
            raise ValueError(f"--axis {axis}: a flag or a value is missing. Write FLAG=VALUE,VALUE.")
        if flag in axes:
            raise ValueError(f"--axis {axis}: {flag} has an axis already. Write all its values in one --axis.")
        axes[flag] = values
    return axes


def _launcher(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"launcher={text!r}: {error}. Close the quotation.") from error
    if not words or shutil.which(words[0]) is None:
        raise ValueError(f"launcher={text!r}: there is no such program. Give one, e.g. 'accelerate launch'.")
    return words


def check_command_lines(grid: Grid, runs: list[Run]) -> None:
    """Raise `ValueError` for a flag, value, file or metric that would make every run fail."""
    if not (path := shipped.SCRIPTS / grid.script).is_file():
        raise ValueError(f"script={grid.script!r}: there is no file {path}. Give an existing one.")
    if not is_ours(grid):
        return  # importing a script of someone else may have any effect
    if grid.script not in METRICS:
        raise ValueError(f"script={grid.script!r} does not train. Choose one of {', '.join(METRICS)}.")
    if grid.metric not in METRICS[grid.script]:
        raise ValueError(
            f"metric={grid.metric!r}: {grid.script} reports no such metric for which lower is better. Choose one of "
            f"{', '.join(METRICS[grid.script])}."
        )
    parser = _parser_of(path.stem)
    for run in (run for run in runs if run.point["seed"] == grid.seeds[0]):
        words = run.arguments[1:] if grid.recipe else run.arguments
        parser.refuse(parser.parse_known_args(words)[1])
    parser.refuse_unknown(flag for flags in grid.ignores.values() for flag in flags)


def is_ours(grid: Grid) -> bool:
    """Whether the script of the grid ships with the package."""
    return (shipped.SCRIPTS / grid.script).parent == shipped.SCRIPTS


@functools.cache
def _parser_of(name: str) -> script.ArgumentParser:
    module = importlib.import_module(f"{shipped.SCRIPTS_PACKAGE}.{name}")
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and is_dataclass(kind)]
    defined = [kind for kind in kinds if kind.__module__ == module.__name__]
    defined = [kind for kind in defined if not any(issubclass(other, kind) for other in defined if other is not kind)]
    configs = [kind for kind in kinds if issubclass(kind, TrainingArguments)]
    return script.ArgumentParser([*defined, max(configs, key=lambda kind: len(kind.__mro__))])


def report(grid: Grid, runs: list[Run], folder: Path, published: Path | None, command: str) -> str:
    """Write the results of the finished runs, and return the table."""
    write_results(runs, folder / "results.csv")
    runs = at_every_point(grid, runs)
    table = markdown_table(grid, runs, published)
    if len(grid.axes) > 1:
        table = f"{table_like_the_papers(grid, runs, published)}\n{table}"
    if grid.tuned:
        table = f"{tuned_table(grid, runs)}\n{table}"
    (folder / "table.md").write_text(f"`{command}`\n\n{table}\n{explanation(grid)}", encoding="utf-8")
    picture = picture_of(grid)
    if picture is None or PICTURES[picture].with_curves:
        plot_arms(grid, runs, folder / "curves.png")
    if picture:
        PICTURES[picture].draw(grid, runs, folder / f"{picture}.png")
    return table


if __name__ == "__main__":
    script.run(main)
